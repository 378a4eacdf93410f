"""What merging leaves behind: predictions of a tensor that is its base plus or times little.

Merged adapters (W + s B A, rounded), also with magnitudes (DoRA, arXiv 2402.09353: scaled rows of that), rows that only
decayed, and mixtures of several models. Each is found by itself and offered; what is smallest in the archive is used.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..dtypes import DTYPES, Bits, Shape, widen
from ..gemm import alone
from ..limits import SUM_TERMS
from ..operators import Lowrank, Operator, Scaled, Sum, Target
from .affine import are_rows_scaled, have_magnitudes, magnitudes, mixture, row_scales
from .intervals import Wide
from .prediction import Computed, Elements, Prediction, Referred
from .recovery import PART, IntegerFactors, promising, recover
from .sketch import Index, leaves_noise, spread

_DTYPES = ("BF16", "F16", "F32")
_SMALLEST = 4096  # elements; what could be saved on fewer is less than what says so
_MIXED = 1 << 18  # elements are enough to tell a mixture
_ROWS = 256  # are enough to tell what kind of change it was
_FEWEST_BITS = 0.4  # a changed weight, below which low rank has little to save
_REPLACED = 10  # times as much as usual has a row changed, and more than it was, that was replaced: a new token's
_HUGE = 2.0**40  # weights beyond: squares and sums of them might leave float32, and nothing comes of it
_LARGE = 1 << 24  # elements; of larger matrices only one is looked at at a time
_LARGEST = 1 << 26  # elements of a matrix that is looked at for low rank: it takes 20 to 40 bytes of memory for each

_ONE_LARGE = threading.Lock()  # bounds the memory


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

    def mixture(self) -> Prediction | None:
        """The best mixture of all bases."""
        part = spread(self._tensor.bits.size, _MIXED)
        bits = self._tensor.bits[part]
        parts = [widen(base.bits[part], base.dtype, np.dtype("f8")) for base in self._bases]
        if not _is_ordinary([*parts, widen(bits, self._tensor.dtype, self._wide)]):
            return None
        numbers = mixture(parts, bits, self._tensor.dtype)
        arrays = {f"scale{place}": self._floats(number, ()) for place, number in enumerate(numbers)}

        def recipe(nodes: Mapping[str, Operator]) -> Operator:
            return Sum(tuple(Scaled(base.ref, node) for base, node in zip(self._bases, nodes.values(), strict=True)))

        return self._computed(arrays, recipe, self._wide)

    def of_closest(self) -> Iterator[Prediction]:
        """Rows of the closest base scaled, low rank added to it, or both. Rows that nothing changed are left out."""
        tensor, like = self._tensor, self._bases[0]
        bits, like_bits = tensor.bits.reshape(tensor.shape[0], -1), like.bits.reshape(tensor.shape[0], -1)
        rows = np.flatnonzero((bits != like_bits).any(axis=1)) if like.dtype == tensor.dtype else np.arange(len(bits))
        some = rows[spread(len(rows), _ROWS)]
        base = widen(like_bits[some], like.dtype, self._wide)
        changed = widen(bits[some], tensor.dtype, self._wide)
        if not _is_ordinary([base, changed]):
            return
        scaled = are_rows_scaled(base, bits[some], tensor.dtype)
        grown = have_magnitudes(base, changed)
        low = bits.size <= _LARGEST and 8 * self._stored > _FEWEST_BITS * len(rows) * bits.shape[1]
        if low and grown:
            low = leaves_noise(magnitudes(base, changed)[:, None] * base, bits[some], tensor.dtype)
        elif low:
            low = leaves_noise(base, bits[some], tensor.dtype) and self._is_promising(like_bits, bits, rows)
        if not (scaled or low):
            return
        with _ONE_LARGE if bits.size > _LARGE else alone():
            bits = bits[rows]
            base = widen(like_bits[rows], like.dtype, self._wide)
            changed = widen(bits, tensor.dtype, self._wide)
            if not _is_ordinary([base, changed]):
                return
            if scaled and (scales := row_scales(base, bits, tensor.dtype)) is not None:
                yield self._combined(self._spread_out(scales, rows, 1), None)
            if low:
                if (replaced := _are_replaced(base, changed)).any():
                    base, bits, rows = base[~replaced], bits[~replaced], rows[~replaced]
                del changed
                yield from self._low_rank(base, bits, rows, grown)

    def _is_promising(self, like_bits: Bits, bits: Bits, rows: Index) -> bool:
        """Whether low rank explains how some of these rows changed in some columns."""
        columns = spread(bits.shape[1], PART)
        part = np.ix_(rows[spread(len(rows), PART)], columns)
        base = widen(like_bits[part], self._bases[0].dtype, self._wide)
        changed = widen(bits[part], self._tensor.dtype, self._wide)
        if not _is_ordinary([base, changed]):
            return False
        kept = ~_are_replaced(base, changed)
        return promising(base[kept], bits[part][kept], self._tensor.dtype, (len(rows), bits.shape[1]))

    def _low_rank(self, base: Wide, bits: Bits, rows: Index, grown: bool) -> Iterator[Prediction]:
        dtype = self._tensor.dtype
        scales = None
        if grown:
            numbers = self._floats(magnitudes(base, widen(bits, dtype, self._wide)), (len(rows),))
            stored = numbers.bits.view(numbers.dtype.values)
            scales = self._spread_out(stored, rows, 1)
            with np.errstate(over="ignore", invalid="ignore"):
                base = base * stored[:, None].astype(self._wide)
            if not _is_ordinary([base]):
                return
        factors = recover(base, bits, dtype) if leaves_noise(base, bits, dtype) else None
        if factors is not None:
            b = self._spread_out(factors.b.T, rows, 0).T
            yield self._combined(scales, IntegerFactors(b, factors.a, factors.exponent))

    def _spread_out(self, values: Any, rows: Index, others: float) -> Any:
        """`values` of some rows as those of all, with the same for all others."""
        everywhere = np.full((self._tensor.shape[0], *values.shape[1:]), others, values.dtype)
        everywhere[rows] = values
        return everywhere

    def _combined(self, scales: Wide | None, factors: IntegerFactors | None) -> Prediction:
        ref = self._bases[0].ref
        arrays: dict[str, Elements] = {}
        accumulator = self._wide
        if scales is not None:
            arrays["scale"] = self._floats(scales, scales.shape)
        if factors is not None:
            arrays |= {"lora_a": _integers(factors.a), "lora_b": _integers(factors.b)}
            accumulator = np.promote_types(accumulator, factors.accumulator)

        def recipe(nodes: Mapping[str, Operator]) -> Operator:
            scaled = Scaled(ref, nodes["scale"]) if "scale" in nodes else ref
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


def _integers(values: Any) -> Elements:
    dtype = DTYPES[f"I{8 * values.itemsize}"]
    return Elements(dtype, values.shape, np.ascontiguousarray(values).reshape(-1).view(dtype.bits))


def _are_replaced(base: Wide, changed: Wide) -> Any:
    """Of each row, whether it is another rather than changed like most: it would take a component of its own."""
    change, own = (np.einsum("oi,oi->o", rows, rows) for rows in (changed - base, base))
    return (change >= own) & (change > _REPLACED**2 * np.median(change))


def _is_ordinary(arrays: Sequence[Wide]) -> bool:
    """Whether arithmetic makes sense: no NaN, no infinity, nothing huge."""
    return all(values.min(initial=0) > -_HUGE and values.max(initial=0) < _HUGE for values in arrays)
