"""The magnitudes of a merged DoRA (arXiv 2402.09353): a number for each row, beside low rank, by least squares."""

from __future__ import annotations

import numpy as np

from .matrices import Matrix, Wide, row_blocks, spread
from .svd import Float64, truncated_svd

_CHANCE = 4  # times as much as chance would explain
_TURNS = {4: 4, 8: 12}  # by the width of the arithmetic: at most so many, and
_SETTLED = {4: 2.0**-18, 8: 2.0**-27}  # a last step that no weight would show
_SHARED = 1 / 16  # of the rows have a part in a component of a low-rank matrix; a third do in one of random factors
_TYPICAL_RANK = 64
_PART = 1 << 22  # elements of evenly spread rows tell the row space of a low-rank matrix, and
_PART_ROWS = 4 * _TYPICAL_RANK  # so many rows at least


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
    for _ in range(_TURNS[part.dtype.itemsize]):
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


def rough_magnitudes(base: Matrix, changed: Matrix) -> Float64:
    """The first guess of `magnitudes`: what the low-rank matrix shares with `base` is taken for a part of them."""
    own, shared, _ = row_products(base, changed)
    return 1 + _share(shared, own)


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
