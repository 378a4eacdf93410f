"""`rows`: the first rows of something with more or fewer rows, then zeros (spec/operators/rows.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..dtypes import Bits
from ..strictjson import Fields
from .base import Facts, Operator, Scope, Source, Target, Value, misfit


@dataclass(frozen=True)
class Rows(Operator):
    """`x` has shape `[n, ...]`, the value `[m, ...]`, as the tensor that the recipe belongs to."""

    x: Operator
    op: ClassVar[str] = "rows"

    @classmethod
    def parse(cls, fields: Fields, node: Callable[[str, object], Operator], pointer: str) -> Rows:
        return cls(node("x", fields.object("x")))

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, "x": self.x.to_json()}

    def operands(self) -> tuple[Operator, ...]:
        return (self.x,)

    def infer(self, scope: Scope, target: Target, pointer: str) -> Facts:
        x = self.x.infer(scope, target, f"{pointer}/x")
        if x.dtype is None:
            raise misfit("rows of a wide node", f"{pointer}/x")
        if not x.shape or not target.shape or x.shape[1:] != target.shape[1:]:
            raise misfit("rows of another shape", f"{pointer}/x", ["any", *target.shape[1:]], list(x.shape))
        return Facts(x.dtype, target.shape, x.exact)

    def bind(self, source: Source, scope: Scope, target: Target) -> Value:
        return _Rows(self.x.bind(source, scope, target), target)


class _Rows(Value):
    def __init__(self, x: Value, target: Target) -> None:
        self.facts = Facts(x.facts.dtype, target.shape, x.facts.exact)
        self.granularity = x.granularity
        self._x = x

    def bits(self, lo: int, hi: int, out: Bits) -> None:
        end = min(max(self._x.facts.count, lo), hi)
        if end > lo:
            self._x.bits(lo, end, out[: end - lo])
        out[end - lo :] = 0
