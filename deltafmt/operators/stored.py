"""`stored`: the elements of a stored array (spec/operators/stored.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..names import escaped
from ..strictjson import Fields
from .base import Facts, Operator, ReadValue, Scope, Source, Target, Value, found_facts


@dataclass(frozen=True)
class Stored(Operator):
    array: str
    op: ClassVar[str] = "stored"

    @classmethod
    def parse(cls, fields: Fields, node: Callable[[str, object], Operator], pointer: str) -> Stored:
        return cls(fields.text("array"))

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, "array": self.array}

    def infer(self, scope: Scope, target: Target, pointer: str) -> Facts:
        return found_facts(scope.array(self.array), f"stored array '{escaped(self.array)}'", pointer)

    def bind(self, source: Source, scope: Scope, target: Target) -> Value:
        return ReadValue(self.infer(scope, target, target.name), source.array_reader(self.array))
