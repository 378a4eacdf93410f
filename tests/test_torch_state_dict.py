"""`deltafmt.torch.load_state_dict`: the tensors of an archive, eagerly and lazily."""

from __future__ import annotations

from pathlib import Path

import pytest
import threadpoolctl
import torch
from safetensors.torch import load_file, save_file

import deltafmt
from deltafmt.errors import UsageError, WrongBaseError
from deltafmt.torch import LazyStateDict, load_state_dict

BIG = "embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def packed(minilm_dir: Path, finetune_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fine-tune of pair A, lossless, against its base."""
    target = tmp_path_factory.mktemp("pair") / "packed"
    deltafmt.pack(finetune_dir, target, base=minilm_dir)
    return target


@pytest.fixture(scope="module")
def original(finetune_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(finetune_dir / "model.safetensors")


def test_every_tensor_is_as_it_was(packed: Path, minilm_dir: Path, original: dict[str, torch.Tensor]) -> None:
    loaded = load_state_dict(packed, base=minilm_dir)
    assert loaded.keys() == original.keys()
    for name, tensor in original.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_floats_are_cast_and_integers_are_not(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(40, 8), "ids": torch.arange(7), "x": torch.tensor(2.5, dtype=torch.float64)}
    (tmp_path / "src").mkdir()
    save_file(tensors, tmp_path / "src" / "model.safetensors")
    deltafmt.pack(tmp_path / "src", tmp_path / "packed")
    loaded = load_state_dict(tmp_path / "packed", dtype=torch.bfloat16, device="cpu")
    assert torch.equal(loaded["w"], tensors["w"].bfloat16())
    assert torch.equal(loaded["ids"], tensors["ids"])
    assert torch.equal(loaded["x"], torch.tensor(2.5, dtype=torch.bfloat16))
    with load_state_dict(tmp_path / "packed", dtype=torch.float16, lazy=True) as lazy:
        assert lazy["w"].get_dtype() == "F16"
        assert lazy["ids"].get_dtype() == "I64"
        assert torch.equal(lazy["x"][...], torch.tensor(2.5, dtype=torch.float16))


@pytest.fixture
def sharing(tmp_path: Path) -> Path:
    """Layers 1 to 3 are layer 0 plus something of rank 2, layer 4 is layer 0; all `[64, 48]`, exactly representable."""
    generator = torch.Generator().manual_seed(5)
    anchor = torch.randn(64, 48, generator=generator)
    tensors = {"model.layers.0.mlp.up_proj.weight": anchor}
    for layer in range(1, 4):
        b, a = torch.randn(64, 2, generator=generator), torch.randn(2, 48, generator=generator)
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = anchor + b @ a / 100
    tensors["model.layers.4.mlp.up_proj.weight"] = anchor.clone()
    (tmp_path / "src").mkdir()
    save_file(tensors, tmp_path / "src" / "model.safetensors")
    deltafmt.pack(tmp_path / "src", tmp_path / "packed", method="lowrank", rank=2, share="1:0,2:0,3:0")
    return tmp_path / "packed"


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_what_is_stored_once_is_one_tensor(sharing: Path, dtype: torch.dtype | None) -> None:
    loaded = load_state_dict(sharing, dtype=dtype)
    first, last = (loaded[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 4))
    assert first is last
    with deltafmt.open(sharing, framework="pt") as archive:
        for name, tensor in loaded.items():
            torch.testing.assert_close(tensor, archive.get_tensor(name).to(dtype), rtol=0, atol=1e-6)


def test_lazy_slices_are_those_of_the_tensor(packed: Path, minilm_dir: Path, original: dict[str, torch.Tensor]) -> None:
    whole = original[BIG]
    with load_state_dict(packed, base=minilm_dir, lazy=True) as lazy:
        assert isinstance(lazy, LazyStateDict)
        assert list(lazy) == list(original) and len(lazy) == len(original) and BIG in lazy
        big = lazy[BIG]
        assert (big.get_shape(), big.get_dtype()) == (list(whole.shape), "F32")
        indices = [
            (slice(3, 9),),
            (slice(20_000, None), slice(5, 9)),  # more rows than one block
            (slice(None), 7),
            (..., slice(0, 2)),
            (slice(9, 9), slice(1, 3)),
            (slice(0, 30_000, 3_000), slice(2, 4)),
            (11, slice(0, 4)),
            (slice(-5, None), ...),
        ]
        for index in indices:
            assert torch.equal(big[index], whole[index]), index
        assert big[5:9, 1:3].untyped_storage().nbytes() == 4 * 2 * 4  # the result, not the rows it was cut from
        with pytest.raises(KeyError):
            lazy["no such tensor"]
        with pytest.raises(IndexError):
            big[0, 0, 0]


def test_a_closed_archive_is_not_read(packed: Path, minilm_dir: Path) -> None:
    lazy = load_state_dict(packed, base=minilm_dir, lazy=True)
    big = lazy[BIG]
    lazy.close()
    with pytest.raises(UsageError, match="closed"):
        big[0:2]
    with pytest.raises(UsageError, match="closed"):
        lazy[BIG]


def test_a_missing_base_is_said(packed: Path) -> None:
    with pytest.raises(WrongBaseError, match="needs the base"):
        load_state_dict(packed)


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16"])
def test_a_dtype_that_is_no_float_is_refused(packed: Path, dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match="floating-point"):
        load_state_dict(packed, dtype=dtype)


def test_a_device_that_is_not_there_is_refused(packed: Path) -> None:
    with pytest.raises(UsageError, match="device"):
        load_state_dict(packed, device="abacus")


def test_blas_has_one_thread_for_each_reader_where_tensors_are_computed(
    packed: Path, minilm_dir: Path, sharing: Path
) -> None:
    def threads() -> set[int]:
        return {each["num_threads"] for each in threadpoolctl.threadpool_info() if each["user_api"] == "blas"}

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        outside = threads()
        assert outside and outside != {1}
        with deltafmt.open(sharing) as archive, archive.computing():
            assert threads() == {1}
        with deltafmt.open(packed, minilm_dir) as archive, archive.computing():  # patches: nothing is multiplied
            assert threads() == outside
        assert threads() == outside
