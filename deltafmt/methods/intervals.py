"""What a rounded number says of the number before: the interval that rounds to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import Bits, Dtype, widen

Wide = npt.NDArray[Any]  # float32 or float64


def interval(bits: Bits, dtype: Dtype) -> tuple[Wide, Wide]:
    """The midpoints `(low, high)` between each finite number and its two neighbours, exact.

    Args:
        bits: `[m]`, finite numbers.
        dtype: BF16, F16 (midpoints are float32) or F32 (float64).
    """
    wide = np.dtype("f8" if dtype.width == 4 else "f4")
    top = bits.dtype.type(1 << (8 * dtype.width - 1))
    magnitude = bits & ~top
    below = np.where(magnitude == 0, top | bits.dtype.type(1), magnitude - bits.dtype.type(1))  # zero's is negative
    here = widen(magnitude, dtype, wide)
    near = here - (here - widen(below, dtype, wide)) / 2
    far = _above(magnitude, here, dtype)
    negative = (bits & top) != 0
    return np.where(negative, -far, near), np.where(negative, -near, far)


def _above(magnitude: Bits, here: Wide, dtype: Dtype) -> Wide:
    """The midpoint to the neighbour of greater magnitude; beyond the largest number as far as below it."""
    one = magnitude.dtype.type(1)
    gap = widen(magnitude + one, dtype, here.dtype) - here
    last = here - widen(np.maximum(magnitude, one) - one, dtype, here.dtype)
    return here + np.where(np.isfinite(gap), gap, last) / 2
