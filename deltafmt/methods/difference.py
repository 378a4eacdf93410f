"""A tensor beside what it is a difference to.

Its matrix for the decomposition, its factors as they will be stored, and the error left once a reader has rebuilt it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoint import TensorInfo
from ..dtypes import DTYPES, Bits, Dtype, round_to, widen
from ..encodings import compressed
from ..gemm import Product
from ..operators.base import Wide
from .lossless import Coding
from .prediction import Referred
from .ranks import noise_edge
from .svd import Factors, Float32, residual_energy

_BLOCK_ELEMENTS = 1 << 20  # what is widened at a time
_NEGLIGIBLE = 1.01  # shorter factors may raise the error of truncation by this factor
_FACTOR_DTYPES = {  # to be tried in this order
    "F64": ("F16", "BF16", "F32"),
    "F32": ("F16", "BF16", "F32"),
    "F16": ("F16", "BF16", "F32"),
    "BF16": ("BF16", "F32"),
}


@dataclass(frozen=True)
class StoredFactors:
    """Factors as they are stored: `a` [r, in], `b` [r, out], bits of `dtype`; largest component first."""

    dtype: Dtype
    a: Bits
    b: Bits

    @property
    def rank(self) -> int:
        return len(self.a)

    def stored_bytes(self) -> int:
        """Bytes that both take in an archive, chunk tables included."""
        return sum(
            encoded_bytes(Coding(self.dtype, compressed(self.dtype, bits.shape), bits.reshape(-1)))
            for bits in (self.a, self.b)
        )

    def values(self, accumulator: np.dtype[Any]) -> tuple[Wide, Wide]:
        """`(a, b)` in float32 or float64."""
        return widen(self.a, self.dtype, accumulator), widen(self.b, self.dtype, accumulator)


@dataclass(frozen=True)
class Difference:
    """A float tensor of two or more dimensions, and the tensor of the same shape that it is a difference to, if any.

    As a matrix it is [out, in]: `out` its first dimension, `in` the product of the others.
    """

    info: TensorInfo
    bits: Bits
    reference: Referred | None

    @property
    def out(self) -> int:
        return self.info.shape[0]

    @property
    def in_(self) -> int:
        return self.info.count // self.out

    @property
    def accumulator(self) -> np.dtype[Any]:
        """The accumulation type of spec/arithmetic.md; factors are never F64."""
        dtypes = {self.info.dtype.name, self.reference.dtype.name if self.reference else ""}
        return np.dtype("f8" if "F64" in dtypes else "f4")

    def energy(self) -> float:
        """The squared Frobenius norm of the tensor itself."""
        return math.fsum(float(np.sum(np.square(self._doubles(self.bits[part])))) for part in self._blocks())

    def non_finite(self) -> int:
        """How many elements of the tensor and its reference are NaN, infinite, or beyond float32."""
        both = [(self.bits, self.info.dtype)]
        if self.reference is not None:
            both.append((self.reference.bits, self.reference.dtype))
        with np.errstate(over="ignore"):
            return sum(
                int(np.count_nonzero(~np.isfinite(widen(bits[part], dtype, np.dtype("f4")))))
                for bits, dtype in both
                for part in self._blocks()
            )

    def matrix(self) -> Float32:
        """The difference in float32 [out, in]; not finite where it leaves that range."""
        matrix = np.empty(self.info.count, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for part in self._blocks():
                values = widen(self.bits[part], self.info.dtype, self.accumulator)
                if self.reference is not None:
                    values = values - widen(self.reference.bits[part], self.reference.dtype, self.accumulator)
                matrix[part] = values
        return matrix.reshape(self.out, self.in_)

    def noise_edge(self, *, rounded_reference: bool) -> float:
        """The largest singular value to expect of rounding alone: the tensor's, and its reference's if asked for."""
        rounded = [(self.bits, self.info.dtype)]
        if rounded_reference and self.reference is not None:
            rounded.append((self.reference.bits, self.reference.dtype))
        # The decomposition resolves float32: that is what F64 is rounded to here.
        grids = [DTYPES["F32"] if dtype.name == "F64" else dtype for _, dtype in rounded]
        matrices = [widen(bits, dtype, np.dtype("f4")).reshape(self.out, self.in_) for bits, dtype in rounded]
        return noise_edge(list(zip(matrices, grids, strict=True)))

    def rounded(self, matrix: Float32, factors: Factors, truncated: float) -> StoredFactors:
        """The factors in the dtype they are to be stored in.

        That is the tensor's own if it has 16 bits, else 16 bits where those add next to nothing to the error of
        truncation; always one that holds every value.

        Args:
            matrix: `matrix()`.
            truncated: the squared Frobenius norm of what the factors leave out of it.
        """
        if factors.rank == 0:
            dtype = DTYPES[_FACTOR_DTYPES[self.info.dtype.name][0]]
            return StoredFactors(dtype, round_to(factors.a, dtype), round_to(factors.b, dtype))
        for name in _FACTOR_DTYPES[self.info.dtype.name]:
            dtype = DTYPES[name]
            stored = StoredFactors(dtype, round_to(factors.a, dtype), round_to(factors.b, dtype))
            a, b = stored.values(np.dtype("f4"))
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                continue
            if self.info.dtype.width == 2 or name == "F32":
                break
            if residual_energy(matrix, Factors(b, a, factors.singular_values)) <= _NEGLIGIBLE**2 * truncated:
                break
        # Rounding may have changed the order of components of nearly the same size (spec/operators/lowrank.md).
        sizes = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        order = np.argsort(-sizes, kind="stable")
        return StoredFactors(dtype, np.ascontiguousarray(stored.a[order]), np.ascontiguousarray(stored.b[order]))

    def error(self, factors: StoredFactors) -> float:
        """The relative error (`rel_error` of spec/manifest.md) of the tensor rebuilt and rounded as a reader does it.

        Not finite if a rebuilt value is not.
        """
        product = Product(*factors.values(self.accumulator)) if factors.rank else None
        difference = 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            for part in self._blocks():
                wide = np.zeros(len(self.bits[part]), self.accumulator)
                if self.reference is not None:
                    wide[:] = widen(self.reference.bits[part], self.reference.dtype, self.accumulator)
                if product is not None:
                    first = self.reference is None
                    product.add(wide.reshape(-1, self.in_), part.start // self.in_, 0, first)
                rebuilt = self._doubles(round_to(wide, self.info.dtype))
                difference += float(np.sum(np.square(rebuilt - self._doubles(self.bits[part]))))
        own = self.energy()
        return math.sqrt(difference / own) if own > 0 else math.sqrt(difference)

    def _doubles(self, bits: Bits) -> Wide:
        return widen(bits, self.info.dtype, np.dtype("f8"))

    def _blocks(self) -> Iterator[slice]:
        """Whole rows, as ranges of flat indices."""
        step = max(1, _BLOCK_ELEMENTS // self.in_) * self.in_
        return (slice(begin, min(begin + step, self.info.count)) for begin in range(0, self.info.count, step))


def encoded_bytes(coding: Coding) -> int:
    """Bytes that an array takes in an archive, chunk table included; counted, not estimated."""
    planes = (plane for _, chunk in coding.encoded() for plane in chunk)
    table = 8 * coding.encoding.table_words(coding.array_dtype, coding.bits.size)
    return table + sum(memoryview(plane).nbytes for plane in planes)
