"""deltafmt's own shards: opened and read, each chunk checked against the chunk table (spec/layout.md)."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .checkpoint import FilePart
from .digests import checksum
from .dtypes import Bits
from .encodings import StoredChunk, decode_chunks
from .encodings.planes import Plane
from .errors import IntegrityError, MalformedError, UnsupportedError
from .limits import Limits
from .manifest import Array, Shard, Sidecar
from .names import CHUNK_TABLE, SIDECAR_PREFIX, escaped
from .safetensors_file import Entry, SafetensorsFile
from .scratch import STEP_BYTES, scratch

_AGAIN = "Download the shard again"


class ShardReader:
    """An open shard whose size, header and entries agree with the manifest.

    Args:
        path: the file.
        arrays: the stored arrays that the manifest places in this shard.
        sidecars: those that are in it too, if it is a single-file archive.

    Raises:
        IntegrityError: the file is missing, has another size, or its header does not match its digest.
        MalformedError: entries other than the manifest's; holes, overlaps, trailing bytes.
    """

    def __init__(
        self,
        path: Path,
        shard: Shard,
        arrays: Mapping[str, Array],
        limits: Limits,
        sidecars: Mapping[str, Sidecar] | None = None,
    ) -> None:
        self.path = path
        self._arrays = arrays
        self._sidecars = sidecars or {}
        found = self.path.stat().st_size if self.path.is_file() else None
        if found is None:
            raise IntegrityError(
                "the shard is missing",
                where=str(self.path),
                expected=f"{shard.size} bytes",
                hint=_AGAIN,
                reason="shard-missing",
            )
        if found != shard.size:
            raise IntegrityError(
                "the shard has another size",
                where=str(self.path),
                expected=f"{shard.size} bytes",
                found=f"{found} bytes",
                hint=_AGAIN,
                reason="shard-size",
            )
        try:
            self._file = SafetensorsFile(self.path, limits, header_digest=shard.header, carrier=sidecars is not None)
        except (MalformedError, UnsupportedError) as error:
            if error.reason not in ("shard-header", "dtype"):  # the manifest names known dtypes only
                raise
            raise IntegrityError(
                error.what,
                where=error.where,
                expected=error.expected,
                found=error.found,
                hint=_AGAIN,
                reason="shard-header",
            ) from error
        try:
            self._check_entries()
        except BaseException:
            self.close()
            raise
        self._lock = threading.Lock()
        self._table: npt.NDArray[np.uint64] | None = None

    def _check_entries(self) -> None:
        entries = dict(self._file.entries)
        table = entries.pop(CHUNK_TABLE, None)
        if table is None or table.dtype.name != "U64" or len(table.shape) != 1 or table.shape[0] < 1:
            raise self._layout(f"no chunk table '{CHUNK_TABLE}' of dtype U64")
        for name, sidecar in self._sidecars.items():
            held = entries.pop(SIDECAR_PREFIX + name, None)
            if held is None or (held.dtype.name, held.shape) != ("U8", (sidecar.size,)):
                raise IntegrityError(
                    f"the sidecar '{escaped(name)}' is missing or another",
                    where=str(self.path),
                    expected=f"{sidecar.size} bytes",
                    hint=_AGAIN,
                    reason="sidecar",
                )
        for name in sorted(entries.keys() ^ self._arrays.keys()):
            raise self._layout(f"'{escaped(name)}' is in {'the shard' if name in entries else 'the manifest'} only")
        for name, entry in entries.items():
            array = self._arrays[name]
            expected = (array.dtype.name, array.shape) if array.encoding.is_raw else ("U8", (entry.end - entry.begin,))
            if (entry.dtype.name, entry.shape) != expected:
                raise self._layout(
                    f"'{escaped(name)}' has another dtype or shape", expected, (entry.dtype.name, entry.shape)
                )

    def _layout(self, what: str, expected: object = None, found: object = None) -> MalformedError:
        return MalformedError(what, where=str(self.path), expected=expected, found=found, reason="shard-layout")

    def _words(self) -> npt.NDArray[np.uint64]:
        """The chunk table, read once, its checksum and its division into rows checked."""
        with self._lock:
            if self._table is None:
                table = np.empty(self._file.entries[CHUNK_TABLE].shape[0], np.uint64)
                self._file.read_elements(CHUNK_TABLE, 0, table.size, table)
                if checksum(table[:-1]) != table[-1]:
                    raise self._bad_table("it does not match its checksum")
                position = 0
                for name, array in sorted(self._arrays.items(), key=lambda item: item[1].table):
                    if array.numel and array.table != position:
                        raise self._bad_table(
                            f"the rows of '{escaped(name)}' are not where they should be", position, array.table
                        )
                    position += array.encoding.table_words(array.dtype, array.numel)
                if position + 1 != table.size:
                    raise self._bad_table("it has another length", position + 1, table.size)
                self._table = table
            return self._table

    def _bad_table(self, what: str, expected: object = None, found: object = None) -> IntegrityError:
        return IntegrityError(
            f"the chunk table is damaged: {what}",
            where=str(self.path),
            expected=expected,
            found=found,
            hint=_AGAIN,
            reason="table",
        )

    def array(self, name: str) -> ArrayReader:
        """A reader of one stored array. Raises `IntegrityError` (reason `table`)."""
        array, entry, words = self._arrays[name], self._file.entries[name], self._words()
        planes = array.encoding.planes(array.dtype)
        length = array.encoding.table_words(array.dtype, array.numel)
        rows = words[array.table : array.table + length].reshape(-1, 1 + planes)
        ends = rows[:, 1:]
        flat = ends.ravel()
        if (flat[1:] < flat[:-1]).any() or (flat[-1] if flat.size else 0) != entry.end - entry.begin:
            raise self._bad_table(f"the rows of '{escaped(name)}' do not fit its {entry.end - entry.begin} bytes")
        return ArrayReader(self._file, name, array, entry, rows)

    def size(self, name: str) -> int:
        """Bytes that a stored array takes in the shard."""
        entry = self._file.entries[name]
        return entry.end - entry.begin

    def sidecar(self, name: str) -> FilePart:
        """Where in the file a sidecar is."""
        entry = self._file.entries[SIDECAR_PREFIX + name]
        return FilePart(self.path, self._file.data_start + entry.begin, entry.end - entry.begin)

    def close(self) -> None:
        self._file.close()


class ArrayReader:
    """Reads any range of one stored array, decoding and checking only the chunks it touches; thread-safe."""

    def __init__(
        self, file: SafetensorsFile, name: str, array: Array, entry: Entry, rows: npt.NDArray[np.uint64]
    ) -> None:
        self._file, self._name, self._array = file, name, array
        self._begin = file.data_start + entry.begin
        self._rows = rows

    def __call__(self, lo: int, hi: int, out: Bits) -> None:
        """Elements `[lo, hi)` into `out`, as bits. Raises `IntegrityError`, `MalformedError`."""
        size, count = self._array.encoding.chunk, self._array.numel
        together = max(STEP_BYTES // (size * self._array.dtype.width), 1)
        index = lo // size
        while index * size < hi:
            begin = index * size
            end = min(begin + size, count)
            if lo <= begin and end <= hi:
                last = min(index + together, hi // size if hi < count else self._array.encoding.chunks(count))
                end = min(last * size, count)
                self._decode(index, last, out[begin - lo : end - lo])
                index = last
            else:
                whole = scratch("partial chunk", self._array.dtype.bits, end - begin)
                self._decode(index, index + 1, whole)
                first, last = max(lo, begin), min(hi, end)
                np.copyto(out[first - lo : last - lo], whole[first - begin : last - begin])
                index += 1

    def stored_bytes(self, count: int) -> int:
        """Bytes in the file of the chunks that hold the first `count` elements."""
        chunks = -(-count // self._array.encoding.chunk)
        return int(self._rows[chunks - 1, -1]) if chunks else 0

    def planes(self, index: int) -> list[Plane]:
        """The stored bytes of a chunk's planes. Raises as reading does."""
        (where,) = self._places(index, index + 1)
        stored = np.empty(self._offset(index + 1) - self._offset(index), np.uint8)
        (chunk,) = self._read(index, [where], stored)
        return [chunk.stored[begin:end] for begin, end in pairwise([0, *chunk.ends])]

    def _decode(self, first: int, last: int, out: Bits) -> None:
        """Chunks `[first, last)` into `out`."""
        places = self._places(first, last)
        size = self._offset(last) - self._offset(first)
        if self._array.encoding.is_raw and size == out.nbytes:
            self._read(first, places, out.view(np.uint8))
        else:
            chunks = self._read(first, places, scratch("stored chunks", np.uint8, size))
            decode_chunks(chunks, self._array.encoding, out)

    def _places(self, first: int, last: int) -> list[str]:
        """What to call each of chunks `[first, last)`. Raises `MalformedError` if one is longer than may be."""
        array, places = self._array, []
        for index in range(first, last):
            begin, end = self._offset(index), self._offset(index + 1)
            place = f"bytes {self._begin + begin} to {self._begin + end}"
            places.append(f"{self._file.path}: '{escaped(self._name)}', chunk {index}, {place}")
            elements = min(array.encoding.chunk, array.numel - index * array.encoding.chunk)
            longest = array.encoding.longest(elements * array.dtype.width)
            if end - begin > longest:
                raise MalformedError(
                    "a chunk is longer than its elements",
                    where=places[-1],
                    expected=f"at most {longest}",
                    found=end - begin,
                    reason="chunk-size",
                )
        return places

    def _read(self, first: int, places: Sequence[str], stored: Plane) -> list[StoredChunk]:
        """The stored bytes of chunks from `first` on, in `stored`. Raises `IntegrityError`."""
        start = self._offset(first)
        self._file.read_into(self._begin + start, stored)
        chunks: list[StoredChunk] = []
        for index, where in enumerate(places, first):
            expected, *row = self._rows[index].tolist()
            begin = self._offset(index)
            chunk = StoredChunk(stored[begin - start : row[-1] - start], [end - begin for end in row], where)
            found = checksum(chunk.stored)
            if found != expected:
                raise IntegrityError(
                    "the chunk does not match its checksum",
                    where=where,
                    expected=f"{expected:016x}",
                    found=f"{found:016x}",
                    hint=_AGAIN,
                    reason="chunk-checksum",
                )
            chunks.append(chunk)
        return chunks

    def _offset(self, index: int) -> int:
        """Where a chunk begins, in the array's bytes."""
        return int(self._rows[index - 1, -1]) if index else 0
