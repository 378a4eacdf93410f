"""The manifest (spec/manifest.md), its names (spec/layout.md) and limits (spec/limits.md): steps 2 to 4."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NoReturn

Node = dict[str, Any]

# README.md: every dtype and its width in bytes.
WIDTH = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
}
INTEGERS = ("U8", "U16", "U32", "U64", "I8", "I16", "I32", "I64")
SIGNED_SMALL_FLOATS = ("F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ")
WIDTH |= {"BOOL": 1, "C64": 8, "F8_E8M0": 1} | dict.fromkeys(SIGNED_SMALL_FLOATS, 1)
FLOATS = {"F64": (11, 52), "F32": (8, 23), "F16": (5, 10), "BF16": (8, 7)}  # bits of exponent and mantissa

# limits.md
MANIFEST_BYTES, HEADER_BYTES, TENSORS, FILES, DIMENSIONS = 256 << 20, 100_000_000, 1_000_000, 100_000, 16
TENSOR_BYTES, TOTAL_BYTES, RANK, CHUNK_BYTES = 128 << 30, 16 << 40, 65_536, 64 << 20
DEPTH, NODES, LARGEST = 32, 4096, 2**63 - 1

PREFIX = re.compile(rb'\{"\$checksum":"sha256:([0-9a-f]{64})",')
RESERVED = {"CON", "PRN", "AUX", "NUL"} | {f"{port}{digit}" for port in ("COM", "LPT") for digit in range(10)}


class Rejected(Exception):  # noqa: N818
    """The archive is refused; ``reason`` is a code of spec/reasons.md."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason


def need(condition: object, reason: str, message: str) -> None:
    if not condition:
        raise Rejected(reason, message)


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def strict_json(raw: bytes, reason: str, what: str) -> dict[str, Any]:
    """Parse one JSON object; anything that is not strict JSON is ``reason``."""

    def refuse(message: str) -> NoReturn:
        raise Rejected(reason, f"{what}: {message}")

    def integer(text: str) -> int:
        return int(text) if len(text.lstrip("-")) <= 19 else refuse("an integer of more than 19 digits")

    def number(text: str) -> float:
        return float(text) if math.isfinite(float(text)) else refuse("a number out of range")

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return dict(pairs) if len(dict(pairs)) == len(pairs) else refuse("a duplicate key")

    def constant(text: str) -> NoReturn:
        refuse(text)

    depth, quoted, escaped = 0, False, False
    for byte in raw:  # Before parsing, so that no parser can run out of stack.
        if quoted:
            quoted, escaped = escaped or byte != 0x22, not escaped and byte == 0x5C
        elif byte == 0x22:
            quoted = True
        elif byte in b"[{":
            depth += 1
            if depth > 64:
                refuse("nested more than 64 deep")
        elif byte in b"]}":
            depth -= 1
    try:
        value = json.loads(
            raw.decode("utf-8"),
            parse_int=integer,
            parse_float=number,
            parse_constant=constant,
            object_pairs_hook=members,
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails on lone surrogates
    except ValueError as error:
        refuse(str(error))
    return value if isinstance(value, dict) else refuse("not an object")


CARRIER = b'{"__metadata__":{"deltafmt.json":"'
STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def carried(header: bytes) -> tuple[bytes, bytes]:
    """Of the header of a single-file archive: the manifest's text, and the header without it (layout.md)."""
    string = STRING.match(header, len(CARRIER))
    need(string, "json", "the manifest has no end")
    end = string.end() if string else 0
    raw = header[len(CARRIER) - 1 : end]
    try:
        text = json.loads(raw)
        canonical = json.dumps(text, ensure_ascii=False).encode()
    except ValueError as error:
        raise Rejected("json", f"the manifest is no JSON string: {error}") from error
    need(raw == canonical, "json", "the manifest is not printed as canonical JSON prints a string")
    return text.encode(), header[: len(CARRIER)] + header[end - 1 :]


def is_integer(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


KINDS: dict[str, Callable[[Any], object]] = {
    "text": lambda v: isinstance(v, str),
    "integer": is_integer,
    "positive": lambda v: is_integer(v) and v >= 1,
    "number": lambda v: type(v) in (int, float),
    "digest": lambda v: isinstance(v, str) and re.fullmatch("sha256:[0-9a-f]{64}", v),
    "list": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}


def record(value: object, where: str, fields: str) -> None:
    """Require an object with exactly these fields, written ``key:kind``, with ``?`` before the optional ones."""
    kinds = dict(field.lstrip("?").split(":") for field in fields.split())
    assert all(kind in KINDS for kind in kinds.values())
    if not isinstance(value, dict):
        raise Rejected("schema", f"{where} is no object")
    for key in value.keys() - kinds.keys():
        raise Rejected("schema", f"{where} has an unknown key {key!r}")
    for field in fields.split():
        key, kind = field.lstrip("?").split(":")
        need(key in value or field[0] == "?", "schema", f"{where} lacks {key!r}")
        need(key not in value or KINDS[kind](value[key]), "schema", f"{where}: {key!r} is no {kind}")


OPERATORS = {  # operators/README.md
    "stored": "op:text array:text",
    "ref": "op:text tensor:text ?base:text",
    "sum": "op:text terms:list",
    "lowrank": "op:text a:object b:object ?scale:number",
    "scaled": "op:text x:object scale:object",
    "rows": "op:text x:object",
    "panels": "op:text x:object rows:positive columns:positive",
    "decayed": "op:text x:object table:object",
    "patch": "op:text prediction:object residual:object ?groups:object",
}
OPERANDS = {  # the keys of an operator that hold nodes; `sum` has a list of them
    "lowrank": ("a", "b"),
    "scaled": ("x", "scale"),
    "rows": ("x",),
    "panels": ("x",),
    "decayed": ("x", "table"),
    "patch": ("prediction", "residual"),
}


def children(node: Node) -> list[Node]:
    return node["terms"] if node["op"] == "sum" else [node[key] for key in OPERANDS.get(node["op"], ())]


def nodes(node: Node, depth: int = 1) -> Iterator[tuple[Node, int]]:
    """Every node of a recipe with its depth. JSON is at most 64 deep, so this recursion is too."""
    yield node, depth
    for child in children(node) if node["op"] in OPERATORS else ():
        yield from nodes(child, depth + 1)


def parse_manifest(raw: bytes) -> dict[str, Any]:
    """Steps 2 and 3: checksum, strict JSON, version, features, then types and keys."""
    prefix = PREFIX.match(raw)
    if prefix is None:
        strict_json(raw, "json", "manifest")
        raise Rejected("schema", "the manifest does not begin with its $checksum")
    blank = raw[: prefix.start(1)] + b"0" * 64 + raw[prefix.end(1) :]
    need(hashlib.sha256(blank).hexdigest().encode() == prefix[1], "manifest-checksum", "the manifest was changed")
    manifest = strict_json(raw, "json", "manifest")
    version, requires = manifest.get("version"), manifest.get("requires")
    match = re.fullmatch(r"(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)", version) if isinstance(version, str) else None
    need(match, "schema", f"version is {version!r}")
    need(match and match[1] == "1", "version", f"version {version} found, 1.x is read")
    need(
        isinstance(requires, list) and all(isinstance(f, str) for f in requires),
        "schema",
        "requires is no list of strings",
    )
    need(not requires, "feature", f"unknown features {requires}")
    check_types(manifest)
    return manifest


def check_types(m: dict[str, Any]) -> None:
    def check_node(node: Any, where: str) -> None:
        need(isinstance(node, dict) and isinstance(node.get("op"), str), "schema", f"{where}: a recipe node without op")
        if node["op"] in OPERATORS:
            record(node, where, OPERATORS[node["op"]])
            if "groups" in node:
                check_groups(node["groups"], where)
            for child in children(node):
                check_node(child, where)

    def check_groups(groups: Any, where: str) -> None:
        record(groups, f"{where}: groups", "by:text bounds:list")
        need(groups["by"] in ("exponent", "margin"), "schema", f"{where}: groups by {groups['by']!r}")
        bounds = groups["bounds"]
        fine = 1 <= len(bounds) <= 255 and all(is_integer(bound) and 1 <= bound <= 2047 for bound in bounds)
        need(fine, "schema", f"{where}: bounds are not 1 to 255 integers from 1 to 2,047")
        need(bounds == sorted(set(bounds)), "schema", f"{where}: bounds do not ascend strictly")

    top = "$checksum:digest format:text version:text requires:list shards:list arrays:object bases:object"
    record(m, "manifest", top + " tensors:object checkpoint:object sidecars:object ?annotations:object")
    need(m["format"] == "deltafmt", "schema", f"format is {m['format']!r}")
    for shard in m["shards"]:
        record(shard, "shard", "name:text size:integer header:digest")
    for name, array in m["arrays"].items():
        record(
            array, f"array {name!r}", "dtype:text shape:list shard:integer encoding:object table:integer digest:digest"
        )
        record(array["encoding"], f"encoding of {name!r}", "filter:text coder:text chunk:integer")
        need(array["encoding"]["chunk"] >= 1, "schema", f"array {name!r}: chunk is 0")
        need(array["shard"] < len(m["shards"]), "schema", f"array {name!r}: no shard {array['shard']}")
    for key, base in m["bases"].items():
        record(base, f"base {key!r}", "digest:digest tensors:object ?repo:text ?revision:text")
        for name, tensor in base["tensors"].items():
            record(tensor, f"base tensor {name!r}", "dtype:text shape:list digest:digest")
        summary = {name: [t["dtype"], t["shape"], t["digest"]] for name, t in base["tensors"].items()}
        canonical = json.dumps(summary, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        need(
            digest_of(canonical.encode()) == base["digest"],
            "schema",
            f"base {key!r}: the digest is not that of its list",
        )
    for name, tensor in m["tensors"].items():
        record(tensor, f"tensor {name!r}", "dtype:text shape:list recipe:object ?digest:digest ?rel_error:number")
        need(
            ("digest" in tensor) != ("rel_error" in tensor), "schema", f"tensor {name!r}: digest or rel_error, not both"
        )
        need(tensor.get("rel_error", 0) >= 0, "schema", f"tensor {name!r}: rel_error below 0")
        check_node(tensor["recipe"], f"recipe of {name!r}")
    record(m["checkpoint"], "checkpoint", "files:list ?index:object")
    for file in m["checkpoint"]["files"]:
        record(file, "checkpoint file", "name:text header:text")
    if "index" in m["checkpoint"]:
        record(m["checkpoint"]["index"], "checkpoint index", "name:text array:text")
    for name, sidecar in m["sidecars"].items():
        record(sidecar, f"sidecar {name!r}", "size:integer digest:digest")


def check_name(name: str) -> None:
    """What file, tensor and array names have in common (layout.md)."""
    need(0 < len(name.encode()) <= 1024, "name", f"{name[:40]!r}... is empty or too long")
    need(not re.search("[\x00-\x1f\x7f]", name), "name", f"{name!r} holds a control character")


def check_file_names(m: dict[str, Any]) -> None:
    shards = [shard["name"] for shard in m["shards"]]
    original = [file["name"] for file in m["checkpoint"]["files"]]
    original += [m["checkpoint"]["index"]["name"]] if "index" in m["checkpoint"] else []
    for name in shards:
        need("/" not in name and name.endswith(".safetensors"), "name", f"{name!r} cannot be a shard")
    for name in [*m["sidecars"], *original]:
        own = name == "deltafmt.json" or ("/" not in name and fnmatchcase(name, "deltafmt-*.safetensors"))
        need(not own, "name", f"{name!r} is a name of the format itself")
    for name in ("model.safetensors", "model.safetensors.index.json"):
        need(name not in m["sidecars"], "name", f"a sidecar {name!r}, which other tools would load")
    names = [*shards, *m["sidecars"], *original]
    for name in names:
        check_name(name)
        need(not set(name) & set("\\:"), "name", f"{name!r} holds a backslash or a colon")
        for part in name.split("/"):
            need(part not in ("", ".", "..") and part[-1] not in " .", "name", f"{name!r} has the component {part!r}")
            need(len(part.encode()) <= 255, "name", f"{name!r} has a component of more than 255 bytes")
            need(part.split(".")[0].upper() not in RESERVED, "name", f"{name!r} holds a reserved device name")
    need(len(set(names)) == len(names), "name", "two files of one name")
    directories = {name[: slash.start()] for name in names for slash in re.finditer("/", name)}
    for name in directories & set(names):
        raise Rejected("name", f"{name!r} is a file and a directory")


def check_tables(m: dict[str, Any]) -> None:
    """Step 4: names, closed tables, shapes, limits. No memory is allocated by what the manifest says."""

    def check_array(where: str, array: Mapping[str, Any]) -> int:
        """Bytes of a tensor, base tensor or stored array."""
        need(array["dtype"] in WIDTH, "dtype", f"{where}: dtype {array['dtype']!r}")
        need(all(map(is_integer, array["shape"])), "shape", f"{where}: shape {array['shape']}")
        need(len(array["shape"]) <= DIMENSIONS, "limit", f"{where}: {len(array['shape'])} dimensions")
        size: int = math.prod(array["shape"]) * WIDTH[array["dtype"]]
        need(size <= TENSOR_BYTES, "limit", f"{where}: {size} bytes")
        return size

    check_file_names(m)
    for part, most in (("tensors", TENSORS), ("arrays", TENSORS), ("shards", FILES), ("sidecars", FILES)):
        need(len(m[part]) <= most, "limit", f"{len(m[part])} {part}")
    for key, base in m["bases"].items():
        need(re.fullmatch("[a-z0-9_-]{1,64}", key), "name", f"base id {key!r}")
        need(len(base["tensors"]) <= TENSORS, "limit", f"base {key!r}: {len(base['tensors'])} tensors")
    for name in [*m["tensors"], *m["arrays"], *(name for base in m["bases"].values() for name in base["tensors"])]:
        check_name(name)
        need(name != "__metadata__", "name", f"a tensor or array named {name!r}")
    need("deltafmt.chunks" not in m["arrays"], "name", "an array named 'deltafmt.chunks'")
    for base in m["bases"].values():
        for name, tensor in base["tensors"].items():
            check_array(f"base tensor {name!r}", tensor)
    for name, array in m["arrays"].items():
        check_array(f"array {name!r}", array)
        encoding = array["encoding"]
        where, filter_, coder = f"array {name!r}: filter or coder", encoding["filter"], encoding["coder"]
        known = filter_ in ("none", "planes", "float-planes", "segments") and coder in ("none", "zstd")
        need(known, "encoding", f"{where} unknown")
        need(coder == "zstd" or filter_ == "none", "schema", f"{where}: a filter without a coder")
        allowed = {"float-planes": tuple(FLOATS), "segments": INTEGERS}.get(filter_, tuple(WIDTH))
        need(array["dtype"] in allowed, "schema", f"{where}: {filter_} on {array['dtype']}")
        need(encoding["chunk"] * WIDTH[array["dtype"]] <= CHUNK_BYTES, "limit", f"{where}: chunk too large")
    total = 0
    for name, tensor in m["tensors"].items():
        total += check_array(f"tensor {name!r}", tensor)
        for node, _ in nodes(tensor["recipe"]):
            need(node["op"] in OPERATORS, "operator", f"tensor {name!r}: operator {node['op']!r}")
    need(total <= TOTAL_BYTES, "limit", f"tensors of {total} bytes")
