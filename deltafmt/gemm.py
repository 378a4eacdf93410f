"""The matrix product of the fast path, and the rounding that follows it.

Torch is faster than numpy at both and is used if it is installed; either way the bound of spec/arithmetic.md is kept:
full-precision products and sums, in any order, rounded once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .dtypes import DTYPES, Bits, Dtype, round_to
from .scratch import scratch

_ONE_AT_A_TIME = threading.Lock()  # numpy's BLAS uses every core; two products at once get in each other's way


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
    if torch is not None and torch.get_float32_matmul_precision() == "highest":  # else it may round the operands
        torch.from_numpy(into).addmm_(torch.from_numpy(b).T, torch.from_numpy(a), beta=0 if first else 1)
        return
    with _ONE_AT_A_TIME:
        if first:
            np.matmul(b.T, a, out=into)
        else:
            product = scratch("product", into.dtype, into.size).reshape(into.shape)
            np.add(into, np.matmul(b.T, a, out=product), out=into)


def round_wide(values: npt.NDArray[Any], target: Dtype, out: Bits) -> None:
    """`dtypes.round_to`, four times as fast for bf16 where torch is installed and rounds exactly so."""
    torch = installed_torch()
    if torch is None or target.name != "BF16" or values.dtype != np.float32 or not _torch_rounds_to_bf16():
        round_to(values, target, out)
        return
    if np.isnan(values.min(initial=0)):
        round_to(values, target, out)
        return
    torch.from_numpy(out.view(np.int16)).view(torch.bfloat16).copy_(torch.from_numpy(values))


@functools.cache
def _torch_rounds_to_bf16() -> bool:
    """Whether torch's cast is ours on every exponent, ties and subnormals included; some processors' own is not."""
    torch = installed_torch()
    tails = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    probe = (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | tails).reshape(-1).view(np.float32)
    probe = probe[~np.isnan(probe)]
    rounded = torch.from_numpy(probe).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return bool(np.array_equal(rounded, round_to(probe, DTYPES["BF16"])))


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Have torch use one thread for each of ours: a pool of ours keeps every core busy already.

    Torch's setting is the process's: whoever leaves last puts it back to what the first found.
    """
    torch = installed_torch()
    if torch is None:
        yield
        return
    with _SETTING:
        _FOUND.append(torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _SETTING:
            torch.set_num_threads(_FOUND.pop())


_SETTING = threading.Lock()
_FOUND: list[int] = []  # by each caller inside; all but the first found 1
