"""Invalid shards, sidecars, chunk tables and chunks: steps 6 and 7 of spec/reasons.md."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

from vectors.draft import Draft, repeated, zstd_frame
from vectors.spoil import Edit, add, drop, flip, manifest, plain_archive, put, shift, two_shards
from vectors.values import Json, numbers

SHARD = "deltafmt-00001-of-00001.safetensors"
SECOND = "deltafmt-00002-of-00002.safetensors"

# Step 6: shards and sidecars -----------------------------------------------------------------------


def file_edit(
    name: str, reason: str, description: str, change: Callable[[bytes], bytes], file: str = SHARD, **options: Any
) -> None:
    def edit(files: dict[str, bytes]) -> None:
        files[file] = change(files[file])

    add(name, reason, description, edit_files=edit, **options)


def data_start(shard: bytes) -> int:
    return 8 + int.from_bytes(shard[:8], "little")


add("shard-missing", "shard-missing", "the shard is missing", edit_files=lambda f: f.pop(SHARD))
add(
    "shard-missing-second",
    "shard-missing",
    "the second shard is missing",
    two_shards,
    edit_files=lambda f: f.pop(SECOND),
)
file_edit("shard-empty", "shard-size", "an empty shard", lambda x: b"")
file_edit("shard-cut-in-length", "shard-size", "cut in the length of the header", lambda x: x[:7])
file_edit("shard-cut-after-length", "shard-size", "cut after the length of the header", lambda x: x[:8])
file_edit(
    "shard-cut-in-header", "shard-size", "cut before the last byte of the header", lambda x: x[: data_start(x) - 1]
)
file_edit("shard-cut-after-header", "shard-size", "cut after the header", lambda x: x[: data_start(x)])
file_edit("shard-cut-last-byte", "shard-size", "cut by one byte", lambda x: x[:-1])
file_edit("shard-longer", "shard-size", "one byte too long", lambda x: x + b"\0")
file_edit("shard-flip-length", "shard-header", "one bit flipped in the length of the header", lambda x: flip(x, 0))
file_edit(
    "shard-flip-length-high", "shard-header", "the top bit flipped in the length of the header", lambda x: flip(x, 7, 7)
)
file_edit(
    "shard-header-respaced", "shard-header", "white space in the header moved", lambda x: x.replace(b", ", b" ,", 1)
)
file_edit("shard-flip-header", "shard-header", "one bit flipped in the header", lambda x: flip(x, 40))


def shard_edit(
    name: str, reason: str, description: str, change: Callable[[Json, bytes], tuple[Json | bytes, bytes]]
) -> None:
    add(name, reason, description, edit_shard=change)


def header_edit(name: str, reason: str, description: str, edit: Edit) -> None:
    def change(header: Json, data: bytes) -> tuple[Json, bytes]:
        edit(header)
        return header, data

    shard_edit(name, reason, description, change)


def hole(header: Json, data: bytes) -> tuple[Json, bytes]:
    at = header["bias"]["data_offsets"][0]
    shift(header, "bias", 4)
    return header, data[:at] + b"hole" + data[at:]


def overlap(header: Json, data: bytes) -> tuple[Json, bytes]:
    shift(header, "ids", -1)
    return header, data[:-1]


def late_start(header: Json, data: bytes) -> tuple[Json, bytes]:
    shift(header, "deltafmt.chunks", 8)
    return header, bytes(8) + data


def duplicated(header: Json, data: bytes) -> tuple[bytes, bytes]:
    text = json.dumps(header)
    return ("{" + f'"bias":{json.dumps(header["bias"])},' + text[1:]).encode(), data


shard_edit("header-not-json", "shard-header", "a header that is not JSON", lambda h, x: (b"{" + b" " * 31, x))
shard_edit("header-list", "shard-header", "a header that is a list", lambda h, x: (b"[]      ", x))
shard_edit("header-duplicate-key", "shard-header", "an entry twice", duplicated)
shard_edit(
    "header-deep", "shard-header", "a header 100 deep", lambda h, x: (b'{"a":' + b"[" * 99 + b"]" * 99 + b"}", x)
)
header_edit("header-dtype", "shard-header", "an entry of an unknown dtype", put("F4", "bias", "dtype"))
header_edit("header-dtype-list", "shard-header", "an entry whose dtype is a list", put(["F32"], "bias", "dtype"))
header_edit("header-offset-negative", "shard-header", "a negative offset", put([-16, 0], "bias", "data_offsets"))
header_edit("header-offset-true", "shard-header", "an offset that is true", put([0, True], "bias", "data_offsets"))
header_edit("header-metadata", "shard-header", "metadata that is no map of strings", put({"a": 1}, "__metadata__"))
header_edit("header-without-shape", "shard-header", "an entry without a shape", drop("bias", "shape"))
shard_edit("layout-hole", "shard-layout", "four bytes between two arrays", hole)
shard_edit("layout-overlap", "shard-layout", "arrays that overlap by a byte", overlap)
shard_edit("layout-late-start", "shard-layout", "data that begin at 8", late_start)
shard_edit("layout-trailing", "shard-layout", "a byte after the last array", lambda h, x: (h, x + b"\0"))
shard_edit("layout-short", "shard-layout", "a last array that ends behind the file", lambda h, x: (h, x[:-1]))
header_edit("layout-other-name", "shard-layout", "an array under another name", lambda h: h.update(other=h.pop("bias")))
header_edit(
    "layout-other-dtype", "shard-layout", "an array under another dtype of the same width", put("I32", "bias", "dtype")
)
header_edit("layout-other-shape", "shard-layout", "an array under another shape", put([2, 2], "bias", "shape"))
header_edit("layout-coded-dtype", "shard-layout", "a coded array that is not U8", put("I8", "w", "dtype"))
header_edit("layout-no-table", "shard-layout", "no chunk table", lambda h: h.update(table=h.pop("deltafmt.chunks")))
header_edit(
    "layout-table-dtype", "shard-layout", "a chunk table that is not U64", put("I64", "deltafmt.chunks", "dtype")
)
shard_edit(
    "layout-extra-array",
    "shard-layout",
    "an array that the manifest does not know",
    lambda h, x: (h | {"extra": {"dtype": "U8", "shape": [1], "data_offsets": [len(x), len(x) + 1]}}, x + b"\0"),
)
manifest(
    "layout-array-in-other-shard",
    "shard-layout",
    "an array placed in the wrong shard",
    put(0, "arrays", "second", "shard"),
    two_shards,
)
add("sidecar-missing", "sidecar", "a sidecar is missing", edit_files=lambda f: f.pop("config.json"))
file_edit("sidecar-cut", "sidecar", "a sidecar cut by one byte", lambda x: x[:-1], "config.json")
file_edit("sidecar-longer", "sidecar", "a sidecar one byte too long", lambda x: x + b"\n", "config.json")
file_edit("sidecar-flip", "digest", "one bit flipped in a sidecar", lambda x: flip(x, 3), "config.json")

# Step 7: chunk tables and chunks -------------------------------------------------------------------

file_edit("table-flip", "table", "one bit flipped in the chunk table", lambda x: flip(x, data_start(x) + 8))


def table_edit(name: str, description: str, edit: Callable[[list[int]], list[int]]) -> None:
    add(name, "table", description, edit_table=edit)


# The rows of `w` come first: checksum, end of plane 0, end of plane 1; three chunks.
table_edit("table-ends-fall", "an end before the one before", lambda t: [t[0], t[2] + 1, *t[2:]])
table_edit("table-end-too-far", "the last end behind the array", lambda t: [*t[:8], t[8] + 1, *t[9:]])
table_edit("table-end-too-soon", "the last end before the end of the array", lambda t: [*t[:8], t[8] - 1, *t[9:]])
table_edit("table-end-2-64", "an end of 2^64 - 1", lambda t: [*t[:8], 2**64 - 1, *t[9:]])
table_edit("table-extra-word", "a word that belongs to no row", lambda t: [*t, 0])
table_edit("table-missing-word", "a word is missing", lambda t: t[:-1])
manifest("table-beyond", "table", "rows behind the table", put(2**62, "arrays", "w", "table"))
manifest("table-rows-shared", "table", "two arrays with the same rows", put(0, "arrays", "bias", "table"))


def spoil_chunk(
    name: str, reason: str, description: str, array: str, change: Callable[[list[list[bytes]]], object]
) -> None:
    """Change the stored planes of an array; its rows in the chunk table, checksums included, follow."""

    def make() -> Draft:
        draft = plain_archive()
        change(draft.arrays[array].chunks)
        return draft

    add(name, reason, description, make)


def frame(name: str, description: str, stored: bytes) -> None:
    """Another stored form for the 600 zero bytes of the array `zeros`."""
    spoil_chunk(f"chunk-{name}", "chunk-size", description, "zeros", lambda chunks: chunks.__setitem__(0, [stored]))


def array_flip(array: str, at: int, shard: bytes) -> bytes:
    begin, end = json.loads(shard[8 : data_start(shard)])[array]["data_offsets"]
    return flip(shard, data_start(shard) + begin + at % (end - begin))


for array, at in (("bias", 0), ("bias", -1), ("w", 0), ("w", -1), ("ids", 20), ("header of model.safetensors", 5)):
    name = f"chunk-flip-{array.split()[0]}-{'last' if at < 0 else at}"
    file_edit(name, "chunk-checksum", f"one bit flipped in {array!r}", partial(array_flip, array, at))
GOOD = zstd_frame(600, repeated(0, 600))
frame("declares-more", "a frame that declares 601 bytes and holds 600", zstd_frame(601, repeated(0, 600)))
frame("declares-less", "a frame that declares 599 bytes and holds 600", zstd_frame(599, repeated(0, 600)))
frame("holds-more", "a frame that declares 600 bytes and holds 601", zstd_frame(600, repeated(0, 601), 17))
frame("holds-less", "a frame that declares 600 bytes and holds 599", zstd_frame(600, repeated(0, 599)))
frame("bomb", "a frame that declares 600 bytes and holds 16 MiB", zstd_frame(600, repeated(0, 16 << 20), 17))
frame("bomb-declared", "a frame that declares 1 TiB", zstd_frame(1 << 40, repeated(0, 1 << 20), 17))
frame(
    "bomb-undeclared", "a frame without a content size that holds 16 MiB", zstd_frame(None, repeated(0, 16 << 20), 17)
)
frame("no-content-size", "a frame without a content size", zstd_frame(None, repeated(0, 600), 17))
frame("two-frames", "two frames of 300 bytes each", zstd_frame(300, repeated(0, 300)) * 2)
frame("second-frame", "a frame of 600 bytes and an empty one", GOOD + zstd_frame(0, [(0, b"")]))
frame("skippable-frame", "a skippable frame", b"\x50\x2a\x4d\x18" + struct.pack("<I", 8) + bytes(8))
frame("skippable-after", "a frame and a skippable one", GOOD + b"\x50\x2a\x4d\x18" + struct.pack("<I", 0))
frame("skippable-before", "a skippable frame and a frame", b"\x50\x2a\x4d\x18" + struct.pack("<I", 0) + GOOD)
frame("trailing-byte", "a frame and a byte", GOOD + b"\0")
frame("cut", "a frame without its last byte", GOOD[:-1])
frame("magic", "a frame with another magic number", b"\x27" + GOOD[1:])
frame(
    "block-type",
    "a frame with a block of the reserved type",
    GOOD[:-4] + (600 << 3 | 3 << 1 | 1).to_bytes(3, "little") + b"\0",
)
frame("dictionary", "a frame that names a dictionary", GOOD[:4] + bytes([GOOD[4] | 1]) + b"\7" + GOOD[5:])
frame(
    "content-checksum", "a frame whose own checksum is wrong", GOOD[:4] + bytes([GOOD[4] | 4]) + GOOD[5:] + b"\1\2\3\4"
)
frame("nothing", "nothing stored", b"")
frame("one-byte", "one byte stored", b"\0")
frame("longer", "more bytes stored than the plane has", bytes(601))
frame("frame-longer-than-plane", "a frame that is longer than the plane", zstd_frame(600, [(0, b"\0")] * 600, 10))


def raw_chunks(cut: int) -> Draft:
    """Two chunks of two elements each, divided after other bytes."""
    draft = Draft()
    t = numbers("F32", [4], [0.5, -1, 2, 0])
    draft.stored("w", t, "none", "none", 2)
    draft.arrays["w"].chunks = [[t.data[:cut]], [t.data[cut:]]]
    return draft


add("chunk-raw-shorter", "chunk-size", "coder none, a first chunk shorter than its elements", partial(raw_chunks, 4))
add("chunk-raw-longer", "chunk-size", "coder none, a first chunk longer than its elements", partial(raw_chunks, 12))
spoil_chunk(
    "chunk-boundary",
    "chunk-size",
    "planes of a chunk divided at another byte",
    "ids",
    lambda chunks: chunks.__setitem__(1, [chunks[1][0] + b"\0", *chunks[1][1:7], b""]),
)
