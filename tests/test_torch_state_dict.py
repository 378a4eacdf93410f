"""`deltafmt.torch.load_state_dict`: the tensors of an archive, eagerly and lazily."""

from __future__ import annotations

from pathlib import Path

import pytest
import threadpoolctl
import torch
from safetensors.torch import load_file, save_file

import deltafmt
from deltafmt.dtypes import Bits
from deltafmt.errors import UsageError, WrongBaseError
from deltafmt.operators import Ref
from deltafmt.operators.base import RangeReader, TensorReader
from deltafmt.reader import VerifiedBase
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


def test_a_tensor_of_the_base_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 0 is layer 1 of the base, and layers 2 and 3 are it plus something; layer 4 is layer 1 plus something, and
    that is another one than the base's layer 1."""
    generator = torch.Generator().manual_seed(5)
    name = "model.layers.{}.mlp.up_proj.weight".format

    def near(anchor: torch.Tensor) -> torch.Tensor:
        return anchor + torch.randn(64, 48, generator=generator) / 2**20

    one, two, three = (torch.randn(64, 48, generator=generator) for _ in range(3))
    tuned = {name(0): two, name(1): three, name(2): near(two), name(3): near(two), name(4): near(three)}
    for folder, tensors in (("base", {name(0): one, name(1): two}), ("tuned", tuned)):
        (tmp_path / folder).mkdir()
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / folder / "model.safetensors")
    base = tmp_path / "base"
    deltafmt.pack(tmp_path / "tuned", tmp_path / "packed", base=base, share="2:0,3:0,4:1")
    with deltafmt.open(tmp_path / "packed", base, "pt") as archive:
        assert archive._archive.manifest.tensors[name(0)].recipe == Ref(name(1), "base")
        expected = {key: archive.get_tensor(key) for key in tuned}
    read: list[tuple[str, int]] = []
    work = VerifiedBase.reader

    def reader(self: VerifiedBase, tensor: str) -> TensorReader:
        of_tensor = work(self, tensor)

        def noted(lo: int, hi: int, out: Bits) -> None:
            read.append((tensor, hi - lo))
            of_tensor.read(lo, hi, out)

        return RangeReader(noted, 48)

    monkeypatch.setattr(VerifiedBase, "reader", reader)
    for dtype in (None, torch.float64):
        read.clear()
        loaded = load_state_dict(tmp_path / "packed", base=base, dtype=dtype)
        assert {tensor for tensor, _ in read} == {name(1)}
        assert sum(count for _, count in read) == 64 * 48
        for key, tensor in expected.items():
            assert torch.equal(loaded[key], tensor.to(dtype or tensor.dtype))


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
