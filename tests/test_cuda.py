"""Exact tensors on a GPU: the same bits as everywhere, unless a mode shortens the operands of its products."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import deltafmt
import merges
from deltafmt.torch import load_state_dict
from exact_factors import at_the_bound, by_torch
from in_memory import KINDS, every_way, subject_of
from plain_checkpoint import held, read_checkpoint, write_checkpoint

DEVICE = "cuda"

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
has_tf32 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs a GPU with TF32"
)


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(("factors", "base", "dtype", "wide"), KINDS)
@pytest.mark.parametrize("rank", [1, 7, 64])
def test_it_computes_the_same(factors: str, base: str, dtype: str, wide: str, rank: int) -> None:
    exact = at_the_bound(rank, (200, 300), wide, base, seed=rank)
    ours = every_way(subject_of(exact, factors, base, dtype)).reshape(exact.base.shape)
    for rows in (None, 1, 37):
        assert np.array_equal(by_torch(exact, dtype, DEVICE, rows), ours), rows


@has_tf32
@pytest.mark.parametrize(("factors", "base", "dtype", "wide"), KINDS)
def test_tf32_is_another_product(factors: str, base: str, dtype: str, wide: str) -> None:
    """Of float32. That is why it must be off; of float64 there is no such mode."""
    exact = at_the_bound(64, (512, 1024), wide, base)  # of a size for which matrix units are used
    ours = every_way(subject_of(exact, factors, base, dtype)).reshape(exact.base.shape)
    torch.backends.cuda.matmul.allow_tf32 = True
    assert np.array_equal(by_torch(exact, dtype, DEVICE), ours) == (wide == "F64")
    torch.backends.cuda.matmul.allow_tf32 = False
    assert np.array_equal(by_torch(exact, dtype, DEVICE), ours)


def test_what_is_loaded_onto_it_is_exact_in_any_mode(tmp_path: Path) -> None:
    """Tensors are rebuilt before they get there: whoever trains with TF32 loads the same bits."""
    weights = np.random.default_rng(0).standard_normal((256, 320), np.float32) * np.float32(0.02)
    write_checkpoint(tmp_path / "base", [held("w", weights)])
    tuned = merges.merged_lora(tmp_path / "base", tmp_path / "tuned", rank=4, ulps=1e5)
    assert deltafmt.pack(tuned, tmp_path / "packed", base=tmp_path / "base").tensors["w"].rank == 4
    torch.backends.cuda.matmul.allow_tf32 = True
    loaded = load_state_dict(tmp_path / "packed", base=tmp_path / "base", device=DEVICE)["w"]
    assert loaded.device.type == DEVICE
    assert loaded.cpu().numpy().tobytes() == read_checkpoint(tuned)[0].load().tobytes()
