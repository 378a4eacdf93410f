"""What a recipe comes to, in fractions: the ordered reference of spec/arithmetic.md, and the range of other orders.

Shares no code with the package or any reader.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

from vectors.exact import FIELDS, Real, add, integers, is_nan, multiply, nearest_real, pattern, power, reals
from vectors.values import WIDTH, Json, Tensor, bits, words

ZERO = Real(False, Fraction(0))


class Wide(NamedTuple):
    """The value of a wide node in the accumulation type, and what the bound of the bounded grade is made of."""

    value: list[Real]
    magnitude: list[Fraction]  # the same expression of absolute values
    ranks: int = 0
    terms: int = 0


class Bounded(NamedTuple):
    """A bounded value by the ordered reference; ``low`` and ``high`` enclose what any conforming reader may give."""

    reference: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Recipe:
    """A recipe of a tensor of this dtype and shape; ``find`` gives the tensor of a `stored` or `ref` node."""

    node: Json
    dtype: str
    shape: list[int]
    find: Callable[[Json], Tensor]

    @cached_property
    def accumulator(self) -> str:
        dtypes: set[str] = {self.dtype}
        factors: set[str] = set()

        def visit(node: Json, factor: bool = False) -> None:
            if node["op"] in ("stored", "ref"):
                (factors if factor else dtypes).add(self.find(node).dtype)
            for key in ("a", "b", "x", "scale", "table", "prediction", "residual"):
                if isinstance(node.get(key), dict):
                    visit(node[key], factor or key in ("a", "b"))
            for term in node.get("terms", []):
                visit(term)

        visit(self.node)
        return "F64" if "F64" in dtypes | factors or "I32" in factors else "F32"

    def wide(self, node: Json | None = None) -> Wide:
        """The value of a node that is wide or a float, in the accumulation type."""
        node = node or self.node
        if node["op"] == "sum":
            terms = [self.wide(term) for term in node["terms"]]
            value, magnitude = terms[0].value, terms[0].magnitude
            for term in terms[1:]:
                value = [add(x, y, self.accumulator) for x, y in zip(value, term.value, strict=True)]
                magnitude = [x + y for x, y in zip(magnitude, term.magnitude, strict=True)]
            return Wide(value, magnitude, sum(t.ranks for t in terms), len(terms) + sum(t.terms for t in terms))
        if node["op"] == "scaled":
            x, scale = self.wide(node["x"]), self.wide(node["scale"])
            times = len(x.value) // max(len(scale.value), 1)  # elements a number of the scale
            value = [multiply(scale.value[i // times], v, self.accumulator) for i, v in enumerate(x.value)]
            magnitude = [scale.magnitude[i // times] * m for i, m in enumerate(x.magnitude)]
            return Wide(value, magnitude, x.ranks, x.terms + 1)
        if node["op"] == "lowrank":
            return self.low_rank(self.operand(node["a"]), self.operand(node["b"]), node.get("scale", 1))
        found = [nearest_real(x, self.accumulator) for x in reals(self.operand(node))]
        return Wide(found, [finite(x) for x in found])

    def operand(self, node: Json) -> Tensor:
        """The tensor of a node with a dtype."""
        if node["op"] == "rows":
            x = self.operand(node["x"])
            size = math.prod(self.shape) * WIDTH[x.dtype]
            return Tensor(x.dtype, self.shape, x.data[:size] + bytes(max(0, size - len(x.data))))
        if node["op"] == "panels":
            return self.panels(self.operand(node["x"]), node["rows"], node["columns"])
        if node["op"] == "decayed":
            return decayed(self.operand(node["x"]), self.operand(node["table"]))
        return self.find(node)

    def panels(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Each element from where the formula of operators/panels.md says it is."""
        m, n, width = self.shape[0], math.prod(self.shape[1:]), WIDTH[x.dtype]
        data = b""
        for i in range(m):
            for j in range(n):
                t, left = i // rows * rows, j // columns * columns
                h, w = min(rows, m - t), min(columns, n - left)
                at = t * n + h * left + (i - t) * w + (j - left)
                data += x.data[at * width : (at + 1) * width]
        return Tensor(x.dtype, self.shape, data)

    def low_rank(self, a: Tensor, b: Tensor, scale: float) -> Wide:
        rank, rows, columns = a.shape[0], self.shape[0], math.prod(self.shape[1:])
        places = [[(k * rows + o, k * columns + i) for k in range(rank)] for o in range(rows) for i in range(columns)]
        if a.dtype.startswith("I"):
            left, right = integers(b), integers(a)
            sums = [sum(left[o] * right[i] for o, i in pairs) * Fraction(scale) for pairs in places]
            exact = [nearest_real(Real(x < 0, abs(x)), self.accumulator) for x in sums]
            assert [x.size for x in exact] == [abs(x) for x in sums], "beyond what the accumulation type holds"
            return Wide(exact, [abs(x) for x in sums])
        factor = nearest_real(Real(scale < 0, abs(Fraction(scale))), self.accumulator)
        b_reals, a_reals = reals(b), reals(a)
        value, magnitude = [], []
        for pairs in places:
            total, size = ZERO, Fraction(0)
            for o, i in pairs:
                part = multiply(multiply(factor, b_reals[o], self.accumulator), a_reals[i], self.accumulator)
                total = add(total, part, self.accumulator)
                size += abs(Fraction(scale)) * finite(b_reals[o]) * finite(a_reals[i])
            value.append(total)
            magnitude.append(size)
        return Wide(value, magnitude, rank)

    def exact(self) -> Tensor:
        """The tensor: the root's value, converted; NaNs without a sign."""
        if self.node["op"] in ("stored", "ref", "rows", "panels", "decayed"):
            return self.operand(self.node)
        return converted_root(self.wide().value, self.dtype, self.shape)

    def bounded(self) -> Bounded:
        value, magnitude, ranks, terms = self.wide()
        allowed = 2 * (ranks + terms + 2) * power(-53 if self.accumulator == "F64" else -24)
        ends = []
        for side in (-1, 0, 1):
            moved = [moved_by(x, side * allowed * m) for x, m in zip(value, magnitude, strict=True)]
            ends.append(converted_root(moved, self.dtype, self.shape))
        return Bounded(ends[1], ends[0], ends[2])


def decayed(x: Tensor, table: Tensor) -> Tensor:
    """Each element less what the table adds up to as far as its mantissa."""
    exponent_bits, mantissa_bits = FIELDS[x.dtype]
    sign, infinity = 1 << exponent_bits + mantissa_bits, (1 << exponent_bits) - 1 << mantissa_bits
    gaps, changes = words(table)[: table.shape[1]], words(table)[table.shape[1] :]

    def moved(u: int) -> int:
        left, step = u % (1 << mantissa_bits), 0
        for gap, change in zip(gaps, changes, strict=True):
            left -= gap
            if left < 0:
                break
            step += change
        return u & sign | (u - step) % sign if 1 << mantissa_bits <= u % sign < infinity else u

    found = {u: moved(u) for u in set(words(x))}  # a tensor of zeros is one element
    return bits(x.dtype, *(found[u] for u in words(x)))._replace(shape=x.shape)


def finite(x: Real) -> Fraction:
    """The size of a number; of what is none the bound says nothing."""
    return x.size if isinstance(x.size, Fraction) else Fraction(0)


def moved_by(x: Real, distance: Fraction) -> Real:
    if not distance or not isinstance(x.size, Fraction):
        return x
    total = (-x.size if x.negative else x.size) + distance
    return Real(total < 0, abs(total))


def converted_root(value: list[Real], dtype: str, shape: list[int]) -> Tensor:
    """The value of a wide node in the tensor's dtype: NaNs have no sign."""
    unsigned = [x._replace(negative=False) if is_nan(x) else x for x in value]
    return bits(dtype, *(pattern(x, dtype) for x in unsigned))._replace(shape=shape)
