"""Writing an archive: stored arrays into shards, sidecars beside them, the manifest last."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .checkpoint import Checkpoint, FilePart
from .digests import digest
from .dtypes import DTYPES, Bits, Dtype, Shape
from .durable import Staging
from .encodings import Encoding, compressed, encode_chunk
from .limits import NAME_BYTES
from .manifest import Array, Base, Manifest, Shard, Sidecar, Tensor, WeightFile
from .manifest import Checkpoint as CheckpointEntry
from .names import CHUNK_TABLE, MANIFEST, SIDECAR_PREFIX, check_kept_name, shard_name
from .scope import ManifestScope
from .shard_writer import ShardWriter, header_room, raw_bytes

SHARD_BYTES = 5_000_000_000
_ARRAYS_PER_TENSOR = 4  # two factors, a scale and a residual


class ArchiveWriter:
    """Collects the parts of an archive in a staging area; `finish` writes the manifest. Not thread-safe.

    Args:
        staging: where files are created; the caller commits it. It says whether all goes into a single file.
        arrays: name and number of dimensions of every tensor and file that may come; leaves room for the headers.
        shard_bytes: begin another shard once this many bytes are in one.
        bases: of which a tensor may be a mixture: each has a scale.
    """

    def __init__(
        self, staging: Staging, arrays: Iterable[tuple[str, int]], shard_bytes: int = SHARD_BYTES, bases: int = 0
    ) -> None:
        self._staging = staging
        self._room = max(_ARRAYS_PER_TENSOR, bases + 2) * header_room(
            (f"{name}#residual", max(dimensions, 2)) for name, dimensions in arrays
        )
        self._shard_bytes = shard_bytes
        self._open: list[ShardWriter] = []
        self._shards: list[Shard] = []
        self.arrays: dict[str, Array] = {}
        self.array_bytes: dict[str, int] = {}
        self.tensors: dict[str, Tensor] = {}
        self._sidecars: dict[str, Sidecar] = {}
        self._carried: dict[str, FilePart] = {}

    def array_name(self, wanted: str) -> str:
        """`wanted`, or the next free name like it."""
        if wanted == CHUNK_TABLE or wanted.startswith(SIDECAR_PREFIX) or len(wanted.encode()) > NAME_BYTES - 8:
            wanted = f"array {len(self.arrays)}"
        name, tries = wanted, 1
        while name in self.arrays:
            tries += 1
            name = f"{wanted}#{tries}"
        return name

    def add_array(
        self,
        wanted: str,
        dtype: Dtype,
        shape: Shape,
        encoding: Encoding,
        chunks: Iterable[list[Any]],
        array_digest: Callable[[], str],
    ) -> str:
        """Write one stored array; return its name. The other arguments are those of `ShardWriter.add`."""
        if self._open and self._open[-1].stored_bytes >= self._shard_bytes and not self._staging.single_file:
            self._finish_shard()
        if not self._open:
            self._begin_shard()
        name = self.array_name(wanted)
        before = self._open[-1].stored_bytes
        self.arrays[name] = self._open[-1].add(name, dtype, shape, encoding, chunks, array_digest)
        self.array_bytes[name] = self._open[-1].stored_bytes - before
        return name

    def add_bits(self, wanted: str, dtype: Dtype, shape: Shape, bits: Bits, *, thorough: bool = False) -> str:
        """Encode and write a small array that is at hand; return its name."""
        encoding = compressed(dtype, shape)
        return self.add_array(wanted, dtype, shape, encoding, _encoded(bits, encoding, thorough), lambda: digest(bits))

    def add_sidecar(self, name: str, source: FilePart) -> None:
        """Copy a file of the checkpoint byte for byte.

        Raises `AccessError`, `MalformedError` (a name that is not allowed).
        """
        check_kept_name(name, str(source.path))
        if self._staging.single_file:
            self._carried[name] = source  # written behind all arrays
        else:
            self._sidecars[name] = Sidecar(*copied(self._staging, name, source))

    def add_layout(self, checkpoint: Checkpoint) -> CheckpointEntry:
        """Store the headers of the original weight files, and their index."""
        files = [WeightFile(file.name, self._add_text(f"{file.name}#header", file.header)) for file in checkpoint.files]
        if checkpoint.index is None:
            return CheckpointEntry(tuple(files))
        name, content = checkpoint.index
        return CheckpointEntry(tuple(files), (name, self._add_text(f"{name}#index", content)))

    def _add_text(self, wanted: str, content: bytes) -> str:
        return self.add_bits(wanted, DTYPES["U8"], (len(content),), raw_bytes(content), thorough=True)

    def finish(
        self, checkpoint: CheckpointEntry, bases: Mapping[str, Base], annotations: Mapping[str, Any]
    ) -> Manifest:
        """Finish the last shard and write the manifest; return it.

        Raises `UsageError` if the manifest is too large for a single file.
        """
        if self._staging.single_file:
            return self._finish_single_file(checkpoint, bases, annotations)
        if self._open:
            self._finish_shard()
        count = len(self._shards)
        shards = [Shard(shard_name(index, count), shard.size, shard.header) for index, shard in enumerate(self._shards)]
        for index, shard in enumerate(shards):
            self._staging.rename(_unfinished(index), shard.name)
        manifest = Manifest(tuple(shards), self.arrays, self.tensors, checkpoint, self._sidecars, bases, annotations)
        ManifestScope(manifest).check()  # what a reader would refuse is not written
        self._staging.write(MANIFEST, [manifest.to_bytes()])
        return manifest

    def _finish_single_file(
        self, checkpoint: CheckpointEntry, bases: Mapping[str, Base], annotations: Mapping[str, Any]
    ) -> Manifest:
        if not self._open:
            self._begin_shard()
        manifest = self._open.pop().finish_single_file(
            shard_name(0, 1),
            self._carried,
            lambda shard, sidecars: Manifest(
                (shard,), self.arrays, self.tensors, checkpoint, sidecars, bases, annotations
            ),
        )
        ManifestScope(manifest).check()
        self._staging.rename(_unfinished(0), self._staging.destination.name)
        return manifest

    def _begin_shard(self) -> None:
        index = len(self._shards)
        room = 0 if self._staging.single_file else self._room
        self._open.append(ShardWriter(self._staging.create(_unfinished(index)), index, room))

    def _finish_shard(self) -> None:
        self._shards.append(self._open.pop().finish(_unfinished(len(self._shards))))


def _unfinished(index: int) -> str:
    return f"deltafmt-{index + 1:05d}.unfinished"


def _encoded(bits: Bits, encoding: Encoding, thorough: bool) -> Iterator[list[Any]]:
    for begin in range(0, bits.size, encoding.chunk):
        yield encode_chunk(bits[begin : begin + encoding.chunk], encoding, thorough)


def copied(staging: Staging, name: str, source: FilePart) -> tuple[int, str]:
    """Copy a file into the staging area; return its size and digest."""
    running = hashlib.sha256()

    def blocks() -> Iterator[bytes]:
        for block in source.blocks():
            running.update(block)
            yield block

    size = staging.write(name, blocks())
    return size, "sha256:" + running.hexdigest()
