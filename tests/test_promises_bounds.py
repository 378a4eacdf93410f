"""Promises 10, 12, 14 and 15: a hostile manifest is refused before it costs anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

import deltafmt
from deltafmt import DeltafmtError, MalformedError
from hostile import (
    TABLE,
    ZEROS,
    Json,
    digest,
    edit,
    join_shard,
    put,
    put_chunk,
    read_shard,
    write_shard,
)
from refusal import refused, refused_later

Edit = Callable[[Json], object]


# --- 10: every tensor exactly once ----------------------------------------------------------------------------------


def _header_of(archive: Path, change: Edit) -> Path:
    """Change the header of the original weight file that the archive holds."""
    header, data = read_shard(archive)
    stored = data[slice(*header["model.safetensors#header"]["data_offsets"])]
    text = zstandard.ZstdDecompressor().decompress(stored) if stored[:4] == b"\x28\xb5\x2f\xfd" else stored
    original = json.loads(text)
    change(original)
    new = join_shard(original, b"")[8:]

    def follow(document: Json) -> None:
        document["arrays"]["model.safetensors#header"].update(shape=[len(new)], digest=digest(new))

    return edit(put_chunk(archive, "model.safetensors#header", [new]), follow)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("w"),
        lambda header: header.update(more=header["w"]),
        lambda header: header.update(W=header.pop("w")),
        lambda header: header["w"].update(shape=[4, 6]),
        lambda header: header["w"].update(dtype="I32"),
        lambda header: header["w"].update(data_offsets=[0, 4]),
        lambda header: header["v"].update(data_offsets=header["w"]["data_offsets"]),
        lambda header: header.update({"empty": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
    ],
)
def test_10_the_original_header_names_every_tensor_once(archive: Path, change: Edit) -> None:
    refused_later(_header_of(archive, change), "checkpoint")


@pytest.mark.parametrize(
    "change", [lambda t: t.pop("w"), lambda t: t.update(more=t["w"]), lambda t: t.update(W=t.pop("w"))]
)
def test_10_dropped_added_and_renamed_tensors(archive: Path, change: Edit) -> None:
    edit(archive, lambda document: change(document["tensors"]))
    try:
        deltafmt.open(archive).close()
    except MalformedError as error:  # a dropped tensor leaves an array that nobody uses
        assert error.reason == "coverage"
        assert "/arrays/w" in str(error)
        return
    message = refused_later(archive, "checkpoint")
    assert "'more'" in message or "'w'" in message or "'W'" in message


# --- 12: names ------------------------------------------------------------------------------------------------------

PATHS = [
    "", ".", "..", "../x", "a/../b", "a/..", "/etc/x", "//server/share", "a//b", "a/", "./a", "C:x", "C:\\x",
    "\\\\server\\x", "a\\b", "a\x00b", "a\nb", "a\x7f", "CON", "con.txt", "sub/nul", "Aux.x.y", "COM0", "lpt9.log",
    "a.", "a ", "a./b", "a" * 256, "a/" * 512 + "a", "é" * 128, "deltafmt.json", "deltafmt-x.safetensors",
    "deltafmt-00001-of-00001.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("place", ["sidecar", "file", "index"])
def test_12_file_names(archive: Path, name: str, place: str) -> None:
    def change(document: Json) -> None:
        if place == "sidecar":
            document["sidecars"][name] = {"size": 1, "digest": ZEROS}
        elif place == "file":
            document["checkpoint"]["files"][0]["name"] = name
        else:
            document["checkpoint"]["index"] = {"name": name, "array": "model.safetensors#header"}

    (archive.parent / "x").write_bytes(b"1")  # there is something to escape to
    refused(edit(archive, change), "name")


@pytest.mark.parametrize("name", [*PATHS[:30], "sub/x.safetensors", "x.bin", "../x.safetensors", "/x.safetensors"])
def test_12_shard_names(archive: Path, name: str) -> None:
    refused(edit(archive, lambda document: put(document, "shards/0/name", name)), "name")


@pytest.mark.parametrize("name", ["", "\x00", "a\x1fb", "\x7f", "__metadata__", "x" * 1025, "é" * 513])
@pytest.mark.parametrize("place", ["tensors", "arrays", "bases"])
def test_12_tensor_and_array_names(archive: Path, name: str, place: str) -> None:
    def change(document: Json) -> None:
        if place == "bases":
            document["bases"]["b"] = {"digest": ZEROS, "tensors": {name: document["tensors"]["w"]}}
        else:
            document[place][name] = document[place]["w"]

    refused(edit(archive, change), "name")


@pytest.mark.parametrize("name", ["Base", "a b", "", "x" * 65, "../b", "é", "b\n"])
def test_12_base_ids(archive: Path, name: str) -> None:
    base = {"digest": digest(b"{}"), "tensors": {}}
    refused(edit(archive, lambda document: document["bases"].update({name: base})), "name")


def test_12_the_chunk_table_is_no_array(archive: Path) -> None:
    refused(edit(archive, lambda document: document["arrays"].update({TABLE: document["arrays"]["w"]})), "name")


@pytest.mark.parametrize("names", [["model.safetensors"], ["a", "a/b"], ["a/b/c", "a/b"], ["model.safetensors/x"]])
def test_12_names_that_clash(archive: Path, names: list[str]) -> None:
    sidecars = {name: {"size": 0, "digest": digest(b"")} for name in names}
    refused(edit(archive, lambda document: document["sidecars"].update(sidecars)), "name")


def test_12_a_shard_given_twice(archive: Path) -> None:
    refused(edit(archive, lambda document: document["shards"].append(document["shards"][0])), "name")


# --- 14, 15: shapes and bombs ---------------------------------------------------------------------------------------


def _shaped(shape: list[Any], archive: Path, places: tuple[str, ...] = ("tensors/w", "arrays/w")) -> Path:
    return edit(archive, lambda document: [put(document, f"{place}/shape", shape) for place in places])


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ([2**33, 2**33], "limit"),
        ([2**62] * 16, "limit"),
        ([2**62, 2**62, 0, 1, 2**62], "operand"),
        ([1] * 17, "limit"),
        ([-1], "shape"),
        ([6, -4], "shape"),
        ([True, 24], "shape"),
        ([6.0, 4], "shape"),
        (["6", 4], "shape"),
        ([None], "shape"),
        ([[6], 4], "shape"),
        ([2**63], "shape"),
        ([2**70], "json"),
        ([10**4000], "json"),
    ],
)
def test_14_shapes(archive: Path, shape: list[Any], reason: str) -> None:
    message = refused(_shaped(shape, archive, ("tensors/w",)), reason)
    if reason == "limit":
        assert "--limit" in message
    assert "/w" in message  # which tensor


def test_14_a_shape_of_a_million_dimensions_takes_no_time(archive: Path) -> None:
    refused(_shaped([2**62] * 1_000_000, archive, ("tensors/w",)), "limit")
    header, data = read_shard(archive)
    header["w"]["shape"] = [2**62] * 1_000_000
    with pytest.raises(DeltafmtError):
        deltafmt.open(write_shard(archive, header, data))


def test_14_the_limit_can_be_lowered_and_raised(archive: Path) -> None:
    for name in ("tensor_bytes", "total_bytes", "tensors", "shards", "sidecars", "manifest_bytes", "header_bytes"):
        with pytest.raises(MalformedError, match=f"--limit {name}="):
            deltafmt.open(archive, limits=deltafmt.Limits().raised(**{name: 0}))
    _shaped([2**20, 2**18], archive)
    message = refused(archive, "limit")
    assert "tensor_bytes" in message
    with pytest.raises(DeltafmtError) as caught:
        deltafmt.open(archive, limits=deltafmt.Limits(tensor_bytes=2**41))
    assert caught.value.reason == "shard-layout"


def lowrank(document: Json, rank: int, rows: int, columns: int, name: str = "w") -> None:
    """Turn tensor `w` into a product of factors that are declared, not stored."""
    stored = {**document["arrays"]["w"], "encoding": {"filter": "none", "coder": "none", "chunk": 1024}}
    document["arrays"]["A"] = {**stored, "shape": [rank, columns]}
    document["arrays"]["B"] = {**stored, "shape": [rank, rows]}
    nodes = {key: {"op": "stored", "array": array} for key, array in (("a", "A"), ("b", "B"))}
    recipe = {"op": "lowrank", **nodes}
    document["tensors"][name] = {"dtype": "F32", "shape": [rows, columns], "recipe": recipe, "rel_error": 0}


def test_15_a_low_rank_bomb(archive: Path) -> None:
    def one(document: Json) -> None:
        lowrank(document, 1, 10**6, 10**6)

    def many(document: Json) -> None:
        lowrank(document, 1, 6, 4)
        for place in range(400):
            lowrank(document, 1, 10**5, 10**5, f"w{place}")

    message = refused(edit(archive, one), "limit")
    assert str(4 * 10**12) in message
    assert "tensor_bytes" in message
    with pytest.raises(MalformedError) as caught:
        deltafmt.open(edit(archive, many), limits=deltafmt.Limits(total_bytes=2**40))
    assert caught.value.reason == "limit"
    assert "total_bytes" in str(caught.value)
    with pytest.raises(MalformedError, match="rank"):
        deltafmt.open(edit(archive, lambda d: lowrank(d, 3, 6, 4)), limits=deltafmt.Limits(rank=2, total_bytes=2**50))
