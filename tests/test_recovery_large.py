"""Recovery from matrices that are too large to be fitted whole: a part is, and what it tells is extended to the rest.

What counts as large is lowered here, so that the fit of the whole is there to compare with.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from deltafmt.dtypes import DTYPES, Bits, Dtype, round_to, widen
from deltafmt.methods import magnitudes as dora
from deltafmt.methods import rounded_fit
from deltafmt.methods.matrices import Rows, WideRows
from deltafmt.methods.merged import computed
from deltafmt.methods.prediction import Computed, Elements, Referred
from deltafmt.methods.recovery import IntegerFactors, recover
from deltafmt.operators import Ref

BF16, F16, F32 = DTYPES["BF16"], DTYPES["F16"], DTYPES["F32"]
Floats = npt.NDArray[Any]

SPREAD = 0.02  # of all weights here


def wide_type(dtype: Dtype) -> np.dtype[Any]:
    return np.dtype(np.float64 if dtype is F32 else np.float32)


def gaussian(*shape: int, seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def based(shape: tuple[int, int], dtype: Dtype = BF16) -> Bits:
    return round_to(np.float32(SPREAD) * gaussian(*shape, seed=1), dtype)


def low_rank(shape: tuple[int, int], rank: int, ulps: float, dtype: Dtype = BF16) -> Floats:
    """Of which the root mean square is `ulps` last places of a typical weight, between 2**-6 and 2**-5."""
    product: Floats = gaussian(shape[0], rank, seed=2) @ gaussian(rank, shape[1], seed=3)
    return product * np.float32(ulps * 2.0 ** (-6 - dtype.mantissa_bits) / np.sqrt(rank))


def added(base: Bits, update: Floats, dtype: Dtype = BF16) -> Bits:
    wide = wide_type(dtype)
    return round_to(widen(base, dtype, wide) + update.astype(wide), dtype)


def entropy(values: npt.NDArray[Any]) -> float:
    shares = np.unique(values, return_counts=True)[1] / values.size
    return float(-np.sum(shares * np.log2(shares)) * values.size)


def bits(base: Bits, target: Bits, factors: IntegerFactors, dtype: Dtype) -> float:
    """What misses and factors take, coded plainly; the prediction by the book, its sums in int64."""
    wide = np.promote_types(wide_type(dtype), factors.accumulator)
    sums = factors.b.astype(np.int64).T @ factors.a.astype(np.int64)
    predicted = round_to(widen(base, dtype, wide) + np.ldexp(sums.astype(wide), factors.exponent), dtype)
    components = sum(entropy(row) for factor in (factors.b, factors.a) for row in factor)
    return entropy(target.astype(np.int64) - predicted.astype(np.int64)) + components


def recovered(base: Bits, target: Bits, dtype: Dtype) -> IntegerFactors:
    factors = recover(widen(base, dtype, wide_type(dtype)), target, dtype)
    assert factors is not None
    assert (factors.b.shape[1], factors.a.shape[1]) == target.shape
    return factors


@pytest.mark.parametrize("shape", [(3000, 320), (320, 3000), (1000, 900)])
@pytest.mark.parametrize(("dtype", "rank", "ulps"), [(BF16, 8, 1), (BF16, 4, 0.3), (F32, 16, 1)])
def test_what_a_part_tells_is_as_good_as_what_the_whole_tells(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: Dtype, rank: int, ulps: float
) -> None:
    base = based(shape, dtype)
    target = added(base, low_rank(shape, rank, ulps, dtype), dtype)
    whole = recovered(base, target, dtype)
    monkeypatch.setattr(rounded_fit, "_PART", 1 << 18)
    extended = recovered(base, target, dtype)
    assert len(extended.a) == len(whole.a) == rank
    assert bits(base, target, extended, dtype) < 1.03 * bits(base, target, whole, dtype)


@pytest.mark.parametrize(("dtype", "ulps"), [(BF16, 1), (BF16, 0.4), (F32, 1)])
def test_systems_that_are_approached_serve_as_well_as_solved_ones(
    monkeypatch: pytest.MonkeyPatch, dtype: Dtype, ulps: float
) -> None:
    shape, rank = (600, 480), 48
    assert rank > rounded_fit._DIRECT
    base = based(shape, dtype)
    target = added(base, low_rank(shape, rank, ulps, dtype), dtype)
    approached = recovered(base, target, dtype)
    monkeypatch.setattr(rounded_fit, "_DIRECT", rank)
    solved = recovered(base, target, dtype)
    assert len(approached.a) == len(solved.a) == rank
    assert bits(base, target, approached, dtype) < 1.02 * bits(base, target, solved, dtype)


def test_a_part_has_rows_enough_for_a_high_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as few as a part has otherwise, most of a rank of 150 would be missed."""
    shape, rank = (1600, 640), 150
    base = based(shape)
    target = added(base, low_rank(shape, rank, 3))
    whole = recovered(base, target, BF16)
    monkeypatch.setattr(rounded_fit, "_PART", 1 << 16)
    monkeypatch.setattr(rounded_fit, "_PART_ROWS", 200)
    extended = recovered(base, target, BF16)
    assert len(extended.a) == len(whole.a) == rank
    assert bits(base, target, extended, BF16) < 1.03 * bits(base, target, whole, BF16)


@pytest.mark.parametrize("turned", [False, True])
def test_rows_that_changed_by_themselves_take_no_components(turned: bool) -> None:
    """Of a merge of rank 8 with 100 rows, or columns, that were trained: the residual has these."""
    shape, rank, others = (800, 700), 8, 100
    base = based(shape)
    target = added(base, low_rank(shape, rank, 3))
    own = np.float32(2e-4) * gaussian(others, shape[1], seed=7)
    target[:others] = round_to(widen(base[:others], BF16, np.dtype(np.float32)) + own, BF16)
    if turned:
        base, target = np.ascontiguousarray(base.T), np.ascontiguousarray(target.T)
    assert len(recovered(base, target, BF16).a) == rank


def test_noise_is_no_low_rank_in_a_large_matrix_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounded_fit, "_PART", 1 << 18)
    base = based((3000, 400))
    target = added(base, np.float32(1e-3) * gaussian(3000, 400, seed=4))
    assert recover(widen(base, BF16, np.dtype(np.float32)), target, BF16) is None


@pytest.mark.parametrize("shape", [(5000, 300), (300, 5000)])
@pytest.mark.parametrize("magnitudes", [False, True])
def test_rows_left_alone_rows_replaced_and_magnitudes(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], magnitudes: bool
) -> None:
    """A third of the rows rest, one in a hundred is another; of the others some have a magnitude as well (DoRA)."""
    monkeypatch.setattr(rounded_fit, "_PART", 1 << 18)
    monkeypatch.setattr(dora, "_PART", 1 << 18)
    base, rows = based(shape), np.arange(shape[0])
    resting, new = rows % 3 == 1, rows % 100 == 50
    scales = 1 + 0.02 * gaussian(shape[0], 1, seed=5) * magnitudes
    values = widen(base, BF16, np.dtype(np.float32))
    target = round_to(scales * (values + low_rank(shape, 6, 3)), BF16)
    target[resting] = base[resting]
    target[new] = based((shape[0] + 1, shape[1]))[:-1][new] ^ np.uint16(1 << 15)
    tensor = Elements(BF16, target.shape, target.reshape(-1))
    reference = Referred(Ref("w", "base"), BF16, base.reshape(-1))
    *_, prediction = computed("w", tensor, [reference], np.inf)
    assert isinstance(prediction, Computed)
    predicted = np.array(prediction.predicted(0, target.size, BF16, None)[0]).reshape(shape)
    hits = (predicted == target).mean(axis=1)
    assert np.all(hits[resting & ~new] == 1)
    assert hits[~resting & ~new].mean() > 0.93
    assert prediction.own_bytes < 2 * 6 * sum(shape) + 4 * magnitudes * shape[0] + 2000


def test_memory_is_bounded_by_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recovery from bits in memory takes less than to widen the base would."""
    monkeypatch.setattr(rounded_fit, "_PART", 1 << 20)
    shape = (32768, 512)
    base, rows = based(shape), np.arange(shape[0])
    target = added(base, low_rank(shape, 4, 1))
    tracemalloc.start()
    try:
        factors = recover(WideRows(base, rows, BF16, np.dtype(np.float32)), Rows(target, rows), BF16)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert factors is not None
    assert len(factors.a) == 4
    assert peak < 4 * target.size


def test_rows_are_read_as_an_array_is() -> None:
    matrix = np.arange(60, dtype=np.uint16).reshape(10, 6)
    some, factors = np.array([1, 2, 5, 9]), np.array([1, 2, 4, 8], np.float32)
    columns = np.array([0, 3, 5])
    for chosen, scales in ((some, factors), (np.arange(10), None)):
        plain = matrix[chosen]
        values = widen(plain, BF16, np.dtype(np.float32)) * (1 if scales is None else scales[:, None])
        rows = Rows(matrix, chosen)
        wide = WideRows(matrix, chosen, BF16, np.dtype(np.float32), scales)
        assert rows.shape == wide.shape == plain.shape
        outer = np.ix_(np.array([0, 2, 3]), columns)
        for where in (slice(1, 3), np.array([3, 0]), slice(None, None, 2), (slice(1, 3), slice(2)), outer):
            np.testing.assert_array_equal(rows[where], plain[where])
            np.testing.assert_array_equal(wide[where], values[where])
        np.testing.assert_array_equal(rows[:, columns], plain[:, columns])
        np.testing.assert_array_equal(wide[:, 2:4].T, values.T[2:4])


@pytest.mark.parametrize("dead", [slice(0, 300), slice(2700, 3000)])
def test_rows_of_another_scale_do_not_hide_the_rest_wherever_they_are(dead: slice) -> None:
    shape = (3000, 320)
    base, update = widen(based(shape), BF16, np.dtype(np.float32)), low_rank(shape, 8, 1)
    for part in (base, update):
        part[dead] *= np.float32(1e-28)
    start = round_to(base, BF16)
    factors = recovered(start, added(start, update), BF16)
    assert len(factors.a) == 8
