"""Filters: the elements of a chunk <-> byte planes (spec/encodings/planes.md, float-planes.md).

The kernels do it in one pass. Without them, split halves the width again and again (8 -> 4 -> 2 -> 1 bytes), merge
doubles it: widening and narrowing is vectorised by numpy, strided byte copies are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .. import native
from ..dtypes import Bits
from ..scratch import scratch

Plane = npt.NDArray[np.uint8]

_FEW_ELEMENTS = 1024  # elements: to call a kernel takes longer than to merge so few


def split(bits: Bits, floats: bool, out: Sequence[Plane]) -> None:
    """Split `m` elements of width `w` into planes, most significant byte first.

    Args:
        bits: `[m]`, uint8/16/32/64.
        floats: keep the exponent in one plane, the sign beside the mantissa (`float-planes`).
        out: `w` planes of `[m]`.
    """
    if bits.itemsize == 1:
        np.copyto(out[0], bits)
    elif native.available():
        native.split_planes(bits, floats, out)
    elif bits.itemsize == 2 and floats:
        _split_float(bits, out[0], out[1])
    else:
        half = bits.itemsize // 2
        high, low = _halves(bits)
        split(high, floats, out[:half])
        split(low, False, out[half:])


def merge(planes: Sequence[Plane], floats: bool, out: Bits) -> None:
    """Undo `split`: `w` planes of `[m]` into `out`, `[m]` elements of width `w`."""
    half = out.itemsize // 2
    if half == 0:
        np.copyto(out, planes[0])
    elif native.available() and out.size > _FEW_ELEMENTS:
        native.merge_planes(planes, floats, out)
    elif half == 1 and floats:
        _merge_float(planes[0], planes[1], out)
    elif half == 1:
        _join(planes[0], planes[1], out)
    else:
        high = scratch(f"merge high {half}", f"u{half}", out.size)
        low = scratch(f"merge low {half}", f"u{half}", out.size)
        merge(planes[:half], floats, high)
        merge(planes[half:], False, low)
        _join(high, low, out)


def _halves(bits: Bits) -> tuple[Bits, Bits]:
    half = bits.itemsize // 2
    shifted = scratch(f"split shifted {half}", bits.dtype, bits.size)
    high = scratch(f"split high {half}", f"u{half}", bits.size)
    low = scratch(f"split low {half}", f"u{half}", bits.size)
    np.right_shift(bits, 8 * half, out=shifted)
    np.copyto(high, shifted, casting="unsafe")
    np.copyto(low, bits, casting="unsafe")
    return high, low


def _join(high: Bits, low: Bits, out: Bits) -> None:
    np.multiply(high, out.dtype.type(1 << (8 * high.itemsize)), out=out, dtype=out.dtype)
    wide = scratch(f"join {out.itemsize}", out.dtype, out.size)
    np.copyto(wide, low)
    np.bitwise_or(out, wide, out=out)


def _split_float(bits: Bits, exponent: Plane, rest: Plane) -> None:
    shifted = scratch("split float", bits.dtype, bits.size)
    np.right_shift(bits, 7, out=shifted)
    np.copyto(exponent, shifted, casting="unsafe")
    sign = scratch("split sign", np.uint8, bits.size)
    np.right_shift(bits, 8, out=shifted)
    np.copyto(sign, shifted, casting="unsafe")
    np.bitwise_and(sign, 0x80, out=sign)
    np.copyto(rest, bits, casting="unsafe")
    np.bitwise_and(rest, 0x7F, out=rest)
    np.bitwise_or(rest, sign, out=rest)


def _merge_float(exponent: Plane, rest: Plane, out: Bits) -> None:
    sign_and_rest = scratch("merge float", out.dtype, out.size)
    np.copyto(sign_and_rest.view(np.int16), rest.view(np.int8))  # extends the sign through bits 15 to 7
    np.bitwise_and(sign_and_rest, 0x807F, out=sign_and_rest)
    np.multiply(exponent, np.uint16(1 << 7), out=out, dtype=np.uint16)
    np.bitwise_or(out, sign_and_rest, out=out)
