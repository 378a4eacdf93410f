"""Elements to planes and back (planes.c, segments.c)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..dtypes import Bits
from .library import Counts, Numbers, addresses, call, require

Problem = Literal["bits left over", "too large"]
_PROBLEMS: tuple[Problem | None, ...] = (None, "bits left over", "too large")  # as in segments.c


def split_planes(bits: Bits, floats: bool, out: Sequence[Numbers]) -> None:
    """Elements `[m]` of two bytes or more to planes: `encodings.planes.split`. The planes lie one behind the other."""
    begins = addresses(out).tolist()
    require(begins == [begins[0] + index * bits.size for index in range(bits.itemsize)])
    require(all((plane.size, plane.itemsize) == (bits.size, 1) for plane in out))
    call(f"split_planes_{bits.itemsize}", bits, bits.size, floats, out[0])


def merge_planes(planes: Sequence[Numbers], floats: bool, out: Bits) -> None:
    """Undo `split_planes`, wherever the planes lie."""
    require(len(planes) == out.itemsize)
    require(all((plane.size, plane.itemsize) == (out.size, 1) for plane in planes))
    call(f"merge_planes_{out.itemsize}", addresses(planes), out.size, floats, out)


def segment_longest(values: Bits, elements: Sequence[int]) -> list[int]:
    """Of each segment a number as many bits long as its largest element."""
    require(sum(elements) == values.size)
    longest = np.empty(len(elements), np.uint64)
    call(f"segment_longest_{values.itemsize}", values, np.array(elements, np.int64), len(elements), longest)
    return [int(most) for most in longest]


def split_segments(
    values: Bits, elements: Sequence[int], low_bits: Sequence[int], planes: Sequence[int], out: Numbers
) -> None:
    """The planes of all segments, one behind the other: `encodings.segments`."""
    require(sum(elements) == values.size)
    columns = _columns(elements, low_bits, planes, values.itemsize)
    needed = (
        -(-count * bits // 8) + count * (number - 1)
        for count, bits, number in zip(elements, low_bits, planes, strict=True)
        if number
    )
    require(out.size >= sum(needed))
    call(f"split_segments_{values.itemsize}", values, *columns, len(elements), out)


def merge_segments(
    data: Sequence[Numbers], elements: Sequence[int], low_bits: Sequence[int], planes: Sequence[int], out: Bits
) -> Problem | None:
    """Undo `split_segments`, wherever the planes lie; or say what is wrong with them."""
    require(sum(elements) == out.size)
    sizes = [
        count if plane else -(-count * bits // 8)
        for count, bits, number in zip(elements, low_bits, planes, strict=True)
        for plane in range(number)
    ]
    require([plane.nbytes for plane in data] == sizes)
    columns = _columns(elements, low_bits, planes, out.itemsize)
    problem = call(f"merge_segments_{out.itemsize}", addresses(data), *columns, len(elements), out)
    return _PROBLEMS[int(problem)]


def _columns(elements: Sequence[int], low_bits: Sequence[int], planes: Sequence[int], width: int) -> Counts:
    """What is known of segments of elements of `width` bytes."""
    require({1, 2, 4, 8}.issuperset(low_bits) and max(planes, default=0) <= width + 1)
    require(min(elements, default=0) >= 0 and min(planes, default=0) >= 0)
    return np.array([elements, low_bits, planes], np.int64)
