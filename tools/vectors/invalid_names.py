"""Invalid names, shapes, and limits: step 4 of spec/reasons.md."""

from __future__ import annotations

import json
from collections.abc import Callable

from vectors.draft import Draft, ref
from vectors.spoil import add, based, manifest, plain_archive, put, rename, two_shards
from vectors.values import Tensor, digest

# Names ---------------------------------------------------------------------------------------------


def otherwise_named() -> Draft:
    """An original weight file that is not called model.safetensors, so that nothing clashes with that name."""
    draft = plain_archive()
    draft.layout = {"weights.safetensors": list(draft.tensors)}
    return draft


EMPTY = {"size": 0, "digest": digest(b"")}
NAMES = {
    "parent": "../config.json",
    "parent-inside": "a/../../b",
    "dot": "./a",
    "absolute": "/etc/passwd",
    "drive": "C:/x",
    "drive-relative": "C:x",
    "stream": "a.txt:stream",
    "unc": "//server/share",
    "unc-backslash": "\\\\server\\share",
    "backslash": "..\\x",
    "nul": "a\0.txt",
    "newline": "a\nb",
    "delete": "a\x7f",
    "empty": "",
    "double-slash": "a//b",
    "trailing-slash": "a/",
    "trailing-dot": "a.",
    "trailing-space": "dir /x",
    "reserved": "NUL",
    "reserved-extension": "aux.txt",
    "reserved-directory": "a/Com1/b",
    "too-long": "/".join(["a" * 204] * 5) + "bcdef",
    "component-too-long": "é" * 128,
    "manifest": "deltafmt.json",
    "shard-like": "deltafmt-extra.safetensors",
}
for name, file in NAMES.items():
    manifest(f"name-{name}", "name", f"a sidecar named {file[:40]!a}", put(EMPTY, "sidecars", file))
manifest(
    "name-clash-directory", "name", "a sidecar that is a directory of another", put(EMPTY, "sidecars", "config.json/x")
)
manifest(
    "name-clash-original",
    "name",
    "a sidecar named like an original weight file",
    put(EMPTY, "sidecars", "weights.safetensors"),
    otherwise_named,
)


for name in ("model.safetensors", "model.safetensors.index.json"):
    manifest(
        f"name-sidecar-{name.replace('.', '-')}",
        "name",
        f"a sidecar named {name}, which other tools would load",
        put(EMPTY, "sidecars", name),
        otherwise_named,
    )
for name in ("deltafmt.json", "deltafmt-extra.safetensors"):
    manifest(
        f"name-of-original-{name.replace('.', '-')}",
        "name",
        f"an original weight file named {name}",
        put(name, "checkpoint", "files", 0, "name"),
    )
manifest(
    "name-of-original",
    "name",
    "an original weight file outside",
    put("../model.safetensors", "checkpoint", "files", 0, "name"),
)
manifest(
    "name-of-index",
    "name",
    "an index outside",
    put({"name": "/index.json", "array": "header of model.safetensors"}, "checkpoint", "index"),
)
manifest(
    "name-of-originals-equal",
    "name",
    "two original files of one name",
    lambda m: m["checkpoint"]["files"].append(m["checkpoint"]["files"][0]),
)
manifest("name-of-shard-outside", "name", "a shard outside", put("../x.safetensors", "shards", 0, "name"))
manifest("name-of-shard-below", "name", "a shard in a directory", put("a/x.safetensors", "shards", 0, "name"))
manifest(
    "name-of-shard-extension", "name", "a shard that is not called .safetensors", put("model.bin", "shards", 0, "name")
)
manifest(
    "name-of-shards-equal",
    "name",
    "two shards of one name",
    lambda m: m["shards"][1].update(name=m["shards"][0]["name"]),
    two_shards,
)
for name, text in (
    ("empty", ""),
    ("nul", "a\0b"),
    ("escape", "\x1b[2J"),
    ("too-long", "é" * 513),
    ("metadata", "__metadata__"),
):
    manifest(f"name-of-tensor-{name}", "name", f"a tensor named {text[:20]!a}", rename("tensors", "bias", text))
manifest(
    "name-of-array-table", "name", "an array named like the chunk table", rename("arrays", "bias", "deltafmt.chunks")
)
manifest("name-of-array-newline", "name", "an array with a line feed in its name", rename("arrays", "bias", "a\nb"))
for name, text in (
    ("upper-case", "Base"),
    ("slash", "a/b"),
    ("empty", ""),
    ("too-long", "a" * 65),
    ("newline", "base\n"),
):
    manifest(f"name-of-base-{name}", "name", f"a base with the id {text[:20]!r}", rename("bases", "base", text), based)

# Shapes and limits ---------------------------------------------------------------------------------

for name, size in (("negative", -1), ("true", True), ("fraction", 1.0), ("2-63", 2**63), ("null", None), ("text", "4")):
    manifest(f"shape-{name}", "shape", f"the dimension {json.dumps(size)}", put([size], "tensors", "bias", "shape"))
manifest("shape-of-array", "shape", "an array with a negative dimension", put([-4], "arrays", "bias", "shape"))
manifest("shape-2-70", "json", "the dimension 2^70: an integer of 22 digits", put([2**70], "tensors", "bias", "shape"))
manifest(
    "limit-product",
    "limit",
    "the shape [2^33, 2^33], whose product is 4 modulo 2^64",
    put([2**33, 2**33], "tensors", "bias", "shape"),
)
manifest("limit-largest", "limit", "the shape [2^63 - 1]", put([2**63 - 1], "tensors", "bias", "shape"))
manifest("limit-tensor", "limit", "a tensor of 128 GiB and 1 byte", put([(128 << 30) + 1], "tensors", "zeros", "shape"))
manifest("limit-array", "limit", "an array of [2^33, 2^33]", put([2**33, 2**33], "arrays", "bias", "shape"))
manifest("limit-dimensions", "limit", "17 dimensions", put([4] + [1] * 16, "tensors", "bias", "shape"))
manifest(
    "limit-chunk", "limit", "a chunk of 64 MiB and 2 bytes", put((32 << 20) + 1, "arrays", "w", "encoding", "chunk")
)


def bomb(rank: int, rows: int, columns: int, copies: int = 0) -> Callable[[], Draft]:
    """A low-rank tensor of a few stored bytes, and references to it."""

    def make() -> Draft:
        draft = Draft()
        for name, size in (("a", columns), ("b", rows)):
            small = draft.array(name, Tensor("F32", [1], bytes(4)), "planes", "zstd")
            draft.arrays[name].tensor = Tensor("F32", [rank, size], b"")  # nobody gets as far as its bytes
        recipe = {"op": "lowrank", "a": small | {"array": "a"}, "b": small}
        draft.entries["w"] = {"dtype": "F32", "shape": [rows, columns], "recipe": recipe, "rel_error": 0}
        for number in range(copies):
            draft.entries[f"copy {number}"] = draft.entries["w"] | {"recipe": ref("w")}
        return draft

    return make


add("limit-lowrank-bomb", "limit", "rank 1, 10^6 x 10^6: 4 TB from a few bytes", bomb(1, 10**6, 10**6))
add("limit-total-bomb", "limit", "129 tensors of 128 GiB each, all but one references", bomb(1, 1 << 17, 1 << 18, 128))
add("limit-rank", "limit", "rank 65,537", bomb(65_537, 65_537, 65_537))
