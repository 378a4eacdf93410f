"""`torch.distributed.checkpoint` through `DeltafmtReader`: two ranks, each with a part of every tensor."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

import deltafmt
from deltafmt import dcp
from deltafmt.dcp import DeltafmtReader
from deltafmt.errors import DeltafmtError, MissingExtraError, UsageError, WrongBaseError
from deltafmt.safetensors_file import SafetensorsFile
from two_ranks import of_two_ranks

ROWS, COLUMNS = 2048, 512  # four chunks
one_process = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(base, lossless archive against it, lossy low-rank archive against it) of tensors of several shapes."""
    root = tmp_path_factory.mktemp("dcp")
    random = torch.Generator().manual_seed(0)
    base = {
        "matrix": torch.randn(ROWS, COLUMNS, generator=random),
        "half": torch.randn(ROWS, COLUMNS, generator=random).bfloat16(),
        "cube": torch.randn(4, 6, 10, generator=random),
        "bias": torch.randn(ROWS, generator=random),
        "scalar": torch.tensor(3.5),
        "steps": torch.arange(10),
    }
    moved = torch.randn(ROWS, 3, generator=random) @ torch.randn(3, COLUMNS, generator=random) / 64
    noise = torch.randn(ROWS, COLUMNS, generator=random) / 256
    tuned = {**base, "matrix": base["matrix"] + moved, "half": (base["half"] + moved + noise).bfloat16()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (root / name).mkdir()
        save_file(tensors, root / name / "model.safetensors")
    deltafmt.pack(root / "tuned", root / "exact", base=root / "base")
    deltafmt.pack(root / "tuned", root / "lossy", base=root / "base", method="lowrank", rank=3)
    return root / "base", root / "exact", root / "lossy"


# What each rank runs: every tensor in two dimensions as each placement, the others replicated.
_RANK = """
import sys
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Replicate, Shard, zeros
from torch.distributed.device_mesh import init_device_mesh
from pathlib import Path
from deltafmt.dcp import DeltafmtReader
from deltafmt.gemm import Product
from deltafmt.safetensors_file import SafetensorsFile
rank, rendezvous, out, base, *archives = int(sys.argv[1]), *sys.argv[2:]
counted = {}

def count(owner, method, key, size):  # what goes through a method, as it goes on
    work = getattr(owner, method)
    def through(self, *given):
        counted[key(self)] = counted.get(key(self), 0) + size(self, *given)
        return work(self, *given)
    setattr(owner, method, through)

count(SafetensorsFile, "read_into", lambda file: str(file.path.parent), lambda file, offset, out: out.nbytes)
count(Product, "add", lambda product: "products", lambda product, into, *given: into.size)
count(Product, "onto_bf16", lambda product: "products", lambda product, top, rows: rows * product._columns)
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
shapes = {"matrix": (2048, 512, torch.float32), "half": (2048, 512, torch.bfloat16), "cube": (4, 6, 10, torch.float32)}
placements = {"rows": Shard(0), "columns": Shard(1), "deep": Shard(2), "whole": Replicate()}
counts, parts = {}, {}
for archive in archives:
    for label, placement in placements.items():
        state = {name: zeros(*shape, dtype=dtype, device_mesh=mesh, placements=[placement])
                 for name, (*shape, dtype) in shapes.items() if label != "deep" or len(shape) == 3}
        with DeltafmtReader(archive, base=base) as reader:
            counted.clear()
            dcp.load(state, storage_reader=reader)
            counts[archive, label] = counted.get(archive, 0), counted.get(base, 0), counted.get("products", 0)
        parts |= {(archive, label, name): tensor.to_local().contiguous() for name, tensor in state.items()}
torch.save((counts, parts), out)
dist.destroy_process_group()
"""


def test_each_rank_builds_its_own_part(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, *archives = models
    (counts, first), (other_counts, second) = of_two_ranks(_RANK, tmp_path, models)
    _each_reads_what_it_needs(counts, other_counts, base, *map(str, archives))
    for archive in archives:
        deltafmt.unpack(archive, tmp_path / archive.name, base=base)
        plain = load_file(tmp_path / archive.name / "model.safetensors")
        loaded: dict[tuple[str, str | int], torch.Tensor] = {}
        for name in ("matrix", "half", "cube"):
            for label, axis in (("rows", 0), ("columns", 1)):
                loaded[name, label] = torch.cat([part[str(archive), label, name] for part in (first, second)], dim=axis)
            loaded |= {(name, rank): part[str(archive), "whole", name] for rank, part in enumerate((first, second))}
        loaded["cube", "deep"] = torch.cat([part[str(archive), "deep", "cube"] for part in (first, second)], dim=2)
        for (name, _), tensor in loaded.items():
            if archive.name == "exact":
                assert torch.equal(tensor, plain[name]), name
            else:  # float products in blocks of another size may round otherwise
                torch.testing.assert_close(tensor, plain[name], rtol=1e-2, atol=1e-6)


def _each_reads_what_it_needs(
    first: dict[tuple[str, str], tuple[int, int, int]],
    second: dict[tuple[str, str], tuple[int, int, int]],
    base: Path,
    exact: str,
    lossy: str,
) -> None:
    """Of each rank: (archive, placement) -> bytes read of the archive and of the base, and elements of products."""
    plain = load_file(base / "model.safetensors")
    digests = plain["matrix"].nbytes + plain["half"].nbytes  # before they are used, base tensors are read whole
    for counts in (first, second):
        # By rows, what belongs to the other rank is not touched, but for factors and what is a single chunk.
        assert counts[exact, "rows"][0] < 0.6 * counts[exact, "whole"][0]
        for archive in (exact, lossy):
            assert counts[archive, "rows"][1] == pytest.approx(digests * 1.5, rel=0.02)
            assert counts[archive, "columns"][:2] == counts[archive, "whole"][:2]  # whole rows are decoded
            assert counts[archive, "whole"][1] == pytest.approx(digests * 2, rel=0.02)
        # Of a product each rank computes its own rectangle.
        assert counts[lossy, "rows"][2] == counts[lossy, "columns"][2] == ROWS * COLUMNS
        assert counts[lossy, "whole"][2] == 2 * ROWS * COLUMNS


@one_process
def test_a_plain_state_dict_in_one_process(models: tuple[Path, Path, Path]) -> None:
    base, archive, _ = models
    with DeltafmtReader(archive, base=base) as reader, deltafmt.open(archive, base, framework="pt") as expected:
        state = {name: torch.zeros_like(expected.get_tensor(name)) for name in expected.keys()}  # noqa: SIM118
        load(state, storage_reader=reader)
        assert state.keys() == {"matrix", "half", "cube", "bias", "scalar", "steps"}
        for name, tensor in state.items():
            assert torch.equal(tensor, expected.get_tensor(name)), name


class _Rows(DefaultLoadPlanner):
    """Wants rows of one tensor, from an odd place on."""

    def create_local_plan(self) -> LoadPlan:
        index = MetadataIndex("matrix")
        place, size = torch.Size([0, 0]), torch.Size([ROWS - 200, COLUMNS])
        return LoadPlan([ReadItem(LoadItemType.TENSOR, index, place, index, torch.Size([100, 0]), size)])


@one_process
def test_no_chunk_is_read_twice_where_rows_begin_inside_of_one(
    models: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, archive, _ = models
    monkeypatch.setattr(dcp, "_BLOCK_ELEMENTS", ROWS * COLUMNS // 4)  # a chunk
    offsets = []
    work = SafetensorsFile.read_into

    def noted(self: SafetensorsFile, offset: int, out: np.ndarray[Any, Any]) -> None:
        if self.path.parent == archive and out.nbytes > 1000:  # no chunk table
            offsets.append(offset)
        work(self, offset, out)

    monkeypatch.setattr(SafetensorsFile, "read_into", noted)
    state = {"matrix": torch.zeros(ROWS - 200, COLUMNS)}
    with DeltafmtReader(archive, base=base, jobs=1) as reader, deltafmt.open(archive, base, framework="pt") as expected:
        load(state, storage_reader=reader, planner=_Rows())
        assert len(offsets) == len(set(offsets)) > 4  # factors and four chunks
        assert torch.equal(state["matrix"], expected.get_tensor("matrix")[100:-100])


class _Columns(DefaultLoadPlanner):
    """Wants the right half of one tensor."""

    def create_local_plan(self) -> LoadPlan:
        index = MetadataIndex("mlp.down_proj.weight")
        place, size = torch.Size([0, 0]), torch.Size([ROWS, COLUMNS // 2])
        return LoadPlan([ReadItem(LoadItemType.TENSOR, index, place, index, torch.Size([0, COLUMNS // 2]), size)])


@one_process
def test_columns_of_an_archive_packed_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, weight = "mlp.down_proj.weight", torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    (tmp_path / "plain").mkdir()
    save_file({name: weight}, tmp_path / "plain/model.safetensors")
    deltafmt.pack(tmp_path / "plain", tmp_path / "packed", tensor_parallel=2)
    sizes = []
    work = SafetensorsFile.read_into

    def noted(self: SafetensorsFile, offset: int, out: np.ndarray[Any, Any]) -> None:
        sizes.append(out.nbytes)
        work(self, offset, out)

    state = {name: torch.zeros(ROWS, COLUMNS // 2)}
    with DeltafmtReader(tmp_path / "packed") as reader:
        stored = reader._archive.stored_size(f"{name}#panels")
        monkeypatch.setattr(SafetensorsFile, "read_into", noted)
        load(state, storage_reader=reader, planner=_Columns())
    assert torch.equal(state[name], weight[:, COLUMNS // 2 :])
    assert sum(sizes) == pytest.approx(stored / 2, rel=0.01)


@one_process
def test_a_part_of_the_model_in_another_dtype(models: tuple[Path, Path, Path]) -> None:
    base, archive, _ = models
    state = {"bias": torch.zeros(ROWS, dtype=torch.float64)}
    with DeltafmtReader(archive, base=base) as reader:
        load(state, storage_reader=reader)
    assert torch.equal(state["bias"], load_file(base / "model.safetensors")["bias"].double())


@one_process
def test_another_archive_through_the_same_reader(models: tuple[Path, Path, Path]) -> None:
    base, exact, lossy = models
    with DeltafmtReader(exact, base=base) as reader, deltafmt.open(lossy, base, framework="pt") as expected:
        state = {"matrix": torch.zeros(ROWS, COLUMNS)}
        load(state, checkpoint_id=lossy, storage_reader=reader)
        assert torch.equal(state["matrix"], expected.get_tensor("matrix"))
    assert DeltafmtReader.validate_checkpoint_id(exact)
    assert not DeltafmtReader.validate_checkpoint_id(base)


@one_process
def test_a_reader_survives_an_archive_that_cannot_be_opened(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, exact, lossy = models
    with DeltafmtReader(exact, base=base) as reader, deltafmt.open(lossy, base, framework="pt") as expected:
        for _ in range(2):
            with pytest.raises(DeltafmtError):
                reader.reset(tmp_path / "missing")
        state = {"bias": torch.zeros(ROWS)}
        load(state, storage_reader=reader)
        assert torch.equal(state["bias"], expected.get_tensor("bias"))
        state = {"matrix": torch.zeros(ROWS, COLUMNS)}
        load(state, checkpoint_id=lossy, storage_reader=reader)
        assert torch.equal(state["matrix"], expected.get_tensor("matrix"))


@one_process
def test_what_cannot_be_loaded_is_said(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, archive, _ = models
    with pytest.raises(DeltafmtError, match="no archive"):
        DeltafmtReader(base)
    with pytest.raises(WrongBaseError):
        DeltafmtReader(archive, base=_with_other_shapes(tmp_path))
    reader = DeltafmtReader(archive, base=base)
    with pytest.raises(CheckpointException, match="no_such_tensor"):
        load({"no_such_tensor": torch.zeros(2)}, storage_reader=reader)
    with pytest.raises(CheckpointException, match="Size mismatch"):
        load({"bias": torch.zeros(ROWS + 1)}, storage_reader=reader)
    reader.close()
    with pytest.raises(UsageError, match="closed"):
        reader.read_metadata()
    with DeltafmtReader(archive) as without_base, pytest.raises(CheckpointException, match="base"):
        load({"matrix": torch.zeros(ROWS, COLUMNS)}, storage_reader=without_base)


def test_torch_without_its_distributed_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed.checkpoint.storage", None)  # importing it fails
    monkeypatch.delitem(sys.modules, "deltafmt.dcp")
    with pytest.raises(MissingExtraError, match=r"deltafmt\[torch\]"):
        importlib.import_module("deltafmt.dcp")


def _with_other_shapes(folder: Path) -> Path:
    save_file({"matrix": torch.zeros(2, 2)}, folder / "model.safetensors")
    return folder
