"""Draws up archives for the conformance vectors: a small writer that shares no code with the package or any reader.

A `Draft` holds an original checkpoint and how it is to be stored; `Draft.seal` gives the bytes of every file. The
`edit_*` attributes let an invalid case spoil one thing while everything around it (checksums, digests, sizes) stays
right. Zstd frames are written by hand or taken from `vectors.frames.FRAMES`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from vectors.evaluate import Bounded, Recipe
from vectors.frames import FRAMES
from vectors.segments import Segment, longest, of_groups, segmented
from vectors.values import WIDTH, Json, Tensor, canonical, digest, sha256, tensor, values, words

# Encodings (spec/encodings/) ---------------------------------------------------------------------


def zstd_frame(declared: int | None, blocks: list[tuple[int, bytes]], window: int | None = None) -> bytes:
    """A zstd frame (RFC 8878) of blocks `(type, content)`: 0 raw, or 1 a byte and 3 bytes of how often it is repeated.

    `declared` is the content size to write, None for none; `window` its base-2 logarithm, None for a single segment.
    """
    kind = 0 if declared is None or (declared < 256 and window is None) else 1 if 256 <= declared < 65792 else 3
    frame = b"\x28\xb5\x2f\xfd" + bytes([kind << 6 | (window is None) << 5])
    if window is not None:
        frame += bytes([(window - 10) << 3])
    if declared is not None:
        frame += {0: struct.pack("<B", declared & 255), 1: struct.pack("<H", (declared - 256) & 65535)}.get(
            kind, struct.pack("<Q", declared)
        )
    for number, (block, content) in enumerate(blocks):
        size = int.from_bytes(content[1:], "little") if block == 1 else len(content)
        frame += (size << 3 | block << 1 | (number == len(blocks) - 1)).to_bytes(3, "little")
        frame += content[:1] if block == 1 else content
    return frame


def repeated(value: int, count: int) -> list[tuple[int, bytes]]:
    """``count`` bytes ``value`` as RLE blocks."""
    sizes = [1 << 17] * (count >> 17) + ([count & 0x1FFFF] if count & 0x1FFFF or not count else [])
    return [(1, bytes([value]) + size.to_bytes(3, "little")) for size in sizes]


def store(plane: bytes) -> bytes:
    """A plane as coder `zstd` stores it: a real frame if there is one, a frame of one repeated byte, or the plane."""
    frame = FRAMES.get(sha256(plane)[:16], b"")
    if not frame and len(set(plane)) == 1:
        frame = zstd_frame(len(plane), repeated(plane[0], len(plane)))
    return frame if frame and len(frame) < len(plane) else plane


def planes(data: bytes, dtype: str, filter_: str) -> list[bytes]:
    if filter_ == "none":
        return [data]
    w = WIDTH[dtype]
    elements = words(Tensor(dtype, [], data))
    if filter_ == "float-planes":
        top = 8 * (w - 2)  # the upper 16 bits begin here
        exponents = [u >> top + 7 & 0xFF for u in elements]
        rests = [(u >> top + 8 & 0x80) | (u >> top & 0x7F) for u in elements]
        return [bytes(exponents), bytes(rests), *byte_planes(elements, w)[2:]]
    return byte_planes(elements, w)


def byte_planes(elements: list[int], w: int) -> list[bytes]:
    return [bytes(u >> 8 * (w - 1 - j) & 255 for u in elements) for j in range(w)]


@dataclass
class Stored:
    """A stored array. `chunks` are the stored planes of each chunk: a case may replace them before sealing."""

    tensor: Tensor
    filter: str
    coder: str
    chunk: int
    shard: int
    chunks: list[list[bytes]]

    @property
    def data(self) -> bytes:
        return b"".join(b"".join(chunk) for chunk in self.chunks)


# Recipes -----------------------------------------------------------------------------------------


def ref(name: str, base: str | None = None) -> Json:
    return {"op": "ref", "tensor": name} | ({"base": base} if base else {})


# Archives ----------------------------------------------------------------------------------------


def plain(tensors: dict[str, Tensor], metadata: Json | None = None, pad: bool = True) -> tuple[bytes, bytes]:
    """Header (without its length) and data of a safetensors file."""
    header: Json = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, t in tensors.items():
        header[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + len(t.data)]}
        at += len(t.data)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8 if pad else 0), b"".join(t.data for t in tensors.values())


def safetensors(tensors: dict[str, Tensor], metadata: Json | None = None) -> bytes:
    header, data = plain(tensors, metadata)
    return struct.pack("<Q", len(header)) + header + data


def _leave(content: Any) -> None:
    """Spoil nothing."""


def _same_head(length: bytes, text: bytes, rest: bytes) -> tuple[bytes, bytes, bytes]:
    return length, text, rest


def _same_shard(header: Json, data: bytes) -> tuple[Json | bytes, bytes]:
    return header, data


CARRIER = b'{"__metadata__":{"deltafmt.json":"'  # how the header of an archive in one file begins
SIDECAR = "deltafmt.sidecar/"  # and its name: a sidecar in such a file


@dataclass
class Draft:
    """An archive, not yet written: the original, how it is stored, and what a case spoils."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # what a reader must rebuild
    bounded: dict[str, Bounded] = field(default_factory=dict)
    arrays: dict[str, Stored] = field(default_factory=dict)
    entries: dict[str, Json] = field(default_factory=dict)  # the manifest's tensors
    layout: dict[str, list[str]] | None = None  # original file -> tensors in order; None: all in one file
    headers: dict[str, bytes] = field(default_factory=dict)  # originals' headers that are not the usual ones
    index: str | None = None  # file name of the original's index
    sidecars: dict[str, bytes] = field(default_factory=dict)
    base: dict[str, bytes] = field(default_factory=dict)  # files of the base
    base_tensors: dict[str, Tensor] = field(default_factory=dict)
    base_hints: Json = field(default_factory=dict)
    other_bases: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # base id -> tensors, in one file each
    shards: int = 1
    single_file: bool = False
    version: str = "1.0"
    more: Json = field(default_factory=dict)  # further keys of the manifest
    edit_manifest: Callable[[Json], object] = _leave
    edit_text: Callable[[bytes], bytes] = bytes  # before $checksum is set
    edit_shard: Callable[[Json, bytes], tuple[Json | bytes, bytes]] = _same_shard  # header and data of the first shard
    edit_table: Callable[[list[int]], list[int]] = list  # of the first shard, without the checksum
    edit_head: Callable[[bytes, bytes, bytes], tuple[bytes, bytes, bytes]] = _same_head
    """Of a single file, after all checksums: the header's length, the manifest as a JSON string, what is behind it."""
    edit_files: Callable[[dict[str, bytes]], object] = _leave  # after all checksums

    def array(
        self, name: str, t: Tensor, filter_: str = "none", coder: str = "none", chunk: int = 0, shard: int = 0
    ) -> Json:
        """Store an array (chunk 0: in one chunk); returns the recipe node that reads it."""
        chunk = chunk or max(1, math.prod(t.shape))
        step = chunk * WIDTH[t.dtype]
        parts = [planes(t.data[at : at + step], t.dtype, filter_) for at in range(0, len(t.data), step)]
        chunks = [[store(plane) if coder == "zstd" else plane for plane in part] for part in parts]
        self.arrays[name] = Stored(t, filter_, coder, chunk, shard, chunks)
        return {"op": "stored", "array": name}

    def segments(self, name: str, t: Tensor, chunk: int, *chunks: Sequence[Segment] | Sequence[int]) -> Json:
        """Store an array of integers as segments, or groups of these sizes, given for each chunk; returns the node."""
        elements = words(t)
        coded = []
        for number, parts in enumerate(chunks):
            mine = elements[number * chunk : (number + 1) * chunk]
            segments = [part for part in parts if isinstance(part, Segment)]
            groups = [part for part in parts if isinstance(part, int)]
            stored = of_groups(mine, t.dtype, groups, store) if groups else segmented(mine, t.dtype, segments, store)
            assert len(stored) <= longest(mine, t.dtype)
            coded.append([stored])
        self.arrays[name] = Stored(t, "segments", "zstd", chunk, 0, coded)
        return {"op": "stored", "array": name}

    def exact(self, name: str, t: Tensor, recipe: Json) -> None:
        self.tensors[name] = t
        self.entries[name] = {"dtype": t.dtype, "shape": t.shape, "recipe": recipe, "digest": digest(t.data)}

    def stored(self, name: str, t: Tensor, *encoding: Any, **options: Any) -> None:
        """A tensor that is one stored array of the same name."""
        self.exact(name, t, self.array(name, t, *encoding, **options))

    def recipe(self, node: Json, dtype: str, shape: list[int]) -> Recipe:
        """A recipe over what the draft already holds."""
        return Recipe(node, dtype, shape, self.found)

    def found(self, node: Json) -> Tensor:
        """The tensor that a `stored` or `ref` node stands for."""
        if node["op"] == "stored":
            return self.arrays[node["array"]].tensor
        bases = {"base": self.base_tensors, **self.other_bases}
        return (bases[node["base"]] if "base" in node else self.tensors)[node["tensor"]]

    def computed(self, name: str, dtype: str, shape: list[int], node: Json) -> Tensor:
        """A tensor of the exact grade that is what its recipe comes to."""
        t = self.recipe(node, dtype, shape).exact()
        self.exact(name, t, node)
        return t

    def approximate(self, name: str, dtype: str, shape: list[int], node: Json, original: Tensor | None = None) -> None:
        """A bounded tensor, with its error against ``original`` (None: the rebuilt tensor itself)."""
        value = self.recipe(node, dtype, shape).bounded()
        self.lossy(name, value.reference, node, original)
        self.bounded[name] = value

    def lossy(self, name: str, t: Tensor, recipe: Json, original: Tensor | None = None) -> None:
        """A tensor that a recipe of the exact grade rebuilds, but not to the bits of the original."""
        error = 0.0
        if original is not None:
            norm = math.sqrt(math.fsum(x * x for x in values(original)))
            error = math.dist(values(t), values(original)) / norm
        self.tensors[name] = t
        self.entries[name] = {"dtype": t.dtype, "shape": t.shape, "recipe": recipe, "rel_error": error}

    def with_base(self, tensors: dict[str, Tensor], files: dict[str, bytes] | None = None, **hints: str) -> None:
        self.base_tensors, self.base_hints = tensors, dict(hints)
        self.base = {"model.safetensors": safetensors(tensors)} if files is None else files

    def originals(self) -> dict[str, tuple[bytes, bytes]]:
        """Header and data of each original weight file."""
        layout = {"model.safetensors": list(self.tensors)} if self.layout is None else self.layout
        parts = {file: {name: self.tensors[name] for name in names} for file, names in layout.items()}
        usual = {file: plain(tensors, {"format": "pt"}) for file, tensors in parts.items()}
        return {file: (self.headers.get(file, header), data) for file, (header, data) in usual.items()}

    def index_text(self) -> bytes:
        placed = {name: file for file, names in (self.layout or {}).items() for name in names}
        total = sum(len(t.data) for t in self.tensors.values())
        return json.dumps({"metadata": {"total_size": total}, "weight_map": placed}, indent=2).encode() + b"\n"

    def original_files(self) -> dict[str, bytes]:
        """Every file of the original checkpoint: what unpacking must give back."""
        files = {file: struct.pack("<Q", len(h)) + h + data for file, (h, data) in self.originals().items()}
        return files | self.sidecars | ({self.index: self.index_text()} if self.index else {})

    def seal(self) -> dict[str, bytes]:
        """The files of the archive."""
        headers = {file: header for file, (header, _) in self.originals().items()}
        for file, header in headers.items():
            if f"header of {file}" not in self.arrays:
                self.array(f"header of {file}", Tensor("U8", [len(header)], header), "none", "zstd")
        checkpoint: Json = {"files": [{"name": file, "header": f"header of {file}"} for file in headers]}
        if self.index:
            text = self.index_text()
            self.array("index", Tensor("U8", [len(text)], text))
            checkpoint["index"] = {"name": self.index, "array": "index"}
        files = dict(self.sidecars)
        shards, arrays = [], {}
        for number in range(self.shards):
            mine = {name: array for name, array in self.arrays.items() if array.shard == number}
            table: list[int] = []
            for name, array in mine.items():
                arrays[name] = {
                    "dtype": array.tensor.dtype,
                    "shape": array.tensor.shape,
                    "shard": number,
                    "encoding": {"filter": array.filter, "coder": array.coder, "chunk": array.chunk},
                    "table": len(table) if array.chunks else 0,
                    "digest": digest(array.tensor.data),
                }
                end = 0
                for chunk in array.chunks:
                    table.append(xxhash.xxh64_intdigest(b"".join(chunk)))
                    for plane in chunk:
                        end += len(plane)
                        table.append(end)
            table = table if number else self.edit_table(table)
            packed = struct.pack(f"<{len(table)}Q", *table)
            packed += struct.pack("<Q", xxhash.xxh64_intdigest(packed))
            physical = {"deltafmt.chunks": Tensor("U64", [len(packed) // 8], packed)}
            for name, array in mine.items():
                as_is = array.coder == "none"
                physical[name] = array.tensor if as_is else Tensor("U8", [len(array.data)], array.data)
                if as_is:
                    physical[name] = physical[name]._replace(data=array.data)
            if self.single_file:
                physical |= {SIDECAR + name: Tensor("U8", [len(x)], x) for name, x in self.sidecars.items()}
            raw, data = plain(physical)
            if not number:
                edited, data = self.edit_shard(json.loads(raw), data)
                raw = edited if isinstance(edited, bytes) else json.dumps(edited, ensure_ascii=False).encode()
            if self.single_file:
                break
            name = f"deltafmt-{number + 1:05d}-of-{self.shards:05d}.safetensors"
            start = struct.pack("<Q", len(raw)) + raw
            files[name] = start + data
            shards.append({"name": name, "size": len(files[name]), "header": digest(start)})
        if self.single_file:
            return self.seal_single(arrays, checkpoint, raw, data)
        files["deltafmt.json"] = self.manifest_text(shards, arrays, checkpoint)
        self.edit_files(files)
        return files

    def seal_single(self, arrays: Json, checkpoint: Json, header: bytes, data: bytes) -> dict[str, bytes]:
        """The archive in one file (layout.md): the shard, with the manifest before all else in its header."""

        def string(size: int, head: bytes) -> bytes:
            shard = {"name": "deltafmt-00001-of-00001.safetensors", "size": size, "header": digest(head)}
            text = self.manifest_text([shard], arrays, checkpoint)
            return json.dumps(text.decode("utf-8", "surrogatepass"), ensure_ascii=False).encode()[1:-1]

        metadata = CARRIER.split(b'"deltafmt.json"')[0]
        rest = b'",' + header.removeprefix(metadata) if header.startswith(metadata) else b'"},' + header[1:]
        length = -(-(len(CARRIER) + len(string(1 << 40, b"")) + len(rest)) // 8) * 8
        size = 8 + length + len(data)
        rest = rest.ljust(length - len(CARRIER) - len(string(size, b"")))
        start = struct.pack("<Q", length)
        parts = self.edit_head(start, string(size, start + CARRIER + rest), rest)
        files = {"archive.safetensors": parts[0] + CARRIER + parts[1] + parts[2] + data}
        self.edit_files(files)
        return files

    def manifest_text(self, shards: list[Json], arrays: Json, checkpoint: Json) -> bytes:
        """The manifest, with its checksum."""
        manifest: Json = {
            "$checksum": "sha256:" + "0" * 64,
            "format": "deltafmt",
            "version": self.version,
            "requires": [],
            "shards": shards,
            "arrays": arrays,
            "bases": self.base_entries(),
            "tensors": self.entries,
            "checkpoint": checkpoint,
            "sidecars": {name: {"size": len(x), "digest": digest(x)} for name, x in self.sidecars.items()},
            **self.more,
        }
        manifest = json.loads(json.dumps(manifest))  # edits must not reach the draft
        self.edit_manifest(manifest)
        text = self.edit_text(canonical(manifest).encode("utf-8", "surrogatepass"))
        return text.replace(b"0" * 64, sha256(text).encode(), 1)

    def base_entries(self) -> Json:
        def entry(base: dict[str, Tensor]) -> Json:
            listed = {name: [t.dtype, t.shape, digest(t.data)] for name, t in base.items()}
            tensors = {name: {"dtype": d, "shape": s, "digest": h} for name, (d, s, h) in listed.items()}
            return {"digest": digest(canonical(listed).encode()), "tensors": tensors}

        entries = {key: entry(base) for key, base in self.other_bases.items()}
        return entries | ({"base": entry(self.base_tensors) | self.base_hints} if self.base_tensors else {})


def chain(draft: Draft, depth: int) -> None:
    """Add tensors of which each refers to the one before; the last one's recipe is so deep."""
    t = tensor("chain", "U8", 1)
    draft.stored("t0001", t)
    for number in range(2, depth + 1):
        draft.exact(f"t{number:04}", t, ref(f"t{number - 1:04}"))
