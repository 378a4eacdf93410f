"""Coder `zstd`: one plane of one chunk <-> one frame (spec/encodings/zstd.md)."""

from __future__ import annotations

import threading
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


class _Contexts(threading.local):
    """zstd contexts are not thread-safe and not cheap: one of each per thread."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.thorough = zstandard.ZstdCompressor(level=19)
        self.decompressor = zstandard.ZstdDecompressor()


_CONTEXTS = _Contexts()


def compress(plane: Plane, thorough: bool = False) -> Any:
    """The frame, or the plane itself where the frame would not be shorter; both are bytes-like.

    `thorough` is for text: slow, looks for repeats.
    """
    if not thorough and _looks_random(plane):
        return plane
    frame = (_CONTEXTS.thorough if thorough else _CONTEXTS.compressor).compress(plane.data)
    return frame if len(frame) < plane.size else plane


def _looks_random(plane: Plane) -> bool:
    """Whether a sample of the plane shows (nearly) all byte values equally often, as mantissas do: not worth a try."""
    if plane.size < 8 * _SAMPLE:
        return False
    blocks = plane[: plane.size // 8 * 8].reshape(8, -1)[:, : _SAMPLE // 8]
    counts = np.bincount(blocks.ravel(), minlength=256)
    share = counts[counts > 0] / _SAMPLE
    return bool(-(share * np.log2(share)).sum() > 7.9)  # uniform bytes: 7.955 +- 0.004 in a sample of this size


def decompress(stored: Plane, size: int, where: str) -> Plane:
    """Decode one stored plane: `size` bytes, a view of `stored` where it is stored as it is.

    Raises `MalformedError` (reason `chunk-size`).
    """
    if stored.size == size:
        return stored
    try:
        frame = zstandard.get_frame_parameters(stored.data)
        declared = frame.content_size
        if declared != size or frame.dict_id or stored.size > size or bytes(stored[:3]) != b"\x28\xb5\x2f":
            raise _wrong_size(where, size, declared)
        plane = _CONTEXTS.decompressor.decompress(stored.data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        what = f"a compressed plane does not decode: {error}"
        raise MalformedError(what, where=where, reason="chunk-size") from error
    if len(plane) != size:
        raise _wrong_size(where, size, len(plane))
    return np.frombuffer(plane, np.uint8)


def _wrong_size(where: str, expected: int, found: int) -> MalformedError:
    what = "a compressed plane has another size"
    return MalformedError(what, where=where, expected=expected, found=found, reason="chunk-size")
