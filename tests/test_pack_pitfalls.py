"""Packs that once made an archive that no reader takes, or would have."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import save_file
from threadpoolctl import threadpool_info

import deltafmt
from deltafmt.errors import UnsupportedError
from deltafmt.gemm import one_thread_each

Array = npt.NDArray[np.generic]


def normal(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(0.02)


def bf16(values: npt.NDArray[np.float32]) -> Array:
    return values.astype(ml_dtypes.bfloat16)


def model(path: Path, tensors: dict[str, Array]) -> Path:
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors")
    return path


def comes_back(source: Path, archive: Path, base: list[Path] | None = None) -> bool:
    deltafmt.unpack(archive, archive.with_name("again"), base=base)
    again = archive.with_name("again") / "model.safetensors"
    return again.read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("share", "equal"), [("10:9", [(10, 9)]), ("10:9,8:7", [(10, 7), (9, 8)])])
def test_equal_layers_that_share_make_no_circle(tmp_path: Path, share: str, equal: list[tuple[int, int]]) -> None:
    weights = {layer: bf16(normal(64, 48, seed=layer)) for layer in range(12)}
    for one, other in equal:
        weights[one] = weights[other]
    source = model(tmp_path / "model", {f"model.layers.{n}.mlp.up_proj.weight": w for n, w in weights.items()})
    deltafmt.pack(source, tmp_path / "archive", share=share)
    assert comes_back(source, tmp_path / "archive")


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_base_in_float64(tmp_path: Path, dtype: str) -> None:
    kind = {"BF16": ml_dtypes.bfloat16, "F16": np.float16}[dtype]
    base = normal(256, 192).astype(np.float64)
    low = normal(256, 4, seed=1) @ normal(4, 192, seed=2)
    tuned = {"merged": (base + low).astype(kind), "decayed": (base * 0.9).astype(kind)}
    plain = model(tmp_path / "base", {"merged": base, "decayed": base + 1})
    source = model(tmp_path / "model", tuned)
    deltafmt.pack(source, tmp_path / "archive", base=plain)
    assert comes_back(source, tmp_path / "archive", [plain])


def test_a_mixture_of_many(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(40)]
    parts = [{name: bf16(normal(64, 64, seed=100 * k + n)) for n, name in enumerate(names)} for k in range(9)]
    bases = [model(tmp_path / f"base{k}", dict(part)) for k, part in enumerate(parts)]
    mean = {name: bf16(np.mean([part[name].astype(np.float32) for part in parts], axis=0)) for name in names}
    source = model(tmp_path / "model", dict(mean))
    report = deltafmt.pack(source, tmp_path / "archive", base=bases)
    assert {tensor.method for tensor in report.tensors.values()} == {"patch-mixture"}
    assert comes_back(source, tmp_path / "archive", bases)


def test_a_process_that_flushes_subnormals_is_refused(tmp_path: Path) -> None:
    base = normal(128, 96)
    base[::5] *= np.float32(1e-37)
    plain = model(tmp_path / "base", {"w": bf16(base)})
    source = model(tmp_path / "model", {"w": bf16(base * np.float32(0.9))})
    deltafmt.pack(source, tmp_path / "archive", base=plain)
    if not torch.set_flush_denormal(True):
        pytest.fail("this processor cannot flush subnormals: the test shows nothing")
    try:
        with pytest.raises(UnsupportedError, match="subnormal"):
            deltafmt.pack(source, tmp_path / "other", base=plain)
        with (
            deltafmt.open(tmp_path / "archive", base=plain) as archive,
            pytest.raises(UnsupportedError, match="subnormal"),
        ):
            archive.get_tensor("w")
    finally:
        torch.set_flush_denormal(False)
    assert comes_back(source, tmp_path / "archive", [plain])


def test_threads_are_put_back() -> None:
    def threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    before = threads()
    with one_thread_each():
        assert set(threads()) == {1}
        with one_thread_each():
            assert set(threads()) == {1}
        assert set(threads()) == {1}
    assert threads() == before
