"""What every operator is: a node of a recipe; and, bound to data, a value that can be read range by range."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..dtypes import SILENT, Bits, Dtype, Shape
from ..errors import MalformedError
from ..gemm import OntoBf16, round_wide, widen_into
from ..scratch import aligned, borrowed
from ..strictjson import Fields

Wide = npt.NDArray[Any]  # float32 or float64: the accumulation type of a tensor


@dataclass(frozen=True)
class Facts:
    """What is known of a tensor, stored array or node without reading data.

    Attributes:
        dtype: None where a node is wide.
        exact: whether every reader gets the same bits (spec/arithmetic.md).
        chunk: elements per chunk of a stored array; None of anything else.
    """

    dtype: Dtype | None
    shape: Shape
    exact: bool
    chunk: int | None = None

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Scope(Protocol):
    """Looks names up while a manifest is checked. Each returns None for a name that does not exist."""

    def array(self, name: str) -> Facts | None: ...
    def tensor(self, name: str) -> Facts | None: ...
    def base_tensor(self, base: str, name: str) -> Facts | None: ...


Read = Callable[[int, int, Bits], None]
"""Puts elements `[lo, hi)` (flat indices) into an array of bits; may be called from many threads."""


class TensorReader(Protocol):
    """Reads any part of one tensor, as bits; may be called from many threads."""

    @property
    def granularity(self) -> int:
        """As of `Value`."""

    def read(self, lo: int, hi: int, out: Bits) -> None:
        """Put elements `[lo, hi)` (flat indices) into `out`."""

    def read_rectangle(self, part: Rectangle, out: Bits) -> None:
        """Put a part of the tensor taken as a matrix into `out`, `[rows, columns]`."""


class Source(Protocol):
    """Where a recipe's names become data."""

    def array_reader(self, name: str) -> Read: ...
    def tensor_reader(self, name: str) -> TensorReader: ...
    def base_reader(self, base: str, name: str) -> TensorReader: ...


@dataclass(frozen=True)
class Target:
    """The tensor that a recipe belongs to."""

    name: str
    dtype: Dtype
    shape: Shape
    accumulator: np.dtype[Any]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row(self) -> int:
        """Elements per row: the product of all dimensions but the first."""
        return math.prod(self.shape[1:])


class Rectangle(NamedTuple):
    """Rows `[top, bottom)` and columns `[left, right)` of a tensor taken as a matrix of `rows` times `row` elements."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def columns(self) -> int:
        return self.right - self.left

    @property
    def shape(self) -> tuple[int, int]:
        return self.bottom - self.top, self.columns


def rectangles(lo: int, hi: int, row: int) -> Iterator[Rectangle]:
    """Elements `[lo, hi)` of a matrix with rows of so many: whole rows, and what is before and behind them."""
    while lo < hi:
        top, left = divmod(lo, row)
        rows = max((hi - lo) // row, 1) if left == 0 else 1
        part = Rectangle(top, top + rows, left, min(row, left + hi - lo))
        yield part
        lo += rows * part.columns


class RangeReader:
    """A `TensorReader` of a tensor that is read in ranges, `row` elements a row: of rectangles it reads whole rows."""

    granularity = 1

    def __init__(self, read: Read, row: int) -> None:
        self.read, self._row = read, row

    def read_rectangle(self, part: Rectangle, out: Bits) -> None:
        with borrowed(out.dtype, len(out) * self._row) as rows:
            self.read(part.top * self._row, part.bottom * self._row, rows)
            np.copyto(out, rows.reshape(-1, self._row)[:, part.left : part.right])


def in_memory(bits: Bits, shape: Shape) -> RangeReader:
    """A reader of a tensor whose elements are at hand, flat."""
    return RangeReader(lambda lo, hi, out: np.copyto(out, bits[lo:hi]), math.prod(shape[1:]))


class Value(ABC):
    """An operator bound to its source and target. A node with a dtype has `bits`; every float node has `accumulate`.

    Attributes:
        granularity: elements; ranges that do not begin and end at multiples of so many decode some chunks twice.
    """

    facts: Facts
    granularity = 1

    def bits(self, lo: int, hi: int, out: Bits) -> None:
        """Put elements `[lo, hi)` into `out` as bit patterns of the node's dtype."""
        raise TypeError("a wide node has no bits")  # excluded by `infer`

    def accumulate(self, lo: int, hi: int, into: Wide, first: bool) -> None:
        """Add the values of elements `[lo, hi)` to `into` (or set it, if `first`), in the accumulation type.

        Exact nodes are computed by themselves and added in one step, rounded once.
        """
        if not first:
            with borrowed(into.dtype, hi - lo) as values:
                self.accumulate(lo, hi, values, first=True)
                np.add(into, values, out=into)
            return
        assert self.facts.dtype is not None
        with borrowed(self.facts.dtype.bits, hi - lo) as bits:
            self.bits(lo, hi, bits)
            widen_into(bits, self.facts.dtype, into)

    def rectangle_bits(self, part: Rectangle, out: Bits) -> None:
        """As `bits`, into `[rows, columns]`. Whole rows are read: a chunk holds such, and a patch needs all of it."""
        RangeReader(self.bits, math.prod(self.facts.shape[1:])).read_rectangle(part, out)

    def accumulate_rectangle(self, part: Rectangle, into: Wide, first: bool) -> None:
        """As `accumulate`, into `[rows, columns]`. Every wide node has its own way to compute these and no others."""
        if not first:
            with borrowed(into.dtype, into.size) as flat:
                values = flat.reshape(into.shape)
                self.accumulate_rectangle(part, values, first=True)
                np.add(into, values, out=into)
            return
        assert self.facts.dtype is not None
        with borrowed(self.facts.dtype.bits, into.size) as bits:
            self.rectangle_bits(part, bits.reshape(into.shape))
            widen_into(bits, self.facts.dtype, into.reshape(-1))

    def rounded(self, lo: int, hi: int, accumulator: np.dtype[Any], dtype: Dtype, out: Bits) -> None:
        """Put elements `[lo, hi)` into `out`, in the accumulation type and then rounded to bits of `dtype`."""
        with borrowed(accumulator, hi - lo) as values:
            with np.errstate(**SILENT):
                self.accumulate(lo, hi, values, first=True)
            round_wide(values, dtype, out)

    def bf16_and_product(self, lo: int, hi: int) -> tuple[Value, OntoBf16] | None:
        """A bf16 node and what is to be added to it, if elements `[lo, hi)` of this one are that sum and nothing else.

        There are kernels that do so in one pass, to the same result.
        """
        return None

    def onto_bf16(self, lo: int, hi: int) -> OntoBf16 | None:
        """What adds elements `[lo, hi)` to bf16 values in one pass; None if there is no such way."""
        return None

    def reference(self, lo: int, hi: int, accumulator: np.dtype[Any]) -> Wide:
        """The same values by the ordered reference of spec/arithmetic.md."""
        values = np.empty(hi - lo, accumulator)
        self.accumulate(lo, hi, values, first=True)
        return values


class ReadValue(Value):
    """A leaf: what a name stands for, read as it is."""

    def __init__(self, facts: Facts, read: Read) -> None:
        self.facts = facts
        self._read = read

    def bits(self, lo: int, hi: int, out: Bits) -> None:
        self._read(lo, hi, out)


class Operator(ABC):
    """One node of a recipe: its JSON, its checks, and what it becomes when bound to data."""

    op: ClassVar[str]

    @classmethod
    @abstractmethod
    def parse(cls, fields: Fields, node: Callable[[str, object], Operator], pointer: str) -> Operator:
        """From the JSON fields behind `op`; `node(key, value)` parses an operand."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]: ...

    @abstractmethod
    def infer(self, scope: Scope, target: Target, pointer: str) -> Facts:
        """Check the operands; give dtype, shape and grade. Raises `MalformedError` (reason `operand`)."""

    @abstractmethod
    def bind(self, source: Source, scope: Scope, target: Target) -> Value: ...

    def operands(self) -> tuple[Operator, ...]:
        return ()

    def walk(self) -> Iterator[Operator]:
        """This node and all below it."""
        yield self
        for operand in self.operands():
            yield from operand.walk()


def whole(value: Value, accumulator: np.dtype[Any]) -> Wide:
    """All values of a float node with a dtype, in its shape."""
    values = aligned(accumulator, value.facts.count)
    value.accumulate(0, values.size, values, first=True)
    return values.reshape(value.facts.shape)


def misfit(what: str, pointer: str, expected: object = None, found: object = None) -> MalformedError:
    return MalformedError(what, where=pointer, expected=expected, found=found, reason="operand")


def found_facts(facts: Facts | None, what: str, pointer: str) -> Facts:
    if facts is None:
        raise misfit(f"there is no {what}", pointer)
    return facts
