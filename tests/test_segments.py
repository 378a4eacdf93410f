"""Filter `segments` (spec/encodings/segments.md): bytes written out by hand, a slow decoder, what must be refused."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from deltafmt import DeltafmtError, MalformedError
from deltafmt.dtypes import DTYPES
from deltafmt.encodings import (
    Encoding,
    StoredChunk,
    best_low_bits,
    decode_chunks,
    encode_chunk,
    encode_chunks,
    integers,
    residuals,
)
from hostile import Json

INTEGERS = ("U8", "U16", "U32", "U64", "I8", "I16", "I32", "I64")

pytestmark = pytest.mark.usefixtures("way")


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def encoding(dtype: str) -> Encoding:
    return Encoding.parse({"filter": "segments", "coder": "zstd", "chunk": 1 << 20}, "/encoding", DTYPES[dtype])


def decoded(chunk: bytes, dtype: str, count: int) -> list[int]:
    out = np.empty(count, DTYPES[dtype].bits)
    decode_chunks([StoredChunk(np.frombuffer(chunk, np.uint8), [len(chunk)], "here")], encoding(dtype), out)
    return out.view(DTYPES[dtype].values).tolist()  # type: ignore[no-any-return]


def encoded(values: npt.NDArray[Any], dtype: str, lengths: list[int] | None) -> bytes:
    (chunk,) = encode_chunk(values.view(DTYPES[dtype].bits), encoding(dtype), lengths=lengths)
    return bytes(chunk)


def slowly_decoded(chunk: bytes, dtype: str) -> list[int]:
    """As the page says, one element at a time, in Python's integers."""
    width = DTYPES[dtype].width
    (count,), at = struct.unpack_from("<I", chunk), 4
    segments = []
    for _ in range(count):
        n, kind = struct.unpack_from("<2I", chunk, at)
        segments.append((n, kind & 255, struct.unpack_from(f"<{kind >> 8}I", chunk, at + 8)))
        at += 8 + 4 * (kind >> 8)
    values: list[int] = []
    for n, b, stored in segments:
        elements = [0] * n
        for plane, length in enumerate(stored):
            size = n if plane else -(-n * b // 8)
            data = chunk[at : at + length]
            data = data if length == size else zstandard.ZstdDecompressor().decompress(data)
            assert len(data) == size
            at += length
            for i in range(n):
                if plane:
                    elements[i] += data[i] << (b + 8 * (plane - 1))
                else:
                    elements[i] += data[i * b // 8] >> (b * (i % (8 // b))) & ((1 << b) - 1)
        values += elements
    assert at == len(chunk)
    assert all(0 <= value < 256**width for value in values)
    return [(v >> 1) ^ -(v & 1) for v in values] if dtype.startswith("I") else values


KNOWN = {
    # 1 + 0*4 + 2*16 + 3*64 = 0xe1, 0 + 0 + 1*16 + 0 = 0x10
    "b = 2": ("U16", words(1, 8, 2 + 256, 2) + b"\xe1\x10", [1, 0, 2, 3, 0, 0, 1, 0]),
    # v = 0, 1, 2, 3: 0 + 1*16, 2 + 3*16
    "signed, b = 4": ("I8", words(1, 4, 4 + 256, 2) + b"\x10\x32", [0, -1, 1, -2]),
    "b = 1, bits left over": ("U8", words(1, 3, 1 + 256, 1) + b"\x05", [1, 0, 1]),
    # 511 = 1 + 255*2
    "b = 1, two planes": ("U16", words(1, 1, 1 + 512, 1, 1) + b"\x01\xff", [511]),
    "zeros, then b = 8": ("U16", words(2, 3, 1, 2, 8 + 512, 2, 2) + b"\x05\x01" + b"\x01\x00", [0, 0, 0, 261, 1]),
    # 40000 = 15-bit and more: 0 + 16*(2500 = 0x9c4)
    "b = 4, w + 1 planes": ("U16", words(1, 1, 4 + 768, 1, 1, 1) + b"\x00\xc4\x09", [40000]),
    # v of the least integer is 2^16 - 1
    "the least": ("I16", words(1, 2, 8 + 512, 2, 2) + b"\xff\x00" + b"\xff\x00", [-32768, 0]),
    "a plane of zeros in between": ("U32", words(1, 1, 8 + 768, 1, 1, 1) + b"\x00\x00\x01", [1 << 16]),
    "all zero": ("U64", words(1, 5, 1), [0] * 5),
}


@pytest.mark.parametrize(("dtype", "chunk", "values"), KNOWN.values(), ids=KNOWN)
def test_known_answer(dtype: str, chunk: bytes, values: list[int]) -> None:
    assert slowly_decoded(chunk, dtype) == values
    assert decoded(chunk, dtype, len(values)) == values


def test_encoder_writes_the_known_bytes() -> None:
    assert encoded(np.zeros(5, np.uint64), "U64", None) == words(1, 5, 1)
    assert encoded(np.array([1, 0, 1], np.uint8), "U8", [0, 3]) == words(1, 3, 1 + 256, 1) + b"\x05"


@given(st.data(), st.sampled_from(INTEGERS))
def test_round_trip(data: st.DataObject, dtype: str) -> None:
    lengths = data.draw(st.lists(st.integers(0, 100), min_size=1, max_size=5).filter(sum))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    top = 8 * DTYPES[dtype].width - (2 if dtype.startswith("I") else 1)
    sizes = [2.0 ** random.uniform(-4, top) * (random.random() > 0.2) for _ in lengths]
    parts = [random.normal(0, size, length) for size, length in zip(sizes, lengths, strict=True)]
    limits = np.iinfo(DTYPES[dtype].values)
    values = np.concatenate(parts).clip(limits.min, limits.max // 2).astype("i8" if limits.min else "f8")
    values = (values if limits.min else np.abs(values)).astype(DTYPES[dtype].values)
    chunk = encoded(values, dtype, lengths)
    assert len(chunk) <= values.nbytes + 64
    assert slowly_decoded(chunk, dtype) == values.tolist()
    assert decoded(chunk, dtype, values.size) == values.tolist()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_what_cannot_be_compressed_is_hardly_longer(dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, 1600 * DTYPES[dtype].width, np.uint8).view(DTYPES[dtype].values)
    chunk = encoded(values, dtype, [1] * values.size)
    assert len(chunk) <= values.nbytes + 64
    assert decoded(chunk, dtype, values.size) == values.tolist()


def test_symbols_of_less_than_a_bit() -> None:
    """One element in 100 is not zero: 0.08 bits of entropy each. A byte an element takes a bit at least."""
    values = (np.random.default_rng(0).random(1 << 16) < 0.01).astype(np.uint8)
    assert len(encoded(values, "U8", None)) < 0.2 * values.size / 8


def test_low_bits_learnt_from_some_chunks_serve_others() -> None:
    """Segments of zeros (0: not known), of rare ones (8 would waste a bit on each element), of large numbers.

    What is learnt is right: it takes hardly more than what each finds for itself.
    """
    random = np.random.default_rng(0)
    lengths = [100, 20_000, 20_000]
    chunks = [
        np.concatenate([np.zeros(100), random.random(20_000) < 0.1, random.geometric(0.05, 20_000)]).astype(np.uint16)
        for _ in range(3)
    ]
    low_bits = best_low_bits([(chunk, lengths) for chunk in chunks[:2]], encoding("U16"), 2)
    assert low_bits[0] == 0
    assert low_bits[1] < 8
    chunks[2][50] = 7  # where there were zeros only
    (learnt,) = encode_chunk(chunks[2], encoding("U16"), lengths=lengths, low_bits=low_bits)
    (by_itself,) = encode_chunk(chunks[2], encoding("U16"), lengths=lengths)
    assert slowly_decoded(bytes(learnt), "U16") == decoded(bytes(learnt), "U16", 40_100) == chunks[2].tolist()
    assert len(learnt) < 1.01 * len(by_itself)


def test_integer_factors_have_a_segment_each_row() -> None:
    rows = np.random.default_rng(0).normal(0, [[1000], [100], [1]], (3, 512)).astype(np.int16)
    (chunk,) = encode_chunk(rows.view(np.uint16).reshape(-1), integers(DTYPES["I16"], rows.shape))
    assert struct.unpack_from("<2I", chunk) == (3, 512)
    assert slowly_decoded(bytes(chunk), "I16") == rows.reshape(-1).tolist()
    short = integers(DTYPES["I16"], (6, 10))
    (chunk,) = encode_chunk(np.ones(60, np.uint16), short)
    assert struct.unpack_from("<2I", chunk) == (1, 60)


HOSTILE = {
    "nothing": b"",
    "three bytes": b"\x01\0\0",
    "no segment": words(0),
    "directory cut": words(1, 8),
    "lengths cut": words(1, 8, 8 + 512, 8),
    "a segment too many": words(2, 8, 8 + 256, 8) + bytes(8),
    "a segment too few": words(1, 8, 8 + 256, 8, 0, 1) + bytes(8),
    "too few elements": words(1, 7, 1),
    "too many elements": words(1, 9, 1),
    "many elements": words(2, 0xFFFFFFFF, 1, 9, 1),
    "an empty segment": words(2, 0, 1, 8, 1),
    "0 low bits": words(1, 8, 0),
    "3 low bits": words(1, 8, 3 + 256, 3) + bytes(3),
    "16 low bits": words(1, 8, 16 + 256, 16) + bytes(16),
    "low bits of zeros": words(1, 8, 8),
    "too many planes": words(1, 8, 8 + 4 * 256, 8, 8, 8, 8) + bytes(32),
    "very many planes": words(1, 8, 0xFFFFFF08),
    "a plane too long": words(1, 8, 8 + 256, 9) + bytes(9),
    "a plane too short": words(1, 8, 8 + 256, 7) + bytes(7),
    "an empty plane": words(1, 8, 8 + 256, 0),
    "a byte after": words(1, 8, 8 + 256, 8) + bytes(9),
    "a byte missing": words(1, 8, 8 + 256, 8) + bytes(7),
    "a long plane": words(1, 8, 8 + 256, 0xFFFFFFFF) + bytes(8),
    "bits left over": words(2, 3, 1 + 256, 1, 5, 1) + b"\x08",
    "beyond the width": words(1, 8, 4 + 768, 4, 8, 8) + bytes(12) + b"\x10" + bytes(7),
    "a plane beyond the width": words(1, 8, 8 + 768, 8, 8, 8) + bytes(16) + b"\x01" + bytes(7),
    "65,537 segments": words(65_537) + words(1, 1) * 65_537,
}


@pytest.mark.parametrize("chunk", HOSTILE.values(), ids=HOSTILE)
def test_hostile_chunk(chunk: bytes) -> None:
    with pytest.raises(DeltafmtError) as caught:
        decoded(chunk, "U16", 65_537 if len(chunk) > 65_537 else 8)
    assert caught.value.reason == "chunk-size"


@pytest.mark.parametrize(
    ("dtype", "coder", "accepted"),
    [*((dtype, "zstd", dtype in INTEGERS) for dtype in DTYPES), ("U8", "none", False)],
)
def test_dtypes_and_coder(dtype: str, coder: str, accepted: bool) -> None:
    value: Json = {"filter": "segments", "coder": coder, "chunk": 7}
    if accepted:
        found = Encoding.parse(value, "/encoding", DTYPES[dtype])
        assert found.to_json() == value
        assert found.planes(DTYPES[dtype]) == 1
        assert found.table_words(DTYPES[dtype], 15) == 6
        return
    with pytest.raises(DeltafmtError) as caught:
        Encoding.parse(value, "/encoding", DTYPES[dtype])
    assert caught.value.reason == "schema"


def test_residuals_are_cut_as_the_tensor_is() -> None:
    assert residuals(DTYPES["U16"], (1000, 384)).chunk % 384 == 0


# --- Several chunks in one step -------------------------------------------------------------------------------------

FOUR = [
    Encoding("segments", "zstd", 1000),
    Encoding("planes", "zstd", 1000),
    Encoding("none", "zstd", 1000),
    Encoding("none", "none", 1000),
]


def chunked(each: Encoding) -> tuple[npt.NDArray[np.uint16], list[StoredChunk]]:
    """Elements of four chunks, the last one short, encoded in one step."""
    values = np.random.default_rng(0).geometric(0.3, 3400).astype(np.uint16)
    lengths = [[400, 600], [0, 1000], [999, 1], [400]] if each.filter == "segments" else None
    chunks = [[bytes(plane) for plane in planes] for planes in encode_chunks(values, each, lengths=lengths)]
    for index, planes in enumerate(chunks):
        part = values[1000 * index : 1000 * (index + 1)]
        own = None if lengths is None else lengths[index]
        assert planes == [bytes(plane) for plane in encode_chunk(part, each, lengths=own)]
    return values, [
        StoredChunk(
            np.frombuffer(b"".join(planes), np.uint8), np.cumsum([*map(len, planes)]).tolist(), f"chunk {index}"
        )
        for index, planes in enumerate(chunks)
    ]


@pytest.mark.parametrize("each", FOUR, ids=lambda each: f"{each.filter}-{each.coder}")
def test_chunks_in_one_step_are_the_chunks_one_by_one(each: Encoding) -> None:
    values, chunks = chunked(each)
    out = np.empty_like(values)
    decode_chunks(chunks, each, out)
    assert np.array_equal(out, values)
    decode_chunks(chunks[1:3], each, out[:2000])
    assert np.array_equal(out[:2000], values[1000:3000])


@pytest.mark.parametrize("each", FOUR, ids=lambda each: f"{each.filter}-{each.coder}")
def test_of_several_chunks_the_damaged_one_is_named(each: Encoding) -> None:
    values, chunks = chunked(each)
    cut = chunks[2].stored[:-1]
    chunks[2] = chunks[2]._replace(stored=cut, ends=[*chunks[2].ends[:-1], cut.size])
    with pytest.raises(MalformedError, match="chunk 2") as caught:
        decode_chunks(chunks, each, np.empty_like(values))
    assert caught.value.reason == "chunk-size"
