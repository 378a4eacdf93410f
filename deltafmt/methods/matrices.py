"""Large matrices, read a part at a time: rows of a tensor as they are, or widened; and which parts tell of all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..dtypes import Bits, Dtype, widen

Wide = npt.NDArray[Any]  # float32 or float64
Index = npt.NDArray[np.intp]

BLOCK_ELEMENTS = 1 << 18
"""As many are worked on at a time: temporaries stay small."""

_LONG = 1 << 22  # of more places a permutation is not made for a few of them


def wide_of(dtype: Dtype) -> np.dtype[Any]:
    """What holds values of BF16, F16 or F32, and what is added to them, before they are rounded."""
    return np.dtype(np.float64 if dtype.name == "F32" else np.float32)


class Matrix(Protocol):
    """What is indexed as a two-dimensional array is, by rows or by rows and columns, and then gives one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, where: Any, /) -> npt.NDArray[Any]: ...


class Rows:
    """Some rows of a matrix, which is not copied but for what is asked for.

    Args:
        bits: `[all rows, columns]`.
        chosen: which of them, ascending.
    """

    def __init__(self, bits: Bits, chosen: Index) -> None:
        self._bits, self._chosen = bits, chosen
        self.shape = (len(chosen), bits.shape[1])

    def __getitem__(self, where: Any, /) -> npt.NDArray[Any]:
        rows, columns = where if isinstance(where, tuple) else (where, slice(None))
        if len(self._chosen) < len(self._bits):
            rows = self._chosen[rows]
            if rows.ndim == 1 and not isinstance(columns, slice):
                rows = rows[:, None]  # all of these rows in all of these columns
        return np.asarray(self._bits[rows, columns])


class WideRows(Rows):
    """As `Rows`, in float32 or float64, each row times a number if there are `scales` `[rows]`."""

    def __init__(
        self, bits: Bits, chosen: Index, dtype: Dtype, wide: np.dtype[Any], scales: Wide | None = None
    ) -> None:
        super().__init__(bits, chosen)
        self._dtype, self._wide, self._scales = dtype, wide, scales

    def __getitem__(self, where: Any, /) -> npt.NDArray[Any]:
        values = widen(super().__getitem__(where), self._dtype, self._wide)
        if self._scales is not None:
            scales = self._scales[where[0] if isinstance(where, tuple) else where]
            with np.errstate(over="ignore", invalid="ignore"):
                values *= scales.astype(self._wide).reshape(-1, 1)
        return values


def row_blocks(shape: tuple[int, ...], elements: int = BLOCK_ELEMENTS, most: int | None = None) -> Iterator[slice]:
    """Slices of all rows, each of some `elements` and at most `most` rows, or of one row: temporaries stay small."""
    step = max(1, min(most or shape[0], elements // max(1, shape[1])))
    return (slice(begin, begin + step) for begin in range(0, shape[0], step))


def spread(length: int, count: int) -> Index:
    """`count` places of `length`, or all, evenly spread but for no period."""
    random = np.random.default_rng(length)
    if length > _LONG:
        return np.sort(random.choice(length, min(count, length), replace=False, shuffle=False))
    return np.sort(random.permutation(length)[:count])
