"""Bounded, thread-safe reads of safetensors files, ours and everybody's."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from itertools import chain
from operator import sub
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .digests import digest
from .dtypes import Bits, Dtype, Shape, dtype
from .errors import AccessError, DeltafmtError, IntegrityError, MalformedError, UsageError
from .limits import DEFAULT_LIMITS, MAX_INTEGER, Limits
from .names import MANIFEST, escaped
from .records import Record, kinds_and_shapes
from .strictjson import canonical, parse

_LENGTH = 8  # bytes of the header's length at the beginning of a file
_MAX_READ = 1 << 30

CARRIER = f'{{"__metadata__":{{"{MANIFEST}":"'.encode()
"""How the header of a single-file archive begins; the manifest follows (spec/layout.md, "Single-file form")."""


class Entry(NamedTuple):
    """One tensor of a safetensors file; `begin` and `end` are byte offsets in the data section."""

    dtype: Dtype
    shape: Shape
    begin: int
    end: int


def parse_header(header: bytes, where: str, limits: Limits = DEFAULT_LIMITS) -> dict[str, Entry]:
    """Parse a safetensors header: entries in the order of their data, which they tile from 0 without holes or overlaps.

    Raises:
        MalformedError: not valid (reason `shard-header`), or offsets that do not tile (reason `shard-layout`).
        UnsupportedError: a dtype that is not known.
    """
    try:
        document = parse(header, where)
        if not isinstance(document, dict):
            raise MalformedError("the header is not an object", where=where)
        metadata = document.pop("__metadata__", {})
        limits.check("tensors", len(document), where)
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise MalformedError("__metadata__ maps strings to strings", where=where)
        entries = sorted(_parse_entries(document, where, limits), key=_position)
    except MalformedError as error:
        if error.reason != "limit":
            error.reason = "shard-header"
        raise
    position = 0
    for name, entry in entries:
        if entry.begin != position:
            what = "a hole" if entry.begin > position else "an overlap"
            raise MalformedError(
                f"{what} before tensor '{escaped(name)}'",
                where=where,
                expected=position,
                found=entry.begin,
                reason="shard-layout",
            )
        position = entry.end
    return dict(entries)


def _position(item: tuple[str, Entry]) -> tuple[int, int]:
    return item[1].begin, item[1].end


_ENTRY = Record(dtype=str, shape=list, data_offsets=list)


def _parse_entries(items: dict[str, Any], where: str, limits: Limits) -> list[tuple[str, Entry]]:
    with suppress(DeltafmtError):  # which the other way raises too, and says where
        kind_names, sizes, offsets = _ENTRY.columns(items.values())
        kinds, shapes = kinds_and_shapes(kind_names, sizes, lambda size, _: _parse_sizes(size, "", limits))
        if set(map(len, offsets)) == {2} and set(map(type, chain.from_iterable(offsets))) == {int}:
            begins, ends = zip(*offsets, strict=True)
            lengths = [kind.nbytes(shape) for kind, shape in zip(kinds, shapes, strict=True)]
            if min(begins) >= 0 and max(ends) <= MAX_INTEGER and lengths == list(map(sub, ends, begins)):
                return list(zip(items, map(Entry, kinds, shapes, begins, ends), strict=True))
    return [(name, _parse_entry(item, where, limits)) for name, item in items.items()]


def _parse_entry(item: object, where: str, limits: Limits) -> Entry:
    kind_name, size, offsets = _ENTRY(item, where)
    kind, shape = dtype(kind_name, where), _parse_sizes(size, where, limits)
    _parse_sizes(offsets, where, limits)
    if len(offsets) != 2 or offsets[1] - offsets[0] != kind.nbytes(shape):
        raise MalformedError(
            "offsets that do not fit the shape", where=where, expected=kind.nbytes(shape), found=offsets
        )
    return Entry(kind, shape, offsets[0], offsets[1])


def _parse_sizes(numbers: list[Any], where: str, limits: Limits) -> Shape:
    limits.check("dimensions", len(numbers), where)  # before their product is taken
    for number in numbers:
        if type(number) is not int or not 0 <= number <= MAX_INTEGER:
            raise MalformedError("not a size", where=where, found=repr(number)[:40])
    return tuple(numbers)


def is_carrier(path: Path) -> bool:
    """Whether a file is a single-file archive. Raises `AccessError`."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(_LENGTH + len(CARRIER))[_LENGTH:] == CARRIER
    except OSError as error:
        raise AccessError(f"cannot read: {error.strerror}", where=str(path)) from error


def carried_manifest(path: Path, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The manifest of a single-file archive, as `deltafmt.json` would hold it.

    Raises:
        AccessError: the file cannot be read.
        MalformedError: the header is not all there, or holds no manifest (reason `json`), or is too long (`limit`).
    """
    try:
        with path.open("rb") as file:
            length, left = int.from_bytes(file.read(_LENGTH), "little"), path.stat().st_size - _LENGTH
            if length > left:
                raise _no_manifest("the header is longer than the file", str(path), f"at most {left}", length)
            limits.check("header_bytes", length, str(path))
            header = file.read(length)
    except OSError as error:
        raise AccessError(f"cannot read: {error.strerror}", where=str(path)) from error
    return split_carrier(header, str(path))[0]


def split_carrier(header: bytes, where: str) -> tuple[bytes, bytes]:
    """The manifest that a header carries, and the header without it. Raises `MalformedError` (reason `json`)."""
    begin = len(CARRIER) - 1
    try:
        # What is behind the manifest may be anything here; in it, an escaped byte does not get through `canonical`.
        text, _ = json.JSONDecoder().raw_decode(header.decode(errors="surrogateescape"), begin)
        printed = canonical(text)
    except ValueError as error:  # of JSON, UTF-8 or lone surrogates
        raise _no_manifest("the header holds no manifest", where) from error
    if not header.startswith(printed, begin):
        raise _no_manifest("the manifest in the header is escaped in another way than it must be", where)
    end = begin + len(printed) - 1
    return text.encode(), header[: begin + 1] + header[end:]


def _no_manifest(what: str, where: str, expected: object = None, found: object = None) -> MalformedError:
    return MalformedError(
        what, where=where, expected=expected, found=found, hint="Download the file again", reason="json"
    )


class SafetensorsFile:
    """An open safetensors file. Reads are positional and thread-safe; the header is checked when it is opened.

    Attributes:
        path, size: the file and its size in bytes.
        header: the header's bytes (without the length before them, and without the manifest if it carries one).
        data_start: file offset of the data section.
        entries: name -> `Entry`, in the order of the data.

    Args:
        header_digest: what the SHA-256 of the first `8 + N` bytes must be, if it is known.
        carrier: whether it is a single-file archive: what is said of the header then holds without the manifest in it.

    Raises:
        AccessError: the file cannot be opened or read.
        IntegrityError: the header does not match its digest.
        MalformedError: it is not a valid safetensors file (reasons `shard-header`, `shard-layout`).
    """

    def __init__(
        self, path: Path, limits: Limits = DEFAULT_LIMITS, *, header_digest: str | None = None, carrier: bool = False
    ) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise AccessError(
                f"cannot open: {error.strerror}", where=str(path), hint="Check the path and its permissions"
            ) from error
        try:
            self.size = os.fstat(self._fd).st_size
            self.header = self._read_header(limits, header_digest, carrier)
            self.entries = parse_header(self.header, str(path), limits)
            self._check_end()
        except BaseException:
            self.close()
            raise

    def _read_header(self, limits: Limits, header_digest: str | None, carrier: bool) -> bytes:
        where = str(self.path)
        if self.size < _LENGTH:
            raise MalformedError(
                "too short for a safetensors file", where=where, found=self.size, reason="shard-header"
            )
        start = self.read(0, _LENGTH).tobytes()
        length = int.from_bytes(start, "little")
        if length > self.size - _LENGTH:
            raise MalformedError(
                "the header is longer than the file (truncated?)",
                where=where,
                expected=f"at most {self.size - _LENGTH}",
                found=length,
                reason="shard-header",
            )
        limits.check("header_bytes", length, where)
        head = start + self.read(_LENGTH, length).tobytes()
        self.data_start = len(head)
        if carrier:
            head = head[:_LENGTH] + split_carrier(head[_LENGTH:], where)[1]
        if header_digest is not None and digest(head) != header_digest:
            raise IntegrityError(
                f"bytes 0 to {self.data_start}, the header, do not match their digest",
                where=where,
                expected=header_digest,
                found=digest(head),
                hint="Download the file again",
                reason="shard-header",
            )
        return head[_LENGTH:]

    def _check_end(self) -> None:
        end = self.data_start + max((entry.end for entry in self.entries.values()), default=0)
        if end != self.size:
            what = "the file is truncated" if end > self.size else "trailing bytes behind the last tensor"
            raise MalformedError(
                what, where=str(self.path), expected=f"{end} bytes", found=f"{self.size} bytes", reason="shard-layout"
            )

    def read(self, offset: int, count: int) -> npt.NDArray[np.uint8]:
        """`count` bytes at a file offset, in a new array."""
        out = np.empty(count, np.uint8)
        self.read_into(offset, out)
        return out

    def read_into(self, offset: int, out: Bits) -> None:
        """Fill a C-contiguous array from a file offset.

        Raises `IntegrityError` if the file has become shorter, `UsageError` if it is closed.
        """
        if self._fd < 0:
            raise UsageError("the file is closed", where=str(self.path), hint="Read inside the 'with' block")
        view = memoryview(out.view(np.uint8)).cast("B")
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done : done + _MAX_READ]], offset + done)
            except OSError as error:
                raise AccessError(f"cannot read: {error.strerror}", where=str(self.path)) from error
            if count == 0:
                raise IntegrityError(
                    "the file became shorter while it was open",
                    where=str(self.path),
                    expected=offset + len(view),
                    found=offset + done,
                    reason="shard-size",
                )
            done += count

    def read_elements(self, name: str, lo: int, hi: int, out: Bits) -> None:
        """Elements `[lo, hi)` of a tensor into `out` (unsigned integers of its width)."""
        entry = self.entries[name]
        self.read_into(self.data_start + entry.begin + lo * entry.dtype.width, out[: hi - lo])

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
