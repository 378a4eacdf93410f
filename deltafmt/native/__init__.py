"""Compiled kernels for what Python and numpy cannot do in one pass. Whoever has none gets the same bytes, more slowly.

The library is built with the package where a C compiler is at hand (hatch_build.py), and lies beside this file. It does
not depend on the version of Python. Calls into it let other threads run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..dtypes import Bits
from ..scratch import aligned

Float32 = npt.NDArray[np.float32]
Floats = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]
Problem = Literal["bits left over", "too large"]

FILE = Path(__file__).with_name("libkernels.so.1")
TILE_ROWS, TILE_COLUMNS = 4, 48  # as in product.c, and that the even columns have a panel and the odd ones
_ABI = 6  # as in native.h: another one is what an older build left behind
_GROUPS, _KINDS = 256, 132  # as in groups.c
_ANSWERING = ("keys_differ", "merge_segments")  # the rest return nothing
_PROBLEMS: tuple[Problem | None, ...] = (None, "bits left over", "too large")  # as in segments.c
_POINTER, _COUNT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES: dict[str, Sequence[Any]] = {
    "keys_differ": (_POINTER, _COUNT),
    "pack_a": (_POINTER, *[_COUNT] * 2, _POINTER),
    "pack_b": (_POINTER, *[_COUNT] * 2, _POINTER),
    "set_product": (_POINTER, *[_COUNT] * 4, _POINTER, _POINTER),
    "add_product": (_POINTER, *[_COUNT] * 4, _POINTER, _POINTER),
    "add_product_in_bf16": (_POINTER, *[_COUNT] * 4, _POINTER, _POINTER),
    "add_product_onto_bf16": (_POINTER, _POINTER, *[_COUNT] * 4, _POINTER, _POINTER),
    "widen_bf16": (_POINTER, _COUNT, _POINTER),
    "round_bf16": (_POINTER, _COUNT, _POINTER),
    "add_product_with_margins": (_POINTER, *[_COUNT] * 4, *[_POINTER] * 3, _COUNT, *[_POINTER] * 3),
    "cheapest_begins": (_POINTER, *[_COUNT] * 2, _POINTER, *[_COUNT] * 3, *[_POINTER] * 2),
    "margin_groups_4": (_POINTER, _COUNT, _INT, _POINTER, _COUNT, *[_POINTER] * 3),
    "margin_groups_8": (_POINTER, _COUNT, _INT, _POINTER, _COUNT, *[_POINTER] * 3),
}
for _width in (2, 4):
    _SIGNATURES[f"move_by_steps_{_width}"] = (*[_POINTER] * 3, _INT, _INT, _COUNT, _POINTER)
for _width in (2, 4, 8):
    _SIGNATURES |= {
        f"exponent_groups_{_width}": (_POINTER, _COUNT, _INT, _INT, _POINTER, _COUNT, *[_POINTER] * 2),
        f"kinds_by_exponent_{_width}": (*[_POINTER] * 2, *[_COUNT] * 2, _INT, _INT, _POINTER),
        f"to_groups_{_width}": (*[_POINTER] * 4, _COUNT, _COUNT, _POINTER, _POINTER),
        f"from_groups_{_width}": (*[_POINTER] * 3, _COUNT, _COUNT, _INT, _POINTER),
        f"split_planes_{_width}": (_POINTER, _COUNT, _INT, _POINTER),
        f"merge_planes_{_width}": (_POINTER, _COUNT, _INT, _POINTER),
    }
for _width in (1, 2, 4, 8):
    _SIGNATURES |= {
        f"segment_longest_{_width}": (_POINTER, _POINTER, _COUNT, _POINTER),
        f"split_segments_{_width}": (*[_POINTER] * 4, _COUNT, _POINTER),
        f"merge_segments_{_width}": (*[_POINTER] * 4, _COUNT, _POINTER),
    }


def _load() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(FILE))
        library.deltafmt_abi.restype = _INT
        if library.deltafmt_abi() != _ABI:
            return None
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, _INT if name.startswith(_ANSWERING) else None
    except (OSError, AttributeError):
        return None
    return library


LIBRARY = _load()


def available() -> bool:
    """Whether there are kernels to call; if not, of the functions below only `keys_differ` may be called."""
    return LIBRARY is not None


# Keys


def keys_differ(text: bytes) -> bool:
    """Whether in `text`, if it is JSON, no object has a key twice.

    False as well where that is not told so easily: many keys that are not in rising order, white space, escapes, deep
    nesting.
    """
    return bool(LIBRARY is not None and LIBRARY.keys_differ(text, len(text)))


# Products


def panels_of_a(factor: Float32) -> Float32:
    """A factor `[r, n]` as `[n / TILE_COLUMNS, 2, r, TILE_COLUMNS / 2]`, even and odd columns, padded with zeros."""
    return _panels("pack_a", factor, TILE_COLUMNS, 2)


def panels_of_b(factor: Float32) -> Float32:
    """A factor `[r, m]` as `[m / TILE_ROWS, 1, r, TILE_ROWS]`, padded with zeros."""
    return _panels("pack_b", factor, TILE_ROWS, 1)


def _panels(kernel: str, factor: Float32, columns: int, apart: int) -> Float32:
    rank, count = factor.shape
    _require(factor.dtype == np.float32)
    groups = -(-count // columns)
    packed = aligned(np.float32, groups * rank * columns).reshape(groups, apart, rank, columns // apart)
    _call(kernel, factor, rank, count, packed)
    return packed


def component(panels: Float32, k: int) -> Float32:
    """Row `k` of a factor that is in panels, with the zeros behind it."""
    return panels[:, :, k].swapaxes(1, 2).reshape(-1)


def product(into: Float32, top: int, a: Float32, b: Float32, first: bool) -> None:
    """`into += B^T A` for some rows (or `=`, if `first`): each sum is formed by itself, then added.

    Args:
        into: `[m, n]`, row `top` of the product and those below it.
        a: `panels_of_a(A)`, b: `panels_of_b(B)`.
    """
    _check_product(into, 4, top, a, b)
    rows, columns = into.shape
    _call("set_product" if first else "add_product", into, top, top + rows, columns, a.shape[2], a, b)


def product_in_bf16(bits: Bits, top: int, a: Float32, b: Float32) -> None:
    """Add `product` to bf16 values, `[m, n]`, widened before and rounded behind it; a NaN has no sign."""
    _check_product(bits, 2, top, a, b)
    rows, columns = bits.shape
    _call("add_product_in_bf16", bits, top, top + rows, columns, a.shape[2], a, b)


def product_onto_bf16(bits: Bits, into: Float32, top: int, a: Float32, b: Float32) -> None:
    """`product` onto bf16 values, `[m, n]`, widened: the sum in `into`."""
    _check_product(into, 4, top, a, b)
    _require((bits.shape, bits.itemsize) == (into.shape, 2))
    rows, columns = into.shape
    _call("add_product_onto_bf16", bits, into, top, top + rows, columns, a.shape[2], a, b)


def _check_product(into: npt.NDArray[Any], width: int, top: int, a: Float32, b: Float32) -> None:
    rows, columns = into.shape
    _require(into.dtype == (np.float32 if width == 4 else np.uint16) and into.flags.writeable)
    _require(a.dtype == b.dtype == np.float32)
    _require(a.shape == (-(-columns // TILE_COLUMNS), 2, a.shape[2], TILE_COLUMNS // 2))
    _require(b.shape[1:] == (1, a.shape[2], TILE_ROWS) and a.shape[2] > 0)
    _require(0 <= top <= top + rows <= TILE_ROWS * len(b))


# Conversions


def widen_bf16(bits: Bits, out: Float32) -> None:
    """bf16 to float32, `[m]`."""
    _require(bits.size == out.size)
    _require((bits.itemsize, out.itemsize) == (2, 4))
    _call("widen_bf16", bits, bits.size, out)


def round_bf16(values: Float32, out: Bits) -> None:
    """float32 to bf16, `[m]`: to nearest, ties to even; a NaN has no sign."""
    _require(values.size == out.size)
    _require((values.itemsize, out.itemsize) == (4, 2))
    _call("round_bf16", values, values.size, out)


# Groups


class Bounds:
    """What keys are compared with: the number of a group is how many bounds are at most the key.

    Args:
        bounds: ascending, up to 255 of them, from 1 to 2047.
    """

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = np.array(bounds, np.uint16)
        self.table = np.searchsorted(self.bounds, np.arange(1 << 11), side="right").astype(np.uint8)
        _require(self.bounds.size < _GROUPS)


def exponent_groups(bits: Bits, mantissa_bits: int, mask: int, groups: Bounds, out: Numbers) -> None:
    """The group of each float by its exponent, `[m]`: bits `mask`, moved down by `mantissa_bits`."""
    _require(mask < groups.table.size and 0 <= mantissa_bits < 8 * bits.itemsize)
    _require(bits.size == out.size)
    _require(out.itemsize == 1)
    known = groups.bounds, groups.bounds.size, groups.table
    _call(f"exponent_groups_{bits.itemsize}", bits, bits.size, mantissa_bits, mask, *known, out)


def kinds_by_exponent(predicted: Bits, bits: Bits, mantissa_bits: int, mask: int, step: int) -> Counts:
    """`methods.grouping.kinds_by_exponent` of bits of two bytes or more: `[mask + 1, 132]`."""
    _require((predicted.size, predicted.itemsize) == (bits.size, bits.itemsize) and step > 0)
    _require(0 <= mask < 1 << 11 and 0 <= mantissa_bits < 8 * bits.itemsize)
    counts = np.zeros((mask + 1, _KINDS), np.int64)
    _call(f"kinds_by_exponent_{bits.itemsize}", bits, predicted, bits.size, step, mantissa_bits, mask, counts)
    return counts


def cheapest_begins(sums: Counts, weighted: Counts, learnt: int, elements: int, group: int) -> list[int]:
    """`methods.grouping._cheapest_begins`, which says what these are; `sums` ascend."""
    _require(sums.ndim == 2 and len(sums) > 0 and sums.dtype == weighted.dtype == np.int64)
    _require(bool((sums[0] >= 0).all() and (sums[1:] >= sums[:-1]).all()) and int(sums[-1].sum()) < weighted.size)
    least, before = np.empty((2, len(sums)), np.int64)
    _call("cheapest_begins", sums, len(sums) - 1, sums.shape[1], weighted, learnt, elements, group, least, before)
    return [int(place) for place in before]


def margin_groups(values: Floats, taken: int, groups: Bounds, out: Numbers, up: Bools) -> None:
    """The group of each float by its distance to where rounding changes over, and whether that lies above; all `[m]`.

    Args:
        values: float32 or float64.
        taken: how many bits rounding takes away, from 1.
    """
    _require(values.size == out.size == up.size and 1 <= taken < 8 * values.itemsize)
    _require(out.itemsize == up.itemsize == 1)
    known = groups.bounds, groups.bounds.size, groups.table
    _call(f"margin_groups_{values.itemsize}", values, values.size, taken, *known, out, up)


def product_with_margins(bits: Bits, top: int, a: Float32, b: Float32, groups: Bounds, out: Numbers, up: Bools) -> None:
    """`product_in_bf16` and `margin_groups` of what is rounded in it, in one pass; all `[m, n]` or `[m * n]`."""
    _check_product(bits, 2, top, a, b)
    _require(bits.size == out.size == up.size)
    _require(out.itemsize == up.itemsize == 1)
    rows, columns = bits.shape
    known = groups.bounds, groups.bounds.size, groups.table
    _call("add_product_with_margins", bits, top, top + rows, columns, a.shape[2], a, b, *known, out, up)


def to_groups(bits: Bits, predicted: Bits, up: Bools | None, numbers: Numbers, chunk: int, out: Bits) -> Counts:
    """Residuals in order of groups: `operators.patch.difference`, sorted by the number in chunks of so many elements;
    all `[m]`.

    Returns:
        How many elements each of 256 groups has in each chunk: `[chunks, 256]`.
    """
    _check_groups(bits, predicted, up, numbers)
    _require((out.size, out.itemsize) == (bits.size, bits.itemsize) and chunk > 0)
    lengths = np.empty((-(-bits.size // chunk), _GROUPS), np.int64)
    _call(f"to_groups_{bits.itemsize}", bits, predicted, up, numbers, bits.size, chunk, lengths, out)
    return lengths


def from_groups(grouped: Bits, up: Bools | None, numbers: Numbers, groups: int, chunk: int, predicted: Bits) -> None:
    """Undo `to_groups`, of numbers below `groups`, in chunks of so many elements, in place of the prediction."""
    _check_groups(grouped, predicted, up, numbers)
    _require(chunk > 0)
    _call(f"from_groups_{grouped.itemsize}", grouped, up, numbers, grouped.size, chunk, groups, predicted)


def _check_groups(first: Bits, second: Bits, up: Bools | None, numbers: Numbers) -> None:
    _require(first.size == second.size == numbers.size)
    _require(first.itemsize == second.itemsize)
    _require(numbers.itemsize == 1)
    _require(up is None or (up.size, up.itemsize) == (first.size, 1))


# Steps


class Steps:
    """By how many last places elements move: by `steps[i]` if their mantissa is not below `i` of the bounds.

    Args:
        bounds: ascending.
        steps: one more than these.
    """

    def __init__(self, bounds: Words, steps: Words, mantissa_bits: int) -> None:
        _require(
            bounds.dtype == steps.dtype == np.uint32 and bounds.size + 1 == steps.size and 7 <= mantissa_bits <= 23
        )
        _require(bool((bounds[:-1] <= bounds[1:]).all()))
        self.bounds, self.steps, self.mantissa_bits = bounds, steps, mantissa_bits
        self.shift = max(mantissa_bits - 12, 0)
        places = np.arange((1 << (mantissa_bits - self.shift)) + 1, dtype=np.uint32) << self.shift
        self.first = np.searchsorted(bounds, places, side="right").astype(np.uint32)


def move_by_steps(steps: Steps, bits: Bits) -> None:
    """Move floats of two bytes or four, `[m]`, in place, but for zeros, subnormals and what is not finite."""
    _require(steps.mantissa_bits < 8 * bits.itemsize - 1)
    known = steps.bounds, steps.steps, steps.first, steps.shift, steps.mantissa_bits
    _call(f"move_by_steps_{bits.itemsize}", *known, bits.size, bits)


# Encodings


def split_planes(bits: Bits, floats: bool, out: Sequence[Numbers]) -> None:
    """Elements `[m]` of two bytes or more to planes: `encodings.planes.split`. The planes lie one behind the other."""
    begin = _address(out[0])
    _require([_address(plane) for plane in out] == [begin + index * bits.size for index in range(bits.itemsize)])
    _require(all((plane.size, plane.itemsize) == (bits.size, 1) for plane in out))
    _call(f"split_planes_{bits.itemsize}", bits, bits.size, floats, out[0])


def merge_planes(planes: Sequence[Numbers], floats: bool, out: Bits) -> None:
    """Undo `split_planes`, wherever the planes lie."""
    _require(len(planes) == out.itemsize)
    _require(all((plane.size, plane.itemsize) == (out.size, 1) for plane in planes))
    _call(f"merge_planes_{out.itemsize}", _addresses(planes), out.size, floats, out)


def segment_longest(values: Bits, elements: Sequence[int]) -> list[int]:
    """Of each segment a number as many bits long as its largest element."""
    _require(sum(elements) == values.size)
    longest = np.empty(len(elements), np.uint64)
    _call(f"segment_longest_{values.itemsize}", values, np.array(elements, np.int64), len(elements), longest)
    return [int(most) for most in longest]


def split_segments(
    values: Bits, elements: Sequence[int], low_bits: Sequence[int], planes: Sequence[int], out: Numbers
) -> None:
    """The planes of all segments, one behind the other: `encodings.segments`."""
    _require(sum(elements) == values.size)
    columns = _columns(elements, low_bits, planes, values.itemsize)
    needed = (
        -(-count * bits // 8) + count * (number - 1)
        for count, bits, number in zip(elements, low_bits, planes, strict=True)
        if number
    )
    _require(out.size >= sum(needed))
    _call(f"split_segments_{values.itemsize}", values, *columns, len(elements), out)


def merge_segments(
    data: Sequence[Numbers], elements: Sequence[int], low_bits: Sequence[int], planes: Sequence[int], out: Bits
) -> Problem | None:
    """Undo `split_segments`, wherever the planes lie; or say what is wrong with them."""
    _require(sum(elements) == out.size)
    sizes = [
        count if plane else -(-count * bits // 8)
        for count, bits, number in zip(elements, low_bits, planes, strict=True)
        for plane in range(number)
    ]
    _require([plane.nbytes for plane in data] == sizes)
    columns = _columns(elements, low_bits, planes, out.itemsize)
    problem = _call(f"merge_segments_{out.itemsize}", _addresses(data), *columns, len(elements), out)
    return _PROBLEMS[int(problem)]


def _columns(elements: Sequence[int], low_bits: Sequence[int], planes: Sequence[int], width: int) -> Counts:
    """What is known of segments of elements of `width` bytes."""
    _require({1, 2, 4, 8}.issuperset(low_bits) and max(planes, default=0) <= width + 1)
    _require(min(elements, default=0) >= 0 and min(planes, default=0) >= 0)
    return np.array([elements, low_bits, planes], np.int64)


def _require(condition: bool) -> None:
    """What C is told about its arguments has to be true, with `python -O` too."""
    if not condition:
        raise ValueError("a kernel was given arrays that do not fit together")


def _addresses(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.uintp]:
    """Where each begins: a list of pointers, to be used while they are there."""
    _require(all(array.flags.c_contiguous for array in arrays))
    return np.array([_address(array) for array in arrays], np.uintp)


def _address(array: npt.NDArray[Any]) -> int:
    """Where it begins. `array.ctypes.data` says so too, and takes three times as long."""
    if array.size and array.flags.writeable:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    return int(array.ctypes.data)


def _call(name: str, *arguments: npt.NDArray[Any] | int | None) -> Any:
    """Call a kernel; of arrays it gets the address. They have to be what it is told about them; the last is written."""
    passed: list[int | None] = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            flags = argument.flags
            _require(flags.c_contiguous and flags.aligned)
            passed.append(_address(argument))
        else:
            passed.append(argument)
    _require(flags.writeable)
    return getattr(LIBRARY, name)(*passed)
