"""Weights packed for tensor parallelism: whatever is asked for is what it was, and little else is read."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import deltafmt
from command_line import Run
from deltafmt import edge
from deltafmt.dtypes import DTYPES
from deltafmt.encodings import choose_chunk
from deltafmt.errors import UsageError
from deltafmt.methods.panels import good_order
from deltafmt.operators.panels import Order
from deltafmt.safetensors_file import SafetensorsFile
from deltafmt.torch.tensors import SharedPieces
from hostile import Tensor, manifest, write_checkpoint

DOWN, UP = (f"model.layers.0.mlp.{which}_proj.weight" for which in ("down", "up"))
SHAPE = 1536, 1024  # six chunks of 256K elements; a block for 2 ranks has two of them, for 4 or 8 three


def weights(*shape: int, seed: int = 0) -> Tensor:
    """Random weights in bf16."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32).view(np.uint32) >> 16
    return Tensor("BF16", shape, values.astype("<u2").tobytes())


def read(checkpoint: Path) -> dict[str, npt.NDArray[np.uint16]]:
    """The bits of a checkpoint's tensors."""
    tensors = load_file(checkpoint / "model.safetensors")
    return {name: tensor.view(torch.uint16).numpy().copy() for name, tensor in tensors.items()}


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    rows=st.integers(1, 10),
    columns=st.integers(1, 10),
    part=st.tuples(st.integers(0, 81), st.integers(0, 81)),
)
def test_the_stored_order_is_that_of_the_specification(
    height: int, width: int, rows: int, columns: int, part: tuple[int, int]
) -> None:
    stored = np.empty(height * width, np.uint16)
    for i in range(height):  # the formula of spec/operators/panels.md
        for j in range(width):
            t, left = i // rows * rows, j // columns * columns
            h, w = min(rows, height - t), min(columns, width - left)
            stored[t * width + h * left + (i - t) * w + (j - left)] = i * width + j
    lo, hi = sorted(min(each, height * width) for each in part)
    order = Order(height, width, rows, columns)
    assert np.array_equal(order.stored(np.arange(height * width, dtype=np.uint16), lo, hi), stored[lo:hi])


@pytest.fixture(scope="module", params=[2, 4, 8])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path, Path]:
    """(ranks, checkpoint, archive packed for so many)."""
    root = tmp_path_factory.mktemp("packed")
    names = (DOWN, UP, "model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.bias")
    tensors = {name: weights(*SHAPE[: 1 if "bias" in name else 2], seed=seed) for seed, name in enumerate(names)}
    tensors["tied.down_proj.weight"] = tensors[DOWN]
    source = write_checkpoint(root / "source", tensors)
    deltafmt.pack(source, root / "packed", tensor_parallel=request.param)
    return request.param, source, root / "packed"


def test_what_is_split_by_columns_is_in_panels(packed: tuple[int, Path, Path]) -> None:
    ranks, _, archive = packed
    recipes = {name: tensor["recipe"] for name, tensor in manifest(archive)["tensors"].items()}
    in_panels = {name for name, recipe in recipes.items() if recipe["op"] == "panels"}
    assert in_panels == {DOWN, "model.layers.0.self_attn.o_proj.weight"}
    assert {recipes[name]["columns"] for name in in_panels} == {SHAPE[1] // ranks}
    assert recipes["tied.down_proj.weight"] == {"op": "ref", "tensor": DOWN}
    assert deltafmt.inspect(archive).tensors[DOWN].method == "panels"


def test_all_of_it_comes_back(packed: tuple[int, Path, Path], tmp_path: Path) -> None:
    _, source, archive = packed
    deltafmt.unpack(archive, tmp_path / "unpacked")
    assert (tmp_path / "unpacked/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    deltafmt.verify(archive, against=source)
    deltafmt.pack(archive, tmp_path / "again")  # an archive as a source, for no ranks
    deltafmt.pack(source, tmp_path / "plain")
    assert manifest(tmp_path / "again")["tensors"] == manifest(tmp_path / "plain")["tensors"]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Bytes read of files since this was last asked."""
    read = [0]
    work = SafetensorsFile.read_into

    def noted(file: SafetensorsFile, offset: int, out: npt.NDArray[np.uint8]) -> None:
        read[0] += out.nbytes
        work(file, offset, out)

    def since() -> int:
        found, read[0] = read[0], 0
        return found

    monkeypatch.setattr(SafetensorsFile, "read_into", noted)
    return since


@pytest.mark.parametrize("name", [DOWN, "tied.down_proj.weight"])
def test_each_rank_reads_its_columns(packed: tuple[int, Path, Path], counted: Callable[[], int], name: str) -> None:
    ranks, source, archive = packed
    expected = read(source)[DOWN]
    with deltafmt.open(archive) as opened:
        part = opened.get_slice(name)
        counted()
        assert np.array_equal(part[...].view(np.uint16), expected)
        whole = counted()
        for left in range(0, SHAPE[1], SHAPE[1] // ranks):
            columns = slice(left, left + SHAPE[1] // ranks)
            assert np.array_equal(part[:, columns].view(np.uint16), expected[:, columns])
            assert counted() == pytest.approx(whole / ranks, rel=0.01)
        parts: list[Any] = [np.s_[5:900, 100:300], np.s_[:, 1000], 700, np.s_[1535:, 3:], np.s_[::7, ::-5], np.s_[1:1]]
        for index in parts:
            assert np.array_equal(part[index].view(np.uint16), expected[index])


def test_nothing_is_decoded_twice(packed: tuple[int, Path, Path], counted: Callable[[], int], tmp_path: Path) -> None:
    _, _, archive = packed
    with edge.open(archive) as model, deltafmt.open(archive) as opened:
        stored = opened._archive.stored_size(f"{DOWN}#panels")
        for whole in (model.get, opened.get_tensor):
            counted()
            assert whole(DOWN).shape == SHAPE
            assert stored <= counted() < stored + 2000  # with the chunk table, read once
    counted()
    deltafmt.unpack(archive, tmp_path / "unpacked")
    shard = archive / "deltafmt-00001-of-00001.safetensors"
    assert counted() <= shard.stat().st_size + stored  # of which there is a copy: that twice


def test_a_fine_tune_of_an_archive_in_panels(
    packed: tuple[int, Path, Path], counted: Callable[[], int], tmp_path: Path
) -> None:
    """The base is read by panels, the patch of it by rows."""
    _, source, archive = packed
    tuned = read(source)
    tuned[DOWN][::3] += 1
    tensors = {name: Tensor("BF16", each.shape, each.tobytes()) for name, each in tuned.items()}
    checkpoint = write_checkpoint(tmp_path / "tuned", tensors)
    deltafmt.pack(checkpoint, tmp_path / "patched", base=archive, tensor_parallel=2)
    assert manifest(tmp_path / "patched")["tensors"][DOWN]["recipe"]["op"] == "patch"
    with deltafmt.open(tmp_path / "patched", base=archive) as opened:
        part = opened.get_slice(DOWN)
        assert np.array_equal(part[:, 512:].view(np.uint16), tuned[DOWN][:, 512:])
        counted()
        assert np.array_equal(part[...].view(np.uint16), tuned[DOWN])
        once = opened._archive.stored_size(f"{DOWN}#residual")
        of_base = opened._archive.bases["base"]._checkpoint.stored_size(f"{DOWN}#panels")  # type: ignore[attr-defined]
        assert counted() == once + of_base


def test_a_shared_layer_reads_its_columns_of_the_anchor(counted: Callable[[], int], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    anchor = random.standard_normal((512, 1024), np.float32)
    near = anchor + random.standard_normal((512, 2), np.float32) @ random.standard_normal((2, 1024), np.float32)
    layers = {f"model.layers.{layer}.mlp.down_proj.weight": each for layer, each in enumerate((anchor, near))}
    tensors = {name: Tensor("F32", each.shape, each.tobytes()) for name, each in layers.items()}
    source = write_checkpoint(tmp_path / "source", tensors)
    deltafmt.pack(source, tmp_path / "packed", share="1:0", rank=2, tensor_parallel=2, force=True)
    first, second = layers
    assert manifest(tmp_path / "packed")["tensors"][first]["recipe"]["op"] == "panels"
    assert manifest(tmp_path / "packed")["tensors"][second]["recipe"]["op"] == "sum"
    with deltafmt.open(tmp_path / "packed") as opened:
        counted()
        found = opened.get_slice(second)[:, :512]
        factors = [f"{second}#lora_{role}" for role in "ab"]
        factor_bytes = sum(map(opened._archive.stored_size, factors))
        assert counted() - factor_bytes == pytest.approx(opened._archive.stored_size(f"{first}#panels") / 2, rel=0.01)
        assert np.array_equal(found, opened.get_tensor(second)[:, :512])
        np.testing.assert_allclose(found, near[:, :512], atol=1e-3)
    with deltafmt.open(tmp_path / "packed", framework="pt") as opened:
        expected = [opened.get_tensor(name)[:, :512] for name in layers]
        shared = SharedPieces(opened)  # as transformers reads them: the anchor's columns once for both layers
        counted()
        halves = [shared.get_slice(name)[:, :512] for name in layers]
        assert counted() - factor_bytes == pytest.approx(opened._archive.stored_size(f"{first}#panels") / 2, rel=0.01)
        assert all(map(torch.equal, halves, expected))


@pytest.mark.parametrize(
    ("name", "shape", "ranks"),
    [
        (DOWN, SHAPE, 3),  # columns that cannot be divided
        (DOWN, (16, 1024), 2),  # small
        (DOWN, (2, 1024, 1024), 2),
        (UP, SHAPE, 2),
        ("model.layers.0.self_attn.q_proj.weight", SHAPE, 2),
        ("model.embed_tokens.weight", SHAPE, 2),
        ("model.layers.0.mlp.down_proj.weight.scale", SHAPE, 2),
        ("model.layers.0.no_proj.weight", SHAPE, 2),
    ],
)
def test_what_stays_in_rows(name: str, shape: tuple[int, ...], ranks: int) -> None:
    assert good_order(name, shape, DTYPES["BF16"], ranks) is None


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F8_E4M3"])
@pytest.mark.parametrize(
    "shape", [(4096, 4096), (4096, 14336), (512, 512), (3, 1 << 19), (4099, 4096), (1000, 12345 * 8)]
)
@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_blocks_are_about_as_large_as_what_is_read_at_once(dtype: str, shape: tuple[int, int], ranks: int) -> None:
    width = DTYPES[dtype].width
    order = good_order(DOWN, shape, DTYPES[dtype], ranks)
    if shape[1] % ranks or shape[1] * width > 4 << 20:
        assert order is None
        return
    assert order is not None and order.columns * ranks == shape[1]
    assert 1 <= order.rows <= shape[0]
    largest = min(ranks << 18, 1 << 20, (4 << 20) // width)
    assert order.rows * shape[1] <= largest
    assert order.rows == 1 or order.rows * shape[1] > min(largest, math.prod(shape)) / 2.5


def test_blocks_end_where_the_chunks_of_a_patch_do() -> None:
    order = good_order(DOWN, (4096, 14336), DTYPES["BF16"], 4)
    assert order is not None and order.rows * 14336 % choose_chunk((4096, 14336), 2) == 0


def test_the_names_are_those_of_transformers() -> None:
    """Of the models whose plans for tensor parallelism split layers by columns (`rowwise`: rows of the transpose)."""
    for kind in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "olmo2", "gpt_neox", "mixtral", "glm4"):
        config: Any = transformers.AutoConfig.for_model(kind)
        plan = config.base_model_tp_plan or {}
        by_columns = {name for name, style in plan.items() if style.startswith("rowwise")}
        found = {name for name in plan if good_order(f"{name.replace('*', '0')}.weight", SHAPE, DTYPES["BF16"], 2)}
        assert found == by_columns, kind
    conv1d = "transformer.h.0.mlp.c_proj.weight"  # of GPT-2: [in, out], split by rows
    assert good_order(conv1d, SHAPE, DTYPES["BF16"], 2) is None


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_last_block_of_fewer_rows(ranks: int, counted: Callable[[], int], tmp_path: Path) -> None:
    tensors = {DOWN: weights(4099, 1024)}
    source = write_checkpoint(tmp_path / "source", tensors)
    deltafmt.pack(source, tmp_path / "packed", tensor_parallel=ranks)
    expected = read(source)[DOWN]
    with deltafmt.open(tmp_path / "packed") as opened:
        part = opened.get_slice(DOWN)
        stored = opened._archive.stored_size(f"{DOWN}#panels")
        assert np.array_equal(part[...].view(np.uint16), expected)
        for left in range(0, 1024, 1024 // ranks):
            columns = slice(left, left + 1024 // ranks)
            counted()
            assert np.array_equal(part[:, columns].view(np.uint16), expected[:, columns])
            assert counted() < 1.25 * stored / ranks  # in the last of five blocks, of a neighbour's chunk too


def test_what_nothing_compresses_is_stored_as_it_is(tmp_path: Path) -> None:
    content = Tensor("F8_E4M3", SHAPE, np.random.default_rng(0).bytes(math.prod(SHAPE)))
    deltafmt.pack(write_checkpoint(tmp_path / "source", {DOWN: content}), tmp_path / "packed", tensor_parallel=2)
    assert manifest(tmp_path / "packed")["tensors"][DOWN]["recipe"] == {"op": "stored", "array": DOWN}


def test_the_command_line(run: Run, tmp_path: Path) -> None:
    source = str(write_checkpoint(tmp_path / "source", {DOWN: weights(*SHAPE), UP: weights(*SHAPE, seed=1)}))
    code, out, _ = run("pack", source, "packed.safetensors", "--single-file", "--tensor-parallel", "2", "--json")
    assert code == 0 and json.loads(out)["notes"] == []
    assert json.loads(out)["tensors"][DOWN]["method"] == "panels"
    assert run("verify", "packed.safetensors", "--against", source)[0] == 0
    code, out, _ = run("pack", source, "packed", "--tensor-parallel", "3", "--json")
    (note,) = json.loads(out)["notes"]
    assert code == 0 and note.startswith("1 of 1 weights that tensor parallelism splits by columns are not stored")
    code, _, err = run("pack", source, "other", "--tensor-parallel", "65")
    assert code == 2 and "1<=x<=64" in err
    for ranks in (0, 65, True, 2.0):
        with pytest.raises(UsageError, match="tensor_parallel is no whole number from 1 to 64"):
            deltafmt.pack(source, tmp_path / "other", tensor_parallel=ranks)  # type: ignore[arg-type]
    only_up = write_checkpoint(tmp_path / "only up", {UP: weights(*SHAPE)})
    assert deltafmt.pack(only_up, tmp_path / "up", tensor_parallel=2).notes[0].startswith("nothing is stored for")


def test_a_process_that_flushes_subnormals_reads_panels(packed: tuple[int, Path, Path]) -> None:
    """Nothing is computed of them; elsewhere such a process is refused."""
    program = f"""
import torch, numpy as np
assert torch.set_flush_denormal(True)
assert np.float32(1e-38) * np.float32(0.01) == 0
import deltafmt
with deltafmt.open({str(packed[2])!r}) as archive:
    assert archive.get_tensor({DOWN!r}).shape == {SHAPE}
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_lossy_archive_is_not_changed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {DOWN: weights(64, 32)})
    deltafmt.pack(source, tmp_path / "lossy", rank=2)
    with pytest.raises(UsageError, match="lossy archive is packed as it is"):
        deltafmt.pack(tmp_path / "lossy", tmp_path / "packed", tensor_parallel=2)
    assert not (tmp_path / "packed").exists()
