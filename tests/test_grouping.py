"""How many groups a patch gets, against an exhaustive search and against what a reader accepts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deltafmt.errors import MalformedError
from deltafmt.methods.grouping import _BY_MARGIN as COST
from deltafmt.methods.grouping import _FRACTION, exponent_bounds, kinds, margin_bounds
from deltafmt.native import library
from deltafmt.operators.groups import Groups

Keys = npt.NDArray[Any]

pytestmark = pytest.mark.usefixtures("way")


def cost(keys: Keys, missed: npt.NDArray[np.bool_], bounds: Sequence[int], elements: int) -> float:
    """Bytes of a chunk, by the entropy of misses in each group and what groups cost."""
    total = 0.0
    which = np.searchsorted(np.asarray(bounds), keys, side="right")
    for group in np.unique(which):
        inside = missed[which == group]
        share = float(inside.mean())
        if 0 < share < 1:
            total -= len(inside) * (share * math.log2(share) + (1 - share) * math.log2(1 - share))
    return total / 8 * elements / len(keys) + COST * len(np.unique(which))


samples = st.lists(st.tuples(st.sampled_from([3, 4, 5, 7, 9]), st.booleans()), min_size=1, max_size=200)


NEARLY_A_TIE = [(3, False)] * 10 + [(4, False)] * 4 + [(4, True)] + [(5, False)] * 3 + [(5, True)]


@given(samples, st.sampled_from([1000, 30_000, 260_000]))
@example(NEARLY_A_TIE, 260_000)
def test_no_other_bounds_cost_less(sample: list[tuple[int, bool]], elements: int) -> None:
    """But for what whole numbers of fractions of a bit round: at most half of one for each count of each group."""
    keys = np.array([key for key, _ in sample], np.uint8)
    missed = np.array([miss for _, miss in sample])
    found = margin_bounds(keys, missed, elements)
    values = sorted(set(keys.tolist()))[1:]
    choices = itertools.chain.from_iterable(itertools.combinations(values, n) for n in range(len(values) + 1))
    best = min(choices, key=lambda choice: cost(keys, missed, choice, elements))
    counts = 3 * (len(found) + len(best) + 2)
    rounding = counts * 0.5 / _FRACTION / 8 * elements / len(keys)
    found_cost, best_cost = (cost(keys, missed, bounds, elements) for bounds in (found, best))
    assert found_cost == pytest.approx(best_cost, abs=rounding)


def test_misses_near_the_border_get_a_group_of_their_own() -> None:
    """One element in a thousand is close; half of these are missed, and none of the others."""
    keys = np.repeat(np.array([105, 120], np.uint8), [1000, 999_000])
    missed = np.zeros(len(keys), np.bool_)
    missed[:1000:2] = True
    assert margin_bounds(keys, missed, 260_000) == (120,)
    assert margin_bounds(keys, np.zeros_like(missed), 260_000) == ()
    assert margin_bounds(keys, np.ones_like(missed), 260_000) == ()


keys8 = st.lists(st.integers(0, 255), min_size=1, max_size=400).map(lambda each: np.array(each, np.uint8))
keys16 = st.lists(st.integers(0, 2047), min_size=1, max_size=400).map(lambda each: np.array(each, np.uint16))


def assert_a_reader_takes(by: str, bounds: tuple[int, ...]) -> None:
    """No bounds mean no groups."""
    if bounds:
        assert Groups.parse({"by": by, "bounds": list(bounds)}, "/groups") == Groups(by, bounds)


@given(keys8 | keys16, st.sampled_from([np.uint16, np.uint32, np.uint64]), st.integers(1, 1 << 18), st.integers(0, 99))
def test_bounds_by_exponent_are_valid(keys: Keys, dtype: type[Any], elements: int, seed: int) -> None:
    residuals = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, len(keys), dtype, endpoint=True)
    assert_a_reader_takes("exponent", exponent_bounds(kinds(keys, residuals), elements))


@given(keys8 | keys16, st.integers(1, 1 << 18), st.integers(0, 2**32))
def test_bounds_by_margin_are_valid(keys: Keys, elements: int, seed: int) -> None:
    missed = np.random.default_rng(seed).random(len(keys)) < 0.3
    assert_a_reader_takes("margin", margin_bounds(keys, missed, elements))


@pytest.mark.parametrize("bounds", [(0,), (5, 5), (6, 5), (2048,)])
def test_a_reader_takes_no_others(bounds: tuple[int, ...]) -> None:
    with pytest.raises(MalformedError):
        assert_a_reader_takes("exponent", bounds)


@given(keys8 | keys16, st.integers(1, 1 << 18), st.integers(0, 99))
def test_without_kernels_the_bounds_are_the_same(keys: Keys, elements: int, seed: int) -> None:
    """Or an archive would depend on where it was packed."""
    random = np.random.default_rng(seed)
    residuals = (random.exponential(2.0 ** (keys % 11)) * random.integers(1, 9)).astype(np.uint32)
    found = exponent_bounds(kinds(keys, residuals), elements), margin_bounds(keys, residuals > 3, elements)
    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(library, "LIBRARY", None)
        assert found == (
            exponent_bounds(kinds(keys, residuals), elements),
            margin_bounds(keys, residuals > 3, elements),
        )


def entropy(residuals: Keys, which: Keys) -> float:
    """Bytes of residuals whose groups are known."""
    bits = 0.0
    for group in np.unique(which):
        _, counts = np.unique(residuals[which == group], return_counts=True)
        bits -= float(np.sum(counts * np.log2(counts / counts.sum())))
    return bits / 8


def exponents_of_weights(count: int) -> Keys:
    values = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    return (values.view(np.uint32) >> 23 & 0xFF).astype(np.uint8)


@pytest.mark.parametrize("typical", [0.1, 1, 30])
def test_groups_of_exponents_say_most_of_what_exponents_do(typical: float) -> None:
    """Noise of one size, rounded to last places that depend on the exponent."""
    keys = exponents_of_weights(1 << 17)
    noise = typical * np.random.default_rng(1).standard_normal(len(keys)) * 2.0 ** (126 - keys.astype(float))
    places = np.clip(np.rint(noise), -30_000, 30_000).astype(np.int64)
    residuals = np.where(places < 0, -2 * places - 1, 2 * places).astype(np.uint16)  # zigzag
    bounds = exponent_bounds(kinds(keys, residuals), len(keys))
    alone, all_known = entropy(residuals, np.zeros_like(keys)), entropy(residuals, keys)
    known = entropy(residuals, np.searchsorted(np.asarray(bounds), keys, side="right"))
    assert all_known < 0.95 * alone
    assert known <= all_known + 0.15 * (alone - all_known)


def test_exponents_that_say_nothing_make_no_groups() -> None:
    keys = exponents_of_weights(1 << 17)
    residuals = np.random.default_rng(1).integers(0, 8, len(keys)).astype(np.uint16)
    assert exponent_bounds(kinds(keys, residuals), len(keys)) == ()
    assert exponent_bounds(kinds(keys, np.zeros_like(residuals)), len(keys)) == ()
    assert exponent_bounds(kinds(np.full_like(keys, 120), residuals), len(keys)) == ()
