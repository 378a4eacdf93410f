"""The matrix product of the fast path, and the conversions before and behind it.

The kernels do it where they are built, numpy elsewhere. Either way spec/arithmetic.md is kept: products and sums have
full precision, in any order, and are rounded once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from . import native
from .dtypes import Bits, Dtype, round_to, widen
from .errors import UnsupportedError
from .process import Setting
from .scratch import borrowed

Wide = npt.NDArray[Any]  # float32 or float64


class Product:
    """`B^T A`, formed for any part of it. Every part is a product by itself, whatever it is added to.

    Args:
        a: `[r, n]`, b: `[r, m]`, both float32 or both float64, C-contiguous. They are copied.
    """

    def __init__(self, a: Wide, b: Wide) -> None:
        self.rank, self._columns, self._rows = len(a), a.shape[1], b.shape[1]
        self.has_kernel = native.available() and a.dtype == np.float32
        if self.has_kernel:
            self._a, self._b = native.packed_a(a), native.packed_b(b)
        else:
            self._a, self._b = a.copy(), b.copy()

    def add(self, into: Wide, top: int, left: int, first: bool) -> None:
        """Add to `into`, `[rows, columns]`, what begins at row `top` and column `left`; or set it, if `first`."""
        rows, columns = into.shape
        if not self.has_kernel:
            with alone(), borrowed(into.dtype, into.size) as flat:
                product = np.matmul(
                    self._b[:, top : top + rows].T, self._a[:, left : left + columns], out=flat.reshape(into.shape)
                )
                product += 0.0  # a sum of zeros is +0 (spec/arithmetic.md), and -0 in some BLAS
                np.copyto(into, product) if first else np.add(into, product, out=into)
        elif left == 0 and columns == self._columns:
            native.product(into, top, self._a, self._b, first)
        else:
            begin = left // native.TILE_COLUMNS
            before = left - begin * native.TILE_COLUMNS
            some = self._a[begin : -(-(left + columns) // native.TILE_COLUMNS)]
            with borrowed(into.dtype, rows * (before + columns)) as flat:
                product = flat.reshape(rows, -1)
                native.product(product, top, some, self._b, first=True)
                np.copyto(into, product[:, before:]) if first else np.add(into, product[:, before:], out=into)

    def onto_bf16(self, top: int, rows: int) -> OntoBf16 | None:
        """What adds whole rows to bf16 values in one pass; None where there is no kernel for it."""
        return OntoBf16(self._a, self._b, top, (rows, self._columns)) if self.has_kernel else None

    def components(self) -> Iterator[tuple[Wide, Wide]]:
        """The rows of `a` and `b`."""
        for k in range(self.rank):
            if self.has_kernel:
                yield native.component(self._a, k)[: self._columns], native.component(self._b, k)[: self._rows]
            else:
                yield self._a[k], self._b[k]


class OntoBf16(NamedTuple):
    """Some rows of a product, to be added to bf16 values, in float32."""

    a: Wide
    b: Wide
    top: int
    shape: tuple[int, int]

    def add(self, bits: Bits) -> None:
        """In place, rounded; `[m]`. A NaN has no sign."""
        native.product_in_bf16(bits.reshape(self.shape), self.top, self.a, self.b)

    def add_with_margins(self, bits: Bits, groups: native.Bounds, numbers: Any, up: Any) -> None:
        """As `add`; and the groups of the sums by their margin, as `native.margin_groups` gives them; all `[m]`."""
        native.product_with_margins(bits.reshape(self.shape), self.top, self.a, self.b, groups, numbers, up)

    def add_into(self, bits: Bits, into: Wide) -> None:
        """The sum, not rounded, into `into`; both `[m]`."""
        native.product_onto_bf16(bits.reshape(self.shape), into.reshape(self.shape), self.top, self.a, self.b)


def round_wide(values: Wide, target: Dtype, out: Bits) -> None:
    """Round what was computed in the accumulation type, `[m]`, to bits of `target`, `[m]`; a NaN has no sign."""
    if target.name == "BF16" and values.dtype == np.float32 and native.available():
        native.round_bf16(values, out)
    else:
        round_to(values, target, out, signed_nan=False)


def widen_into(bits: Bits, source: Dtype, out: Wide) -> None:
    """`dtypes.widen` into `out`, in one pass from bf16 to float32."""
    if source.name == "BF16" and out.dtype == np.float32 and native.available():
        native.widen_bf16(bits, out)
    else:
        widen(bits, source, out.dtype, out)


def check_subnormals() -> None:
    """Raise `UnsupportedError` where this thread flushes subnormal numbers to zero: exact values would be others."""
    if _LEAST_NORMAL * np.float32(0.5) == 0:
        raise UnsupportedError(
            "this process flushes subnormal numbers to zero, and values would be wrong",
            hint="Switch that off, in torch with torch.set_flush_denormal(False)",
        )


_LEAST_NORMAL = np.finfo(np.float32).tiny


def one_thread_each() -> contextlib.AbstractContextManager[None]:
    """Have numpy's BLAS use one thread for each of ours: a pool of ours keeps every core busy already."""
    return _ONE_THREAD.changed()


def alone() -> contextlib.AbstractContextManager[Any]:
    """For products of numpy: one at a time, unless each has a thread of its own. They get in each other's way."""
    return contextlib.nullcontext() if _ONE_THREAD.is_changed else _ONE_AT_A_TIME


_ONE_THREAD = Setting(lambda: threadpool_limits(1, user_api="blas").restore_original_limits)
_ONE_AT_A_TIME = threading.RLock()
