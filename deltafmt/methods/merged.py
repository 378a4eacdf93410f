"""What merging leaves behind: predictions of a tensor that is its base plus or times little.

Merged adapters (W + s B A, rounded), also with magnitudes (DoRA, arXiv 2402.09353: scaled rows of that), rows that only
decayed, and mixtures of several models. Each is found by itself and offered; what is smallest in the archive is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import DTYPES, Bits, Dtype, Shape, widen
from ..gemm import alone
from ..limits import SUM_TERMS
from ..operators import Decayed, Lowrank, Operator, Patch, Scaled, Sum, Target
from ..operators.patch import cast
from .affine import are_rows_scaled, mixture, row_scales
from .decay import decay_table, may_have_decayed
from .magnitudes import have_magnitudes, magnitudes, rough_magnitudes, row_products
from .matrices import Index, Matrix, Rows, Wide, WideRows, row_blocks, spread
from .prediction import Computed, Elements, Prediction, Referred
from .recovery import PART, IntegerFactors, most_components, promising, recover
from .rounded_fit import room_to_fit
from .sketch import Remainder, leaves_noise, looked_at_closely, remainder, side_of_part

_DTYPES = ("BF16", "F16", "F32")
_SMALLEST = 4096  # elements; what could be saved on fewer is less than what says so
_MIXED = 1 << 18  # elements are enough to tell a mixture
_FEWEST_ROWS = 256  # tell what kind of change it was
_FEWEST_BITS = 0.4  # a changed weight, below which low rank has little to save
_REPLACED = 10  # times as much as usual has a row changed, and more than it was, that was replaced: a new token's
_CONCENTRATED = 0.01  # of a change is left by few components: low rank times magnitudes that follow it (DoRA)
_SPREAD = 0.02  # of a change: if rough magnitudes and few components leave more, better ones will not make it low rank
_MOST = 0.8  # of the elements that changed are right: the others were trained
_HUGE = 2.0**40  # weights beyond: squares and sums of them might leave float32, and nothing comes of it


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


Magnitudes = Callable[[Matrix, Matrix], Wide]


class _Search:
    def __init__(self, name: str, tensor: Elements, bases: Sequence[Referred], stored: float) -> None:
        self._name, self._tensor, self._bases, self._stored = name, tensor, bases, stored
        self._node = bases[0].recipe
        self._shared = bases[0].rows  # others were added
        self._wide = np.dtype("f8" if tensor.dtype.name == "F32" else "f4")
        self._closest = Elements(bases[0].dtype, tensor.shape, bases[0].bits)

    def mixture(self) -> Prediction | None:
        """The best mixture of all bases of the tensor's shape."""
        bases = [base for base in self._bases if base.rows is None]
        if len(bases) < 2:
            return None
        part = spread(self._tensor.bits.size, _MIXED)
        bits = self._tensor.bits[part]
        parts = [widen(base.bits[part], base.dtype, np.dtype("f8")) for base in bases]
        if not _is_ordinary([each[None] for each in (*parts, widen(bits, self._tensor.dtype, self._wide))]):
            return None
        numbers = mixture(parts, bits, self._tensor.dtype)
        arrays = {f"scale{place}": self._floats(number, ()) for place, number in enumerate(numbers)}

        def recipe(nodes: Mapping[str, Operator]) -> Operator:
            return Sum(tuple(Scaled(base.ref, node) for base, node in zip(bases, nodes.values(), strict=True)))

        return self._computed(arrays, recipe, self._wide)

    def _rounded_first(self) -> Elements | None:
        """The closest base in the tensor's dtype, if it seems to have been rounded to that before it was added to."""
        closest, dtype = self._closest, self._tensor.dtype
        if closest.dtype.mantissa_bits <= dtype.mantissa_bits:
            return None
        bits, like_bits = _matrix(self._tensor), _matrix(closest)
        some = spread(len(bits) if self._shared is None else self._shared, _FEWEST_ROWS)
        side = side_of_part(bits.shape)
        numbers = self._numbers(closest, some)
        if numbers is None:
            return None
        short = widen(_rounded(like_bits[some], closest.dtype, dtype), dtype, self._wide)
        if remainder(short, bits[some], dtype, side).share >= remainder(numbers[0], bits[some], dtype, side).share:
            return None
        return Elements(dtype, self._tensor.shape, _rounded(like_bits, closest.dtype, dtype).reshape(-1))

    def _numbers(self, like: Elements, part: Any) -> tuple[Wide, Wide] | None:
        """A part of two matrices, of a base and the tensor, as numbers; None if arithmetic makes no sense of them."""
        base = widen(_matrix(like)[part], like.dtype, self._wide)
        changed = widen(_matrix(self._tensor)[part], self._tensor.dtype, self._wide)
        return (base, changed) if _is_ordinary([base, changed]) else None

    def of_closest(self) -> Iterator[Prediction]:
        """Rows of the closest base scaled, low rank added to it, or both. Rows that nothing changed are left out."""
        dtype, like = self._tensor.dtype, self._rounded_first() or self._closest
        bits = _matrix(self._tensor)
        rows = _differing(bits, _matrix(like)) if like.dtype == dtype else np.arange(len(bits))
        rows = rows if self._shared is None else rows[rows < self._shared]
        side = side_of_part(bits.shape)
        some = rows[spread(len(rows), max(side, _FEWEST_ROWS))]
        numbers = self._numbers(like, some)
        if numbers is None:
            return
        base, changed = numbers
        scaled = are_rows_scaled(base, bits[some], dtype)
        if dtype == like.dtype and dtype.name == "F32" and may_have_decayed(base, changed):
            decayed = self._decayed(rows)
            if decayed is not None:
                yield decayed
                if not scaled and self._are_most_right(decayed, some):
                    return
        grown = have_magnitudes(base, changed)
        low = 8 * self._stored > _FEWEST_BITS * len(rows) * bits.shape[1]
        if low:
            left = remainder(base, bits[some], dtype, side)
            left = looked_at_closely(left, self._base(like, rows), Rows(bits, rows), dtype)
            grown = grown or bool(not left.is_noise and left.share < _CONCENTRATED)
            numbers_of = None
            if grown:
                numbers_of, left = _grown(base, changed, bits[some], dtype, side)
            low = left.is_noise and self._is_promising(like, rows, numbers_of)
        if not (scaled or low):
            return
        base_rows = self._base(like, rows)
        if not _is_ordinary([base_rows, WideRows(bits, rows, dtype, self._wide)]):
            return
        scales = row_scales(base_rows, Rows(bits, rows), dtype) if scaled else None
        if scales is not None and np.abs(scales).max(initial=0) < _HUGE:
            yield self._combined(like, self._spread_out(scales, rows, 1), None)
            others = np.count_nonzero(scales == 1) / len(rows)
            low = low and bool(8 * self._stored * others > _FEWEST_BITS * len(rows) * bits.shape[1])
        if low:
            shape = len(rows), bits.shape[1]
            with room_to_fit(shape, self._wide, most_components(shape)), alone():
                found = self._low_rank(like, rows, grown)
            if found is not None:
                yield found

    def _decayed(self, rows: Index) -> Prediction | None:
        """The closest base, moved by what decay does to float32."""
        table = decay_table(_matrix(self._closest), _matrix(self._tensor), rows)
        if table is None:
            return None
        arrays = {"table": Elements(DTYPES["U32"], table.shape, table.reshape(-1))}
        return self._computed(arrays, lambda nodes: Decayed(self._node, nodes["table"]), self._wide)

    def _are_most_right(self, prediction: Prediction, rows: Index) -> bool:
        """Whether a prediction leaves little to find in these rows."""
        dtype, bits = self._tensor.dtype, _matrix(self._tensor)
        row = bits.shape[1]
        right = [
            np.count_nonzero(prediction.predicted(place * row, (place + 1) * row, dtype, None)[0] == bits[place])
            for place in rows.tolist()
        ]
        return bool(sum(right) > _MOST * len(rows) * row)

    def _is_promising(self, like: Elements, rows: Index, numbers_of: Magnitudes | None) -> bool:
        """Whether low rank explains how some of these rows, or multiples of them, changed in some columns."""
        bits = _matrix(self._tensor)
        part = np.ix_(rows[spread(len(rows), PART)], spread(bits.shape[1], PART))
        numbers = self._numbers(like, part)
        if numbers is None:
            return False
        base, changed = numbers
        kept = ~_are_replaced(base, changed)
        base, changed = base[kept], changed[kept]
        likely = base if numbers_of is None else _multiplied(base, numbers_of(base, changed))
        return likely is not None and promising(
            likely, bits[part][kept], self._tensor.dtype, (len(rows), bits.shape[1])
        )

    def _low_rank(self, like: Elements, rows: Index, grown: bool) -> Prediction | None:
        """Low rank added to these rows but for those that were replaced; if they have `grown`, to multiples of them."""
        dtype, bits = self._tensor.dtype, _matrix(self._tensor)
        kept = ~_are_replaced(self._base(like, rows), WideRows(bits, rows, dtype, self._wide))
        rows = rows[kept]
        base, target = self._base(like, rows), Rows(bits, rows)
        scales = None
        if grown:
            found = magnitudes(base, WideRows(bits, rows, dtype, self._wide))
            if not np.abs(found).max(initial=0) < _HUGE:
                return None
            numbers = self._floats(found, (len(rows),))
            stored = numbers.bits.view(numbers.dtype.values)
            scales = self._spread_out(stored, rows, 1)
            base = self._base(like, rows, stored)
            if not _is_ordinary([base]):
                return None
        factors = recover(base, target, dtype) if leaves_noise(base, target, dtype) else None
        if factors is None:
            return None
        b = self._spread_out(factors.b.T, rows, 0).T
        return self._combined(like, scales, IntegerFactors(b, factors.a, factors.exponent))

    def _base(self, like: Elements, rows: Index, scales: Wide | None = None) -> WideRows:
        return WideRows(_matrix(like), rows, like.dtype, self._wide, scales)

    def _spread_out(self, values: Any, rows: Index, others: float) -> Any:
        """`values` of some rows as those of all, with the same for all others."""
        everywhere = np.full((self._tensor.shape[0], *values.shape[1:]), others, values.dtype)
        everywhere[rows] = values
        return everywhere

    def _combined(self, like: Elements, scales: Wide | None, factors: IntegerFactors | None) -> Prediction:
        node = self._node
        arrays: dict[str, Elements] = {}
        accumulator = self._wide
        if rounded := like.dtype != self._closest.dtype:
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
        # Padded already to the tensor's rows, of which `rows` is the same.
        tensors = {base.ref: Elements(base.dtype, self._tensor.shape, base.bits) for base in self._bases}
        return Computed(target, tensors, arrays, recipe)


def _matrix(tensor: Elements) -> Bits:
    """A tensor's rows, of whatever shape, as those of a matrix."""
    return tensor.bits.reshape(tensor.shape[0], -1)


def _grown(base: Wide, changed: Wide, bits: Bits, dtype: Dtype, side: int) -> tuple[Magnitudes, Remainder]:
    """What tells the magnitudes of these rows well enough to look at them, and what they leave.

    `magnitudes` takes several passes. Where all weights were trained, with weight decay, rough ones leave too much
    already, and it is not called.
    """
    multiples = _multiplied(base, rough_magnitudes(base, changed))
    if multiples is not None:
        left = remainder(multiples, bits, dtype, side)
        if left.is_noise or left.share > _SPREAD:
            return rough_magnitudes, left
    multiples = _multiplied(base, magnitudes(base, changed))
    return magnitudes, remainder(base if multiples is None else multiples, bits, dtype, side)


def _multiplied(base: Wide, numbers: Wide) -> Wide | None:
    """Each row times its number; None where one is huge."""
    return base * numbers.astype(base.dtype)[:, None] if np.abs(numbers).max(initial=0) < _HUGE else None


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
