"""Weights that are other weights times numbers: rows that only decayed, and mixtures of models.

Both are read off exactly where they are what happened: a rounded weight confines its unrounded value to an interval
(`intervals`), so each weight of a row confines the number that the row was multiplied by.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..dtypes import Bits, Dtype, widen
from .intervals import interval
from .matrices import Matrix, Wide, row_blocks
from .sketch import spread
from .svd import truncated_svd

_BLOCK_ELEMENTS = 1 << 18
_FINEST = 1 / 64  # numbers near zero are no better known than this share of a typical last place
_SHORTEST_ROW = 8  # fewer elements fit some number by chance
_PROBE = 64  # columns that tell whether a row needs a closer look
_FIRST_PROBE = 8  # and that tell of most rows that they do not
_ENOUGH = 1 / 16  # of the rows; a row that hardly changed may fit a number by chance
_CHANCE = 4  # times as much as chance would explain
_TURNS = 12
_SETTLED = {4: 2.0**-18, 8: 2.0**-27}  # by the width of the arithmetic: a last step that no weight would show
_SHARED = 1 / 16  # of the rows have a part in a component of a low-rank matrix; a third do in one of random factors
_TYPICAL_RANK = 64
_PART = 1 << 22  # elements of evenly spread rows tell the row space of a low-rank matrix, and
_PART_ROWS = 4 * _TYPICAL_RANK  # so many rows at least

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


def magnitudes(base: Matrix, changed: Matrix) -> Float64:
    """The number that each row of `base` was multiplied by before, or after, a low-rank matrix was added to it.

    Least squares for the rows and what they leave in the leading row space of that, in turns. A component that is of
    few rows is what their numbers, yet wrong, leave of themselves: it would keep them from getting better.

    Args:
        base, changed: `[rows, columns]`, finite; float64 if the numbers are to be good for float32 weights.

    Returns:
        float64 `[rows]`.
    """
    rows, columns = base.shape
    some = spread(rows, max(_PART // max(columns, 1), _PART_ROWS))
    part, part_change = _with_change(base[some], changed[some])
    own, shared, _ = row_products(base, changed)
    slopes = _share(shared, own)
    for _ in range(_TURNS):
        last = slopes
        low = truncated_svd(np.asarray(part_change - slopes[some, None] * part, np.float32), _TYPICAL_RANK)
        a = low.a[_rows_within(low.b) > _SHARED * len(some)]
        space = np.linalg.qr(a.T.astype(np.float64))[0].astype(part.dtype)  # small components are not orthogonal yet
        slopes = _share(shared - _products_within(space, base, changed, slopes), own)
        if np.abs(slopes - last).max(initial=0) < _SETTLED[part.dtype.itemsize]:
            break
    return 1 + slopes


def _rows_within(b: Wide) -> Float64:
    """Of each component of `b` [r, rows] about how many rows it is spread over (its participation ratio)."""
    squares = np.square(b, dtype=np.float64)
    return np.asarray(squares.sum(axis=1) ** 2 / np.square(squares).sum(axis=1))


def have_magnitudes(base: Matrix, changed: Matrix) -> bool:
    """Whether multiples of the rows explain more of the difference than the one part in `columns` that chance does."""
    own, shared, change = row_products(base, changed)
    explained = _share(shared, own) ** 2 @ own
    return bool(explained * base.shape[1] > _CHANCE * float(change.sum()))


def row_products(base: Matrix, changed: Matrix) -> tuple[Float64, Float64, Float64]:
    """Of each row the inner products of the base with itself and with the change, and of the change with itself."""
    products = np.empty((3, base.shape[0]))
    for rows in row_blocks(base.shape):
        before, change = _with_change(base[rows], changed[rows])
        before, change = before.astype(np.float64), change.astype(np.float64)
        for place, pair in enumerate([(before, before), (change, before), (change, change)]):
            products[place, rows] = np.einsum("oi,oi->o", *pair)
    return products[0], products[1], products[2]


def _products_within(space: Wide, base: Matrix, changed: Matrix, slopes: Float64) -> Float64:
    """Of each row the inner product, within `space` [in, k], of the base with the change less multiples of it."""
    products = np.empty(base.shape[0])
    for rows in row_blocks(base.shape):
        before, change = _with_change(base[rows], changed[rows])
        before, change = (before @ space).astype(np.float64), (change @ space).astype(np.float64)
        products[rows] = np.einsum("ok,ok->o", change - slopes[rows, None] * before, before)
    return products


def _with_change(base: Wide, changed: Wide) -> tuple[Wide, Wide]:
    return base, np.subtract(changed, base, dtype=base.dtype)


def _share(products: Float64, own: Float64) -> Float64:
    shares: Float64 = np.divide(products, own, out=np.zeros_like(products), where=own > 0)
    return shares


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
    typical = np.abs(widen(bits[:_BLOCK_ELEMENTS], dtype, np.dtype("f4"))).mean(dtype=np.float64)
    finest = _FINEST * max(float(typical), float(np.finfo(np.float32).tiny)) * 2.0**-dtype.mantissa_bits
    gram, right = np.zeros((len(parts), len(parts))), np.zeros(len(parts))
    for begin in range(0, bits.size, _BLOCK_ELEMENTS):
        block = slice(begin, begin + _BLOCK_ELEMENTS)
        low, high = (bound.astype(np.float64) for bound in interval(bits[block], dtype))
        weight = 1 / np.maximum(high - low, finest)
        columns = np.stack([part[block] for part in parts]) * weight
        gram += columns @ columns.T
        right += columns @ ((low + high) / 2 * weight)
    return np.asarray(np.linalg.lstsq(gram, right, rcond=None)[0], np.float64)
