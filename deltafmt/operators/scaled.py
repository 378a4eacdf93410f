"""`scaled`: a tensor times a number, or a number a row (spec/operators/scaled.md)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..strictjson import Fields
from .base import Facts, Operator, Rectangle, Scope, Source, Target, Value, Wide, misfit, whole


@dataclass(frozen=True)
class Scaled(Operator):
    """`x` has the shape `[rows, ...]` of the tensor that the recipe belongs to, `scale` the shape `[]` or `[rows]`."""

    x: Operator
    scale: Operator
    op: ClassVar[str] = "scaled"

    @classmethod
    def parse(cls, fields: Fields, node: Callable[[str, object], Operator], pointer: str) -> Scaled:
        x = node("x", fields.object("x"))
        return cls(x, node("scale", fields.object("scale")))

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, "x": self.x.to_json(), "scale": self.scale.to_json()}

    def operands(self) -> tuple[Operator, ...]:
        return (self.x, self.scale)

    def infer(self, scope: Scope, target: Target, pointer: str) -> Facts:
        x = self.x.infer(scope, target, f"{pointer}/x")
        scale = self.scale.infer(scope, target, f"{pointer}/scale")
        if x.dtype is not None and not x.dtype.is_float:
            raise misfit("something scaled that is not a float", f"{pointer}/x", "F64, F32, F16 or BF16", x.dtype.name)
        if x.shape != target.shape:
            raise misfit("something scaled of another shape", f"{pointer}/x", list(target.shape), list(x.shape))
        if scale.dtype is None or not scale.dtype.is_float:
            found = "a wide node" if scale.dtype is None else scale.dtype.name
            raise misfit("a scale that is not a float", f"{pointer}/scale", "F64, F32, F16 or BF16", found)
        if scale.shape not in ((), target.shape[:1]):
            expected = f"[] or {list(target.shape[:1])}" if target.shape else "[]"
            raise misfit("a scale of the wrong shape", f"{pointer}/scale", expected, list(scale.shape))
        return Facts(None, target.shape, x.exact and scale.exact)

    def bind(self, source: Source, scope: Scope, target: Target) -> Value:
        return _Scaled(self.x.bind(source, scope, target), self.scale.bind(source, scope, target), target)


class _Scaled(Value):
    def __init__(self, x: Value, scale: Value, target: Target) -> None:
        self.facts = Facts(None, target.shape, x.facts.exact and scale.facts.exact)
        self.granularity = x.granularity
        self._x, self._scale = x, scale
        self._target = target
        self._lock = threading.Lock()
        self._factor: Wide | None = None

    def factor(self) -> Wide:
        """The scale, `[]` or `[rows]`, in the accumulation type; read once."""
        with self._lock:
            if self._factor is None:
                self._factor = whole(self._scale, self._target.accumulator)
            return self._factor

    def accumulate(self, lo: int, hi: int, into: Wide, first: bool) -> None:
        if not first:
            super().accumulate(lo, hi, into, first)
            return
        self._x.accumulate(lo, hi, into, first)
        self._multiply(lo, hi, into)

    def accumulate_rectangle(self, part: Rectangle, into: Wide, first: bool) -> None:
        if not first:
            super().accumulate_rectangle(part, into, first)
            return
        self._x.accumulate_rectangle(part, into, first)
        factor = self.factor()
        np.multiply(into, factor[part.top : part.bottom, None] if factor.ndim else factor, out=into)

    def reference(self, lo: int, hi: int, accumulator: np.dtype[Any]) -> Wide:
        factor = self.factor()
        if factor.ndim:
            factor = np.repeat(factor, self._target.row)[lo:hi]
        return np.asarray(self._x.reference(lo, hi, accumulator) * factor)

    def _multiply(self, lo: int, hi: int, into: Wide) -> None:
        """Multiply elements `[lo, hi)`: whole rows at once, what is left of the first and of the last by itself."""
        factor, row = self.factor(), self._target.row
        if not factor.ndim:
            np.multiply(into, factor, out=into)
            return
        while lo < hi:
            top = lo // row
            bottom = max(hi // row, top + 1) if lo == top * row else top + 1
            part = into[: min(bottom * row, hi) - lo]
            if part.size == (bottom - top) * row:
                by_row = part.reshape(-1, row)
                np.multiply(by_row, factor[top:bottom, None], out=by_row)
            else:
                np.multiply(part, factor[top], out=part)
            lo, into = lo + part.size, into[part.size :]
