"""Promises 5 to 9 and 24: what is cut, flipped, missing or another model is found, and named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

import deltafmt
from deltafmt import DeltafmtError, IntegrityError, MalformedError, WrongBaseError
from hostile import (
    MANIFEST,
    Json,
    Tensor,
    canonical,
    derived,
    digest,
    edit,
    f32,
    manifest,
    names_in,
    put,
    read_shard,
    ref,
    tree,
    write_checkpoint,
)

Tensors = dict[str, Tensor]


def tuned(tensors: Tensors) -> Tensors:
    """A fine-tune: every float changed a little."""
    return {
        name: tensor._replace(data=(np.frombuffer(tensor.data, "<f4") * np.float32(1.001)).tobytes())
        for name, tensor in tensors.items()
    }


SMALL: Tensors = {"w": f32(6, 4), "v": f32(9, seed=1), "i": Tensor("I64", (2,), bytes(range(16)))}
LARGE: Tensors = {"w": f32(64, 40), "v": f32(300, seed=1), "zeros": Tensor("I32", (40, 10), bytes(1600))}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small")
    write_checkpoint(root / "src", SMALL, {"config.json": b"{}", "sub/vocab.txt": b"a\nb\n", "empty": b""})
    deltafmt.pack(root / "src", root / "packed")
    return root / "packed"


@pytest.fixture
def archive(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "archive"))


def fails(verb: Callable[[], object], kind: type[DeltafmtError], *reasons: str) -> DeltafmtError:
    with pytest.raises(DeltafmtError) as caught:
        verb()
    assert type(caught.value) is kind, caught.value
    assert caught.value.reason in reasons, caught.value
    return caught.value


# --- 5: truncation --------------------------------------------------------------------------------------------------


def _boundaries(archive: Path) -> Iterable[int]:
    header, data = read_shard(archive)
    size = next(archive.glob("*.safetensors")).stat().st_size
    start = size - len(data)
    ends = {start + offset for entry in header.values() for offset in entry["data_offsets"]}
    return sorted({at + step for at in {0, 8, start, size, *ends} for step in (-1, 0, 1) if at + step >= 0} - {size})


def test_5_a_cut_or_grown_shard_is_found_at_open(archive: Path) -> None:
    shard = next(archive.glob("*.safetensors"))
    whole = shard.read_bytes()
    cuts = list(_boundaries(archive))
    assert len(cuts) > 12
    for size in cuts:
        shard.write_bytes((whole + b"\0")[:size])
        error = fails(lambda: deltafmt.open(archive), IntegrityError, "shard-size")
        assert error.exit_code == 5
        assert shard.name in str(error)
        assert f"{len(whole)} bytes" in str(error)
        assert f"{size} bytes" in str(error)


def test_5_a_cut_manifest_or_sidecar_is_found_at_open(archive: Path) -> None:
    whole = (archive / MANIFEST).read_bytes()
    for size in range(len(whole)):
        (archive / MANIFEST).write_bytes(whole[:size])
        fails(
            lambda: deltafmt.open(archive),
            IntegrityError if size >= 85 else MalformedError,
            "manifest-checksum" if size >= 85 else "json",
        )
    (archive / MANIFEST).write_bytes(whole)
    for content in (b"a\nb", b"a\nb\n\n", b""):
        (archive / "sub/vocab.txt").write_bytes(content)
        error = fails(lambda: deltafmt.open(archive), IntegrityError, "sidecar")
        assert "sub/vocab.txt" in str(error)


# --- 6: flipped bits ------------------------------------------------------------------------------------------------


def _flip_everywhere(file: Path, verb: Callable[[], object], bits: Callable[[int], int]) -> list[DeltafmtError]:
    whole = file.read_bytes()
    errors = []
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bits(at))]) + whole[at + 1 :])
        with pytest.raises(DeltafmtError) as caught:
            verb()
        errors.append(caught.value)
    file.write_bytes(whole)
    return errors


@pytest.mark.parametrize("turn", [0, 3])
def test_6_any_flipped_bit_is_found_by_verify(archive: Path, turn: int) -> None:
    for name in tree(archive):
        for error in _flip_everywhere(
            archive / name, lambda: deltafmt.verify(archive, jobs=1), lambda at: (at + turn) % 8
        ):
            # A flip in the manifest's very first bytes makes it something else; all other flips are lost integrity.
            assert type(error) is (
                IntegrityError if name != MANIFEST or error.reason == "manifest-checksum" else MalformedError
            )
            assert error.exit_code in (3, 5)
            assert name in str(error)
            assert error.hint
    deltafmt.verify(archive)


def test_6_any_flipped_bit_of_compressed_and_patched_arrays_is_found(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", LARGE)
    source = write_checkpoint(tmp_path / "src", {**LARGE, **tuned({"w": LARGE["w"], "v": LARGE["v"]})})
    deltafmt.pack(source, tmp_path / "packed", base=base)
    assert deltafmt.verify(tmp_path / "packed", base=base).tensors["w"].method == "patch"
    shard = next((tmp_path / "packed").glob("*.safetensors"))
    header, data = read_shard(tmp_path / "packed")
    starts = [entry["data_offsets"][0] for entry in header.values()]
    whole = shard.read_bytes()
    start = len(whole) - len(data)
    for at in [*range(start, len(whole), 7), *(start + offset for offset in starts)]:
        at = min(at, len(whole) - 1)
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        error = fails(
            lambda: deltafmt.unpack(tmp_path / "packed", tmp_path / "out", base=base),
            IntegrityError,
            "chunk-checksum",
            "table",
        )
        assert shard.name in str(error)
        if error.reason == "chunk-checksum":
            assert "bytes" in str(error)
            assert "ownload" in str(error)
    assert names_in(tmp_path) == ["base", "packed", "src"]


def test_6_reading_a_damaged_tensor_fails_and_the_others_are_fine(archive: Path) -> None:
    header, data = read_shard(archive)
    shard = next(archive.glob("*.safetensors"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) - len(data) + header["v"]["data_offsets"][0] + 5] ^= 1
    shard.write_bytes(damaged)
    with deltafmt.open(archive) as opened:
        assert opened.get_tensor("w").tobytes() == SMALL["w"].data
        for read in (lambda: opened.get_tensor("v"), lambda: opened.get_slice("v")[1:2]):
            error = fails(read, IntegrityError, "chunk-checksum")
            assert "'v'" in str(error)


@pytest.mark.parametrize("field", ["arrays/w/digest", "tensors/w/digest", "arrays/model.safetensors#header/digest"])
def test_6_another_digest_in_the_manifest_is_found(archive: Path, field: str) -> None:
    edit(archive, lambda document: put(document, field, "sha256:" + 64 * "a"))
    fails(lambda: deltafmt.verify(archive), IntegrityError, "digest")
    if not field.startswith("arrays/w"):
        fails(lambda: deltafmt.unpack(archive, archive.parent / "out"), IntegrityError, "digest")
        assert not (archive.parent / "out").exists()


def test_6_another_sidecar_of_the_same_size_is_found(archive: Path, tmp_path: Path) -> None:
    (archive / "sub/vocab.txt").write_bytes(b"a\nc\n")
    for verb in (lambda: deltafmt.verify(archive), lambda: deltafmt.unpack(archive, tmp_path / "out")):
        error = fails(verb, IntegrityError, "digest")
        assert "vocab.txt" in str(error)
    assert names_in(tmp_path) == ["archive"]


# --- 7, 24: missing and shrinking files -----------------------------------------------------------------------------


def test_7_a_missing_shard_is_found_at_open(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", {f"t{i}": f32(30, 10, seed=i) for i in range(6)}, shards=2)
    deltafmt.pack(source, tmp_path / "packed", shard_bytes=2000)
    shards = sorted((tmp_path / "packed").glob("*.safetensors"))
    assert len(shards) == 4
    for place, shard in enumerate(shards):
        shard.rename(tmp_path / "away")
        error = fails(lambda: deltafmt.open(tmp_path / "packed"), IntegrityError, "shard-missing")
        arrays = manifest(tmp_path / "packed")["arrays"]
        count = sum(arrays[name]["shard"] == place for name in (f"t{i}" for i in range(6)))
        assert shard.name in str(error)
        assert f"Tensors that need it: {count} of 6." in str(error)
        os.mkfifo(shard)
        fails(lambda: deltafmt.open(tmp_path / "packed"), IntegrityError, "shard-missing")
        shard.unlink()
        (tmp_path / "away").rename(shard)
    # Two shards swapped: each has the other's bytes.
    contents = [shard.read_bytes() for shard in shards]
    shards[0].write_bytes(contents[1])
    shards[1].write_bytes(contents[0])
    fails(lambda: deltafmt.open(tmp_path / "packed"), IntegrityError, "shard-size", "shard-header")


def test_7_tensors_that_reach_a_missing_shard_are_counted(archive: Path) -> None:
    """Not stored arrays: some tensors are made of others, or of a base, and headers are arrays that no tensor needs."""

    def rewrite(document: Json) -> None:
        derived(document, "chain", ref("again"))
        derived(document, "again", ref("w"))
        document["tensors"]["i"]["recipe"] = {"op": "ref", "tensor": "i", "base": "base"}
        tensors = {"i": {key: document["tensors"]["i"][key] for key in ("dtype", "shape", "digest")}}
        stated = digest(canonical({"i": ["I64", [2], tensors["i"]["digest"]]}))
        document["bases"]["base"] = {"digest": stated, "tensors": tensors}
        del document["arrays"]["i"]

    edit(archive, rewrite)
    shard = next(archive.glob("*.safetensors"))
    os.truncate(shard, 9)
    cut = fails(lambda: deltafmt.open(archive), IntegrityError, "shard-size")
    shard.unlink()
    gone = fails(lambda: deltafmt.open(archive), IntegrityError, "shard-missing")
    assert cut.hint == gone.hint == "Tensors that need it: 4 of 5. Download the shard again"


def test_7_a_missing_sidecar_is_found_at_open(archive: Path) -> None:
    (archive / "sub/vocab.txt").unlink()
    fails(lambda: deltafmt.open(archive), IntegrityError, "sidecar")


def test_24_a_shard_that_shrinks_while_open(archive: Path) -> None:
    shard = next(archive.glob("*.safetensors"))
    with deltafmt.open(archive) as opened:
        os.truncate(shard, shard.stat().st_size // 2)
        fails(lambda: [opened.get_tensor(name) for name in opened.keys()], IntegrityError, "shard-size")  # noqa: SIM118


def test_24_a_source_that_shrinks_while_it_is_packed(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", {f"t{i}": f32(100, 100, seed=i) for i in range(4)})

    def shrink(done: int, total: int, what: str) -> None:
        os.truncate(source / "model.safetensors", 1000)

    with pytest.raises(IntegrityError, match="shorter"):
        deltafmt.pack(source, tmp_path / "packed", base=_copy(source, tmp_path / "base"), progress=shrink, jobs=1)
    assert names_in(tmp_path) == ["base", "src"]


# --- 8, 9: the base -------------------------------------------------------------------------------------------------


def _copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


BASE: Tensors = {"w": f32(16, 8), "v": f32(12, seed=1), "unused": f32(5, seed=2)}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """(archive, base); no recipe refers to the base's tensor `unused`."""
    base = write_checkpoint(tmp_path / "base", BASE)
    source = write_checkpoint(tmp_path / "src", tuned({"w": BASE["w"]}) | {"v": BASE["v"]})
    deltafmt.pack(source, tmp_path / "packed", base=base)
    assert {node["op"] for node in (t["recipe"] for t in manifest(tmp_path / "packed")["tensors"].values())} == {
        "ref",
        "patch",
    }
    return tmp_path / "packed", base


def verbs(archive: Path, base: Path | None) -> list[Callable[[], object]]:
    return [
        lambda: deltafmt.verify(archive, base=base),
        lambda: deltafmt.unpack(archive, archive.parent / "out", base=base),
    ]


@pytest.mark.parametrize("name", ["w", "v", "unused"])
@pytest.mark.parametrize("bit", [0, 31])
def test_8_one_changed_value_of_the_base(pair: tuple[Path, Path], tmp_path: Path, name: str, bit: int) -> None:
    archive, _ = pair
    changed = np.frombuffer(BASE[name].data, "<u4").copy()
    changed[-1] ^= np.uint32(1 << bit)
    wrong = write_checkpoint(tmp_path / "wrong", BASE | {name: BASE[name]._replace(data=changed.tobytes())})
    for verb in verbs(archive, wrong):
        error = fails(verb, WrongBaseError, "base-mismatch")
        assert error.exit_code == 6
        assert f"'{name}'" in str(error)
        stated = manifest(archive)["bases"]["base"]
        assert stated["tensors"][name]["digest"] in str(error)
        assert stated["digest"] in str(error)
    assert not (tmp_path / "out").exists()
    if name != "unused":  # a slice of one element checks the whole base tensor first
        with deltafmt.open(archive, base=wrong) as opened:
            fails(lambda: opened.get_slice(name)[0:1], WrongBaseError, "base-mismatch")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {name: tensor for name, tensor in t.items() if name != "unused"},
        lambda t: t | {"more": f32(1)},
        lambda t: t | {"w": t["w"]._replace(shape=(8, 16))},
        lambda t: t | {"w": t["w"]._replace(dtype="I32")},
        lambda t: {name.replace("unused", "Unused"): tensor for name, tensor in t.items()},
    ],
)
def test_8_a_base_of_another_structure_is_found_at_open(
    pair: tuple[Path, Path], tmp_path: Path, change: Callable[[Tensors], Tensors]
) -> None:
    wrong = write_checkpoint(tmp_path / "wrong", change(dict(BASE)))
    fails(lambda: deltafmt.open(pair[0], base=wrong), WrongBaseError, "base-mismatch")


def test_8_a_missing_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    archive, base = pair
    error = fails(lambda: deltafmt.unpack(archive, tmp_path / "out"), WrongBaseError, "base-missing")
    assert base.name in str(error)
    assert manifest(archive)["bases"]["base"]["digest"] in str(error)
    assert str(base.parent).encode() not in (archive / MANIFEST).read_bytes()  # whose disk it was is nobody's business
    with deltafmt.open(archive) as opened:
        fails(lambda: opened.get_tensor("w"), WrongBaseError, "base-missing")
        fails(lambda: opened.get_slice("w"), WrongBaseError, "base-missing")
    assert deltafmt.verify(archive).base_checked is False
    assert deltafmt.verify(archive, base={}).base_checked is False
    fails(lambda: deltafmt.verify(archive, against=tmp_path / "src"), WrongBaseError, "base-missing")


def test_8_a_base_where_none_is_needed(archive: Path, pair: tuple[Path, Path]) -> None:
    with deltafmt.open(archive, base=pair[1]) as needless:
        assert needless.keys()
    with pytest.raises(deltafmt.UsageError):
        deltafmt.open(archive, base={"other": pair[1]})


def test_9_the_same_base_elsewhere(pair: tuple[Path, Path], tmp_path: Path) -> None:
    archive, base = pair
    # Renamed; sharded; as one file; as the Hub's cache links it; as an archive; with other sidecars.
    renamed = base.rename(tmp_path / "renamed")
    sharded = write_checkpoint(tmp_path / "sharded", BASE, {"README.md": b"other"}, shards=3)
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    for place, path in enumerate(sorted(renamed.iterdir())):
        path.rename(tmp_path / f"models--a--b/blobs/{place}")
        (snapshot / path.name).symlink_to(f"../../blobs/{place}")
    deltafmt.pack(sharded, tmp_path / "packed base")
    for same in (sharded, snapshot, snapshot / "model.safetensors", tmp_path / "packed base"):
        deltafmt.unpack(archive, tmp_path / "out", base=same)
        assert tree(tmp_path / "out") == tree(tmp_path / "src")
        shutil.rmtree(tmp_path / "out")
        assert deltafmt.verify(archive, base={"base": same}, against=tmp_path / "src").equal


def test_9_an_archive_in_the_hub_cache(pair: tuple[Path, Path], tmp_path: Path) -> None:
    archive, base = pair
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for place, path in enumerate(sorted(archive.iterdir())):
        path.rename(tmp_path / f"blobs/{place}")
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{place}")
    deltafmt.unpack(tmp_path / "snapshot", tmp_path / "out", base=base)
    assert tree(tmp_path / "out") == tree(tmp_path / "src")
    (tmp_path / "link").symlink_to("snapshot")
    assert deltafmt.verify(tmp_path / "link", base=base, against=tmp_path / "src").equal


def test_a_base_that_is_an_archive_with_a_base(tmp_path: Path) -> None:
    """A chain: grandchild against child (packed), child against base. Each level needs the one below, or says so."""
    base = write_checkpoint(tmp_path / "base", BASE)
    child = write_checkpoint(tmp_path / "child", tuned(BASE))
    deltafmt.pack(child, tmp_path / "packed child", base=base)
    grandchild = write_checkpoint(tmp_path / "grandchild", tuned(tuned(BASE)))
    fails(
        lambda: deltafmt.pack(grandchild, tmp_path / "packed", base=tmp_path / "packed child"),
        WrongBaseError,
        "base-missing",
    )
    assert not (tmp_path / "packed").exists()
    deltafmt.pack(child, tmp_path / "alone")
    deltafmt.pack(grandchild, tmp_path / "packed", base=tmp_path / "alone")
    for same in (child, tmp_path / "alone"):
        assert deltafmt.verify(tmp_path / "packed", base=same, against=grandchild).equal
    fails(lambda: deltafmt.verify(tmp_path / "packed", base=tmp_path / "packed child"), WrongBaseError, "base-missing")


def test_a_bf16_fine_tune_of_an_fp32_base(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"w": f32(64, 48)})
    high = np.frombuffer(BASE["w"].data, "<u4")
    assert high.size
    # bf16 as training code rounds it: by hand, to nearest even.
    words = np.frombuffer(f32(64, 48).data, "<u4").astype(np.uint64)
    rounded = ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype("<u2")
    rounded[::7] += 1  # and a few that training moved
    source = write_checkpoint(tmp_path / "src", {"w": Tensor("BF16", (64, 48), rounded.tobytes())})
    report = deltafmt.pack(source, tmp_path / "packed", base=base)
    assert report.tensors["w"].method == "patch"
    assert report.tensors["w"].stored_bytes < 0.2 * report.tensors["w"].logical_bytes
    deltafmt.unpack(tmp_path / "packed", tmp_path / "out", base=base)
    assert tree(tmp_path / "out") == tree(source)
