"""Promise 29: every bit pattern of every dtype survives, and any checkpoint comes back as it was."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import deltafmt
from deltafmt.dtypes import DTYPES
from deltafmt.encodings import Encoding, StoredChunk, decode_chunks, encode_chunk, planes
from deltafmt.operators.patch import correct, difference
from hostile import WIDTHS, Tensor, f32, tree, write_checkpoint

ORDERED = ("F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ")


def comes_back(source: Path, root: Path, base: Path | None = None) -> deltafmt.PackReport:
    """Pack, verify against the source, unpack: every file is identical, byte for byte."""
    report = deltafmt.pack(source, root / "packed", base=base)
    assert report.exact
    verified = deltafmt.verify(root / "packed", base=base, against=source)
    assert verified.equal, verified.differences
    assert verified.max_rel_error == 0
    deltafmt.unpack(root / "packed", root / "out", base=base)
    assert tree(root / "out") == tree(source)
    with deltafmt.open(root / "packed", base=base) as archive:
        for name in archive.keys():  # noqa: SIM118
            archive.get_tensor(name)
    return report


def bits(dtype: str, *patterns: int) -> Tensor:
    return Tensor(dtype, (len(patterns),), b"".join(p.to_bytes(WIDTHS[dtype], "little") for p in patterns))


SPECIALS = {
    "nan payloads": bits("F32", 0x7FC00000, 0x7FC00001, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FA5A5A5),
    "nan payloads f64": bits("F64", 0x7FF8 << 48, (0x7FF << 52) + 1, (0xFFF << 52) + 1, 2**63 - 1, 2**64 - 1),
    "nan payloads f16": bits("F16", 0x7E00, 0x7C01, 0xFC01, 0xFFFF, 0x7FFF),
    "nan payloads bf16": bits("BF16", 0x7FC0, 0x7F81, 0xFF81, 0xFFFF, 0x7FFF),
    "infinities": bits("F32", 0x7F800000, 0xFF800000),
    "infinities bf16": bits("BF16", 0x7F80, 0xFF80),
    "zeros": bits("F32", 0, 0x80000000, 0, 0x80000000),
    "negative zeros": bits("BF16", *[0x8000] * 9),
    "subnormals": bits("F32", 1, 0x80000001, 0x007FFFFF, 0x807FFFFF),
    "subnormals f16": bits("F16", 1, 0x8001, 0x03FF),
    "empty": Tensor("F32", (0,), b""),
    "empty 3-d": Tensor("I64", (4, 0, 3), b""),
    "0-d": Tensor("F32", (), b"\1\2\3\4"),
    "0-d bool": Tensor("BOOL", (), b"\1"),
    "int64": bits("I64", 0, 1, 2**63 - 1, 2**63, 2**64 - 1),
    "uint64": bits("U64", 0, 2**63, 2**64 - 1),
    "bool": bits("BOOL", 0, 1, 1, 0),
    "bool that is neither": bits("BOOL", 2, 255, 128),
    "complex": bits("C64", 0x7FC00001_80000000, 0xFF800000_00000001, 0),
    **{f"{dtype} every pattern": bits(dtype, *range(256)) for dtype in WIDTHS if WIDTHS[dtype] == 1},
    **{f"{dtype} every pattern": bits(dtype, *range(65536)) for dtype in WIDTHS if WIDTHS[dtype] == 2},
}


@pytest.mark.parametrize("what", SPECIALS)
@pytest.mark.parametrize("against", [None, "changed", "same"])
def test_29_specials(tmp_path: Path, what: str, against: str | None) -> None:
    tensor = SPECIALS[what]
    source = write_checkpoint(tmp_path / "src", {"w": tensor, "other": f32(3)})
    base = None
    if against is not None:
        words = np.frombuffer(tensor.data, np.uint8).copy()
        if against == "changed":
            words ^= 1
        base = write_checkpoint(tmp_path / "base", {"w": tensor._replace(data=words.tobytes()), "other": f32(3)})
    comes_back(source, tmp_path, base)
    with deltafmt.open(tmp_path / "packed", base=base) as archive:
        assert archive.tensor_bytes("w") == tensor.data
        found = archive.get_tensor("w")
        assert found.tobytes() == tensor.data
        assert found.shape == tensor.shape
        assert archive.get_slice("w").get_dtype() == tensor.dtype
        assert archive.get_slice("w").get_shape() == list(tensor.shape)


@pytest.mark.parametrize("what", SPECIALS)
def test_29_specials_as_torch_tensors(tmp_path: Path, what: str) -> None:
    load = safetensors.torch.load_file
    source = write_checkpoint(tmp_path / "src", {"w": SPECIALS[what]})
    deltafmt.pack(source, tmp_path / "packed")
    expected = load(source / "model.safetensors")["w"]
    with deltafmt.open(tmp_path / "packed", framework="pt") as archive:
        for found in (archive.get_tensor("w"), archive.get_slice("w")[...]):
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert found.reshape(-1).view(torch.uint8).equal(expected.reshape(-1).view(torch.uint8))


def test_29_a_bf16_nan_predicted_from_an_fp32_one(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"w": bits("F32", 0x7FC12345, 0xFF800001, 0x7F7FFFFF, 1, 0x80000000)})
    source = write_checkpoint(tmp_path / "src", {"w": bits("BF16", 0x7FC1, 0xFF81, 0x7F80, 0, 0x8000)})
    comes_back(source, tmp_path, base)


def test_29_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    embedding = f32(400, 30)
    source = write_checkpoint(
        tmp_path / "src", {"embed": embedding, "head": embedding, "flat": embedding._replace(shape=(12000,))}
    )
    report = comes_back(source, tmp_path)
    assert report.tensors["head"].method == "ref"
    assert report.tensors["head"].stored_bytes == 0
    assert report.tensors["flat"].method != "ref"  # another shape is another tensor


def test_29_non_contiguous_and_tied_torch_tensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 12, generator=generator)
    other = torch.view_as_complex(torch.randn(20, 6, 2, generator=generator))
    half = torch.randn(7, 9, generator=generator).bfloat16()
    state = {
        "whole": weight, "tied": weight, "transposed": weight.t(), "strided": weight[::2, 1::3], "row": weight[3],
        "expanded": weight[:1].expand(5, 12), "shifted": weight.view(-1)[7:31], "scalar": weight[2, 2],
        "empty": weight[:0], "half": half.t(), "complex": other.t(), "parameter": torch.nn.Parameter(weight),
        "conjugate": other.conj(), "int": torch.arange(5)[::2],
    }  # fmt: skip
    (tmp_path / "src").mkdir()
    torch.save(state, tmp_path / "src/pytorch_model.bin")
    deltafmt.pack(tmp_path / "src", tmp_path / "packed")
    with deltafmt.open(tmp_path / "packed", framework="pt") as archive:
        assert sorted(archive.keys()) == sorted(state)
        for name, tensor in state.items():
            expected = tensor.detach().resolve_conj().resolve_neg().contiguous()
            found = archive.get_tensor(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
            assert found.equal(expected), name


@pytest.mark.parametrize("pattern", [0x7FC12345, 0x7F800000, 0xFF800000])
def test_29_lossy_methods_leave_what_is_not_finite_alone(tmp_path: Path, pattern: int) -> None:
    words = np.frombuffer(f32(64, 48).data, "<u4").copy()
    words[[5, 700, 701]] = pattern
    bad = Tensor("F32", (64, 48), words.tobytes())
    name = "model.layers.0.mlp.up_proj.weight"
    base = write_checkpoint(tmp_path / "base", {name: f32(64, 48, seed=9)})
    source = write_checkpoint(tmp_path / "src", {name: bad})
    report = deltafmt.pack(source, tmp_path / "packed", base=base, rank=4)
    assert report.tensors[name].method != "lowrank"
    assert deltafmt.verify(tmp_path / "packed", base=base, against=source).equal


# --- Any checkpoint -------------------------------------------------------------------------------------------------

_NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12) | st.sampled_from(
    ["a#residual", "a#header", "model.safetensors#header", "deltafmt.chunks", "a", "é", "é", "x" * 1000]
)
_SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@st.composite
def _tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in draw(st.lists(_NAMES, unique=True, max_size=6)):
        dtype = draw(st.sampled_from(sorted(WIDTHS)))
        shape = draw(_SHAPES)
        size = int(np.prod(shape, dtype=object)) * WIDTHS[dtype]
        seed = draw(st.integers(0, 5))
        data = np.random.default_rng(seed).integers(0, draw(st.sampled_from([1, 4, 256])), size, dtype=np.uint8)
        tensors[name] = Tensor(dtype, shape, data.tobytes())
    return tensors


_LONG = [
    "x" * 1024,
    "x" * 1016,
    "é" * 512,
    "deltafmt.chunks",
    "__metadata_",
    "a#residual",
    "a",
    "a#residual#2",
    '"' * 1024,
]


def test_tensor_names_as_long_as_names_may_be(tmp_path: Path) -> None:
    """Stored arrays are named after tensors and files, but need other names where those would not be allowed."""
    tensors = {name: f32(20, 3, seed=place) for place, name in enumerate(_LONG)}
    files = ['"' * 240, "é" * 120, "deltafmt.chunks", "a" * 243]
    source = write_checkpoint(tmp_path / "src", tensors, shards=4)
    index = (source / "model.safetensors.index.json").read_text()
    for place, name in enumerate(files):
        old = f"model-{place + 1:05d}-of-00004.safetensors"
        (source / old).rename(source / f"{name}.safetensors")
        index = index.replace(f'"{old}"', json.dumps(f"{name}.safetensors"))
    (source / "model.safetensors.index.json").write_text(index)
    base = write_checkpoint(
        tmp_path / "base", {name: tensor._replace(data=bytes(4) + tensor.data[4:]) for name, tensor in tensors.items()}
    )
    comes_back(source, tmp_path)
    comes_back(source, tmp_path / "again", base)


def test_many_files_of_few_tensors(tmp_path: Path) -> None:
    """The room that is left for a shard's header counts the headers of the original files."""
    tensors = {str(place): f32(1, seed=place) for place in range(40)}
    source = write_checkpoint(tmp_path / "src", tensors, shards=40)
    index = (source / "model.safetensors.index.json").read_text()
    for place in range(40):
        old = f"model-{place + 1:05d}-of-00040.safetensors"
        new = f"{place:02}{chr(34) * 240}.safetensors"
        (source / old).rename(source / new)
        index = index.replace(f'"{old}"', json.dumps(new))
    (source / "model.safetensors.index.json").write_text(index)
    comes_back(source, tmp_path)


_SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@_SETTINGS
@given(_tensors(), st.integers(1, 3), st.sampled_from([1, 100, 10**9]))
def test_any_checkpoint_comes_back(tensors: dict[str, Tensor], shards: int, shard_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = write_checkpoint(
            root / "src", tensors, {"ü/n.txt": b"x"}, shards=shards if len(tensors) >= shards else 1
        )
        deltafmt.pack(source, root / "packed", shard_bytes=shard_bytes)
        assert deltafmt.verify(root / "packed", against=source).equal
        deltafmt.unpack(root / "packed", root / "out")
        assert tree(root / "out") == tree(source)


@_SETTINGS
@given(_tensors(), _tensors())
def test_any_checkpoint_comes_back_from_any_base(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """The base has tensors of the same name and shape, of the same name only, and others."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        flipped = {
            name: tensor._replace(data=(np.frombuffer(tensor.data, np.uint8) ^ 3).tobytes())
            for name, tensor in list(tensors.items())[::2]
        }
        base = write_checkpoint(root / "base", others | flipped)
        source = write_checkpoint(root / "src", tensors)
        comes_back(source, root, base)


def test_files_written_by_safetensors_itself(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    arrays: dict[str, npt.NDArray[Any]] = {
        "b": np.arange(6.0).reshape(2, 3).T.copy(),
        "a": np.array(True),
        "c": np.zeros(0),
    }
    save_file(arrays, tmp_path / "src/model.safetensors", {"format": "pt", "ключ": "значение"})
    comes_back(tmp_path / "src", tmp_path)
    with deltafmt.open(tmp_path / "packed") as archive:
        assert archive.metadata() == {"format": "pt", "ключ": "значение"}


@pytest.mark.slow
def test_real_checkpoints_come_back(
    minilm_dir: Path, finetune_dir: Path, bf16_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    for place, (source, base) in enumerate(
        [(finetune_dir, minilm_dir), (bf16_pair[1], bf16_pair[0]), (bf16_pair[1], minilm_dir)]
    ):
        report = comes_back(source, tmp_path / str(place), base)
        assert report.stored_bytes < report.logical_bytes
    comes_back(minilm_dir, tmp_path / "alone")


@pytest.mark.parametrize("which", ["rxnmapper_dir", pytest.param("mgm_dir", marks=pytest.mark.slow)])
def test_real_pickled_checkpoints(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(which)
    deltafmt.pack(source, tmp_path / "packed")
    state = torch.load(source / "pytorch_model.bin", weights_only=True, map_location="cpu")
    with deltafmt.open(tmp_path / "packed", framework="pt") as archive:
        assert sorted(archive.keys()) == sorted(state)
        for name, tensor in state.items():
            assert archive.get_tensor(name).equal(tensor), name


# --- The pieces -----------------------------------------------------------------------------------------------------

_DATA = st.binary(max_size=200)


@settings(deadline=None)
@given(st.sampled_from(sorted(WIDTHS)), _DATA, st.booleans())
def test_planes_are_undone(dtype: str, data: bytes, floats: bool) -> None:
    width = WIDTHS[dtype]
    elements = np.frombuffer(data[: len(data) // width * width], f"<u{width}")
    separated = np.empty((width, elements.size), np.uint8)
    planes.split(elements, floats, list(separated))
    # spec/encodings/planes.md and float-planes.md, one element at a time.
    for place, element in enumerate(elements.tolist()):
        expected = list(element.to_bytes(width, "big"))
        if floats and width >= 2:
            bits = f"{element:0{8 * width}b}"
            expected[:2] = [int(bits[1:9], 2), int(bits[0] + bits[9:16], 2)]
        assert separated[:, place].tolist() == expected
    merged = np.empty_like(elements)
    planes.merge(list(separated), floats, merged)
    assert merged.tobytes() == elements.tobytes()


@settings(deadline=None)
@given(st.sampled_from(sorted(DTYPES)), _DATA, _DATA)
def test_patches_are_undone(dtype: str, data: bytes, predicted: bytes) -> None:
    kind = DTYPES[dtype]
    size = min(len(data), len(predicted)) // kind.width
    wanted = np.frombuffer(data, kind.bits, size)
    prediction = np.frombuffer(predicted, kind.bits, size)
    residual = difference(wanted, prediction, kind).copy()
    width, ordered = 8 * kind.width, dtype in ORDERED
    top, ones = 1 << (width - 1), (1 << width) - 1
    for w, p, r in zip(wanted.tolist(), prediction.tolist(), residual.tolist(), strict=True):
        if ordered:
            w, p = (u ^ (ones if u & top else top) for u in (w, p))
        d = (w - p) & ones
        assert r == ((d << 1) & ones) ^ (ones if d & top else 0)
    out = np.empty_like(wanted)
    correct(prediction, residual, kind, out)
    assert out.tobytes() == wanted.tobytes()


@settings(deadline=None)
@given(
    st.sampled_from(sorted(WIDTHS)),
    _DATA | st.binary(min_size=1, max_size=3).map(lambda block: block * 60),
    st.integers(1, 300),
    st.sampled_from(["none", "planes", "float-planes"]),
    st.sampled_from(["none", "zstd"]),
    st.booleans(),
)
def test_any_chunking_decodes(dtype: str, data: bytes, chunk: int, filter_: str, coder: str, thorough: bool) -> None:
    kind = DTYPES[dtype]
    if coder == "none":
        filter_ = "none"
    if filter_ == "float-planes" and not kind.is_float:
        filter_ = "planes"
    encoding = Encoding(filter_, coder, chunk)
    elements = np.frombuffer(data[: len(data) // kind.width * kind.width], kind.bits)
    decoded = np.empty_like(elements)
    for begin in range(0, elements.size, chunk):
        part = elements[begin : begin + chunk]
        stored = [bytes(plane) for plane in encode_chunk(part, encoding, thorough)]
        assert len(stored) == encoding.planes(kind)
        assert sum(map(len, stored)) <= part.nbytes
        ends = np.cumsum([len(plane) for plane in stored]).tolist()
        chunks = [StoredChunk(np.frombuffer(b"".join(stored), np.uint8), ends, "")]
        decode_chunks(chunks, encoding, decoded[begin : begin + chunk])
    assert decoded.tobytes() == elements.tobytes()
