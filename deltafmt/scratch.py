"""Buffers that a thread uses again and again: fresh pages cost more than the arithmetic done on them."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, npt.NDArray[np.uint8]] = {}


_SCRATCH = _Scratch()


def scratch(purpose: str, dtype: npt.DTypeLike, count: int) -> npt.NDArray[Any]:
    """A flat array of `count` elements, this thread's own, valid until the thread asks for the same purpose again."""
    kind = np.dtype(dtype)
    size = count * kind.itemsize
    buffer = _SCRATCH.buffers.get(purpose)
    if buffer is None or buffer.nbytes < size:
        buffer = _SCRATCH.buffers[purpose] = np.empty(size, np.uint8)
    return buffer[:size].view(kind)
