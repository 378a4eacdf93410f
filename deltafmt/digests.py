"""SHA-256 digests for identity, XXH64 checksums against accidents (spec/README.md, "Terms")."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from .dtypes import Shape
from .strictjson import canonical

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def is_digest(text: object) -> bool:
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def are_digests(texts: Iterable[str]) -> bool:
    """`is_digest` of many."""
    return all(map(_DIGEST.fullmatch, texts))


def digest(data: Any) -> str:
    """`sha256:hex` of a bytes-like object (any C-contiguous buffer)."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def checksum(*parts: Any) -> int:
    """XXH64, seed 0, of bytes-like objects one after another."""
    running = xxhash.xxh64()
    for part in parts:
        running.update(part)
    return running.intdigest()


def model_digest(tensors: Mapping[str, tuple[str, Shape, str]]) -> str:
    """The digest of a model: of the canonical JSON `{name: [dtype, shape, digest]}` (spec/manifest.md, *base*)."""
    return digest(canonical({name: [dtype, list(shape), found] for name, (dtype, shape, found) in tensors.items()}))
