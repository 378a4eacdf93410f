"""The one matrix product of the fast path.

Torch's is about twice as fast as numpy's here and is used if it is installed; both keep the bound of spec/arithmetic.md
(full-precision products and sums, in any order).
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from .scratch import scratch

_ONE_AT_A_TIME = threading.Lock()  # a product uses every core by itself; two at once get in each other's way


@functools.cache
def installed_torch() -> Any:
    """The torch module, or None if it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch


def add_product(into: npt.NDArray[Any], b: npt.NDArray[Any], a: npt.NDArray[Any], first: bool) -> None:
    """`into += b^T a` (or `=`, if `first`).

    Args:
        into: `[m, n]` float32 or float64, C-contiguous.
        b: `[r, m]`, a: `[r, n]`, of the same dtype.
    """
    torch = installed_torch()
    with _ONE_AT_A_TIME:
        if torch is not None:
            torch.from_numpy(into).addmm_(torch.from_numpy(b).T, torch.from_numpy(a), beta=0 if first else 1)
        elif first:
            np.matmul(b.T, a, out=into)
        else:
            product = scratch("product", into.dtype, into.size).reshape(into.shape)
            np.add(into, np.matmul(b.T, a, out=product), out=into)
