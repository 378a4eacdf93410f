"""Promises 11 and 16: shards without holes, chunk tables that fit, and frames that do not lie."""

from __future__ import annotations

import functools
import resource
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import zstandard

import deltafmt
from deltafmt import IntegrityError, MalformedError
from hostile import (
    TABLE,
    Json,
    edit,
    manifest,
    put,
    put_chunk,
    put_table,
    read_shard,
    read_table,
    write_shard,
)
from refusal import refused, refused_later

Edit = Callable[[Json], object]


# --- 11: shards without holes ---------------------------------------------------------------------------------------


def _moved(header: Json, data: bytes, how: str) -> tuple[Json | bytes, bytes]:
    last = max((name for name in header), key=lambda name: header[name]["data_offsets"][1])
    if how == "hole":
        header[last]["data_offsets"] = [offset + 8 for offset in header[last]["data_offsets"]]
        return header, data[:-8] + bytes(8) + data[-8:]
    if how == "overlap":
        header["v"]["data_offsets"] = [header["w"]["data_offsets"][0] + at for at in (0, 20)]
    if how == "trailing":
        return header, data + b"\0"
    if how == "short":
        return header, data[:-1]
    if how == "late":
        for entry in header.values():
            entry["data_offsets"] = [offset + 1 for offset in entry["data_offsets"]]
        return header, b"\0" + data
    if how == "extra":
        header["more"] = {"dtype": "U8", "shape": [1], "data_offsets": [len(data), len(data) + 1]}
        return header, data + b"\0"
    if how == "missing":
        header["x"] = header.pop("v")
    if how == "dtype":
        header["v"]["dtype"] = "I32"
    if how == "no table":
        header["chunks"] = header.pop(TABLE)
    return header, data


@pytest.mark.parametrize(
    "how", ["hole", "overlap", "trailing", "short", "late", "extra", "missing", "dtype", "no table"]
)
def test_11_shard_layout(archive: Path, how: str) -> None:
    header, data = read_shard(archive)
    message = refused(write_shard(archive, *_moved(header, data, how)), "shard-layout")
    assert next(archive.glob("*.safetensors")).name in message


_ENTRY = '"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"{" + _ENTRY.encode() + b"," + _ENTRY.encode() + b"}",
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}',
        b'{"w":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}',
        b'{"w":{"dtype":"F32","shape":[9223372036854775807,4],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"x":1}}',
        b'{"__metadata__":[]}',
        b"[" * 100_000,
    ],
)
def test_11_headers_that_are_not_valid(archive: Path, header: bytes) -> None:
    refused(write_shard(archive, header, bytes(4)), "shard-header", IntegrityError)


def test_11_a_header_longer_than_the_file(archive: Path) -> None:
    shard = next(archive.glob("*.safetensors"))
    for length in (2**64 - 1, 2**63, shard.stat().st_size - 7):
        data = struct.pack("<Q", length) + shard.read_bytes()[8:]
        shard.write_bytes(data)
        refused(archive, "shard-header", IntegrityError)


# --- 16: compression bombs ------------------------------------------------------------------------------------------


@functools.cache
def _zeros(size: int, declared: bool = True) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, write_content_size=declared)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=size if declared else -1)
    block = bytes(1 << 20)
    return (
        b"".join(compressor.compress(block[: min(len(block), size - at)]) for at in range(0, size, 1 << 20))
        + compressor.flush()
    )


def _frame(size: int, content_size: int) -> bytes:
    """A frame whose header declares `content_size`, whatever its content is."""
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", content_size) + _zeros(size)[_header_length(_zeros(size)) :]


def _header_length(frame: bytes) -> int:
    return int(zstandard.frame_header_size(frame))


def test_16_frames_that_lie(archive: Path) -> None:
    edit(archive, lambda d: d["arrays"]["bytes"].update(encoding={"filter": "planes", "coder": "zstd", "chunk": 64}))
    deltafmt.verify(put_chunk(archive, "bytes", [_zeros(64)]))
    deltafmt.verify(put_chunk(archive, "bytes", [_frame(64, 64)]))
    good = _zeros(64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    frames = {
        "another size": _zeros(65),
        "no size": _zeros(64, declared=False),
        "size too small": _frame(64, 63),
        "declares 64, holds more": _frame(100_000, 64),
        "declares more": _frame(64, 2**40),
        "unknown size": _frame(64, 2**64 - 1),
        "skippable": struct.pack("<II", 0x184D2A50, 8) + bytes(8),
        "two frames": good + good,
        "trailing byte": good + b"\0",
        "cut": good[:-1],
        "nothing": b"",
        "no frame": b"zst",
    }
    for what, frame in frames.items():
        assert len(frame) < 64, what
        message = refused_later(put_chunk(archive, "bytes", [frame]), "chunk-size")
        assert "'bytes'" in message, what
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_16_a_gigabyte_of_zeros_in_32_kib(tmp_path: Path, archive: Path) -> None:
    size = 1 << 30
    bomb = _zeros(size)
    assert len(bomb) < 40_000
    # Any chunk that could hold it is refused; in a chunk that is allowed the frame is too long, whatever it declares.
    edit(archive, lambda d: d["arrays"]["bytes"].update(encoding={"filter": "none", "coder": "zstd", "chunk": size}))
    refused(archive, "limit")
    edit(archive, lambda d: put(d, "arrays/bytes/encoding/chunk", 1 << 17))
    edit(archive, lambda d: [put(d, f"{at}/bytes/shape", [1 << 17]) for at in ("arrays", "tensors")])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for frame in (_frame(size, 1 << 17), bomb):
        with pytest.raises(MalformedError) as caught:
            deltafmt.open(put_chunk(archive, "bytes", [frame])).get_tensor("bytes")
        assert caught.value.reason == "chunk-size"
    assert f"expected {1 << 17}, found {size}" in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


# --- Chunk tables ---------------------------------------------------------------------------------------------------


def test_11_chunk_tables_that_do_not_fit(archive: Path) -> None:
    words = read_table(*read_shard(archive))
    at = manifest(archive)["arrays"]["w"]["table"]
    length = 6 * 4 * 4
    for place, value in ((at + 1, length + 1), (at + 1, length - 1), (at + 1, 0), (at + 1, 2**64 - 1), (at + 1, 2**63)):
        changed = [*words[:place], value, *words[place + 1 :]]
        with pytest.raises(IntegrityError) as caught:
            deltafmt.open(put_table(archive, changed)).get_tensor("w")
        assert caught.value.reason == "table"
    put_table(archive, words)
    for table in (at + 1, 10**6, 2**63 - 1):
        edit(archive, partial(put, path="arrays/w/table", value=table))
        with pytest.raises(IntegrityError) as caught:
            deltafmt.open(archive).get_tensor("w")
        assert caught.value.reason == "table"
