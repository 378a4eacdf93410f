"""A tensor and one that it may have been made of, as matrices of which some rows are looked at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..dtypes import Bits, Dtype
from ..operators.patch import cast
from .matrices import Index, Matrix, Rows, Wide, WideRows, row_blocks, wide_of
from .prediction import Elements

HUGE = 2.0**40
"""Weights and numbers beyond: squares and sums of them might leave float32, and nothing comes of it."""


class Part(NamedTuple):
    """Some rows and columns of a pair, `[rows, columns]`: both as numbers, and the tensor's bits."""

    base: Wide
    changed: Wide
    bits: Bits


@dataclass(frozen=True, eq=False)
class Pair:
    """Rows of a tensor, of whatever shape, and the same rows of what it may have been made of.

    Attributes:
        like: what it may have been made of, in the tensor's shape.
        tensor: BF16, F16 or F32.
        rows: which of all rows, ascending.
        scales: `[len(rows)]`, numbers that these rows of `like` are multiplied by; None for 1.
    """

    like: Elements
    tensor: Elements
    rows: Index
    scales: Wide | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)` of these rows."""
        return len(self.rows), matrix(self.tensor).shape[1]

    @property
    def dtype(self) -> Dtype:
        """The tensor's."""
        return self.tensor.dtype

    @property
    def wide(self) -> np.dtype[Any]:
        """What holds the tensor's values before they are rounded."""
        return wide_of(self.dtype)

    @property
    def base(self) -> WideRows:
        """These rows of `like` times `scales`: float32 or float64 `[rows, columns]`."""
        return WideRows(matrix(self.like), self.rows, self.like.dtype, self.wide, self.scales)

    @property
    def changed(self) -> WideRows:
        """These rows of the tensor, as numbers of the same type."""
        return WideRows(matrix(self.tensor), self.rows, self.dtype, self.wide)

    @property
    def bits(self) -> Rows:
        """These rows of the tensor as they are stored."""
        return Rows(matrix(self.tensor), self.rows)

    def part(self, where: Any) -> Part | None:
        """What is at some rows, or rows and columns, of these; None if arithmetic makes no sense of it."""
        part = Part(self.base[where], self.changed[where], self.bits[where])
        return part if are_ordinary(part.base, part.changed) else None

    @property
    def is_ordinary(self) -> bool:
        """Whether arithmetic makes sense of all these rows."""
        return are_ordinary(self.base, self.changed)

    def only(self, kept: npt.NDArray[np.bool_]) -> Pair:
        """Those of these rows for which `kept` [len(rows)] is true."""
        return replace(self, rows=self.rows[kept], scales=None if self.scales is None else self.scales[kept])

    def with_scales(self, scales: Wide) -> Pair | None:
        """The same with `scales` [len(rows)], as they would be stored; None if arithmetic makes no sense of that."""
        if not are_small(scales):
            return None
        scaled = replace(self, scales=scales.astype(self.wide))
        return scaled if are_ordinary(scaled.base) else None

    def differing(self) -> Pair:
        """Those of these rows that differ; all of them if the dtypes do."""
        if self.like.dtype != self.dtype:
            return self
        bits, like = self.bits, Rows(matrix(self.like), self.rows)
        blocks = [(bits[rows] != like[rows]).any(axis=1) for rows in row_blocks(self.shape)]
        return self.only(np.concatenate(blocks)) if blocks else self

    def rounded(self) -> Pair:
        """The same with `like` in the tensor's dtype: all rows, in memory of their own."""
        bits = matrix(self.like)
        rounded = np.empty(bits.shape, self.dtype.bits)
        for rows in row_blocks(bits.shape):
            rounded[rows] = cast(bits[rows].reshape(-1), self.like.dtype, self.dtype).reshape(-1, bits.shape[1])
        return replace(self, like=Elements(self.dtype, self.like.shape, rounded.reshape(-1)))

    def to_all_rows(self, values: npt.NDArray[Any], others: float) -> npt.NDArray[Any]:
        """`values` [len(rows), ...] of these rows as those of all, with the same for all others."""
        everywhere = np.full((self.tensor.shape[0], *values.shape[1:]), others, values.dtype)
        everywhere[self.rows] = values
        return everywhere


def matrix(tensor: Elements) -> Bits:
    """The rows of a tensor, of whatever shape, as those of a matrix."""
    return tensor.bits.reshape(tensor.shape[0], -1)


def are_small(numbers: Wide) -> bool:
    """Whether none is huge, or no number: rows may be multiplied by them."""
    return bool(np.abs(numbers).max(initial=0) < HUGE)


def are_ordinary(*matrices: Matrix) -> bool:
    """Whether arithmetic makes sense: no NaN, no infinity, nothing huge."""
    blocks = (each[rows] for each in matrices for rows in row_blocks(each.shape))
    return all(values.min(initial=0) > -HUGE and values.max(initial=0) < HUGE for values in blocks)
