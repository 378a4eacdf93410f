"""Invalid chunks of the encoding `segments`: the rules of spec/encodings/segments.md, step 7 of spec/reasons.md."""

from __future__ import annotations

import struct

from vectors.draft import Draft, repeated, zstd_frame
from vectors.segments import Segment
from vectors.spoil import add, manifest, put
from vectors.values import bits

# `w` is U16: 20 elements of value 3 in one segment of 2 low bits, then 30 zeros: a directory of 6 words, 5 bytes.
DIRECTORY = [2, 20, 2 + 256, 5, 30, 1]
PLANE = b"\xff" * 5


def packed(directory: list[int], data: bytes) -> bytes:
    return struct.pack(f"<{len(directory)}I", *directory) + data


def archive() -> Draft:
    draft = Draft()
    t = bits("U16", *[3] * 20, *[0] * 30)
    draft.exact("w", t, draft.segments("w", t, 64, [Segment(20, 2), Segment(30)]))
    assert draft.arrays["w"].chunks == [[packed(DIRECTORY, PLANE)]]
    return draft


def chunk(name: str, description: str, stored: bytes) -> None:
    """The whole chunk is another one."""

    def make() -> Draft:
        draft = archive()
        draft.arrays["w"].chunks = [[stored]]
        return draft

    add(f"segments-{name}", "chunk-size", description, make)


def directory(name: str, description: str, words: list[int], data: bytes = PLANE) -> None:
    """The directory is another one."""
    chunk(name, description, packed(words, data))


directory("none", "no segment", [0], b"")
directory("too-few", "a segment that is not counted", [1, 20, 2 + 256, 5, 30, 1])
directory("too-many", "a segment more than there are", [3, 20, 2 + 256, 5, 30, 1])
directory("count-2-32", "2^32 - 1 segments", [2**32 - 1, 20, 2 + 256, 5, 30, 1])
directory("elements-missing", "an element less than the chunk has", [2, 20, 2 + 256, 5, 29, 1])
directory("elements-over", "an element more than the chunk has", [2, 20, 2 + 256, 5, 31, 1])
directory("elements-2-32", "2^32 - 1 elements in a segment", [2, 20, 2 + 256, 5, 2**32 - 1, 1])
directory("elements-wrap", "elements that add up modulo 2^32", [3, 20, 2 + 256, 5, 2**32 - 1, 1, 31, 1])
directory("empty", "a segment of no elements", [3, 20, 2 + 256, 5, 0, 1, 30, 1])
for low in (0, 3, 5, 16, 255):
    directory(f"low-bits-{low}", f"{low} low bits", [2, 20, low + 256, 5, 30, 1])
directory("low-bits-of-zeros", "2 low bits of a segment without planes", [2, 20, 2 + 256, 5, 30, 2])
directory("low-bits-0-of-zeros", "0 low bits of a segment without planes", [2, 20, 2 + 256, 5, 30, 0])
four = [2, 20, 8 + 4 * 256, 20, 20, 20, 20, 30, 1]
directory("planes-too-many", "4 planes of elements of 2 bytes", four, b"\3" * 20 + bytes(60))
directory("planes-2-24", "2^24 - 1 planes", [2, 20, 2 + 256 * (2**24 - 1), 5, 30, 1])
directory("length-short", "a stored length that is too short for the plane", [2, 20, 2 + 256, 4, 30, 1])
directory("length-long", "a stored length beyond the chunk", [2, 20, 2 + 256, 6, 30, 1])
directory("length-2-32", "a stored length of 2^32 - 1", [2, 20, 2 + 256, 2**32 - 1, 30, 1])
directory("length-zero", "a stored length of 0, with no bytes behind it", [2, 20, 2 + 256, 0, 30, 1], b"")
directory("byte-behind", "a byte behind the last plane", DIRECTORY, PLANE + b"\0")
directory("byte-missing", "the last plane is cut", DIRECTORY, PLANE[:-1])
directory("plane-longer", "a plane stored longer than it is", [2, 20, 2 + 256, 6, 30, 1], PLANE + b"\0")
directory("plane-shorter", "a plane stored shorter than it is, no frame", [2, 20, 2 + 256, 4, 30, 1], PLANE[:-1])
for length in (0, 2, 4, 20):
    chunk(f"cut-{length}", f"a chunk of {length} bytes: the directory is cut off", packed(DIRECTORY, PLANE)[:length])
directory("bits-left-over-2", "a bit left over in plane 0 of 2 low bits is 1", [2, 19, 2 + 256, 5, 31, 1])
ones = b"\xff\xff\xff" + b"\1" * 20
directory("bits-left-over-1", "bits left over in plane 0 of 1 low bit are 1", [2, 20, 1 + 512, 3, 20, 30, 1], ones)
three = [2, 20, 8 + 3 * 256, 20, 20, 20, 30, 1]
directory("bits-beyond-8", "a plane beyond the elements' 16 bits is not 0", three, b"\3" * 20 + bytes(39) + b"\1")
three = [2, 20, 4 + 3 * 256, 10, 20, 20, 30, 1]
directory("bits-beyond-4", "a bit beyond the 16, with 4 low bits", three, b"\x33" * 10 + bytes(39) + b"\x10")
three = [2, 20, 1 + 3 * 256, 3, 20, 20, 30, 1]
directory(
    "bits-beyond-1", "a bit beyond the 16, with 1 low bit", three, ones[:2] + b"\x0f" + ones[3:] + bytes(19) + b"\x80"
)
many = [19, 20, 2 + 256, 5, *[1, 1] * 17, 13, 1]
directory("chunk-long", "a chunk 65 bytes longer than its elements", many)


def framed(name: str, description: str, frame: bytes, size: int = 100) -> None:
    """A chunk of one segment of 100 elements with 8 low bits, whose plane is this frame."""

    def make() -> Draft:
        draft = Draft()
        t = bits("U16", *[3] * size)
        draft.exact("w", t, draft.segments("w", t, size, [Segment(size, 8)]))
        good = zstd_frame(size, repeated(3, size))
        assert draft.arrays["w"].chunks == [[packed([1, size, 8 + 256, len(good)], good)]]
        draft.arrays["w"].chunks = [[packed([1, size, 8 + 256, len(frame)], frame)]]
        return draft

    add(f"segments-frame-{name}", "chunk-size", description, make)


GOOD = zstd_frame(100, repeated(3, 100))
framed("short", "a plane whose frame gives a byte less", zstd_frame(99, repeated(3, 99)))
framed("long", "a plane whose frame gives a byte more", zstd_frame(101, repeated(3, 101)))
framed("no-size", "a plane whose frame declares no size", zstd_frame(None, repeated(3, 100), 10))
framed("lies", "a plane whose frame gives less than it declares", zstd_frame(100, repeated(3, 99)))
framed("trailing", "a byte behind the frame of a plane", GOOD + b"\0")
framed("cut", "a plane whose frame is cut", GOOD[:-1])
framed("not", "a plane that is neither raw nor a frame", b"\3" * 50)
framed("longer", "a frame that is longer than its plane", zstd_frame(100, [(0, b"\3" * 100)]))

manifest(
    "segments-of-floats",
    "schema",
    "segments of BF16",
    put("segments", "arrays", "w", "encoding", "filter"),
)
manifest("segments-of-bool", "schema", "segments of BOOL", put("BOOL", "arrays", "w", "dtype"), archive)
manifest("segments-of-c64", "schema", "segments of C64", put("C64", "arrays", "w", "dtype"), archive)
manifest(
    "segments-without-coder",
    "schema",
    "segments with coder none",
    put("none", "arrays", "w", "encoding", "coder"),
    archive,
)
