"""What every operator is: a node of a recipe; and, bound to data, a value that can be read range by range."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from ..dtypes import Bits, Dtype, Shape, widen
from ..errors import MalformedError
from ..scratch import scratch
from ..strictjson import Fields

Wide = npt.NDArray[Any]  # float32 or float64: the accumulation type of a tensor


@dataclass(frozen=True)
class Facts:
    """What is known of a tensor, stored array or node without reading data. `dtype` is None where a node is wide."""

    dtype: Dtype | None
    shape: Shape
    exact: bool

    @property
    def count(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=object))


class Scope(Protocol):
    """Looks names up while a manifest is checked. Each returns None for a name that does not exist."""

    def array(self, name: str) -> Facts | None: ...
    def tensor(self, name: str) -> Facts | None: ...
    def base_tensor(self, base: str, name: str) -> Facts | None: ...


Read = Callable[[int, int, Bits], None]
"""Puts elements `[lo, hi)` (flat indices) into an array of bits; may be called from many threads."""


class Source(Protocol):
    """Where a recipe's names become data."""

    def array_reader(self, name: str) -> Read: ...
    def tensor_reader(self, name: str) -> Read: ...
    def base_reader(self, base: str, name: str) -> Read: ...


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
        return int(np.prod(self.shape[1:], dtype=object))


class Value(ABC):
    """An operator bound to its source and target. A node with a dtype has `bits`; every float node has `accumulate`."""

    facts: Facts

    def bits(self, lo: int, hi: int, out: Bits) -> None:
        """Put elements `[lo, hi)` into `out` as bit patterns of the node's dtype."""
        raise TypeError("a wide node has no bits")  # excluded by `infer`

    def accumulate(self, lo: int, hi: int, into: Wide, first: bool) -> None:
        """Add the values of elements `[lo, hi)` to `into` (or set it, if `first`), in the accumulation type."""
        if first:
            self._widen(lo, hi, into)
        else:
            np.add(into, self._widen(lo, hi, scratch("operand values", into.dtype, hi - lo)), out=into)

    def reference(self, lo: int, hi: int, accumulator: np.dtype[Any]) -> Wide:
        """The same values by the ordered reference of spec/arithmetic.md."""
        return self._widen(lo, hi, np.empty(hi - lo, accumulator))

    def _widen(self, lo: int, hi: int, out: Wide) -> Wide:
        assert self.facts.dtype is not None
        bits = scratch("operand", self.facts.dtype.bits, hi - lo)
        self.bits(lo, hi, bits)
        return widen(bits, self.facts.dtype, out.dtype, out)


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


def misfit(what: str, pointer: str, expected: object = None, found: object = None) -> MalformedError:
    return MalformedError(what, where=pointer, expected=expected, found=found, reason="operand")


def found_facts(facts: Facts | None, what: str, pointer: str) -> Facts:
    if facts is None:
        raise misfit(f"there is no {what}", pointer)
    return facts
