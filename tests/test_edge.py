"""The edge reader: common types, a prefix of the components, a budget of bytes; with nothing but the bare package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import deltafmt
from deltafmt import RefusedError, UsageError, WrongBaseError, edge
from hostile import Tensor, f32, write_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
LAYERS = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
SIDE = 96


def bf16(values: np.ndarray[Any, Any]) -> Tensor:
    return Tensor("BF16", values.shape, values.astype(BF16).tobytes())


def moved(seed: int) -> np.ndarray[Any, Any]:
    """A difference of many components, each half as strong as the one before."""
    random = np.random.default_rng(seed)
    left, right = (np.linalg.qr(random.standard_normal((SIDE, 24)))[0] for _ in range(2))
    moved: np.ndarray[Any, Any] = ((left * 4.0 * 0.5 ** np.arange(24)) @ right.T).astype(np.float32)
    return moved


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and its fine-tune with 16 components in `packed` (a directory) and `packed.safetensors`."""
    root = tmp_path_factory.mktemp("edge")
    base = {name: np.random.default_rng(place).standard_normal((SIDE, SIDE)) for place, name in enumerate(LAYERS)}
    tuned = {name: weight + moved(10 + place) for place, (name, weight) in enumerate(base.items())}
    other = {"ids": Tensor("I64", (3,), bytes(24)), "scalar": f32()}
    write_checkpoint(
        root / "base", {name: bf16(weight) for name, weight in base.items()} | other | {"norm": f32(SIDE, seed=1)}
    )
    write_checkpoint(
        root / "tuned", {name: bf16(weight) for name, weight in tuned.items()} | other | {"norm": f32(SIDE)}
    )
    for name in ("packed", "packed.safetensors"):
        single_file = name.endswith("safetensors")
        deltafmt.pack(root / "tuned", root / name, base=root / "base", rank=16, single_file=single_file)
    return root


@pytest.fixture(params=["packed", "packed.safetensors"])
def packed(room: Path, request: pytest.FixtureRequest) -> Path:
    return room / str(request.param)


# Types


def test_tensors_are_those_of_the_archive(room: Path, packed: Path) -> None:
    with edge.open(packed, room / "base") as small, deltafmt.open(packed, room / "base") as whole:
        assert small.keys() == whole.keys()
        assert small.rank is None
        for name in small.keys():  # noqa: SIM118
            expected = whole.get_tensor(name)
            found = small.get(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert found.tobytes() == expected.tobytes()
            assert small.shape(name) == expected.shape
        assert small.dtype(LAYERS[0]) == "BF16"


def test_bf16_as_float32_and_as_bits(room: Path, packed: Path) -> None:
    with edge.open(packed, room / "base") as small:
        native = small.get(LAYERS[0])
        assert native.dtype == BF16
        values, bits = small.get(LAYERS[0], "float32"), small.get(LAYERS[0], "uint16")
        assert (values.dtype.name, bits.dtype.name) == ("float32", "uint16")
        assert np.array_equal(values, native.astype(np.float32))
        assert np.array_equal(bits, native.view(np.uint16))


def test_every_dtype(tmp_path: Path) -> None:
    kinds = {
        "F64": "f8", "F32": "f4", "F16": "f2", "BF16": BF16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2, "I16": "i2", "U16": "u2", "I8": "i1", "I64": "i8", "BOOL": "?", "C64": "c8",
    }  # fmt: skip
    given = {name: np.array([[0, 1, 1], [1, 0, 1]]).astype(kind) for name, kind in kinds.items()}
    given["F64"][0, 0] = 1e300  # infinity in float32, without a warning
    write_checkpoint(tmp_path / "src", {name: Tensor(name, (2, 3), array.tobytes()) for name, array in given.items()})
    deltafmt.pack(tmp_path / "src", tmp_path / "packed")
    with edge.open(tmp_path / "packed") as small, np.errstate(over="ignore"):
        for name, array in given.items():
            assert np.array_equal(small.get(name), array)
            if name.startswith(("F", "BF")):
                assert np.array_equal(small.get(name, "float32"), array.astype(np.float32))
            else:
                with pytest.raises(UsageError):
                    small.get(name, "float32")
            if array.dtype.itemsize == 2:
                assert small.get(name, "uint16").tobytes() == array.tobytes()
            else:
                with pytest.raises(UsageError):
                    small.get(name, "uint16")


def test_rows(room: Path, packed: Path) -> None:
    with edge.open(packed, room / "base", rank=3) as small:
        whole = small.get(LAYERS[1], "float32")
        for rows in (slice(5, 9), slice(None, 2), slice(-3, None), slice(7, 7), slice(9, 5), slice(90, 500)):
            assert np.array_equal(small.get(LAYERS[1], "float32", rows=rows), whole[rows])
        assert small.get("scalar").shape == ()
        for name, rows in ((LAYERS[1], slice(0, 8, 2)), ("scalar", slice(0, 1))):
            with pytest.raises(UsageError):
                small.get(name, rows=rows)


# A prefix of the components


def factors(archive: Path, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], float]:
    """The factors of a tensor and their scale, by way of the manifest."""
    text = (archive / "deltafmt.json").read_text()
    (low,) = [term for term in json.loads(text)["tensors"][name]["recipe"]["terms"] if term["op"] == "lowrank"]
    with deltafmt.open(archive) as opened:
        stored = [opened._archive.stored_array(low[key]["array"]) for key in ("a", "b")]
        kinds = [opened._archive.manifest.arrays[low[key]["array"]] for key in ("a", "b")]
    a, b = (bits.view(kind.dtype.values).reshape(kind.shape) for bits, kind in zip(stored, kinds, strict=True))
    return a.astype(np.float64), b.astype(np.float64), low.get("scale", 1.0)


@pytest.mark.parametrize("rank", [1, 5, 16, 17, 1000])
def test_a_prefix_is_the_base_and_the_first_components(room: Path, packed: Path, rank: int) -> None:
    with edge.open(packed, room / "base", rank=rank) as small, edge.open(packed, room / "base") as full:
        for place, name in enumerate(LAYERS):
            a, b, scale = factors(room / "packed", name)
            assert len(a) == 16
            base = np.random.default_rng(place).standard_normal((SIDE, SIDE)).astype(BF16).astype(np.float64)
            expected = base + scale * b[:rank].T @ a[:rank]
            apart = np.abs(small.get(name, "float32") - expected)
            assert (apart <= 2.0**-8 * np.abs(expected) + 1e-5).all()
            if rank >= 16:
                assert np.array_equal(small.get(name), full.get(name))
        assert np.array_equal(small.get("norm"), full.get("norm"))


def test_each_component_brings_it_closer(room: Path) -> None:
    with deltafmt.open(room / "packed", room / "base") as archive:
        exact = archive.get_tensor(LAYERS[0]).astype(np.float32)
    errors = []
    for rank in (1, 2, 4, 8):
        with edge.open(room / "packed", room / "base", rank=rank) as small:
            errors.append(np.linalg.norm(small.get(LAYERS[0], "float32") - exact))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 5


def test_exact_tensors_are_never_cut(tmp_path: Path) -> None:
    """A merged adapter is stored as integer factors and what they miss: all of it is needed."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((256, 256)).astype(np.float32) / 16
    left, right = (random.standard_normal((256, 4)).astype(np.float32) / 16 for _ in range(2))
    write_checkpoint(tmp_path / "base", {LAYERS[0]: bf16(weight)})
    write_checkpoint(tmp_path / "tuned", {LAYERS[0]: bf16(weight.astype(BF16).astype(np.float32) + left @ right.T)})
    report = deltafmt.pack(tmp_path / "tuned", tmp_path / "packed", base=tmp_path / "base")
    assert report.tensors[LAYERS[0]].method == "patch-lowrank"
    with (
        edge.open(tmp_path / "packed", tmp_path / "base", rank=1) as small,
        deltafmt.open(tmp_path / "packed", tmp_path / "base") as whole,
    ):
        assert small.get(LAYERS[0]).tobytes() == whole.tensor_bytes(LAYERS[0])


def test_layers_that_share_an_anchor(tmp_path: Path) -> None:
    """Low rank inside one model: no base is needed, and what refers to a cut tensor is cut with it."""
    anchor = np.random.default_rng(1).standard_normal((SIDE, SIDE))
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(4)]
    layers = {name: bf16(anchor + (moved(place) if place else 0)) for place, name in enumerate(names)}
    layers["tied.weight"] = layers[names[3]]
    write_checkpoint(tmp_path / "src", layers)
    deltafmt.pack(tmp_path / "src", tmp_path / "packed", share="1:0,2:0,3:0", rank=8)
    with edge.open(tmp_path / "packed", rank=2) as small, edge.open(tmp_path / "packed") as full:
        assert np.array_equal(small.get(names[0]), full.get(names[0]))
        assert not np.array_equal(small.get(names[1]), full.get(names[1]))


# A budget


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tensor of long rows, in `packed` with 48 components: 16 to a chunk, which is what is read of a factor."""
    root = tmp_path_factory.mktemp("wide")
    base, other = (np.random.default_rng(seed).standard_normal((160, 16384)).astype(np.float32) for seed in (0, 1))
    write_checkpoint(root / "base", {LAYERS[0]: bf16(base)})
    write_checkpoint(root / "tuned", {LAYERS[0]: bf16(base + other / 8)})
    deltafmt.pack(root / "tuned", root / "packed", base=root / "base", rank=48)
    deltafmt.pack(root / "tuned", root / "packed.safetensors", base=root / "base", rank=48, single_file=True)
    return root


@pytest.mark.parametrize("form", ["packed", "packed.safetensors"])
def test_the_largest_rank_that_fits(wide: Path, form: str) -> None:
    sizes = {}
    for rank in (1, 16, 17, 32, 33, 48):
        with edge.open(wide / form, wide / "base", rank=rank) as small:
            sizes[rank] = small.bytes_to_read
    assert sizes[1] == sizes[16] < sizes[17] == sizes[32] < sizes[33] == sizes[48]
    for budget, best in ((sizes[1], 16), (sizes[32] - 1, 16), (sizes[32], 32), (sizes[32] + 1, 32), (sizes[48], None)):
        with edge.open(wide / form, wide / "base", max_bytes=budget) as small:
            assert small.rank == best
            assert small.bytes_to_read <= budget
    with edge.open(wide / form, wide / "base", max_bytes=sizes[16], rank=2) as small:
        assert small.rank == 2
    with pytest.raises(RefusedError, match="does not fit"):
        edge.open(wide / form, wide / "base", max_bytes=sizes[1] - 1)


@pytest.mark.parametrize("form", ["packed", "packed.safetensors"])
def test_no_more_is_read_than_the_budget_allows(wide: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where a shard is read; the text of the manifest is read by itself."""
    from deltafmt.safetensors_file import SafetensorsFile

    with edge.open(wide / form, wide / "base", rank=20) as small:
        budget = small.bytes_to_read
    read: dict[Path, int] = {}
    work = SafetensorsFile.read_into

    def counted(self: SafetensorsFile, offset: int, out: np.ndarray[Any, Any]) -> None:
        read[self.path] = read.get(self.path, 0) + out.nbytes
        work(self, offset, out)

    monkeypatch.setattr(SafetensorsFile, "read_into", counted)
    with edge.open(wide / form, wide / "base", max_bytes=budget) as small:
        small.get(LAYERS[0])
    ours = sum(size for path, size in read.items() if wide / form in (path, path.parent))
    manifest = (wide / form / "deltafmt.json").stat().st_size if form == "packed" else 0
    assert ours + manifest == budget


def test_what_has_no_components_has_to_fit_as_it_is(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src", {"w": f32(100, 100)})
    deltafmt.pack(tmp_path / "src", tmp_path / "packed")
    with edge.open(tmp_path / "packed") as small:
        size = small.bytes_to_read
    assert size < sum(path.stat().st_size for path in (tmp_path / "packed").iterdir())  # sidecars are not counted
    with edge.open(tmp_path / "packed", max_bytes=size) as small:
        assert small.rank is None
    with pytest.raises(RefusedError, match="nothing to leave out"):
        edge.open(tmp_path / "packed", max_bytes=size - 1)


# The rest


def test_sidecars(room: Path, packed: Path) -> None:
    with edge.open(packed) as small:
        assert small.sidecars() == ["config.json"]
        assert small.sidecar("config.json") == (room / "tuned/config.json").read_bytes()
        with pytest.raises(UsageError):
            small.sidecar("vocab.txt")


@pytest.mark.parametrize(
    "options",
    [{"rank": 2.5}, {"rank": True}, {"rank": "2"}, {"rank": -1}, {"max_bytes": "1MB"}, {"max_bytes": 1e9}],
    ids=str,
)
def test_what_is_no_number_is_said_at_once(room: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(options))} is no whole number"):
        edge.open(room / "packed", **options)


def test_numbers_of_numpy_are_numbers(room: Path) -> None:
    with edge.open(room / "packed", rank=np.int64(3)) as small:  # type: ignore[arg-type]
        assert small.rank == 3
        assert small.get("norm", rows=slice(np.int64(1), np.int64(3))).shape == (2,)


@pytest.mark.parametrize("rows", [5, (0, 5), slice("a", None), slice(0.0, 5.0), slice(False, True)], ids=str)
def test_rows_are_a_slice_of_whole_numbers(room: Path, rows: Any) -> None:
    with edge.open(room / "packed") as small, pytest.raises(UsageError, match="slices of whole numbers"):
        small.get("norm", rows=rows)


def test_mistakes(room: Path, packed: Path) -> None:
    with pytest.raises(UsageError):
        edge.open(packed, rank=0)
    with edge.open(packed) as small:
        with pytest.raises(UsageError):
            small.get("no such tensor")
        with pytest.raises(WrongBaseError):
            small.get(LAYERS[0])
        assert small.get("norm").shape == (SIDE,)  # needs no base
    with pytest.raises(UsageError):
        small.get("norm")


def test_nothing_but_the_bare_package_is_imported(room: Path) -> None:
    """In a process in which importing anything else fails; and of the bare package what the docstring of edge says."""
    program = f"""
import sys
missing = ["torch", "transformers", "safetensors", "click", "rich", "huggingface_hub", "peft", "gguf", "accelerate"]
sys.modules.update(dict.fromkeys(missing))  # None: importing it fails
before = set(sys.modules)
from deltafmt import edge
with edge.open({str(room / "packed.safetensors")!r}, {str(room / "base")!r}, rank=2) as small:
    assert all(small.get(name).size for name in small.keys())
    assert small.get({LAYERS[0]!r}, "float32").dtype == "float32"
loaded = {{name.split(".")[0] for name in sys.modules if name not in before and sys.modules[name]}}
print(*sorted(loaded - set(sys.stdlib_module_names) - set(missing)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    needed = {"ml_dtypes", "numpy", "threadpoolctl", "xxhash", "zstandard"}
    assert {name for name in done.stdout.split() if not name.startswith("_")} == {"deltafmt"} | needed
    assert edge.__doc__ is not None and all(name in edge.__doc__ for name in needed)


@pytest.mark.slow
def test_an_environment_without_torch(room: Path, tmp_path: Path, record_property: Any) -> None:
    """The package as pip installs it, with what it depends on and nothing else; its size is recorded and printed."""
    here, source = Path(__file__).parents[1], tmp_path / "source"
    built = shutil.ignore_patterns("__pycache__", "libkernels*")
    shutil.copytree(here / "deltafmt", source / "deltafmt", ignore=built)  # building it here would swap the kernels
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(here / name, source / name)
    python = tmp_path / "environment/bin/python"
    _run(sys.executable, "-m", "venv", tmp_path / "environment")
    there = set(tmp_path.glob("environment/lib/*/site-packages/*"))
    _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", source)
    program = f"""
import importlib.util, json, sysconfig
from deltafmt import edge
for name in ("torch", "transformers", "peft", "gguf", "huggingface_hub"):
    assert importlib.util.find_spec(name) is None, name
sums = {{}}
with edge.open({str(room / "packed")!r}, {str(room / "base")!r}, rank=2) as small:
    for name in small.keys():
        kind = "float32" if small.dtype(name) == "BF16" else "native"
        sums[name] = float(small.get(name, kind).sum(dtype="float64"))
print(json.dumps([sysconfig.get_path("purelib"), sums]))
"""
    site, sums = json.loads(_run(python, "-I", "-c", program))
    assert tmp_path in Path(site).parents
    with edge.open(room / "packed", room / "base", rank=2) as small:
        assert sums.keys() == set(small.keys())
        for name, found in sums.items():
            kind: Any = "float32" if small.dtype(name) == "BF16" else "native"
            assert found == pytest.approx(float(small.get(name, kind).sum(dtype="float64")), rel=1e-6, abs=1e-3)
    packages = [path for path in Path(site).iterdir() if path not in there]
    for what, parts in (("deltafmt", [path for path in packages if "deltafmt" in path.name]), ("everything", packages)):
        size = sum(file.stat().st_size for part in parts for file in [part, *part.rglob("*")] if file.is_file())
        assert size > 0
        record_property(f"installed bytes, {what}", size)
        print(f"installed, {what}: {size / 1e6:.2f} MB")


def _run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
