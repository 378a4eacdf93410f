"""Invalid single-file archives (spec/layout.md): what carries the manifest, and what differs from a directory."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from vectors.draft import CARRIER, SIDECAR, Draft
from vectors.invalid_files import data_start
from vectors.spoil import add, append, both, drop, flip, plain_archive, put, rename, shift
from vectors.values import Json

FILE = "archive.safetensors"
Head = tuple[bytes, bytes, bytes]


def single() -> Draft:
    draft = plain_archive()
    draft.single_file = True
    return draft


def case(name: str, reason: str, description: str, **edits: Any) -> None:
    add(f"single-file-{name}", reason, f"a single file: {description}", single, **edits)


def file_edit(name: str, reason: str, description: str, change: Callable[[bytes], bytes]) -> None:
    case(name, reason, description, edit_files=lambda files: files.update({FILE: change(files[FILE])}))


def head_edit(name: str, reason: str, description: str, change: Callable[[bytes, bytes, bytes], Head]) -> None:
    case(name, reason, description, edit_head=change)


def header_edit(name: str, reason: str, description: str, edit: Callable[[Json, bytes], tuple[Json, bytes]]) -> None:
    case(name, reason, description, edit_shard=edit)


# Steps 1 and 2: the manifest in the header ---------------------------------------------------------

file_edit("empty", "not-an-archive", "of no bytes", lambda x: b"")
file_edit("cut-in-key", "not-an-archive", "cut in the key of the manifest", lambda x: x[: 8 + len(CARRIER) - 1])
file_edit("space-before", "not-an-archive", "a space before the key", lambda x: x.replace(b':{"d', b':{ "d', 1))
file_edit(
    "other-key",
    "not-an-archive",
    "the manifest under another key",
    lambda x: x.replace(b'"deltafmt.', b'"Deltafmt.', 1),
)
file_edit("cut-in-manifest", "json", "cut in the manifest", lambda x: x[:1000])
file_edit("cut-in-header", "json", "cut before the last byte of the header", lambda x: x[: data_start(x) - 1])
file_edit("flip-length-high", "json", "the top bit flipped in the length of the header", lambda x: flip(x, 7, 7))
head_edit("short-header", "json", "a header that ends in the manifest", lambda n, m, r: (struct.pack("<Q", 100), m, r))
head_edit("no-header", "json", "a header of no bytes", lambda n, m, r: (bytes(8), m, r))
head_edit(
    "other-escape",
    "json",
    "an escape that canonical JSON does not write",
    lambda n, m, r: (n, m.replace(b"zstd", b"\\u007astd", 1), r),
)
head_edit(
    "unknown-escape", "json", "an escape that JSON does not know", lambda n, m, r: (n, m.replace(b'\\"', b"\\q", 1), r)
)
head_edit("control-character", "json", "a tab in the string", lambda n, m, r: (n, m[:-1] + b"\t", r))
head_edit("not-utf-8", "json", "a byte that is not UTF-8", lambda n, m, r: (n, m.replace(b"zstd", b"zs\xffd", 1), r))
head_edit("flip-manifest", "manifest-checksum", "one bit flipped in the manifest", lambda n, m, r: (n, flip(m, -9), r))
case(
    "two-shards",
    "schema",
    "a manifest with two shards",
    edit_manifest=append({"name": "b.safetensors", "size": 8, "header": "sha256:" + "0" * 64}, "shards"),
)
case(
    "array-named-like-a-sidecar",
    "name",
    "a stored array named like a sidecar",
    edit_manifest=both(
        rename("arrays", "bias", SIDECAR + "bias"), put(SIDECAR + "bias", "tensors", "bias", "recipe", "array")
    ),
    edit_shard=lambda h, x: (h | {SIDECAR + "bias": h.pop("bias")}, x),
)

# Step 6: the file as the shard ---------------------------------------------------------------------

file_edit("cut-last-byte", "shard-size", "cut by one byte", lambda x: x[:-1])
file_edit("cut-after-header", "shard-size", "cut after the header", lambda x: x[: data_start(x)])
file_edit("longer", "shard-size", "one byte too long", lambda x: x + b"\0")
file_edit("flip-length", "shard-header", "one bit flipped in the length of the header", lambda x: flip(x, 0))
file_edit("flip-header", "shard-header", "one bit flipped behind the manifest", lambda x: flip(x, data_start(x) - 60))
head_edit(
    "header-not-utf-8",
    "shard-header",
    "a byte behind the manifest that is not UTF-8",
    lambda n, m, r: (n, m, r.replace(b"bias", b"b\xffas", 1)),
)
head_edit("header-respaced", "shard-header", "white space moved", lambda n, m, r: (n, m, r.replace(b", ", b" ,", 1)))


def without_sidecar(header: Json, data: bytes) -> tuple[Json, bytes]:
    begin, _ = header.pop(SIDECAR + "config.json")["data_offsets"]
    return header, data[:begin]


def longer_sidecar(header: Json, data: bytes) -> tuple[Json, bytes]:
    entry = header[SIDECAR + "config.json"]
    entry["shape"][0] += 1
    entry["data_offsets"][1] += 1
    return header, data + b"\n"


def other_dtype(header: Json, data: bytes) -> tuple[Json, bytes]:
    header[SIDECAR + "config.json"]["dtype"] = "I8"
    return header, data


def extra(name: str, header: Json, data: bytes) -> tuple[Json, bytes]:
    return header | {name: {"dtype": "U8", "shape": [1], "data_offsets": [len(data), len(data) + 1]}}, data + b"\0"


def hole(header: Json, data: bytes) -> tuple[Json, bytes]:
    name = SIDECAR + "config.json"
    at = header[name]["data_offsets"][0]
    shift(header, name, 4)
    return header, data[:at] + b"hole" + data[at:]


header_edit("sidecar-missing", "sidecar", "a sidecar is missing", without_sidecar)
header_edit("sidecar-longer", "sidecar", "a sidecar one byte too long", longer_sidecar)
header_edit("sidecar-dtype", "sidecar", "a sidecar of dtype I8", other_dtype)
header_edit("extra-array", "shard-layout", "an array nobody knows", lambda h, x: extra("extra", h, x))
header_edit(
    "extra-sidecar", "shard-layout", "a sidecar that the manifest lacks", lambda h, x: extra(SIDECAR + "b", h, x)
)
header_edit("hole", "shard-layout", "four bytes before a sidecar", hole)
case("no-table", "shard-layout", "no chunk table", edit_shard=lambda h, x: (h | {"table": h.pop("deltafmt.chunks")}, x))
case("manifest-lacks-sidecar", "shard-layout", "a sidecar less", edit_manifest=drop("sidecars", "config.json"))

# Steps 7 and 8 -------------------------------------------------------------------------------------

file_edit("flip-table", "table", "one bit flipped in the chunk table", lambda x: flip(x, data_start(x) + 8))
file_edit("flip-sidecar", "digest", "one bit flipped in a sidecar", lambda x: flip(x, -3))
file_edit(
    "flip-chunk",
    "chunk-checksum",
    "one bit flipped in the last array",
    lambda x: flip(x, -1 - len(b'{"hidden_size":4}\n')),
)
