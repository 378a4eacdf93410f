"""Recovery of integer factors from merges of known low-rank updates, judged by an independent prediction in int64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafmt.dtypes import DTYPES, Bits, Dtype, round_to, widen
from deltafmt.methods.recovery import IntegerFactors, recover
from deltafmt.methods.stored_bits import difference_bits, grouped_bits, integer_bits, prediction_bits

BF16, F16, F32 = DTYPES["BF16"], DTYPES["F16"], DTYPES["F32"]
Floats = npt.NDArray[Any]


def gaussian(*shape: int, seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape)


def based(out: int, in_: int, dtype: Dtype, seed: int = 1) -> Floats:
    """Random weights of spread 0.02 that the dtype can hold, in the type that `recover` takes them."""
    wide = np.dtype(np.float64 if dtype is F32 else np.float32)
    values = (0.02 * gaussian(out, in_, seed=seed)).astype(wide)
    return np.asarray(widen(round_to(values, dtype), dtype, wide))


def low_rank(out: int, in_: int, rank: int, spread: float, seed: int = 2) -> Floats:
    product: Floats = gaussian(out, rank, seed=seed) @ gaussian(rank, in_, seed=seed + 100)
    return np.asarray(product * (spread / np.sqrt(rank)))


def merged(base: Floats, update: Floats, dtype: Dtype) -> Bits:
    return round_to((base + update).astype(base.dtype), dtype)


def predicted(base: Floats, factors: IntegerFactors, dtype: Dtype) -> Bits:
    """By the book: the sum in int64, one addition in the accumulator, one rounding."""
    accumulator = np.float64 if np.int32 in (factors.b.dtype, factors.a.dtype) else np.float32
    sums = factors.b.astype(np.int64).T @ factors.a.astype(np.int64)
    update = np.ldexp(sums.astype(accumulator), factors.exponent)
    return round_to(base.astype(accumulator) + update, dtype)


def assert_keeps_the_rules(factors: IntegerFactors, dtype: Dtype) -> None:
    b, a = factors.b.astype(np.int64), factors.a.astype(np.int64)
    assert factors.b.ndim == factors.a.ndim == 2
    assert len(b) == len(a) >= 1
    types = {factors.b.dtype.name, factors.a.dtype.name}
    assert types <= {"int8", "int16", "int32"}
    bound = 2**53 if "int32" in types else 2**24
    assert int(np.sum(b**2, axis=0).max()) * int(np.sum(a**2, axis=0).max()) <= bound**2
    if dtype is F32:
        assert "int32" in types
    assert -100 <= factors.exponent <= 100
    contribution = np.linalg.norm(b.astype(float), axis=1) * np.linalg.norm(a.astype(float), axis=1)
    assert np.all(np.diff(contribution) <= 0)
    assert np.all(contribution > 0)


def recovered(base: Floats, target: Bits, dtype: Dtype) -> IntegerFactors:
    factors = recover(base, target, dtype)
    assert factors is not None
    assert_keeps_the_rules(factors, dtype)
    return factors


def hits(base: Floats, target: Bits, factors: IntegerFactors, dtype: Dtype) -> float:
    return float(np.mean(predicted(base, factors, dtype) == target))


@pytest.mark.parametrize("shape", [(512, 512), (192, 576), (640, 256)])
@pytest.mark.parametrize("spread", [2e-5, 3e-4, 2e-3])  # 0.2, 3 and 16 ulps of the typical weight
def test_a_merged_update_is_found_whatever_its_size(shape: tuple[int, int], spread: float) -> None:
    base = based(*shape, BF16)
    target = merged(base, low_rank(*shape, 8, spread), BF16)
    factors = recovered(base, target, BF16)
    assert len(factors.a) == 8
    assert factors.b.shape[1], factors.a.shape[1] == shape
    assert hits(base, target, factors, BF16) > 0.93


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_large_matrix_is_predicted_nearly_everywhere(dtype: Dtype) -> None:
    base = based(1024, 1024, dtype)
    ulps = 2.0 ** (-4 - dtype.mantissa_bits)
    target = merged(base, low_rank(1024, 1024, 4, 0.5 * ulps), dtype)
    factors = recovered(base, target, dtype)
    assert len(factors.a) == 4
    assert factors.a.dtype != np.int32
    assert factors.b.dtype != np.int32
    assert hits(base, target, factors, dtype) > 0.97


def test_a_float32_merge_is_found() -> None:
    base = based(512, 384, F32)
    target = merged(base, low_rank(512, 384, 6, 1e-4), F32)
    factors = recovered(base, target, F32)
    assert len(factors.a) == 6
    assert hits(base, target, factors, F32) > 0.95


def test_an_update_that_was_rounded_before_it_was_added() -> None:
    base = based(512, 512, BF16)
    update = widen(round_to(low_rank(512, 512, 8, 3e-4).astype(np.float32), BF16), BF16, np.dtype(np.float32))
    target = merged(base, update, BF16)
    factors = recovered(base, target, BF16)
    assert len(factors.a) == 8
    assert hits(base, target, factors, BF16) > 0.95


def test_a_rank_beyond_the_first_search() -> None:
    base = based(512, 512, BF16)
    target = merged(base, low_rank(512, 512, 40, 5e-4), BF16)
    assert len(recovered(base, target, BF16).a) == 40


def test_two_merges_add_their_ranks() -> None:
    base = based(512, 512, BF16)
    update = low_rank(512, 512, 4, 3e-4) + low_rank(512, 512, 6, 2e-4, seed=7)
    assert len(recovered(base, merged(base, update, BF16), BF16).a) == 10


def test_zero_rows_subnormals_and_rows_that_were_not_touched() -> None:
    base = based(512, 512, BF16)
    base[:9] = 0
    base[9:12] = 2.0**-130
    update = low_rank(512, 512, 8, 3e-4)
    update[200:] = 0
    target = merged(base, update, BF16)
    factors = recovered(base, target, BF16)
    assert len(factors.a) == 8
    assert hits(base[12:], target[12:], IntegerFactors(factors.b[:, 12:], factors.a, factors.exponent), BF16) > 0.94
    assert prediction_bits(base + factors.product(), target, BF16) < 0.4


def test_nothing_is_found_where_there_is_nothing() -> None:
    base = based(400, 500, BF16)
    assert recover(base, merged(base, 0 * base, BF16), BF16) is None
    for spread in (1e-6, 3e-5, 1e-3):
        assert recover(base, merged(base, spread * gaussian(400, 500, seed=3), BF16), BF16) is None
    one = base.copy()
    one[5, 7] += 1
    assert recover(base, round_to(one, BF16), BF16) is None
    assert recover(base[:0], merged(base[:0], base[:0], BF16), BF16) is None


def test_a_single_row_or_element_is_no_matrix_to_factorise() -> None:
    for shape in ((1, 500), (500, 1), (1, 1)):
        base = based(*shape, BF16)
        assert recover(base, merged(base, 1e-3 * gaussian(*shape, seed=4), BF16), BF16) is None


def test_same_input_same_factors() -> None:
    base = based(300, 400, BF16)
    target = merged(base, low_rank(300, 400, 5, 3e-4), BF16)
    first, second = recovered(base, target, BF16), recovered(base, target, BF16)
    np.testing.assert_array_equal(first.b, second.b)
    np.testing.assert_array_equal(first.a, second.a)
    assert first.exponent == second.exponent


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    rank=st.integers(1, 4),
    spread=st.integers(-30, 4),
    size=st.integers(-100, 100),
    dtype=st.sampled_from([BF16, F16, F32]),
    seed=st.integers(0, 99),
)
def test_whatever_comes_the_rules_are_kept_and_bits_are_saved(
    shape: tuple[int, int], rank: int, spread: int, size: int, dtype: Dtype, seed: int
) -> None:
    scale = 2.0 ** (size if dtype is not F16 else size / 10)
    base = based(*shape, dtype, seed) * base_type(dtype)(scale)
    base = widen(round_to(base, dtype), dtype, base.dtype)
    update = low_rank(*shape, rank, 2.0**spread * scale, seed)
    target = merged(base, update.astype(base.dtype), dtype)
    if not np.all(np.isfinite(widen(target, dtype, base.dtype))):
        return
    factors = recover(base, target, dtype)
    if factors is not None:
        assert_keeps_the_rules(factors, dtype)
        plain = difference_bits(base, target, dtype) * target.size
        predicted_update = factors.product().astype(base.dtype)
        misses = prediction_bits(base + predicted_update, target, dtype) * target.size
        assert misses + integer_bits(factors.b) + integer_bits(factors.a) < plain


def base_type(dtype: Dtype) -> type[np.floating[Any]]:
    return np.float64 if dtype is F32 else np.float32


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    base = based(8, 8, BF16)
    target = merged(base, base, BF16)
    with pytest.raises(ValueError, match="one shape"):
        recover(base[:4], target, BF16)
    with pytest.raises(ValueError, match="one shape"):
        recover(base[0], target[0], BF16)
    with pytest.raises(ValueError, match="one shape"):
        recover(base, target, DTYPES["F64"])


def test_entropies_of_known_distributions() -> None:
    residual = np.array([0, 0, 0, 0, 1, 1, -1, -1], np.int64)
    assert grouped_bits(residual, np.zeros(8, np.int64)) == pytest.approx(1.5)
    assert grouped_bits(residual, np.array([0, 0, 0, 0, 1, 1, 2, 2])) == 0
    far = np.array([1000, -1000, 5000, 0], np.int64)  # 3 symbols of 10, 10 and 13 bits: 9, 9 and 12 spelt out
    assert grouped_bits(far, np.zeros(4, np.int64)) == pytest.approx(2 + (9 + 9 + 12) / 4)
    uniform = np.random.default_rng(0).integers(-500, 500, (2, 20000))
    assert integer_bits(uniform) == pytest.approx(40000 * np.log2(1000), rel=0.01)
