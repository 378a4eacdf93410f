"""Float arithmetic of spec/arithmetic.md in fractions: no rounding of the machine is trusted.

Shares no code with the package or any reader.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

from vectors.values import WIDTH, Tensor, bits, words

FIELDS = {"F64": (11, 52), "F32": (8, 23), "F16": (5, 10), "BF16": (8, 7)}  # bits of exponent and mantissa


class Real(NamedTuple):
    """A number with a sign, which zeros and NaNs have too; ``size`` is infinity or NaN for what is no number."""

    negative: bool
    size: Fraction | float


NAN = Real(False, math.nan)


def is_nan(x: Real) -> bool:
    return x.size != x.size


def real(u: int, dtype: str) -> Real:
    """What a bit pattern stands for."""
    exponent_bits, mantissa_bits = FIELDS[dtype]
    exponent, mantissa = u >> mantissa_bits & (1 << exponent_bits) - 1, u & (1 << mantissa_bits) - 1
    negative = bool(u >> exponent_bits + mantissa_bits)
    if exponent == (1 << exponent_bits) - 1:
        return Real(negative, math.nan if mantissa else math.inf)
    significand = mantissa + (1 << mantissa_bits) * (exponent > 0)
    return Real(negative, significand * power(max(exponent, 1) - (1 << exponent_bits - 1) + 1 - mantissa_bits))


def power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def pattern(x: Real, dtype: str) -> int:
    """The bit pattern of the nearest number, ties to even; of a NaN the quiet one with its sign."""
    exponent_bits, mantissa_bits = FIELDS[dtype]
    sign, infinity = x.negative << exponent_bits + mantissa_bits, (1 << exponent_bits) - 1 << mantissa_bits
    if is_nan(x):
        return sign | infinity | 1 << mantissa_bits - 1
    if isinstance(x.size, float) or not x.size:
        return sign | (infinity if x.size else 0)
    exponent = x.size.numerator.bit_length() - x.size.denominator.bit_length()
    exponent -= power(exponent) > x.size  # now 2^exponent <= size < 2^(exponent + 1)
    exponent = max(exponent, 2 - (1 << exponent_bits - 1))  # the subnormals lie as close as the smallest normals
    significand = round(x.size / power(exponent - mantissa_bits))  # of a fraction: ties to even
    biased = exponent + (1 << exponent_bits - 1) - 1
    return sign | min(infinity, (biased - 1 << mantissa_bits) + significand)


def nearest_real(x: Real, dtype: str) -> Real:
    return real(pattern(x, dtype), dtype)


def add(x: Real, y: Real, dtype: str) -> Real:
    """The sum, rounded to a dtype. Zero is negative only if both are."""
    if is_nan(x) or is_nan(y) or (x.size == y.size == math.inf and x.negative != y.negative):
        return NAN
    if math.inf in (x.size, y.size):
        return x if x.size == math.inf else y
    total = Fraction(-x.size if x.negative else x.size) + Fraction(-y.size if y.negative else y.size)
    negative = total < 0 or (total == 0 and x.negative and y.negative)
    return nearest_real(Real(negative, abs(total)), dtype)


def multiply(x: Real, y: Real, dtype: str) -> Real:
    """The product, rounded to a dtype."""
    sizes = (x.size, y.size)
    if is_nan(x) or is_nan(y) or (math.inf in sizes and 0 in sizes):
        return NAN
    negative = x.negative != y.negative
    if math.inf in sizes:
        return Real(negative, math.inf)
    return nearest_real(Real(negative, Fraction(x.size) * Fraction(y.size)), dtype)


def reals(t: Tensor) -> list[Real]:
    return [real(u, t.dtype) for u in words(t)]


def converted(t: Tensor, dtype: str) -> Tensor:
    """A float tensor in another dtype; NaNs keep their sign."""
    return bits(dtype, *(pattern(x, dtype) for x in reals(t)))._replace(shape=t.shape)


def integers(t: Tensor) -> list[int]:
    """The elements of a signed integer tensor."""
    w = WIDTH[t.dtype]
    return [int.from_bytes(t.data[i : i + w], "little", signed=True) for i in range(0, len(t.data), w)]
