"""Truncated SVD against numpy's full one, on synthetic truth and on real weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from deltafmt.methods.svd import Factors, energy, residual_energy, spectrum, truncated_svd


def gaussian(*shape: int, seed: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def optimal_error(matrix: npt.NDArray[np.float32], rank: int) -> float:
    """Eckart-Young, from numpy's full SVD in float64."""
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    return float(np.sqrt(np.sum(values[rank:] ** 2)))


def error_of(matrix: npt.NDArray[np.float32], factors: Factors) -> float:
    product = factors.b.astype(np.float64).T @ factors.a.astype(np.float64)
    return float(np.linalg.norm(matrix - product))


@pytest.mark.parametrize("shape", [(700, 900), (900, 700), (500, 2000)])
@pytest.mark.parametrize("rank", [1, 16, 64])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.5])
def test_error_is_close_to_the_optimum(shape: tuple[int, int], rank: int, decay: float) -> None:
    # from a spectrum as flat as noise, the hardest for a randomised method, to a steep one
    middle = min(shape)
    matrix = (gaussian(shape[0], middle) * np.arange(1, middle + 1, dtype=np.float32) ** -decay) @ gaussian(
        middle, shape[1], seed=2
    )
    factors = truncated_svd(matrix, rank)
    assert factors.b.shape == (rank, shape[0])
    assert factors.a.shape == (rank, shape[1])
    assert factors.b.dtype == factors.a.dtype == np.float32
    assert error_of(matrix, factors) <= optimal_error(matrix, rank) * 1.001


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (1, 50), (50, 1), (1, 1), (300, 300)])
def test_small_matrices_are_decomposed_completely(shape: tuple[int, int]) -> None:
    matrix = gaussian(*shape)
    factors = truncated_svd(matrix, 100)
    truth = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[:100]
    assert factors.rank == min(100, *shape)
    np.testing.assert_allclose(factors.singular_values, truth, rtol=1e-5)


def test_components_are_orthogonal_descending_and_balanced() -> None:
    factors = truncated_svd(gaussian(600, 800), 32)
    assert np.all(np.diff(factors.singular_values) <= 0)
    for side in (factors.a, factors.b):
        gram = side.astype(np.float64) @ side.astype(np.float64).T
        np.testing.assert_allclose(gram, np.diag(factors.singular_values), atol=1e-5 * factors.singular_values[0])


def test_a_prefix_is_the_best_approximation_of_its_rank() -> None:
    matrix = gaussian(300, 400)
    prefix = truncated_svd(matrix, 64).prefix(10)
    assert prefix.rank == 10
    assert error_of(matrix, prefix) == pytest.approx(optimal_error(matrix, 10), rel=1e-6)


def test_repeats_to_the_bit() -> None:
    matrix = gaussian(600, 700)
    first, second = truncated_svd(matrix, 20), truncated_svd(matrix.copy(), 20)
    assert first.a.tobytes() == second.a.tobytes()
    assert first.b.tobytes() == second.b.tobytes()


@pytest.mark.parametrize(("out", "in_"), [(900, 700), (20, 30)])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_deficient_matrix_gives_its_components_only(out: int, in_: int, rank: int) -> None:
    rng = np.random.default_rng(3)
    integers = rng.integers(-3, 4, (out, rank)) @ rng.integers(-3, 4, (rank, in_))
    matrix = integers.astype(np.float32)
    assert np.linalg.matrix_rank(integers) == rank
    factors = truncated_svd(matrix, 15)
    assert factors.rank == rank
    assert error_of(matrix, factors) <= 1e-6 * np.linalg.norm(matrix)
    assert spectrum(matrix, 15).complete


@pytest.mark.parametrize("shape", [(30, 20), (0, 20), (20, 0)])
def test_zero_and_empty_matrices_have_no_components(shape: tuple[int, int]) -> None:
    factors = truncated_svd(np.zeros(shape, np.float32), 5)
    assert (factors.b.shape, factors.a.shape) == ((0, shape[0]), (0, shape[1]))
    known = spectrum(np.zeros(shape, np.float32), 5)
    assert (known.total, known.complete) == (0.0, True)


@pytest.mark.parametrize("exponent", [-120, -70, 60, 115])
def test_scale_does_not_matter(exponent: int) -> None:
    matrix = gaussian(300, 250)
    plain, scaled = truncated_svd(matrix, 4), truncated_svd(np.ldexp(matrix, exponent), 4)
    np.testing.assert_allclose(scaled.singular_values, np.ldexp(plain.singular_values, exponent), rtol=1e-5)
    np.testing.assert_allclose(
        scaled.b.astype(np.float64).T @ scaled.a,
        np.ldexp(plain.b.astype(np.float64).T @ plain.a, exponent),
        rtol=0,
        atol=float(np.ldexp(1e-4, exponent)),
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused(bad: float) -> None:
    matrix = gaussian(10, 10)
    matrix[3, 4] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        truncated_svd(matrix, 2)


def test_what_is_no_float32_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        truncated_svd(np.zeros((3, 3)), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two-dimensional"):
        truncated_svd(np.zeros(3, np.float32), 1)
    with pytest.raises(ValueError, match="negative"):
        truncated_svd(np.zeros((3, 3), np.float32), -1)


def test_spectrum_knows_the_error_of_each_rank() -> None:
    matrix = gaussian(200, 120)
    known = spectrum(matrix, 16)
    assert not known.complete
    for rank in (0, 5, 16):
        assert known.error_energy(rank) == pytest.approx(optimal_error(matrix, rank) ** 2, rel=1e-6)
    np.testing.assert_allclose(known.error_energies(), [known.error_energy(rank) for rank in range(17)])
    assert known.total == pytest.approx(energy(matrix), rel=1e-6)
    with pytest.raises(ValueError, match="17"):
        known.error_energy(17)


def test_the_tail_is_right_far_below_the_total() -> None:
    # a difference of energies in float32 would be lost here: the rest is 1e-10 of the total
    strong = np.outer(gaussian(400), gaussian(500, seed=5))
    weak = gaussian(400, 500, seed=6) * 1e-5
    matrix = strong + weak
    assert spectrum(matrix, 1).tail == pytest.approx(optimal_error(matrix, 1) ** 2, rel=0.02)


def test_energies_of_a_matrix_larger_than_one_block() -> None:
    matrix = gaussian(3000, 500)
    assert energy(matrix) == pytest.approx(float(np.linalg.norm(matrix.astype(np.float64))) ** 2, rel=1e-12)
    factors = truncated_svd(matrix, 3)
    assert residual_energy(matrix, factors) == pytest.approx(error_of(matrix, factors) ** 2, rel=1e-6)


def test_real_weights(minilm_dir: Path) -> None:
    weights = load_file(minilm_dir / "model.safetensors")
    names = sorted(name for name, array in weights.items() if ".layer.3." in name and array.ndim == 2)
    assert names
    for name in names:
        matrix = weights[name].astype(np.float32)
        for rank in (8, 64):
            assert error_of(matrix, truncated_svd(matrix, rank)) <= optimal_error(matrix, rank) * 1.001, name
