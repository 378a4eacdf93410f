"""Groups of `patch`: elements whose residuals are alike, known from the prediction (spec/operators/patch.md)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import native
from ..dtypes import DTYPES, Bits, Dtype
from ..errors import MalformedError
from ..gemm import OntoBf16
from ..scratch import scratch
from ..strictjson import Fields
from .base import Wide

KINDS = ("exponent", "margin")
MOST_BOUNDS = 255
LARGEST_BOUND = 2047
_MANTISSA_BITS = {4: 23, 8: 52}  # of float32 and float64
_EXPONENT_BITS = {"F64": 11, "F16": 5}  # of the others 8

Keys = npt.NDArray[Any]  # uint8 or uint16
Numbers = npt.NDArray[np.uint8]
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

    def of_exponents(self, bits: Bits, dtype: Dtype) -> Grouping:
        """By the exponents of a prediction, `[m]`; valid until another grouping is asked for."""
        numbers = scratch("group numbers", np.uint8, bits.size)
        if native.available():
            native.exponent_groups(bits, dtype.mantissa_bits, exponent_mask(dtype), self._bounds, numbers)
        else:
            np.take(self._bounds.table, exponents(bits, dtype), out=numbers, mode="clip")
        return Grouping(numbers, None)

    def correct_by_exponents(self, residual: Bits, chunk: int, dtype: Dtype, out: Bits) -> None:
        """By a kernel: correct the predicted bits in `out`, `[m]`, of which the exponents are the groups."""
        numbers = scratch("group numbers", np.uint8, min(chunk, out.size))
        mask = exponent_mask(dtype)
        native.from_exponent_groups(residual, dtype.mantissa_bits, mask, self._bounds, chunk, numbers, out)

    def of_margins(self, values: Wide, dtype: Dtype) -> Grouping:
        """By the margins of a prediction before it is rounded to `dtype`, `[m]`; valid as `of_exponents` is."""
        numbers = scratch("group numbers", np.uint8, values.size)
        if native.available():
            up: Up = scratch("group up", np.bool_, values.size)
            native.margin_groups(values, margin_bits(values.dtype, dtype), self._bounds, numbers, up)
        else:
            keys, up = margins(values, dtype)
            np.take(self._bounds.table, keys, out=numbers, mode="clip")
        return Grouping(numbers, up)

    def of_product(self, product: OntoBf16, bits: Bits) -> Grouping:
        """Add a product to bf16 values, `[m]`, in place, and group the sums by margin before they are rounded."""
        numbers = scratch("group numbers", np.uint8, bits.size)
        up: Up = scratch("group up", np.bool_, bits.size)
        product.add_with_margins(bits, self._bounds, numbers, up)
        return Grouping(numbers, up)

    @cached_property
    def _bounds(self) -> native.Bounds:
        return native.Bounds(self.bounds)


class Grouping(NamedTuple):
    """The group of each element, `[m]`, and, by margin, whether a miss lies on the greater side."""

    numbers: Numbers
    up: Up | None


def exponent_mask(dtype: Dtype) -> int:
    """Of the exponent field, once it is at the bottom."""
    return (1 << _EXPONENT_BITS.get(dtype.name, 8)) - 1


def exponents(bits: Bits, dtype: Dtype) -> Keys:
    """The exponent field of each element, `[m]`; valid until this is called again."""
    field = scratch("group exponents", bits.dtype, bits.size)
    np.right_shift(bits, dtype.mantissa_bits, out=field)
    keys: Keys = scratch("group keys", np.uint16 if dtype.name == "F64" else np.uint8, bits.size)
    np.copyto(keys, field, casting="unsafe")
    if exponent_bits := _EXPONENT_BITS.get(dtype.name):  # of the others, the sign is gone already
        np.bitwise_and(keys, (1 << exponent_bits) - 1, out=keys)
    return keys


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
