"""Intervals of rounding, row scales and mixtures, against exact rationals and known truth."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.dtypes import DTYPES
from deltafmt.methods.affine import mixture, row_scales
from deltafmt.methods.intervals import interval

NUMPY = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


def rounded(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.generic]:
    return values.astype(NUMPY[dtype]).view(DTYPES[dtype].bits)


def weights(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    normal = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return (normal * np.float32(0.02)).astype(ml_dtypes.bfloat16).astype(np.float32)


@given(st.sampled_from(sorted(NUMPY)), st.integers(0, 2**31 - 2), st.booleans())
def test_intervals_end_halfway_to_the_neighbours(dtype: str, pattern: int, negative: bool) -> None:
    kind = DTYPES[dtype]
    infinity = int(np.array(np.inf, NUMPY[dtype]).view(kind.bits))
    magnitude = pattern % (infinity - 1)  # and its neighbour are finite

    def value(number: int) -> Fraction:
        return Fraction(float(np.array([number], kind.bits).view(NUMPY[dtype])[0]))

    below = value(magnitude - 1) if magnitude else -value(1)
    near, far = ((value(magnitude) + other) / 2 for other in (below, value(magnitude + 1)))
    expected = (-far, -near) if negative else (near, far)
    sign = 1 << (8 * kind.width - 1) if negative else 0
    low, high = interval(np.array([magnitude | sign], kind.bits), kind)
    assert (Fraction(float(low[0])), Fraction(float(high[0]))) == expected


@pytest.mark.parametrize("dtype", sorted(NUMPY))
def test_the_largest_number_has_a_finite_interval(dtype: str) -> None:
    kind = DTYPES[dtype]
    largest = np.array([np.array(np.inf, NUMPY[dtype]).view(kind.bits) - 1], kind.bits)
    low, high = interval(largest, kind)
    value = float(largest.view(NUMPY[dtype])[0])
    assert np.isfinite([low[0], high[0]]).all()
    assert Fraction(float(high[0])) - Fraction(value) == Fraction(value) - Fraction(float(low[0]))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_decayed_rows_are_found_and_others_left_alone(dtype: str) -> None:
    base = weights(50, 64)
    truth = np.ones(50)
    truth[10:30] = 0.97
    truth[30] = 1.01
    changed = (base * truth[:, None]).astype(np.float32)
    changed[40:] += weights(10, 64, seed=1)  # rows that were trained
    bits = rounded(changed, dtype)
    found = row_scales(base, bits, DTYPES[dtype])
    assert found is not None
    again = rounded((base * found[:, None]).astype(np.float32), dtype)
    assert np.mean(again[:40] == bits[:40]) > 0.999
    assert (found[:10] == 1).all() and (found[40:] == 1).all()
    assert len(set(found[10:30])) == 1, "one decay, one number"
    assert found[10] == pytest.approx(0.97, rel=1e-3)


def test_rows_of_zeros_and_new_values_on_them() -> None:
    base = weights(4, 32)
    base[1] = 0
    base[2] = 0
    changed = base * np.float32(0.9)
    changed[2, 5] = 0.5  # no number makes this of zero
    found = row_scales(base, rounded(changed, "BF16"), DTYPES["BF16"])
    assert found is not None
    assert found[1] == 1 and found[2] == 1
    assert found[0] == pytest.approx(0.9, rel=1e-2) and found[3] == pytest.approx(0.9, rel=1e-2)


def test_nothing_is_found_where_nothing_was_scaled() -> None:
    base = weights(40, 64)
    assert row_scales(base, rounded(base, "BF16"), DTYPES["BF16"]) is None
    trained = base + weights(40, 64, seed=3) * np.float32(0.1)
    assert row_scales(base, rounded(trained, "BF16"), DTYPES["BF16"]) is None


@pytest.mark.parametrize("dtype", sorted(NUMPY))
@pytest.mark.parametrize("truth", [(0.5, 0.5), (0.3, 0.7), (1.02, -0.35)])
def test_a_mixture_is_found(dtype: str, truth: tuple[float, float]) -> None:
    parts = [weights(5000, seed=1), weights(5000, seed=2)]
    mixed = sum(number * part.astype(np.float64) for number, part in zip(truth, parts, strict=True))
    found = mixture(parts, rounded(np.asarray(mixed, np.float32), dtype), DTYPES[dtype])
    assert found == pytest.approx(truth, abs=3e-5)


def test_equal_parts_have_some_mixture() -> None:
    part = weights(500)
    found = mixture([part, part], rounded(part, "BF16"), DTYPES["BF16"])
    assert np.isfinite(found).all()
    assert found.sum() == pytest.approx(1, abs=1e-3)
