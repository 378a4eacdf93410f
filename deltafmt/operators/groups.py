"""Groups of `patch`: elements whose residuals are alike, known from the prediction (spec/operators/patch.md)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import DTYPES, Bits, Dtype
from ..errors import MalformedError
from ..scratch import scratch
from ..strictjson import Fields
from .base import Wide

KINDS = ("exponent", "margin")
MOST_BOUNDS = 255
LARGEST_BOUND = 2047
_FEW = 8  # bounds up to which it is faster to search for one group after the other
_MANTISSA_BITS = {4: 23, 8: 52}  # of float32 and float64

Keys = npt.NDArray[Any]  # uint8 or uint16
Index = npt.NDArray[np.intp]
Up = npt.NDArray[np.bool_]  # whether a miss lies on the greater side, if there is one


@dataclass(frozen=True)
class Groups:
    """How the elements of a patch are grouped.

    Attributes:
        by: `"exponent"` of the prediction, or its `"margin"` to being rounded the other way.
        bounds: ascending; the group of an element is the number of bounds that are at most its key.
    """

    by: str
    bounds: tuple[int, ...]

    @classmethod
    def parse(cls, value: object, pointer: str) -> Groups:
        """From the manifest's JSON. Raises `MalformedError` (reason `schema`)."""
        fields = Fields(value, pointer)
        by, bounds = fields.text("by"), fields.array("bounds")
        fields.done()
        if by not in KINDS:
            raise _wrong(f"{pointer}/by", " or ".join(KINDS), ascii(by[:80]))
        if not 1 <= len(bounds) <= MOST_BOUNDS:
            raise _wrong(f"{pointer}/bounds", f"1 to {MOST_BOUNDS} bounds", len(bounds))
        for below, bound in zip([0, *bounds], bounds, strict=False):
            if type(bound) is not int or not below < bound <= LARGEST_BOUND:
                raise _wrong(f"{pointer}/bounds", f"ascending integers from 1 to {LARGEST_BOUND}", ascii(bound)[:80])
        return cls(by, tuple(bounds))

    def to_json(self) -> dict[str, Any]:
        return {"by": self.by, "bounds": list(self.bounds)}

    @property
    def count(self) -> int:
        return len(self.bounds) + 1

    def lengths(self, keys: Keys) -> list[int]:
        """Elements in each group."""
        below = [int(np.count_nonzero(keys < bound)) for bound in self.bounds]
        return [end - begin for begin, end in pairwise([0, *below, keys.size])]

    def places(self, keys: Keys, needed: int | None = None) -> Iterator[Index]:
        """Where the elements stand in the flat order, in the grouped order, piece by piece.

        Only the groups that begin before `needed`, if it is given.

        A search for one group takes 0.6 ns for each element that there is, a stable sort of small integers, which is a
        radix sort in numpy, 4 ns.
        """
        bounds = self.bounds
        among: Index | None = None  # where `keys` stand in the flat order, once there are fewer of them
        if needed is not None and needed < keys.size:
            enough = bisect_left(bounds, needed, key=lambda bound: int(np.count_nonzero(keys < bound)))
            if enough < len(bounds):
                among = np.flatnonzero(keys < bounds[enough])
                keys, bounds = keys[among], bounds[:enough]
        for places in _places(keys, bounds):
            yield places if among is None else among[places]


def exponents(bits: Bits, dtype: Dtype) -> Keys:
    """The exponent field of each element, `[m]`; valid until this is called again."""
    field = scratch("group exponents", bits.dtype, bits.size)
    np.right_shift(bits, dtype.mantissa_bits, out=field)
    keys: Keys = scratch("group keys", np.uint16 if dtype.name == "F64" else np.uint8, bits.size)
    np.copyto(keys, field, casting="unsafe")
    if exponent_bits := {"F64": 11, "F16": 5}.get(dtype.name):  # of the others, the sign is gone already
        np.bitwise_and(keys, (1 << exponent_bits) - 1, out=keys)
    return keys


def _places(keys: Keys, bounds: Sequence[int]) -> Iterator[Index]:
    if len(bounds) < _FEW:
        for members in _members(keys, bounds):
            yield np.flatnonzero(members)
    else:
        yield np.argsort(_numbers(keys, bounds), kind="stable")


def _members(keys: Keys, bounds: Sequence[int]) -> Iterator[npt.NDArray[np.bool_]]:
    """For each group, which elements are in it."""
    for least, bound in pairwise([None, *bounds, None]):
        if least is None:
            yield np.ones(keys.size, np.bool_) if bound is None else np.less(keys, bound)
        elif bound is None:
            yield np.greater_equal(keys, least)
        elif bound == least + 1:
            yield np.equal(keys, least)
        else:
            yield np.greater_equal(keys, least) & np.less(keys, bound)


def _numbers(keys: Keys, bounds: Sequence[int]) -> Keys:
    """Numbers in the order of the groups, the same within each; valid until this is called again.

    Bounds by exponent mostly end in a row of neighbours: there the key itself will do.
    """
    bounds = [bound for bound in bounds if bound <= np.iinfo(keys.dtype).max]
    if not bounds:
        return np.zeros_like(keys)
    row = len(bounds) - 1
    while row > 0 and bounds[row - 1] == bounds[row] - 1:
        row -= 1
    numbers: Keys = np.clip(keys, bounds[row] - 1, bounds[-1], out=scratch("group numbers", keys.dtype, keys.size))
    below = scratch("group below", np.bool_, keys.size)
    for bound in bounds[:row]:
        np.less(keys, bound, out=below)
        np.subtract(numbers, below.view(np.uint8), out=numbers)
    return numbers


def margin_bits(accumulator: np.dtype[Any], dtype: Dtype) -> int:
    """How many bits rounding takes away; the margin is read from them. None are left where it is not positive."""
    return _MANTISSA_BITS[accumulator.itemsize] - dtype.mantissa_bits


def margins(values: Wide, dtype: Dtype) -> tuple[Keys, Up]:
    """How far each value is from where rounding (to a normal number) changes over, and whether a miss is likely above.

    Args:
        values: `[m]`, the prediction before it is rounded to `dtype`.

    Returns:
        `(keys, up)`, both `[m]`, valid until this is called again.
    """
    wide = DTYPES[f"F{8 * values.itemsize}"]
    half = 1 << (margin_bits(values.dtype, dtype) - 1)
    border = scratch("group border", wide.bits, values.size)
    np.bitwise_and(values.view(wide.bits), wide.bits.type((1 << 8 * wide.width) - 2 * half), out=border)
    np.bitwise_or(border, wide.bits.type(half), out=border)
    distance = border.view(wide.values)
    with np.errstate(invalid="ignore"):  # an infinity has a border that is no number
        np.subtract(values, distance, out=distance)
        up: Up = np.less(distance, 0, out=scratch("group up", np.bool_, values.size))
    return exponents(border, wide), up


def _wrong(pointer: str, expected: str, found: object) -> MalformedError:
    return MalformedError("wrong content", where=pointer, expected=expected, found=found, reason="schema")
