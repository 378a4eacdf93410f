"""Checksums and planes (spec/encodings/); rounding (spec/arithmetic.md) and `patch` on bit patterns."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from conformance.manifest import FLOATS, SIGNED_SMALL_FLOATS, WIDTH, Rejected, need

Bits = npt.NDArray[np.unsignedinteger[Any]]
Floats = npt.NDArray[np.floating[Any]]


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


def unsigned(data: bytes, width: int) -> Bits:
    return np.frombuffer(data, f"<u{width}")


def widen(dtype: str, data: bytes, accumulate: str) -> Floats:
    """Floats of any width as the accumulation type, ``<f4`` or ``<f8``, exactly."""
    exponent_bits, mantissa_bits = FLOATS[dtype]
    if dtype in ("F32", "F64"):
        return np.frombuffer(data, "<f4" if dtype == "F32" else "<f8").astype(accumulate)
    bits = unsigned(data, 2).astype(np.int64)
    largest, bias = (1 << exponent_bits) - 1, (1 << (exponent_bits - 1)) - 1
    exponent, mantissa = bits >> mantissa_bits & largest, bits & ((1 << mantissa_bits) - 1)
    significand = mantissa + np.where(exponent > 0, 1 << mantissa_bits, 0)
    value = np.ldexp(significand.astype("<f8"), np.maximum(exponent, 1) - bias - mantissa_bits)
    value = np.where(exponent == largest, np.where(mantissa > 0, np.nan, np.inf), value)
    return np.copysign(value, np.where(bits >> 15, -1.0, 1.0)).astype(accumulate)


def round_to(dtype: str, value: Floats) -> bytes:
    """Round to nearest, ties to even, from any float type: once, in integers, from the bits of the (wider) F64."""
    with np.errstate(invalid="ignore"):  # a signalling NaN is no trouble
        bits = value.astype("<f8").view("<u8").astype(np.int64)
    if dtype == "F64":
        return bits.astype("<u8").tobytes()
    exponent_bits, mantissa_bits = FLOATS[dtype]
    largest, bias = (1 << exponent_bits) - 1, (1 << (exponent_bits - 1)) - 1
    sign, source, mantissa = bits < 0, bits >> 52 & 0x7FF, bits & ((1 << 52) - 1)
    exponent = np.maximum(source, 1) - 1023 + bias
    normal = exponent >= 1
    exact = np.where(normal, (np.maximum(exponent, 0) << 52) + mantissa, mantissa + np.where(source > 0, 1 << 52, 0))
    shift = 52 - mantissa_bits + np.where(normal, 0, np.minimum(1 - exponent, 60 - 52 + mantissa_bits))
    kept, rest, half = exact >> shift, exact & ((1 << shift) - 1), 1 << (shift - 1)
    kept += (rest > half) | ((rest == half) & (kept & 1 == 1))
    kept = np.minimum(kept, largest << mantissa_bits)  # infinity
    nan = (source == 0x7FF) & (mantissa > 0)
    kept = np.where(nan, largest << mantissa_bits | 1 << (mantissa_bits - 1), kept)
    kept += sign.astype(np.int64) << (exponent_bits + mantissa_bits)
    return kept.astype(f"<u{WIDTH[dtype]}").tobytes()


def patch(dtype: str, prediction: tuple[str, bytes], residual: bytes) -> bytes:
    width = WIDTH[dtype]
    if prediction[0] != dtype:
        prediction = dtype, round_to(dtype, np.frombuffer(prediction[1], "<f4"))
    p, r = unsigned(prediction[1], width), unsigned(residual, width)
    one, top, ones = (np.array(x, f"<u{width}") for x in (1, 1 << (8 * width - 1), (1 << 8 * width) - 1))
    d = (r >> one) ^ (~(r & one) + one)
    if dtype not in FLOATS and dtype not in SIGNED_SMALL_FLOATS:
        return bytes(p + d)
    ordered = np.where(p & top, p ^ ones, p ^ top) + d
    return bytes(np.where(ordered & top, ordered ^ top, ordered ^ ones).astype(f"<u{width}"))


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
