"""Low-rank fit to a matrix of which every element is only known to lie in an interval: what rounding left of it.

A stored weight says that base plus update lies within half an ulp of it, so the update lies in an interval. The fit
maximises the likelihood that every element, blurred by logistic noise of scale s, falls into its interval: a concave
function of the prediction whose two derivatives need nothing but ``tanh``. As s shrinks with the error of the fit, the
intervals act as the constraints they are, and the error of n observations falls as 1 / n where plain least squares
gives 1 / sqrt(n). Alternating maximisation in the two factors is weighted low-rank approximation (Srebro, Jaakkola,
"Weighted low-rank approximations", 2003) with Newton's weights for interval-censored observations (McCullagh,
"Regression models for ordinal data", 1980): one r x r system for each row, then one for each column.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ..dtypes import Dtype
from ..pipeline import Room
from ..scratch import scratch
from .matrices import Matrix, row_blocks, spread
from .rounded_update import Change, Fit, Floats, RoundedUpdate, Update, blocks_of_rows
from .svd import Float32, Float64, truncated_svd

_SYSTEMS = 256  # that are solved at a time
_DIRECT = 32  # the largest rank of systems that are made and solved; larger ones are only multiplied with
_CONJUGATE, _SOLVED = 12, 0.03  # steps towards their solution at most, and the error at which they end
_CACHED = 1 << 14  # elements of which several arrays fit into the cache of a processor
_EXTENDING = 0.5  # s of the step that follows least squares, in half ulps
_PART = 1 << 22  # elements of float32 that are fitted at once; a larger matrix is extended from a part
_PART_ROWS = 512  # of it at least
_ROWS_OF_RANK = 3  # rows of it for each component at least, if there are as many
_ROOM = Room(3 << 22)  # for elements of float32 that are fitted side by side; each takes some 20 bytes of memory
_PASSES = 8
_TINY = np.float32(np.finfo(np.float32).tiny)
_WORTHWHILE = 0.8  # a pass that leaves more than this of the error is the last
_CAUTION = 1.3  # s beside the estimated error: Newton's steps overshoot where s is too small
_SOFT = 0.1  # s of the first step at least, in half ulps
_EDGE = 1.05  # how far above the largest singular value expected of noise a component must be
_DROP = 1.15  # from one singular value to the next: more than noise has
_FIRST_RANK = 24  # components looked for at first; if these are not enough, all there may be
_NARROW = 4  # components are of few rows if they are spread over this part of them
_ENTRY_BITS = 5  # of an entry of the factors, about
_ROUNDING_BITS = 2  # of an element are saved at most beside what its size tells, where it is predicted well
_LIKE_NOISE = 2  # times the energy of the largest component of noise: it may be noise as well, which is of no rows
_LEAST_NOISE = 1e-9  # of the energy: zero is none
_GROWTH = 16  # components added at a time


def fit_stored(base: Matrix, target: Matrix, dtype: Dtype, wide: np.dtype[Any], most: int) -> tuple[Fit, int] | None:
    """The likeliest factors of the difference, and the exponent of their unit; None if nothing stands out from noise.

    Those of a large matrix are fitted on evenly spread rows, of a wide one on columns, and extended to all others.
    """
    turned = target.shape[0] < target.shape[1] and not _is_small(target.shape, wide)
    change = Change(base, target, dtype, wide, turned)
    rows = spread(change.shape[0], _part_rows(change.shape, wide))
    part = change.update(rows)
    start = svd_start(part, most) if part.middle.any() else None
    if start is not None and len(rows) < min(_ROWS_OF_RANK * start.rank, change.shape[0]):
        rows = spread(change.shape[0], _ROWS_OF_RANK * start.rank)
        part = change.update(rows)
        start = svd_start(part, most)
    if start is None or start.rank == 0:
        return None
    found = fit(part, start, most)
    if len(rows) < change.shape[0]:
        found = _extended(change, part, found)
    return Fit(found.a, found.b) if turned else found, change.exponent


def room_to_fit(shape: tuple[int, int], wide: np.dtype[Any], most: int) -> AbstractContextManager[None]:
    """Wait until `fit_stored` has memory for a matrix beside those that other threads fit, and keep it until left."""
    rows = max(_part_rows((max(shape), min(shape)), wide), _ROWS_OF_RANK * most)
    return _ROOM.taken(min(rows * min(shape), math.prod(shape)) * wide.itemsize // 4)


def _part_rows(shape: tuple[int, ...], wide: np.dtype[Any]) -> int:
    if _is_small(shape, wide):
        return shape[0]
    return max(4 * _PART // (wide.itemsize * shape[1]), _PART_ROWS)


def _is_small(shape: tuple[int, ...], wide: np.dtype[Any]) -> bool:
    return math.prod(shape) * wide.itemsize <= 4 * _PART


def svd_start(update: RoundedUpdate, most: int) -> Fit:
    """The components of the middles that stand out from noise, ``most`` at most."""
    middle = update.middle.astype(np.float32, copy=False)
    total = sum(float(np.sum(np.square(middle[rows], dtype=np.float64))) for rows in blocks_of_rows(middle.shape))
    for limit in (min(most, _FIRST_RANK), most):
        factors = truncated_svd(middle, limit)
        count = _above_noise(factors.singular_values, total, middle.shape)
        if count < limit:
            break
    else:  # an update below the ulps leaves no even noise; its components end with a drop all the same
        drops = factors.singular_values[:-1] > _DROP * factors.singular_values[1:]
        count = int(np.flatnonzero(drops)[-1]) + 1 if drops.any() else count
    count = _worthwhile(factors.b[:count], factors.a[:count], total)
    return Fit(factors.b[:count].astype(update.middle.dtype), factors.a[:count].astype(update.middle.dtype))


def _worthwhile(b: Float32, a: Float32, total: float) -> int:
    """How many of the components to keep: the last ones may make nothing but few rows, or columns, that changed by
    themselves. Each such row takes a component, and that takes more bits than the row does as a residual.
    """
    sizes = np.square(b, dtype=np.float64).sum(axis=1), np.square(a, dtype=np.float64).sum(axis=1)
    kept, shape = len(b), (b.shape[1], a.shape[1])
    noise = max(total - float(sizes[0] @ sizes[1]), _LEAST_NOISE * total) / math.prod(shape)
    largest = _LIKE_NOISE * noise * (math.sqrt(shape[0]) + math.sqrt(shape[1])) ** 2
    for factor, other, length in ((b, sizes[1], shape[1]), (a, sizes[0], shape[0])):
        of_each = np.square(factor, dtype=np.float64) * other[:, None]
        few, energies = factor.shape[1] / _NARROW, of_each.sum(axis=1)
        narrow = (_spread_over(of_each) < few) | (energies < largest)
        narrow = np.logical_and.accumulate(narrow[::-1])[::-1]  # this one and all behind it
        of_rest = np.cumsum(of_each[::-1], axis=0)[::-1]
        elements = _spread_over(of_rest) * length
        gains = elements * (np.log2(1 + of_rest.sum(axis=1) / np.maximum(elements * noise, _TINY)) / 2 + _ROUNDING_BITS)
        costs = _ENTRY_BITS * np.arange(len(b), 0, -1) * sum(shape)
        narrow &= (elements < few * length) & (gains < costs)
        if narrow.any():
            kept = min(kept, int(np.flatnonzero(narrow)[0]))
    return kept


def _spread_over(energies: Float64) -> Float64:
    """Over how many places energies `[..., n]` are spread, about (their participation ratio)."""
    return np.asarray(energies.sum(axis=-1) ** 2 / np.maximum(np.square(energies).sum(axis=-1), 1e-300))


def fit(update: RoundedUpdate, start: Fit, most: int, passes: int = _PASSES) -> Fit:
    """The likeliest factors from ``start`` on, with the components that the fit brings to light, ``most`` in all."""
    # An update below the ulps starts inside the intervals yet far from the truth: a soft first step, taken on trust.
    soft = max(_CAUTION * update.error(start), _SOFT * update.typical_half)
    found, error = _refined(update, _orthogonal(*_newton(update, start, soft)), passes - 1)
    while found.rank < most:
        grown = _grown(update, found, error, min(_GROWTH, most - found.rank))
        if grown.rank == found.rank:
            break
        better, less = _refined(update, grown, passes)
        if not less < _WORTHWHILE * error:
            break
        found, error = better, less
    return found


def _refined(update: Update, start: Fit, passes: int, enough: float = 0.0) -> tuple[Fit, float]:
    """The best of ``start`` and what up to ``passes`` Newton steps make of it, and its error; ``enough`` ends them."""
    best, current, least = start, start, update.error(start)
    for _ in range(passes):
        current = _orthogonal(*_newton(update, current, _noise(update, current, least)))
        error = update.error(current)
        if not error < least:
            break
        progress, best, least = error / least, current, error
        if progress > _WORTHWHILE or least <= enough:
            break
    return best, least


def _noise(update: Update, current: Fit, error: float) -> float:
    """The scale s of the next step: near the error, but no less than what the intervals can tell apart."""
    out, in_ = update.shape
    floor = update.typical_half * current.rank * float(1 / out + 1 / in_)
    return max(_CAUTION * error, floor)


def _extended(change: Change, part: RoundedUpdate, found: Fit) -> Fit:
    """A fit of some rows as one of all: each of the others by itself, then every column by all of them, in turns."""
    b = np.empty((found.rank, change.shape[0]), found.b.dtype)
    squares = np.sum(np.square(found.a, dtype=np.float64), axis=1)[:, None]  # the components are orthogonal
    step = _RowStep(found, _EXTENDING * part.typical_half)
    for rows, middle, half in change.blocks():
        b[:, rows] = found.a @ middle.T / squares  # least squares
        b[:, rows] += step.of(middle, half, b[:, rows])[0]
    return _refined(change, _orthogonal(b, found.a), _PASSES, enough=part.error(found))[0]


class _RowStep:
    """One Newton step for rows of ``b`` with ``a`` held, each by itself.

    With u, l = tanh of the distances to the interval's ends over 2 s, an element's log-likelihood has the slope
    (u + l) / 2s and the curvature (2 - u^2 - l^2) / 4s^2; 2s and 4s^2 are carried outside the sums. A Gaussian prior of
    each component's own size keeps rows that hold no information at rest.
    """

    def __init__(self, current: Fit, s: float) -> None:
        self._a = current.a
        self.right = current.a.astype(np.float32)
        self._pairs = _pairs(self.right) if current.rank <= _DIRECT else None
        self.scale = np.float32(0.5 / s)
        self._prior = _prior(current.b, s)

    def of(self, middle: Floats, half: Float32, b: Floats) -> tuple[Floats, Float32, Float32]:
        """How ``b`` [r, rows] moves, and slope and curvature of before in units of `scale`, valid until the next."""
        gradient, curvature = _derivatives(middle - b.T @ self._a, half, self.scale)
        pull = gradient @ self.right.T - b.T * (self._prior * self.scale)
        if self._pairs is not None:
            return _solved(curvature @ self._pairs, pull, self._prior).T / self.scale, gradient, curvature

        def multiplied(x: Float32) -> Float32:
            return np.asarray(((x @ self.right) * curvature) @ self.right.T)

        move = _approached(multiplied, curvature @ np.square(self.right).T, pull, self._prior)
        return move.T / self.scale, gradient, curvature


def _newton(update: Update, current: Fit, s: float) -> tuple[Floats, Floats]:
    """One Newton step for ``b`` with ``a`` held, then one for ``a`` with the new ``b``, in one pass over the rows.

    Of systems that are too large to be made it takes one more pass for each step towards their solution.
    """
    b, a = current.b.copy(), current.a
    step = _RowStep(current, s)
    direct = current.rank <= _DIRECT
    sums = np.zeros((a.shape[1], current.rank * (current.rank + 1) // 2 if direct else current.rank), np.float32)
    slope = np.zeros((a.shape[1], current.rank), np.float32)
    prior = _prior(a, s)
    for rows, middle, half in update.blocks():
        move, gradient, curvature = step.of(middle, half, b[:, rows])
        b[:, rows] += move
        change = (move.astype(np.float32) * step.scale).T @ step.right
        change *= curvature
        gradient -= change
        left = b[:, rows].astype(np.float32)
        sums += curvature.T @ (_pairs(left) if direct else np.square(left).T)
        slope += gradient.T @ left.T
    pull = slope - a.T * (prior * step.scale)

    def multiplied(x: Float32) -> Float32:
        product = np.zeros_like(x)
        for rows, middle, half in update.blocks():
            _, curvature = _derivatives(middle - current.b[:, rows].T @ a, half, step.scale)
            left = b[:, rows].astype(np.float32)
            curvature *= left.T @ x.T
            product += curvature.T @ left.T
        return product

    move_of_a = _solved(sums, pull, prior) if direct else _approached(multiplied, sums, pull, prior)
    return b, a + (move_of_a.T / step.scale).astype(a.dtype)


def _prior(factor: Floats, s: float) -> Float64:
    return np.asarray((2 * s) ** 2 / np.mean(np.square(factor, dtype=np.float64), axis=1))


def _pairs(factor: Float32) -> Float32:
    """The products of each two components [n, r (r + 1) / 2] of a factor [r, n]."""
    upper, lower = np.triu_indices(len(factor))
    return np.ascontiguousarray((factor[upper] * factor[lower]).T)


def _derivatives(residual: Floats, half: Float32, scale: np.float32) -> tuple[Float32, Float32]:
    """Slope and curvature of the log-likelihood in units of ``scale`` and its square; valid until the next."""
    slope = scratch("slope", np.float32, residual.size).reshape(residual.shape)
    curvature = scratch("curvature", np.float32, residual.size).reshape(residual.shape)
    for rows in row_blocks(residual.shape, _CACHED):
        narrow = residual[rows].astype(np.float32, copy=False)
        upper = np.add(narrow, half[rows], out=curvature[rows])
        upper *= scale
        np.tanh(upper, out=upper)
        lower = np.subtract(narrow, half[rows])
        lower *= scale
        np.tanh(lower, out=lower)
        np.add(upper, lower, out=slope[rows])
        upper *= upper
        lower *= lower
        upper += lower
        np.subtract(np.float32(2), upper, out=upper)
    return slope, curvature


def _solved(normal: Float32, right: Floats, ridge: Float64) -> Float64:
    """The solutions [n, r] of n symmetric systems, given as their upper triangles [n, r (r + 1) / 2]."""
    rank = len(ridge)
    upper, lower = np.triu_indices(rank)
    diagonal = np.arange(rank)
    solutions = np.empty(right.shape)
    for start in range(0, len(right), _SYSTEMS):
        rows = slice(start, start + _SYSTEMS)
        systems = np.empty((len(right[rows]), rank, rank))
        systems[:, upper, lower] = systems[:, lower, upper] = normal[rows]
        systems[:, diagonal, diagonal] += ridge
        unit = 1 / np.sqrt(systems[:, diagonal, diagonal])  # Jacobi scaling: the sums are float32
        systems *= unit[:, :, None] * unit[:, None, :]
        systems[:, diagonal, diagonal] += 1e-6
        solutions[rows] = np.linalg.solve(systems, (right[rows] * unit)[..., None])[..., 0] * unit
    return solutions


def _approached(multiplied: Callable[[Float32], Float32], diagonal: Float32, right: Floats, ridge: Float64) -> Float32:
    """About the solutions [n, r] of n symmetric systems, given as what multiplies [n, r] with them and their diagonals.

    Conjugate gradients (Hestenes, Stiefel 1952), side by side, with the diagonals as preconditioner: the components are
    nearly orthogonal, so few steps do.
    """
    narrow = ridge.astype(np.float32)
    inverse = np.float32(1) / (diagonal + narrow)
    residual = right.astype(np.float32)
    solution = np.zeros_like(residual)
    direction = inverse * residual
    energy = first = _inner(residual, direction)
    for _ in range(_CONJUGATE):
        image = multiplied(direction) + narrow * direction
        step = energy / np.maximum(_inner(direction, image), _TINY)
        solution += step * direction
        residual -= step * image
        conditioned = inverse * residual
        last, energy = energy, _inner(residual, conditioned)
        if energy.sum() <= _SOLVED**2 * first.sum():
            break
        direction = conditioned + energy / np.maximum(last, _TINY) * direction
    return solution


def _inner(left: Floats, right: Floats) -> Floats:
    return np.asarray(np.einsum("nr,nr->n", left, right)[:, None])


def _orthogonal(b: Floats, a: Floats) -> Fit:
    """The same product with orthogonal components of equal norm in both factors, largest first."""
    left, left_small = np.linalg.qr(b.T.astype(np.float64))
    right, right_small = np.linalg.qr(a.T.astype(np.float64))
    u, values, vt = np.linalg.svd(left_small @ right_small.T)
    kept = values > values[0] * 1e-12
    roots = np.sqrt(values[kept])
    b_new = np.ascontiguousarray(((left @ u[:, kept]) * roots).T, b.dtype)
    return Fit(b_new, np.ascontiguousarray(((right @ vt.T[:, kept]) * roots).T, a.dtype))


def _grown(update: RoundedUpdate, current: Fit, error: float, most: int) -> Fit:
    """``current`` with up to ``most`` components added that stand out in the slope of the likelihood.

    Where the likelihood is at its maximum in the components there are, its slope shows the missing ones free of them.
    """
    scale = np.float32(0.5 / _noise(update, current, error))
    slopes = np.empty(update.half.shape, np.float32)
    total = curvature = 0.0
    for rows in blocks_of_rows(slopes.shape):
        residual = update.middle[rows] - current.b[:, rows].T @ current.a
        slopes[rows], curved = _derivatives(residual, update.half[rows], scale)
        total += float(np.sum(np.square(slopes[rows], dtype=np.float64)))
        curvature += float(np.sum(curved, dtype=np.float64))
    factors = truncated_svd(slopes, most)
    count = _above_noise(factors.singular_values, total, slopes.shape)
    newton = np.float32(np.sqrt(slopes.size / max(curvature, 1e-30) / scale))
    b = np.concatenate([current.b, (factors.b[:count] * newton).astype(current.b.dtype)])
    return _orthogonal(b, np.concatenate([current.a, (factors.a[:count] * newton).astype(current.a.dtype)]))


def _above_noise(values: Float64, total: float, shape: tuple[int, ...]) -> int:
    """How many singular values exceed the largest of noise (Marchenko, Pastur 1967) with the remaining energy."""
    remaining = np.maximum(total - np.cumsum(np.square(values)), 0.0)
    edge = np.sqrt(remaining / (shape[0] * shape[1])) * (np.sqrt(shape[0]) + np.sqrt(shape[1]))
    return int(np.count_nonzero(np.logical_and.accumulate(values > _EDGE * edge)))
