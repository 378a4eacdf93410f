"""Integer factors whose products need every bit that they are added up in, and what torch makes of them, on any device.

Used by the tests and by `check_cuda.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from plain_checkpoint import FLOATS, NUMPY, Array

LARGEST = {"F32": 1 << 14, "F64": 1 << 30}
"""What elements of `a` reach, by accumulation type. TF32 keeps 11 bits of it and bf16 8; float32 keeps 24 of 30."""

MOST = {"F32": 1 << 24, "F64": 1 << 53}
"""What sums of products reach: up to this, the accumulation type has every integer (spec/arithmetic.md)."""


class Exact(NamedTuple):
    """`base + 2^exponent b^T a`, added up in `wide` (F32 or F64).

    Attributes:
        base: floats `[rows, columns]`, of any dtype that `wide` contains.
        a, b: integers `[rank, columns]` and `[rank, rows]`.
    """

    base: Array
    a: Array
    b: Array
    exponent: int
    wide: str


def at_the_bound(
    rank: int, shape: tuple[int, int] = (300, 400), wide: str = "F32", base: str = "BF16", seed: int = 0
) -> Exact:
    """Random factors as large as they may be; the sum of the first column and the first row is the largest allowed, if
    the rank is a power of two. The base has the size of the product, so that most additions round."""
    rng = np.random.default_rng(seed)
    limits = LARGEST[wide], MOST[wide] // (rank * LARGEST[wide])
    if limits[1] == 0:
        raise ValueError(f"rank {rank} is too large")
    a, b = (
        rng.integers(-limit, limit + 1, (rank, size), np.int32)
        for limit, size in zip(limits, (shape[1], shape[0]), strict=True)
    )
    a[:, 0], b[:, 0] = limits
    # The product has a root mean square of about 2^-4.
    exponent = -4 - round(np.log2(rank**0.5 * limits[0] * limits[1] / 3))
    values = rng.standard_normal(shape) * 2.0**-4
    return Exact(values.astype(NUMPY[base]), a, b, exponent, wide)


def by_torch(
    exact: Exact, dtype: str, device: torch.device | str = "cpu", rows: int | None = None, threads: int | None = None
) -> Array:
    """The bits, `[rows, columns]`, of the sum rounded to `dtype`: one product, one addition, one rounding, all torch's.

    Args:
        rows: as many at a time; all of them if None.
        threads: of the CPU; as many as torch has if None.
    """
    wide, narrow = (getattr(torch, FLOATS[name]) for name in (exact.wide, dtype))
    numbers = NUMPY[exact.wide]
    base, a, b = (torch.from_numpy(each.astype(numbers)).to(device) for each in (exact.base, exact.a, exact.b))
    step = rows or len(base)
    with _threads(threads):
        parts = [
            base[top : top + step] + (b[:, top : top + step].T @ a) * 2.0**exact.exponent
            for top in range(0, len(base), step)
        ]
    assert all(part.dtype == wide for part in parts)
    found: Array = torch.cat(parts).to(narrow).cpu().view(torch.uint8).numpy().view(f"u{narrow.itemsize}")
    return found


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
