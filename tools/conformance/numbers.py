"""Conversions and the accumulation type (spec/arithmetic.md); low-rank products (spec/operators/lowrank.md)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from conformance.manifest import FLOATS, WIDTH, need

Bits = npt.NDArray[np.unsignedinteger[Any]]
Floats = npt.NDArray[np.floating[Any]]
NUMPY = {"F32": "<f4", "F64": "<f8"}


def unsigned(data: bytes, width: int) -> Bits:
    return np.frombuffer(data, f"<u{width}")


def signed(data: bytes, width: int) -> npt.NDArray[np.int64]:
    return np.frombuffer(data, f"<i{width}").astype(np.int64)


def widen(dtype: str, data: bytes, accumulator: str) -> Floats:
    """Floats of any width as the accumulation type, exactly; NaNs keep their sign."""
    exponent_bits, mantissa_bits = FLOATS[dtype]
    if dtype in ("F32", "F64"):
        with np.errstate(invalid="ignore"):  # a signalling NaN is no trouble
            return np.frombuffer(data, NUMPY[dtype]).astype(NUMPY[accumulator])
    bits = unsigned(data, 2).astype(np.int64)
    largest, bias = (1 << exponent_bits) - 1, (1 << (exponent_bits - 1)) - 1
    exponent, mantissa = bits >> mantissa_bits & largest, bits & ((1 << mantissa_bits) - 1)
    significand = mantissa + np.where(exponent > 0, 1 << mantissa_bits, 0)
    value = np.ldexp(significand.astype("<f8"), np.maximum(exponent, 1) - bias - mantissa_bits)
    value = np.where(exponent == largest, np.where(mantissa > 0, np.nan, np.inf), value)
    return np.copysign(value, np.where(bits >> 15, -1.0, 1.0)).astype(NUMPY[accumulator])


def convert(dtype: str, value: Floats, signed_nan: bool) -> bytes:
    """Convert to nearest, ties to even, from F32 or F64: once, in integers, from the bits of the (wider) F64.

    A NaN becomes the quiet one, without a sign if it is the value of a wide node.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN is no trouble
        bits = value.astype("<f8").view("<u8").astype(np.int64)
    exponent_bits, mantissa_bits = FLOATS[dtype]
    largest, bias = (1 << exponent_bits) - 1, (1 << (exponent_bits - 1)) - 1
    sign, source, mantissa = bits < 0, bits >> 52 & 0x7FF, bits & ((1 << 52) - 1)
    nan = (source == 0x7FF) & (mantissa > 0)
    if dtype == "F64":
        kept = bits & np.int64(2**63 - 1)
    else:
        exponent = np.maximum(source, 1) - 1023 + bias
        normal = exponent >= 1
        hidden = mantissa + np.where(source > 0, 1 << 52, 0)
        exact = np.where(normal, (np.maximum(exponent, 0) << 52) + mantissa, hidden)
        shift = 52 - mantissa_bits + np.where(normal, 0, np.minimum(1 - exponent, 60 - 52 + mantissa_bits))
        kept, rest, half = exact >> shift, exact & ((1 << shift) - 1), 1 << (shift - 1)
        kept += (rest > half) | ((rest == half) & (kept & 1 == 1))
        kept = np.minimum(kept, largest << mantissa_bits)  # infinity
    kept = np.where(nan, largest << mantissa_bits | 1 << (mantissa_bits - 1), kept).astype("<u8")
    top = np.where(sign & (signed_nan | ~nan), np.uint64(1 << (exponent_bits + mantissa_bits)), np.uint64(0))
    return (kept | top).astype(f"<u{WIDTH[dtype]}").tobytes()


def ordered_product(a: Floats, b: Floats, rows: int, scale: float) -> Floats:
    """Float factors: the ordered reference, in the accumulation type that the factors already have."""
    b = b.reshape(-1, rows)
    a = a.reshape(len(b), -1)
    factor = np.array(scale, "<f8").astype(a.dtype)
    product = np.zeros((rows, a.shape[1]), a.dtype)
    with np.errstate(all="ignore"):
        for k in range(len(a)):
            product = product + (factor * b[k])[:, None] * a[k][None, :]
    return product.reshape(-1)


def exact_product(
    a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], rows: int, scale: float, accumulator: str, where: str
) -> Floats:
    """Integer factors: exact in 64-bit integers, and then in the accumulation type; `inexact` beyond the bound."""
    b = b.reshape(-1, rows)
    a = a.reshape(len(b), -1)
    largest = [max((sum(x * x for x in column) for column in factor.T.tolist()), default=0) for factor in (a, b)]
    most = 2**48 if accumulator == "F32" else 2**106
    need(math.prod(largest) <= most, "inexact", f"{where}: integer factors up to {largest}, {most} is allowed")
    product = (b.T @ a).reshape(-1)  # zeros are positive: integers have no other
    exact: Floats = product.astype(NUMPY[accumulator]) * np.array(scale, NUMPY[accumulator])
    return exact
