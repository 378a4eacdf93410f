"""A cheap look at a small part of a tensor: whether it is worth looking for what a merge left."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..dtypes import SILENT, Bits, Dtype, widen
from ..gemm import alone
from ..operators.groups import exponent_mask, exponents
from .matrices import Matrix, spread

_SIDES = {1 << 20: 192, 1 << 22: 256, 1 << 24: 384}  # of the part looked at: of matrices with fewer elements than that
_LARGE_SIDE = 512  # and of larger ones
_CLOSE_SIDE = 640  # more than twice the largest rank that is looked for (`recovery`)
_WORTH_A_LOOK = 3  # sides: in a smaller matrix no rank that pays is much larger than half of one
_LITTLE = 0.02  # of the energy: a difference of full rank leaves more
_COMPONENTS = 2  # one in so many components of the part may be signal; the others must be noise
_TOLERANCE = 2.4  # times as much noise as rounding makes there may be: what was rounded twice has twice as much
_PRODUCT = 2.0**-46  # the squared relative error of a sum of products in float32


class Remainder(NamedTuple):
    """What the larger half of the components of a difference leaves."""

    is_noise: bool
    """Whether it is no more than rounding leaves."""
    share: float
    """Of the energy of the difference; 1 where it is not known: of what is not finite, or no larger than noise."""


def leaves_noise(base: Matrix, bits: Matrix, dtype: Dtype) -> bool:
    """Whether few components of the difference leave no more than rounding does; see `remainder`."""
    return looked_at_closely(remainder(base, bits, dtype, side_of_part(bits.shape)), base, bits, dtype).is_noise


def looked_at_closely(left: Remainder, base: Matrix, bits: Matrix, dtype: Dtype) -> Remainder:
    """The same by a larger part, if that finds noise: of a rank above half of the side, little is left, yet more."""
    if left.is_noise or left.share >= _LITTLE or min(bits.shape) <= _WORTH_A_LOOK * side_of_part(bits.shape):
        return left
    closer = remainder(base, bits, dtype, _CLOSE_SIDE)
    return closer if closer.is_noise else left


def side_of_part(shape: tuple[int, ...]) -> int:
    """How many rows and columns of a matrix are looked at, unless there are fewer."""
    return next((side for elements, side in _SIDES.items() if math.prod(shape) < elements), _LARGE_SIDE)


def remainder(base: Matrix, bits: Matrix, dtype: Dtype, side: int) -> Remainder:
    """What few components of the difference leave, judged by a part of it.

    The squared singular values of rounding noise add up to its energy; with the larger half of the components taken
    away, at most a quarter of it is left. A difference of full rank, as training all weights makes, leaves more: of one
    that is noise alone, a tenth. A change no larger than rounding noise cannot be judged: then it is noise, if
    there is any.

    Args:
        base: `[rows, columns]`; where it is not finite, there is no noise, and the share is 1.
        bits: `[rows, columns]`, of `dtype`.
        side: so many rows and columns are looked at; that finds merges of a rank below half of it.
    """
    part = np.ix_(*(spread(length, side) for length in bits.shape))
    stored = widen(bits[part], dtype, np.dtype("f8"))
    with np.errstate(**SILENT):
        difference = stored - base[part]
    total = float(np.sum(np.square(difference)))
    noise = _rounding_noise(bits[part], dtype) + _PRODUCT * total
    if not np.isfinite(total):
        return Remainder(False, 1.0)
    if total <= noise:  # weights that start on the grid do not move at all if they move by less than half a step
        return Remainder(total > 0, 1.0)
    short = difference if difference.shape[0] <= difference.shape[1] else difference.T
    with alone():
        energies = np.linalg.eigvalsh(short @ short.T)  # ascending
    kept = len(energies) - len(energies) // _COMPONENTS
    left = float(energies[:kept].sum())
    return Remainder(left <= _TOLERANCE * noise * (1 - 1 / _COMPONENTS) ** 2, left / total)


def _rounding_noise(bits: Bits, dtype: Dtype) -> float:
    """The energy that rounding to these elements is expected to leave: a twelfth of the square of each last place."""
    counts = np.bincount(exponents(bits.reshape(-1), dtype))
    exponent = np.maximum(np.arange(len(counts)), 1) - exponent_mask(dtype) // 2 - dtype.mantissa_bits
    return float(counts @ np.ldexp(1 / 12, 2 * exponent))
