"""`lowrank`: `scale * B^T A`, the factors component-major, largest first (spec/operators/lowrank.md)."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..dtypes import widen
from ..gemm import add_product
from ..strictjson import Fields
from .base import Facts, Operator, Scope, Source, Target, Value, Wide, misfit


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
        for key, operand, size in (("a", a, target.row), ("b", b, target.rows)):
            if operand.dtype is None or not operand.dtype.is_float:
                kind = "a wide node" if operand.dtype is None else operand.dtype.name
                raise misfit("a factor that is not a float", f"{pointer}/{key}", "F64, F32, F16 or BF16", kind)
            if len(operand.shape) != 2 or operand.shape[1] != size or operand.shape[0] != a.shape[0]:
                raise misfit(
                    "a factor of the wrong shape", f"{pointer}/{key}", f"[{a.shape[0]}, {size}]", list(operand.shape)
                )
        if not 1 <= a.shape[0] <= min(target.rows, target.row):
            raise misfit("the rank does not fit", pointer, f"1 to {min(target.rows, target.row)}", a.shape[0])
        if not math.isfinite(self.scale):
            raise misfit("the scale is not finite", pointer)
        return Facts(None, target.shape, exact=False)

    def bind(self, source: Source, scope: Scope, target: Target) -> Value:
        return _Lowrank(self, self.a.bind(source, scope, target), self.b.bind(source, scope, target), target)


class _Lowrank(Value):
    def __init__(self, node: Lowrank, a: Value, b: Value, target: Target) -> None:
        self.facts = Facts(None, target.shape, exact=False)
        self._a, self._b = a, b
        self._scale = node.scale
        self._target = target
        self._lock = threading.Lock()
        self._factors: tuple[Wide, Wide] | None = None

    def factors(self) -> tuple[Wide, Wide]:
        """`(a [r, in], scale * b [r, out])` in the accumulation type; read once."""
        with self._lock:
            if self._factors is None:
                a, b = (_whole(value, self._target.accumulator) for value in (self._a, self._b))
                self._factors = a, b if self._scale == 1 else b * b.dtype.type(self._scale)
            return self._factors

    def accumulate(self, lo: int, hi: int, into: Wide, first: bool) -> None:
        a, b = self.factors()
        row = self._target.row
        top, bottom = lo // row, -(-hi // row)
        if lo == top * row and hi == bottom * row:
            add_product(into.reshape(-1, row), b[:, top:bottom], a, first)
            return
        rows = np.empty((bottom - top, row), into.dtype)
        add_product(rows, b[:, top:bottom], a, True)
        part = rows.reshape(-1)[lo - top * row : hi - top * row]
        if first:
            np.copyto(into, part)
        else:
            np.add(into, part, out=into)

    def reference(self, lo: int, hi: int, accumulator: np.dtype[Any]) -> Wide:
        a, b = self.factors()
        row = self._target.row
        top, bottom = lo // row, -(-hi // row)
        total = np.zeros((bottom - top, row), accumulator)
        for component in range(a.shape[0]):
            total += b[component, top:bottom, None] * a[component]
        return total.reshape(-1)[lo - top * row : hi - top * row]


def _whole(value: Value, accumulator: np.dtype[Any]) -> Wide:
    dtype = value.facts.dtype
    assert dtype is not None
    bits = np.empty(value.facts.count, dtype.bits)
    value.bits(0, bits.size, bits)
    return widen(bits, dtype, accumulator).reshape(value.facts.shape)
