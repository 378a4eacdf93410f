"""Moving floats by whole numbers of steps (steps.c)."""

from __future__ import annotations

import numpy as np

from ..dtypes import Bits
from .library import Words, call, require


class Steps:
    """By how many last places elements move: by `steps[i]` if their mantissa is not below `i` of the bounds.

    Args:
        bounds: ascending.
        steps: one more than these.
    """

    def __init__(self, bounds: Words, steps: Words, mantissa_bits: int) -> None:
        require(bounds.dtype == steps.dtype == np.uint32 and bounds.size + 1 == steps.size and 7 <= mantissa_bits <= 23)
        require(bool((bounds[:-1] <= bounds[1:]).all()))
        self.bounds, self.steps, self.mantissa_bits = bounds, steps, mantissa_bits
        self.shift = max(mantissa_bits - 12, 0)
        places = np.arange((1 << (mantissa_bits - self.shift)) + 1, dtype=np.uint32) << self.shift
        self.first = np.searchsorted(bounds, places, side="right").astype(np.uint32)


def move_by_steps(steps: Steps, bits: Bits) -> None:
    """Move floats of two bytes or four, `[m]`, in place, but for zeros, subnormals and what is not finite."""
    require(steps.mantissa_bits < 8 * bits.itemsize - 1)
    known = steps.bounds, steps.steps, steps.first, steps.shift, steps.mantissa_bits
    call(f"move_by_steps_{bits.itemsize}", *known, bits.size, bits)
