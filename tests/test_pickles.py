"""Pickled checkpoints: bits against torch's own loader, headers against safetensors' own writer, and hostile files."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from deltafmt.checkpoint import Checkpoint
from deltafmt.errors import AccessError, DeltafmtError, IntegrityError, MalformedError, UnsupportedError, UsageError
from deltafmt.hf_directory import open_plain
from deltafmt.limits import DEFAULT_LIMITS
from deltafmt.pickles import safetensors_name

Tensors = dict[str, torch.Tensor]

TORCH_DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "complex64", "bool"),
    *("float8_e5m2", "float8_e4m3fn", "float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e8m0fnu"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
]


def raw(tensor: torch.Tensor) -> bytes:
    """The tensor's elements in row-major order, as torch itself copies them."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every bit random: NaN payloads, infinities and negative zeros included."""
    size = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


def assert_same(checkpoint: Checkpoint, expected: Tensors) -> None:
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert checkpoint.read_whole(name).tobytes() == raw(tensor), name


def written(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    """Write the files as spec/layout.md says: length, header, and the tensors at the header's offsets."""
    paths = []
    for file in checkpoint.files:
        entries = {name: item for name, item in json.loads(file.header).items() if name != "__metadata__"}
        order = sorted(entries, key=lambda name: entries[name]["data_offsets"])
        data = b"".join(checkpoint.read_whole(name).tobytes() for name in order)
        paths.append(folder / file.name)
        paths[-1].write_bytes(len(file.header).to_bytes(8, "little") + file.header + data)
    return paths


def refused(source: Path, kind: type[DeltafmtError]) -> str:
    with pytest.raises(kind) as caught:
        open_plain(source)
    assert type(caught.value) is kind
    assert str(source) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("fixture", ["mgm_dir", "rxnmapper_dir"])
def test_real_checkpoints_against_torch(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """One is a zip with tied weights, the other the format from before torch 1.6."""
    folder: Path = request.getfixturevalue(fixture)
    independent = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    with open_plain(folder) as checkpoint:
        assert_same(checkpoint, independent)
        assert [file.name for file in checkpoint.files] == ["model.safetensors"]
        assert checkpoint.index is None
        assert "training_args.bin" in checkpoint.sidecars and "config.json" in checkpoint.sidecars
        assert "pytorch_model.bin" not in checkpoint.sidecars
        assert checkpoint.input_bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        (path,) = written(checkpoint, tmp_path)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(independent)
        assert file.metadata() == {"format": "pt"}
        for name, tensor in independent.items():
            assert raw(file.get_tensor(name)) == raw(tensor)


def test_the_header_is_the_one_safetensors_writes(tmp_path: Path) -> None:
    tensors = {f"{name}.ü": random_bits(getattr(torch, name), 3, 5) for name in TORCH_DTYPES}
    tensors |= {"b.scalar": torch.tensor(1.5), "a.empty": torch.zeros(0, 7), 'quo"te\\': torch.ones(3)}
    torch.save(tensors, tmp_path / "x.pt")
    expected = safetensors.torch.save(tensors, metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    with open_plain(tmp_path / "x.pt") as checkpoint:
        assert_same(checkpoint, tensors)
        (path,) = written(checkpoint, tmp_path / "out")
        assert path.name == "x.safetensors"
    assert path.read_bytes() == expected


def test_tied_strided_expanded_and_lazy_tensors(tmp_path: Path) -> None:
    base = random_bits(torch.bfloat16, 40, 30)
    tensors = {
        "wte": base,
        "lm_head": base,
        "transposed": base.t(),
        "every_third": base[1::3, ::2],
        "permuted": random_bits(torch.float32, 3, 4, 5).permute(2, 0, 1),
        "expanded": torch.tensor([1.0, 2.0]).expand(6, 2),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "conjugated": torch.randn(3, dtype=torch.complex64).conj(),
        "negated": torch.randn(3, dtype=torch.complex64).conj().imag,
    }
    torch.save(tensors, tmp_path / "x.bin")
    with open_plain(tmp_path) as checkpoint:
        assert_same(checkpoint, tensors)
        part = checkpoint.read_whole("wte")[:77].copy()
        part.fill(0)
        checkpoint.read("transposed", 501, 578, part)
        assert part.tobytes() == raw(base.t())[2 * 501 : 2 * 578]


def test_shards_and_their_index_are_renamed(tmp_path: Path) -> None:
    shared = torch.randn(4, 4)
    shards = {
        "pytorch_model-00001-of-00002.bin": {"a": shared, "b": torch.arange(3)},
        "pytorch_model-00002-of-00002.bin": {"c": shared},
    }
    for name, tensors in shards.items():
        torch.save(tensors, tmp_path / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": 1, "note": "kept"}, "weight_map": weight_map}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with open_plain(tmp_path) as checkpoint:
        assert_same(checkpoint, {"a": shared, "b": torch.arange(3), "c": shared})
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        assert [file.name for file in checkpoint.files] == names
        assert checkpoint.index is not None
        name, data = checkpoint.index
        assert name == "model.safetensors.index.json"
        assert json.loads(data) == {
            "metadata": {"total_size": 64 + 24 + 64, "note": "kept"},
            "weight_map": {"a": names[0], "b": names[0], "c": names[1]},
        }
        assert checkpoint.sidecars == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model-00001-of-00002.bin", "model-00001-of-00002.safetensors"),
        ("pytorch_model.bin.index.json", "model.safetensors.index.json"),
        ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("adapter_model.bin", "adapter_model.safetensors"),
        ("consolidated.00.pth", "consolidated.00.safetensors"),
        ("x.bin.pt", "x.bin.safetensors"),
    ],
)
def test_names_of_the_files_they_become(name: str, expected: str) -> None:
    assert safetensors_name(name) == expected


def test_renaming_must_not_clash(tmp_path: Path) -> None:
    for name in ("x.bin", "x.pt"):
        torch.save({name: torch.ones(1)}, tmp_path / name)
    weight_map = {"x.bin": "x.bin", "x.pt": "x.pt"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "'x.safetensors' is given twice" in refused(tmp_path, MalformedError)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_state_dict_under_a_single_key(tmp_path: Path, key: str) -> None:
    torch.save({key: OrderedDict(a=torch.ones(2))}, tmp_path / "x.pt")
    with open_plain(tmp_path / "x.pt") as checkpoint:
        assert_same(checkpoint, {"a": torch.ones(2)})


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, ["state_dict (dict)", "epoch (int)", "2 of 2 entries"]),
        ({"a": torch.ones(2), "step": 4}, ["step (int)", "1 of 2 entries"]),
        ({"model": {"a": torch.ones(2), "opt": {}}}, ["opt (dict)"]),
        ({"weights": {"a": torch.ones(2)}}, ["weights (dict)"]),
        ({3: torch.ones(2)}, ["3 (Tensor)"]),
        ([torch.ones(2)], ["list"]),
        (torch.ones(2), ["Tensor"]),
        ({"bad\nname": torch.ones(2)}, ["bad\\nname"]),
    ],
)
def test_nothing_is_left_out_silently(tmp_path: Path, value: object, shown: list[str]) -> None:
    torch.save(value, tmp_path / "x.pt")
    message = refused(tmp_path / "x.pt", MalformedError)
    for text in shown:
        assert text in message


@pytest.mark.parametrize(
    ("tensor", "shown"),
    [
        (torch.ones(2, dtype=torch.complex128), "unknown dtype complex128"),
        (torch.eye(2).to_sparse(), "not a dense array"),
        (torch.empty(2, device="meta"), "not a dense array"),
    ],
)
def test_tensors_that_safetensors_cannot_hold(tmp_path: Path, tensor: torch.Tensor, shown: str) -> None:
    torch.save({"w": tensor}, tmp_path / "x.pt")
    message = refused(tmp_path / "x.pt", UnsupportedError)
    assert shown in message and "w" in message


class Hostile:
    """Pickles to a call of `os.system` that leaves a marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def save_zip(value: object, path: Path) -> None:
    torch.save(value, path)


def save_legacy(value: object, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def save_plain_pickle(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_plain_pickle])
@pytest.mark.parametrize("variables", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
def test_code_in_a_pickle_never_runs(
    tmp_path: Path,
    save: Callable[[object, Path], None],
    variables: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    marker = tmp_path / "marker"
    save({"a": Hostile(marker)}, tmp_path / "x.bin")
    message = refused(tmp_path / "x.bin", MalformedError)
    assert "needs code" in message and "posix.system" in message and "convert it to safetensors" in message
    assert not marker.exists()
    with suppress(RuntimeError):  # the trap itself works: torch without weights_only falls into it
        torch.load(tmp_path / "x.bin", weights_only=False)
    assert marker.exists()


def test_a_class_of_a_library_is_refused_by_name(mgm_dir: Path) -> None:
    message = refused(mgm_dir / "training_args.bin", MalformedError)
    assert "needs code" in message and "TrainingArguments" in message


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"PK\x03\x04 no zip", b"\x80\x02.", b"\x80\x04K\x01.", b"\x80\x02}q\x00."]
)
def test_garbage(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(data)
    refused(tmp_path / "x.bin", MalformedError)


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_truncation_is_an_error_at_open(tmp_path: Path, save: Callable[[object, Path], None]) -> None:
    path = tmp_path / "x.bin"
    save({"a": torch.arange(100.0), "b": torch.arange(7)}, path)
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 41), len(whole) - 1}:
        path.write_bytes(whole[:length])
        refused(path, MalformedError)


def edited(path: Path, edit: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as source:
        records = {record.filename: source.read(record) for record in source.infolist()}
    with zipfile.ZipFile(path, "w", compression) as target:
        for name, data in records.items():
            target.writestr(name, edit(data) if name.endswith("data.pkl") else data)


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    """Mapped, torch takes the compressed bytes for the tensors and says nothing."""
    path = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(1000)}, path)
    edited(path, lambda data: data, zipfile.ZIP_DEFLATED)
    assert "is compressed" in refused(path, MalformedError)


def test_a_storage_larger_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(200)}, path)
    huge = b"J\xff\xff\xff\x7f"  # 2^31 - 1 elements
    edited(path, lambda data: re.sub(rb"K\xc8(?=tq|\x85)", lambda _: huge, data))
    refused(path, MalformedError)


def test_an_expansion_bomb_stops_at_the_limit(tmp_path: Path) -> None:
    """One element, expanded to 2^40: a few hundred bytes on disk, and in memory only the range that is read."""
    torch.save({"bomb": torch.ones(1).expand(1 << 40)}, tmp_path / "x.bin")
    with pytest.raises(MalformedError, match="limit tensor_bytes"):
        open_plain(tmp_path / "x.bin")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open_plain(tmp_path / "x.bin", limits=DEFAULT_LIMITS.raised(tensor_bytes=1 << 43)) as checkpoint:
        out = np.zeros(3, np.uint32)
        checkpoint.read("bomb", (1 << 40) - 3, 1 << 40, out)
        assert out.tobytes() == np.ones(3, np.float32).tobytes()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_a_mapped_file_that_shrinks_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(1 << 16)}, path)
    with open_plain(path) as checkpoint:
        os.truncate(path, 4096)
        with pytest.raises(IntegrityError, match="shorter"):
            checkpoint.read_whole("a")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_opening_maps_and_does_not_load(tmp_path: Path) -> None:
    """With 104 MB in two shards open, and a piece of each read, the process has taken less than a fifth of that."""
    for shard in (1, 2):
        torch.save({f"w{shard}": torch.zeros(13 << 20)}, tmp_path / f"pytorch_model-{shard}.bin")
    weight_map = {f"w{shard}": f"pytorch_model-{shard}.bin" for shard in (1, 2)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    program = """
import re, sys
import numpy, torch
from deltafmt.hf_directory import open_plain

def kib():  # memory of its own, without mapped files
    return int(re.search("RssAnon:\\s+([0-9]+)", open("/proc/self/status").read())[1])

before = kib()
with open_plain(sys.argv[1]) as checkpoint:
    for name in ("w1", "w2"):
        checkpoint.read(name, 0, 100, numpy.empty(100, "u4"))
    print((kib() - before) << 10)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20 << 20


def test_an_old_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    message = refused(tmp_path / "x.bin", UsageError)
    assert "CVE-2025-32434" in message and "torch 2.5.1+cpu" in message


def test_without_torch_the_extra_is_named(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin")
    program = """
import sys
sys.modules["torch"] = None
from deltafmt.errors import MissingExtraError
from deltafmt.hf_directory import open_plain
try:
    open_plain(sys.argv[1])
except MissingExtraError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "x.bin"], capture_output=True, text=True, check=True
    )
    assert "torch, which is not installed" in done.stdout and "deltafmt[torch]" in done.stdout


def test_a_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "x.bin", AccessError)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name, data in {"x/constants.pkl": b"\x80\x02).", "x/data.pkl": b"\x80\x02}.", "x/version": b"3\n"}.items():
            archive.writestr(name, data)
    assert "TorchScript" in refused(tmp_path / "x.pt", MalformedError)


def test_any_values_survive(tmp_path: Path) -> None:
    special: dict[str, Any] = {"nan": float("nan"), "inf": float("-inf"), "zero": -0.0}
    tensors = {name: torch.tensor(value) for name, value in special.items()}
    torch.save(tensors, tmp_path / "x.bin")
    with open_plain(tmp_path) as checkpoint:
        assert_same(checkpoint, tensors)
