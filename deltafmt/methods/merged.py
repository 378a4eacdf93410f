"""What merging leaves behind: predictions of a tensor that is its base plus or times little.

Merged adapters, rows that only decayed, and mixtures of several models. Each is found by itself and offered; what is
smallest in the archive is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..dtypes import DTYPES, Shape, round_to, widen
from ..limits import SUM_TERMS
from ..operators import Decayed, Lowrank, Operator, Patch, Scaled, Sum, Target
from .adapter import find_adapter, likely_kind
from .affine import are_rows_scaled, mixture, row_scales
from .decay import decay_table, may_have_decayed
from .matrices import Index, Wide, spread, wide_of
from .pair import Pair, are_ordinary, are_small, matrix
from .prediction import Computed, Elements, Prediction, Referred
from .recovery import IntegerFactors
from .sketch import remainder, side_of_part

_DTYPES = ("BF16", "F16", "F32")
_SMALLEST = 4096  # elements; what could be saved on fewer is less than what says so
_MIXED = 1 << 18  # elements are enough to tell a mixture
_FEWEST_ROWS = 256  # tell what kind of change it was
_FEWEST_BITS = 0.4  # a changed weight, below which low rank has little to save
_MOST = 0.8  # of the elements that changed are right: the others were trained


def computed(name: str, tensor: Elements, bases: Sequence[Referred], stored: float) -> Iterator[Prediction]:
    """Predictions of a tensor that may be better than its bases as they are.

    A look at a small part decides what is worth an attempt: most fine-tunes are no merges, and should take no time.

    Args:
        name: of the tensor.
        tensor: the tensor that is to be stored.
        bases: what the bases have of that name, the closest first.
        stored: bytes that it takes without.
    """
    bases = [base for base in bases if base.dtype.name != "F64"][:SUM_TERMS]  # of float64 the arithmetic is another
    if tensor.dtype.name not in _DTYPES or tensor.bits.size < _SMALLEST or not bases:
        return
    search = _Search(name, tensor, bases, stored)
    if (mixture := search.mixture()) is not None:
        yield mixture
    if len(tensor.shape) > 1:
        yield from search.of_closest()


class _Search:
    """The search for one tensor; the arguments are those of `computed`."""

    def __init__(self, name: str, tensor: Elements, bases: Sequence[Referred], stored: float) -> None:
        self._name, self._tensor, self._bases, self._stored = name, tensor, bases, stored
        self._wide = wide_of(tensor.dtype)
        # Their bits are padded to the tensor's rows already: `Rows` of them changes nothing.
        self._tensors = {base.ref: Elements(base.dtype, tensor.shape, base.bits) for base in bases}

    def mixture(self) -> Prediction | None:
        """The best mixture of all bases of the tensor's shape."""
        bases = [base for base in self._bases if base.rows is None]
        if len(bases) < 2:
            return None
        part = spread(self._tensor.bits.size, _MIXED)
        bits = self._tensor.bits[part]
        parts = [widen(base.bits[part], base.dtype, np.dtype("f8")) for base in bases]
        if not are_ordinary(*(each[None] for each in (*parts, widen(bits, self._tensor.dtype, self._wide)))):
            return None
        numbers = mixture(parts, bits, self._tensor.dtype)
        arrays = {f"scale{place}": self._floats(number, ()) for place, number in enumerate(numbers)}

        def recipe(nodes: Mapping[str, Operator]) -> Operator:
            return Sum(tuple(Scaled(base.ref, node) for base, node in zip(bases, nodes.values(), strict=True)))

        return self._computed(arrays, recipe, self._wide)

    def of_closest(self) -> Iterator[Prediction]:
        """Rows of the closest base decayed or scaled, or an adapter merged into it: of the rows that changed."""
        pair = self._closest()
        places = spread(len(pair.rows), max(side_of_part(pair.shape), _FEWEST_ROWS))
        some = pair.part(places)
        if some is None:
            return
        scaled = are_rows_scaled(some.base, some.bits, pair.dtype)
        if pair.like.dtype == pair.dtype and pair.dtype.name == "F32" and may_have_decayed(some.base, some.changed):
            decayed = self._decayed(pair)
            if decayed is not None:
                yield decayed
                if not scaled and self._are_most_right(decayed, pair.rows[places]):
                    return
        kind = likely_kind(pair, some) if self._is_much(pair) else None
        if not (scaled or kind) or not pair.is_ordinary:
            return
        scales = row_scales(pair.base, pair.bits, pair.dtype) if scaled else None
        if scales is not None and are_small(scales):
            yield self._combined(pair, pair.to_all_rows(scales, 1), None)
            if not self._is_much(pair, float(np.mean(scales == 1))):
                return
        found = find_adapter(pair, kind) if kind else None
        if found is not None:
            yield self._combined(pair, found.magnitudes, found.factors)

    def _closest(self) -> Pair:
        """The closest base, in the tensor's dtype if it seems to have been rounded to that before it was added to."""
        closest = self._bases[0]
        shared = self._tensor.shape[0] if closest.rows is None else closest.rows  # those behind these are new
        pair = Pair(self._tensors[closest.ref], self._tensor, np.arange(shared))
        return (pair.rounded() if _was_rounded(pair) else pair).differing()

    def _is_much(self, pair: Pair, share: float = 1) -> bool:
        """Whether low rank of these rows could save something of this share of what is stored without."""
        return 8 * self._stored * share > _FEWEST_BITS * len(pair.rows) * pair.shape[1]

    def _decayed(self, pair: Pair) -> Prediction | None:
        """The closest base, moved by what decay does to float32."""
        table = decay_table(matrix(pair.like), matrix(pair.tensor), pair.rows)
        if table is None:
            return None
        arrays = {"table": Elements(DTYPES["U32"], table.shape, table.reshape(-1))}
        return self._computed(arrays, lambda nodes: Decayed(self._bases[0].recipe, nodes["table"]), self._wide)

    def _are_most_right(self, prediction: Prediction, rows: Index) -> bool:
        """Whether a prediction leaves little to find in these rows."""
        dtype, bits = self._tensor.dtype, matrix(self._tensor)
        row = bits.shape[1]
        right = [
            np.count_nonzero(prediction.predicted(place * row, (place + 1) * row, dtype, None)[0] == bits[place])
            for place in rows.tolist()
        ]
        return bool(sum(right) > _MOST * len(rows) * row)

    def _combined(self, pair: Pair, scales: Wide | None, factors: IntegerFactors | None) -> Prediction:
        """The closest base, rounded first if `_closest` did, times `scales`, and `factors` added."""
        node = self._bases[0].recipe
        arrays: dict[str, Elements] = {}
        accumulator = self._wide
        if rounded := pair.like.dtype != self._bases[0].dtype:
            arrays["rounded"] = _zeros(self._tensor)
        if scales is not None:
            arrays["scale"] = self._floats(scales, scales.shape)
        if factors is not None:
            arrays |= {"lora_a": _integers(factors.a), "lora_b": _integers(factors.b)}
            accumulator = np.promote_types(accumulator, factors.accumulator)

        def recipe(nodes: Mapping[str, Operator]) -> Operator:
            base = Patch(node, nodes["rounded"]) if rounded else node
            scaled = Scaled(base, nodes["scale"]) if "scale" in nodes else base
            if factors is None:
                return scaled
            return Sum((scaled, Lowrank(nodes["lora_a"], nodes["lora_b"], 2.0**factors.exponent)))

        return self._computed(arrays, recipe, accumulator)

    def _floats(self, values: Any, shape: Shape) -> Elements:
        """Numbers as they are stored: in the type that holds the tensor's values before they are rounded."""
        dtype = DTYPES["F64" if self._wide.itemsize == 8 else "F32"]
        return Elements(dtype, shape, np.asarray(values, dtype.values).reshape(-1).view(dtype.bits))

    def _computed(
        self,
        arrays: Mapping[str, Elements],
        recipe: Callable[[Mapping[str, Operator]], Operator],
        accumulator: np.dtype[Any],
    ) -> Prediction:
        target = Target(self._name, self._tensor.dtype, self._tensor.shape, accumulator)
        return Computed(target, self._tensors, arrays, recipe)


def _was_rounded(pair: Pair) -> bool:
    """Whether `like`, of more bits than the tensor, seems to have been rounded to its dtype before it was added to."""
    if pair.like.dtype.mantissa_bits <= pair.dtype.mantissa_bits:
        return False
    some = pair.part(spread(len(pair.rows), _FEWEST_ROWS))
    if some is None:
        return False
    side = side_of_part(pair.shape)
    short = widen(round_to(some.base, pair.dtype), pair.dtype, pair.wide)
    return remainder(short, some.bits, pair.dtype, side).share < remainder(some.base, some.bits, pair.dtype, side).share


def _zeros(tensor: Elements) -> Elements:
    """A residual that changes nothing: a patch with it rounds its prediction to the tensor's dtype."""
    return Elements(DTYPES[f"U{8 * tensor.dtype.width}"], tensor.shape, np.zeros_like(tensor.bits))


def _integers(values: Any) -> Elements:
    dtype = DTYPES[f"I{8 * values.itemsize}"]
    return Elements(dtype, values.shape, np.ascontiguousarray(values).reshape(-1).view(dtype.bits))
