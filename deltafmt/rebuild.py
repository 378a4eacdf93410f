"""A tensor's recipe, bound to data.

The fast path, block by block, and the ordered reference that it must agree with (spec/arithmetic.md).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .dtypes import SILENT, Bits, Dtype, Shape, round_to
from .encodings import choose_chunk
from .gemm import check_subnormals, round_wide
from .operators import Operator, Panels, Ref, Rows, Scope, Source, Stored, Target
from .operators.base import ReadValue, Rectangle
from .pipeline import Pool
from .scratch import borrowed

_MOVING = (Stored, Ref, Rows, Panels)  # bits; the others may compute
_PIECE_ELEMENTS = 1 << 19
_BLOCK_ELEMENTS = 1 << 20  # in float32 4 MiB: stays in the cache, and a product is worth the time to begin it


def good_step(shape: Shape, width: int, elements: int) -> int:
    """About `elements` of a tensor, as whole rows and whole chunks as a writer cuts them: a good unit of work."""
    row = shape[-1] if len(shape) > 1 else 1
    chunk = choose_chunk(shape, width)
    return max(elements // chunk, 1) * chunk if row <= elements else elements


class Rebuilder:
    """Rebuilds any range of one tensor; thread-safe."""

    def __init__(self, recipe: Operator, source: Source, scope: Scope, target: Target) -> None:
        self.target = target
        self._value = recipe.bind(source, scope, target)
        if not all(isinstance(node, _MOVING) for node in recipe.walk()):
            check_subnormals()

    @property
    def dtype(self) -> Dtype:
        return self.target.dtype

    @property
    def granularity(self) -> int:
        """As of `Value`."""
        return self._value.granularity

    def step(self, elements: int) -> int:
        """As `good_step`, and a multiple of what is read together."""
        step = good_step(self.target.shape, self.dtype.width, elements)
        return max(step // self.granularity, 1) * self.granularity

    def read(self, lo: int, hi: int, out: Bits) -> None:
        """Elements `[lo, hi)` (flat indices), as bits of the tensor's dtype, into `out`."""
        if isinstance(self._value, ReadValue):
            self._value.bits(lo, hi, out)
            return
        # Blocks end where chunks do, as a rule, so that few are decoded twice.
        step = self.step(_BLOCK_ELEMENTS)
        begin = lo
        while begin < hi:
            end = min((begin // step + 1) * step, hi)
            self._read_block(begin, end, out[begin - lo : end - lo])
            begin = end

    def _read_block(self, lo: int, hi: int, out: Bits) -> None:
        if self._value.facts.dtype is not None:
            self._value.bits(lo, hi, out)
        else:
            self._value.rounded(lo, hi, self.target.accumulator, self.dtype, out)

    def read_rectangle(self, part: Rectangle, out: Bits) -> None:
        """A rectangle of the tensor taken as a matrix, as bits of its dtype, into `out`, `[rows, columns]`.

        Of sums, low-rank products and scaled tensors the rectangle is computed and nothing else; of what is in panels
        those are decoded that it touches. Other stored and base tensors are decoded in whole rows, as chunks hold them,
        and cut. A patch is made in whole rows.
        Beside `out` a bounded number of elements is in memory, whatever is cut.
        """
        row = self.target.row
        if out.size == 0:
            return
        if part.columns == row:
            self.read(part.top * row, part.bottom * row, out.reshape(-1))
            return
        step = self.rows_in(_BLOCK_ELEMENTS)
        if step == 0:  # rows of many elements: not even one is needed whole
            for index, line in enumerate(out, part.top):
                self.read(index * row + part.left, index * row + part.right, line)
            return
        begin = part.top
        while begin < part.bottom:
            end = min((begin // step + 1) * step, part.bottom)
            block = out[begin - part.top : end - part.top]
            self._read_rectangle(Rectangle(begin, end, part.left, part.right), block)
            begin = end

    def _read_rectangle(self, part: Rectangle, out: Bits) -> None:
        if self._value.facts.dtype is not None:
            self._value.rectangle_bits(part, out)
            return
        with borrowed(self.target.accumulator, out.size) as values:
            with np.errstate(**SILENT):
                self._value.accumulate_rectangle(part, values.reshape(out.shape), first=True)
            round_wide(values, self.dtype, out.reshape(-1))

    def rows_in(self, elements: int) -> int:
        """Rows in about so many elements, as a rule in whole chunks; 0 where a row is longer than that."""
        return self.step(elements) // max(self.target.row, 1)

    def reference(self, lo: int, hi: int) -> Bits:
        """The same elements by the ordered reference: slow, and the definition."""
        if self._value.facts.dtype is not None:
            out = np.empty(hi - lo, self.dtype.bits)
            self._value.bits(lo, hi, out)
            return out
        with np.errstate(**SILENT):
            return round_to(self._value.reference(lo, hi, self.target.accumulator), self.dtype, signed_nan=False)


def read_in_pieces(rebuilder: Rebuilder, lo: int, hi: int, out: Bits, pool: Pool) -> None:
    """Elements `[lo, hi)` into `out`, in pieces that are rebuilt side by side."""
    step = rebuilder.step(_PIECE_ELEMENTS)
    edges = [lo, *range((lo // step + 1) * step, hi, step), hi]
    pool.each(pairwise(edges), lambda piece: rebuilder.read(*piece, out[piece[0] - lo : piece[1] - lo]))


def read_rectangle_in_pieces(rebuilder: Rebuilder, part: Rectangle, out: Bits, pool: Pool) -> None:
    """A rectangle into `out`, `[rows, columns]`, in rows that are rebuilt side by side."""
    step = max(rebuilder.rows_in(_PIECE_ELEMENTS), 1)
    edges = [part.top, *range((part.top // step + 1) * step, part.bottom, step), part.bottom]
    pool.each(
        pairwise(edges),
        lambda rows: rebuilder.read_rectangle(
            Rectangle(*rows, part.left, part.right), out[rows[0] - part.top : rows[1] - part.top]
        ),
    )
