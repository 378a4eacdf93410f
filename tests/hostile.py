"""What a hostile user does: checkpoints of any content, and archives edited by hand, every checksum made right again.

Written against spec/ and not against the package, of which nothing is imported.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

Json = dict[str, Any]

MANIFEST = "deltafmt.json"
TABLE = "deltafmt.chunks"
ZEROS = "sha256:" + 64 * "0"
WIDTHS = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E5M2FNUZ": 1, "F8_E4M3FNUZ": 1, "F8_E8M0": 1,
}  # fmt: skip


class Tensor(NamedTuple):
    """A tensor as bytes: safetensors dtype, shape, little-endian elements."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def f32(*shape: int, seed: int = 0) -> Tensor:
    """Random weights."""
    values = np.random.default_rng(seed).standard_normal(shape).astype("<f4")
    return Tensor("F32", shape, values.tobytes())


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    header: Json = {"__metadata__": dict(metadata)} if metadata is not None else {}
    position = 0
    for name, tensor in tensors.items():
        end = position + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    return join_shard(header, b"".join(tensor.data for tensor in tensors.values()))


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], sidecars: Mapping[str, bytes] | None = None, *, shards: int = 1
) -> Path:
    """A Hugging Face checkpoint; in several files with an index if `shards` is more than 1. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ({"config.json": b"{}\n"} if sidecars is None else sidecars).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return folder
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for place, (name, tensor) in enumerate(tensors.items()):
        parts[place % shards][name] = tensor
    names = [f"model-{place + 1:05d}-of-{shards:05d}.safetensors" for place in range(shards)]
    for name, part in zip(names, parts, strict=True):
        (folder / name).write_bytes(safetensors_bytes(part, {"format": "pt"}))
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder (links followed): relative name -> content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names_in(folder: Path) -> list[str]:
    """Everything in a folder, hidden entries too."""
    return sorted(path.name for path in folder.iterdir())


# --- The manifest ---------------------------------------------------------------------------------------------------


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def seal(text: bytes) -> bytes:
    """Put the right digits into `$checksum` of a manifest that has zeros there."""
    digits = hashlib.sha256(text).hexdigest().encode()
    return text.replace(b"0" * 64, digits, 1)


def manifest(archive: Path) -> Json:
    document: Json = json.loads((archive / MANIFEST).read_bytes())
    return document


def write_manifest(archive: Path, document: Json) -> None:
    (archive / MANIFEST).write_bytes(seal(canonical(document | {"$checksum": ZEROS})))


def edit(archive: Path, change: Callable[[Json], object]) -> Path:
    """Change the manifest in place and make its checksum right again. Returns the archive."""
    document = manifest(archive)
    change(document)
    write_manifest(archive, document)
    return archive


def put(document: Json, path: str, value: object) -> Json:
    """Set `a/b/0/c` in a document; return it."""
    *way, last = path.split("/")
    node: Any = document
    for key in way:
        node = node[int(key) if isinstance(node, list) else key]
    node[int(last) if isinstance(node, list) else last] = value
    return document


# --- Shards ---------------------------------------------------------------------------------------------------------


def join_shard(header: Json | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else canonical(header)
    return struct.pack("<Q", len(text)) + text + data


def split_shard(shard: bytes) -> tuple[Json, bytes]:
    (length,) = struct.unpack("<Q", shard[:8])
    header: Json = json.loads(shard[8 : 8 + length])
    return header, shard[8 + length :]


def write_shard(archive: Path, header: Json | bytes, data: bytes) -> Path:
    """Replace the (first) shard; the manifest's size and header digest follow."""
    shard = join_shard(header, data)

    def follow(document: Json) -> None:
        entry = document["shards"][0]
        (archive / entry["name"]).write_bytes(shard)
        entry["size"] = len(shard)
        entry["header"] = digest(shard[: len(shard) - len(data)])

    return edit(archive, follow)


def read_shard(archive: Path) -> tuple[Json, bytes]:
    return split_shard((archive / manifest(archive)["shards"][0]["name"]).read_bytes())


def read_table(header: Json, data: bytes) -> list[int]:
    begin, end = header[TABLE]["data_offsets"]
    return list(struct.unpack(f"<{(end - begin) // 8}Q", data[begin:end]))


def table_bytes(words: list[int]) -> bytes:
    """The chunk table, its last word made right."""
    body = struct.pack(f"<{len(words) - 1}Q", *words[:-1])
    return body + struct.pack("<Q", xxhash.xxh64_intdigest(body))


def put_table(archive: Path, words: list[int]) -> Path:
    header, data = read_shard(archive)
    begin, end = header[TABLE]["data_offsets"]
    return write_shard(archive, header, data[:begin] + table_bytes(words) + data[end:])


def put_chunk(archive: Path, array: str, planes: list[bytes]) -> Path:
    """Replace the stored bytes of an array of one chunk; offsets, table, sizes and digests follow."""
    header, data = read_shard(archive)
    stored = b"".join(planes)
    parts = {
        name: data[slice(*entry["data_offsets"])]
        for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"]))
    }
    words = read_table(header, data)
    at = manifest(archive)["arrays"][array]["table"]
    words[at] = xxhash.xxh64_intdigest(stored)
    for place, plane in enumerate(planes):
        words[at + 1 + place] = (words[at + place] if place else 0) + len(plane)
    parts[array], parts[TABLE] = stored, table_bytes(words)
    if header[array]["dtype"] == "U8":
        header[array]["shape"] = [len(stored)]
    position = 0
    for name, part in parts.items():
        header[name]["data_offsets"] = [position, position + len(part)]
        position += len(part)
    return write_shard(archive, header, b"".join(parts.values()))


# --- Recipes --------------------------------------------------------------------------------------------------------


def stored(array: str) -> Json:
    return {"op": "stored", "array": array}


def ref(tensor: str) -> Json:
    return {"op": "ref", "tensor": tensor}


def sum_of(*terms: Json) -> Json:
    return {"op": "sum", "terms": list(terms)}


def lowrank(a: str, b: str, **scale: float) -> Json:
    return {"op": "lowrank", "a": stored(a), "b": stored(b), **scale}


def patch(prediction: Json, residual: Json) -> Json:
    return {"op": "patch", "prediction": prediction, "residual": residual}


def derived(document: Json, name: str, recipe: Json, dtype: str = "F32", shape: tuple[int, ...] = (6, 4)) -> None:
    """A tensor that stores nothing itself; an approximation of something."""
    document["tensors"][name] = {"dtype": dtype, "shape": list(shape), "recipe": recipe, "rel_error": 0}
