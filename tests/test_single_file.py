"""The single-file form: what goes in comes out, nothing is half there, and no byte of it can change unseen."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import deltafmt
from command_line import Run, object_in, weights, write
from deltafmt import DeltafmtError, DestinationError, IntegrityError, MalformedError, UsageError
from hostile import Tensor, digest, f32, names_in, safetensors_bytes, seal, tree, write_checkpoint

TENSORS = {"w": f32(60, 40), "v": f32(50, seed=1), "zeros": Tensor("I64", (3,), bytes(24))}
SIDECARS = {
    "config.json": b'{"a": "\\u00e9"}\n',
    "sub/vocab.txt": b"x",
    "empty.txt": b"",
    "sub/mod\u00e8le.txt": b"\0\xff",
}
CARRIER = b'{"__metadata__":{"deltafmt.json":"'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "src", TENSORS, SIDECARS, shards=2)


@pytest.fixture
def packed(source: Path) -> Path:
    deltafmt.pack(source, source.parent / "packed.safetensors", single_file=True)
    return source.parent / "packed.safetensors"


def header_of(file: Path) -> dict[str, dict[str, str]]:
    raw = file.read_bytes()
    header: dict[str, dict[str, str]] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header


def manifest_of(file: Path) -> bytes:
    return header_of(file)["__metadata__"]["deltafmt.json"].encode()


# There and back


def test_everything_comes_back(source: Path, packed: Path) -> None:
    assert packed.is_file()
    assert names_in(packed.parent) == ["packed.safetensors", "src"]
    assert deltafmt.verify(packed, against=source).equal
    report = deltafmt.unpack(packed, packed.parent / "out")
    assert tree(packed.parent / "out") == tree(source)
    assert report.stored_bytes == packed.stat().st_size


def test_tensors_and_slices_are_read(packed: Path) -> None:
    with deltafmt.open(packed) as archive:
        assert sorted(archive.keys()) == sorted(TENSORS)
        assert all(archive.tensor_bytes(name) == tensor.data for name, tensor in TENSORS.items())
        assert archive.get_slice("w")[7:9].tobytes() == TENSORS["w"].data[7 * 160 : 9 * 160]
        assert archive.metadata() == {"format": "pt"}


def test_it_is_a_safetensors_file_with_sidecars_as_arrays(packed: Path) -> None:
    with safe_open(packed, "np") as file:
        assert set(file.metadata()) == {"deltafmt.json"}
        names = [name for name in file.keys() if name.startswith("deltafmt.sidecar/")]  # noqa: SIM118
        kept = {name.removeprefix("deltafmt.sidecar/"): file.get_tensor(name) for name in names}
    assert {name: array.tobytes() for name, array in kept.items()} == SIDECARS
    assert {array.dtype.name for array in kept.values()} == {"uint8"}


def test_the_manifest_seals_the_file(packed: Path) -> None:
    """The header's digest and the checksum, computed from the file as the specification says."""
    raw, text = packed.read_bytes(), manifest_of(packed)
    zeros = text.replace(json.loads(text)["$checksum"][7:].encode(), b"0" * 64)
    assert seal(zeros) == text
    (shard,) = json.loads(text)["shards"]
    assert shard["size"] == len(raw)
    start = 8 + int.from_bytes(raw[:8], "little")
    escaped = json.dumps(text.decode(), ensure_ascii=False).encode()[1:-1]
    assert raw[8:].startswith(CARRIER + escaped)
    assert shard["header"] == digest(raw[: 8 + len(CARRIER)] + raw[8 + len(CARRIER) + len(escaped) : start])
    assert start % 8 == 0


def test_the_name_is_not_in_it_and_threads_do_not_show(source: Path, packed: Path) -> None:
    for jobs, name in ((1, "a.safetensors"), (3, "other name.safetensors")):
        deltafmt.pack(source, source.parent / name, single_file=True, jobs=jobs)
        assert (source.parent / name).read_bytes() == packed.read_bytes()
    packed.rename(packed.with_name("moved"))  # no reader asks for the suffix
    assert deltafmt.verify(packed.with_name("moved")).exact


def test_it_holds_what_the_directory_holds(source: Path, packed: Path) -> None:
    deltafmt.pack(source, source.parent / "folder")
    single, folder = (
        json.loads(text) for text in (manifest_of(packed), (source.parent / "folder/deltafmt.json").read_bytes())
    )
    for document in (single, folder):
        for key in ("$checksum", "shards"):
            del document[key]
    assert single == folder


def test_a_base_and_a_fine_tune_in_single_files(tmp_path: Path) -> None:
    base = write(tmp_path / "base", weights(1))
    tuned = write(tmp_path / "tuned", {name: weight + np.float32(2**-12) for name, weight in weights(1).items()})
    deltafmt.pack(base, tmp_path / "base.safetensors", single_file=True)
    deltafmt.pack(tuned, tmp_path / "tuned.safetensors", base=base, single_file=True)
    with pytest.raises(deltafmt.WrongBaseError):
        deltafmt.unpack(tmp_path / "tuned.safetensors", tmp_path / "out")
    deltafmt.unpack(tmp_path / "tuned.safetensors", tmp_path / "out", base=tmp_path / "base.safetensors")
    assert tree(tmp_path / "out") == tree(tuned)
    # An archive is a source too, and the other form of it.
    deltafmt.pack(tmp_path / "base.safetensors", tmp_path / "again")
    assert deltafmt.verify(tmp_path / "again", against=base).equal
    deltafmt.pack(tmp_path / "again", tmp_path / "again.safetensors", single_file=True)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "base.safetensors").read_bytes()


def test_it_is_one_file_however_small_shards_are_to_be(source: Path) -> None:
    deltafmt.pack(source, source.parent / "one.safetensors", single_file=True, shard_bytes=1)
    assert deltafmt.inspect(source.parent / "one.safetensors").shards == 1


def test_a_tensor_named_like_a_sidecar(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", {"deltafmt.sidecar/config.json": f32(4), "deltafmt.json": f32(5)})
    deltafmt.pack(source, tmp_path / "packed.safetensors", single_file=True)
    assert deltafmt.verify(tmp_path / "packed.safetensors", against=source).equal


def test_sizes_add_up(source: Path, packed: Path) -> None:
    report = deltafmt.inspect(packed)
    assert report.stored_bytes == packed.stat().st_size == sum(report.roles.values())
    assert report.roles["sidecar"] == sum(map(len, SIDECARS.values()))
    assert report.roles["manifest"] == len(manifest_of(packed))
    assert set(report.files) == set(tree(source))


def test_a_size_budget_holds_for_the_file(tmp_path: Path) -> None:
    layers = {f"model.layers.{layer}.mlp.up_proj.weight": f32(32, 24, seed=layer) for layer in range(12)}
    source = write_checkpoint(tmp_path / "src", layers)
    for target in (28_000, 32_000):
        deltafmt.pack(source, tmp_path / f"{target}.safetensors", target_size=target, single_file=True)
        assert (tmp_path / f"{target}.safetensors").stat().st_size <= target


# The destination


def test_a_dry_run_says_the_size_and_writes_nothing(source: Path, packed: Path) -> None:
    report = deltafmt.pack(source, source.parent / "dry.safetensors", single_file=True, dry_run=True)
    assert report.stored_bytes == packed.stat().st_size
    assert names_in(source.parent) == ["packed.safetensors", "src"]


@pytest.mark.parametrize(
    "name",
    [
        "packed",
        "packed.json",
        "model.safetensors",
        "model.fp16.safetensors",
        "model.v1.5.safetensors",
        "model-00001-of-00001.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "pytorch_model.safetensors",
        "adapter_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "deltafmt-00001-of-00001.safetensors",
    ],
)
def test_names_that_are_refused(source: Path, name: str) -> None:
    with pytest.raises(UsageError):
        deltafmt.pack(source, source.parent / name, single_file=True)
    assert names_in(source.parent) == ["src"]


@pytest.mark.parametrize("name", ["my-model.safetensors", "model-packed.safetensors", "models.fp16.safetensors"])
def test_names_that_mean_nothing_to_others_are_not(source: Path, name: str) -> None:
    deltafmt.pack(source, source.parent / name, single_file=True)
    assert deltafmt.verify(source.parent / name, against=source).equal


def test_a_file_is_replaced_if_asked_for(source: Path, packed: Path) -> None:
    expected = packed.read_bytes()
    packed.write_bytes(b"old")
    with pytest.raises(DestinationError):
        deltafmt.pack(source, packed, single_file=True)
    assert packed.read_bytes() == b"old"
    deltafmt.pack(source, packed, single_file=True, overwrite=True)
    assert packed.read_bytes() == expected
    assert names_in(source.parent) == ["packed.safetensors", "src"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("target", ["directory", "link"])
def test_what_is_no_file_is_never_replaced(source: Path, target: str, overwrite: bool) -> None:
    place = source.parent / "dst.safetensors"
    if target == "directory":
        write_checkpoint(place, TENSORS)
    else:
        place.symlink_to(source / "model-00001-of-00002.safetensors")
    before = tree(source.parent)
    with pytest.raises(DestinationError):
        deltafmt.pack(source, place, single_file=True, overwrite=overwrite)
    assert tree(source.parent) == before


@pytest.mark.parametrize("failing", ["replace", "rename", "fsync", "pwrite", "pread"])
def test_whatever_fails_the_old_file_stays(
    source: Path, packed: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Each call of the operating system fails once: the old file is there, or (behind the rename) the new one."""
    work, new = getattr(os, failing), packed.read_bytes()
    calls = stop = done = 0

    def fail(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise OSError(28, "No space left on device")
        return work(*arguments)

    monkeypatch.setattr(os, failing, fail)
    while not done:
        calls, stop = 0, stop + 1
        packed.write_bytes(b"old")
        try:
            deltafmt.pack(source, packed, single_file=True, overwrite=True, jobs=1)
            done = 1
        except DeltafmtError:
            assert packed.read_bytes() in (b"old", new if failing == "fsync" else b"old")
        assert names_in(source.parent) == ["packed.safetensors", "src"]
    assert packed.read_bytes() == new
    assert stop > 1


# Damage


def test_no_byte_changes_unseen(packed: Path) -> None:
    good = packed.read_bytes()
    for at in range(0, len(good), 37):
        packed.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        with pytest.raises(DeltafmtError):
            deltafmt.verify(packed, jobs=1)


def test_no_cut_goes_unseen(packed: Path) -> None:
    good = packed.read_bytes()
    for length in (*range(0, 200, 9), *range(200, len(good), 211), len(good) - 1):
        packed.write_bytes(good[:length])
        with pytest.raises(DeltafmtError):
            deltafmt.open(packed)


def test_a_sidecar_that_was_changed_is_found_by_verify_and_unpack(packed: Path) -> None:
    raw = packed.read_bytes()
    packed.write_bytes(raw.replace(SIDECARS["config.json"], SIDECARS["config.json"].upper()))
    for verb in (deltafmt.verify, lambda file: deltafmt.unpack(file, packed.parent / "out")):
        with pytest.raises(IntegrityError) as caught:
            verb(packed)
        assert caught.value.reason == "digest"
    assert not (packed.parent / "out").exists()


# What is none


def test_an_ordinary_file_stays_an_ordinary_checkpoint(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}, {"deltafmt": "1.0"}):
        file = tmp_path / "weights.safetensors"
        file.write_bytes(safetensors_bytes({"deltafmt.json": f32(3)}, metadata))
        with pytest.raises(MalformedError) as caught:
            deltafmt.open(file)
        assert caught.value.reason == "not-an-archive"
        deltafmt.pack(file, tmp_path / "packed", overwrite=True)
        assert deltafmt.verify(tmp_path / "packed", against=file).equal


def test_a_checkpoint_whose_weights_are_a_single_file_archive(packed: Path) -> None:
    """Its arrays are no tensors of a model: packed as such, they would come back as what they are not."""
    folder = packed.parent / "folder"
    folder.mkdir()
    packed.rename(folder / packed.name)
    with pytest.raises(MalformedError, match="an archive in a single file"):
        deltafmt.pack(folder, packed.parent / "again")


def test_limits_hold(packed: Path) -> None:
    for limits in (deltafmt.Limits(header_bytes=1000), deltafmt.Limits(manifest_bytes=1000)):
        with pytest.raises(MalformedError) as caught:
            deltafmt.open(packed, limits=limits)
        assert caught.value.reason == "limit"


# The command line


def test_the_command_line(run: Run, source: Path) -> None:
    code, out, err = run("pack", "src", "one.safetensors", "--single-file", "--json")
    assert code == 0, err
    assert object_in(out)["stored_bytes"] == (source.parent / "one.safetensors").stat().st_size
    assert run("verify", "one.safetensors", "--against", "src")[0] == 0
    assert run("inspect", "one.safetensors")[0] == 0
    assert run("unpack", "one.safetensors", "out")[0] == 0
    assert tree(source.parent / "out") == tree(source)
    code, _, err = run("pack", "src", "two", "--single-file")
    assert code == 2
    assert "*.safetensors" in err
