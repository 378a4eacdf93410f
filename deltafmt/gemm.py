"""The matrix product of the fast path, and the conversions before and behind it.

Torch is faster than numpy at all of them and is used if it is installed. Either way spec/arithmetic.md is kept:
products and sums have full precision, in any order, and are rounded once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from .dtypes import DTYPES, Bits, Dtype, round_to, widen
from .errors import UnsupportedError
from .scratch import scratch

_ONE_AT_A_TIME = threading.RLock()


@functools.cache
def installed_torch() -> Any:
    """The torch module, or None if it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    with _SETTING:
        if _THREADS.inside and _THREADS.torch is None:
            _limit_torch()
    return torch


def add_product(into: npt.NDArray[Any], b: npt.NDArray[Any], a: npt.NDArray[Any], first: bool) -> None:
    """`into += b^T a` (or `=`, if `first`).

    Args:
        into: `[m, n]` float32 or float64, C-contiguous.
        b: `[r, m]`, a: `[r, n]`, of the same dtype.
    """
    torch = installed_torch()
    if torch is not None and _has_full_precision(torch):
        torch.from_numpy(into).addmm_(torch.from_numpy(b).T, torch.from_numpy(a), beta=0 if first else 1)
        return
    with alone():
        if first:
            np.matmul(b.T, a, out=into)
        else:
            product = scratch("product", into.dtype, into.size).reshape(into.shape)
            np.add(into, np.matmul(b.T, a, out=product), out=into)


def _has_full_precision(torch: Any) -> bool:
    """Whether torch multiplies float32 as they are; if not, it may round the operands to TF32 or bf16 first."""
    try:
        return bool(torch.get_float32_matmul_precision() == "highest")
    except RuntimeError:  # somebody has set it per backend, where torch has a newer interface for that
        return False


def round_wide(values: npt.NDArray[Any], target: Dtype, out: Bits, exact: bool = True) -> None:
    """Round what was computed in the accumulation type, `[m]`, to bits of `target`, `[m]`.

    `dtypes.round_to`, four times as fast for bf16 where torch is installed and rounds exactly so. A NaN has no sign;
    unless `exact`, any NaN will do.
    """
    torch = installed_torch()
    has_torch = torch is not None and target.name == "BF16" and values.dtype == np.float32 and _torch_rounds_to_bf16()
    if not has_torch or (exact and np.isnan(values.min(initial=0))):  # a NaN is the minimum of whatever it is in
        round_to(values, target, out, signed_nan=False)
        return
    torch.from_numpy(out.view(np.int16)).view(torch.bfloat16).copy_(torch.from_numpy(values))


def widen_into(bits: Bits, source: Dtype, out: npt.NDArray[Any]) -> None:
    """`dtypes.widen` into `out`, in one pass from bf16 to float32 where torch is installed."""
    torch = installed_torch() if source.name == "BF16" and out.dtype == np.float32 else None
    if torch is None:
        widen(bits, source, out.dtype, out)
    else:
        torch.from_numpy(out).copy_(torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16))


@functools.cache
def _torch_rounds_to_bf16() -> bool:
    """Whether torch's cast is ours on every exponent, ties and subnormals included; some processors' own is not."""
    torch = installed_torch()
    tails = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    probe = (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | tails).reshape(-1).view(np.float32)
    probe = probe[~np.isnan(probe)]
    rounded = torch.from_numpy(probe).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return bool(np.array_equal(rounded, round_to(probe, DTYPES["BF16"])))


def check_subnormals() -> None:
    """Raise `UnsupportedError` where this thread flushes subnormal numbers to zero: exact values would be others."""
    if _LEAST_NORMAL * np.float32(0.5) == 0:
        raise UnsupportedError(
            "this process flushes subnormal numbers to zero, and values would be wrong",
            hint="Switch that off, in torch with torch.set_flush_denormal(False)",
        )


_LEAST_NORMAL = np.finfo(np.float32).tiny


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Have numpy's BLAS and torch use one thread for each of ours: a pool of ours keeps every core busy already.

    Both settings are the process's: whoever comes first changes them, whoever leaves last puts them back.
    """
    with _SETTING:
        if _THREADS.inside == 0:
            _THREADS.blas = threadpool_limits(1, user_api="blas")
            if hasattr(sys.modules.get("torch"), "set_num_threads"):  # else it is being imported: see installed_torch
                _limit_torch()
        _THREADS.inside += 1
    try:
        yield
    finally:
        with _SETTING:
            _THREADS.inside -= 1
            if _THREADS.inside == 0:
                _THREADS.blas.restore_original_limits()
                if _THREADS.torch is not None:
                    sys.modules["torch"].set_num_threads(_THREADS.torch)
                    _THREADS.torch = None


def alone() -> contextlib.AbstractContextManager[Any]:
    """For products of numpy: one at a time, unless each has a thread of its own. They get in each other's way."""
    return contextlib.nullcontext() if _THREADS.inside else _ONE_AT_A_TIME


class _Threads:
    """What `one_thread_each` changed: how many are inside it, and what was set before."""

    inside = 0
    blas: Any = None
    torch: int | None = None


def _limit_torch() -> None:
    torch = sys.modules["torch"]
    _THREADS.torch = torch.get_num_threads()
    torch.set_num_threads(1)


_SETTING = threading.Lock()
_THREADS = _Threads()
