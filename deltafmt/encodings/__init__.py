"""Encodings: the elements of a stored array <-> the stored bytes of its chunks (spec/encodings/).

Both tables are closed: `FILTERS` turn a chunk into planes, `CODERS` store a plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np

from ..dtypes import Bits, Dtype
from ..errors import MalformedError, UnsupportedError
from ..limits import CHUNK_BYTES, MAX_INTEGER
from ..records import Record
from ..scratch import scratch
from . import planes, segments, zstd
from .planes import Plane

FILTERS = ("none", "planes", "float-planes", "segments")
CODERS = ("none", "zstd")
CHUNK_ELEMENTS = 1 << 18
_SHORT_ROW = 256  # elements: a segment of its own costs some 40 bytes
_FIELDS = Record(filter=str, coder=str, chunk=int)


@dataclass(frozen=True)
class Encoding:
    """How one stored array is written.

    Attributes:
        filter: a name in `FILTERS`.
        coder: a name in `CODERS`.
        chunk: elements per chunk.
        signed: whether the elements are signed integers; follows from the array's dtype.
        segment: elements per segment, where a writer of `segments` is not told more; 0 for one segment a chunk.
    """

    filter: str
    coder: str
    chunk: int
    signed: bool = False
    segment: int = field(default=0, compare=False)

    @classmethod
    def parse(cls, value: object, pointer: str, dtype: Dtype) -> Encoding:
        """From the manifest's JSON. Raises `MalformedError` (schema, limit) or `UnsupportedError` (encoding)."""
        filter_name, coder, chunk = _FIELDS(value, pointer)
        encoding = cls(filter_name, coder, chunk, _is_signed(dtype))
        if not 1 <= encoding.chunk <= MAX_INTEGER:
            raise MalformedError("not a chunk size", where=pointer, found=encoding.chunk, reason="schema")
        for name, known in ((encoding.filter, FILTERS), (encoding.coder, CODERS)):
            if name not in known:
                raise UnsupportedError(
                    f"unknown encoding {name!a}",
                    where=pointer,
                    hint=f"This version knows {', '.join(known)}. {UnsupportedError.next_step}",
                    reason="encoding",
                )
        if encoding.coder == "none" and encoding.filter != "none":
            raise MalformedError("a filter without a coder", where=pointer, reason="schema")
        if encoding.filter == "float-planes" and not dtype.is_float:
            raise MalformedError(f"float-planes on {dtype.name}", where=pointer, reason="schema")
        if encoding.filter == "segments" and dtype.values.kind not in "iu":
            raise MalformedError(f"segments on {dtype.name}", where=pointer, reason="schema")
        if encoding.chunk * dtype.width > CHUNK_BYTES:
            raise MalformedError(
                "a chunk is too large",
                where=pointer,
                expected=f"at most {CHUNK_BYTES} bytes",
                found=encoding.chunk,
                reason="limit",
            )
        return encoding

    def to_json(self) -> dict[str, Any]:
        return {"filter": self.filter, "coder": self.coder, "chunk": self.chunk}

    @property
    def is_raw(self) -> bool:
        """Whether the shard holds the elements as they are, under their own dtype and shape."""
        return self.filter == "none" and self.coder == "none"

    def planes(self, dtype: Dtype) -> int:
        """Planes per chunk."""
        return 1 if self.filter in ("none", "segments") else dtype.width

    def longest(self, nbytes: int) -> int:
        """Bytes that a chunk may take of which the elements are `nbytes`."""
        return nbytes + segments.SLACK if self.filter == "segments" else nbytes

    def chunks(self, count: int) -> int:
        """Chunks of an array of `count` elements."""
        return -(-count // self.chunk)

    def table_words(self, dtype: Dtype, count: int) -> int:
        """Words that the array's rows take in the shard's chunk table."""
        return self.chunks(count) * (1 + self.planes(dtype))


def parse_encodings(values: Sequence[object], dtypes: Sequence[Dtype]) -> list[Encoding]:
    """`Encoding.parse` of many arrays, among which there are few encodings. Its errors do not say where."""
    keys = list(zip((dtype.name for dtype in dtypes), *_FIELDS.columns(values), strict=True))
    examples = dict(zip(keys, zip(values, dtypes, strict=True), strict=True))
    known = {key: Encoding.parse(value, "", dtype) for key, (value, dtype) in examples.items()}
    return [known[key] for key in keys]


def choose_chunk(shape: Sequence[int], width: int) -> int:
    """Elements per chunk for an array of this shape: about 256K, whole rows where rows are shorter than that."""
    row = shape[-1] if len(shape) > 1 else 1
    chunk = min(CHUNK_ELEMENTS, CHUNK_BYTES // width)
    return chunk // row * row if 0 < row <= chunk else chunk


def compressed(dtype: Dtype, shape: Sequence[int]) -> Encoding:
    """The encoding that suits weights and residuals of this dtype."""
    return Encoding("float-planes" if dtype.is_float else "planes", "zstd", choose_chunk(shape, dtype.width))


def raw(dtype: Dtype, shape: Sequence[int]) -> Encoding:
    """The encoding that stores the elements as they are."""
    return Encoding("none", "none", choose_chunk(shape, dtype.width))


def residuals(dtype: Dtype, shape: Sequence[int]) -> Encoding:
    """The encoding of residuals in groups: unsigned integers, in segments that are told chunk by chunk."""
    return Encoding("segments", "zstd", choose_chunk(shape, dtype.width))


def integers(dtype: Dtype, shape: Sequence[int]) -> Encoding:
    """The encoding that suits integer factors: each row has its own segment, unless rows are short."""
    chunk = choose_chunk(shape, dtype.width)
    row = shape[-1] if len(shape) > 1 else 0
    return Encoding("segments", "zstd", chunk, _is_signed(dtype), row if _SHORT_ROW <= row <= chunk else 0)


def _is_signed(dtype: Dtype) -> bool:
    return dtype.values.kind == "i"


def encode_chunk(
    bits: Bits,
    encoding: Encoding,
    thorough: bool = False,
    lengths: Sequence[int] | None = None,
    low_bits: Sequence[int] | None = None,
) -> list[Any]:
    """Encode the elements of one chunk: see `encode_chunks`."""
    return _encode([bits], bits, encoding, thorough, None if lengths is None else [lengths], low_bits)[0]


def encode_chunks(
    bits: Bits,
    encoding: Encoding,
    thorough: bool = False,
    lengths: Sequence[Sequence[int]] | None = None,
    low_bits: Sequence[int] | None = None,
) -> list[list[Any]]:
    """Encode the elements of chunks that follow one another, all together: between calls, threads wait for each other.

    Args:
        bits: `[m]` elements as unsigned integers of their width; of each chunk as many as the encoding says, but of the
            last.
        thorough: spend time on finding repeats, as in text.
        lengths: of each chunk the elements of each segment (`segments` only); as the encoding says if None.
        low_bits: how these segments are best packed, by `best_low_bits`; found out anew if None.

    Returns:
        Of each chunk the stored bytes of each plane (bytes-like, in order). Of a raw encoding they are `bits` itself,
        otherwise they share no memory with anything.
    """
    parts = [bits[begin : begin + encoding.chunk] for begin in range(0, bits.size, encoding.chunk)]
    return _encode(parts, bits, encoding, thorough, lengths, low_bits)


def _encode(
    parts: Sequence[Bits],
    bits: Bits,
    encoding: Encoding,
    thorough: bool,
    lengths: Sequence[Sequence[int]] | None,
    low_bits: Sequence[int] | None,
) -> list[list[Any]]:
    if encoding.is_raw:
        return [[part.view(np.uint8)] for part in parts]
    if encoding.filter == "segments":
        of_chunks = lengths or [_even(part.size, encoding.segment or part.size) for part in parts]
        return [[chunk] for chunk in segments.encode(bits, encoding.signed, of_chunks, low_bits)]
    if encoding.filter == "none":
        separated = [part.view(np.uint8) for part in parts]
    else:
        room = scratch("encode planes", np.uint8, bits.nbytes)
        separated = []
        for part in parts:
            own = list(room[: part.nbytes].reshape(bits.itemsize, -1))
            room = room[part.nbytes :]
            planes.split(part, encoding.filter == "float-planes", own)
            separated += own
    stored = iter(zstd.compress(separated, thorough))
    each = len(separated) // max(len(parts), 1)
    return [
        [plane.tobytes() if isinstance(plane, np.ndarray) else plane for plane in islice(stored, each)] for _ in parts
    ]


def _even(count: int, length: int) -> list[int]:
    return [min(length, count - begin) for begin in range(0, count, length)]


def best_low_bits(chunks: Sequence[tuple[Bits, Sequence[int]]], encoding: Encoding, effort: int = 1) -> list[int]:
    """How segments are best packed: takes long to find out, and is the same for chunks that are alike.

    Args:
        chunks: bits and lengths of some chunks, as `encode_chunk` gets them.
        effort: from 1; worth more the more chunks there will be.
    """
    return segments.best_low_bits(chunks, encoding.signed, effort)


class StoredChunk(NamedTuple):
    """One chunk as it is stored, its checksum already checked.

    Attributes:
        stored: the bytes of its planes.
        ends: where each plane ends in them; the last is their number.
        where: what to call it in an error.
    """

    stored: Plane
    ends: Sequence[int]
    where: str


def decode_chunks(chunks: Sequence[StoredChunk], encoding: Encoding, out: Bits) -> None:
    """Decode chunks that follow one another, all together: between calls, threads wait for each other.

    Args:
        out: `[m]` elements as unsigned integers; of each chunk as many as the encoding says, but of the last.

    Raises:
        MalformedError: a plane does not come to its size (reason `chunk-size`).
    """
    size = encoding.chunk if len(chunks) > 1 else out.size
    parts = [out[begin : begin + size] for begin in range(0, out.size, size)]
    try:
        _decode(chunks, encoding, out, parts)
    except MalformedError:
        for chunk, part in zip(chunks, parts, strict=True):
            _decode([chunk], encoding, part, [part])  # raises for the one that it is
        raise


def _decode(chunks: Sequence[StoredChunk], encoding: Encoding, out: Bits, parts: Sequence[Bits]) -> None:
    where = chunks[0].where
    if encoding.is_raw:
        for chunk, part in zip(chunks, parts, strict=True):
            if chunk.stored.size != part.nbytes:
                what = "a chunk has another size"
                found = chunk.stored.size
                raise MalformedError(what, where=where, expected=part.nbytes, found=found, reason="chunk-size")
            np.copyto(part.view(np.uint8), chunk.stored)
        return
    if encoding.filter == "segments":
        segments.decode([chunk.stored for chunk in chunks], encoding.signed, parts, out, where)
        return
    stored = [chunk.stored[begin:end] for chunk in chunks for begin, end in pairwise([0, *chunk.ends])]
    sizes = [part.nbytes // len(chunk.ends) for chunk, part in zip(chunks, parts, strict=True) for _ in chunk.ends]
    separated = iter(zstd.decompress(stored, sizes, where))
    for chunk, part in zip(chunks, parts, strict=True):
        own = list(islice(separated, len(chunk.ends)))
        if encoding.filter == "none":
            np.copyto(part.view(np.uint8), own[0])
        else:
            planes.merge(own, encoding.filter == "float-planes", part)
