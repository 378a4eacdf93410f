"""Fixtures of several tests: real checkpoints, fetched once per machine (see tools/fixtures.py), and small ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import deltafmt
import fixtures
import synthetic
from command_line import Run, weights, write
from deltafmt import native
from deltafmt.cli import main
from deltafmt.native import library
from hostile import Tensor, f32, write_checkpoint


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


# A small archive to be damaged


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small archive. Tests leave it as it is."""
    root = tmp_path_factory.mktemp("pristine")
    tensors = {"w": f32(6, 4), "v": f32(5, seed=1), "bytes": Tensor("U8", (64,), bytes(64))}
    deltafmt.pack(write_checkpoint(root / "src", tensors), root / "packed")
    return root / "packed"


@pytest.fixture
def archive(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "archive"))


# The command line


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """`tmp_path/base`: three layers of random weights."""
    return write(tmp_path / "base", weights(1))


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """Each weight moved along many directions, a few of them far: rank 4 holds most of it, and not all."""
    random = np.random.default_rng(2)
    moved = {}
    for name, weight in weights(1).items():
        left, right = (random.standard_normal((128, 32), np.float32) for _ in range(2))
        strength = (2.0 ** -np.arange(32) / 32).astype(np.float32)
        moved[name] = weight + (left * strength) @ right.T
    return write(tmp_path / "tuned", moved)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in `tmp_path`; exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return command


@pytest.fixture(scope="module", params=["kernels", "numpy"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Who computes: the kernels, which are built where these tests run, or numpy, as where there is no compiler."""
    assert native.available()
    with pytest.MonkeyPatch.context() as patching:
        if request.param == "numpy":
            patching.setattr(library, "LIBRARY", None)
        yield request.param


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch computes with one thread: tests run side by side, and a seed means the same everywhere."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
