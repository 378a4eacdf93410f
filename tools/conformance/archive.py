"""The files of an archive (spec/layout.md): shards, sidecars, bases, the original; steps 1 and 6 to 8."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conformance.manifest import (
    CARRIER,
    FLOATS,
    HEADER_BYTES,
    MANIFEST_BYTES,
    WIDTH,
    Node,
    carried,
    check_tables,
    children,
    digest_of,
    is_integer,
    need,
    parse_manifest,
    strict_json,
)
from conformance.numbers import (
    Floats,
    convert,
    exact_product,
    ordered_product,
    signed,
    unsigned,
    widen,
)
from conformance.patches import correct, decay, exponents, margins, ungroup, unzigzag
from conformance.planes import decode_plane, unfilter, unsegment, xxh64
from conformance.recipes import accumulation, check_recipes

Tensor = tuple[str, tuple[int, ...], bytes]


class Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_header(raw: bytes, size: int | None, invalid: str, untiled: str, what: str) -> dict[str, Entry]:
    """The entries of a safetensors header, which must tile ``size`` bytes of data (None: as many as they say)."""
    entries = {}
    for name, entry in strict_json(raw, invalid, what).items():
        if name == "__metadata__":
            fine = isinstance(entry, dict) and all(isinstance(text, str) for text in entry.values())
            need(fine, invalid, f"{what}: __metadata__ is no map of strings")
            continue
        fine = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
        need(fine, invalid, f"{what}: entry {name!r}")
        need(entry["dtype"] in list(WIDTH), invalid, f"{what}: dtype of {name!r}")  # a list: what is sought may be one
        numbers = (entry["shape"], entry["data_offsets"])
        fine = all(isinstance(n, list) and all(map(is_integer, n)) for n in numbers) and len(entry["data_offsets"]) == 2
        need(fine, invalid, f"{what}: shape or offsets of {name!r}")
        entries[name] = Entry(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
    for name, item in entries.items():
        length = math.prod(item.shape) * WIDTH[item.dtype]
        need(item.end - item.begin == length, invalid, f"{what}: {name!r} is not of {length} bytes")
    at = 0
    for name, item in sorted(entries.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
        need(item.begin == at, untiled, f"{what}: {name!r} begins at {item.begin} instead of {at}")
        at = item.end
    need(size is None or at == size, untiled, f"{what}: entries end at {at} of {size}")
    return entries


SIDECAR = "deltafmt.sidecar/"  # and its name: a sidecar in the single-file form


def is_archive(path: Path) -> bool:
    if not path.is_file():
        return (path / "deltafmt.json").is_file()
    with path.open("rb") as stream:
        return stream.read(8 + len(CARRIER))[8:] == CARRIER


class Archive:
    """An archive, checked up to step 6 when it is made; `tensor` and `verify` do the rest."""

    def __init__(self, path: Path, bases: Mapping[str, Path]) -> None:
        self.path, self.bases = path, bases
        self.opened: dict[str, Base] = {}
        self.rebuilt: dict[str, bytes] = {}
        need(is_archive(path), "not-an-archive", f"no deltafmt.json in {path}")
        self.single = path.is_file()
        self.manifest = parse_manifest(self.manifest_text())
        if self.single:
            need(len(self.manifest["shards"]) == 1, "schema", "a single file of several shards")
            for name in self.manifest["arrays"]:
                need(not name.startswith(SIDECAR), "name", f"an array named like a sidecar: {name!r}")
        check_tables(self.manifest)
        self.order = check_recipes(self.manifest)
        self.places = [self.open_shard(index) for index in range(len(self.manifest["shards"]))]
        for name, sidecar in self.manifest["sidecars"].items() if not self.single else ():
            whole = (path / name).is_file() and (path / name).stat().st_size == sidecar["size"]
            need(whole, "sidecar", f"{name!r} is missing or not of {sidecar['size']} bytes")

    def manifest_text(self) -> bytes:
        if self.single:
            raw = self.path.read_bytes()
            length = int.from_bytes(raw[:8], "little")
            need(length <= len(raw) - 8, "json", "the header is longer than the file")
            need(length <= HEADER_BYTES, "limit", f"a header of {length} bytes")
            text = carried(raw[8 : 8 + length])[0]
        else:
            need((self.path / "deltafmt.json").stat().st_size <= MANIFEST_BYTES, "limit", "deltafmt.json is too large")
            text = (self.path / "deltafmt.json").read_bytes()
        need(len(text) <= MANIFEST_BYTES, "limit", "the manifest is too large")
        return text

    def shard_path(self, index: int) -> Path:
        return self.path if self.single else self.path / self.manifest["shards"][index]["name"]

    def sidecar(self, name: str) -> bytes:
        return self.read(0, SIDECAR + name) if self.single else (self.path / name).read_bytes()

    def open_shard(self, index: int) -> dict[str, Entry]:
        """Where the arrays of a shard lie in the file."""
        shard = self.manifest["shards"][index]
        file, what = self.shard_path(index), f"shard {shard['name']!r}"
        need(file.is_file(), "shard-missing", f"{what} is not there")
        need(file.stat().st_size == shard["size"], "shard-size", f"{what} is not of {shard['size']} bytes")
        with file.open("rb") as stream:
            length = int.from_bytes(start := stream.read(8), "little")
            need(
                len(start) == 8 and length <= shard["size"] - 8, "shard-header", f"{what}: header longer than the file"
            )
            need(length <= HEADER_BYTES, "limit", f"{what}: header of {length} bytes")
            header = stream.read(length)
        if self.single:
            header = carried(header)[1]
        need(digest_of(start + header) == shard["header"], "shard-header", f"{what}: header was changed")
        entries = parse_header(header, shard["size"] - 8 - length, "shard-header", "shard-layout", what)
        table = entries.get("deltafmt.chunks", Entry("", (), 0, 0))
        need(
            table.dtype == "U64" and len(table.shape) == 1 and table.shape[0] >= 1,
            "shard-layout",
            f"{what}: chunk table",
        )
        arrays = {name: array for name, array in self.manifest["arrays"].items() if array["shard"] == index}
        sidecars = {SIDECAR + name: s["size"] for name, s in self.manifest["sidecars"].items() if self.single}
        for name, size in sidecars.items():
            found = entries.get(name, Entry("", (), 0, 0))
            need((found.dtype, found.shape) == ("U8", (size,)), "sidecar", f"{name!r} is not there or not of {size}")
        need(
            entries.keys() == arrays.keys() | sidecars.keys() | {"deltafmt.chunks"},
            "shard-layout",
            f"{what}: other arrays than in the manifest",
        )
        for name, array in arrays.items():
            entry = entries[name]
            plain = (array["dtype"], tuple(array["shape"])), ("U8", (entry.end - entry.begin,))
            expected = plain[array["encoding"]["coder"] != "none"]
            need((entry.dtype, entry.shape) == expected, "shard-layout", f"{what}: {name!r} is not {expected}")
        return {name: e._replace(begin=e.begin + 8 + length, end=e.end + 8 + length) for name, e in entries.items()}

    def read(self, index: int, name: str) -> bytes:
        entry = self.places[index][name]
        with self.shard_path(index).open("rb") as stream:
            stream.seek(entry.begin)
            return stream.read(entry.end - entry.begin)

    def decode_shard(self, index: int) -> dict[str, bytes]:
        """Step 7: the decoded bytes of all arrays of a shard."""
        raw, taken = self.read(index, "deltafmt.chunks"), 1
        words, what = struct.unpack(f"<{len(raw) // 8}Q", raw), f"chunk table of shard {index}"
        need(xxh64(raw[:-8]) == words[-1], "table", f"{what} was changed")
        arrays = {name: array for name, array in self.manifest["arrays"].items() if array["shard"] == index}
        rows: dict[str, list[tuple[int, ...]]] = {}
        spans = []
        for name, array in arrays.items():
            encoding, width, count = array["encoding"], WIDTH[array["dtype"]], math.prod(array["shape"])
            row = 2 if encoding["filter"] in ("none", "segments") else 1 + width
            chunks, first = -(-count // encoding["chunk"]), array["table"]
            need(first + chunks * row < len(words) and (chunks or first == 0), "table", f"{what}: rows of {name!r}")
            taken += chunks * row
            spans += [(first, first + chunks * row)] if chunks else []
            rows[name] = [words[at : at + row] for at in range(first, first + chunks * row, row)]
            ends = [0, *(end for chunk in rows[name] for end in chunk[1:])]
            entry = self.places[index][name]
            fine = ends == sorted(ends) and ends[-1] == entry.end - entry.begin
            need(fine, "table", f"{what}: ends of {name!r}")
        spans.sort()
        apart = all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
        need(apart and taken == len(words), "table", f"{what}: rows overlap or do not fill it")
        return {name: self.decode(index, name, array, rows[name]) for name, array in arrays.items()}

    def decode(self, index: int, name: str, array: Mapping[str, Any], rows: list[tuple[int, ...]]) -> bytes:
        stored, encoding, width = self.read(index, name), array["encoding"], WIDTH[array["dtype"]]
        data, begin, left = b"", 0, math.prod(array["shape"])
        for number, (checksum, *ends) in enumerate(rows):
            where, count = f"array {name!r}, chunk {number}", min(left, encoding["chunk"])
            need(xxh64(stored[begin : ends[-1]]) == checksum, "chunk-checksum", f"{where} was changed")
            if encoding["filter"] == "segments":
                data += unsegment(stored[begin : ends[-1]], count, array["dtype"], where)
            else:
                size = count * width // len(ends)
                cuts = zip([begin, *ends], ends, strict=False)
                planes = [decode_plane(stored[low:high], size, encoding["coder"], where) for low, high in cuts]
                data += unfilter(planes, encoding["filter"], width)
            begin, left = ends[-1], left - count
        need(digest_of(data) == array["digest"], "digest", f"array {name!r} does not match its digest")
        return data

    def base(self, key: str) -> Base:
        if key not in self.opened:
            need(key in self.bases, "base-missing", f"base {key!r} is needed")
            self.opened[key] = Base(key, self.manifest["bases"][key], self.bases)
        return self.opened[key]

    def verify(self) -> dict[str, Tensor]:
        """Steps 7 and 8 in full; the rebuilt tensors. Bounded ones are the ordered reference of arithmetic.md."""
        tensors = self.manifest["tensors"]
        self.arrays = {
            name: data for index in range(len(self.places)) for name, data in self.decode_shard(index).items()
        }
        for key in self.bases.keys() & self.manifest["bases"].keys():
            for name in self.manifest["bases"][key]["tensors"]:
                self.base(key).tensor(name)
        for name in self.order:
            tensor = tensors[name]
            value = self.value(name, tensor["recipe"], accumulation(self.manifest, name))
            data = value[1] if isinstance(value, tuple) else convert(tensor["dtype"], value, signed_nan=False)
            need(tensor.get("digest", digest_of(data)) == digest_of(data), "digest", f"tensor {name!r}: not its digest")
            self.rebuilt[name] = data
        for name, sidecar in self.manifest["sidecars"].items():
            need(
                digest_of(self.sidecar(name)) == sidecar["digest"],
                "digest",
                f"sidecar {name!r} was changed",
            )
        return {name: (t["dtype"], tuple(t["shape"]), self.rebuilt[name]) for name, t in tensors.items()}

    def value(self, owner: str, node: Node, accumulator: str) -> tuple[str, bytes] | Floats:
        """Dtype and bytes of a node, or a flat array of the accumulation type for a wide one."""
        if node["op"] == "stored":
            return self.manifest["arrays"][node["array"]]["dtype"], self.arrays[node["array"]]
        if node["op"] == "ref" and "base" in node:
            tensor = self.base(node["base"]).tensor(node["tensor"])
            return tensor[0], tensor[2]
        if node["op"] == "ref":
            return self.manifest["tensors"][node["tensor"]]["dtype"], self.rebuilt[node["tensor"]]
        parts = [self.value(owner, child, accumulator) for child in children(node)]
        dtype, shape = self.manifest["tensors"][owner]["dtype"], self.manifest["tensors"][owner]["shape"]
        if node["op"] == "patch":
            return dtype, self.corrected(dtype, node, parts)
        if node["op"] == "rows":
            assert isinstance(parts[0], tuple)
            size = math.prod(shape) * WIDTH[parts[0][0]]
            return parts[0][0], parts[0][1][:size].ljust(size, b"\0")
        if node["op"] == "panels":
            assert isinstance(parts[0], tuple)
            kind, elements = parts[0][0], np.frombuffer(parts[0][1], f"V{WIDTH[parts[0][0]]}")
            matrix = np.empty((shape[0], math.prod(shape[1:])), elements.dtype)
            at = 0
            for top in range(0, len(matrix), node["rows"]):
                for left in range(0, matrix.shape[1], node["columns"]):
                    panel = matrix[top : top + node["rows"], left : left + node["columns"]]
                    panel[...] = elements[at : at + panel.size].reshape(panel.shape)
                    at += panel.size
            return kind, matrix.tobytes()
        if node["op"] == "decayed":
            (kind, old), (_, table) = (part for part in parts if isinstance(part, tuple))
            return kind, decay(kind, unsigned(old, WIDTH[kind]), unsigned(table, WIDTH["U32"]))
        if node["op"] == "lowrank":
            (dtype_a, a), (dtype_b, b) = (part for part in parts if isinstance(part, tuple))
            if dtype_a not in FLOATS:
                integers = signed(a, WIDTH[dtype_a]), signed(b, WIDTH[dtype_b])
                return exact_product(*integers, shape[0], node.get("scale", 1), accumulator, f"tensor {owner!r}")
        wide = [widen(*part, accumulator) if isinstance(part, tuple) else part for part in parts]
        if node["op"] == "lowrank":
            return ordered_product(wide[0], wide[1], shape[0], node.get("scale", 1))
        with np.errstate(all="ignore"):
            if node["op"] == "scaled":
                x, scale = wide
                return (x.reshape(len(scale), -1) * scale[:, None]).reshape(-1) if len(x) else x
            total = wide[0]
            for term in wide[1:]:
                total = total + term
            return total

    def corrected(self, dtype: str, node: Node, parts: list[tuple[str, bytes] | Floats]) -> bytes:
        """The value of a `patch` (operators/patch.md) whose prediction and residual are ``parts``."""
        prediction, residual = parts
        assert isinstance(residual, tuple)
        if not isinstance(prediction, tuple):
            pattern = convert(dtype, prediction, signed_nan=False)
        elif prediction[0] == dtype:
            pattern = prediction[1]
        else:  # F64 holds every number of the other types
            pattern = convert(dtype, widen(*prediction, "F64"), signed_nan=True)
        p, d = unsigned(pattern, WIDTH[dtype]), unzigzag(unsigned(residual[1], WIDTH[dtype]))
        if "groups" in node:
            if node["groups"]["by"] == "exponent":
                key, up = exponents(dtype, p), np.zeros(len(p), bool)
            else:
                assert not isinstance(prediction, tuple)
                key, up = margins(dtype, prediction)
            chunk = self.manifest["arrays"][node["residual"]["array"]]["encoding"]["chunk"]
            d = ungroup(d, key, node["groups"]["bounds"], chunk)
            d = np.where(up, ~d + np.ones_like(d), d)  # -d
        return correct(dtype, p, d)

    def restore(self) -> dict[str, bytes]:
        """The files of the original checkpoint (layout.md), after `verify`."""
        checkpoint, left = self.manifest["checkpoint"], set(self.manifest["tensors"])
        files = {name: self.sidecar(name) for name in self.manifest["sidecars"]}
        if "index" in checkpoint:
            files[checkpoint["index"]["name"]] = self.arrays[checkpoint["index"]["array"]]
        for file in checkpoint["files"]:
            header, data = self.arrays[file["header"]], b""
            need(len(header) <= HEADER_BYTES, "limit", f"header of {file['name']!r}")
            entries = parse_header(header, None, "checkpoint", "checkpoint", f"header of {file['name']!r}")
            for name, entry in sorted(entries.items(), key=lambda pair: pair[1].end):
                need(name in left, "checkpoint", f"{file['name']!r} names {name!r}: no tensor, or in two files")
                left.remove(name)
                tensor = self.manifest["tensors"][name]
                fits = (tensor["dtype"], tuple(tensor["shape"])) == (entry.dtype, entry.shape)
                need(fits, "checkpoint", f"{file['name']!r}: dtype or shape of {name!r}")
                data += self.rebuilt[name]
            files[file["name"]] = struct.pack("<Q", len(header)) + header + data
        need(not left, "checkpoint", f"no file holds {sorted(left)[:3]}")
        return files


class Base:
    """A base model: a directory of safetensors files, or an archive (operators/ref.md)."""

    def __init__(self, key: str, listed: Mapping[str, Any], bases: Mapping[str, Path]) -> None:
        path, self.listed = bases[key], listed["tensors"]
        self.found: dict[str, Tensor] = {}
        if is_archive(path):
            archive = Archive(path, {other: place for other, place in bases.items() if other != key})
            exact = {name for name, tensor in archive.manifest["tensors"].items() if "digest" in tensor}
            self.found = {name: tensor for name, tensor in archive.verify().items() if name in exact}
        else:
            for file in sorted(path.glob("*.safetensors")):
                raw = file.read_bytes()
                start = 8 + int.from_bytes(raw[:8], "little")
                header = parse_header(raw[8:start], len(raw) - start, "base-mismatch", "base-mismatch", str(file))
                self.found |= {n: (e.dtype, e.shape, raw[start + e.begin : start + e.end]) for n, e in header.items()}
        kinds = {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in self.listed.items()}
        need({n: t[:2] for n, t in self.found.items()} == kinds, "base-mismatch", f"base {key!r}: other tensors")

    def tensor(self, name: str) -> Tensor:
        same = digest_of(self.found[name][2]) == self.listed[name]["digest"]
        need(same, "base-mismatch", f"base tensor {name!r} is another")
        return self.found[name]


def read_archive(path: Path, bases: Mapping[str, Path] | None = None) -> dict[str, Tensor]:
    """Name -> (dtype, shape, bytes) of every tensor, after every check of the specification. Raises `Rejected`."""
    archive = Archive(Path(path), bases or {})
    tensors = archive.verify()
    archive.restore()
    return tensors


def restore_files(path: Path, bases: Mapping[str, Path] | None = None) -> dict[str, bytes]:
    """File name -> content of every file of the original checkpoint. Raises `Rejected`."""
    archive = Archive(Path(path), bases or {})
    archive.verify()
    return archive.restore()
