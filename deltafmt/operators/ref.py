"""`ref`: another tensor of the archive, or a tensor of a base (spec/operators/ref.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..dtypes import Bits
from ..names import escaped
from ..strictjson import Fields
from .base import Facts, Operator, ReadValue, Rectangle, Scope, Source, Target, TensorReader, Value, found_facts


@dataclass(frozen=True)
class Ref(Operator):
    tensor: str
    base: str | None = None
    op: ClassVar[str] = "ref"

    @classmethod
    def parse(cls, fields: Fields, node: Callable[[str, object], Operator], pointer: str) -> Ref:
        return cls(fields.text("tensor"), fields.text("base") if fields.has("base") else None)

    def to_json(self) -> dict[str, Any]:
        base = {} if self.base is None else {"base": self.base}
        return {"op": self.op, "tensor": self.tensor, **base}

    def infer(self, scope: Scope, target: Target, pointer: str) -> Facts:
        name = escaped(self.tensor)
        if self.base is None:
            return found_facts(scope.tensor(self.tensor), f"tensor '{name}'", pointer)
        return found_facts(
            scope.base_tensor(self.base, self.tensor), f"tensor '{name}' in base '{escaped(self.base)}'", pointer
        )

    def bind(self, source: Source, scope: Scope, target: Target) -> Value:
        reader = source.tensor_reader(self.tensor) if self.base is None else source.base_reader(self.base, self.tensor)
        return _Ref(self.infer(scope, target, target.name), reader)


class _Ref(ReadValue):
    def __init__(self, facts: Facts, reader: TensorReader) -> None:
        super().__init__(facts, reader.read)
        self._reader = reader
        self.granularity = reader.granularity

    def rectangle_bits(self, part: Rectangle, out: Bits) -> None:
        self._reader.read_rectangle(part, out)
