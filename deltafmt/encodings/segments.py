"""Filter `segments`: runs of alike elements, several small symbols to a byte (spec/encodings/segments.md).

A Huffman coder spends at least one bit on a symbol. Packed by four or eight, symbols of far less than a bit can be
coded by it; and each segment has its own code table, so that what is known of its elements beforehand is not paid for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, islice, pairwise
from typing import Any, NamedTuple

import numpy as np

from .. import native
from ..dtypes import Bits
from ..errors import MalformedError
from ..scratch import scratch
from . import zstd
from .planes import Plane

SLACK = 64
"""A chunk is at most this many bytes longer than its elements."""

_MOST = 65_536  # segments of a chunk
_LOW_BITS = (1, 2, 4, 8)
_SAMPLE = 2048  # elements that are coded in every way to find the best: the tables of the others are lost on them
_WORD = np.dtype("<u4")
_PROBLEMS: dict[native.Problem, str] = {
    "bits left over": "bits behind the last symbol of a segment",
    "too large": "an element of a segment that is too large",
}


class _Kind(NamedTuple):
    """How one segment is packed."""

    elements: int
    low_bits: int
    planes: int

    def plane_size(self, index: int) -> int:
        return -(-self.elements * self.low_bits // 8) if index == 0 else self.elements


def _columns(kinds: Sequence[_Kind]) -> tuple[list[int], list[int], list[int]]:
    """Elements, low bits and planes of each segment."""
    return [kind.elements for kind in kinds], [kind.low_bits for kind in kinds], [kind.planes for kind in kinds]


# Writing


def encode(
    bits: Bits, signed: bool, lengths: Sequence[Sequence[int]], low_bits: Sequence[int] | None = None
) -> list[bytes]:
    """Some chunks.

    Args:
        bits: `[m]` elements as unsigned integers of their width.
        signed: whether they stand for signed integers.
        lengths: of each chunk the elements of each segment; the sum of all is `m`. Empty segments are left out.
        low_bits: of each segment, what `best_low_bits` found for elements like these; if None, found anew for each.
    """
    values = _fold(bits) if signed else bits
    parts = _cut(values, [sum(of_chunk) for of_chunk in lengths])
    best = [low_bits or best_low_bits([chunk], signed=False) for chunk in zip(parts, lengths, strict=True)]
    chunks = _encode(values, lengths, best)
    return [
        chunk if len(chunk) <= part.nbytes + SLACK else _encode(part, [[part.size]], [[8]])[0]
        for chunk, part in zip(chunks, parts, strict=True)
    ]


def best_low_bits(chunks: Sequence[tuple[Bits, Sequence[int]]], signed: bool, effort: int = 1) -> list[int]:
    """For each segment the number of low bits that suits it best in some chunks; 0 if none is known.

    A sample of each is packed in every way that makes sense, and coded, all of them together.

    Args:
        chunks: `bits` and `lengths` of each, as in `encode`.
        signed: as in `encode`.
        effort: how large samples are.
    """
    cut = [_cut(_fold(bits) if signed else bits, lengths) for bits, lengths in chunks]
    alike = [[part for part in parts if part.size] for parts in zip(*cut, strict=True)]
    best = [0] * len(alike)
    filled = [index for index, parts in enumerate(alike) if parts]
    if not filled:
        return best
    sampled = [_sample(alike[index], effort * _SAMPLE) for index in filled]
    sizes = [sum(part.size for part in parts) for parts in sampled]
    together = np.concatenate(list(chain.from_iterable(sampled)))
    ways, longest = _ways(together, sizes), _longest(together, sizes)
    tried = [
        (sample, _Kind(sample.size, bits, _plane_count(most, bits)))
        for sample, of_sample, most in zip(_cut(together, sizes), ways, longest, strict=True)
        for bits in of_sample
    ]
    if not tried:
        return best
    kinds = [kind for _, kind in tried]
    planes = iter(zstd.compress(_split(np.concatenate([sample for sample, _ in tried]), kinds)))
    coded = iter([sum(map(len, islice(planes, kind.planes))) for kind in kinds])
    for index, of_sample in zip(filled, ways, strict=True):
        best[index] = min(zip(islice(coded, len(of_sample)), of_sample, strict=True), default=(0, 0))[1]
    return best


def _sample(parts: Sequence[Bits], elements: int) -> list[Bits]:
    """About so many elements of these parts, evenly."""
    step = max(sum(part.size for part in parts) // elements, 1)
    return [part[::step] for part in parts]


def _ways(values: Bits, sizes: Sequence[int]) -> list[Sequence[int]]:
    """The numbers of low bits that may suit samples of these sizes, one behind the other."""
    begins = list(accumulate(sizes, initial=0))[:-1]
    beyond = [np.add.reduceat(values > least, begins, dtype=np.int64).tolist() for least in (0, 1, 3)]
    return [_ways_of(*of_sample) for of_sample in zip(sizes, *beyond, strict=True)]


def _ways_of(elements: int, beyond_0: int, beyond_1: int, beyond_3: int) -> Sequence[int]:
    """The same for a sample of which so many elements are larger than 0, 1 and 3."""
    if not beyond_0:
        return ()
    # Of many that are not zero, the lowest bit by itself is as good as random.
    if not beyond_1 or 2 * beyond_0 < elements:
        return _LOW_BITS
    # Nor are the two lowest of many that are larger.
    return _LOW_BITS[2:] if 2 * beyond_3 > elements else _LOW_BITS[1:]


def _encode(values: Bits, lengths: Sequence[Sequence[int]], low_bits: Sequence[Sequence[int]]) -> list[bytes]:
    """All chunks in one step. `low_bits`: of each segment of each."""
    longest = iter(_longest(values, [count for of_chunk in lengths for count in of_chunk]))
    kinds = [_kinds(*of_chunk, longest) for of_chunk in zip(lengths, low_bits, strict=True)]
    planes = iter(_stored(_split(values, [kind for of_chunk in kinds for kind in of_chunk])))
    chunks: list[bytes] = []
    for of_chunk in kinds:
        own = list(islice(planes, sum(kind.planes for kind in of_chunk)))
        directory: list[int] = [len(of_chunk)]
        sizes = (len(plane) for plane in own)
        for kind in of_chunk:
            directory += kind.elements, kind.low_bits + 256 * kind.planes, *islice(sizes, kind.planes)
        chunks.append(b"".join([np.array(directory, _WORD).tobytes(), *own]))
    return chunks


def _kinds(lengths: Sequence[int], low_bits: Sequence[int], longest: Iterator[int]) -> list[_Kind]:
    """How each segment of a chunk that is not empty is packed. Takes what `_longest` says of each."""
    kinds: list[_Kind] = []
    for count, bits, most in zip(lengths, low_bits, islice(longest, len(lengths)), strict=True):
        if most > 0:
            kinds.append(_Kind(count, bits or 8, _plane_count(most, bits or 8)))
        elif count > 0:
            kinds.append(_Kind(count, 1, 0))
    return kinds


def _cut(values: Bits, lengths: Sequence[int]) -> list[Bits]:
    """Pieces of these lengths."""
    return [values[end - length : end] for end, length in zip(accumulate(lengths), lengths, strict=True)]


def _longest(values: Bits, lengths: Sequence[int]) -> list[int]:
    """Of each segment a number as many bits long as its largest."""
    if native.available():
        return native.segment_longest(values, lengths)
    return [int(part.max(initial=0)) for part in _cut(values, lengths)]


def _split(values: Bits, kinds: Sequence[_Kind]) -> list[Plane]:
    """The planes of all segments, valid until this is called again."""
    sizes = [kind.plane_size(index) for kind in kinds for index in range(kind.planes)]
    room = scratch("segment planes", np.uint8, sum(sizes))
    planes = [room[end - size : end] for end, size in zip(accumulate(sizes), sizes, strict=True)]
    if native.available():
        native.split_segments(values, *_columns(kinds), room)
    else:
        ends = accumulate(kind.elements for kind in kinds)
        parts = (values[end - kind.elements : end] for end, kind in zip(ends, kinds, strict=True))
        found = (_planes(part, kind.low_bits) for part, kind in zip(parts, kinds, strict=True) if kind.planes)
        for out, plane in zip(planes, chain.from_iterable(found), strict=True):
            np.copyto(out, plane)
    return planes


def _plane_count(most: int, low_bits: int) -> int:
    """Planes of elements of which the largest is `most`, and not 0."""
    return 1 + max(-(-(most.bit_length() - low_bits) // 8), 0)


def _planes(values: Bits, low_bits: int) -> Iterator[Plane]:
    """The planes of one segment that is not all zeros, each valid until the next is asked for."""
    least = scratch("segment plane", np.uint8, -(-values.size // 8) * 8)
    plane = least[: values.size]
    np.copyto(plane, values, casting="unsafe")
    if low_bits < 8:
        np.bitwise_and(plane, (1 << low_bits) - 1, out=plane)
        least[values.size :] = 0
        yield _pack(least, low_bits)[: -(-values.size * low_bits // 8)]
    else:
        yield plane
    shifted = scratch("segment shifted", values.dtype, values.size)
    for shift in range(low_bits, int(values.max()).bit_length(), 8):
        np.right_shift(values, shift, out=shifted)
        np.copyto(plane, shifted, casting="unsafe")
        yield plane


def _pack(symbols: Plane, bits: int) -> Plane:
    """Symbols of 1, 2 or 4 bits, the first in the lowest bits of a byte; a multiple of 8 of them."""
    if bits == 1:
        return np.packbits(symbols, bitorder="little")
    words = symbols.view(f"<u{8 // bits}")
    packed = words.copy()
    for place in range(1, 8 // bits):
        packed |= words >> (place * (8 - bits))
    return packed.astype(np.uint8)


def _stored(planes: Sequence[Plane]) -> list[Any]:
    """The stored planes, in memory of their own."""
    return [plane.tobytes() if isinstance(plane, np.ndarray) else plane for plane in zstd.compress(planes)]


def _fold(bits: Bits) -> Bits:
    """Signed integers as 0, -1, 1, -2, ... -> 0, 1, 2, 3, ..."""
    sign = bits.view(f"i{bits.itemsize}") >> (8 * bits.itemsize - 1)
    folded: Bits = (bits << 1) ^ sign.view(bits.dtype)
    return folded


# Reading


def decode(chunks: Sequence[Plane], signed: bool, parts: Sequence[Bits], out: Bits, where: str) -> None:
    """Undo `encode`: chunks into `out`, of which `parts` are theirs. Raises `MalformedError` (reason `chunk-size`)."""
    kinds: list[_Kind] = []
    stored: list[Plane] = []
    for chunk, part in zip(chunks, parts, strict=True):
        own, lengths, position = _directory(chunk, part, where)
        kinds += own
        stored += [chunk[begin:end] for begin, end in pairwise(accumulate(lengths, initial=position))]
    sizes = [kind.plane_size(index) for kind in kinds for index in range(kind.planes)]
    planes = zstd.decompress(stored, sizes, where)
    if native.available():
        problem = native.merge_segments(planes, *_columns(kinds), out)
        if problem is not None:
            raise _bad(where, _PROBLEMS[problem])
    else:
        _merge(planes, kinds, out, where)
    if signed:
        _unfold(out)


def _merge(planes: Sequence[Plane], kinds: Sequence[_Kind], out: Bits, where: str) -> None:
    rest, begin = iter(planes), 0
    for kind in kinds:
        part = out[begin : begin + kind.elements]
        begin += kind.elements
        if kind.planes == 0:
            part[:] = 0
            continue
        least = scratch("segment low bits", np.uint8, kind.elements)
        _unpack(next(rest), kind.low_bits, least, where)
        np.copyto(part, least)
        for index, plane in enumerate(islice(rest, kind.planes - 1)):
            _raise(plane, kind.low_bits + 8 * index, part, where)


def _directory(stored: Plane, out: Bits, where: str) -> tuple[list[_Kind], list[int], int]:
    """The segments, the length of each of their planes, and where these begin.

    All sizes are checked here, before anything is made of them.
    """
    whole = stored[: stored.size // 4 * 4].view(_WORD)
    left = int(whole[0]) if whole.size and whole[0] <= _MOST else -1
    words = whole[: 1 + max(left, 0) * (3 + out.itemsize)].tolist()
    kinds: list[_Kind] = []
    lengths: list[int] = []
    elements, position = 0, 1
    while left > 0 and position + 2 <= len(words):
        count, kind = words[position : position + 2]
        number, low_bits = kind >> 8, kind & 0xFF
        of_planes = words[position + 2 : position + 2 + number] if number <= out.itemsize + 1 else []
        if low_bits not in _LOW_BITS or len(of_planes) != number or (number == 0 and low_bits != 1):
            break
        kinds.append(_Kind(count, low_bits, number))
        lengths += of_planes
        elements, position = elements + count, position + 2 + number
        left = left - 1 if count > 0 and elements <= out.size else -1
    if left != 0:
        raise _bad(where, "a directory of segments that makes no sense")
    if elements != out.size:
        raise _bad(where, "segments of other elements in all", out.size, elements)
    if 4 * position + sum(lengths) != stored.size:
        raise _bad(where, "segments of another length in all", stored.size, 4 * position + sum(lengths))
    return kinds, lengths, 4 * position


def _unpack(packed: Plane, bits: int, out: Plane, where: str) -> None:
    """Undo `_pack`, and check that the bits left over are 0."""
    used = out.size * bits % 8
    if used and packed[-1] >> used:
        raise _bad(where, _PROBLEMS["bits left over"])
    if bits == 8:
        np.copyto(out, packed)
    elif bits == 1:
        np.copyto(out, np.unpackbits(packed, count=out.size, bitorder="little"))
    else:
        words = packed.astype(f"<u{8 // bits}")
        if bits == 2:
            words |= words << 12
            words &= 0x000F000F
            words |= words << 6
            words &= 0x03030303
        else:
            words |= words << 4
            words &= 0x0F0F
        np.copyto(out, words.view(np.uint8)[: out.size])


def _raise(plane: Plane, shift: int, out: Bits, where: str) -> None:
    """Put one byte of each element where it belongs, and check that none has bits beyond the width."""
    room = 8 * out.itemsize - shift
    if room < 8 and plane.max() >> room:
        raise _bad(where, _PROBLEMS["too large"])
    if room > 0:
        wide = scratch("segment raised", out.dtype, out.size)
        np.copyto(wide, plane)
        np.left_shift(wide, shift, out=wide)
        np.bitwise_or(out, wide, out=out)


def _unfold(out: Bits) -> None:
    low = scratch("segment sign", out.dtype, out.size)
    np.bitwise_and(out, 1, out=low)
    np.negative(low, out=low)
    np.right_shift(out, 1, out=out)
    np.bitwise_xor(out, low, out=out)


def _bad(where: str, what: str, expected: object = None, found: object = None) -> MalformedError:
    return MalformedError(what, where=where, expected=expected, found=found, reason="chunk-size")
