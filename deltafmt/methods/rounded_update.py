"""What rounding left of an update: an interval for each element, of a matrix of any size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..dtypes import Bits, Dtype, widen
from .matrices import Index, Matrix, row_blocks
from .svd import Float32

Floats = npt.NDArray[Any]  # float32, or float64 where the tensor is float32 itself

_BLOCK_ROWS = 256
_BLOCK_ELEMENTS = 1 << 20
_SAMPLE = 1 << 18  # elements that the error is estimated on


@dataclass(frozen=True)
class Fit:
    """A prediction ``b.T @ a``, component-major, largest first, of a `RoundedUpdate` in its unit."""

    b: Floats
    a: Floats

    @property
    def rank(self) -> int:
        return len(self.a)


class Update(Protocol):
    """What rounding left of an update [out, in], and how well a fit agrees with it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def typical_half(self) -> float:
        """The median of half the length of the intervals."""

    def blocks(self) -> Iterator[tuple[slice, Floats, Float32]]:
        """Blocks of rows: which they are, and their `RoundedUpdate.middle` and `half`."""

    def error(self, fit: Fit) -> float:
        """The standard deviation of a prediction's error, judged by how often it leaves an interval, and how far."""


@dataclass(frozen=True)
class RoundedUpdate:
    """An update [out, in] as rounding left it: each element within ``half`` of ``middle``, in units of 2**exponent.

    ``middle`` is float32, or float64 for a float32 tensor; ``half`` is float32. The unit is near the typical ulp.
    """

    middle: Floats
    half: Float32
    exponent: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.middle.shape

    def blocks(self) -> Iterator[tuple[slice, Floats, Float32]]:
        """See `Update`."""
        return ((rows, self.middle[rows], self.half[rows]) for rows in blocks_of_rows(self.middle.shape))

    @property
    def typical_half(self) -> float:
        """See `Update`."""
        return float(np.median(self.half[:: self._step]))

    def error(self, fit: Fit) -> float:
        """The standard deviation of a prediction's error, judged by how often it leaves an interval, and how far.

        An error e carries a prediction out of an interval of width q with probability |e| / q while |e| < q.
        """
        half = self.half[:: self._step]
        outside = np.abs(self.middle[:: self._step] - fit.b[:, :: self._step].T @ fit.a) - half
        wide = half >= np.median(half)
        by_count = np.count_nonzero(outside[wide] > 0) / float(np.sum(0.5 / half[wide], dtype=np.float64))
        by_distance = float(np.mean(np.maximum(outside, 0), dtype=np.float64))
        return 1.25 * max(by_count, by_distance)  # E|e| = 0.8 of the standard deviation

    @property
    def _step(self) -> int:
        """Between the rows of an evenly spread sample."""
        return max(1, -(-self.half.size // _SAMPLE))


class Change:
    """A stored matrix beside its base, of whatever size: a `RoundedUpdate` is made of what is asked for.

    Below a power of two the interval is taken twice as wide as it is: a weaker claim, for one element in 2**mantissa.

    Args:
        base: values of type ``wide``, [out, in].
        target: bits of ``dtype``, same shape.
        turned: whether columns are to be the rows.
    """

    def __init__(self, base: Matrix, target: Matrix, dtype: Dtype, wide: np.dtype[Any], turned: bool = False) -> None:
        self._base, self._target, self._dtype, self._wide, self._turned = base, target, dtype, wide, turned
        self.shape = target.shape[::-1] if turned else target.shape
        bits = self._read(target, self._sampled)
        used = bits & bits.dtype.type((1 << (8 * dtype.width - 1)) - 1) != 0  # rows of zeros say nothing of the others
        powers = self._powers(bits[used] if used.any() else bits)
        self.exponent = int(np.frexp(np.median(powers))[1]) - 1 - dtype.mantissa_bits

    def update(self, rows: Index) -> RoundedUpdate:
        """What is known of these rows."""
        middle = np.empty((len(rows), self.shape[1]), self._wide)
        half = np.empty(middle.shape, np.float32)
        for block in blocks_of_rows(middle.shape):
            middle[block], half[block] = self._rounded(rows[block])
        return RoundedUpdate(middle, half, self.exponent)

    def blocks(self) -> Iterator[tuple[slice, Floats, Float32]]:
        """See `Update`."""
        return ((rows, *self._rounded(rows)) for rows in blocks_of_rows(self.shape))

    @property
    def typical_half(self) -> float:
        """Of a sample."""
        return self._sample.typical_half

    def error(self, fit: Fit) -> float:
        """Of a sample; see `RoundedUpdate`."""
        return self._sample.error(Fit(fit.b[:, self._sampled], fit.a))

    @cached_property
    def _sample(self) -> RoundedUpdate:
        return self.update(self._sampled)

    @property
    def _sampled(self) -> Index:
        return np.arange(0, self.shape[0], -(-math.prod(self.shape) // _SAMPLE))

    def _rounded(self, rows: slice | Index) -> tuple[Floats, Float32]:
        bits, base = self._read(self._target, rows), self._read(self._base, rows)
        with np.errstate(over="ignore", under="ignore"):  # weights 2**60 ulps from the typical say nothing more
            middle = widen(bits, self._dtype, self._wide)
            middle -= base
            half = _scaled(self._powers(bits), -self.exponent - self._dtype.mantissa_bits - 1)
            np.clip(_scaled(middle, -self.exponent), -(2.0**40), 2.0**40, out=middle)
            np.clip(half, 2.0**-40, 2.0**40, out=half)
        return middle, half.astype(np.float32, copy=False)

    def _read(self, matrix: Matrix, rows: slice | Index) -> npt.NDArray[Any]:
        return np.ascontiguousarray(matrix[:, rows].T if self._turned else matrix[rows])

    def _powers(self, bits: Bits) -> Floats:
        """The powers of two at or below the magnitudes, but no less than the least normal number."""
        mantissa = self._dtype.mantissa_bits
        exponents = ((1 << (8 * self._dtype.width - 1)) - 1) & ~((1 << mantissa) - 1)
        least = self._dtype.bits.type(1 << mantissa)
        return widen(np.maximum(bits & self._dtype.bits.type(exponents), least), self._dtype, self._wide)


def rounded_update(base: Floats, target: Bits, dtype: Dtype) -> RoundedUpdate:
    """What is known of a matrix that is small; see `Change`."""
    return Change(base, target, dtype, base.dtype).update(np.arange(len(base)))


def blocks_of_rows(shape: tuple[int, ...]) -> Iterator[slice]:
    """The `row_blocks` that updates are worked on in."""
    return row_blocks(shape, _BLOCK_ELEMENTS, _BLOCK_ROWS)


def _scaled(values: Floats, exponent: int) -> Floats:
    """``values`` times 2**exponent, in place: in two steps, for the power itself may be out of range."""
    values *= values.dtype.type(2.0 ** (exponent // 2))
    values *= values.dtype.type(2.0 ** (exponent - exponent // 2))
    return values
