"""Which bounds the groups of a patch get: groups as fine as pays for a code table each."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import native
from ..dtypes import Bits, Dtype
from ..operators.groups import LARGEST_BOUND, MOST_BOUNDS, Keys, exponent_mask, exponents
from ..operators.patch import difference

_BY_EXPONENT, _BY_MARGIN = 120, 40
"""Bytes that one more group takes in a chunk: its part of the directory, frames, code tables. Of the many zeros in a
group by margin there is little to code."""
_ZERO = 253  # one less than the top 10 bits of 1.0 as a float32
_LEARNT = 0.72  # bits: by so much each frequency that is learnt from a sample makes its entropy too small (Miller 1955)
_FRACTION = 1 << 10
"""Of a bit. Costs are whole numbers of these, so that C and numpy compare the same ones."""

Counts = npt.NDArray[np.integer[Any]]
Sums = npt.NDArray[np.int64]


def kinds_by_exponent(predicted: Bits, bits: Bits, dtype: Dtype, step: int) -> Counts:
    """`kinds` of every `step`-th element of a tensor and its prediction, both `[m]` bits of `dtype`."""
    if native.available() and dtype.width > 1:
        return native.kinds_by_exponent(predicted, bits, dtype.mantissa_bits, exponent_mask(dtype), step)
    some = np.ascontiguousarray(predicted[::step])
    return kinds(exponents(some, dtype), difference(np.ascontiguousarray(bits[::step]), some, dtype))


def kinds(keys: Keys, residuals: Bits) -> Counts:
    """How many elements there are of each exponent and kind of residual: `[exponents, kinds]`.

    Args:
        keys: `[m]`, the exponents.
        residuals: `[m]`. Of a kind are those with the same leading bit and the one after it: all that an exponent can
            foretell.
    """
    of_each = np.maximum(residuals.astype(np.float32).view(np.int32) >> 22, _ZERO) - _ZERO
    most = int(of_each.max()) + 1
    size = (int(keys.max()) + 1) * most
    return np.bincount(keys.astype(np.intp) * most + of_each, minlength=size).reshape(-1, most)


def exponent_bounds(counts: Counts, elements: int) -> tuple[int, ...]:
    """The bounds that cost the fewest bytes, by the entropy of residuals in each group.

    Args:
        counts: `kinds` of a sample.
        elements: how many there are in a chunk.
    """
    values = np.flatnonzero(counts.any(axis=1))
    return _cheapest(values, counts[values][:, counts.any(axis=0)], _LEARNT, elements, _BY_EXPONENT)


def margin_bounds(keys: Keys, missed: npt.NDArray[np.bool_], elements: int) -> tuple[int, ...]:
    """The bounds that cost the fewest bytes, by the entropy of misses in each group.

    Args:
        keys: the margins of a sample.
        missed: whether the prediction was wrong, of each element of it.
        elements: how many there are in a chunk.
    """
    values, which = np.unique(keys, return_inverse=True)
    counts = np.stack([np.bincount(which[some], minlength=len(values)) for some in (~missed, missed)], axis=1)
    return _cheapest(values, counts, 0, elements, _BY_MARGIN)


def _cheapest(
    values: npt.NDArray[Any], counts: Counts, learnt: float, elements: int, group_bytes: int
) -> tuple[int, ...]:
    """The bounds that cost the fewest bytes, by the entropy of the kinds in each group.

    Args:
        values: `[n]`, the keys that there are, ascending.
        counts: `[n, kinds]`, how many of each kind a sample has of them.
        learnt: bits to add for each kind that there is in a group.
        elements: how many there are in a chunk.
        group_bytes: what each group takes besides.
    """
    sums = np.zeros((len(counts) + 1, counts.shape[1]), np.int64)
    np.cumsum(counts, axis=0, out=sums[1:])
    total = int(sums[-1].sum())
    # What a chunk takes, times the elements of the sample, in fractions of a bit.
    prices = round(learnt * _FRACTION), elements, 8 * group_bytes * _FRACTION * total
    weighted = _weighted(total.bit_length())
    before = (native.cheapest_begins if native.available() else _cheapest_begins)(sums, weighted, *prices)
    bounds: list[int] = []
    place = before[len(values)]
    while place > 0:
        bounds.insert(0, int(values[place]))
        place = before[place]
    return tuple(bound for bound in bounds[-MOST_BOUNDS:] if 0 < bound <= LARGEST_BOUND)


def _cheapest_begins(sums: Sums, weighted: Sums, learnt: int, elements: int, group: int) -> list[int]:
    """Where the last group of the first 0, 1, 2, ... values begins, if these cost least: a shortest path.

    Args:
        sums: `[n + 1, kinds]`, how many of each kind there are in the first so many values.
        weighted: `_weighted` of numbers up to the last of their sums.
        learnt: of each kind that there is in a group, in fractions of a bit.
        elements: of a chunk.
        group: of each group, in fractions of a bit times the elements of the sample.
    """
    least = np.zeros(len(sums), np.int64)
    before = [0]
    for end in range(1, len(sums)):
        inside = sums[end] - sums[:end]
        bits = weighted[inside.sum(axis=1)] - weighted[inside].sum(axis=1) + learnt * np.count_nonzero(inside, axis=1)
        costs = least[:end] + bits * elements + group
        before.append(int(costs.argmin()))
        least[end] = costs[before[end]]
    return before


@lru_cache(maxsize=4)
def _weighted(length: int) -> Sums:
    """`n log2 n` for every `n < 2**length`, in fractions of a bit.

    Elements take that of all of them less that of each kind.
    """
    numbers = np.arange(1 << length)
    return np.rint(numbers * np.log2(np.maximum(numbers, 1)) * _FRACTION).astype(np.int64)
