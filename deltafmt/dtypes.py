"""The dtypes of safetensors, and the few facts about each that the codec needs.

Inside the codec an element is always an unsigned integer of its width, little-endian: bits are moved, not numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .errors import UnsupportedError

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("deltafmt reads and writes little-endian data and runs on little-endian machines only")

Shape: TypeAlias = tuple[int, ...]
Bits: TypeAlias = npt.NDArray[Any]  # elements as uint8/16/32/64, flat

SILENT: dict[str, Any] = {"over": "ignore", "under": "ignore", "invalid": "ignore"}
"""For `numpy.errstate`, where infinities and NaN are values like others."""


@dataclass(frozen=True)
class Dtype:
    """One dtype: its safetensors name, width in bytes, and the numpy type that shows its values."""

    name: str
    width: int
    values: np.dtype[Any]
    is_float: bool = False  # F64, F32, F16, BF16: can be rounded to, summed, factorised
    is_ordered_float: bool = False  # any float with a sign bit on top: `patch` orders its bit patterns
    mantissa_bits: int = 0

    @property
    def bits(self) -> np.dtype[Any]:
        """The unsigned integer type of the same width."""
        return np.dtype(f"u{self.width}")

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of an array of this dtype; exact in unbounded integers."""
        return prod(shape) * self.width


def _table() -> dict[str, Dtype]:
    rows = [
        Dtype("F64", 8, np.dtype("f8"), True, True, 52),
        Dtype("F32", 4, np.dtype("f4"), True, True, 23),
        Dtype("F16", 2, np.dtype("f2"), True, True, 10),
        Dtype("BF16", 2, np.dtype(ml_dtypes.bfloat16), True, True, 7),
        Dtype("F8_E5M2", 1, np.dtype(ml_dtypes.float8_e5m2), False, True),
        Dtype("F8_E4M3", 1, np.dtype(ml_dtypes.float8_e4m3fn), False, True),
        Dtype("F8_E5M2FNUZ", 1, np.dtype(ml_dtypes.float8_e5m2fnuz), False, True),
        Dtype("F8_E4M3FNUZ", 1, np.dtype(ml_dtypes.float8_e4m3fnuz), False, True),
        Dtype("F8_E8M0", 1, np.dtype(ml_dtypes.float8_e8m0fnu)),
        Dtype("C64", 8, np.dtype("c8")),
        Dtype("BOOL", 1, np.dtype("?")),
    ]
    rows += [
        Dtype(f"{kind}{8 * width}", width, np.dtype(f"{kind.lower()}{width}"))
        for kind in "IU"
        for width in (8, 4, 2, 1)
    ]
    return {row.name: row for row in rows}


DTYPES: dict[str, Dtype] = _table()


def dtype(name: object, where: str = "") -> Dtype:
    """Look a safetensors dtype name up. Raises `UnsupportedError` (reason `dtype`)."""
    found = DTYPES.get(name) if isinstance(name, str) else None
    if found is None:
        raise UnsupportedError(
            f"unknown dtype {name!r}",
            where=where,
            hint=f"This version knows {', '.join(DTYPES)}. {UnsupportedError.next_step}",
            reason="dtype",
        )
    return found


def round_to(values: npt.NDArray[Any], target: Dtype, out: Bits | None = None, *, signed_nan: bool = True) -> Bits:
    """Round float values to a float dtype as spec/arithmetic.md says: to nearest, ties to even, NaN quiet.

    Args:
        values: float32 or float64, any shape.
        target: F64, F32, F16 or BF16.
        out: where to put the result; an array of `target.bits` of the same shape.
        signed_nan: a NaN keeps its sign, as in a conversion of what is given; else it has none, as in what is computed.

    Returns:
        The bit patterns, as `target.bits`, in the shape of `values`.
    """
    if out is None:
        out = np.empty(values.shape, target.bits)
    with np.errstate(**SILENT):
        source = _round_to_odd(values) if target.name == "BF16" and values.dtype == np.float64 else values
        np.copyto(out.view(target.values), source, casting="unsafe")
        has_nan = values.size > 0 and bool(np.isnan(values.min()))  # a NaN is the minimum of whatever it is in
    if has_nan:
        nan = np.isnan(values)
        quiet = np.array(np.nan, target.values).view(target.bits)
        sign = target.bits.type(1 << (8 * target.width - 1))
        out[nan] = np.where(np.signbit(values[nan]) & signed_nan, quiet | sign, quiet & ~sign)
    return out


def _round_to_odd(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """float64 as float32 that rounds to bf16 as the float64 would; `ml_dtypes` rounds twice.

    Inexact values go to the odd neighbour, which is no tie (Boldo, Melquiond, "Emulation of a FMA and correctly rounded
    sums: proved algorithms using rounding to odd", 2008).
    """
    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    even = (near != values) & ((bits & 1) == 0)
    bits += np.where(even, np.where(np.abs(near) > np.abs(values), np.uint32(0xFFFFFFFF), np.uint32(1)), np.uint32(0))
    return near


def widen(
    bits: Bits, source: Dtype, accumulator: np.dtype[Any], out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """The exact values of float bit patterns in a wider float type (float32 or float64), in `out` if it is given."""
    if out is None:
        out = np.empty(bits.shape, accumulator)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        if source.name == "BF16" and out.dtype == np.float32:
            wide = out.view(np.uint32)
            np.copyto(wide, bits)
            np.left_shift(wide, 16, out=wide)
        else:
            np.copyto(out, bits.view(source.values))
    return out
