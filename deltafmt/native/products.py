"""Low-rank products, their operands in panels, and bf16 there and back (product.c)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import Bits
from ..scratch import aligned
from .groups import Bounds
from .library import Bools, Float32, Numbers, call, require

TILE_ROWS, TILE_COLUMNS = 4, 48  # as in product.c, and that the even columns have a panel and the odd ones


def packed_a(factor: Float32) -> Float32:
    """A factor `[r, n]` as `[n / TILE_COLUMNS, 2, r, TILE_COLUMNS / 2]`, even and odd columns, padded with zeros."""
    return _panels("pack_a", factor, TILE_COLUMNS, 2)


def packed_b(factor: Float32) -> Float32:
    """A factor `[r, m]` as `[m / TILE_ROWS, 1, r, TILE_ROWS]`, padded with zeros."""
    return _panels("pack_b", factor, TILE_ROWS, 1)


def _panels(kernel: str, factor: Float32, columns: int, apart: int) -> Float32:
    rank, count = factor.shape
    require(factor.dtype == np.float32)
    groups = -(-count // columns)
    packed = aligned(np.float32, groups * rank * columns).reshape(groups, apart, rank, columns // apart)
    call(kernel, factor, rank, count, packed)
    return packed


def component(panels: Float32, k: int) -> Float32:
    """Row `k` of a factor that is in panels, with the zeros behind it."""
    return panels[:, :, k].swapaxes(1, 2).reshape(-1)


def product(into: Float32, top: int, a: Float32, b: Float32, first: bool) -> None:
    """`into += B^T A` for some rows (or `=`, if `first`): each sum is formed by itself, then added.

    Args:
        into: `[m, n]`, row `top` of the product and those below it.
        a: `packed_a(A)`, b: `packed_b(B)`.
    """
    _check_product(into, 4, top, a, b)
    rows, columns = into.shape
    call("set_product" if first else "add_product", into, top, top + rows, columns, a.shape[2], a, b)


def product_in_bf16(bits: Bits, top: int, a: Float32, b: Float32) -> None:
    """Add `product` to bf16 values, `[m, n]`, widened before and rounded behind it; a NaN has no sign."""
    _check_product(bits, 2, top, a, b)
    rows, columns = bits.shape
    call("add_product_in_bf16", bits, top, top + rows, columns, a.shape[2], a, b)


def product_onto_bf16(bits: Bits, into: Float32, top: int, a: Float32, b: Float32) -> None:
    """`product` onto bf16 values, `[m, n]`, widened: the sum in `into`."""
    _check_product(into, 4, top, a, b)
    require((bits.shape, bits.itemsize) == (into.shape, 2))
    rows, columns = into.shape
    call("add_product_onto_bf16", bits, into, top, top + rows, columns, a.shape[2], a, b)


def product_with_margins(bits: Bits, top: int, a: Float32, b: Float32, groups: Bounds, out: Numbers, up: Bools) -> None:
    """`product_in_bf16` and `margin_groups` of what is rounded in it, in one pass; all `[m, n]` or `[m * n]`."""
    _check_product(bits, 2, top, a, b)
    require(bits.size == out.size == up.size)
    require(out.itemsize == up.itemsize == 1)
    rows, columns = bits.shape
    call("add_product_with_margins", bits, top, top + rows, columns, a.shape[2], a, b, *groups.told, out, up)


def _check_product(into: npt.NDArray[Any], width: int, top: int, a: Float32, b: Float32) -> None:
    rows, columns = into.shape
    require(into.dtype == (np.float32 if width == 4 else np.uint16) and into.flags.writeable)
    require(a.dtype == b.dtype == np.float32)
    require(a.shape == (-(-columns // TILE_COLUMNS), 2, a.shape[2], TILE_COLUMNS // 2))
    require(b.shape[1:] == (1, a.shape[2], TILE_ROWS) and a.shape[2] > 0)
    require(0 <= top <= top + rows <= TILE_ROWS * len(b))


def widen_bf16(bits: Bits, out: Float32) -> None:
    """bf16 to float32, `[m]`."""
    require(bits.size == out.size)
    require((bits.itemsize, out.itemsize) == (2, 4))
    call("widen_bf16", bits, bits.size, out)


def round_bf16(values: Float32, out: Bits) -> None:
    """float32 to bf16, `[m]`: to nearest, ties to even; a NaN has no sign."""
    require(values.size == out.size)
    require((values.itemsize, out.itemsize) == (4, 2))
    call("round_bf16", values, values.size, out)
