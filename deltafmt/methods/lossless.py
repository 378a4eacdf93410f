"""Lossless: for each tensor the smallest of raw bytes, compressed bytes, and a patch of whatever predicts it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..dtypes import DTYPES, Bits, Dtype
from ..encodings import Encoding, best_low_bits, compressed, encode_chunk, encode_chunks, raw, residuals
from ..operators import Operator, Patch, Stored
from ..operators.groups import Groups
from ..operators.panels import Order
from ..operators.patch import difference, difference_in_groups
from ..pipeline import Pipeline
from ..scratch import STEP_BYTES
from ..writer import ArchiveWriter
from .merged import computed
from .panels import in_panels, of_panels
from .prediction import Elements, Prediction, Referred

_FEW_CHUNKS = 16  # of a tensor that one thread encodes
_IN_FLIGHT_BYTES = 32 << 20
_MOST_EFFORT = 8  # put into finding out how chunks are best packed
_GUESSED = 1 << 12  # elements
_UNSURE = 2  # times as much as what a sample tells may be right
_SMALL = 1 << 14  # elements; the groups of a larger tensor always pay


@dataclass(frozen=True)
class Coding:
    """How to store one tensor's elements: as they are, or as the residual of a prediction.

    Attributes:
        groups: how the residuals are grouped, if they are; the encoding is then `encodings.residuals`.
        order: of elements stored as they are, if it is not the tensor's own.
    """

    dtype: Dtype
    encoding: Encoding
    bits: Bits
    prediction: Prediction | None = None
    groups: Groups | None = None
    order: Order | None = None
    _encoded: dict[int, tuple[Bits, list[Any]]] = field(default_factory=dict, repr=False, compare=False)
    _low_bits: list[int] = field(default_factory=list, repr=False, compare=False)  # of each group, once it is known

    @property
    def array_dtype(self) -> Dtype:
        """The dtype of the stored array."""
        return self.dtype if self.prediction is None else DTYPES[f"U{8 * self.dtype.width}"]

    @property
    def chunks(self) -> int:
        return self.encoding.chunks(self.bits.size)

    def recipe(self, name: str, array: str, writer: ArchiveWriter) -> Operator:
        """The recipe of tensor `name`, once `array` holds what `encoded` gives. Writes what the prediction needs."""
        if self.prediction is None:
            return Stored(array) if self.order is None else in_panels(Stored(array), self.order)
        return Patch(self.prediction.write(name, writer), Stored(array), self.groups)

    def prepare(self) -> None:
        """Encode it now if there is little of it; what is larger is left to all threads together."""
        if self.chunks <= _FEW_CHUNKS:
            for first in range(0, self.chunks, self._together):
                self._encoded.update(enumerate(self._several(first), first))

    def encoded(self, pipeline: Pipeline | None = None) -> Iterator[tuple[Bits, list[Any]]]:
        """Of each chunk, in order, its elements and the stored bytes of its planes; to be asked for once.

        What is not encoded yet is encoded by the threads of a pipeline, if there is one, side by side.
        """
        firsts = range(0, self.chunks, self._together)
        if pipeline is None or len(self._encoded) == self.chunks:
            for first in firsts:
                yield from self._several(first)
            return
        weight = 2 * self._together * self.encoding.chunk * self.dtype.width
        for _, chunks in pipeline.ordered(firsts, self._several, lambda _: weight, _IN_FLIGHT_BYTES):
            yield from chunks

    @property
    def _together(self) -> int:
        """Chunks that `_several` gives, as a rule."""
        return max(STEP_BYTES // (self.encoding.chunk * self.dtype.width), 1)

    def _several(self, first: int) -> list[tuple[Bits, list[Any]]]:
        """Chunks from `first` on."""
        last, chunks = min(first + self._together, self.chunks), []
        while first < last:
            known = first in self._encoded
            end = first + 1
            while end < last and not known and end not in self._encoded:
                end += 1
            chunks += [self._encoded.pop(first)] if known else self._encode(first, end)
            first = end
        return chunks

    def _encode(self, first: int, last: int) -> list[tuple[Bits, list[Any]]]:
        elements, lengths = self._elements(first, last)
        return self._with_planes(elements, lengths)

    def _with_planes(self, elements: Bits, lengths: list[list[int]] | None) -> list[tuple[Bits, list[Any]]]:
        planes = encode_chunks(elements, self.encoding, lengths=lengths, low_bits=self._low_bits or None)
        size = self.encoding.chunk
        return [(elements[index * size : (index + 1) * size], chunk) for index, chunk in enumerate(planes)]

    def _elements(self, first: int, last: int) -> tuple[Bits, list[list[int]] | None]:
        """What is stored of some chunks, and where they are grouped the elements of each segment of each."""
        lo, hi = first * self.encoding.chunk, min(last * self.encoding.chunk, self.bits.size)
        if self.order is not None:
            return self.order.stored(self.bits, lo, hi), None
        elements = self.bits[lo:hi]
        if self.prediction is None:
            return elements, None
        predicted, grouping = self.prediction.predicted(lo, hi, self.dtype, self.groups)
        if self.groups is None or grouping is None:
            return difference(elements, predicted, self.dtype), None
        return difference_in_groups(self.groups, grouping, self.encoding.chunk, elements, predicted, self.dtype)

    def guess(self) -> float:
        """Bytes that the array would take if a few thousand elements of its middle are like all others."""
        if self.encoding.is_raw:
            return self.bits.nbytes
        count = min(_GUESSED, self.bits.size)
        begin = (self.bits.size - count) // 2
        planes = encode_chunk(self.bits[begin : begin + count], self.encoding)
        return sum(memoryview(plane).nbytes for plane in planes) * self.bits.size / max(count, 1)

    def estimate(self) -> float:
        """Bytes that the array would take, chunk table and what its prediction needs included.

        Exact for up to two chunks, else from two of them.
        """
        picked = sorted({self.chunks // 4, 3 * self.chunks // 4}) if self.chunks else []
        if not self._encoded.keys() >= set(picked):
            chunks = [self._elements(index, index + 1) for index in picked]
            grouped = [(bits, lengths[0]) for bits, lengths in chunks if lengths is not None]
            if grouped:
                self._low_bits[:] = best_low_bits(grouped, self.encoding, min(self.chunks, _MOST_EFFORT))
            for index, chunk in zip(picked, chunks, strict=True):
                self._encoded[index] = self._with_planes(*chunk)[0]
        encoded = [self._encoded[index] for index in picked]
        elements = sum(bits.size for bits, _ in encoded)
        stored = sum(memoryview(plane).nbytes for _, planes in encoded for plane in planes)
        table = 8 * self.encoding.table_words(self.array_dtype, self.bits.size)
        own = 0 if self.prediction is None else self.prediction.own_bytes
        return own + table + (stored * self.bits.size / elements if elements else 0)


def candidates(tensor: Elements, predictions: Iterable[Prediction], order: Order | None = None) -> Iterator[Coding]:
    """The codings worth a look, cheapest to read first; what is compressed by itself, in the order that is given."""
    yield Coding(tensor.dtype, raw(tensor.dtype, tensor.shape), tensor.bits)
    encoding = compressed(tensor.dtype, tensor.shape) if order is None else of_panels(tensor.dtype, order)
    yield Coding(tensor.dtype, encoding, tensor.bits, order=order)
    for prediction in predictions:
        yield from patches(tensor, prediction)


def patches(tensor: Elements, prediction: Prediction) -> Iterator[Coding]:
    """The codings of a tensor as the residual of a prediction."""
    dtype = DTYPES[f"U{8 * tensor.dtype.width}"]
    encoding = residuals(dtype, tensor.shape)
    groups = prediction.groups(tensor.bits, tensor.dtype, encoding.chunk)
    if groups is None or tensor.bits.size < _SMALL:
        yield Coding(tensor.dtype, compressed(dtype, tensor.shape), tensor.bits, prediction)
    if groups is not None:
        yield Coding(tensor.dtype, encoding, tensor.bits, prediction, groups)


def smallest(codings: Iterable[Coding]) -> Coding:
    """The coding with the smallest estimate, the first of them where they are equal.

    Weights are hardly ever smaller by themselves than as a patch: first a sample says whether they could be.
    """
    every = list(codings)
    patched = [coding for coding in every if coding.prediction is not None]
    if patched:
        least = min(coding.estimate() for coding in patched)
        every = [coding for coding in every if coding.prediction is not None or coding.guess() <= _UNSURE * least]
    return min(every, key=Coding.estimate)


def choose(name: str, tensor: Elements, bases: Sequence[Referred] = (), order: Order | None = None) -> Coding:
    """The coding with the smallest estimate; the simpler one where they are equal.

    Args:
        name: of the tensor.
        tensor: what is to be stored.
        bases: what may predict it.
        order: of its elements if it is compressed by itself; its own if None.
    """
    plain = list(candidates(tensor, bases, order))
    best = smallest(plain)
    patched = sorted((coding for coding in plain if coding.prediction is not None), key=Coding.estimate)
    closest = dict.fromkeys(coding.prediction for coding in patched)
    referred = [base for base in closest if isinstance(base, Referred)]
    if best.estimate() <= _least_bytes(tensor):
        return best
    better = (
        coding for found in computed(name, tensor, referred, best.estimate()) for coding in patches(tensor, found)
    )
    return min([best, *better], key=Coding.estimate)


def _least_bytes(tensor: Elements) -> int:
    """What one component takes, at least: where a tensor takes no more, there is nothing to gain."""
    rows = tensor.shape[0] if tensor.shape else 1
    return rows + tensor.bits.size // max(rows, 1)
