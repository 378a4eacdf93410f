"""Tensors for the conformance vectors, and the arithmetic of the format on them.

Shares no code with the package or any reader. Nothing depends on the version of a library: data come from SHAKE-128,
arithmetic is Python's.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from fractions import Fraction
from typing import Any, NamedTuple

Json = dict[str, Any]
WIDTH = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0"), 1),
}
FLOATS = ("F64", "F32", "F16", "BF16")


class Tensor(NamedTuple):
    dtype: str
    shape: list[int]
    data: bytes


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest(data: bytes) -> str:
    return "sha256:" + sha256(data)


def canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


# Data -------------------------------------------------------------------------------------------


def noise(label: str, count: int) -> bytes:
    """Bytes without any pattern, the same on every machine."""
    return hashlib.shake_128(label.encode()).digest(count)


def tensor(label: str, dtype: str, *shape: int) -> Tensor:
    """A tensor of noise: every bit pattern may occur (booleans are 0 or 1)."""
    data = noise(label, math.prod(shape) * WIDTH[dtype])
    return Tensor(dtype, list(shape), bytes(x & 1 for x in data) if dtype == "BOOL" else data)


def weights(label: str, dtype: str, *shape: int) -> Tensor:
    """A tensor like trained weights: bell-shaped, a few per cent in size, all mantissa bits in use."""
    raw = noise(label, 8 * math.prod(shape))
    values = [(sum(raw[i : i + 7]) - 892.5) / 8192 + raw[i + 7] / 2**21 / 3 for i in range(0, len(raw), 8)]
    return Tensor(dtype, list(shape), b"".join(nearest(x, dtype) for x in values))


def numbers(dtype: str, shape: list[int], values: list[float]) -> Tensor:
    return Tensor(dtype, shape, b"".join(nearest(x, dtype) for x in values))


def bits(dtype: str, *patterns: int) -> Tensor:
    return Tensor(dtype, [len(patterns)], b"".join(u.to_bytes(WIDTH[dtype], "little") for u in patterns))


def words(t: Tensor) -> list[int]:
    """The elements of a tensor as unsigned integers."""
    w = WIDTH[t.dtype]
    return [int.from_bytes(t.data[i : i + w], "little") for i in range(0, len(t.data), w)]


# Arithmetic (spec/arithmetic.md, spec/operators/patch.md): Python floats and fractions ----------


def values(t: Tensor) -> list[float]:
    """The elements of a float tensor, exactly."""
    if t.dtype == "BF16":
        return [struct.unpack("<f", struct.pack("<I", u << 16))[0] for u in words(t)]
    code = {"F64": "d", "F32": "f", "F16": "e"}[t.dtype]
    return list(struct.unpack(f"<{len(t.data) // WIDTH[t.dtype]}{code}", t.data))


def nearest(x: float, dtype: str) -> bytes:
    """The nearest number of a dtype, ties to even; a NaN becomes the quiet one with its sign."""
    negative = math.copysign(1.0, x) < 0
    if math.isnan(x):
        quiet = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000, "F64": 0x7FF8 << 48}[dtype]
        return (quiet | negative << 8 * WIDTH[dtype] - 1).to_bytes(WIDTH[dtype], "little")
    if dtype != "BF16":
        code, infinity = {"F64": ("<d", 0x7FF0 << 48), "F32": ("<f", 0x7F800000), "F16": ("<e", 0x7C00)}[dtype]
        try:
            return struct.pack(code, x)
        except OverflowError:
            return (infinity | negative << 8 * WIDTH[dtype] - 1).to_bytes(WIDTH[dtype], "little")
    if math.isinf(x):
        return struct.pack("<H", 0x7F80 | negative << 15)
    # No rounding rule is trusted here: of all magnitudes around, take the one that is nearest as a fraction.
    start = int.from_bytes(nearest(abs(x), "F32"), "little") >> 16
    close = [u for u in (start - 1, start, start + 1) if 0 <= u <= 0x7F80]
    ideal = {u: Fraction(2) ** 128 if u == 0x7F80 else Fraction(values(bits("BF16", u))[0]) for u in close}
    best = min(close, key=lambda u: (abs(ideal[u] - Fraction(abs(x))), u & 1))
    return struct.pack("<H", best | negative << 15)
