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


def rounded(t: Tensor, dtype: str) -> Tensor:
    return Tensor(dtype, t.shape, b"".join(nearest(x, dtype) for x in values(t)))


def residual(target: Tensor, prediction: Tensor) -> Tensor:
    """What `patch` needs to turn a prediction into the target."""
    if prediction.dtype != target.dtype:
        prediction = rounded(prediction, target.dtype)
    size = 8 * WIDTH[target.dtype]
    is_float = target.dtype.startswith(("F", "BF")) and target.dtype != "F8_E8M0"  # which has no sign bit

    def order(u: int) -> int:
        return u if not is_float else (1 << size) - 1 - u if u >> (size - 1) else u + (1 << (size - 1))

    coded = []
    for p, v in zip(words(prediction), words(target), strict=True):
        d = (order(v) - order(p)) % (1 << size)
        d -= (d >> (size - 1)) << size  # as a signed number
        coded.append(2 * d if d >= 0 else -2 * d - 1)
    return bits(f"U{size}", *coded)._replace(shape=target.shape)


class Bounded(NamedTuple):
    """A bounded value by the ordered reference; ``low`` and ``high`` enclose what any conforming reader may give."""

    reference: Tensor
    low: Tensor
    high: Tensor


def combine(dtype: str, shape: list[int], terms: list[Tensor | tuple[Tensor, Tensor, float]]) -> Bounded:
    """A `sum` of tensors and low-rank terms ``(a, b, scale)``; a single term is not summed."""
    operands = [t for term in terms for t in ([term] if isinstance(term, Tensor) else term[:2])]
    wide = "F64" if "F64" in (dtype, *(t.dtype for t in operands)) else "F32"

    def near(x: float) -> float:  # F64 arithmetic rounded to F32 is F32 arithmetic: 53 >= 2 * 24 + 2 bits
        return values(numbers(wide, [1], [x]))[0]

    totals: list[float] = []
    magnitudes = [Fraction(0)] * math.prod(shape)
    ranks = 0
    for term in terms:
        if isinstance(term, Tensor):
            term_values = values(term)
            for i, x in enumerate(term_values):
                magnitudes[i] += abs(Fraction(x))
        else:
            a, b, scale = values(term[0]), values(term[1]), near(term[2])
            rank, rows, columns = term[0].shape[0], shape[0], math.prod(shape[1:])
            ranks += rank
            term_values = []
            for i in range(rows * columns):
                total = 0.0
                for k in range(rank):
                    left, right = b[k * rows + i // columns], a[k * columns + i % columns]
                    total = near(total + near(near(scale * left) * right))
                    magnitudes[i] += abs(Fraction(scale) * Fraction(left) * Fraction(right))
                term_values.append(total)
        totals = [near(x + y) for x, y in zip(totals, term_values, strict=True)] if totals else term_values
    allowed = 2 * (ranks + len(terms) + 2) * Fraction(1, 2**53 if wide == "F64" else 2**24)
    ends = [
        [float(Fraction(x) + side * allowed * m) for x, m in zip(totals, magnitudes, strict=True)] for side in (-1, 1)
    ]
    return Bounded(*(numbers(dtype, shape, row) for row in (totals, *ends)))
