"""Lossless: for each tensor the smallest of a reference, a patch against the base, compressed bytes and raw bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..dtypes import DTYPES, Bits, Dtype, Shape
from ..encodings import Encoding, compressed, encode_chunk, raw
from ..operators import Ref
from ..operators.patch import cast, difference


@dataclass(frozen=True)
class Prediction:
    """A base tensor that may predict the one to be stored."""

    ref: Ref
    dtype: Dtype
    bits: Bits


@dataclass(frozen=True)
class Coding:
    """How to store one tensor's elements: as they are, or as the residual of a prediction.

    `chunk(index)` is independent of every other, so chunks are encoded in parallel.
    """

    dtype: Dtype
    encoding: Encoding
    bits: Bits
    prediction: Prediction | None = None
    _encoded: dict[int, tuple[Bits, list[Any]]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def array_dtype(self) -> Dtype:
        """The dtype of the stored array."""
        return self.dtype if self.prediction is None else DTYPES[f"U{8 * self.dtype.width}"]

    @property
    def chunks(self) -> int:
        return self.encoding.chunks(self.bits.size)

    def elements(self, index: int) -> Bits:
        """The elements of one chunk as they are to be encoded."""
        part = slice(index * self.encoding.chunk, (index + 1) * self.encoding.chunk)
        if self.prediction is None:
            return self.bits[part]
        return difference(
            self.bits[part], cast(self.prediction.bits[part], self.prediction.dtype, self.dtype), self.dtype
        )

    def chunk(self, index: int) -> tuple[Bits, list[Any]]:
        """One chunk: its elements, and the stored bytes of its planes."""
        if (known := self._encoded.pop(index, None)) is not None:
            return known
        elements = self.elements(index)
        return elements, encode_chunk(elements, self.encoding)

    def encode(self) -> None:
        """Encode every chunk now, to be handed out by `chunk` later."""
        for index in range(self.chunks):
            self._encoded[index] = self.chunk(index)

    def estimate(self) -> float:
        """Bytes that the array would take, chunk table included; exact for up to two chunks, else from two of them."""
        stored = elements = 0
        for index in sorted({self.chunks // 4, 3 * self.chunks // 4}) if self.chunks else []:
            bits, planes = self._encoded[index] = self.chunk(index)
            stored += sum(memoryview(plane).nbytes for plane in planes)
            elements += bits.size
        table = 8 * self.encoding.table_words(self.array_dtype, self.bits.size)
        return table + (stored * self.bits.size / elements if elements else 0)


def candidates(dtype: Dtype, shape: Shape, bits: Bits, prediction: Prediction | None) -> Iterator[Coding]:
    """The codings worth a look, cheapest to read first."""
    yield Coding(dtype, raw(dtype, shape), bits)
    yield Coding(dtype, compressed(dtype, shape), bits)
    if prediction is not None:
        residual = DTYPES[f"U{8 * dtype.width}"]
        yield Coding(dtype, compressed(residual, shape), bits, prediction)


def choose(dtype: Dtype, shape: Shape, bits: Bits, prediction: Prediction | None = None) -> Coding:
    """The coding with the smallest estimate; the simpler one where they are equal."""
    return min(candidates(dtype, shape, bits, prediction), key=Coding.estimate)
