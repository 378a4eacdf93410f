"""Reads a manifest, `deltafmt.json`, and refuses whatever it may not say (spec/manifest.md)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from . import names
from .digests import are_digests, is_digest
from .dtypes import Dtype, Shape, dtype
from .encodings import Encoding, parse_encodings
from .errors import DeltafmtError, IntegrityError, MalformedError, UnsupportedError
from .limits import DEFAULT_LIMITS, JSON_DEPTH, MAX_INTEGER, Limits
from .manifest import (
    FORMAT,
    MAJOR,
    PREFIX,
    ZEROS,
    Array,
    Base,
    BaseTensor,
    Checkpoint,
    Manifest,
    Shard,
    Sidecar,
    Tensor,
    WeightFile,
)
from .operators import parse_recipe
from .records import Record, kinds_and_shapes
from .strictjson import Fields, check_depth, parse, pointer_to

FEATURES: frozenset[str] = frozenset()

_AGAIN = "Download the file again"
_VERSION = re.compile(r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})")
_T = TypeVar("_T")


def parse_manifest(data: bytes, where: str, limits: Limits = DEFAULT_LIMITS) -> Manifest:
    """Parse a manifest and check everything that can be checked without its shards (steps 2 to 4 of spec/reasons.md).

    Raises:
        IntegrityError: `$checksum` does not match.
        MalformedError, UnsupportedError: as spec/reasons.md says.
    """
    limits.check("manifest_bytes", len(data), where)
    body = len(PREFIX) + 64
    if data.startswith(PREFIX) and re.fullmatch(rb"[0-9a-f]{64}", data[len(PREFIX) : body]):
        found = hashlib.sha256(PREFIX + ZEROS)
        found.update(memoryview(data)[body:])
        if found.hexdigest().encode() != data[len(PREFIX) : body]:
            raise IntegrityError(
                "the manifest does not match its checksum",
                where=where,
                expected=data[len(PREFIX) : body].decode(),
                found=found.hexdigest(),
                hint=_AGAIN,
                reason="manifest-checksum",
            )
    document = parse(data, where)
    if not isinstance(document, dict):
        raise MalformedError("the manifest is not an object", where=where, hint=_AGAIN, reason="json")
    fields = Fields(document, "")
    if not data.startswith(PREFIX) or not is_digest(fields.text("$checksum")):
        raise MalformedError("the manifest does not begin with its checksum", where=where, hint=_AGAIN, reason="schema")
    _check_version(document, where)
    if fields.text("format") != FORMAT:
        raise MalformedError("the format is another", where="/format", expected=FORMAT, reason="schema")
    fields.text("version")
    fields.array("requires")
    manifest = Manifest(
        shards=tuple(
            _parse_shard(item, f"/shards/{index}")
            for index, item in enumerate(_capped(fields.array("shards"), "shards", limits))
        ),
        arrays=_named(fields.object("arrays"), "/arrays", limits, _parse_arrays, _parse_array),
        bases={name: _parse_base(name, item, limits) for name, item in fields.object("bases").items()},
        tensors=_named(fields.object("tensors"), "/tensors", limits, _parse_tensors, _parse_tensor),
        checkpoint=_parse_checkpoint(fields.take("checkpoint", dict, "an object"), limits),
        sidecars={
            name: _parse_sidecar(item, pointer_to("sidecars", name))
            for name, item in _capped(fields.object("sidecars"), "sidecars", limits).items()
        },
        annotations=_parse_annotations(fields),
        version=document["version"],
    )
    fields.done()
    if names.CHUNK_TABLE in manifest.arrays:
        raise MalformedError("this name is the chunk table's", where=f"/arrays/{names.CHUNK_TABLE}", reason="name")
    _check_file_names(manifest, where)
    limits.check("total_bytes", manifest.logical_bytes, where)
    for name, array in manifest.arrays.items():
        if array.shard >= len(manifest.shards):
            raise MalformedError(
                "there is no such shard", where=pointer_to("arrays", name, "shard"), found=array.shard, reason="schema"
            )
    return manifest


def _check_version(document: dict[str, Any], where: str) -> None:
    version = document.get("version")
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if match is None:
        raise MalformedError(
            "the version is missing or not 'major.minor'", where="/version", found=version, reason="schema"
        )
    if int(match[1]) != MAJOR:
        raise UnsupportedError(
            "an archive of another version",
            where=where,
            expected=f"{MAJOR}.x",
            found=version,
            hint="Upgrade with: pip install --upgrade deltafmt" if int(match[1]) > MAJOR else "Have it packed again",
            reason="version",
        )
    requires = document.get("requires")
    if not isinstance(requires, list) or not all(isinstance(item, str) for item in requires):
        raise MalformedError("'requires' is not a list of strings", where="/requires", reason="schema")
    for feature in requires:
        if feature not in FEATURES:
            raise UnsupportedError(
                f"it requires the feature {feature[:80]!a}, which this version does not know",
                where=where,
                hint="Upgrade with: pip install --upgrade deltafmt",
                reason="feature",
            )


def _capped(items: Any, limit: str, limits: Limits) -> Any:
    limits.check(limit, len(items), f"/{limit}")
    return items


def _named(
    items: dict[str, Any],
    pointer: str,
    limits: Limits,
    parse_all: Callable[[dict[str, Any], Limits], Iterable[_T]],
    parse_item: Callable[[Any, str, Limits], _T],
) -> dict[str, _T]:
    """Records by name: all at once, and one by one if something is odd about one of them, to say what and where."""
    limits.check("tensors", len(items), pointer)
    with suppress(DeltafmtError):
        names.check_plain(items)
        return dict(zip(items, parse_all(items, limits), strict=True))
    return {
        name: parse_item(item, pointer + pointer_to(names.check_name(name, pointer)), limits)
        for name, item in items.items()
    }


def _columns(record: Record, items: dict[str, Any], limits: Limits) -> list[Sequence[Any]]:
    """Records that begin with a dtype and a shape and end with a digest, a column each."""
    kind_names, sizes, *others, digests = record.columns(items.values())
    kinds, shapes = kinds_and_shapes(kind_names, sizes, lambda size, kind: _parse_shape(size, kind, "", limits))
    if not are_digests(digests):
        raise MalformedError("not a digest")
    return [kinds, shapes, *others, digests]


def _parse_shape(items: list[Any], kind: Dtype, pointer: str, limits: Limits) -> Shape:
    for size in items:
        if type(size) is not int or not 0 <= size <= MAX_INTEGER:
            raise MalformedError("a dimension that is no size", where=pointer, found=repr(size)[:40], reason="shape")
    limits.check("dimensions", len(items), pointer)
    limits.check("tensor_bytes", kind.nbytes(items), pointer)
    return tuple(items)


def _checked_digest(text: str, pointer: str) -> str:
    if not is_digest(text):
        raise MalformedError("not a digest", where=pointer, expected="sha256: and 64 hex digits", reason="schema")
    return text


def _checked_size(number: int, pointer: str) -> int:
    if not 0 <= number <= MAX_INTEGER:
        raise MalformedError("not a size", where=pointer, found=number, reason="schema")
    return number


_SHARD = Record(name=str, size=int, header=str)
_ARRAY = Record(dtype=str, shape=list, shard=int, encoding=dict, table=int, digest=str)
_BASE_TENSOR = Record(dtype=str, shape=list, digest=str)
_EXACT_TENSOR = Record(dtype=str, shape=list, recipe=dict, digest=str)
_WEIGHT_FILE = Record(name=str, header=str)
_INDEX = Record(name=str, array=str)
_SIDECAR = Record(size=int, digest=str)


def _parse_shard(item: object, pointer: str) -> Shard:
    name, size, header = _SHARD(item, pointer)
    return Shard(names.check_shard_name(name, pointer), _checked_size(size, pointer), _checked_digest(header, pointer))


def _parse_arrays(items: dict[str, Any], limits: Limits) -> Iterable[Array]:
    kinds, shapes, shards, encodings, tables, digests = _columns(_ARRAY, items, limits)
    for sizes in (shards, tables):
        _checked_size(min(sizes), "")
        _checked_size(max(sizes), "")
    return map(Array, kinds, shapes, shards, parse_encodings(encodings, kinds), tables, digests)


def _parse_array(item: object, pointer: str, limits: Limits) -> Array:
    kind_name, shape, shard, encoding, table, digest = _ARRAY(item, pointer)
    kind = dtype(kind_name, pointer)
    return Array(
        kind,
        _parse_shape(shape, kind, pointer, limits),
        _checked_size(shard, pointer),
        Encoding.parse(encoding, f"{pointer}/encoding", kind),
        _checked_size(table, pointer),
        _checked_digest(digest, pointer),
    )


def _parse_base(name: str, item: object, limits: Limits) -> Base:
    pointer = pointer_to("bases", name)
    if not names.BASE_ID.fullmatch(name):
        raise MalformedError("not a base id", where=pointer, expected=names.BASE_ID.pattern, reason="name")
    fields = Fields(item, pointer)
    stated = _checked_digest(fields.text("digest"), pointer)
    base = Base(
        _named(fields.object("tensors"), f"{pointer}/tensors", limits, _parse_base_tensors, _parse_base_tensor),
        fields.text("repo") if fields.has("repo") else None,
        fields.text("revision") if fields.has("revision") else None,
    )
    fields.done()
    if base.digest != stated:
        raise MalformedError(
            "the base's digest is not that of its tensors",
            where=pointer,
            expected=base.digest,
            found=stated,
            reason="schema",
        )
    return base


def _parse_base_tensors(items: dict[str, Any], limits: Limits) -> Iterable[BaseTensor]:
    return map(BaseTensor, *_columns(_BASE_TENSOR, items, limits))


def _parse_base_tensor(item: object, pointer: str, limits: Limits) -> BaseTensor:
    kind_name, shape, digest = _BASE_TENSOR(item, pointer)
    kind = dtype(kind_name, pointer)
    return BaseTensor(kind, _parse_shape(shape, kind, pointer, limits), _checked_digest(digest, pointer))


def _parse_tensors(items: dict[str, Any], limits: Limits) -> Iterable[Tensor]:
    kinds, shapes, recipes, digests = _columns(_EXACT_TENSOR, items, limits)
    return map(Tensor, kinds, shapes, [parse_recipe(recipe, "") for recipe in recipes], digests)


def _parse_tensor(item: object, pointer: str, limits: Limits) -> Tensor:
    if isinstance(item, dict) and "rel_error" in item:
        return _parse_approximate(item, pointer, limits)
    kind_name, shape, recipe, digest = _EXACT_TENSOR(item, pointer)
    kind = dtype(kind_name, pointer)
    return Tensor(
        kind,
        _parse_shape(shape, kind, pointer, limits),
        parse_recipe(recipe, f"{pointer}/recipe"),
        digest=_checked_digest(digest, pointer),
    )


def _parse_approximate(item: dict[str, Any], pointer: str, limits: Limits) -> Tensor:
    fields = Fields(item, pointer)
    kind_name, shape = fields.text("dtype"), fields.array("shape")
    recipe, error = fields.object("recipe"), fields.number("rel_error")
    fields.done()
    kind = dtype(kind_name, pointer)
    parsed = kind, _parse_shape(shape, kind, pointer, limits), parse_recipe(recipe, f"{pointer}/recipe")
    if not error >= 0:
        raise MalformedError("a negative error", where=f"{pointer}/rel_error", reason="schema")
    return Tensor(*parsed, rel_error=error)


def _parse_annotations(fields: Fields) -> dict[str, Any]:
    if not fields.has("annotations"):
        return {}
    annotations = fields.object("annotations")
    check_depth(annotations, "/annotations", JSON_DEPTH - 1)
    return annotations


def _parse_checkpoint(item: object, limits: Limits) -> Checkpoint:
    fields = Fields(item, "/checkpoint")
    entries = _capped(fields.array("files"), "shards", limits)
    files = tuple(WeightFile(*_WEIGHT_FILE(entry, f"/checkpoint/files/{place}")) for place, entry in enumerate(entries))
    index: tuple[str, str] | None = None
    if fields.has("index"):
        name, array = _INDEX(fields.object("index"), "/checkpoint/index")
        index = name, array
    fields.done()
    return Checkpoint(files, index)


def _parse_sidecar(item: object, pointer: str) -> Sidecar:
    size, digest = _SIDECAR(item, pointer)
    return Sidecar(_checked_size(size, pointer), _checked_digest(digest, pointer))


def _check_file_names(manifest: Manifest, where: str) -> None:
    originals = [file.name for file in manifest.checkpoint.files]
    if manifest.checkpoint.index:
        originals.append(manifest.checkpoint.index[0])
    restored = [*originals, *manifest.sidecars]
    for name in originals:
        names.check_sidecar_name(name, where)
    for name in manifest.sidecars:
        names.check_kept_name(name, where)
    names.check_no_clash(restored, where)
    names.check_no_clash([*(shard.name for shard in manifest.shards), *manifest.sidecars], where)
