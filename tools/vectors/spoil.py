"""What the invalid conformance cases share. Each spoils one thing in an archive that is right otherwise, checksums too.

The cases are registered by invalid_*.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from vectors.corrections import residual
from vectors.draft import Draft, ref
from vectors.values import Json, Tensor, bits, numbers, tensor, weights, words

# spec/reasons.md: the step of each reason code.
STEPS = {
    **dict.fromkeys(("not-an-archive",), 1),
    **dict.fromkeys(("json", "manifest-checksum", "schema"), 2),
    **dict.fromkeys(("version", "feature"), 3),
    **dict.fromkeys(("dtype", "operator", "encoding", "name", "shape", "limit"), 4),
    **dict.fromkeys(("operand", "cycle", "coverage"), 5),
    **dict.fromkeys(("shard-missing", "shard-size", "shard-header", "shard-layout", "sidecar"), 6),
    **dict.fromkeys(("table", "chunk-checksum", "chunk-size"), 7),
    **dict.fromkeys(("inexact", "base-missing", "base-mismatch", "digest", "checkpoint"), 8),
}
Edit = Callable[[Json], object]
Path = tuple[str | int, ...]
TERMS: Path = ("tensors", "w", "recipe", "terms")  # in `low_rank`


class Case(NamedTuple):
    reason: str
    description: str
    make: Callable[[], Draft]


CASES: dict[str, Case] = {}


# The archives that are spoiled ---------------------------------------------------------------------


def plain_archive() -> Draft:
    """`w` coded in chunks, `bias` raw, `tied` a reference, `ids` integers; one sidecar."""
    draft = Draft(sidecars={"config.json": b'{"hidden_size":4}\n'})
    draft.stored("w", weights("invalid w", "BF16", 6, 4), "float-planes", "zstd", 9)
    draft.stored("bias", numbers("F32", [4], [0.5, -1, 2, 0]))
    draft.exact("tied", draft.tensors["w"], ref("w"))
    draft.stored("ids", bits("I64", 3, 1, 4, 1, 5), "planes", "zstd", 4)
    draft.stored("zeros", Tensor("U8", [600], bytes(600)), "none", "zstd")
    return draft


def two_shards() -> Draft:
    draft = plain_archive()
    draft.shards = 2
    draft.stored("second", tensor("second", "U8", 5), shard=1)
    return draft


def based() -> Draft:
    """`w` patched against a base, `same` a reference into it; `unused` is in the base only."""
    draft = Draft()
    base = {
        "w": weights("invalid base", "BF16", 4, 3),
        "same": tensor("same", "F16", 5),
        "unused": tensor("unused", "U8", 3),
    }
    draft.with_base(base)
    target = bits("BF16", *(u ^ 1 for u in words(base["w"])))._replace(shape=[4, 3])
    part = draft.array("w#residual", residual(target, base["w"]), "planes", "zstd")
    draft.exact("w", target, {"op": "patch", "prediction": ref("w", "base"), "residual": part})
    draft.exact("same", base["same"], ref("same", "base"))
    return draft


def low_rank() -> Draft:
    """`w` = `u` + low rank in a bounded recipe."""
    draft = Draft()
    a, b, u = (
        numbers("BF16", [2, 3], [1, 2, 3, 0, 1, 0]),
        numbers("BF16", [2, 4], [1] * 8),
        numbers("BF16", [4, 3], [0.5] * 12),
    )
    draft.stored("u", u)
    low = {"op": "lowrank", "a": draft.array("w#lora_a", a), "b": draft.array("w#lora_b", b)}
    draft.approximate("w", "BF16", [4, 3], {"op": "sum", "terms": [ref("u"), low]})
    return draft


# Edits of the manifest -----------------------------------------------------------------------------


def put(value: Any, *path: str | int) -> Edit:
    def edit(m: Any) -> None:
        for key in path[:-1]:
            m = m[key]
        m[path[-1]] = value

    return edit


def drop(*path: str | int) -> Edit:
    def edit(m: Any) -> None:
        for key in path[:-1]:
            m = m[key]
        del m[path[-1]]

    return edit


def append(value: Any, *path: str | int) -> Edit:
    def edit(m: Any) -> None:
        for key in path:
            m = m[key]
        m.append(value)

    return edit


def both(*edits: Edit) -> Edit:
    return lambda m: [edit(m) for edit in edits]


def rename(part: str, old: str, new: str) -> Edit:
    def edit(m: Json) -> None:
        m[part][new] = m[part].pop(old)

    return edit


def add(name: str, reason: str, description: str, make: Callable[[], Draft] = plain_archive, **edits: Any) -> None:
    """Register a case: the archive that ``make`` draws up, with these ``edit_*`` attributes."""

    def spoiled() -> Draft:
        draft = make()
        for key, edit in edits.items():
            setattr(draft, key, edit)
        return draft

    assert name not in CASES, name
    CASES[name] = Case(reason, description, spoiled)


def manifest(name: str, reason: str, description: str, edit: Edit, make: Callable[[], Draft] = plain_archive) -> None:
    add(name, reason, description, make, edit_manifest=edit)


def annotation(name: str, reason: str, description: str, raw: bytes) -> None:
    """Raw JSON where an annotation stands: nothing else in the archive depends on it."""
    mark = put({"x": "MARK"}, "annotations")
    add(name, reason, description, edit_manifest=mark, edit_text=lambda text: text.replace(b'"MARK"', raw))


def flip(data: bytes, at: int, bit: int = 0) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def shift(header: Json, name: str, by: int) -> None:
    """Move an entry of a safetensors header and all behind it."""
    start = header[name]["data_offsets"][0]
    for entry in header.values():
        if entry["data_offsets"][0] >= start:
            entry["data_offsets"] = [at + by for at in entry["data_offsets"]]
