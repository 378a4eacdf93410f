"""A shard being written: chunks as they come, then their table, the header last (spec/layout.md)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from .checkpoint import FilePart
from .digests import checksum, digest
from .dtypes import DTYPES, Bits, Dtype, Shape
from .durable import NewFile
from .encodings import Encoding
from .errors import UsageError
from .limits import DEFAULT_LIMITS, MAX_INTEGER
from .manifest import Array, Manifest, Shard, Sidecar
from .names import CHUNK_TABLE, SIDECAR_PREFIX
from .safetensors_file import CARRIER
from .strictjson import canonical

_SLACK = 1000  # a header may be padded by a 1/1000 of the shard


class ShardWriter:
    """Writes one shard: arrays one after another, then the table, then the header in the room left for it.

    Args:
        room: bytes to leave for the header; at least what `header_room` says of the arrays that may come.
    """

    def __init__(self, file: NewFile, index: int, room: int) -> None:
        self._file = file
        self._index = index
        self._room = room
        self._entries: dict[str, dict[str, Any]] = {}
        self._words: list[int] = []
        self._data = self._file.position = 8 + room

    @property
    def stored_bytes(self) -> int:
        """Bytes of array data written so far."""
        return self._file.position - self._data

    def add(
        self,
        name: str,
        dtype: Dtype,
        shape: Shape,
        encoding: Encoding,
        chunks: Iterable[list[Any]],
        digest: Callable[[], str],
    ) -> Array:
        """Write one stored array; return its manifest entry.

        Args:
            chunks: of each chunk, the stored bytes of its planes.
            digest: gives the digest of the elements; asked once the chunks are through.
        """
        begin, table = self.stored_bytes, len(self._words)
        for planes in chunks:
            self._words.append(checksum(*planes))
            for plane in planes:
                self._file.append(plane)
                self._words.append(self.stored_bytes - begin)
        end = self.stored_bytes
        natural = (dtype.name, list(shape)) if encoding.is_raw else ("U8", [end - begin])
        self._entries[name] = {"dtype": natural[0], "shape": natural[1], "data_offsets": [begin, end]}
        return Array(dtype, shape, self._index, encoding, table if end > begin else 0, digest())

    def finish(self, name: str) -> Shard:
        """Write table and header, flush to the device; return the manifest entry under the shard's final name."""
        self._add_table()
        header = canonical(self._entries)
        length = self._room
        if self._room - len(header) > max(self.stored_bytes // _SLACK, 7):
            length = -(-len(header) // 8) * 8
            self._file.shift(self._data, 8 + length, self.stored_bytes)
        head = length.to_bytes(8, "little") + header.ljust(length)
        if len(head) != 8 + length:
            raise RuntimeError("the header needs more room than header_room promised")
        self._file.write_at(0, head)
        return Shard(name, self._file.finish(), digest(head))

    def finish_single_file(
        self,
        name: str,
        sidecars: Mapping[str, FilePart],
        manifest: Callable[[Shard, Mapping[str, Sidecar]], Manifest],
    ) -> Manifest:
        """Write table, sidecars and a header that carries the manifest, flush to the device; return the manifest.

        Args:
            name: of the shard in the manifest.
            manifest: makes it, of the entries of the shard and the sidecars.

        Raises:
            AccessError: a sidecar cannot be read.
            UsageError: the header would be larger than `Limits.header_bytes`.
        """
        self._add_table()
        kept = {sidecar: self._add_sidecar(sidecar, part) for sidecar, part in sidecars.items()}

        def text(size: int, header_digest: str) -> bytes:
            made = manifest(Shard(name, size, header_digest), kept)
            return canonical(made.to_bytes().decode())[1:-1]

        # The manifest states the size of the file, so that of itself: room for the longest, the rest is padding.
        rest = b'"},' + canonical(self._entries)[1:]
        length = -(-(len(CARRIER) + len(text(MAX_INTEGER, digest(b""))) + len(rest)) // 8) * 8
        if length > DEFAULT_LIMITS.header_bytes:
            raise UsageError(
                "the manifest is too large for a single file",
                expected=f"a header of at most {DEFAULT_LIMITS.header_bytes} bytes",
                found=length,
                hint="Pack into a directory: leave --single-file (single_file= in Python) out",
            )
        size = 8 + length + self.stored_bytes
        head = length.to_bytes(8, "little") + CARRIER
        rest = rest.ljust(length - len(CARRIER) - len(text(size, digest(b""))))
        header_digest = digest(head + rest)
        self._file.shift(self._data, 8 + length, self.stored_bytes)
        self._file.write_at(0, head + text(size, header_digest) + rest)
        self._file.finish()
        return manifest(Shard(name, size, header_digest), kept)

    def _add_sidecar(self, name: str, part: FilePart) -> Sidecar:
        begin, running = self.stored_bytes, hashlib.sha256()
        for block in part.blocks():
            running.update(block)
            self._file.append(block)
        size = self.stored_bytes - begin
        self._entries[SIDECAR_PREFIX + name] = {"dtype": "U8", "shape": [size], "data_offsets": [begin, begin + size]}
        return Sidecar(size, "sha256:" + running.hexdigest())

    def _add_table(self) -> None:
        table = np.array([*self._words, 0], np.uint64)
        table[-1] = checksum(table[:-1])
        begin = self.stored_bytes
        self._file.append(table)
        self._entries[CHUNK_TABLE] = {"dtype": "U64", "shape": [table.size], "data_offsets": [begin, self.stored_bytes]}


def header_room(arrays: Iterable[tuple[str, int]]) -> int:
    """An upper bound, in bytes, of the header of a shard with these arrays: (name, dimensions). A multiple of 8."""
    room = sum(len(canonical(name)) + 120 + 20 * dimensions for name, dimensions in arrays) + 200
    return math.ceil(room / 8) * 8


def raw_bytes(data: bytes) -> Bits:
    """Bytes as the elements of a `U8` array."""
    return np.frombuffer(data, DTYPES["U8"].bits)
