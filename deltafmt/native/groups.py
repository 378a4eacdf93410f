"""Groups of elements, by exponent or by margin, and their residuals (groups.c, bounds.c, product.c)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..dtypes import Bits
from .library import Bools, Counts, Floats, Numbers, call, require

_GROUPS, _KINDS = 256, 132  # as in groups.c
_EXPONENTS = 1 << 11  # of F64; other floats have fewer


class Bounds:
    """What keys are compared with: the number of a group is how many bounds are at most the key.

    Args:
        bounds: ascending, up to 255 of them, from 1 to 2047.
    """

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = np.array(bounds, np.uint16)
        self.table = np.searchsorted(self.bounds, np.arange(_EXPONENTS), side="right").astype(np.uint8)
        require(self.bounds.size < _GROUPS)

    @property
    def told(self) -> tuple[Any, int, Numbers]:
        """What kernels are told of it."""
        return self.bounds, self.bounds.size, self.table


def exponent_groups(bits: Bits, mantissa_bits: int, mask: int, groups: Bounds, out: Numbers) -> None:
    """The group of each float by its exponent, `[m]`: bits `mask`, moved down by `mantissa_bits`."""
    _check_exponents(bits, mantissa_bits, mask)
    require(bits.size == out.size)
    require(out.itemsize == 1)
    call(f"exponent_groups_{bits.itemsize}", bits, bits.size, mantissa_bits, mask, *groups.told, out)


def kinds_by_exponent(predicted: Bits, bits: Bits, mantissa_bits: int, mask: int, step: int) -> Counts:
    """`methods.grouping.kinds_by_exponent` of bits of two bytes or more: `[mask + 1, 132]`."""
    require((predicted.size, predicted.itemsize) == (bits.size, bits.itemsize) and step > 0)
    _check_exponents(bits, mantissa_bits, mask)
    counts = np.zeros((mask + 1, _KINDS), np.int64)
    call(f"kinds_by_exponent_{bits.itemsize}", bits, predicted, bits.size, step, mantissa_bits, mask, counts)
    return counts


def cheapest_begins(sums: Counts, weighted: Counts, learnt: int, elements: int, group: int) -> list[int]:
    """`methods.grouping._cheapest_begins`, which says what these are; `sums` ascend."""
    require(sums.ndim == 2 and len(sums) > 0 and sums.dtype == weighted.dtype == np.int64)
    require(bool((sums[0] >= 0).all() and (sums[1:] >= sums[:-1]).all()) and int(sums[-1].sum()) < weighted.size)
    least, before = np.empty((2, len(sums)), np.int64)
    call("cheapest_begins", sums, len(sums) - 1, sums.shape[1], weighted, learnt, elements, group, least, before)
    return [int(place) for place in before]


def margin_groups(values: Floats, taken: int, groups: Bounds, out: Numbers, up: Bools) -> None:
    """The group of each float by its distance to where rounding changes over, and whether that lies above; all `[m]`.

    Args:
        values: float32 or float64.
        taken: how many bits rounding takes away, from 1.
    """
    require(values.size == out.size == up.size and 1 <= taken < 8 * values.itemsize)
    require(out.itemsize == up.itemsize == 1)
    require(out.flags.writeable)
    call(f"margin_groups_{values.itemsize}", values, values.size, taken, *groups.told, out, up)


def to_groups(bits: Bits, predicted: Bits, up: Bools | None, numbers: Numbers, chunk: int, out: Bits) -> Counts:
    """Residuals in order of groups: `operators.patch.difference`, sorted by the number in chunks of so many elements;
    all `[m]`.

    Returns:
        How many elements each of 256 groups has in each chunk: `[chunks, 256]`.
    """
    _check_groups(bits, predicted, up, numbers)
    require((out.size, out.itemsize) == (bits.size, bits.itemsize) and chunk > 0)
    lengths = np.empty((-(-bits.size // chunk), _GROUPS), np.int64)
    call(f"to_groups_{bits.itemsize}", bits, predicted, up, numbers, bits.size, chunk, lengths, out)
    return lengths


def from_groups(grouped: Bits, up: Bools | None, numbers: Numbers, groups: int, chunk: int, predicted: Bits) -> None:
    """Undo `to_groups`, of numbers below `groups`, in chunks of so many elements, in place of the prediction."""
    _check_groups(grouped, predicted, up, numbers)
    require(chunk > 0 and 0 < groups <= _GROUPS)
    chunk = min(chunk, max(grouped.size, 1))
    call(f"from_groups_{grouped.itemsize}", grouped, up, numbers, grouped.size, chunk, groups, predicted)


def from_exponent_groups(
    grouped: Bits, mantissa_bits: int, mask: int, groups: Bounds, chunk: int, numbers: Numbers, predicted: Bits
) -> None:
    """`exponent_groups` of a prediction and `from_groups` in its place, chunk by chunk: `numbers` is room for one."""
    _check_exponents(predicted, mantissa_bits, mask)
    require((grouped.size, grouped.itemsize) == (predicted.size, predicted.itemsize) and chunk > 0)
    chunk = min(chunk, max(grouped.size, 1))
    require(numbers.itemsize == 1 and numbers.flags.writeable and numbers.size >= min(chunk, grouped.size))
    arguments = grouped, grouped.size, chunk, mantissa_bits, mask, *groups.told, numbers, predicted
    call(f"from_exponent_groups_{grouped.itemsize}", *arguments)


def _check_exponents(bits: Bits, mantissa_bits: int, mask: int) -> None:
    require(0 <= mask < _EXPONENTS and 0 <= mantissa_bits < 8 * bits.itemsize)


def _check_groups(first: Bits, second: Bits, up: Bools | None, numbers: Numbers) -> None:
    require(first.size == second.size == numbers.size)
    require(first.itemsize == second.itemsize)
    require(numbers.itemsize == 1)
    require(up is None or (up.size, up.itemsize) == (first.size, 1))
