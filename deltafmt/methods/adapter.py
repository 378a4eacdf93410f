"""An adapter merged into a pair: low rank added to rows (LoRA, arXiv 2106.09685) or multiples (DoRA, 2402.09353)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..dtypes import Dtype
from ..gemm import alone
from .magnitudes import have_magnitudes, magnitudes, rough_magnitudes, row_products
from .matrices import Matrix, Wide, spread
from .pair import HUGE, Pair, Part, are_ordinary
from .recovery import PART, IntegerFactors, most_components, promising, recover
from .rounded_fit import room_to_fit
from .sketch import Remainder, leaves_noise, looked_at_closely, remainder, side_of_part

_REPLACED = 10  # times as much as usual has a row changed, and more than it was, that was replaced: a new token's
_CONCENTRATED = 0.01  # of a change is left by few components: low rank times magnitudes that follow it (DoRA)
_SPREAD = 0.02  # of a change: if rough magnitudes and few components leave more, better ones will not make it low rank

_Magnitudes = Callable[[Matrix, Matrix], Wide]


class Adapter(NamedTuple):
    """What was merged.

    Attributes:
        factors: of the low-rank matrix, of all rows of the tensor.
        magnitudes: float64 `[all rows]`, as they are stored; None if there are none.
    """

    factors: IntegerFactors
    magnitudes: Wide | None


def may_be_merged(pair: Pair, some: Part) -> Callable[[], Adapter | None] | None:
    """Whether few components, added to the rows or to multiples of them, seem to explain how they changed.

    Args:
        pair: what changed.
        some: of its rows as many as tell, in all columns.

    Returns:
        What looks for the adapter, in seconds; None if there is most likely none, in milliseconds.
    """
    side = side_of_part(pair.shape)
    left = remainder(some.base, some.bits, pair.dtype, side)
    left = looked_at_closely(left, pair.base, pair.bits, pair.dtype)
    likely: _Magnitudes | None = None
    if have_magnitudes(some.base, some.changed) or (not left.is_noise and left.share < _CONCENTRATED):
        likely, left = _grown(some, pair.dtype, side)
    if not (left.is_noise and _is_promising(pair, likely)):
        return None
    return lambda: _adapter(pair, has_magnitudes=likely is not None)


def _adapter(pair: Pair, has_magnitudes: bool) -> Adapter | None:
    """Low rank added to these rows, or to multiples of them, but for those that were replaced."""
    with room_to_fit(pair.shape, pair.wide, most_components(pair.shape)), alone():
        pair = pair.only(~_are_replaced(pair.base, pair.changed))
        if has_magnitudes:
            scales = magnitudes(pair.base, pair.changed)
            if not np.abs(scales).max(initial=0) < HUGE:
                return None
            pair = pair.times(scales)
            if not are_ordinary(pair.base):
                return None
        found = recover(pair.base, pair.bits, pair.dtype) if leaves_noise(pair.base, pair.bits, pair.dtype) else None
    if found is None:
        return None
    factors = IntegerFactors(pair.spread_out(found.b.T, 0).T, found.a, found.exponent)
    return Adapter(factors, None if pair.scales is None else pair.spread_out(pair.scales, 1))


def _grown(some: Part, dtype: Dtype, side: int) -> tuple[_Magnitudes, Remainder]:
    """What tells the magnitudes of these rows well enough to look at them, and what they leave.

    `magnitudes` takes several passes. Where all weights were trained, with weight decay, rough ones leave too much
    already, and it is not called.
    """
    multiples = _multiplied(some.base, rough_magnitudes(some.base, some.changed))
    if multiples is not None:
        left = remainder(multiples, some.bits, dtype, side)
        if left.is_noise or left.share > _SPREAD:
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
    return base * numbers.astype(base.dtype)[:, None] if np.abs(numbers).max(initial=0) < HUGE else None


def _are_replaced(base: Matrix, changed: Matrix) -> npt.NDArray[np.bool_]:
    """Of each row, whether it is another rather than changed like most: it would take a component of its own."""
    own, _, change = row_products(base, changed)
    replaced: npt.NDArray[np.bool_] = (change >= own) & (change > _REPLACED**2 * np.median(change))
    return replaced
