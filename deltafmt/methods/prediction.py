"""What a `patch` corrects: a recipe over base tensors and arrays of its own, and the values that a reader will get."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from ..digests import digest
from ..dtypes import SILENT, Bits, Dtype, Shape, round_to
from ..encodings import Encoding, compressed, encode_chunk, integers
from ..gemm import round_wide
from ..operators import Facts, Operator, Ref, Rows, Stored, Target, Value
from ..operators.base import Read, TensorReader, Wide, in_memory
from ..operators.groups import Grouping, Groups, margins
from ..operators.patch import cast
from ..scratch import borrowed, scratch
from ..writer import ArchiveWriter
from .grouping import exponent_bounds, kinds_by_exponent, margin_bounds

_ENTRY_BYTES = 450  # what an array takes in manifest and shard header
_SAMPLE = 1 << 15  # elements that the bounds of groups are chosen by
_PLACES = 64  # in a tensor that a sample is taken from
_FEWEST = 4096  # elements in a chunk; fewer are not worth groups


class Elements(NamedTuple):
    """A tensor or stored array in memory: `bits` are flat."""

    dtype: Dtype
    shape: Shape
    bits: Bits


class Prediction(ABC):
    """Something close to a tensor, known to a reader before it reads the residual."""

    @property
    def own_bytes(self) -> int:
        """What the arrays that it needs take in an archive, beside the residual."""
        return 0

    @abstractmethod
    def predicted(self, lo: int, hi: int, dtype: Dtype, groups: Groups | None) -> tuple[Bits, Grouping | None]:
        """The prediction of elements `[lo, hi)` in `dtype`, with what `groups` needs of it; valid until asked again."""

    @abstractmethod
    def groups(self, bits: Bits, dtype: Dtype, chunk: int) -> Groups | None:
        """How residuals are best grouped; None if they are not.

        Args:
            bits: the tensor that is predicted.
            dtype: its dtype.
            chunk: elements per chunk of the residual.
        """

    @abstractmethod
    def write(self, name: str, writer: ArchiveWriter) -> Operator:
        """Add the arrays it needs to the archive, for the tensor `name`; return the recipe."""


@dataclass(frozen=True, eq=False)
class Referred(Prediction):
    """A base tensor of the same shape, or its rows where there are more or fewer of them.

    Attributes:
        bits: in the shape of what is predicted.
        rows: how many of the first rows are the base's, where their numbers differ; zeros follow. None: all.
    """

    ref: Ref
    dtype: Dtype
    bits: Bits
    rows: int | None = None

    @property
    def recipe(self) -> Operator:
        return self.ref if self.rows is None else Rows(self.ref)

    def predicted(self, lo: int, hi: int, dtype: Dtype, groups: Groups | None) -> tuple[Bits, Grouping | None]:
        bits = cast(self.bits[lo:hi], self.dtype, dtype)
        return bits, None if groups is None else groups.of_exponents(bits, dtype)

    def groups(self, bits: Bits, dtype: Dtype, chunk: int) -> Groups | None:
        """By exponent: on it depends how many last places a change of some size is."""
        step = max(2 * bits.size // _SAMPLE, 1)
        predicted = self.bits
        if self.dtype != dtype:
            predicted, bits, step = cast(predicted[::step], self.dtype, dtype), np.ascontiguousarray(bits[::step]), 1
        return _by_exponent(predicted, bits, dtype, step, min(chunk, self.bits.size))

    def write(self, name: str, writer: ArchiveWriter) -> Operator:
        return self.recipe


def _by_exponent(predicted: Bits, bits: Bits, dtype: Dtype, step: int, count: int) -> Groups | None:
    """Groups for chunks of `count` elements, by every `step`-th element of a tensor and its prediction."""
    if not dtype.is_float or count < _FEWEST:
        return None
    bounds = exponent_bounds(kinds_by_exponent(predicted, bits, dtype, step), count)
    return Groups("exponent", bounds) if bounds else None


class Computed(Prediction):
    """A recipe over base tensors and arrays of its own, evaluated by the operators that a reader evaluates.

    Args:
        target: the tensor that is predicted.
        tensors: the base tensors that the recipe refers to.
        arrays: the arrays that it needs, by role: what their names add to the tensor's.
        recipe: makes the recipe, given the node of each role: one that is wide, or has the tensor's dtype.
    """

    def __init__(
        self,
        target: Target,
        tensors: Mapping[Ref, Elements],
        arrays: Mapping[str, Elements],
        recipe: Callable[[Mapping[str, Operator]], Operator],
    ) -> None:
        self._target, self._arrays, self._recipe = target, arrays, recipe
        memory = InMemory(tensors, arrays)
        self._value: Value = recipe({role: Stored(role) for role in arrays}).bind(memory, memory, target)

    @cached_property
    def _stored(self) -> dict[str, list[list[Any]]]:
        """The chunks of each array, encoded."""
        return {role: _chunks(array) for role, array in self._arrays.items()}

    @property
    def own_bytes(self) -> int:
        tables = sum(_encoding(each).table_words(each.dtype, each.bits.size) for each in self._arrays.values())
        planes = (plane for chunks in self._stored.values() for chunk in chunks for plane in chunk)
        return len(self._arrays) * _ENTRY_BYTES + 8 * tables + sum(memoryview(plane).nbytes for plane in planes)

    def predicted(self, lo: int, hi: int, dtype: Dtype, groups: Groups | None) -> tuple[Bits, Grouping | None]:
        bits = scratch("predicted", dtype.bits, hi - lo)
        if self._value.facts.dtype is not None:
            self._value.bits(lo, hi, bits)
            return bits, None if groups is None else groups.of_exponents(bits, dtype)
        if groups is None:
            self._value.rounded(lo, hi, self._target.accumulator, dtype, bits)
            return bits, None
        with self._wide(lo, hi) as values:
            round_wide(values, dtype, bits)
            return bits, groups.of_margins(values, dtype)

    @contextmanager
    def _wide(self, lo: int, hi: int) -> Iterator[Wide]:
        """The prediction of elements `[lo, hi)` before it is rounded."""
        with borrowed(self._target.accumulator, hi - lo) as values:
            with np.errstate(**SILENT):
                self._value.accumulate(lo, hi, values, first=True)
            yield values

    def groups(self, bits: Bits, dtype: Dtype, chunk: int) -> Groups | None:
        """By margin, as many as pay, by the misses in a sample; by exponent if it is rounded already."""
        if self._value.facts.dtype is not None:
            return self._by_exponent(bits, dtype, min(chunk, bits.size))
        size = min(_SAMPLE // self._target.row * self._target.row or self._target.row, bits.size)
        begin = (bits.size - size) // 2 // self._target.row * self._target.row
        with self._wide(begin, begin + size) as values:
            predicted = round_to(values, dtype, signed_nan=False)
            keys, _ = margins(values, dtype)
            missed = predicted != bits[begin : begin + size]
            step = max(size // _SAMPLE, 1)  # a row may be long
            bounds = margin_bounds(keys[::step], missed[::step], min(chunk, bits.size))
        return Groups("margin", bounds) if bounds else None

    def _by_exponent(self, bits: Bits, dtype: Dtype, count: int) -> Groups | None:
        """By a sample from many places: what it misses may lie together."""
        size = max(_SAMPLE // _PLACES, 1)
        begins = range(0, bits.size, max(bits.size // _PLACES, size))
        parts = [(begin, min(begin + size, bits.size)) for begin in begins]
        predicted = [self.predicted(lo, hi, dtype, None)[0].copy() for lo, hi in parts]
        known = [bits[lo:hi] for lo, hi in parts]
        return _by_exponent(np.concatenate(predicted), np.concatenate(known), dtype, 1, count)

    def write(self, name: str, writer: ArchiveWriter) -> Operator:
        nodes: dict[str, Operator] = {}
        for role, array in self._arrays.items():
            encoding, chunks = _encoding(array), self._stored[role]
            stored = writer.add_array(
                f"{name}#{role}", array.dtype, array.shape, encoding, chunks, partial(digest, array.bits)
            )
            nodes[role] = Stored(stored)
        return self._recipe(nodes)


def _encoding(array: Elements) -> Encoding:
    return (compressed if array.dtype.is_float else integers)(array.dtype, array.shape)


def _chunks(array: Elements) -> list[list[Any]]:
    encoding = _encoding(array)
    begins = range(0, array.bits.size, encoding.chunk)
    return [encode_chunk(array.bits[begin : begin + encoding.chunk], encoding) for begin in begins]


class InMemory:
    """Arrays and base tensors in memory: what a recipe is bound to before there is an archive."""

    def __init__(self, tensors: Mapping[Ref, Elements], arrays: Mapping[str, Elements]) -> None:
        self._tensors, self._arrays = tensors, arrays

    def array(self, name: str) -> Facts | None:
        return _facts(self._arrays[name])

    def tensor(self, name: str) -> Facts | None:
        return _facts(self._tensors[Ref(name)])

    def base_tensor(self, base: str, name: str) -> Facts | None:
        return _facts(self._tensors[Ref(name, base)])

    def array_reader(self, name: str) -> Read:
        return _reader(self._arrays[name]).read

    def tensor_reader(self, name: str) -> TensorReader:
        return _reader(self._tensors[Ref(name)])

    def base_reader(self, base: str, name: str) -> TensorReader:
        return _reader(self._tensors[Ref(name, base)])


def _facts(elements: Elements) -> Facts:
    return Facts(elements.dtype, elements.shape, exact=True)


def _reader(elements: Elements) -> TensorReader:
    return in_memory(elements.bits, elements.shape)
