"""Encodings: the elements of a stored array <-> the stored bytes of its chunks (spec/encodings/).

Both tables are closed: `FILTERS` turn a chunk into planes, `CODERS` store a plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import Bits, Dtype
from ..errors import MalformedError, UnsupportedError
from ..limits import CHUNK_BYTES, MAX_INTEGER
from ..scratch import scratch
from ..strictjson import Record
from . import planes, segments, zstd

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
        values = _FIELDS(value, pointer)
        if (known_encoding := _SEEN.get((dtype.name, values))) is not None:
            return known_encoding
        filter_name, coder, chunk = values
        encoding = cls(filter_name, coder, chunk, _is_signed(dtype))
        if not 1 <= encoding.chunk <= MAX_INTEGER:
            raise MalformedError("not a chunk size", where=pointer, found=encoding.chunk, reason="schema")
        for name, known in ((encoding.filter, FILTERS), (encoding.coder, CODERS)):
            if name not in known:
                raise UnsupportedError(
                    f"unknown encoding {name!a}",
                    where=pointer,
                    hint=f"This version knows {', '.join(known)}",
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
        if len(_SEEN) < _MOST_SEEN:
            _SEEN[dtype.name, values] = encoding
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


_SEEN: dict[tuple[str, tuple[str, str, int]], Encoding] = {}  # a manifest has thousands of arrays and few encodings
_MOST_SEEN = 1000  # a hostile one may have a million


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
    """Encode the elements of one chunk.

    Args:
        bits: `[m]` elements as unsigned integers of their width.
        thorough: spend time on finding repeats, as in text.
        lengths: elements of each segment (`segments` only); as the encoding says if None.
        low_bits: how these segments are best packed, by `best_low_bits`; found out anew if None.

    Returns:
        The stored bytes of each plane (bytes-like, in order). Of a raw encoding they are `bits` itself, otherwise they
        share no memory with anything.
    """
    if encoding.is_raw:
        return [bits.view(np.uint8)]
    if encoding.filter == "segments":
        if lengths is None:
            step = encoding.segment or bits.size
            lengths = [min(step, bits.size - begin) for begin in range(0, bits.size, step)]
        return [segments.encode(bits, encoding.signed, lengths, low_bits)]
    if encoding.filter == "none":
        separated = bits.view(np.uint8).reshape(1, -1)
    else:
        separated = scratch("encode planes", np.uint8, bits.nbytes).reshape(bits.itemsize, -1)
        planes.split(bits, encoding.filter == "float-planes", list(separated))
    stored = zstd.compress(list(separated), thorough)
    return [plane.tobytes() if isinstance(plane, np.ndarray) else plane for plane in stored]


def best_low_bits(chunks: Sequence[tuple[Bits, Sequence[int]]], encoding: Encoding, effort: int = 1) -> list[int]:
    """How segments are best packed: takes long to find out, and is the same for chunks that are alike.

    Args:
        chunks: bits and lengths of some chunks, as `encode_chunk` gets them.
        effort: from 1; worth more the more chunks there will be.
    """
    return segments.best_low_bits(chunks, encoding.signed, effort)


def decode_chunk(stored: npt.NDArray[np.uint8], ends: Sequence[int], encoding: Encoding, out: Bits, where: str) -> None:
    """Decode one chunk (its checksum already checked) into `out`.

    Args:
        stored: the chunk's stored bytes.
        ends: where each plane ends in `stored`; the last is its length.
        out: `[m]` elements as unsigned integers.

    Raises:
        MalformedError: a plane does not come to its size (reason `chunk-size`).
    """
    if encoding.is_raw:
        if stored.size != out.nbytes:
            raise MalformedError(
                "a chunk has another size", where=where, expected=out.nbytes, found=stored.size, reason="chunk-size"
            )
        np.copyto(out.view(np.uint8), stored)
        return
    if encoding.filter == "segments":
        segments.decode(stored, encoding.signed, out, where)
        return
    size = out.nbytes if encoding.filter == "none" else out.size
    begins = (0, *ends[:-1])
    separated = zstd.decompress(
        [stored[begin:end] for begin, end in zip(begins, ends, strict=True)], [size] * len(ends), where
    )
    if encoding.filter == "none":
        np.copyto(out.view(np.uint8), separated[0])
    else:
        planes.merge(separated, encoding.filter == "float-planes", out)
