"""What deltafmt needs of a model on disk, wherever it comes from: `pack` reads its input and its base through this."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np

from .dtypes import Bits, Dtype, Shape
from .errors import AccessError
from .scratch import scratch

_PIECE_ELEMENTS = 1 << 20
_BLOCK = 4 << 20
_Self = TypeVar("_Self", bound="Checkpoint")


@dataclass(frozen=True)
class TensorInfo:
    dtype: Dtype
    shape: Shape

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.shape)


@dataclass(frozen=True)
class WeightFileLayout:
    """A weight file as `unpack` will write it: its name, and its safetensors header (without the length before it)."""

    name: str
    header: bytes


@dataclass(frozen=True)
class FilePart:
    """A file, or `size` bytes of it from `begin`."""

    path: Path
    begin: int = 0
    size: int | None = None

    def blocks(self) -> Iterator[bytes]:
        """Its content, piece by piece. Raises `AccessError`."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.begin)
                left = math.inf if self.size is None else self.size
                while block := file.read(int(min(left, _BLOCK))):
                    left -= len(block)
                    yield block
        except OSError as error:
            raise AccessError(f"cannot read: {error.strerror}", where=str(self.path)) from error

    def nbytes(self) -> int:
        return self.path.stat().st_size if self.size is None else self.size

    def digest(self) -> str:
        """`sha256:hex` of its content."""
        running = hashlib.sha256()
        for block in self.blocks():
            running.update(block)
        return "sha256:" + running.hexdigest()


class Checkpoint(ABC):
    """A model: named tensors, the layout of its weight files, and its other files. Reads are thread-safe.

    Attributes:
        location: what the user called it; for messages.
        tensors: name -> `TensorInfo`, in the order in which they lie in the files.
        files: the weight files. A source that is not safetensors gives the safetensors files it is to become.
        index: name and bytes of the shard index, if there is one.
        sidecars: every other file of the checkpoint: relative name (with `/`) -> where its content is.
        input_bytes: bytes of all files as they are on disk.
    """

    location: str
    tensors: Mapping[str, TensorInfo]
    files: tuple[WeightFileLayout, ...]
    index: tuple[str, bytes] | None
    sidecars: Mapping[str, FilePart]
    input_bytes: int

    @abstractmethod
    def read(self, name: str, lo: int, hi: int, out: Bits) -> None:
        """Elements `[lo, hi)` (flat indices) of a tensor into `out`, unsigned integers of the dtype's width."""

    def known_digest(self, name: str) -> str | None:
        """The `sha256:` digest of a tensor's bytes, where it is known without reading them."""
        return None

    def read_whole(self, name: str) -> Bits:
        """All elements of a tensor, flat, as unsigned integers of its width."""
        info = self.tensors[name]
        out = np.empty(info.count, info.dtype.bits)
        self.read(name, 0, out.size, out)
        return out

    def digest(self, name: str) -> str:
        """The `sha256:` digest of a tensor's bytes; read, where it is not known."""
        if (known := self.known_digest(name)) is not None:
            return known
        running = hashlib.sha256()
        info = self.tensors[name]
        for lo in range(0, info.count, _PIECE_ELEMENTS):
            hi = min(lo + _PIECE_ELEMENTS, info.count)
            piece = scratch("digest", info.dtype.bits, hi - lo)
            self.read(name, lo, hi, piece)
            running.update(piece)
        return "sha256:" + running.hexdigest()

    def close(self) -> None:  # noqa: B027 - nothing to close by default
        pass

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
