"""Which bounds the groups of a patch get: groups as fine as pays for a code table each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

_AT_ONCE = 1 << 16  # numbers: what is computed for several groups in one step stays in the cache

Float64 = npt.NDArray[np.float64]
Counts = npt.NDArray[np.integer[Any]]


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
    sums = _sums(counts[values][:, counts.any(axis=0)])
    bits = _bits_of_groups(sums, _LEARNT)
    return _cheapest(values, [elements / counts.sum() / 8 * of_each for of_each in bits], _BY_EXPONENT)


def margin_bounds(keys: Keys, missed: npt.NDArray[np.bool_], elements: int) -> tuple[int, ...]:
    """The bounds that cost the fewest bytes, by the entropy of misses in each group.

    Args:
        keys: the margins of a sample.
        missed: whether the prediction was wrong, of each element of it.
        elements: how many there are in a chunk.
    """
    values, which = np.unique(keys, return_inverse=True)
    misses = np.bincount(which, weights=missed)
    sums = _sums(np.stack([np.bincount(which) - misses, misses], axis=1))
    bits = _bits_of_groups(sums, 0)
    return _cheapest(values, [elements / max(keys.size, 1) / 8 * of_each for of_each in bits], _BY_MARGIN)


def _bits_of_groups(sums: Float64, learnt: float) -> Iterator[Float64]:
    """For each end of 1 to `n`: the entropy of the values from each begin before it, `[end]`; several ends at a time.

    Args:
        sums: `[n + 1, kinds]`, how many of each kind there are in the first so many values.
        learnt: bits to add for each kind that is there.
    """
    count, kinds = len(sums) - 1, sums.shape[1]
    step = max(_AT_ONCE // ((count + 1) * kinds), 1)
    for first in range(1, count + 1, step):
        ends = np.arange(first, min(first + step, count + 1))
        inside = np.maximum(sums[ends, None] - sums[None, : ends[-1]], 0)
        bits = _weighted(inside.sum(axis=2)) - _weighted(inside).sum(axis=2) + learnt * np.count_nonzero(inside, axis=2)
        yield from (of_each[:end] for of_each, end in zip(bits, ends, strict=True))


def _cheapest(values: npt.NDArray[Any], costs: Sequence[Float64], group_bytes: int) -> tuple[int, ...]:
    """The bounds that cost the fewest bytes: a shortest path over all of them.

    Args:
        values: `[n]`, the keys that there are, ascending.
        costs: bytes of a group of the values from each begin (`[end]`) before an end of 1 to `n`.
        group_bytes: what each group takes besides.
    """
    least = np.zeros(len(values) + 1)  # bytes of the best groups of the first so many values
    before = np.zeros(len(values) + 1, np.intp)
    for end, inside in enumerate(costs, 1):
        cost = least[:end] + inside + group_bytes
        before[end] = cost.argmin()
        least[end] = cost[before[end]]
    bounds: list[int] = []
    place = int(before[len(values)])
    while place > 0:
        bounds.insert(0, int(values[place]))
        place = int(before[place])
    return tuple(bound for bound in bounds[-MOST_BOUNDS:] if 0 < bound <= LARGEST_BOUND)


def _sums(counts: npt.NDArray[Any]) -> Float64:
    """The sum of the first 0, 1, 2, ... rows."""
    return np.concatenate([np.zeros((1, counts.shape[1])), np.cumsum(counts, axis=0, dtype=np.float64)])


def _weighted(counts: Float64) -> Float64:
    """`n log2 n`: the bits of `n` alike elements are that of all less the sum of that of each kind."""
    return np.asarray(counts * np.log2(np.maximum(counts, 1)))
