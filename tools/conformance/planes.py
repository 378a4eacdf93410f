"""Checksums of chunks, and how a chunk's stored bytes become elements (spec/encodings/)."""

from __future__ import annotations

import struct

import numpy as np
import zstandard

from conformance.manifest import WIDTH, Rejected, need


def xxh64(data: bytes) -> int:
    """XXH64 with seed 0 (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md)."""
    mask = 2**64 - 1
    p1, p2, p3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
    p4, p5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5

    def rotate(x: int, r: int) -> int:
        return (x << r | x >> (64 - r)) & mask

    def step(lane: int, word: int) -> int:
        return rotate((lane + word * p2) & mask, 31) * p1 & mask

    at, h = 0, p5
    if len(data) >= 32:
        lanes = [(p1 + p2) & mask, p2, 0, -p1 & mask]
        for at in range(0, len(data) - 31, 32):
            lanes = [step(lane, word) for lane, word in zip(lanes, struct.unpack_from("<4Q", data, at), strict=True)]
        at += 32
        h = sum(rotate(lane, r) for lane, r in zip(lanes, (1, 7, 12, 18), strict=True)) & mask
        for lane in lanes:
            h = ((h ^ step(0, lane)) * p1 + p4) & mask
    h = (h + len(data)) & mask
    while at + 8 <= len(data):
        h = (rotate(h ^ step(0, int.from_bytes(data[at : at + 8], "little")), 27) * p1 + p4) & mask
        at += 8
    if at + 4 <= len(data):
        h = (rotate(h ^ int.from_bytes(data[at : at + 4], "little") * p1 & mask, 23) * p2 + p3) & mask
        at += 4
    for byte in data[at:]:
        h = rotate(h ^ byte * p5 & mask, 11) * p1 & mask
    h = (h ^ h >> 33) * p2 & mask
    h = (h ^ h >> 29) * p3 & mask
    return h ^ h >> 32


def decode_plane(stored: bytes, size: int, coder: str, where: str) -> bytes:
    if len(stored) == size:
        return stored
    need(coder == "zstd" and 6 <= len(stored) < size, "chunk-size", f"{where}: {len(stored)} bytes stored for {size}")
    descriptor = stored[4]  # RFC 8878, 3.1.1: frame header descriptor, window, dictionary id, content size
    single, kind = descriptor >> 5 & 1, descriptor >> 6
    length = (1 if single else 0, 2, 4, 8)[kind]
    field = stored[6 - single : 6 - single + length]
    declared = int.from_bytes(field, "little") + (256 if kind == 1 else 0)
    plain = stored[:4] == b"\x28\xb5\x2f\xfd" and descriptor & 3 == 0
    need(plain and length and declared == size, "chunk-size", f"{where}: not a zstd frame of {size} bytes")
    try:
        plane = zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Rejected("chunk-size", f"{where}: {error}") from error
    need(len(plane) == size, "chunk-size", f"{where}: {len(plane)} bytes instead of {size}")
    return plane


def unfilter(planes: list[bytes], filter_: str, width: int) -> bytes:
    """The elements of a chunk from its planes: filters `none`, `planes`, `float-planes`."""
    if filter_ == "none":
        return planes[0]
    big_endian = np.stack([np.frombuffer(plane, np.uint8) for plane in planes], axis=1).tobytes()
    elements = np.frombuffer(big_endian, f">u{width}").astype(np.uint64)
    if filter_ == "float-planes":  # the upper 16 bits: plane 0, then the sign, then what plane 1 has below it
        below = np.uint64(8 * width - 16)
        high, low = elements >> below, elements & ((np.uint64(1) << below) - np.uint64(1))
        exponent, sign, rest = high >> np.uint64(8), high & np.uint64(0x80), high & np.uint64(0x7F)
        elements = (sign << np.uint64(8) | exponent << np.uint64(7) | rest) << below | low
    return elements.astype(f"<u{width}").tobytes()


def unsegment(stored: bytes, count: int, dtype: str, where: str) -> bytes:
    """The ``count`` elements of a chunk with filter `segments`: one after another, in Python's integers."""
    width, at = WIDTH[dtype], 0

    def word() -> int:
        nonlocal at
        need(at + 4 <= len(stored), "chunk-size", f"{where}: the directory is cut off")
        at += 4
        return int.from_bytes(stored[at - 4 : at], "little")

    need(len(stored) <= count * width + 64, "chunk-size", f"{where}: {len(stored)} bytes for {count} elements")
    number_of_segments = word()
    need(number_of_segments <= 65_536, "chunk-size", f"{where}: {number_of_segments} segments")
    segments: list[tuple[int, int, list[int]]] = []
    for _ in range(number_of_segments):
        n, kind = word(), word()
        low, planes = kind % 256, kind // 256
        need(n >= 1 and low in (1, 2, 4, 8) and planes <= width + 1, "chunk-size", f"{where}: a segment {n}, {kind}")
        need(planes or low == 1, "chunk-size", f"{where}: {low} low bits of a segment without planes")
        segments.append((n, low, [word() for _ in range(planes)]))
    need(sum(n for n, _, _ in segments) == count, "chunk-size", f"{where}: segments are not of {count} elements")
    total = sum(sum(lengths) for _, _, lengths in segments)
    need(at + total == len(stored), "chunk-size", f"{where}: planes of {total} bytes behind {at} of {len(stored)}")
    data = b""
    for n, low, lengths in segments:
        values = [0] * n
        for number, length in enumerate(lengths):
            size = n if number else -(-n * low // 8)
            plane = decode_plane(stored[at : at + length], size, "zstd", where)
            at += length
            for i in range(n):
                if number:
                    values[i] += plane[i] << (low + 8 * (number - 1))
                else:
                    values[i] = plane[i * low // 8] >> (i * low % 8) & (1 << low) - 1
            left_over = plane[-1] >> (n * low % 8) if number == 0 and n * low % 8 else 0
            need(left_over == 0, "chunk-size", f"{where}: bits left over that are not 0")
        need(max(values) < 1 << 8 * width, "chunk-size", f"{where}: an element of more than {8 * width} bits")
        if dtype.startswith("I"):
            values = [-(v + 1 >> 1) if v & 1 else v >> 1 for v in values]
        data += b"".join(x.to_bytes(width, "little", signed=dtype.startswith("I")) for x in values)
    return data
