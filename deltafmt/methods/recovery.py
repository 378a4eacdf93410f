"""Integer low-rank factors of a merged update, recovered from weights that were rounded after the merge.

`recover` looks for factors that predict the stored weights so well that factors and misses together take fewer bits
than the plain difference. Their products sum exactly in any order, so every machine predicts the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import Bits, Dtype
from ..operators.lowrank import most_squared, squared_bound
from .matrices import Matrix, wide_of
from .rounded_fit import fit, fit_stored, svd_start
from .rounded_update import Fit, Floats, rounded_update
from .stored_bits import difference_bits, integer_bits, prediction_bits

_MAX_RANK = 256
PART = 1024  # rows and columns are enough to tell whether to look at all
_ROUGH_BITS = 5.0  # of an entry of the factors
_PROMISES = 0.9  # a part must promise to lower the stored bits to this
_PAYS = 0.97  # factors must lower the stored bits to this: a rebuild with them takes longer
_WIDE_PAYS = 0.5  # and factors that need a float64 rebuild to this part of what others take
_SAMPLE = 1 << 17  # elements that bits are counted on
_ACCUMULATORS = (np.dtype(np.float32), np.dtype(np.float64))
_LARGEST_EXPONENT = 100
_STEPS = (4, 2, 1)  # of the search for the scale, in halves of a bit
_USUAL_ERROR = 0.01  # ulps that rounding the factors may add: where the search for their scale starts


@dataclass(frozen=True)
class IntegerFactors:
    """The prediction ``2**exponent * (b.T @ a)``, component-major, largest contribution first.

    ``b`` [r, out] and ``a`` [r, in] are int8, int16 or int32, each as small as its values allow; but ``b`` is int32
    where the sum has to be taken in float64: that is what tells a reader. Else it is taken in float32. `squared_bound`
    is at most `most_squared`, so every partial sum is exact.
    """

    b: npt.NDArray[Any]
    a: npt.NDArray[Any]
    exponent: int

    @property
    def accumulator(self) -> np.dtype[Any]:
        """The float type that holds every partial sum."""
        return np.dtype(np.float64 if 4 in (self.a.itemsize, self.b.itemsize) else np.float32)

    def product(self, rows: slice = slice(None)) -> Floats:
        """The predicted update of some rows, exact, in the accumulator's type."""
        exact = self.b[:, rows].astype(self.accumulator).T @ self.a.astype(self.accumulator)
        return np.asarray(np.ldexp(exact, self.exponent))

    def stored_bits(self) -> float:
        """The entropy of both factors, component by component."""
        return integer_bits(self.b) + integer_bits(self.a)


def recover(base: Matrix, target: Matrix, dtype: Dtype) -> IntegerFactors | None:
    """Factors that predict ``target`` from ``base``, or None where the plain difference takes no more bits.

    It takes about a hundred megabytes of memory for matrices of millions of elements, and no more for larger ones.

    Args:
        base: [out, in] finite values, float32 for BF16 and F16, float64 for F32.
        target: [out, in] bit patterns of ``dtype``, all finite.
        dtype: BF16, F16 or F32.
    """
    wide = wide_of(dtype)
    if len(target.shape) != 2 or base.shape != target.shape or dtype.name not in ("BF16", "F16", "F32"):
        raise ValueError(f"expected two matrices of one shape, BF16, F16 or F32, got {base.shape} {target.shape}")
    most = most_components(target.shape)
    found = fit_stored(base, target, dtype, wide, most) if most else None
    return None if found is None else _integers(*found, wide, _Sample(base, target, dtype))


def most_components(shape: tuple[int, ...]) -> int:
    """The largest rank worth a thought."""
    return min(_MAX_RANK, -(-min(shape) // 3))


def promising(base: Floats, target: Bits, dtype: Dtype, shape: tuple[int, int]) -> bool:
    """Whether `recover` of a matrix of ``shape`` is worth its time, judged by a part of some `PART` x `PART` elements.

    It is if a first fit saves clearly more than the part's share of the bits of all the factors, roughly. Most updates
    of full rank are refused by their decomposition alone, in a few hundredths of a second.

    Args:
        base: [rows, columns] finite values of evenly spread rows and columns, as for `recover`.
        target: bit patterns of ``dtype`` of the same part, all finite.
    """
    if (most := min(most_components(shape), most_components(target.shape))) == 0:
        return False
    update = rounded_update(base, target, dtype)
    start = svd_start(update, most) if update.middle.any() else None
    if start is None or start.rank == 0:
        return False
    sample = _Sample(base, target, dtype)
    share = target.size / math.prod(shape)
    spare = _PROMISES * sample.plain_bits - _ROUGH_BITS * start.rank * sum(shape) * share
    if spare <= 0:
        return False
    found = fit(update, start, start.rank, passes=2)
    return sample.miss_bits(np.ldexp(found.b[:, :: sample.step].T @ found.a, update.exponent)) < spare


class _Sample:
    """Evenly spread rows of a tensor, to count the bits that a prediction of it would take."""

    def __init__(self, base: Matrix, target: Matrix, dtype: Dtype) -> None:
        self._size = math.prod(target.shape)
        self.step = max(1, -(-self._size // _SAMPLE))
        self._base = base[:: self.step]
        self._target = target[:: self.step]
        self._dtype = dtype
        self.plain_bits = difference_bits(self._base, self._target, dtype) * self._size

    def bits(self, factors: IntegerFactors) -> float:
        """Bits of the whole tensor: of the factors, and of the misses as this sample has them."""
        if len(factors.a) == 0:
            return self.plain_bits
        return factors.stored_bits() + self.miss_bits(factors.product(slice(None, None, self.step)))

    def miss_bits(self, product: Floats) -> float:
        predicted = self._base + product.astype(self._base.dtype, copy=False)
        return prediction_bits(predicted, self._target, self._dtype) * self._size


def _integers(found: Fit, exponent: int, wide: np.dtype[Any], sample: _Sample) -> IntegerFactors | None:
    """The integers that take the fewest bits, misses included; None if they do not pay."""
    rounding = _Rounding(found, exponent)
    best, least = None, _PAYS * sample.plain_bits
    for accumulator in [each for each in _ACCUMULATORS if each.itemsize >= wide.itemsize]:
        if best is not None and not rounding.limited:
            break
        chosen, bits = rounding.cheapest(accumulator, sample)
        if chosen is not None and bits < least:
            best, least = chosen, _WIDE_PAYS * bits
    return best


class _Rounding:
    """A fit on its way to integers: both factors times a power of the square root of two, rounded.

    At equal scales an entry of b costs as much as one of a, but there are more of the one than of the other: a ratio of
    sqrt(in / out) between the scales has each bit buy as much precision (Lagrange, entropy against squared error).
    """

    def __init__(self, found: Fit, exponent: int) -> None:
        tilt = (found.a.shape[1] / found.b.shape[1]) ** 0.25
        self._b = found.b.astype(np.float64) * tilt
        self._a = found.a.astype(np.float64) / tilt
        self._exponent = exponent
        self.limited = False  # whether finer integers might have been cheaper than the bound of the last search allowed

    def cheapest(self, accumulator: np.dtype[Any], sample: _Sample) -> tuple[IntegerFactors | None, float]:
        """The scale, then the rank, that take the fewest bits, and these bits."""
        peak = math.prod(float(np.square(factor).sum(axis=0).max()) for factor in (self._b, self._a))
        if not peak > 0:
            return None, math.inf
        finest = math.floor(math.log2(most_squared(accumulator) / peak) / 2)
        spread = float(np.sum(np.mean(self._b**2, axis=1) + np.mean(self._a**2, axis=1)))
        guess = round(math.log2(spread / 12) - 2 * math.log2(_USUAL_ERROR))
        tried: dict[int, tuple[IntegerFactors | None, float]] = {}

        def bits(shift: int) -> float:
            if shift not in tried:
                factors = self._rounded(shift, accumulator) if shift <= finest else None
                tried[shift] = (factors, math.inf if factors is None else sample.bits(factors))
            return tried[shift][1]

        shift = min(guess, finest)
        while bits(shift) == math.inf and shift > guess - 60:  # int16 may be narrower than the bound
            shift -= 1
        for step in _STEPS:
            while bits(shift + step) < bits(shift):
                shift += step
            while bits(shift - step) < bits(shift):
                shift -= step
        self.limited = bits(shift + 1) == math.inf
        best, least = tried[shift]
        while best is not None and len(best.a) > 1:
            shorter = _packed(best.b[:-1], best.a[:-1], best.exponent, accumulator)
            fewer = math.inf if shorter is None else sample.bits(shorter)
            if fewer >= least:
                break
            best, least = shorter, fewer
        return best, least

    def _rounded(self, shift: int, accumulator: np.dtype[Any]) -> IntegerFactors | None:
        scale = 2.0 ** (shift / 2)
        return _packed(np.rint(self._b * scale), np.rint(self._a * scale), self._exponent - shift, accumulator)


def _packed(
    b: npt.NDArray[Any], a: npt.NDArray[Any], exponent: int, accumulator: np.dtype[Any]
) -> IntegerFactors | None:
    """Integer-valued factors in their smallest types, largest contribution first; None if they break the rules."""
    kept = np.any(b, axis=1) & np.any(a, axis=1)
    b, a = b[kept], a[kept]
    types = [_smallest(factor, accumulator) for factor in (b, a)]
    if None in types or abs(exponent) > _LARGEST_EXPONENT:
        return None
    if accumulator == np.float64:
        types[0] = np.dtype(np.int32)  # says that the sum is taken in float64
    order = np.argsort(-np.linalg.norm(b, axis=1) * np.linalg.norm(a, axis=1), kind="stable")
    factors = IntegerFactors(b[order].astype(types[0]), a[order].astype(types[1]), exponent)
    return factors if squared_bound(factors.a, factors.b) <= most_squared(accumulator) else None


def _smallest(factor: npt.NDArray[Any], accumulator: np.dtype[Any]) -> np.dtype[Any] | None:
    """The smallest integer type that holds plus and minus every element, if the accumulator permits one."""
    widths = (np.int8, np.int16) if accumulator == np.float32 else (np.int8, np.int16, np.int32)
    return next((np.dtype(each) for each in widths if np.abs(factor).max(initial=0) <= np.iinfo(each).max), None)
