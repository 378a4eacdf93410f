"""What works on bit patterns: `patch` (spec/operators/patch.md): the order of floats, zigzag, groups; `decayed`."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from conformance.manifest import FLOATS, SIGNED_SMALL_FLOATS, WIDTH
from conformance.numbers import Bits, Floats, convert, unsigned

Keys = npt.NDArray[np.int64]


def unzigzag(r: Bits) -> Bits:
    """The difference modulo ``2^w`` that a residual stands for."""
    one = np.array(1, r.dtype)
    return (r >> one) ^ (~(r & one) + one)


def correct(dtype: str, p: Bits, d: Bits) -> bytes:
    """The patterns ``d`` steps from ``p``, in the order of the numbers that they stand for."""
    width = WIDTH[dtype]
    if dtype not in FLOATS and dtype not in SIGNED_SMALL_FLOATS:
        return bytes(p + d)
    top, ones = (np.array(x, f"<u{width}") for x in (1 << (8 * width - 1), (1 << 8 * width) - 1))
    ordered = np.where(p & top, p ^ ones, p ^ top) + d
    return bytes(np.where(ordered & top, ordered ^ top, ordered ^ ones).astype(f"<u{width}"))


def exponents(dtype: str, p: Bits) -> Keys:
    """The keys of groups by exponent: the exponent fields of the converted prediction."""
    exponent_bits, mantissa_bits = FLOATS[dtype]
    fields = p.astype(np.uint64) >> np.uint64(mantissa_bits) & np.uint64((1 << exponent_bits) - 1)
    return fields.astype(np.int64)


def margins(dtype: str, prediction: Floats) -> tuple[Keys, npt.NDArray[np.bool_]]:
    """The keys of groups by margin, and which differences are stored with the other sign."""
    accumulator = "F64" if prediction.dtype.itemsize == 8 else "F32"
    mantissa_bits = FLOATS[accumulator][1]
    u = unsigned(convert(accumulator, prediction, signed_nan=False), WIDTH[accumulator])
    n = mantissa_bits - FLOATS[dtype][1]
    m = u >> np.array(n, u.dtype) << np.array(n, u.dtype) | np.array(1 << n - 1, u.dtype)
    with np.errstate(invalid="ignore"):  # NaNs, also for infinities
        t = u.view(prediction.dtype) - m.view(prediction.dtype)
    return exponents(accumulator, t.view(u.dtype)), t < 0


def ungroup(d: npt.NDArray[Any], key: Keys, bounds: list[int], chunk: int) -> npt.NDArray[Any]:
    """What is stored chunk by chunk in the order of groups, in the order of elements."""
    group = [sum(bound <= k for bound in bounds) for k in key.tolist()]
    ordered = np.empty_like(d)
    for begin, end in pairwise([*range(0, len(d), chunk), len(d)]):
        places = sorted(range(begin, end), key=group.__getitem__)  # stable: by flat index within a group
        ordered[places] = d[begin:end]
    return ordered


def decay(dtype: str, x: Bits, table: Bits) -> bytes:
    """The patterns ``x``, each moved by the step of its mantissa (operators/decayed.md)."""
    exponent_bits, mantissa_bits = FLOATS[dtype]
    top = 1 << exponent_bits + mantissa_bits
    row = len(table) // 2
    bounds, steps = (list(accumulate(part.tolist())) for part in (table[:row], table[row:]))  # of any size
    value = []
    for pattern in x.tolist():
        u = pattern % top
        exponent, mantissa = divmod(u, 1 << mantissa_bits)
        reached = bisect_right(bounds, mantissa)
        if reached and 0 < exponent < (1 << exponent_bits) - 1:
            value.append(pattern - u + (u - steps[reached - 1] % 2**32) % top)
        else:
            value.append(pattern)
    return np.array(value, x.dtype).tobytes()
