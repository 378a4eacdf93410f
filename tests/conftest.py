"""Fixtures that every test may use: real checkpoints, fetched once per machine (see tools/fixtures.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

import fixtures
import synthetic


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2 in fp32: the base of pair A."""
    return fixtures.minilm()


@pytest.fixture(scope="session")
def finetune_dir() -> Path:
    """A real fine-tune of it in fp32: the fine-tune of pair A."""
    return fixtures.finetune()


@pytest.fixture(scope="session")
def mgm_dir() -> Path:
    """A small GPT-2 with tied embeddings in a `pytorch_model.bin`."""
    return fixtures.mgm()


@pytest.fixture(scope="session")
def rxnmapper_dir() -> Path:
    """A small ALBERT in a `pytorch_model.bin`."""
    return fixtures.rxnmapper()


@pytest.fixture(scope="session")
def bf16_pair(minilm_dir: Path, finetune_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, fine-tune): pair A cast to bf16, sidecars included. Tests read it and leave it as it is."""
    root = tmp_path_factory.mktemp("bf16")
    base = synthetic.cast_checkpoint(minilm_dir, root / "base", "BF16")
    tuned = synthetic.cast_checkpoint(finetune_dir, root / "finetune", "BF16")
    return base, tuned
