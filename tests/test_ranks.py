"""Ranks: criteria against a full SVD, the noise floor against known truth, the budget against exhaustive search."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from deltafmt.dtypes import DTYPES
from deltafmt.methods.ranks import (
    Allocation,
    Candidate,
    Criterion,
    EnergyFraction,
    ErrorBound,
    FixedRank,
    NoiseFloor,
    allocate,
    break_even,
    noise_edge,
    search,
)
from deltafmt.methods.svd import Spectrum

Float32 = npt.NDArray[np.float32]
NUMPY = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}


def rounded(values: npt.NDArray[np.floating], name: str) -> Float32:
    return values.astype(NUMPY[name]).astype(np.float32)


def low_rank(out: int, in_: int, rank: int, seed: int = 1) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((out, rank)) @ rng.standard_normal((rank, in_))


def uneven_weights(out: int, in_: int, seed: int = 2) -> npt.NDArray[np.float64]:
    """Like real layers: rows and columns of very different size."""
    rng = np.random.default_rng(seed)
    rows, columns = np.exp(rng.normal(0, 0.5, (out, 1))), np.exp(rng.normal(0, 0.5, (1, in_)))
    return 0.04 * rows * columns * rng.standard_normal((out, in_))


@pytest.mark.parametrize(
    ("out", "in_", "dense_bytes", "width", "rank"),
    [
        (100, 50, 10_000, 2, 33),  # 33 * 300 = 9900 < 10000 <= 34 * 300
        (100, 50, 9_900, 2, 32),  # as large is not smaller
        (100, 50, 9_901, 2, 33),
        (100, 50, 0, 2, 0),
        (4096, 4096, 4096 * 4096 * 2, 2, 2047),
        (3, 1000, 10**9, 4, 3),  # never more than the smaller side
        (0, 5, 100, 2, 0),
    ],
)
def test_break_even(out: int, in_: int, dense_bytes: int, width: int, rank: int) -> None:
    assert break_even(out, in_, dense_bytes, width) == rank


@pytest.fixture(scope="module")
def sloped() -> Float32:
    """A matrix 300 x 260 with a gently falling spectrum."""
    left, _ = np.linalg.qr(low_rank(300, 260, 260))
    right, _ = np.linalg.qr(low_rank(260, 260, 260, seed=3))
    return np.asarray((left * 0.98 ** np.arange(260)) @ right, np.float32)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.99])
def test_energy_fraction_takes_the_fewest_components(sloped: Float32, fraction: float) -> None:
    squares = np.linalg.svd(sloped.astype(np.float64), compute_uv=False) ** 2
    expected = next(r for r in range(261) if squares[:r].sum() >= fraction * squares.sum())
    choice = search(sloped, EnergyFraction(fraction), 260)
    assert choice.factors is not None
    assert choice.factors.rank == expected


@pytest.mark.parametrize("relative", [0.8, 0.3, 0.05, 0.01])
def test_error_bound_is_met_by_the_fewest_components(sloped: Float32, relative: float) -> None:
    values = np.linalg.svd(sloped.astype(np.float64), compute_uv=False)
    norm = float(np.linalg.norm(sloped.astype(np.float64)))
    expected = next(r for r in range(261) if np.sqrt((values[r:] ** 2).sum()) <= relative * norm)
    choice = search(sloped, ErrorBound((relative * norm) ** 2), 260)
    assert choice.factors is not None
    assert choice.factors.rank == expected
    product = choice.factors.b.astype(np.float64).T @ choice.factors.a
    assert np.linalg.norm(sloped - product) <= relative * norm * (1 + 1e-6)


def test_fixed_rank(sloped: Float32) -> None:
    choice = search(sloped, FixedRank(70), 100)
    assert choice.factors is not None
    assert choice.factors.rank == 70
    exhausted = search(np.diag(np.arange(5, dtype=np.float32)), FixedRank(200), 200)
    assert exhausted.factors is not None
    assert exhausted.factors.rank == 4


@pytest.mark.parametrize(
    "criterion", [FixedRank(41), EnergyFraction(0.9999), ErrorBound(1e-3), NoiseFloor(1e-4), NoiseFloor(0.0)]
)
def test_what_does_not_pay_is_given_up_with_the_numbers(sloped: Float32, criterion: Criterion) -> None:
    choice = search(sloped, criterion, 40)
    assert choice.factors is None
    assert "pays up to 40" in choice.reason
    assert len(choice.known.values) <= 41


def test_a_rank_of_exactly_the_limit_pays() -> None:
    matrix = low_rank(200, 150, 40).astype(np.float32)
    choice = search(matrix, NoiseFloor(1e-2), 40)
    assert choice.factors is not None
    assert choice.factors.rank == 40
    assert search(matrix, NoiseFloor(1e-2), 39).factors is None


def test_a_hopeless_search_stops_at_the_first_look() -> None:
    flat = np.random.default_rng(0).standard_normal((600, 600), dtype=np.float32)
    for criterion in (NoiseFloor(1.0), EnergyFraction(0.99), ErrorBound(100.0)):
        assert len(search(flat, criterion, 150).known.values) == 32


def test_lower_bounds_never_exceed_the_answer(sloped: Float32) -> None:
    values = np.linalg.svd(sloped.astype(np.float64), compute_uv=False)
    everything = Spectrum(values, 0.0, 260)
    for criterion in (EnergyFraction(0.7), EnergyFraction(0.999), ErrorBound(0.01), NoiseFloor(0.05), NoiseFloor(0.9)):
        answer = criterion.rank(everything)
        assert answer is not None
        for count in range(1, 260, 20):
            known = Spectrum(values[:count], float(np.sum(values[count:] ** 2)), 260)
            assert criterion.rank(known) in (None, answer)
            if criterion.rank(known) is None:
                assert criterion.at_least(known) <= answer


@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("rank", [1, 16, 50])
@pytest.mark.parametrize("both", [False, True])
def test_the_true_rank_is_found_beneath_rounding(name: str, rank: int, both: bool) -> None:
    weight = uneven_weights(400, 320)
    reference = rounded(weight, name)
    delta = low_rank(400, 320, rank)
    delta *= 0.05 * np.linalg.norm(weight) / np.linalg.norm(delta)
    target = rounded((weight if both else reference) + delta, name)
    noisy = [(target, DTYPES[name])] + ([(reference, DTYPES[name])] if both else [])
    choice = search(target - reference, NoiseFloor(noise_edge(noisy)), 150)
    assert choice.factors is not None
    assert choice.factors.rank == rank


@pytest.mark.parametrize("name", ["BF16", "F16"])
@pytest.mark.parametrize("seed", range(3))
def test_pure_rounding_noise_has_rank_zero(name: str, seed: int) -> None:
    weight = uneven_weights(300, 200, seed=10 + seed)
    target = rounded(weight, name)
    noise = np.asarray(target - weight, np.float32)
    edge = noise_edge([(target, DTYPES[name])], seed=seed)
    largest = np.linalg.svd(noise.astype(np.float64), compute_uv=False)[0]
    assert largest < edge < 1.5 * largest  # above the noise, but not so far that signal is lost
    choice = search(noise, NoiseFloor(edge), 50)
    assert choice.factors is not None
    assert choice.factors.rank == 0


def test_the_edge_of_even_noise_is_the_marchenko_pastur_edge() -> None:
    # all weights in [1, 2): one ulp of 2**-7, so the largest singular value is known in closed form
    weight = np.random.default_rng(4).uniform(1, 2, (600, 400)).astype(np.float32)
    theory = 2.0**-7 / np.sqrt(12) * (np.sqrt(600) + np.sqrt(400))
    one = noise_edge([(weight, DTYPES["BF16"])])
    assert theory < one < 1.2 * theory
    assert noise_edge([(weight, DTYPES["BF16"])] * 2) == pytest.approx(one * np.sqrt(2), rel=1e-3)
    assert noise_edge([(weight, DTYPES["F16"])]) == pytest.approx(one / 8, rel=1e-3)


def test_one_giant_weight_does_not_pass_for_signal() -> None:
    weight = uneven_weights(100, 100)
    weight[7, 9] = 1000.0 + 1.9  # errs by up to half its ulp of 4, far above all other noise
    target = rounded(weight, "BF16")
    choice = search((target - weight).astype(np.float32), NoiseFloor(noise_edge([(target, DTYPES["BF16"])])), 50)
    assert choice.factors is not None
    assert choice.factors.rank == 0


def test_zeros_and_subnormals_have_the_smallest_ulp() -> None:
    zeros = np.zeros((4, 4), np.float32)
    assert 0 < noise_edge([(zeros, DTYPES["F16"])]) < 2.0**-24 * 8
    assert noise_edge([(np.zeros((0, 4), np.float32), DTYPES["F16"])]) == 0.0


def test_noise_edge_needs_matrices_of_one_shape() -> None:
    with pytest.raises(ValueError, match="one shape"):
        noise_edge([])
    with pytest.raises(ValueError, match="F64"):
        noise_edge([(np.zeros((2, 3), np.float32), DTYPES["F64"])])
    with pytest.raises(ValueError, match="one shape"):
        noise_edge([(np.zeros((2, 3), np.float32), DTYPES["F16"]), (np.zeros((3, 2), np.float32), DTYPES["F16"])])


def test_the_true_rank_is_found_on_real_weights(minilm_dir: Path) -> None:
    weights = load_file(minilm_dir / "model.safetensors")
    names = sorted(name for name, array in weights.items() if ".layer.1." in name and array.ndim == 2)
    assert names
    for name in names:
        reference = rounded(weights[name], "BF16")
        delta = low_rank(reference.shape[0], reference.shape[1], 16)
        delta *= 0.1 * np.linalg.norm(reference) / np.linalg.norm(delta)
        target = rounded(reference + delta, "BF16")
        choice = search(target - reference, NoiseFloor(noise_edge([(target, DTYPES["BF16"])])), 90)
        assert choice.factors is not None, name
        assert choice.factors.rank == 16, name


def test_criteria_refuse_what_means_nothing() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        FixedRank(0)
    for fraction in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="energy fraction"):
            EnergyFraction(fraction)
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="negative"):
            ErrorBound(bad)
        with pytest.raises(ValueError, match="negative"):
            NoiseFloor(bad)


def options(candidate: Candidate) -> list[tuple[int | None, int, float]]:
    """Every way to store one tensor: rank (None for lossless), bytes, squared relative error."""
    squares = np.append(candidate.known.values**2, candidate.known.tail)
    ways: list[tuple[int | None, int, float]] = [(None, candidate.lossless_bytes, 0.0)]
    for rank in range(candidate.least_rank, len(candidate.known.values) + 1):
        error = float(squares[rank:].sum()) / candidate.weight_energy
        ways.append((rank, rank * candidate.component_bytes, error))
    return ways


def lowest_error(candidates: Mapping[str, Candidate], budget: int) -> float:
    """The least total error within the budget, by trying every combination; infinite if none fits."""
    best = float("inf")
    for ways in itertools.product(*(options(candidate) for candidate in candidates.values())):
        if sum(cost for _, cost, _ in ways) <= budget:
            best = min(best, sum(error for _, _, error in ways))
    return best


def check_consistent(candidates: Mapping[str, Candidate], result: Allocation) -> None:
    """The result's bytes and error are those of its ranks."""
    chosen = [
        next(way for way in options(candidate) if way[0] == result.ranks[name])
        for name, candidate in candidates.items()
    ]
    assert result.stored_bytes == sum(cost for _, cost, _ in chosen)
    assert result.error == pytest.approx(sum(error for _, _, error in chosen), abs=1e-12)


@st.composite
def budget_problems(draw: st.DrawFn, same_cost: bool) -> tuple[dict[str, Candidate], int]:
    cost = draw(st.integers(1, 20))
    problem: dict[str, Candidate] = {}
    for index in range(draw(st.integers(1, 3))):
        values = np.sort(draw(st.lists(st.floats(0.1, 10), min_size=1, max_size=5)))[::-1].astype(np.float64)
        tail = draw(st.floats(0, float(values[-1]) ** 2))
        problem[f"t{index}"] = Candidate(
            known=Spectrum(values, tail, len(values) + 3),
            component_bytes=cost if same_cost else draw(st.integers(1, 20)),
            lossless_bytes=10**6 if same_cost else draw(st.integers(1, 120)),
            weight_energy=draw(st.floats(50, 500)),
            least_rank=draw(st.integers(0, 1)),
        )
    return problem, draw(st.integers(0, 200))


@settings(deadline=None, max_examples=150)
@given(budget_problems(same_cost=True))
def test_equal_costs_are_allocated_optimally(problem: tuple[dict[str, Candidate], int]) -> None:
    candidates, budget = problem
    result = allocate(candidates, budget)
    check_consistent(candidates, result)
    best = lowest_error(candidates, budget)
    assert result.feasible == (best < float("inf"))
    if result.feasible:
        assert result.stored_bytes <= budget
        assert result.error == pytest.approx(best, rel=1e-9)


@settings(deadline=None, max_examples=150)
@given(budget_problems(same_cost=False))
def test_unequal_costs_are_within_one_step_of_the_optimum(problem: tuple[dict[str, Candidate], int]) -> None:
    candidates, budget = problem
    result = allocate(candidates, budget)
    check_consistent(candidates, result)
    least = sum(min(cost for _, cost, _ in options(candidate)) for candidate in candidates.values())
    assert result.feasible == (least <= budget)
    if not result.feasible:
        assert result.stored_bytes == least
        return
    assert result.stored_bytes <= budget
    best = lowest_error(candidates, budget)
    # The relaxation bound: no allocation beats the greedy one by more than the gain of one step.
    largest_step = max(max(error for _, _, error in options(candidate)) for candidate in candidates.values())
    assert best <= result.error + 1e-12
    assert result.error <= best + largest_step + 1e-12


@pytest.mark.parametrize("seed", range(60))
def test_unequal_costs_are_optimal_where_a_price_per_byte_clears_the_budget(seed: int) -> None:
    # Everett (1963): what minimises error + price * bytes is optimal for the bytes it uses.
    # So at those budgets the truth is known for any number of tensors, without search.
    rng = np.random.default_rng(seed)
    candidates: dict[str, Candidate] = {}
    for index in range(12):
        values = np.sort(rng.exponential(1, rng.integers(1, 20)))[::-1]
        known = Spectrum(values, float(rng.uniform(0, values[-1] ** 2)), len(values) + 1)
        cost = int(rng.integers(1, 50))
        lossless = int(rng.integers(cost, cost * 30))
        weight = float(rng.uniform(1, 4)) * known.total
        candidates[f"t{index}"] = Candidate(known, cost, lossless, weight, int(rng.integers(0, 2)))
    price = float(rng.uniform(1e-5, 1e-2))
    best = [min(options(c), key=lambda way: way[2] + price * way[1]) for c in candidates.values()]
    result = allocate(candidates, sum(cost for _, cost, _ in best))
    check_consistent(candidates, result)
    assert list(result.ranks.values()) == [rank for rank, _, _ in best]


def test_water_fills_between_tensors() -> None:
    loud = Candidate(Spectrum(np.array([9.0, 8.0, 1.0]), 0.0, 3), 10, 10**6, 1000.0)
    quiet = Candidate(Spectrum(np.array([5.0, 2.0, 1.5]), 0.0, 3), 10, 10**6, 1000.0)
    assert allocate({"loud": loud, "quiet": quiet}, 30).ranks == {"loud": 2, "quiet": 1}
    assert allocate({"loud": loud, "quiet": quiet}, 49).ranks == {"loud": 2, "quiet": 2}
    assert allocate({"loud": loud, "quiet": quiet}, 0).ranks == {"loud": 0, "quiet": 0}


def test_a_rich_budget_makes_everything_lossless() -> None:
    candidates = {
        name: Candidate(Spectrum(np.array([3.0, 2.0]), 1.0, 50), 10, cost, 100.0)
        for name, cost in (("a", 90), ("b", 70))
    }
    result = allocate(candidates, 160)
    assert result.ranks == {"a": None, "b": None}
    assert (result.stored_bytes, result.error, result.feasible) == (160, 0.0, True)


def test_an_infeasible_budget_says_what_would_do() -> None:
    candidates = {"a": Candidate(Spectrum(np.array([3.0]), 1.0, 5), 10, 100, 10.0, least_rank=1)}
    result = allocate(candidates, 9)
    assert not result.feasible
    assert result.stored_bytes == 10
    assert allocate(candidates, 10).feasible


def test_a_spectrum_that_is_too_short_is_reported() -> None:
    short = Candidate(Spectrum(np.array([3.0, 2.9]), 80.0, 50), 10, 10**6, 100.0)
    whole = Candidate(Spectrum(np.array([3.0, 2.9]), 0.0, 2), 10, 10**6, 100.0)
    assert allocate({"short": short, "whole": whole}, 1000).starved == ("short",)
    assert allocate({"short": short, "whole": whole}, 40).starved == ()


def test_zero_weights_cost_nothing() -> None:
    zero = Candidate(Spectrum(np.zeros(0), 0.0, 0), 10, 30, 0.0)
    assert allocate({"zero": zero}, 0).ranks == {"zero": 0}
