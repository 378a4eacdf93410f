"""How many bits a residual will take, by the entropy of a sample: what decides whether factors pay, and which.

A residual is the difference of two ordered bit patterns. It is coded knowing what both sides of the codec know. Beside
a prediction that is how far it lies from its rounding boundary: a wrong guess is likely only close to one, and towards
it. The distance counts in absolute terms, not in ulps, for so does the error of a low-rank prediction: one class an
octave takes half the bits of 64 even classes of an ulp. Beside a plain base it is the base's exponent.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import Bits, Dtype, round_to

Integers = npt.NDArray[np.int64]

_CLASSES = 32  # octaves of distance from the rounding boundary, the closest in one
_LEADING_BITS = 4  # of an integer of typical size, that have a table
_EXACT = 100  # residuals beyond this share a symbol with those of their bit length, the rest of their bits is spelt out


def prediction_bits(predicted: npt.NDArray[Any], target: Bits, dtype: Dtype) -> float:
    """Bits an element to correct ``predicted`` (float32, or float64 for F32; not yet rounded) to ``target``."""
    rounded = round_to(predicted, dtype)
    mantissa = int(np.finfo(predicted.dtype).nmant)
    dropped = mantissa - dtype.mantissa_bits
    wide: Bits = predicted.view(f"u{predicted.itemsize}")
    offset = (wide & ((1 << dropped) - 1)).astype(np.int64) - (1 << (dropped - 1))  # from the boundary, outwards
    outwards = np.where((offset < 0) == (predicted < 0), -1, 1)
    octave = np.frexp(np.abs(offset) + 0.5)[1] + ((wide << 1) >> (mantissa + 1)).astype(np.int64)
    context = np.maximum(octave - octave.max(initial=0) + _CLASSES - 1, 0)
    return grouped_bits((_ordered(target, dtype) - _ordered(rounded, dtype)) * outwards, context)


def difference_bits(base: npt.NDArray[Any], target: Bits, dtype: Dtype) -> float:
    """Bits an element to correct the values ``base``, as ``dtype``, to ``target``."""
    rounded = round_to(base, dtype)
    exponents = (rounded & ((1 << (8 * dtype.width - 1)) - 1)) >> dtype.mantissa_bits
    return grouped_bits(_ordered(target, dtype) - _ordered(rounded, dtype), exponents.astype(np.int64))


def grouped_bits(residual: Integers, group: Integers) -> float:
    """The entropy of ``residual`` given ``group`` (from 0 on), in bits an element."""
    magnitude = np.abs(residual)
    large = magnitude > _EXACT
    length = np.frexp(magnitude[large].astype(np.float64))[1]
    symbol = residual.copy()
    symbol[large] = np.sign(residual[large]) * (_EXACT + length)
    span = _EXACT + 65
    counts = np.bincount((group * (2 * span) + symbol + span).reshape(-1)).astype(np.float64)
    counts = np.pad(counts, (0, -len(counts) % (2 * span))).reshape(-1, 2 * span)
    spelt_out = float(np.sum(length - 1))
    return (_total_entropy(counts) + spelt_out) / max(1, residual.size)


def integer_bits(values: npt.NDArray[Any]) -> float:
    """Bits to code integers, every row with its own table for the leading bits; those below are noise, spelt out."""
    if not values.size:
        return 0.0
    rows = values.astype(np.int64)
    spelt_out = np.maximum(np.frexp(rows.std(axis=1))[1] - _LEADING_BITS, 0)
    leading = rows >> spelt_out[:, None]
    leading -= leading.min(axis=1, keepdims=True)
    spans = leading.max(axis=1) + 1
    counts = np.bincount((leading + (np.cumsum(spans) - spans)[:, None]).reshape(-1)).astype(np.float64)
    used = counts[counts > 0]
    unseen = 0.5 * len(used) * math.log2(math.e)  # a table from few values is too good (Miller 1955)
    columns = rows.shape[1]
    entropy = rows.size * math.log2(columns) - np.sum(used * np.log2(used))
    return float(entropy + unseen + spelt_out.sum() * columns)


def _total_entropy(counts: npt.NDArray[np.float64]) -> float:
    """Bits to code every symbol of every row of ``counts``, each row with its own ideal table."""
    used = counts[counts > 0]
    totals = counts.sum(axis=1)
    totals = totals[totals > 0]
    return float(np.sum(totals * np.log2(totals)) - np.sum(used * np.log2(used)))


def _ordered(bits: Bits, dtype: Dtype) -> Integers:
    """Bit patterns as integers in the order of their values; both zeros are 0."""
    magnitude = (bits & ((1 << (8 * dtype.width - 1)) - 1)).astype(np.int64)
    return np.where(bits >> (8 * dtype.width - 1), -magnitude, magnitude)
