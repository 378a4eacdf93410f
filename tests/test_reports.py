"""What reports say of casts, of requests that came to nothing, and of archives packed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

import deltafmt
from command_line import Run, object_in, write
from hostile import tree

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
BF16 = ml_dtypes.bfloat16


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def size_of(folder: Path) -> int:
    return sum(len(content) for content in tree(folder).values())


def distance(found: Array, original: Array) -> float:
    """The relative error, over what is finite."""
    finite = np.isfinite(original.astype(np.float64))
    wide = original.astype(np.float64)[finite]
    return float(np.linalg.norm(found.astype(np.float64)[finite] - wide) / np.linalg.norm(wide))


# --- Casts ----------------------------------------------------------------------------------------------------------

PLAIN: Tensors = {
    "w": normal(0, 300, 200),
    "long": normal(1, 3_000_000),  # in several pieces
    "odd": np.array([1.1, np.nan, -np.inf, 3.3e-39, -0.0], np.float32),
    "zeros": np.zeros(9, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "narrow": normal(2, 64).astype(BF16),
    "ids": np.arange(7),
}


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "BF16"), ("float16", "F16"), ("float64", "F64")])
def test_a_cast_says_what_it_lost(tmp_path: Path, dtype: str, name: str) -> None:
    source = write(tmp_path / "source", PLAIN)
    packed = deltafmt.pack(source, tmp_path / "packed")
    report = deltafmt.unpack(tmp_path / "packed", tmp_path / "out", dtype=dtype)
    found = load_file(tmp_path / "out/model.safetensors")
    assert not report.exact
    for tensor in ("w", "long", "odd", "narrow"):
        told = report.tensors[tensor]
        assert (told.dtype, told.logical_bytes) == (name, PLAIN[tensor].nbytes)
        assert told.rel_error == pytest.approx(distance(found[tensor], PLAIN[tensor]), rel=1e-9, abs=0)
    assert (report.tensors["w"].rel_error == 0) == (dtype == "float64")
    assert [report.tensors[each].rel_error for each in ("zeros", "empty", "ids")] == [0, 0, 0]
    assert report.tensors["ids"].dtype == "I64"
    assert report.max_rel_error == max(each.rel_error or 0 for each in report.tensors.values())
    assert report.logical_bytes == packed.logical_bytes == size_of(source)
    assert report.ratio == packed.ratio == size_of(tmp_path / "packed") / size_of(source)
    assert report.written_bytes == size_of(tmp_path / "out")


def test_what_is_cast_to_what_it_is_stays_exact(tmp_path: Path) -> None:
    deltafmt.pack(write(tmp_path / "source", {"w": normal(0, 8, 8).astype(BF16), "ids": np.arange(3)}), tmp_path / "p")
    report = deltafmt.unpack(tmp_path / "p", tmp_path / "out", dtype="bfloat16")
    assert report.exact and report.max_rel_error == 0


def test_the_errors_of_an_approximation_and_of_a_cast_add_up(tmp_path: Path) -> None:
    weight = normal(0, 128, 8) @ normal(1, 8, 96) + 0.01 * normal(2, 128, 96)
    source = write(tmp_path / "source", {"w": weight})
    stated = deltafmt.pack(source, tmp_path / "packed", rank=8).max_rel_error
    report = deltafmt.unpack(tmp_path / "packed", tmp_path / "out", dtype="bfloat16")
    error = distance(load_file(tmp_path / "out/model.safetensors")["w"], weight)
    assert 0 < stated < error <= report.max_rel_error < 2 * stated + 2.0**-8
    assert report.tensors["w"].rel_error == report.max_rel_error


def test_the_table_of_a_cast(tmp_path: Path, run: Run) -> None:
    write(tmp_path / "source", {"w": normal(0, 64, 64)})
    run("pack", "source", "packed")
    code, out, _ = run("unpack", "packed", "out", "--dtype", "bfloat16")
    assert code == 0 and "approximate: relative error at most 0.00" in out and "at most 0\n" not in out
    code, out, _ = run("unpack", "packed", "wide", "--dtype", "float64")
    assert code == 0 and "no error was measured" in out


# --- In vain --------------------------------------------------------------------------------------------------------


def layers(*weights: Array) -> Tensors:
    return {f"model.layers.{place}.mlp.up_proj.weight": weight for place, weight in enumerate(weights)}


def test_layers_that_share_nothing(tmp_path: Path, run: Run) -> None:
    write(tmp_path / "source", layers(*(normal(seed, 48, 32) for seed in range(8))))
    told = object_in(run("pack", "source", "packed", "--share", "alternating", "--json")[1])
    assert len(told["notes"]) == 1 and told["notes"][0].startswith("no layer shares anything")
    code, out, _ = run("pack", "source", "again", "--share", "alternating")
    assert code == 0 and f"Note: {told['notes'][0]}." in " ".join(out.split())
    both = deltafmt.pack("source", "third", share="alternating", method="lowrank", force=True)
    assert [note.split(":")[0] for note in both.notes] == [
        "no layer shares anything",
        "no tensor became low rank",
    ]


def test_layers_that_share_something(tmp_path: Path) -> None:
    weight = normal(0, 64, 48)
    alike = layers(*(weight * np.float32(1 + 1e-4 * (seed % 2)) for seed in range(8)))
    assert deltafmt.pack(write(tmp_path / "source", alike), tmp_path / "packed", share="alternating").notes == ()
    assert deltafmt.pack(tmp_path / "source", tmp_path / "plain").notes == ()


def test_no_tensor_that_low_rank_makes_smaller(tmp_path: Path, run: Run) -> None:
    write(tmp_path / "base", {"w": normal(0, 64, 64)})
    write(tmp_path / "source", {"w": normal(1, 64, 64)})
    told = object_in(run("pack", "source", "packed", "--base", "base", "--method", "lowrank", "--json")[1])
    assert told["exact"] and len(told["notes"]) == 1
    assert told["notes"][0].startswith("no tensor became low rank")
    write(tmp_path / "low", {"w": normal(0, 64, 64) + normal(2, 64, 1) @ normal(3, 1, 64)})
    assert deltafmt.pack("low", "packed low", base="base", rank=1).notes == ()


# --- Low rank without an error ----------------------------------------------------------------------------------------


def test_low_rank_without_an_error_makes_no_promise(tmp_path: Path, run: Run) -> None:
    """Its factors are right here, and maybe not to the last bit on another machine: there is no digest."""
    random = np.random.default_rng(0)
    column = np.exp2(random.integers(-4, 4, 256))
    powers = np.outer(column, random.permutation(column)).astype(np.float32)  # factors of one norm: powers of 2 as well
    write(tmp_path / "source", {"powers": powers})
    _, out, _ = run("pack", "source", "packed", "--rank", "2")
    assert "no error was measured, but not every tensor is the original bit for bit" in out
    report = deltafmt.inspect(tmp_path / "packed")
    assert not report.exact and report.tensors["powers"].rel_error == 0


# --- Packed again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"rank": 2}], ids=["lossless", "lossy"])
@pytest.mark.parametrize("single_file", [False, True])
def test_the_size_of_the_original_is_that_of_the_original(
    tmp_path: Path, options: dict[str, Any], single_file: bool
) -> None:
    source = write(tmp_path / "source", {"w": normal(0, 100, 90), "ids": np.arange(1000)})
    deltafmt.pack(source, tmp_path / "packed", **options)
    again = tmp_path / ("again.safetensors" if single_file else "again")
    report = deltafmt.pack(tmp_path / "packed", again, single_file=single_file)
    assert report.logical_bytes == deltafmt.inspect(again).logical_bytes == size_of(source)
    assert report.ratio == deltafmt.inspect(again).ratio


# --- Usage errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    ["", "pack", "pack a b c", "pack a b --rank", "pack a b --rank x", "pack a b --target-size 5Q", "unpack a", "nope",
     "inspect --nope a", "verify a --base x=", "eval a", "export-lora a b --format x", "inspect a --limit rows=1"],
)  # fmt: skip
def test_every_usage_error_is_json_too(run: Run, command: str) -> None:
    code, out, err = run(*command.split(), "--json")
    error = json.loads(out)["error"]
    assert (code, error["class"], error["exit_code"]) == (2, "UsageError", 2)
    assert err.startswith(f"deltafmt: error: {error['message']}")


def test_a_dtype_may_be_torchs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    deltafmt.pack(write(tmp_path / "source", {"w": normal(0, 8, 16)}), tmp_path / "packed")
    deltafmt.unpack(tmp_path / "packed", tmp_path / "out", dtype=torch.bfloat16)
    with deltafmt.open(tmp_path / "packed") as archive:
        assert archive.get_tensor("w").dtype == np.float32
    assert "BF16" in (tmp_path / "out/model.safetensors").read_bytes()[:200].decode("latin-1")


@pytest.mark.parametrize("size", [1e-200, 1e-30])
def test_a_cast_that_loses_everything_loses_all_of_it(tmp_path: Path, size: float) -> None:
    source = write(tmp_path / "source", {"w": size * np.ones((8, 16))})
    deltafmt.pack(source, tmp_path / "packed")
    report = deltafmt.unpack(tmp_path / "packed", tmp_path / "out", dtype="float32" if size < 1e-50 else "float16")
    assert report.tensors["w"].rel_error == pytest.approx(1)
