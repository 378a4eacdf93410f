"""What merging leaves behind: predictions of a tensor that is its base plus or times little.

Merged adapters (W + s B A, rounded), also with magnitudes (DoRA, arXiv 2402.09353: scaled rows of that), rows that only
decayed, and mixtures of several models. Each is found by itself and offered; what is smallest in the archive is used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import DTYPES, Bits, Dtype, Shape, widen
from ..gemm import alone
from ..limits import SUM_TERMS
from ..operators import Lowrank, Operator, Patch, Scaled, Sum, Target
from ..operators.patch import cast
from .affine import are_rows_scaled, have_magnitudes, magnitudes, mixture, row_products, row_scales
from .matrices import Index, Matrix, Rows, Wide, WideRows, row_blocks
from .prediction import Computed, Elements, Prediction, Referred
from .recovery import PART, IntegerFactors, promising, recover
from .rounded_fit import most_at_once
from .sketch import leaves_noise, remainder, spread

_DTYPES = ("BF16", "F16", "F32")
_SMALLEST = 4096  # elements; what could be saved on fewer is less than what says so
_MIXED = 1 << 18  # elements are enough to tell a mixture
_ROWS = 256  # are enough to tell what kind of change it was
_FEWEST_BITS = 0.4  # a changed weight, below which low rank has little to save
_REPLACED = 10  # times as much as usual has a row changed, and more than it was, that was replaced: a new token's
_CONCENTRATED = 0.01  # of a change is left by few components: low rank times magnitudes that follow it (DoRA)
_HUGE = 2.0**40  # weights beyond: squares and sums of them might leave float32, and nothing comes of it
_AT_ONCE = 3 << 22  # elements, of float32, that are fitted side by side; each takes some 20 bytes of memory


def computed(name: str, tensor: Elements, bases: Sequence[Referred], stored: float) -> Iterator[Prediction]:
    """Predictions of a tensor that may be better than its bases as they are.

    A look at a small part decides what is worth an attempt: most fine-tunes are no merges, and should take no time.

    Args:
        name: of the tensor.
        tensor: the tensor that is to be stored.
        bases: tensors of its shape in the bases, the closest first.
        stored: bytes that it takes without.
    """
    bases = [base for base in bases if base.dtype.name != "F64"][:SUM_TERMS]  # of float64 the arithmetic is another
    if tensor.dtype.name not in _DTYPES or tensor.bits.size < _SMALLEST or not bases:
        return
    search = _Search(name, tensor, bases, stored)
    if len(bases) > 1 and (mixture := search.mixture()) is not None:
        yield mixture
    if len(tensor.shape) > 1:
        yield from search.of_closest()


class _Search:
    def __init__(self, name: str, tensor: Elements, bases: Sequence[Referred], stored: float) -> None:
        self._name, self._tensor, self._bases, self._stored = name, tensor, bases, stored
        self._wide = np.dtype("f8" if tensor.dtype.name == "F32" else "f4")
        self._like = Elements(bases[0].dtype, tensor.shape, bases[0].bits)  # the closest; rounded, if it was before

    def mixture(self) -> Prediction | None:
        """The best mixture of all bases."""
        part = spread(self._tensor.bits.size, _MIXED)
        bits = self._tensor.bits[part]
        parts = [widen(base.bits[part], base.dtype, np.dtype("f8")) for base in self._bases]
        if not _is_ordinary([each[None] for each in (*parts, widen(bits, self._tensor.dtype, self._wide))]):
            return None
        numbers = mixture(parts, bits, self._tensor.dtype)
        arrays = {f"scale{place}": self._floats(number, ()) for place, number in enumerate(numbers)}

        def recipe(nodes: Mapping[str, Operator]) -> Operator:
            return Sum(tuple(Scaled(base.ref, node) for base, node in zip(self._bases, nodes.values(), strict=True)))

        return self._computed(arrays, recipe, self._wide)

    def of_closest(self) -> Iterator[Prediction]:
        """Rows of the closest base scaled, low rank added to it, or both. Rows that nothing changed are left out."""
        tensor, like = self._tensor, self._like
        bits, like_bits = tensor.bits.reshape(tensor.shape[0], -1), like.bits.reshape(tensor.shape[0], -1)
        rows = _differing(bits, like_bits) if like.dtype == tensor.dtype else np.arange(len(bits))
        some = rows[spread(len(rows), _ROWS)]
        base = widen(like_bits[some], like.dtype, self._wide)
        changed = widen(bits[some], tensor.dtype, self._wide)
        if not _is_ordinary([base, changed]):
            return
        if like.dtype.mantissa_bits > tensor.dtype.mantissa_bits:  # it may have been rounded before it was added to
            short = widen(_rounded(like_bits[some], like.dtype, tensor.dtype), tensor.dtype, self._wide)
            shares = [remainder(each, bits[some], tensor.dtype).share for each in (short, base)]
            if shares[0] < shares[1]:
                rounded = _rounded(like_bits, like.dtype, tensor.dtype).reshape(-1)
                self._like = Elements(tensor.dtype, tensor.shape, rounded)
                yield from self.of_closest()
                return
        scaled = are_rows_scaled(base, bits[some], tensor.dtype)
        grown = have_magnitudes(base, changed)
        low = 8 * self._stored > _FEWEST_BITS * len(rows) * bits.shape[1]
        if low:
            left = remainder(base, bits[some], tensor.dtype)
            grown = grown or bool(not left.is_noise and left.share < _CONCENTRATED)
            if grown:
                left = remainder(magnitudes(base, changed)[:, None] * base, bits[some], tensor.dtype)
            low = left.is_noise and self._is_promising(like_bits, bits, rows, grown)
        if not (scaled or low):
            return
        base_rows = self._base(like_bits, rows)
        if not _is_ordinary([base_rows, WideRows(bits, rows, tensor.dtype, self._wide)]):
            return
        if scaled and (scales := row_scales(base_rows, Rows(bits, rows), tensor.dtype)) is not None:
            yield self._combined(self._spread_out(scales, rows, 1), None)
            others = np.count_nonzero(scales == 1) / len(rows)
            low = low and bool(8 * self._stored * others > _FEWEST_BITS * len(rows) * bits.shape[1])
        if low:
            with _ROOM.taken(most_at_once((len(rows), bits.shape[1]), self._wide)), alone():
                found = self._low_rank(like_bits, bits, rows, grown)
            if found is not None:
                yield found

    def _is_promising(self, like_bits: Bits, bits: Bits, rows: Index, grown: bool) -> bool:
        """Whether low rank explains how some of these rows, or multiples of them, changed in some columns."""
        columns = spread(bits.shape[1], PART)
        part = np.ix_(rows[spread(len(rows), PART)], columns)
        base = widen(like_bits[part], self._like.dtype, self._wide)
        changed = widen(bits[part], self._tensor.dtype, self._wide)
        if not _is_ordinary([base, changed]):
            return False
        kept = ~_are_replaced(base, changed)
        base, changed = base[kept], changed[kept]
        if grown:
            base *= magnitudes(base, changed).astype(self._wide)[:, None]
        return promising(base, bits[part][kept], self._tensor.dtype, (len(rows), bits.shape[1]))

    def _low_rank(self, like_bits: Bits, bits: Bits, rows: Index, grown: bool) -> Prediction | None:
        """Low rank added to these rows but for those that were replaced; if they have `grown`, to multiples of them."""
        dtype = self._tensor.dtype
        kept = ~_are_replaced(self._base(like_bits, rows), WideRows(bits, rows, dtype, self._wide))
        rows = rows[kept]
        base, target = self._base(like_bits, rows), Rows(bits, rows)
        scales = None
        if grown:
            numbers = self._floats(magnitudes(base, WideRows(bits, rows, dtype, self._wide)), (len(rows),))
            stored = numbers.bits.view(numbers.dtype.values)
            scales = self._spread_out(stored, rows, 1)
            base = self._base(like_bits, rows, stored)
            if not _is_ordinary([base]):
                return None
        factors = recover(base, target, dtype) if leaves_noise(base, target, dtype) else None
        if factors is None:
            return None
        b = self._spread_out(factors.b.T, rows, 0).T
        return self._combined(scales, IntegerFactors(b, factors.a, factors.exponent))

    def _base(self, like_bits: Bits, rows: Index, scales: Wide | None = None) -> WideRows:
        return WideRows(like_bits, rows, self._like.dtype, self._wide, scales)

    def _spread_out(self, values: Any, rows: Index, others: float) -> Any:
        """`values` of some rows as those of all, with the same for all others."""
        everywhere = np.full((self._tensor.shape[0], *values.shape[1:]), others, values.dtype)
        everywhere[rows] = values
        return everywhere

    def _combined(self, scales: Wide | None, factors: IntegerFactors | None) -> Prediction:
        ref = self._bases[0].ref
        arrays: dict[str, Elements] = {}
        accumulator = self._wide
        if rounded := self._like.dtype != self._bases[0].dtype:
            arrays["rounded"] = _zeros(self._tensor)
        if scales is not None:
            arrays["scale"] = self._floats(scales, scales.shape)
        if factors is not None:
            arrays |= {"lora_a": _integers(factors.a), "lora_b": _integers(factors.b)}
            accumulator = np.promote_types(accumulator, factors.accumulator)

        def recipe(nodes: Mapping[str, Operator]) -> Operator:
            like = Patch(ref, nodes["rounded"]) if rounded else ref
            scaled = Scaled(like, nodes["scale"]) if "scale" in nodes else like
            if factors is None:
                return scaled
            return Sum((scaled, Lowrank(nodes["lora_a"], nodes["lora_b"], 2.0**factors.exponent)))

        return self._computed(arrays, recipe, accumulator)

    def _floats(self, values: Any, shape: Shape) -> Elements:
        """Numbers as they are stored: in the type that holds the tensor's values before they are rounded."""
        dtype = DTYPES["F64" if self._wide.itemsize == 8 else "F32"]
        return Elements(dtype, shape, np.asarray(values, dtype.values).reshape(-1).view(dtype.bits))

    def _computed(self, arrays: Mapping[str, Elements], recipe: Any, accumulator: np.dtype[Any]) -> Prediction:
        target = Target(self._name, self._tensor.dtype, self._tensor.shape, accumulator)
        tensors = {base.ref: Elements(base.dtype, self._tensor.shape, base.bits) for base in self._bases}
        return Computed(target, tensors, arrays, recipe)


def _rounded(bits: Bits, dtype: Dtype, target: Dtype) -> Bits:
    """A matrix in another dtype."""
    rounded = np.empty(bits.shape, target.bits)
    for rows in row_blocks(bits.shape):
        rounded[rows] = cast(bits[rows].reshape(-1), dtype, target).reshape(-1, bits.shape[1])
    return rounded


def _zeros(tensor: Elements) -> Elements:
    """A residual that changes nothing: a patch with it rounds its prediction to the tensor's dtype."""
    return Elements(DTYPES[f"U{8 * tensor.dtype.width}"], tensor.shape, np.zeros_like(tensor.bits))


def _integers(values: Any) -> Elements:
    dtype = DTYPES[f"I{8 * values.itemsize}"]
    return Elements(dtype, values.shape, np.ascontiguousarray(values).reshape(-1).view(dtype.bits))


def _differing(bits: Bits, like: Bits) -> Index:
    """The rows in which two matrices of one shape differ."""
    blocks = [(bits[rows] != like[rows]).any(axis=1) for rows in row_blocks(bits.shape)]
    return np.flatnonzero(np.concatenate(blocks)) if blocks else np.arange(0)


def _are_replaced(base: Matrix, changed: Matrix) -> npt.NDArray[np.bool_]:
    """Of each row, whether it is another rather than changed like most: it would take a component of its own."""
    own, _, change = row_products(base, changed)
    replaced: npt.NDArray[np.bool_] = (change >= own) & (change > _REPLACED**2 * np.median(change))
    return replaced


def _is_ordinary(matrices: Sequence[Matrix]) -> bool:
    """Whether arithmetic makes sense: no NaN, no infinity, nothing huge."""
    blocks = (each[rows] for each in matrices for rows in row_blocks(each.shape))
    return all(values.min(initial=0) > -_HUGE and values.max(initial=0) < _HUGE for values in blocks)


class _Room:
    """For how many elements at once there is memory: who wants more waits for others to leave, or is alone."""

    def __init__(self, elements: int) -> None:
        self._elements = self._free = elements
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, elements: int) -> Iterator[None]:
        taken = min(elements, self._elements)
        with self._changed:
            self._changed.wait_for(lambda: taken <= self._free)
            self._free -= taken
        try:
            yield
        finally:
            with self._changed:
                self._free += taken
                self._changed.notify_all()


_ROOM = _Room(_AT_ONCE)
