"""Which bounds the groups of a patch get: groups as fine as pays for a code table each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import Bits
from ..operators.groups import LARGEST_BOUND, MOST_BOUNDS, Keys

_GROUP_BYTES = 40  # what one more group takes in a chunk: its part of the directory, frames and code tables
_TIME_BYTES = 1 / 600  # for each element: what a group has to save, as a reader has to search for it
_ZERO = 253  # one less than the top 10 bits of 1.0 as a float32
_LEARNT = 0.72  # bits: by so much each frequency that is learnt from a sample makes its entropy too small (Miller 1955)

Float64 = npt.NDArray[np.float64]


def exponent_bounds(keys: Keys, residuals: Bits, elements: int) -> tuple[int, ...]:
    """The bounds that cost the fewest bytes, by the entropy of residuals in each group.

    Args:
        keys: the exponents of a sample.
        residuals: the residual of each element of it.
        elements: how many there are in a chunk.
    """
    # The leading bit of a residual and the one after it: all that an exponent can foretell.
    kinds = np.maximum(residuals.astype(np.float32).view(np.int32) >> 22, _ZERO) - _ZERO
    most = int(kinds.max()) + 1
    counts = np.bincount(keys.astype(np.intp) * most + kinds)
    counts = np.pad(counts, (0, -counts.size % most)).reshape(-1, most)
    values = np.flatnonzero(counts.any(axis=1))
    sums = _sums(counts[values][:, counts.any(axis=0)])

    def bits(end: int) -> Float64:
        inside = sums[end] - sums[:end]
        learnt = _LEARNT * np.count_nonzero(inside, axis=1)
        return np.asarray(_weighted(inside.sum(axis=1)) - _weighted(inside).sum(axis=1) + learnt)

    costs = [elements / keys.size / 8 * bits(end) for end in range(1, len(values) + 1)]
    return _cheapest(values, costs, _GROUP_BYTES + _TIME_BYTES * elements)


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

    def bits(end: int) -> Float64:
        inside = sums[end] - sums[:end]
        return np.asarray(_weighted(inside.sum(axis=1)) - _weighted(inside).sum(axis=1))

    costs = [elements / max(keys.size, 1) / 8 * bits(end) for end in range(1, len(values) + 1)]
    return _cheapest(values, costs, _GROUP_BYTES)


def _cheapest(values: npt.NDArray[Any], costs: Sequence[Float64], group_bytes: float) -> tuple[int, ...]:
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
