"""Coder `zstd`: one plane of one chunk <-> one frame (spec/encodings/zstd.md)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard

from ..errors import MalformedError
from .planes import Plane

# In effect Huffman coding alone: a tiny hash table and long matches, so that almost no time goes into looking for
# repeats, which exponents and mantissas do not have. Runs of zeros are still found. Measured on real exponents: smaller
# than levels 1 to 3, and 2 to 5 times faster.
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(
    1,
    strategy=zstandard.STRATEGY_FAST,
    hash_log=6,
    min_match=7,
    window_log=18,
    write_content_size=True,
    write_checksum=False,
)
_SAMPLE = 4096
_MOST_BLOCKS = 1000  # of 128 KiB, as a rule; what has more is decoded by itself
_FEW_FRAMES = 4  # frames; setting up the decoding of many at once takes as long as decoding these
_REPEATED = 1  # the kind of a block that is one byte, many times over
_HAS_BATCHES = {"multi_compress_to_buffer", "multi_decompress_to_buffer"} <= zstandard.backend_features


class _Contexts(threading.local):
    """zstd contexts are not thread-safe and not cheap: one of each per thread."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.thorough = zstandard.ZstdCompressor(level=19)
        self.decompressor = zstandard.ZstdDecompressor()


_CONTEXTS = _Contexts()


def compress(planes: Sequence[Plane], thorough: bool = False) -> list[Any]:
    """Of each plane the frame, or the plane itself where the frame would not be shorter; all are bytes-like.

    In one step where there is one: a thread that goes in and out of zstd holds the others up. `thorough` is for text:
    slow, looks for repeats.
    """
    stored: list[Any] = list(planes)
    tried = [index for index, plane in enumerate(planes) if thorough or not _looks_random(plane)]
    compressor = _CONTEXTS.thorough if thorough else _CONTEXTS.compressor
    if thorough or not _HAS_BATCHES:
        frames: Any = [compressor.compress(planes[index].data) for index in tried]
    else:
        batch: Any = [planes[index] for index in tried]
        frames = compressor.multi_compress_to_buffer(batch) if tried else []
    for index, frame in zip(tried, frames, strict=True):
        if len(frame) < planes[index].size:
            stored[index] = bytes(frame)
    return stored


def _looks_random(plane: Plane) -> bool:
    """Whether the plane is empty, or a sample shows all byte values equally often, as mantissas do: not worth a try."""
    if plane.size < 8 * _SAMPLE:
        return plane.size == 0
    blocks = plane[: plane.size // 8 * 8].reshape(8, -1)[:, : _SAMPLE // 8]
    counts = np.bincount(blocks.ravel(), minlength=256)
    share = counts[counts > 0] / _SAMPLE
    return bool(-(share * np.log2(share)).sum() > 7.9)  # uniform bytes: 7.955 +- 0.004 in a sample of this size


def decompress(stored: Sequence[Plane], sizes: Sequence[int], where: str) -> list[Plane]:
    """Decode stored planes of these sizes, more than a few in one step, where there is one; what is stored as it is is
    a view.

    Raises `MalformedError` (reason `chunk-size`).
    """
    planes = list(stored)
    packed = [index for index, (plane, size) in enumerate(zip(stored, sizes, strict=True)) if plane.size != size]
    try:
        together: list[int] = []
        for index in packed:
            frame, size = stored[index].data, sizes[index]
            header = _header(frame, size, where)
            if _HAS_BATCHES and len(packed) > _FEW_FRAMES and _is_whole(frame, header):
                together.append(index)
            else:
                data = _CONTEXTS.decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
                planes[index] = np.frombuffer(data, np.uint8)
        if together:
            wanted = np.array([sizes[index] for index in together], np.uint64)
            frames: Any = [stored[index] for index in together]
            found: Any = _CONTEXTS.decompressor.multi_decompress_to_buffer(frames, decompressed_sizes=wanted.tobytes())
            for index, buffer in zip(together, found, strict=True):
                planes[index] = np.frombuffer(buffer, np.uint8)
    except zstandard.ZstdError as error:
        what = f"a compressed plane does not decode: {error}"
        raise MalformedError(what, where=where, reason="chunk-size") from error
    for plane, size in zip(planes, sizes, strict=True):
        if plane.size != size:
            raise _wrong_size(where, size, plane.size)
    return planes


def _header(frame: memoryview, size: int, where: str) -> Any:
    """The header of one frame that says of itself that it holds `size` bytes: see spec/encodings/zstd.md."""
    header = zstandard.get_frame_parameters(frame)
    if header.content_size != size or header.dict_id or len(frame) > size or bytes(frame[:3]) != b"\x28\xb5\x2f":
        raise _wrong_size(where, size, header.content_size)
    return header


def _is_whole(frame: memoryview, header: Any) -> bool:
    """Whether the frame ends where its bytes do, as far as a few blocks can tell; decoding many at once is lenient.

    Blocks say whether they are the last, of what kind they are, and how long (RFC 8878).
    """
    position, length = zstandard.frame_header_size(frame), len(frame)
    for _ in range(_MOST_BLOCKS):
        if position + 3 > length:
            return False
        word = frame[position] | frame[position + 1] << 8 | frame[position + 2] << 16
        position += 3 + (1 if word >> 1 & 3 == _REPEATED else word >> 3)
        if word & 1:
            return bool(position + 4 * header.has_checksum == length)
    return False


def _wrong_size(where: str, expected: int, found: int) -> MalformedError:
    what = "a compressed plane has another size"
    return MalformedError(what, where=where, expected=expected, found=found, reason="chunk-size")
