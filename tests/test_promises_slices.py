"""Slices are what numpy and torch would give, decode no more than they need, and may be read from many threads."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import deltafmt
from deltafmt import IntegrityError, UsageError
from hostile import Tensor, edit, manifest, read_shard, write_checkpoint

SHAPES: dict[str, tuple[int, ...]] = {
    "cube": (7, 5, 3), "matrix": (40, 31), "long": (3000,), "wide": (2, 3000), "empty": (0, 4), "hollow": (4, 0, 2),
    "one": (1,), "scalar": (), "deep": (2, 1, 3, 2, 2),
}  # fmt: skip


def _data(shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    values = np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(values, np.float32)


class Room(NamedTuple):
    arrays: dict[str, npt.NDArray[np.float32]]
    packed: Path
    base: Path


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    """Compressed, patched, referred-to and tied tensors; two of the stored arrays are in many small chunks."""
    root = tmp_path_factory.mktemp("slices")
    arrays = {name: _data(shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    arrays["zeros"] = np.zeros((50, 20), np.float32)
    arrays["same"] = arrays["cube"]
    arrays["tied"] = arrays["zeros"]
    tensors = {name: Tensor("F32", array.shape, array.tobytes()) for name, array in arrays.items()}
    nudged = {
        name: tensor
        if name in ("cube", "same")
        else Tensor("F32", tensor.shape, (arrays[name] * np.float32(1.0001)).tobytes())
        for name, tensor in tensors.items()
        if name not in ("zeros", "tied", "wide")
    }
    base = write_checkpoint(root / "base", nudged)
    source = write_checkpoint(root / "src", tensors)
    deltafmt.pack(source, root / "packed", base=base)
    return Room(arrays, root / "packed", base)


@pytest.fixture(scope="module", params=["np", "pt"])
def opened(room: Room, request: pytest.FixtureRequest) -> Iterator[tuple[str, deltafmt.OpenArchive]]:
    with deltafmt.open(room.packed, base=room.base, framework=request.param) as archive:
        yield request.param, archive


def _part(size: int, negative_steps: bool) -> st.SearchStrategy[Any]:
    bound = st.none() | st.integers(-size - 2, size + 2)
    step = st.none() | st.integers(1, 4)
    if negative_steps:
        step |= st.integers(-4, -1)
    slices = st.builds(slice, bound, bound, step)
    return slices | st.integers(-size, size - 1) if size else slices


@st.composite
def _case(draw: st.DrawFn, negative_steps: bool) -> tuple[str, Any]:
    name = draw(st.sampled_from([*SHAPES, "zeros", "same", "tied"]))
    shape = {**SHAPES, "zeros": (50, 20), "same": SHAPES["cube"], "tied": (50, 20)}[name]
    parts = [draw(_part(size, negative_steps)) for size in shape[: draw(st.integers(0, len(shape)))]]
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), Ellipsis)
        place = parts.index(Ellipsis)  # what stands behind it indexes the last axes
        behind = len(parts) - place - 1
        parts[place + 1 :] = (
            [draw(_part(size, negative_steps)) for size in shape[len(shape) - behind :]] if behind else []
        )
    return name, parts[0] if len(parts) == 1 and draw(st.booleans()) else tuple(parts)


_SETTINGS = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@_SETTINGS
@given(data=st.data())
def test_any_slice(room: Room, opened: tuple[str, deltafmt.OpenArchive], data: st.DataObject) -> None:
    framework, archive = opened
    name, index = data.draw(_case(framework == "np"))
    found = archive.get_slice(name)[index]
    expected = room.arrays[name][index]
    if framework == "pt":
        found = found.numpy()
    assert np.shape(found) == np.shape(expected)
    assert np.asarray(found).dtype == np.float32
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize(
    "dtype", ["U16", "U32", "U64", "BOOL", "C64", "BF16", "F8_E4M3", "F8_E5M2FNUZ", "F8_E8M0", "I8"]
)
@pytest.mark.parametrize("framework", ["np", "pt"])
def test_slices_of_any_dtype(tmp_path: Path, dtype: str, framework: Any) -> None:
    width = {"U16": 2, "U32": 4, "U64": 8, "C64": 8, "BF16": 2}.get(dtype, 1)
    data = (np.arange(20 * width, dtype=np.uint8) % 2).tobytes()
    deltafmt.pack(write_checkpoint(tmp_path / "src", {"w": Tensor(dtype, (5, 4), data)}), tmp_path / "packed")
    rows = np.frombuffer(data, np.uint8).reshape(5, 4 * width)
    with deltafmt.open(tmp_path / "packed", framework=framework) as archive:
        view = archive.get_slice("w")
        for index in (slice(1, 4), slice(None, None, 2), slice(4, 0, -1), slice(0, 0), 3):
            found = view[index]
            if framework == "pt":
                found = found.contiguous().view(torch.uint8).numpy()
            assert np.ascontiguousarray(found).tobytes() == rows[index].tobytes(), index


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("long", 3000), ("long", -3001), ("empty", 0), ("cube", (0, 5)), ("cube", (0, 0, 0, 0)), ("scalar", 0),
        ("scalar", slice(None)), ("cube", (..., ...)), ("cube", (0, 0, -4)),
    ],
)  # fmt: skip
def test_indices_out_of_range(opened: tuple[str, deltafmt.OpenArchive], name: str, index: Any) -> None:
    with pytest.raises(IndexError):
        opened[1].get_slice(name)[index]


@pytest.fixture(scope="module")
def plain(room: Room) -> Iterator[tuple[Any, deltafmt.OpenArchive]]:
    """The checkpoint through safetensors itself, as torch tensors, and its archive."""
    with (
        safe_open(room.packed.parent / "src/model.safetensors", "pt", device="cpu") as theirs,
        deltafmt.open(room.packed, base=room.base, framework="pt", device="cpu") as ours,
    ):
        yield theirs, ours


@st.composite
def _like_safetensors(draw: st.DrawFn) -> tuple[str, Any]:
    """What safetensors takes as well: steps of at least 1, and a list of integers for one dimension."""
    name, index = draw(_case(negative_steps=False))
    shape = SHAPES.get(name, (50, 20) if name in ("zeros", "tied") else SHAPES["cube"])
    parts = list(index) if isinstance(index, tuple) else [index]
    ellipsis = parts.index(Ellipsis) if Ellipsis in parts else len(parts)
    places = [place for place in range(len(parts)) if place != ellipsis]
    if draw(st.booleans()) and places:
        place = draw(st.sampled_from(places))
        size = shape[place if place < ellipsis else place - len(parts)]
        parts[place] = draw(st.lists(st.integers(-size, size - 1), max_size=5)) if size else []
    return name, tuple(parts)


@_SETTINGS
@given(case=_like_safetensors())
def test_slices_are_those_of_safetensors(plain: tuple[Any, deltafmt.OpenArchive], case: tuple[str, Any]) -> None:
    theirs, ours = (each.get_slice(case[0])[case[1]] for each in plain)
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)


def test_all_that_safe_open_has(plain: tuple[Any, deltafmt.OpenArchive]) -> None:
    theirs, ours = plain
    assert {name for name in dir(theirs) if name[0] != "_"} <= {name for name in dir(ours) if name[0] != "_"}
    expected, found = theirs.get_tensors(), ours.get_tensors()
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("index", [[1, 2, 3], range(1, 4), np.array([1, 2, 3]), torch.tensor([1, 2, 3])], ids=repr)
def test_lists_of_indices(room: Room, opened: tuple[str, deltafmt.OpenArchive], index: Any) -> None:
    matrix = room.arrays["matrix"]
    for found, expected in (
        (opened[1].get_slice("matrix")[index], matrix[1:4]),
        (opened[1].get_slice("matrix")[2:9, index], matrix[2:9, 1:4]),
        (opened[1].get_slice("matrix")[-1, index], matrix[-1, 1:4]),
    ):
        assert np.array_equal(np.asarray(found), expected)


@pytest.mark.parametrize(
    ("index", "kind"),
    [
        (True, TypeError), ((0, False), TypeError), (np.bool_(True), TypeError), (torch.tensor(True), TypeError),
        ([True, False], TypeError), (np.ones(40, bool), TypeError), (None, TypeError), ((0, None), TypeError),
        ([[1, 2]], TypeError), ([0.5], TypeError), (1.0, TypeError), ("0", TypeError),
        ([0, 40], IndexError), ((0, [31]), IndexError), (([0], [0]), IndexError), ((0, 0, [0]), IndexError),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_index(opened: tuple[str, deltafmt.OpenArchive], index: Any, kind: type[Exception]) -> None:
    """A bool least of all: of numpy, safetensors and torch each takes it for something else."""
    with pytest.raises(kind):
        opened[1].get_slice("matrix")[index]


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", 1.5, -7])
@pytest.mark.parametrize("framework", ["np", "pt"])
def test_devices_that_are_not_there(room: Room, framework: Any, device: Any) -> None:
    with pytest.raises(UsageError, match="device"):
        deltafmt.open(room.packed, base=room.base, framework=framework, device=device)


def test_devices(room: Room) -> None:
    for device in ("cpu", None, torch.device("cpu")):
        deltafmt.open(room.packed, base=room.base, framework="np", device=device).close()
    with deltafmt.open(room.packed, base=room.base, framework="pt", device="cpu:0") as archive:
        assert archive.get_tensor("matrix").device.type == archive.get_slice("cube")[1:].device.type == "cpu"
    for device in ("meta", torch.device("meta")):
        with pytest.raises(UsageError, match="no values"):
            deltafmt.open(room.packed, base=room.base, framework="pt", device=device)


def test_unknown_names_and_closed_archives(room: Room) -> None:
    with deltafmt.open(room.packed, base=room.base) as archive:
        view = archive.get_slice("matrix")
        with pytest.raises(UsageError):
            archive.get_tensor("Matrix")
        with pytest.raises(UsageError):
            archive.get_slice("a\nb")
        for name in (3, None, b"matrix", ["matrix"]):
            for get in (archive.get_tensor, archive.get_slice):
                with pytest.raises(UsageError, match="there is no tensor"):
                    get(name)  # type: ignore[arg-type]
    for read in (lambda: archive.get_tensor("matrix"), lambda: archive.get_slice("matrix"), lambda: view[0]):
        with pytest.raises(UsageError):
            read()
    archive.close()
    with pytest.raises(UsageError):
        deltafmt.open(room.packed, framework="jax")  # type: ignore[arg-type]


def test_a_patched_tensor_takes_little_more_memory_than_itself(tmp_path: Path) -> None:
    """What its recipe needs beside the result is a block's, and is not kept by the thread."""
    weights = np.random.default_rng(0).integers(0, 1 << 16, (4096, 2048), dtype=np.uint16)
    for name, bits in (("base", weights), ("src", weights + np.uint16(1))):
        write_checkpoint(tmp_path / name, {"w": Tensor("U16", weights.shape, bits.tobytes())})
    deltafmt.pack(tmp_path / "src", tmp_path / "packed", base=tmp_path / "base")
    with deltafmt.open(tmp_path / "packed", base=tmp_path / "base") as archive, ThreadPoolExecutor(1) as fresh:
        fresh.submit(archive.get_slice("w").__getitem__, slice(1, 3)).result()
        tracemalloc.start()
        try:
            tensor = fresh.submit(archive.get_tensor, "w").result()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    np.testing.assert_array_equal(tensor, weights + np.uint16(1))
    assert peak < 2 * weights.nbytes


def test_a_slice_reads_only_its_chunks(tmp_path: Path) -> None:
    """Damage behind a slice's chunks is not met by it, damage in them is."""
    weights = np.arange(600_000, dtype=np.uint32).reshape(600, 1000)
    tensor = Tensor("U32", (600, 1000), weights.tobytes())
    deltafmt.pack(write_checkpoint(tmp_path / "src", {"w": tensor}), tmp_path / "packed")
    chunk = manifest(tmp_path / "packed")["arrays"]["w"]["encoding"]["chunk"]
    assert chunk % 1000 == 0
    rows = chunk // 1000
    assert rows < 300
    shard = next((tmp_path / "packed").glob("*.safetensors"))
    header, data = read_shard(tmp_path / "packed")
    content = bytearray(shard.read_bytes())
    content[len(content) - len(data) + header["w"]["data_offsets"][1] - 1] ^= 1
    shard.write_bytes(content)
    with deltafmt.open(tmp_path / "packed") as archive:
        view = archive.get_slice("w")
        assert np.array_equal(view[rows - 3 : rows + 3, 5], weights[rows - 3 : rows + 3, 5])
        with pytest.raises(IntegrityError):
            view[599]


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_many_threads_read_at_once(room: Room, tmp_path: Path, framework: Any) -> None:
    rng = np.random.default_rng(1)
    jobs = []
    for _ in range(600):
        name = str(rng.choice(["cube", "matrix", "long", "wide", "zeros", "same", "tied"]))
        size = room.arrays[name].shape[0]
        lo, hi = sorted(rng.integers(0, size + 1, 2).tolist())
        jobs.append((name, slice(lo, hi)))
    with deltafmt.open(room.packed, base=room.base, framework=framework) as archive, ThreadPoolExecutor(16) as pool:
        views = {name: archive.get_slice(name) for name in room.arrays}
        shared = pool.map(lambda job: np.asarray(views[job[0]][job[1]]).tobytes(), jobs)
        own = pool.map(lambda job: np.asarray(archive.get_slice(job[0])[job[1]]).tobytes(), jobs)
        whole = pool.map(lambda job: np.asarray(archive.get_tensor(job[0])).tobytes(), jobs[:100])
        for job, one, two in zip(jobs, shared, own, strict=True):
            assert one == two == room.arrays[job[0]][job[1]].tobytes()
        for job, found in zip(jobs, whole, strict=False):
            assert found == room.arrays[job[0]].tobytes()


def test_many_threads_read_a_sum(tmp_path: Path) -> None:
    """Bounded tensors, and references to them, use scratch memory of every kind."""
    rng = np.random.default_rng(2)
    parts = {
        name: rng.standard_normal(shape).astype("<f4")
        for name, shape in {"w": (64, 48), "a": (3, 48), "b": (3, 64)}.items()
    }
    tensors = {name: Tensor("F32", part.shape, part.tobytes()) for name, part in parts.items()}
    deltafmt.pack(write_checkpoint(tmp_path / "src", tensors), tmp_path / "packed")
    stored = {name: {"op": "stored", "array": name} for name in parts}
    product = {"op": "lowrank", "a": stored["a"], "b": stored["b"]}

    def change(document: dict[str, Any]) -> None:
        for name, terms in {"x": [stored["w"], product], "y": [{"op": "ref", "tensor": "x"}] * 2}.items():
            recipe = {"op": "sum", "terms": terms}
            document["tensors"][name] = {"dtype": "F32", "shape": [64, 48], "recipe": recipe, "rel_error": 0}

    edit(tmp_path / "packed", change)
    exact = 2 * (parts["w"].astype(np.float64) + parts["b"].T.astype(np.float64) @ parts["a"])
    with deltafmt.open(tmp_path / "packed") as archive, ThreadPoolExecutor(8) as pool:
        for row, found in enumerate(pool.map(lambda row: archive.get_slice("y")[row], range(64))):
            assert np.allclose(found, exact[row], rtol=1e-4, atol=1e-4)
