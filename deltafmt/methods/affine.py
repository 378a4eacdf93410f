"""Weights that are other weights times numbers: rows that only decayed, and mixtures of models.

A rounded weight confines its unrounded value to an interval (`intervals`). So each weight of a row confines the number
that the row was multiplied by, and that is read off exactly; the numbers of a mixture are fitted, by least squares.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..dtypes import Bits, Dtype, widen
from .intervals import interval
from .matrices import BLOCK_ELEMENTS, Matrix, Wide, row_blocks

_FINEST = 1 / 64  # numbers near zero are no better known than this share of a typical last place
_SHORTEST_ROW = 8  # fewer elements fit some number by chance
_PROBE = 64  # columns that tell whether a row needs a closer look
_FIRST_PROBE = 8  # and that tell of most rows that they do not
_ENOUGH = 1 / 16  # of the rows; a row that hardly changed may fit a number by chance

Float64 = npt.NDArray[np.float64]


def row_scales(base: Matrix, bits: Matrix, dtype: Dtype) -> Float64 | None:
    """A number for each row of `base` such that the products round to `bits`, or 1 where there is none.

    Where many rows share a number (a weight decay), they get the same one.

    Args:
        base: `[rows, columns]`, finite.
        bits: `[rows, columns]`, finite numbers of `dtype` (BF16, F16, F32).

    Returns:
        float64 `[rows]`; None if every row is 1.
    """
    low, high = _probed(base, bits, dtype)
    likely = np.flatnonzero(_is_scaled(low, high))
    for some in row_blocks((len(likely), base.shape[1])):
        rows = likely[some]
        low[rows], high[rows] = _quotients(base[rows], bits[rows], dtype)
    explained = _is_scaled(low, high)
    if not explained.any():
        return None
    middles = (low + high) / 2
    shared = float(np.median(middles[explained]))
    middles[(low <= shared) & (shared <= high)] = shared
    return np.where(explained, middles, 1.0)


def are_rows_scaled(base: Matrix, bits: Matrix, dtype: Dtype) -> bool:
    """Whether enough of these rows seem to have been multiplied by a number, by a few of their columns."""
    low, high = _probed(base, bits, dtype, _FIRST_PROBE)
    likely = np.flatnonzero(low <= high)
    scaled = _is_scaled(*_probed(base[likely], bits[likely], dtype)) if len(likely) else likely
    return bool(np.count_nonzero(scaled) > _ENOUGH * base.shape[0])


def _probed(base: Matrix, bits: Matrix, dtype: Dtype, columns: int = _PROBE) -> tuple[Float64, Float64]:
    if base.shape[1] < _SHORTEST_ROW:
        return np.ones(base.shape[0]), np.ones(base.shape[0])
    probe = np.linspace(0, base.shape[1] - 1, min(columns, base.shape[1])).astype(np.intp)
    low, high = np.empty((2, base.shape[0]))
    for rows in row_blocks((base.shape[0], len(probe))):
        part = np.ix_(np.arange(base.shape[0])[rows], probe)
        low[rows], high[rows] = _quotients(base[part], bits[part], dtype)
    return low, high


def _is_scaled(low: Float64, high: Float64) -> npt.NDArray[np.bool_]:
    return (low <= high) & ~((low <= 1) & (high >= 1))


def _quotients(base: Wide, bits: Bits, dtype: Dtype) -> tuple[Float64, Float64]:
    """For each row the interval of numbers `c` with `c * base` in the intervals of `bits`; empty if low > high."""
    low, high = (bound.astype(np.float64) for bound in interval(bits, dtype))
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = low / base, high / base
    zero = base == 0  # says nothing, unless the result is not zero
    impossible = (zero & ~((low <= 0) & (high >= 0))).any(axis=1)
    least = np.where(zero, -np.inf, np.minimum(one, other)).max(axis=1)
    most = np.where(zero, np.inf, np.maximum(one, other)).min(axis=1)
    impossible |= ~np.isfinite(least) | ~np.isfinite(most)
    return np.where(impossible, 1.0, least), np.where(impossible, 0.0, most)


def mixture(parts: Sequence[Wide], bits: Bits, dtype: Dtype) -> Float64:
    """The numbers whose products with `parts` add up to `bits` best, errors measured in units of their last place.

    Weighted least squares by the normal equations. Averages, SLERP and task arithmetic are such mixtures, with other
    numbers for each tensor.

    Args:
        parts: two or more arrays `[m]`, finite.
        bits: `[m]`, finite numbers of `dtype` (BF16, F16, F32).

    Returns:
        float64 `[len(parts)]`.
    """
    typical = np.abs(widen(bits[:BLOCK_ELEMENTS], dtype, np.dtype("f4"))).mean(dtype=np.float64)
    finest = _FINEST * max(float(typical), float(np.finfo(np.float32).tiny)) * 2.0**-dtype.mantissa_bits
    gram, right = np.zeros((len(parts), len(parts))), np.zeros(len(parts))
    for begin in range(0, bits.size, BLOCK_ELEMENTS):
        block = slice(begin, begin + BLOCK_ELEMENTS)
        low, high = (bound.astype(np.float64) for bound in interval(bits[block], dtype))
        weight = 1 / np.maximum(high - low, finest)
        columns = np.stack([part[block] for part in parts]) * weight
        gram += columns @ columns.T
        right += columns @ ((low + high) / 2 * weight)
    return np.asarray(np.linalg.lstsq(gram, right, rcond=None)[0], np.float64)
