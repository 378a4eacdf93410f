"""`decayed`: elements moved by as many last places as their mantissa tells (spec/operators/decayed.md)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from .. import native
from ..dtypes import DTYPES, Bits, Dtype
from ..strictjson import Fields
from .base import Facts, Operator, Scope, Source, Target, Value, misfit

DECAYING = frozenset(DTYPES[name] for name in ("F32", "F16", "BF16"))

MOST_STEPS = 1 << 16
"""In a table: readers keep one for each node."""
_BLOCK = 1 << 16  # elements that numpy moves at a time

Table = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Decayed(Operator):
    """`x` has whatever shape; `table` has the shape `[2, n]`: gaps between the mantissas where the step changes, and
    by how much."""

    x: Operator
    table: Operator
    op: ClassVar[str] = "decayed"

    @classmethod
    def parse(cls, fields: Fields, node: Callable[[str, object], Operator], pointer: str) -> Decayed:
        x = node("x", fields.object("x"))
        return cls(x, node("table", fields.object("table")))

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, "x": self.x.to_json(), "table": self.table.to_json()}

    def operands(self) -> tuple[Operator, ...]:
        return (self.x, self.table)

    def infer(self, scope: Scope, target: Target, pointer: str) -> Facts:
        x = self.x.infer(scope, target, f"{pointer}/x")
        table = self.table.infer(scope, target, f"{pointer}/table")
        if x.dtype not in DECAYING:
            found = "a wide node" if x.dtype is None else x.dtype.name
            raise misfit("something decayed of the wrong dtype", f"{pointer}/x", "F32, F16 or BF16", found)
        if table.dtype is None or table.dtype.name != "U32":
            found = "a wide node" if table.dtype is None else table.dtype.name
            raise misfit("a table of the wrong dtype", f"{pointer}/table", "U32", found)
        most = min(1 << x.dtype.mantissa_bits, MOST_STEPS, max(x.count, 1))
        if len(table.shape) != 2 or table.shape[0] != 2 or not 1 <= table.shape[1] <= most:
            raise misfit("a table of the wrong shape", f"{pointer}/table", f"[2, 1 to {most}]", list(table.shape))
        if not (x.exact and table.exact):
            raise misfit("a decay of something that is not exact", pointer)
        return Facts(x.dtype, x.shape, exact=True)

    def bind(self, source: Source, scope: Scope, target: Target) -> Value:
        return _Decayed(self.x.bind(source, scope, target), self.table.bind(source, scope, target))


class _Decayed(Value):
    def __init__(self, x: Value, table: Value) -> None:
        assert x.facts.dtype is not None
        self.facts = Facts(x.facts.dtype, x.facts.shape, exact=True)
        self.granularity = x.granularity
        self._x, self._table, self._dtype = x, table, x.facts.dtype
        self._lock = threading.Lock()
        self._decay: Decay | None = None

    def decay(self) -> Decay:
        """What the table says; read once."""
        with self._lock:
            if self._decay is None:
                table = np.empty(self._table.facts.count, np.uint32)
                self._table.bits(0, table.size, table)
                self._decay = Decay(table.reshape(2, -1), self._dtype)
            return self._decay

    def bits(self, lo: int, hi: int, out: Bits) -> None:
        self._x.bits(lo, hi, out)
        self.decay().move(out)


class Decay:
    """By how much elements of a dtype move.

    Args:
        table: `[2, n]`, as in the specification: whatever it holds.
    """

    def __init__(self, table: Table, dtype: Dtype) -> None:
        bounds = np.cumsum(table[0], dtype=np.uint64)
        reached = bounds < 1 << dtype.mantissa_bits  # the others say nothing
        steps = np.zeros(np.count_nonzero(reached) + 1, np.uint32)  # in front of the first bound, none
        steps[1:] = np.cumsum(table[1], dtype=np.uint32)[reached]
        self._steps = native.Steps(bounds[reached].astype(np.uint32), steps, dtype.mantissa_bits)

    def move(self, bits: Bits) -> None:
        """Move elements `[m]` in place: bit patterns of the dtype."""
        if native.available():
            native.move_by_steps(self._steps, bits)
            return
        for begin in range(0, bits.size, _BLOCK):
            part, kind = bits[begin : begin + _BLOCK], bits.dtype.type
            sign, low = kind(1 << (8 * part.itemsize - 1)), kind((1 << self._steps.mantissa_bits) - 1)
            exponents = kind(~(sign | low))
            mantissas = part & low
            places = mantissas >> self._steps.shift
            numbers = self._steps.first[places]
            unsure = np.flatnonzero(numbers != self._steps.first[places + 1])
            numbers[unsure] = np.searchsorted(self._steps.bounds, mantissas[unsure], side="right")
            steps = self._steps.steps[numbers].astype(kind)
            exponent = part & exponents
            steps[(exponent == 0) | (exponent == exponents)] = 0
            part[:] = ((part - steps) & (sign - kind(1))) | (part & sign)
