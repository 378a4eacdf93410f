"""`panels`: elements stored so that a few columns are read without the others (spec/operators/panels.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..dtypes import Bits
from ..scratch import borrowed
from ..strictjson import Fields
from .base import Facts, Operator, Rectangle, Scope, Source, Target, Value, misfit, rectangles

MOST_PANELS = 1 << 12
"""Side by side: readers go through them one by one."""
MOST_GRANULARITY = 1 << 20
"""Elements of a block that readers take as a whole; of larger ones they read what they were going to."""


@dataclass(frozen=True)
class Panels(Operator):
    """`x` has the shape of the tensor that the recipe belongs to, which is a matrix of `target.rows` times `target.row`
    elements, cut into blocks of `rows` rows and these into panels of `columns` columns."""

    x: Operator
    rows: int
    columns: int
    op: ClassVar[str] = "panels"

    @classmethod
    def parse(cls, fields: Fields, node: Callable[[str, object], Operator], pointer: str) -> Panels:
        return cls(node("x", fields.object("x")), fields.integer("rows", 1), fields.integer("columns", 1))

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, "x": self.x.to_json(), "rows": self.rows, "columns": self.columns}

    def operands(self) -> tuple[Operator, ...]:
        return (self.x,)

    def infer(self, scope: Scope, target: Target, pointer: str) -> Facts:
        x = self.x.infer(scope, target, f"{pointer}/x")
        if x.dtype is None:
            raise misfit("panels of a wide node", f"{pointer}/x")
        if len(target.shape) < 2 or x.shape != target.shape:
            raise misfit("panels of another shape", f"{pointer}/x", list(target.shape), list(x.shape))
        least = -(-target.row // MOST_PANELS)
        if self.columns < least:
            raise misfit("panels too narrow", f"{pointer}/columns", f"at least {least}", self.columns)
        return Facts(x.dtype, x.shape, x.exact)

    def bind(self, source: Source, scope: Scope, target: Target) -> Value:
        order = Order(target.rows, target.row, self.rows, self.columns)
        return _Panels(self.x.bind(source, scope, target), order)


class Panel(NamedTuple):
    """One panel: where it is in the matrix, and its first element in the stored order."""

    place: Rectangle
    begin: int


@dataclass(frozen=True)
class Order:
    """A matrix of `height` times `width` elements in blocks of `rows` rows, each of them in panels of `columns`
    columns: block after block, panel after panel, row after row."""

    height: int
    width: int
    rows: int
    columns: int

    def panels(self, part: Rectangle) -> Iterator[Panel]:
        """Those that have elements in a rectangle, in the stored order."""
        for top in range(part.top // self.rows * self.rows, part.bottom, self.rows):
            bottom = min(top + self.rows, self.height)
            for left in range(part.left // self.columns * self.columns, part.right, self.columns):
                place = Rectangle(top, bottom, left, min(left + self.columns, self.width))
                yield Panel(place, top * self.width + (bottom - top) * left)

    def stored(self, bits: Bits, lo: int, hi: int) -> Bits:
        """Elements `[lo, hi)` in the stored order, of all elements `[height * width]` in that of the tensor."""
        out = np.empty(hi - lo, bits.dtype)
        matrix = bits.reshape(self.height, self.width)
        block = self.rows * self.width
        rows = Rectangle(lo // block * self.rows, min(-(-hi // block) * self.rows, self.height), 0, self.width)
        for (top, bottom, left, right), begin in self.panels(rows):
            end = begin + (bottom - top) * (right - left)
            first, last = max(lo, begin), min(hi, end)
            if first < last:
                values = matrix[top:bottom, left:right].reshape(-1)
                np.copyto(out[first - lo : last - lo], values[first - begin : last - begin])
        return out


class _Panels(Value):
    def __init__(self, x: Value, order: Order) -> None:
        self.facts = Facts(x.facts.dtype, x.facts.shape, x.facts.exact)
        self._x, self._order = x, order
        block = min(order.rows, order.height) * order.width
        self.granularity = block if 0 < block <= MOST_GRANULARITY else x.granularity

    def bits(self, lo: int, hi: int, out: Bits) -> None:
        begin = 0
        for part in rectangles(lo, hi, self._order.width):
            end = begin + math.prod(part.shape)
            self.rectangle_bits(part, out[begin:end].reshape(part.shape))
            begin = end

    def rectangle_bits(self, part: Rectangle, out: Bits) -> None:
        if part.top + 1 == part.bottom:
            self._read_row(part, out[0])
            return
        rows = self._order.rows
        for first in range(part.top // rows * rows, part.bottom, rows):
            top, bottom = max(part.top, first), min(part.bottom, first + rows)
            self._read_of_block(Rectangle(top, bottom, part.left, part.right), out[top - part.top : bottom - part.top])

    def _read_row(self, part: Rectangle, out: Bits) -> None:
        """A part of one row, and nothing else: it may be long."""
        for place, panel in self._order.panels(part):
            left, right = max(part.left, place.left), min(part.right, place.right)
            begin = panel + (part.top - place.top) * place.columns + left - place.left
            self._x.bits(begin, begin + right - left, out[left - part.left : right - part.left])

    def _read_of_block(self, part: Rectangle, out: Bits) -> None:
        """Rows of one block: if these are all, panels follow one another and are read in one go."""
        panels = list(self._order.panels(part))
        whole = (part.top, part.bottom) == (panels[0].place.top, panels[0].place.bottom)
        if whole:
            self._read_panels(panels, part, out)
        else:
            for panel in panels:
                self._read_panels([panel], part, out)

    def _read_panels(self, panels: Sequence[Panel], part: Rectangle, out: Bits) -> None:
        """Some panels' rows of a part, which are stored one behind the other."""
        height, first = part.bottom - part.top, panels[0]
        begin = first.begin + (part.top - first.place.top) * first.place.columns
        with borrowed(out.dtype, height * (panels[-1].place.right - first.place.left)) as values:
            self._x.bits(begin, begin + values.size, values)
            for place, _ in panels:
                size = height * place.columns
                panel, values = values[:size].reshape(height, -1), values[size:]
                left, right = max(part.left, place.left), min(part.right, place.right)
                columns = panel[:, left - place.left : right - place.left]
                np.copyto(out[:, left - part.left : right - part.left], columns)
