"""`lowrank`: `scale * B^T A`, the factors component-major, largest first (spec/operators/lowrank.md).

With float factors the value depends on the order of the sums, within a bound. With integer factors no sum or product is
ever rounded, so that any matrix product gives the same bits.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..dtypes import DTYPES
from ..errors import MalformedError
from ..gemm import OntoBf16, Product
from ..names import escaped
from ..scratch import borrowed
from ..strictjson import Fields
from .base import Facts, Operator, Rectangle, Scope, Source, Target, Value, Wide, misfit, rectangles

FACTOR_INTEGERS = frozenset(DTYPES[name] for name in ("I8", "I16", "I32"))
FACTOR_FLOATS = frozenset(dtype for dtype in DTYPES.values() if dtype.is_float)
EXPONENTS = range(-100, 101)
"""Of two, in the scale of integer factors."""

_COLUMNS = 1 << 16  # of which squares are added up at a time

Integers = npt.NDArray[np.signedinteger[Any]]


@dataclass(frozen=True)
class Lowrank(Operator):
    """`a` has shape `[r, in]`, `b` has shape `[r, out]`; the value is wide, `[out, in]` flattened as the tensor is."""

    a: Operator
    b: Operator
    scale: float = 1.0
    op: ClassVar[str] = "lowrank"

    @classmethod
    def parse(cls, fields: Fields, node: Callable[[str, object], Operator], pointer: str) -> Lowrank:
        a = node("a", fields.object("a"))
        b = node("b", fields.object("b"))
        return cls(a, b, fields.number("scale") if fields.has("scale") else 1.0)

    def to_json(self) -> dict[str, Any]:
        scale = {} if self.scale == 1 else {"scale": self.scale}
        return {"op": self.op, "a": self.a.to_json(), "b": self.b.to_json(), **scale}

    def operands(self) -> tuple[Operator, ...]:
        return (self.a, self.b)

    def infer(self, scope: Scope, target: Target, pointer: str) -> Facts:
        a = self.a.infer(scope, target, f"{pointer}/a")
        b = self.b.infer(scope, target, f"{pointer}/b")
        if len(target.shape) < 2:
            raise misfit("low rank in a tensor of fewer than two dimensions", pointer, found=list(target.shape))
        integers = a.dtype in FACTOR_INTEGERS
        for key, operand, size in (("a", a, target.row), ("b", b, target.rows)):
            fits = operand.dtype in FACTOR_INTEGERS if integers else operand.dtype in FACTOR_FLOATS
            if not fits:
                kind = "a wide node" if operand.dtype is None else operand.dtype.name
                wanted = "F64, F32, F16 or BF16, or I8, I16 or I32 for both"
                raise misfit("a factor of the wrong dtype", f"{pointer}/{key}", wanted, kind)
            if integers and not operand.exact:
                raise misfit("integer factors that are not exact", f"{pointer}/{key}")
            if len(operand.shape) != 2 or operand.shape[1] != size or operand.shape[0] != a.shape[0]:
                raise misfit(
                    "a factor of the wrong shape", f"{pointer}/{key}", f"[{a.shape[0]}, {size}]", list(operand.shape)
                )
        if not 1 <= a.shape[0] <= min(target.rows, target.row):
            raise misfit("the rank does not fit", pointer, f"1 to {min(target.rows, target.row)}", a.shape[0])
        if not math.isfinite(self.scale):
            raise misfit("the scale is not finite", pointer)
        if integers and not is_exact_scale(self.scale):
            raise misfit("the scale of integer factors", pointer, "a power of two from 2^-100 to 2^100", self.scale)
        return Facts(None, target.shape, exact=integers)

    def bind(self, source: Source, scope: Scope, target: Target) -> Value:
        return _Lowrank(self, self.a.bind(source, scope, target), self.b.bind(source, scope, target), target)


def is_exact_scale(scale: float) -> bool:
    """Whether integer factors may have this scale: it can be multiplied with any of their sums without rounding."""
    mantissa, exponent = math.frexp(scale)
    return mantissa == 0.5 and exponent - 1 in EXPONENTS


def squared_bound(a: Integers, b: Integers) -> int:
    """The square of what no sum of products of the integer factors `a [r, in]`, `b [r, out]` exceeds.

    By Cauchy and Schwarz that holds for the sum over any of the components, so for whatever is summed up on the way.
    """
    return _largest_square(a) * _largest_square(b)


def most_squared(accumulator: np.dtype[Any]) -> int:
    """The largest `squared_bound` that is allowed: up to its root the accumulation type holds every integer."""
    return 1 << 2 * (np.finfo(accumulator).nmant + 1)


def _largest_square(factor: Integers) -> int:
    """The largest sum of squares of a column."""
    columns = factor.shape[1]
    parts = (factor[:, begin : begin + _COLUMNS] for begin in range(0, columns, _COLUMNS))
    return max((_largest_of(part) for part in parts), default=0)


def _largest_of(factor: Integers) -> int:
    """The same of some columns, in halves: squares of I32 do not add up in 64 bits."""
    high, low = np.zeros((2, factor.shape[1]), np.int64)
    for component in factor:
        squares = np.square(component.astype(np.int64))
        high += squares >> 32
        low += squares & 0xFFFFFFFF
    high += low >> 32
    low &= 0xFFFFFFFF
    top = high.max(initial=0)
    return (int(top) << 32) + int(low[high == top].max(initial=0))


class _Lowrank(Value):
    def __init__(self, node: Lowrank, a: Value, b: Value, target: Target) -> None:
        self.facts = Facts(None, target.shape, exact=a.facts.dtype in FACTOR_INTEGERS)
        self._a, self._b = a, b
        self._scale = node.scale
        self._target = target
        self._lock = threading.Lock()
        self._product: Product | None = None

    def product(self) -> Product:
        """Of `a` and `scale * b` in the accumulation type; they are read once.

        Raises `MalformedError` (reason `inexact`) if a sum of integers might have to be rounded.
        """
        with self._lock:
            if self._product is None:
                accumulator = self._target.accumulator
                sizes = self._a.facts.count, self._b.facts.count
                with borrowed(accumulator, sizes[0]) as a, borrowed(accumulator, sizes[1]) as b:
                    if self.facts.exact:
                        self._read_integers(a, b)
                    else:
                        self._a.accumulate(0, a.size, a, first=True)
                        self._b.accumulate(0, b.size, b, first=True)
                    if self._scale != 1:
                        b *= b.dtype.type(self._scale)
                    self._product = Product(a.reshape(self._a.facts.shape), b.reshape(self._b.facts.shape))
            return self._product

    def _read_integers(self, into_a: Wide, into_b: Wide) -> None:
        a, b = _whole_integers(self._a), _whole_integers(self._b)
        if (found := squared_bound(a, b)) > most_squared(into_a.dtype):
            raise MalformedError(
                f"integer factors too large for {into_a.dtype.name}",
                where=f"tensor '{escaped(self._target.name)}'",
                expected=f"largest squares of columns, multiplied, up to {most_squared(into_a.dtype)}",
                found=found,
                reason="inexact",
            )
        np.copyto(into_a, a.reshape(-1), casting="unsafe")
        np.copyto(into_b, b.reshape(-1), casting="unsafe")

    def accumulate(self, lo: int, hi: int, into: Wide, first: bool) -> None:
        product, begin = self.product(), lo
        for part in rectangles(lo, hi, self._target.row):
            end = begin + math.prod(part.shape)
            product.add(into[begin - lo : end - lo].reshape(part.shape), part.top, part.left, first)
            begin = end

    def accumulate_rectangle(self, part: Rectangle, into: Wide, first: bool) -> None:
        self.product().add(into, part.top, part.left, first)

    def onto_bf16(self, lo: int, hi: int) -> OntoBf16 | None:
        row = self._target.row
        return None if lo % row or hi % row else self.product().onto_bf16(lo // row, (hi - lo) // row)

    def reference(self, lo: int, hi: int, accumulator: np.dtype[Any]) -> Wide:
        row = self._target.row
        top, bottom = lo // row, -(-hi // row)
        total = np.zeros((bottom - top, row), accumulator)
        for a, b in self.product().components():
            total += b[top:bottom, None] * a
        return total.reshape(-1)[lo - top * row : hi - top * row]


def _whole_integers(value: Value) -> Integers:
    dtype = value.facts.dtype
    assert dtype is not None
    bits = np.empty(value.facts.count, dtype.bits)
    value.bits(0, bits.size, bits)
    return bits.view(dtype.values).reshape(value.facts.shape)
