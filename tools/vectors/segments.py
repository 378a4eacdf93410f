"""The encoding `segments` (spec/encodings/segments.md), written out in Python's integers.

Shares no code with the package or any reader.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vectors.values import WIDTH


class Segment(NamedTuple):
    """How many elements, and how many low bits; ``planes``: how many to store, None for as few as hold them."""

    length: int
    low: int = 1
    planes: int | None = None


def segment_planes(elements: Sequence[int], segment: Segment, dtype: str) -> tuple[int, list[bytes]]:
    """The low bits and the planes, not yet coded, of elements given as bit patterns."""
    size, low = 8 * WIDTH[dtype], segment.low
    values = list(elements)
    if dtype.startswith("I"):
        values = [((x << 1) ^ -(x >> size - 1)) % (1 << size) for x in elements]
    packed = bytearray(-(-len(values) * low // 8))
    for i, v in enumerate(values):
        packed[i * low // 8] |= (v % (1 << low)) << i * low % 8
    planes = [bytes(packed), *(bytes(v >> low + 8 * j & 255 for v in values) for j in range(WIDTH[dtype]))]
    needed = max((j + 1 for j, plane in enumerate(planes) if any(plane)), default=0)
    count = needed if segment.planes is None else segment.planes
    assert needed <= count
    return low if count else 1, planes[:count]


def segmented(
    elements: Sequence[int], dtype: str, segments: Sequence[Segment], store: Callable[[bytes], bytes]
) -> bytes:
    """A chunk."""
    directory, data, at = [len(segments)], b"", 0
    for segment in segments:
        low, planes = segment_planes(elements[at : at + segment.length], segment, dtype)
        at += segment.length
        stored = [store(plane) for plane in planes]
        directory += [segment.length, low + 256 * len(planes), *map(len, stored)]
        data += b"".join(stored)
    assert at == len(elements)
    return struct.pack(f"<{len(directory)}I", *directory) + data


def of_lengths(lengths: Sequence[int], lows: Sequence[int] = (1, 2, 4, 8)) -> list[Segment]:
    """Segments of these lengths, with these low bits in turn; none for a length of 0."""
    return [Segment(n, lows[i % len(lows)]) for i, n in enumerate(lengths) if n]


def of_groups(elements: Sequence[int], dtype: str, lengths: Sequence[int], store: Callable[[bytes], bytes]) -> bytes:
    """A chunk with a segment a group, or with one of all where the directory would be too long."""
    chunk = segmented(elements, dtype, of_lengths(lengths), store)
    return (
        chunk
        if len(chunk) <= longest(elements, dtype)
        else segmented(elements, dtype, [Segment(len(elements), 8)], store)
    )


def longest(elements: Sequence[int], dtype: str) -> int:
    """How long a chunk of these elements may be."""
    return len(elements) * WIDTH[dtype] + 64
