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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import Bits, Dtype, widen
from .svd import Float32, Float64, truncated_svd

Floats = npt.NDArray[Any]  # float32, or float64 where the tensor is float32 itself

_BLOCK_ROWS = 256
_BLOCK_ELEMENTS = 1 << 20
_SAMPLE = 1 << 18  # elements that the error is estimated on
_PASSES = 8
_WORTHWHILE = 0.8  # a pass that leaves more than this of the error is the last
_CAUTION = 1.3  # s beside the estimated error: Newton's steps overshoot where s is too small
_SOFT = 0.1  # s of the first step at least, in half ulps
_EDGE = 1.05  # how far above the largest singular value expected of noise a component must be
_DROP = 1.15  # from one singular value to the next: more than noise has
_FIRST_RANK = 24  # components looked for at first; if these are not enough, all there may be
_GROWTH = 16  # components added at a time


@dataclass(frozen=True)
class Fit:
    """A prediction ``b.T @ a``, component-major, largest first, of a `RoundedUpdate` in its unit."""

    b: Floats
    a: Floats

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class RoundedUpdate:
    """An update [out, in] as rounding left it: each element within ``half`` of ``middle``, in units of 2**exponent.

    ``middle`` is float32, or float64 for a float32 tensor; ``half`` is float32. The unit is near the typical ulp.
    """

    middle: Floats
    half: Float32
    exponent: int

    @property
    def typical_half(self) -> float:
        """The median of ``half``."""
        return float(np.median(self.half[:: self._step]))

    def error(self, fit: Fit) -> float:
        """The standard deviation of a prediction's error, judged by how often it leaves an interval, and how far.

        An error e carries a prediction out of an interval of width q with probability |e| / q while |e| < q.
        """
        half = self.half[:: self._step]
        outside = np.abs(self.middle[:: self._step] - fit.b[:, :: self._step].T @ fit.a) - half
        wide = half >= np.median(half)
        by_count = np.count_nonzero(outside[wide] > 0) / float(np.sum(0.5 / half[wide], dtype=np.float64))
        by_distance = float(np.mean(np.maximum(outside, 0), dtype=np.float64))
        return 1.25 * max(by_count, by_distance)  # E|e| = 0.8 of the standard deviation

    @property
    def _step(self) -> int:
        """Between the rows of an evenly spread sample."""
        return max(1, -(-self.half.size // _SAMPLE))


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of rows that keep temporaries small."""
    step = max(1, min(_BLOCK_ROWS, _BLOCK_ELEMENTS // max(1, shape[1])))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def rounded_update(base: Floats, target: Bits, dtype: Dtype) -> RoundedUpdate:
    """What ``target`` (bits of ``dtype``, [out, in]) says of its difference from ``base`` (values, same shape).

    Below a power of two the interval is taken twice as wide as it is: a weaker claim, for one element in 2**mantissa.
    """
    middle = np.empty(base.shape, base.dtype)
    half = np.empty(base.shape, np.float32)
    exponents = dtype.bits.type(((1 << (8 * dtype.width - 1)) - 1) & ~((1 << dtype.mantissa_bits) - 1))
    normal = dtype.bits.type(1 << dtype.mantissa_bits)
    exponent = 0
    for rows in row_blocks(base.shape):
        bits = np.ascontiguousarray(target[rows])
        powers = widen(np.maximum(bits & exponents, normal), dtype, base.dtype)
        if rows.start == 0:
            exponent = int(np.frexp(np.median(powers))[1]) - 1 - dtype.mantissa_bits
        with np.errstate(over="ignore", under="ignore"):  # weights 2**60 ulps from the typical say nothing more
            difference = widen(bits, dtype, base.dtype)
            difference -= base[rows]
            np.clip(_scaled(difference, -exponent), -(2.0**40), 2.0**40, out=middle[rows])
            np.clip(_scaled(powers, -exponent - dtype.mantissa_bits - 1), 2.0**-40, 2.0**40, out=half[rows])
    return RoundedUpdate(middle, half, exponent)


def _scaled(values: Floats, exponent: int) -> Floats:
    """``values`` times 2**exponent, in place: in two steps, for the power itself may be out of range."""
    values *= values.dtype.type(2.0 ** (exponent // 2))
    values *= values.dtype.type(2.0 ** (exponent - exponent // 2))
    return values


def svd_start(update: RoundedUpdate, most: int) -> Fit:
    """The components of the middles that stand out from noise, ``most`` at most."""
    middle = update.middle.astype(np.float32, copy=False)
    total = sum(float(np.sum(np.square(middle[rows], dtype=np.float64))) for rows in row_blocks(middle.shape))
    for limit in (min(most, _FIRST_RANK), most):
        factors = truncated_svd(middle, limit)
        count = _above_noise(factors.singular_values, total, middle.shape)
        if count < limit:
            break
    else:  # an update below the ulps leaves no even noise; its components end with a drop all the same
        drops = factors.singular_values[:-1] > _DROP * factors.singular_values[1:]
        count = int(np.flatnonzero(drops)[-1]) + 1 if drops.any() else count
    return Fit(factors.b[:count].astype(update.middle.dtype), factors.a[:count].astype(update.middle.dtype))


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


def _refined(update: RoundedUpdate, start: Fit, passes: int) -> tuple[Fit, float]:
    """The best of ``start`` and what up to ``passes`` Newton steps make of it, and its error."""
    best, current, least = start, start, update.error(start)
    for _ in range(passes):
        current = _orthogonal(*_newton(update, current, _noise(update, current, least)))
        error = update.error(current)
        if not error < least:
            break
        progress, best, least = error / least, current, error
        if progress > _WORTHWHILE:
            break
    return best, least


def _noise(update: RoundedUpdate, current: Fit, error: float) -> float:
    """The scale s of the next step: near the error, but no less than what the intervals can tell apart."""
    out, in_ = update.middle.shape
    floor = update.typical_half * current.rank * float(1 / out + 1 / in_)
    return max(_CAUTION * error, floor)


def _newton(update: RoundedUpdate, current: Fit, s: float) -> tuple[Floats, Floats]:
    """One Newton step for ``b`` with ``a`` held, then one for ``a`` with the new ``b``, in one pass over the rows.

    With u, l = tanh of the distances to the interval's ends over 2 s, an element's log-likelihood has the slope
    (u + l) / 2s and the curvature (2 - u^2 - l^2) / 4s^2; the pass carries 2s and 4s^2 outside the sums. A Gaussian
    prior of each component's own size keeps rows that hold no information at rest.
    """
    b, a = current.b.copy(), current.a
    rank = current.rank
    pairs = np.triu_indices(rank)
    right = a.astype(np.float32)
    right_pairs = np.ascontiguousarray((right[pairs[0]] * right[pairs[1]]).T)
    normal = np.zeros((a.shape[1], len(pairs[0])), np.float32)
    slope = np.zeros((a.shape[1], rank), np.float32)
    scale = np.float32(0.5 / s)
    prior_b = (2 * s) ** 2 / np.mean(np.square(b, dtype=np.float64), axis=1)
    prior_a = (2 * s) ** 2 / np.mean(np.square(a, dtype=np.float64), axis=1)
    for rows in row_blocks(update.middle.shape):
        gradient, curvature = _derivatives(update.middle[rows] - b[:, rows].T @ a, update.half[rows], scale)
        pull = gradient @ right.T - b[:, rows].T * (prior_b * scale)
        move = _solved(curvature @ right_pairs, pull, prior_b).T / scale
        b[:, rows] += move
        gradient -= curvature * ((move.astype(np.float32) * scale).T @ right)
        left = b[:, rows].astype(np.float32)
        normal += curvature.T @ np.ascontiguousarray((left[pairs[0]] * left[pairs[1]]).T)
        slope += gradient.T @ left.T
    pull = slope - a.T * (prior_a * scale)
    return b, a + (_solved(normal, pull, prior_a).T / scale).astype(a.dtype)


def _derivatives(residual: Floats, half: Float32, scale: np.float32) -> tuple[Float32, Float32]:
    """Slope and curvature of the log-likelihood in units of ``scale`` and its square."""
    narrow = residual.astype(np.float32, copy=False)
    upper = np.add(narrow, half)
    upper *= scale
    np.tanh(upper, out=upper)
    lower = np.subtract(narrow, half)
    lower *= scale
    np.tanh(lower, out=lower)
    gradient = upper + lower
    upper *= upper
    lower *= lower
    upper += lower
    return gradient, np.subtract(np.float32(2), upper, out=upper)


def _solved(normal: Float32, right: Floats, ridge: Float64) -> Float64:
    """The solutions [n, r] of n symmetric systems, given as their upper triangles [n, r (r + 1) / 2]."""
    rank = len(ridge)
    upper, lower = np.triu_indices(rank)
    diagonal = np.arange(rank)
    solutions = np.empty(right.shape)
    for start in range(0, len(right), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        systems = np.empty((len(right[rows]), rank, rank))
        systems[:, upper, lower] = systems[:, lower, upper] = normal[rows]
        systems[:, diagonal, diagonal] += ridge
        unit = 1 / np.sqrt(systems[:, diagonal, diagonal])  # Jacobi scaling: the sums are float32
        systems *= unit[:, :, None] * unit[:, None, :]
        systems[:, diagonal, diagonal] += 1e-6
        solutions[rows] = np.linalg.solve(systems, (right[rows] * unit)[..., None])[..., 0] * unit
    return solutions


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
    for rows in row_blocks(slopes.shape):
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
