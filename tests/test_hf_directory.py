"""Plain checkpoints: what `open_plain` finds, against safetensors' own reader, and what it says about broken ones."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from safetensors import safe_open

from deltafmt.checkpoint import Checkpoint
from deltafmt.errors import AccessError, DeltafmtError, IntegrityError, MalformedError, UnsupportedError
from deltafmt.hf_directory import open_plain
from deltafmt.limits import DEFAULT_LIMITS

Arrays = dict[str, npt.NDArray[Any]]

A: Arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.array(7, np.int64)}
B: Arrays = {"b.weight": np.arange(4, dtype=np.float16), "b.empty": np.zeros((0, 4), np.float32)}


def header_of(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def shard(folder: Path, shards: Mapping[str, Arrays], weight_map: Mapping[str, object] | None = None) -> bytes:
    """Write shards and their index; return the bytes of the index."""
    folder.mkdir(exist_ok=True)
    for name, arrays in shards.items():
        (folder / name).parent.mkdir(exist_ok=True)
        safetensors.numpy.save_file(arrays, folder / name, metadata={"format": "pt"})
    if weight_map is None:
        weight_map = {tensor: name for name, arrays in shards.items() for tensor in arrays}
    data = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=3).encode()
    (folder / "model.safetensors.index.json").write_bytes(data)
    return data


def assert_same_bytes(checkpoint: Checkpoint, expected: Arrays) -> None:
    assert set(checkpoint.tensors) == set(expected)
    for name, array in expected.items():
        assert checkpoint.tensors[name].shape == array.shape
        assert checkpoint.read_whole(name).tobytes() == array.tobytes()


def refused(source: Path, kind: type[DeltafmtError]) -> str:
    with pytest.raises(kind) as caught:
        open_plain(source)
    assert type(caught.value) is kind
    return str(caught.value)


def test_real_checkpoint_against_safe_open(minilm_dir: Path) -> None:
    with open_plain(minilm_dir) as checkpoint, safe_open(minilm_dir / "model.safetensors", "np") as independent:
        assert set(checkpoint.tensors) == set(independent.keys())
        for name in independent.keys():  # noqa: SIM118 - safe_open is no mapping
            array = independent.get_tensor(name)
            assert checkpoint.tensors[name].shape == array.shape
            assert checkpoint.read_whole(name).tobytes() == array.tobytes()
        header = header_of(minilm_dir / "model.safetensors")
        assert [(file.name, file.header) for file in checkpoint.files] == [("model.safetensors", header)]
        assert checkpoint.index is None
        on_disk = {str(path.relative_to(minilm_dir)): path for path in minilm_dir.rglob("*") if path.is_file()}
        assert {name: part.path for name, part in checkpoint.sidecars.items()} == {
            name: path for name, path in on_disk.items() if name != "model.safetensors"
        }
        assert "1_Pooling/config.json" in checkpoint.sidecars
        assert checkpoint.input_bytes == sum(path.stat().st_size for path in on_disk.values())


def test_tensors_come_in_file_order(minilm_dir: Path) -> None:
    document = json.loads(header_of(minilm_dir / "model.safetensors"))
    document.pop("__metadata__", None)
    with open_plain(minilm_dir) as checkpoint:
        assert list(checkpoint.tensors) == sorted(document, key=lambda name: document[name]["data_offsets"])


def test_ranges_and_threads(minilm_dir: Path) -> None:
    with open_plain(str(minilm_dir)) as checkpoint:
        name, info = max(checkpoint.tensors.items(), key=lambda item: item[1].count)
        whole = checkpoint.read_whole(name)

        def part(lo: int) -> bool:
            out = np.empty(1000, info.dtype.bits)
            checkpoint.read(name, lo, lo + 1000, out)
            return bool((out == whole[lo : lo + 1000]).all())

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(part, range(0, info.count - 1000, 50_021)))


def test_shards_index_and_headers_verbatim(tmp_path: Path) -> None:
    index = shard(tmp_path, {"model-00002-of-00002.safetensors": A, "model-00001-of-00002.safetensors": B})
    (tmp_path / "config.json").write_text("{}")
    with open_plain(tmp_path) as checkpoint:
        assert_same_bytes(checkpoint, {**A, **B})
        assert checkpoint.index == ("model.safetensors.index.json", index)
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        assert [(file.name, file.header) for file in checkpoint.files] == [(n, header_of(tmp_path / n)) for n in names]
        assert list(checkpoint.sidecars) == ["config.json"]
        assert checkpoint.input_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_alias_records_stay_in_the_header(tmp_path: Path) -> None:
    """What huggingface_hub writes for tied tensors: one of them, and its other name as metadata."""
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": A["a.weight"]}, path, metadata={"format": "pt", "b": "a"})
    with open_plain(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a"]
        assert json.loads(checkpoint.files[0].header)["__metadata__"]["b"] == "a"


def test_single_file_has_no_sidecars(tmp_path: Path) -> None:
    safetensors.numpy.save_file(A, tmp_path / "any name.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with open_plain(tmp_path / "any name.safetensors") as checkpoint:
        assert_same_bytes(checkpoint, A)
        assert checkpoint.files[0].name == "any name.safetensors"
        assert checkpoint.sidecars == {}
        assert checkpoint.input_bytes == (tmp_path / "any name.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (["model.safetensors", "adapter_model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["diffusion_pytorch_model.safetensors", "other.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["adapter_model.safetensors", "adapter_model.bin"], "adapter_model.safetensors"),
        (["model.fp16.safetensors", "pytorch_model.bin", "sub/model.safetensors"], "model.fp16.safetensors"),
    ],
)
def test_which_file_holds_the_weights(tmp_path: Path, present: list[str], chosen: str) -> None:
    for name in present:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        safetensors.numpy.save_file(A, tmp_path / name)
    with open_plain(tmp_path) as checkpoint:
        assert [file.name for file in checkpoint.files] == [chosen]
        assert set(checkpoint.sidecars) == set(present) - {chosen}


def test_what_is_left_out_and_what_is_not(tmp_path: Path) -> None:
    safetensors.numpy.save_file(A, tmp_path / "model.safetensors")
    kept = [
        "sub/ünï cödé 模型.json",
        ".gitattributes",
        ".cache/other/x",
        "sub/.cache/huggingface/x",
        "empty",
        "a/b/c/d",
    ]
    for name in [*kept, ".git/config", "sub/.git/config", ".cache/huggingface/download/x", "__pycache__/m.pyc"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty" else name)
    with open_plain(tmp_path) as checkpoint:
        assert set(checkpoint.sidecars) == set(kept)


def test_a_snapshot_of_the_hub_cache(tmp_path: Path) -> None:
    """Every file is a link to ../../blobs, as in the Hub cache."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee"
    blobs.mkdir()
    (snapshot / "sub").mkdir(parents=True)
    safetensors.numpy.save_file(A, blobs / "1")
    (blobs / "2").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "sub" / "config.json").symlink_to("../../../blobs/2")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "notes.txt").write_text("linked directory")
    (snapshot / "notes").symlink_to(tmp_path / "linked")
    with open_plain(snapshot) as checkpoint:
        assert_same_bytes(checkpoint, A)
        assert set(checkpoint.sidecars) == {"sub/config.json", "notes/notes.txt"}
        assert b"".join(checkpoint.sidecars["sub/config.json"].blocks()) == b"{}"
        assert checkpoint.input_bytes == (blobs / "1").stat().st_size + 2 + len("linked directory")


def test_missing_shards_are_named_before_anything_is_read(tmp_path: Path) -> None:
    shard(tmp_path, {f"model-0000{i}-of-00003.safetensors": {f"t{i}": A["a.weight"]} for i in (1, 2, 3)})
    (tmp_path / "model-00001-of-00003.safetensors").write_bytes(b"never read")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    message = refused(tmp_path, IntegrityError)
    assert "1 of 3 shards" in message and "'model-00002-of-00003.safetensors'" in message
    assert "model.safetensors.index.json" in message and "Download" in message


@pytest.mark.parametrize(
    ("weight_map", "shown"),
    [
        ({"a": "1.safetensors", "b": "2.safetensors", "ghost": "2.safetensors"}, ["'ghost' in '2.safetensors'"]),
        ({"a": "1.safetensors"}, ["'b'"]),
        ({"a": "2.safetensors", "b": "1.safetensors"}, ["'a' in '2.safetensors'", "'b' in '1.safetensors'"]),
        ({"a": "1.safetensors", "b": 3}, ["'b'", "found 3"]),
        ({"a": "1.safetensors", "b": "../2.safetensors"}, ["../2.safetensors"]),
        ({"a": "1.safetensors", "b": "/etc/passwd"}, ["/etc/passwd"]),
        ({"a": "1.safetensors", "b": "config.json"}, ["'b'", ".safetensors"]),
        ({}, ["weight_map"]),
    ],
)
def test_index_and_shards_disagree(tmp_path: Path, weight_map: dict[str, object], shown: list[str]) -> None:
    both = "1.safetensors" in weight_map.values() and "2.safetensors" in weight_map.values()
    shards = {"1.safetensors": {"a": A["a.weight"]}, "2.safetensors": {"b": A["a.bias"]}}
    if not both:
        shards = {"1.safetensors": {"a": A["a.weight"], "b": A["a.bias"]}}
    shard(tmp_path, shards, weight_map)
    message = refused(tmp_path, MalformedError)
    for text in shown:
        assert text in message


def test_one_tensor_in_two_shards(tmp_path: Path) -> None:
    shard(tmp_path, {"1.safetensors": A, "2.safetensors": {**B, "a.bias": A["a.bias"]}})
    message = refused(tmp_path, MalformedError)
    assert "a.bias" in message and "1.safetensors" in message and "2.safetensors" in message


def test_two_sets_of_weights(tmp_path: Path) -> None:
    shard(tmp_path, {"1.safetensors": A})
    safetensors.numpy.save_file(A, tmp_path / "model.safetensors")
    assert "two sets of weights" in refused(tmp_path, MalformedError)


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    shard(tmp_path, {"model.safetensors": A})
    with open_plain(tmp_path) as checkpoint:
        assert_same_bytes(checkpoint, A)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b'{"weight_map": []}', b'{"weight_map": {"a": "x", "a": "y"}}', b"\xff"]
)
def test_broken_index(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    assert "model.safetensors.index.json" in refused(tmp_path, MalformedError)


def test_nothing_that_holds_weights(tmp_path: Path) -> None:
    message = refused(tmp_path, MalformedError)
    assert "no weights" in message and "model.safetensors" in message and "pytorch_model.bin" in message
    (tmp_path / "training_args.bin").write_bytes(b"x")
    (tmp_path / "rng_state_0.pth").write_bytes(b"x")
    assert "no weights" in refused(tmp_path, MalformedError)
    (tmp_path / "config.json").write_text("{}")
    assert "not a file that holds weights" in refused(tmp_path / "config.json", MalformedError)


def test_several_files_and_no_index(tmp_path: Path) -> None:
    for name in ("x.safetensors", "y.safetensors"):
        safetensors.numpy.save_file(A, tmp_path / name)
    message = refused(tmp_path, MalformedError)
    assert "2 weight files and no index: x.safetensors, y.safetensors" in message


def test_missing_source(tmp_path: Path) -> None:
    assert "no such file or directory" in refused(tmp_path / "nowhere", AccessError)


def test_broken_links_and_loops(tmp_path: Path) -> None:
    safetensors.numpy.save_file(A, tmp_path / "model.safetensors")
    link = tmp_path / "link"
    link.symlink_to("gone.json")
    message = refused(tmp_path, AccessError)
    assert "broken link to 'gone.json'" in message and str(link) in message
    link.unlink()
    link.symlink_to("link")
    assert str(link) in refused(tmp_path, AccessError)
    link.unlink()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    assert "a link to a directory that contains it" in refused(tmp_path, AccessError)


def test_links_that_multiply_end_at_a_limit(tmp_path: Path) -> None:
    """Two links to the next directory in each of 40: 2^40 paths."""
    safetensors.numpy.save_file(A, tmp_path / "model.safetensors")
    for depth in range(40):
        (tmp_path / f"d{depth}").mkdir()
        for side in "lr":
            (tmp_path / f"d{depth}" / side).symlink_to(f"../d{depth + 1}")
    (tmp_path / "d40").mkdir()
    with pytest.raises(MalformedError, match="limit sidecars"):
        open_plain(tmp_path, limits=DEFAULT_LIMITS.raised(sidecars=500))


def test_a_pipe_is_named_and_never_opened(tmp_path: Path) -> None:
    safetensors.numpy.save_file(A, tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "pipe")
    message = refused(tmp_path, AccessError)
    assert "not a regular file" in message and "pipe" in message
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "not a regular file" in refused(tmp_path / "pipe.safetensors", AccessError)


@pytest.mark.parametrize("name", ["a:b.txt", "back\\slash", "AUX.txt", "dot.", "new\nline", "deltafmt-x.safetensors"])
def test_sidecar_names_that_no_archive_may_hold(tmp_path: Path, name: str) -> None:
    safetensors.numpy.save_file(A, tmp_path / "model.safetensors")
    (tmp_path / name).write_text("x")
    with pytest.raises(MalformedError) as caught:
        open_plain(tmp_path)
    assert caught.value.reason == "name"
    assert "\n" not in str(caught.value)


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    safetensors.numpy.save_file(A, tmp_path / "model.safetensors")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).write_text("x")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    assert "\\udcff" in refused(tmp_path, MalformedError)


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    message = refused(tmp_path, IntegrityError)
    assert "Git LFS pointer" in message and "git lfs pull" in message


def test_a_truncated_shard_and_an_unknown_dtype(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(A, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert "truncated" in refused(tmp_path, MalformedError)
    path.write_bytes(whole.replace(b'"I64"', b'"I65"'))
    assert "I65" in refused(tmp_path, UnsupportedError)


def test_a_file_that_shrinks_while_open(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(A, path)
    with open_plain(tmp_path) as checkpoint:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(IntegrityError, match="shorter"):
            checkpoint.read_whole(list(checkpoint.tensors)[-1])


def test_limits(tmp_path: Path) -> None:
    shard(tmp_path, {"1.safetensors": A, "2.safetensors": B})
    for name, limit in {"tensors": 3, "tensor_bytes": 20, "total_bytes": 30, "shards": 1, "dimensions": 1}.items():
        with pytest.raises(MalformedError, match=f"--limit {name}=") as caught:
            open_plain(tmp_path, limits=DEFAULT_LIMITS.raised(**{name: limit}))
        assert caught.value.reason == "limit"


def test_close_closes_every_file(tmp_path: Path) -> None:
    shard(tmp_path, {"1.safetensors": A, "2.safetensors": B})
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    checkpoint = open_plain(tmp_path)
    checkpoint.close()
    (tmp_path / "2.safetensors").write_bytes(b"broken")
    with pytest.raises(MalformedError):
        open_plain(tmp_path)
    if before is not None:
        assert set(os.listdir("/proc/self/fd")) == before
