"""An adapter merged into a pair: low rank added to rows (LoRA, arXiv 2106.09685) or multiples (DoRA, 2402.09353)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..dtypes import Dtype
from ..gemm import alone
from .magnitudes import have_magnitudes, magnitudes, rough_magnitudes, row_products
from .matrices import Matrix, Wide, spread
from .pair import Pair, Part, are_small
from .recovery import PART, IntegerFactors, most_components, promising, recover
from .rounded_fit import room_to_fit
from .sketch import Remainder, leaves_noise, looked_at_closely, remainder, side_of_part

_REPLACED = 10  # times the median change, and more than its own norm: a row that changed so was replaced, as new tokens
_CONCENTRATED = 0.01  # share of a change: if few components leave less, there may be magnitudes that follow them (DoRA)
_NOT_LOW_RANK = 0.02  # if rough magnitudes and few components leave more of it, better magnitudes will not help

Kind = Literal["lora", "dora"]


class Adapter(NamedTuple):
    """What was merged.

    Attributes:
        factors: of the low-rank matrix, of all rows of the tensor.
        magnitudes: float32, of F32 float64 `[all rows]`, as they are stored; None if there are none.
    """

    factors: IntegerFactors
    magnitudes: Wide | None


def likely_kind(pair: Pair, some: Part) -> Kind | None:
    """Which adapter seems to explain how these rows changed: a look of milliseconds. None if most likely none.

    Args:
        pair: what changed.
        some: of its rows as many as tell, in all columns.
    """
    side = side_of_part(pair.shape)
    left = remainder(some.base, some.bits, pair.dtype, side)
    left = looked_at_closely(left, pair.base, pair.bits, pair.dtype)
    likely: _Magnitudes | None = None
    if have_magnitudes(some.base, some.changed) or (not left.is_noise and left.share < _CONCENTRATED):
        likely, left = _likely_magnitudes(some, pair.dtype, side)
    if not (left.is_noise and _is_promising(pair, likely)):
        return None
    return "lora" if likely is None else "dora"


def find_adapter(pair: Pair, kind: Kind) -> Adapter | None:
    """Low rank added to these rows, or to multiples of them, but for those that were replaced: a search of seconds.

    None if there is none after all.
    """
    with room_to_fit(pair.shape, pair.wide, most_components(pair.shape)), alone():
        kept: Pair | None = pair.only(~_are_replaced(pair.base, pair.changed))
        if kept is not None and kind == "dora":
            kept = kept.with_scales(magnitudes(kept.base, kept.changed))
        if kept is None or not leaves_noise(kept.base, kept.bits, kept.dtype):
            return None
        found = recover(kept.base, kept.bits, kept.dtype)
    if found is None:
        return None
    factors = IntegerFactors(kept.to_all_rows(found.b.T, 0).T, found.a, found.exponent)
    return Adapter(factors, None if kept.scales is None else kept.to_all_rows(kept.scales, 1))


_Magnitudes = Callable[[Matrix, Matrix], Wide]


def _likely_magnitudes(some: Part, dtype: Dtype, side: int) -> tuple[_Magnitudes, Remainder]:
    """What tells the magnitudes of these rows well enough to look at them, and what they leave.

    `magnitudes` takes several passes. Where all weights were trained, with weight decay, rough ones leave too much
    already, and it is not called.
    """
    multiples = _multiplied(some.base, rough_magnitudes(some.base, some.changed))
    if multiples is not None:
        left = remainder(multiples, some.bits, dtype, side)
        if left.is_noise or left.share > _NOT_LOW_RANK:
            return rough_magnitudes, left
    multiples = _multiplied(some.base, magnitudes(some.base, some.changed))
    return magnitudes, remainder(some.base if multiples is None else multiples, some.bits, dtype, side)


def _is_promising(pair: Pair, likely: _Magnitudes | None) -> bool:
    """Whether low rank explains how some of these rows, or multiples of them, changed in some columns."""
    part = pair.part(np.ix_(*(spread(length, PART) for length in pair.shape)))
    if part is None:
        return False
    kept = ~_are_replaced(part.base, part.changed)
    base, changed = part.base[kept], part.changed[kept]
    multiples = base if likely is None else _multiplied(base, likely(base, changed))
    return multiples is not None and promising(multiples, part.bits[kept], pair.dtype, pair.shape)


def _multiplied(base: Wide, numbers: Wide) -> Wide | None:
    """Each row times its number; None where one is huge."""
    return base * numbers.astype(base.dtype)[:, None] if are_small(numbers) else None


def _are_replaced(base: Matrix, changed: Matrix) -> npt.NDArray[np.bool_]:
    """Of each row, whether it is another rather than changed like most: it would take a component of its own."""
    own, _, change = row_products(base, changed)
    replaced: npt.NDArray[np.bool_] = (change >= own) & (change > _REPLACED**2 * np.median(change))
    return replaced
