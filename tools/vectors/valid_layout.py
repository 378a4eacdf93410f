"""Valid cases of storing: dtypes, encodings, shards, names, the original files, the manifest."""

# ruff: noqa: E501 (descriptions and patterns in one line)

from __future__ import annotations

import json
import struct

from vectors.draft import Draft, plain, ref, repeated, safetensors, zstd_frame
from vectors.valid import valid
from vectors.values import FLOATS, WIDTH, Json, Tensor, numbers, tensor, weights


@valid("one F32 tensor, stored as it is")
def minimal() -> Draft:
    draft = Draft()
    draft.stored("w", numbers("F32", [2, 3], [1, -2, 0.5, 3, 1e-3, -7]))
    return draft


@valid("every dtype, stored as it is under its own dtype and shape")
def dtypes() -> Draft:
    draft = Draft()
    for dtype in WIDTH:
        draft.stored(f"t.{dtype}", tensor(dtype, dtype, 2, 3))
    return draft


@valid("every dtype with every filter that fits it, coder zstd, three chunks of which the last is short")
def filters() -> Draft:
    draft = Draft()
    for dtype in WIDTH:
        for filter_ in ("none", "planes", "float-planes")[: 3 if dtype in FLOATS else 2]:
            draft.stored(f"{dtype}.{filter_}", tensor(dtype + filter_, dtype, 5, 5), filter_, "zstd", 10)
    return draft


@valid(
    "trained-like weights: float-planes of BF16, F16, F32, F64 with real zstd frames (Huffman, FSE, checksum) beside raw planes"
)
def float_planes_zstd() -> Draft:
    draft = Draft()
    for dtype in FLOATS:
        draft.stored(dtype, weights(dtype, dtype, 25, 40), "float-planes", "zstd", 400)
    draft.stored(
        "text",
        Tensor("U8", [480], b"the same words, again and again; " * 14 + b"and an end of its own"[:18]),
        "none",
        "zstd",
    )
    draft.stored(
        "I32",
        Tensor("I32", [300], b"".join(struct.pack("<i", (i * i) % 37 - 9) for i in range(300))),
        "planes",
        "zstd",
        256,
    )
    return draft


@valid(
    "zstd frames of other makes: a window instead of a single segment, 8-byte content size, raw and RLE and empty blocks"
)
def frames() -> Draft:
    draft = Draft()
    data = bytes(300) + b"\7" * 300
    blocks = [*repeated(0, 300), *repeated(7, 300)]
    made = {
        "single segment": zstd_frame(600, blocks),
        "window of 1 KiB": zstd_frame(600, blocks, 10),
        "window of 128 KiB": zstd_frame(600, blocks, 17),
        "empty block": zstd_frame(600, [(0, b""), *blocks, (0, b"")]),
        "raw block": zstd_frame(600, [(0, data[:20]), *repeated(0, 280), *repeated(7, 300)]),
        "8-byte size": b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", 600) + zstd_frame(600, blocks)[7:],
    }
    for name, frame in made.items():
        draft.stored(name, Tensor("U8", [600], data), "none", "zstd")
        draft.arrays[name].chunks = [[frame]]
    return draft


@valid("coder none with several chunks, each with its own checksum")
def chunks_without_coder() -> Draft:
    draft = Draft()
    draft.stored("w", tensor("chunks", "I16", 10, 10), "none", "none", 30)
    draft.stored("chunk longer than the array", tensor("long", "I16", 7), "none", "none", 1000)
    return draft


@valid("0-d tensors and tensors without elements, raw and coded")
def scalars_and_empty() -> Draft:
    draft = Draft()
    draft.stored("scalar", numbers("F32", [], [2.5]))
    draft.stored("scalar coded", numbers("F64", [], [-0.0]), "float-planes", "zstd")
    draft.stored("empty", Tensor("BF16", [0], b""))
    draft.stored("empty coded", Tensor("I64", [2, 0, 3], b""), "planes", "zstd", 5)
    draft.exact("empty tied", Tensor("BF16", [0], b""), ref("empty"))
    return draft


@valid("a checkpoint with a weight file but no tensor")
def no_tensors() -> Draft:
    return Draft()


@valid("an original of two weight files with an index, two shards, and sidecars in sub-directories, one of them empty")
def two_shards() -> Draft:
    draft = Draft(shards=2, index="model.safetensors.index.json")
    draft.layout = {"model-00001-of-00002.safetensors": ["a", "c"], "model-00002-of-00002.safetensors": ["b"]}
    draft.sidecars = {
        "config.json": b'{"model_type":"x"}\n',
        "1_Pooling/config.json": b"{}",
        "tokenizer/a/b.txt": b"",
        "README.md": "Grüße\r\n".encode(),
    }
    draft.stored("a", tensor("two a", "F32", 3, 3), shard=1)
    draft.stored("b", tensor("two b", "BF16", 20), "float-planes", "zstd", 8)
    draft.stored("c", tensor("two c", "I8", 5), shard=1)
    return draft


@valid(
    "an original whose header is not as usual: tensors in another order than their data, white space, metadata, no padding"
)
def original_header() -> Draft:
    draft = Draft()
    for name in ("first", "second", "third"):
        draft.stored(name, tensor(name, "U16", 3))
    entries = json.loads(plain(draft.tensors)[0])
    header = {name: entries[name] for name in ("third", "first", "second")} | {
        "__metadata__": {"format": "pt", "note": "ä\\n"}
    }
    draft.headers = {"model.safetensors": json.dumps(header, indent=1).encode() + b"   "}
    return draft


@valid("a shard with metadata, a header padded with many spaces, entries in another order than their data")
def shard_header() -> Draft:
    draft = minimal()

    def edit(header: Json, data: bytes) -> tuple[bytes, bytes]:
        turned = dict(reversed(header.items())) | {"__metadata__": {"written-by": "another tool"}}
        return json.dumps(turned, indent=2).encode() + b" " * 100, data

    draft.edit_shard = edit
    return draft


@valid("file names that are reserved at the top level only, in sub-directories; a weight file in a sub-directory")
def names_in_subdirectories() -> Draft:
    draft = Draft()
    dense = safetensors({"linear.weight": tensor("dense", "F32", 2, 2)})
    draft.sidecars = {
        "2_Dense/model.safetensors": dense,
        "2_Dense/model.safetensors.index.json": b"{}",
        "2_Dense/deltafmt.json": b"{}",
        "2_Dense/deltafmt-00001-of-00001.safetensors": b"",
        "deltafmt-notes/model.safetensors": dense,
        "deltafmt-notes.txt": b"",
        "__metadata__": b"not allowed for a tensor only",
    }
    draft.layout = {"model.safetensors": ["w"], "encoder/model.safetensors": ["encoder.w"]}
    draft.stored("w", tensor("outer", "BF16", 3))
    draft.stored("encoder.w", tensor("encoder", "F32", 3))
    return draft


@valid("tensor names beyond ASCII, with quotes, backslashes, slashes, dots and dashes: they are not paths")
def unicode_names() -> Draft:
    draft = Draft(sidecars={"模型/é.txt": b"composed", "模型/e\u0301.txt": b"decomposed is another name"})
    names = [
        "重み",
        "\U0001f9ea.weight",
        'quo"te',
        "back\\slash",
        "/etc/passwd",
        "../up",
        "C:\\x",
        "con",
        " ",
        "e\u0301",
        "é",
        "\x80\u2028",
    ]
    for name in names:
        draft.stored(name, tensor(name, "U8", 2))
    return draft


@valid("version 1.7: a higher minor version that uses only what 1.0 defines, with annotations nobody knows")
def minor_version() -> Draft:
    draft = minimal()
    draft.version = "1.7"
    draft.more = {
        "annotations": {"tool": {"name": "future", "numbers": [1, -2, 3.5e-9, True, None]}, "": "", "requires": ["x"]}
    }
    return draft


@valid(
    "values at the edge of what is allowed: JSON 64 deep, names of 1,024 and 255 bytes, 16 dimensions, files that nobody named"
)
def edges() -> Draft:
    draft = Draft(sidecars={"d/" + "f" * 255: b"x", ".hidden": b"", "com10.txt": b"", "model.bin": b"\0"})
    draft.stored("n" * 1022 + "ä", tensor("edge", "U8", *[1] * 15, 2))
    deep: object = 9223372036854775807
    for _ in range(62):  # the manifest's own object and that of annotations are the other two
        deep = [deep]
    draft.more = {"annotations": {"deep": deep}}
    draft.edit_files = lambda files: files.update({"notes.txt": b"not in the manifest, so ignored"})
    return draft
