"""The looks at a part of a tensor that decide whether low rank is looked for, and in which rows it then is."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from deltafmt.dtypes import DTYPES, Bits, Dtype, round_to, widen
from deltafmt.methods import adapter
from deltafmt.methods.matrices import spread
from deltafmt.methods.merged import computed
from deltafmt.methods.prediction import Computed, Elements, Prediction, Referred
from deltafmt.methods.recovery import PART, promising
from deltafmt.methods.sketch import leaves_noise
from deltafmt.operators import Ref

BF16, F16, F32 = DTYPES["BF16"], DTYPES["F16"], DTYPES["F32"]
SPREAD = 0.02
ULP = {"BF16": 2.0**-13, "F16": 2.0**-16, "F32": 2.0**-29}  # of a weight as large as the spread
Floats = npt.NDArray[Any]


def gaussian(*shape: int, seed: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape)


def based(rows: int, columns: int, dtype: Dtype = BF16) -> Floats:
    """Random weights of the dtype, in the type that a merge adds to."""
    wide = np.dtype("f8" if dtype is F32 else "f4")
    values = (SPREAD * gaussian(rows, columns, seed=1)).astype(wide)
    return np.asarray(widen(round_to(values, dtype), dtype, wide))


def low_rank(rows: int, columns: int, rank: int, size: float) -> Floats:
    product: Floats = gaussian(rows, rank, seed=2) @ gaussian(rank, columns, seed=3)
    return np.asarray(product * (size / np.sqrt(rank)))


def added(base: Floats, update: Floats, dtype: Dtype = BF16) -> Bits:
    return round_to((base + update).astype(base.dtype), dtype)


def test_places_are_distinct_ordered_and_not_in_step() -> None:
    places = spread(1000, 300)
    assert len(places) == 300
    assert np.all(np.diff(places) > 0)
    assert 0 <= places[0] < places[-1] < 1000
    assert len(set(np.diff(places))) > 5
    np.testing.assert_array_equal(spread(5, 300), np.arange(5))
    assert len(spread(0, 300)) == 0


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("ulps", [0.1, 0.5, 3, 40])
def test_low_rank_leaves_noise(dtype: Dtype, rank: int, ulps: float) -> None:
    base = based(256, 600, dtype)
    assert leaves_noise(base, added(base, low_rank(256, 600, rank, ulps * ULP[dtype.name]), dtype), dtype)


@pytest.mark.parametrize("rank", [130, 150])
def test_a_rank_above_half_of_what_is_looked_at_leaves_noise_too(rank: int) -> None:
    base = based(1100, 1000)
    assert leaves_noise(base, added(base, low_rank(1100, 1000, rank, 3 * ULP["BF16"])), BF16)


@pytest.mark.parametrize("rank", [8, 32, 64])
def test_twice_rounded_has_twice_the_noise(rank: int) -> None:
    base = based(256, 600)
    once = added(base, low_rank(256, 600, rank, 3 * ULP["BF16"]))
    other = gaussian(256, 1, seed=5) @ gaussian(1, 600, seed=6) * (4 * ULP["BF16"])
    assert leaves_noise(base, added(widen(once, BF16, np.dtype("f4")), other), BF16)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("ulps", [3, 40, 3000])
def test_full_rank_leaves_more_than_noise(dtype: Dtype, ulps: float) -> None:
    base = based(256, 600, dtype)
    noise = ulps * ULP[dtype.name] * gaussian(256, 600, seed=4)
    assert not leaves_noise(base, added(base, noise, dtype), dtype)
    decaying = np.linspace(2, 0.1, 600) * noise  # as real fine-tunes do
    assert not leaves_noise(base, added(base, decaying, dtype), dtype)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_rounding_to_zero_leaves_no_noise(dtype: Dtype) -> None:
    """Of a pruned model that was trained on, the zeros say nothing of how exact the others are."""
    kept = np.random.default_rng(6).random((256, 600)) < 0.1
    base = based(256, 600, dtype) * kept
    noise = 3 * ULP[dtype.name] * gaussian(256, 600, seed=4) * kept
    assert not leaves_noise(base, added(base, noise, dtype), dtype)


def test_neither_nothing_nor_infinity_leaves_noise() -> None:
    base = based(200, 200)
    bits = added(base, 0 * base)
    assert not leaves_noise(base, bits, BF16)
    base[:] = np.inf
    assert not leaves_noise(base, bits, BF16)


@pytest.mark.parametrize(("shape", "ulps"), [((576, 576), 0.1), ((1536, 576), 0.3), ((4096, 4096), 0.1)])
def test_a_part_promises_updates_below_the_last_place(shape: tuple[int, int], ulps: float) -> None:
    side = min(PART, *shape)
    base = based(side, side)
    assert promising(base, added(base, low_rank(side, side, 8, ulps * ULP["BF16"])), BF16, shape)


def test_a_part_promises_only_what_pays_for_the_factors_of_the_whole() -> None:
    base = based(576, 576)
    target = added(base, low_rank(576, 576, 32, 0.1 * ULP["BF16"]))
    assert promising(base, target, BF16, (8192, 8192))
    assert not promising(base, target, BF16, (576, 576))


@pytest.mark.parametrize("relative", [1e-2, 1e-3])
def test_noise_promises_nothing(relative: float) -> None:
    base = based(576, 576)
    target = added(base, relative * SPREAD * gaussian(576, 576, seed=4))
    assert not promising(base, target, BF16, (4096, 4096))
    assert not promising(base, added(base, 0 * base), BF16, (4096, 4096))


# --- Through to the recipe ------------------------------------------------------------------------------------------


def found(base: Floats, target: Bits, stored: float = np.inf) -> list[Prediction]:
    reference = Referred(Ref("w", "base"), BF16, round_to(base, BF16).reshape(-1))
    return list(computed("w", Elements(BF16, target.shape, target.reshape(-1)), [reference], stored))


def test_rows_that_nothing_changed_and_rows_that_were_replaced_do_not_spoil_the_fit() -> None:
    """An embedding: a LoRA on 600 of 3,000 rows, 12 new tokens among them, the rest as it was."""
    base = based(3000, 384)
    trained = np.sort(np.random.default_rng(7).permutation(3000)[:600])
    update = np.zeros_like(base)
    update[trained] = low_rank(600, 384, 6, 3 * ULP["BF16"])
    new = trained[::50]
    update[new] = SPREAD * gaussian(len(new), 384, seed=8)
    target = added(base, update)
    (prediction,) = found(base, target)
    assert isinstance(prediction, Computed)
    predicted = np.array(prediction.predicted(0, target.size, BF16, None)[0]).reshape(target.shape)
    hits = (predicted == target).mean(axis=1)
    others = np.setdiff1d(np.arange(3000), trained)
    assert np.all(hits[others] == 1)
    assert hits[np.setdiff1d(trained, new)].mean() > 0.93
    assert prediction.own_bytes < 6 * (3000 + 384) * 2


def test_small_patches_are_left_alone() -> None:
    base = based(576, 576)
    target = added(base, low_rank(576, 576, 4, 0.3 * ULP["BF16"]))
    assert found(base, target, target.size * 0.41 / 8)
    assert not found(base, target, target.size * 0.39 / 8)


@pytest.mark.parametrize("decay", ["all rows alike", "each row by itself"])
@pytest.mark.parametrize("noise", [0.1, 2.0])
def test_what_trains_all_weights_and_decays_them_is_not_fitted(
    decay: str, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = based(768, 512)
    rows = 0.998 if decay == "all rows alike" else 1 - 0.01 * np.random.default_rng(5).random((768, 1))
    target = added(base, (rows - 1) * base + noise * ULP["BF16"] * gaussian(768, 512, seed=6))
    fitted: list[Any] = []
    monkeypatch.setattr(adapter, "recover", lambda *each: fitted.append(each))
    assert not found(base, target)
    assert not fitted  # the look at a part has to tell: a fit of the whole takes minutes


def test_rows_that_decayed_and_nothing_else_are_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    base = based(768, 512)
    target = added(base, -0.01 * np.random.default_rng(5).random((768, 1)) * base)
    fitted: list[Any] = []
    monkeypatch.setattr(adapter, "recover", lambda *each: fitted.append(each))
    (prediction,) = found(base, target)
    predicted, _ = prediction.predicted(0, target.size, BF16, None)
    assert np.mean(predicted == target.reshape(-1)) > 0.99
    assert not fitted


@pytest.mark.parametrize("rank_one", [True, False])
@pytest.mark.parametrize("low", [0.0, 1.0])
def test_rows_that_grew_beyond_measure_are_no_reason_to_fail(rank_one: bool, low: float) -> None:
    """Numbers, and what they make of a row, may leave float32."""
    shape = gaussian(300, 1, seed=5) @ gaussian(1, 200, seed=6) if rank_one else np.ones((300, 200))
    base = np.asarray(widen(round_to((1e-38 * shape).astype("f4"), BF16), BF16, np.dtype("f4")))
    target = round_to((1e8 * shape + low * low_rank(300, 200, 4, 1e8)).astype("f4"), BF16)
    for prediction in found(base, target):
        prediction.predicted(0, target.size, BF16, None)
