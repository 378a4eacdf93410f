"""Valid cases of the encoding `segments`."""

from __future__ import annotations

from vectors.draft import Draft
from vectors.segments import Segment, of_lengths
from vectors.valid import misses, valid
from vectors.values import WIDTH, Tensor, bits, noise, tensor, words

INTEGERS = ("U8", "U16", "U32", "U64", "I8", "I16", "I32", "I64")


def small(label: str, dtype: str, count: int, scale: int = 1) -> Tensor:
    """Integers near 0, of both signs if the dtype has them."""
    size, signed = 8 * WIDTH[dtype], dtype.startswith("I")
    values = [scale * d if signed else 2 * scale * abs(d) + (d < 0) for d in misses(label, count)]
    return bits(dtype, *(v % (1 << size) for v in values))


@valid(
    "segments of every integer dtype: 1, 2, 4, 8 low bits, lengths that fill no byte, zeros, noise, extremes, 3 chunks"
)
def segments_integers() -> Draft:
    draft = Draft()
    for dtype in INTEGERS:
        size = 8 * WIDTH[dtype]
        extremes = [0, 1, (1 << size) - 1, 1 << size - 1, (1 << size - 1) - 1, (1 << size) - 2, 0, 5]
        near = words(small(dtype, dtype, 122))
        noisy, zeros = words(tensor("noise" + dtype, dtype, 79)), [0] * 60
        t = bits(
            dtype, *extremes, *near[:92], *zeros, *near[92:], *zeros[:31], *noisy[:39], *zeros, *noisy[39:], *zeros
        )
        chunks = (
            of_lengths([8, 1, 7, 41, 43, 60]),
            of_lengths([30, 31, 39, 60], [8, 1, 2, 1]),
            of_lengths([17, 1, 22, 60], [4, 1, 8, 1]),
        )
        draft.segments(f"{dtype}#stored", t, 160, *chunks)
        draft.exact(dtype, t, {"op": "stored", "array": f"{dtype}#stored"})
    return draft


@valid("segments of noise: all planes of all low bits, the last plane in part; with 8 low bits it holds zeros only")
def segments_full() -> Draft:
    draft = Draft()
    for dtype in INTEGERS:
        for low in (1, 2, 4, 8):
            t = tensor(f"full {dtype} {low}", dtype, 11)
            draft.exact(
                f"{dtype}.{low}", t, draft.segments(f"{dtype}.{low}", t, 11, [Segment(11, low, WIDTH[dtype] + 1)])
            )
    return draft


@valid("segments whose planes of zeros are stored, which no writer needs to do")
def segments_stored_zeros() -> Draft:
    draft = Draft()
    for planes in range(4):
        t = bits("I16", *[0] * 20)
        segments = [Segment(9, 2 if planes else 1, planes), Segment(11, 8 if planes else 1, planes)]
        draft.exact(f"zeros.{planes}", t, draft.segments(f"zeros.{planes}", t, 20, segments))
    return draft


@valid("many segments: 700 in a chunk of 10,000 elements, of one element up to 26; most of them of zeros")
def segments_many() -> Draft:
    draft = Draft()
    lengths = [1 + i % 26 for i in range(740)]
    values, segments = [], []
    for number, length in enumerate(lengths):
        stored = number % 7 == 0
        values += list(noise(f"many {number}", length)) if stored else [0] * length
        segments.append(Segment(length, (1, 2, 4, 8)[number % 4]))
    t = bits("U32", *values)
    draft.exact("w", t, draft.segments("w", t, len(values), segments))
    return draft


@valid("segments with real zstd frames (Huffman), frames of one repeated byte, and raw planes in one chunk")
def segments_zstd() -> Draft:
    draft = Draft()
    for dtype in ("U16", "I8", "I32"):
        t = small(f"{dtype} framed", dtype, 1300)
        constant, raw = bits(dtype, *[77] * 300), tensor(f"{dtype} raw", dtype, 50)
        whole = Tensor(dtype, [1650], t.data + constant.data + raw.data)
        segments = of_lengths([700, 600, 300, 50], [1, 2, 4, 8])
        draft.exact(dtype, whole, draft.segments(dtype, whole, 2000, segments))
    return draft


@valid(
    "integer factors, a segment a component; a 0-d array, an array without elements, and an original header as segments"
)
def segments_places() -> Draft:
    draft = Draft()
    factor = small("factor", "I16", 4 * 60, 3)._replace(shape=[4, 60])
    draft.exact("factor", factor, draft.segments("factor", factor, 120, of_lengths([60, 60]), of_lengths([60, 60])))
    scalar, empty = bits("I64", 2**63)._replace(shape=[]), Tensor("U32", [0, 3], b"")
    draft.exact("scalar", scalar, draft.segments("scalar", scalar, 1, [Segment(1, 4)]))
    draft.exact("empty", empty, draft.segments("empty", empty, 7))
    header = draft.originals()["model.safetensors"][0]
    text = Tensor("U8", [len(header)], header)
    draft.segments("header of model.safetensors", text, 1000, [Segment(20, 4), Segment(len(header) - 20, 8)])
    return draft


@valid("a chunk that is 64 bytes longer than its elements, the most that is allowed")
def segments_longest() -> Draft:
    draft = Draft()
    t = bits("U16", *[3, 2] * 10, *[0] * 30)
    node = draft.segments("w", t, 64, [Segment(20, 8), *[Segment(1)] * 15, Segment(15)])
    assert len(draft.arrays["w"].data) == len(t.data) + 64
    draft.exact("w", t, node)
    return draft
