"""The manifest: `deltafmt.json` as frozen dataclasses, and how it is printed (spec/manifest.md)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import names
from .digests import model_digest
from .dtypes import Dtype, Shape
from .encodings import Encoding
from .errors import MalformedError
from .operators import Operator
from .strictjson import canonical, pointer_to

FORMAT = "deltafmt"
MAJOR, MINOR = 1, 0

PREFIX = b'{"$checksum":"sha256:'
ZEROS = b"0" * 64


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
                raise MalformedError("the name is a sidecar's", where=pointer_to("arrays", name), reason="name")

    def to_bytes(self) -> bytes:
        """Print in canonical form, checksum first."""
        document = {
            "$checksum": "sha256:" + ZEROS.decode(),
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
        return PREFIX + hashlib.sha256(text).hexdigest().encode() + text[len(PREFIX) + 64 :]


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
