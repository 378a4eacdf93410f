"""The manifest: `deltafmt.json` as frozen dataclasses, parsed and printed (spec/manifest.md)."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from . import names
from .digests import is_digest, model_digest
from .dtypes import Dtype, Shape, dtype
from .encodings import Encoding
from .errors import IntegrityError, MalformedError, UnsupportedError
from .limits import DEFAULT_LIMITS, JSON_DEPTH, MAX_INTEGER, Limits
from .operators import Operator, parse_recipe
from .strictjson import Fields, Record, canonical, check_depth, parse

FORMAT = "deltafmt"
MAJOR, MINOR = 1, 0
FEATURES: frozenset[str] = frozenset()

_PREFIX = b'{"$checksum":"sha256:'
_ZEROS = b"0" * 64
_AGAIN = "Download the file again"
_VERSION = re.compile(r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Shard:
    """A shard file: its name, size in bytes, and the digest of its first `8 + N` bytes."""

    name: str
    size: int
    header: str


class Array(NamedTuple):
    """A stored array. `shard` is an index into `Manifest.shards`, `table` that of its first word in the chunk table."""

    dtype: Dtype
    shape: Shape
    shard: int
    encoding: Encoding
    table: int
    digest: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class BaseTensor:
    dtype: Dtype
    shape: Shape
    digest: str

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.shape)


@dataclass(frozen=True)
class Base:
    """An external model: every tensor of it, and where to look for it (a hint, never what is trusted)."""

    tensors: Mapping[str, BaseTensor]
    repo: str | None = None
    revision: str | None = None

    @property
    def digest(self) -> str:
        return model_digest(
            {name: (tensor.dtype.name, tensor.shape, tensor.digest) for name, tensor in self.tensors.items()}
        )


class Tensor(NamedTuple):
    """A logical tensor. Exactly one of `digest` (exact) and `rel_error` (approximate) is set."""

    dtype: Dtype
    shape: Shape
    recipe: Operator
    digest: str | None = None
    rel_error: float | None = None

    @property
    def exact(self) -> bool:
        return self.digest is not None

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.shape)


@dataclass(frozen=True)
class WeightFile:
    """An original weight file: its name and the stored array that holds its header."""

    name: str
    header: str


@dataclass(frozen=True)
class Checkpoint:
    """How the original weight files were laid out; `index` is (file name, array name)."""

    files: tuple[WeightFile, ...]
    index: tuple[str, str] | None = None

    @property
    def arrays(self) -> list[str]:
        return [file.header for file in self.files] + ([self.index[1]] if self.index else [])


@dataclass(frozen=True)
class Sidecar:
    size: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    shards: tuple[Shard, ...]
    arrays: Mapping[str, Array]
    tensors: Mapping[str, Tensor]
    checkpoint: Checkpoint
    sidecars: Mapping[str, Sidecar]
    bases: Mapping[str, Base] = field(default_factory=dict)
    annotations: Mapping[str, Any] = field(default_factory=dict)
    version: str = f"{MAJOR}.{MINOR}"

    @property
    def logical_bytes(self) -> int:
        """Bytes of all tensors, as the original checkpoint holds them."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def exact(self) -> bool:
        """Whether every tensor is rebuilt bit for bit."""
        return all(tensor.exact for tensor in self.tensors.values())

    def archive_bytes(self, manifest_bytes: int, *, single_file: bool = False) -> int:
        """Bytes of the whole archive, of which the manifest takes `manifest_bytes` in a directory."""
        shards = sum(shard.size for shard in self.shards)
        if single_file:
            return shards
        return manifest_bytes + shards + sum(sidecar.size for sidecar in self.sidecars.values())

    def check_single_file(self) -> None:
        """Refuse what does not go into a single file. Raises `MalformedError` (reasons `schema`, `name`)."""
        if len(self.shards) != 1:
            raise MalformedError(
                "an archive in a single file has one shard", where="/shards", found=len(self.shards), reason="schema"
            )
        for name in self.arrays:
            if name.startswith(names.SIDECAR_PREFIX):
                raise MalformedError("the name is a sidecar's", where=f"/arrays/{names.escaped(name)}", reason="name")

    def to_bytes(self) -> bytes:
        """Print in canonical form, checksum first."""
        document = {
            "$checksum": "sha256:" + _ZEROS.decode(),
            "format": FORMAT,
            "version": self.version,
            "requires": [],
            "shards": [vars(shard) for shard in self.shards],
            "arrays": {name: _print_array(array) for name, array in self.arrays.items()},
            "bases": {name: _print_base(base) for name, base in self.bases.items()},
            "tensors": {name: _print_tensor(tensor) for name, tensor in self.tensors.items()},
            "checkpoint": _print_checkpoint(self.checkpoint),
            "sidecars": {name: vars(sidecar) for name, sidecar in self.sidecars.items()},
        }
        if self.annotations:
            document["annotations"] = dict(self.annotations)
        text = canonical(document)
        return _PREFIX + hashlib.sha256(text).hexdigest().encode() + text[len(_PREFIX) + 64 :]


def parse_manifest(data: bytes, where: str, limits: Limits = DEFAULT_LIMITS) -> Manifest:
    """Parse a manifest and check everything that can be checked without its shards (steps 2 to 4 of spec/reasons.md).

    Raises:
        IntegrityError: `$checksum` does not match.
        MalformedError, UnsupportedError: as spec/reasons.md says.
    """
    limits.check("manifest_bytes", len(data), where)
    body = len(_PREFIX) + 64
    if data.startswith(_PREFIX) and re.fullmatch(rb"[0-9a-f]{64}", data[len(_PREFIX) : body]):
        found = hashlib.sha256(_PREFIX + _ZEROS)
        found.update(memoryview(data)[body:])
        if found.hexdigest().encode() != data[len(_PREFIX) : body]:
            raise IntegrityError(
                "the manifest does not match its checksum",
                where=where,
                expected=data[len(_PREFIX) : body].decode(),
                found=found.hexdigest(),
                hint=_AGAIN,
                reason="manifest-checksum",
            )
    document = parse(data, where)
    if not isinstance(document, dict):
        raise MalformedError("the manifest is not an object", where=where, hint=_AGAIN, reason="json")
    fields = Fields(document, "")
    if not data.startswith(_PREFIX) or not is_digest(fields.text("$checksum")):
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
        arrays=_named(fields.object("arrays"), "/arrays", limits, lambda item, at: _parse_array(item, at, limits)),
        bases={name: _parse_base(name, item, limits) for name, item in fields.object("bases").items()},
        tensors=_named(fields.object("tensors"), "/tensors", limits, lambda item, at: _parse_tensor(item, at, limits)),
        checkpoint=_parse_checkpoint(fields.take("checkpoint", dict, "an object"), limits),
        sidecars={
            name: _parse_sidecar(item, f"/sidecars/{name}")
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
                "there is no such shard", where=f"/arrays/{name}/shard", found=array.shard, reason="schema"
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
            hint="Upgrade with: pip install --upgrade deltafmt" if int(match[1]) > MAJOR else "",
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


def _named(items: dict[str, Any], pointer: str, limits: Limits, parse_item: Callable[[Any, str], _T]) -> dict[str, _T]:
    limits.check("tensors", len(items), pointer)
    return {name: parse_item(item, f"{pointer}/{names.check_name(name, pointer)}") for name, item in items.items()}


def _parse_shape(items: list[Any], kind: Dtype, pointer: str, limits: Limits) -> Shape:
    for size in items:
        if type(size) is not int or not 0 <= size <= MAX_INTEGER:
            raise MalformedError("a dimension that is no size", where=pointer, found=repr(size)[:40], reason="shape")
    if len(items) > limits.dimensions:
        limits.check("dimensions", len(items), pointer)
    if kind.nbytes(items) > limits.tensor_bytes:
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
    pointer = f"/bases/{names.escaped(name)}"
    if not names.BASE_ID.fullmatch(name):
        raise MalformedError("not a base id", where=pointer, expected=names.BASE_ID.pattern, reason="name")
    fields = Fields(item, pointer)
    stated = _checked_digest(fields.text("digest"), pointer)
    base = Base(
        _named(
            fields.object("tensors"),
            f"{pointer}/tensors",
            limits,
            lambda item, at: _parse_base_tensor(item, at, limits),
        ),
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


def _parse_base_tensor(item: object, pointer: str, limits: Limits) -> BaseTensor:
    kind_name, shape, digest = _BASE_TENSOR(item, pointer)
    kind = dtype(kind_name, pointer)
    return BaseTensor(kind, _parse_shape(shape, kind, pointer, limits), _checked_digest(digest, pointer))


def _parse_tensor(item: object, pointer: str, limits: Limits) -> Tensor:
    exact = isinstance(item, dict) and "rel_error" not in item
    kind_name, shape, recipe, error = _EXACT_TENSOR(item, pointer) if exact else _approximate(item, pointer)
    kind = dtype(kind_name, pointer)
    parsed = kind, _parse_shape(shape, kind, pointer, limits), parse_recipe(recipe, f"{pointer}/recipe")
    if exact:
        return Tensor(*parsed, digest=_checked_digest(error, pointer))
    if not error >= 0:
        raise MalformedError("a negative error", where=f"{pointer}/rel_error", reason="schema")
    return Tensor(*parsed, rel_error=error)


def _approximate(item: object, pointer: str) -> tuple[str, list[Any], dict[str, Any], float]:
    fields = Fields(item, pointer)
    values = fields.text("dtype"), fields.array("shape"), fields.object("recipe"), fields.number("rel_error")
    fields.done()
    return values


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


def _print_array(array: Array) -> dict[str, Any]:
    return {
        "dtype": array.dtype.name,
        "shape": array.shape,
        "shard": array.shard,
        "encoding": array.encoding.to_json(),
        "table": array.table,
        "digest": array.digest,
    }


def _print_base(base: Base) -> dict[str, Any]:
    tensors = {name: {"dtype": t.dtype.name, "shape": t.shape, "digest": t.digest} for name, t in base.tensors.items()}
    hints = {key: value for key, value in (("repo", base.repo), ("revision", base.revision)) if value is not None}
    return {"digest": base.digest, "tensors": tensors, **hints}


def _print_tensor(tensor: Tensor) -> dict[str, Any]:
    content = {"digest": tensor.digest} if tensor.digest is not None else {"rel_error": tensor.rel_error}
    return {"dtype": tensor.dtype.name, "shape": tensor.shape, "recipe": tensor.recipe.to_json(), **content}


def _print_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    printed: dict[str, Any] = {"files": [vars(file) for file in checkpoint.files]}
    if checkpoint.index:
        printed["index"] = {"name": checkpoint.index[0], "array": checkpoint.index[1]}
    return printed
