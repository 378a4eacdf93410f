"""The command line as users and scripts meet it: help, options, what is printed, JSON."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import pytest
from safetensors.numpy import load_file

from command_line import Run, object_in, weights, write
from deltafmt.arguments import size

RANK = 4


# Help and options


OPTIONS = {
    "pack": "--base --method --rank --energy --max-error --target-size --share --share-parts --include --exclude "
    "--force --jobs --overwrite --dry-run --json",
    "unpack": "--base --dtype --max-shard-size --jobs --overwrite --json",
    "inspect": "--tensors --json",
    "verify": "--base --against --json",
    "eval": "--base --text --against --against-base --mode --length --batch --tokens --device --dtype --markdown "
    "--json",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option_and_shows_examples(command: str, run: Run) -> None:
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    for option in [*OPTIONS[command].split(), "--limit", "--quiet", "--verbose"]:
        assert f"{option} " in out or f"{option}\n" in out
    assert f"Examples:\n    deltafmt {command} " in out


def test_version_and_no_command(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("deltafmt ")
    assert out.splitlines()[1:] == ["kernels: C"]
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("Usage: deltafmt")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4096", 4096),
        ("1B", 1),
        ("1kB", 1000),
        ("1 KiB", 1024),
        ("500MB", 500_000_000),
        ("1.5GB", 1_500_000_000),
        ("2GiB", 2_147_483_648),
        ("0.5gib", 536_870_912),
        ("1TiB", 1_099_511_627_776),
        ("3TB", 3_000_000_000_000),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "500M", "2G", "GB", "-1", "1e9", "0", "0.1B", "1,5GB", "٣", "1" * 5000, "nan", "1GiBs"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter):
        size(text)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["pack", "a"], "Missing argument 'DST'"),
        (["frob"], "No such command 'frob'"),
        (["pack", "a", "b", "--rank", "0"], "Invalid value for '--rank': 0 is not in the range x>=1"),
        (["pack", "a", "b", "--rank", "-3"], "Invalid value for '--rank': -3 is not in the range x>=1"),
        (["pack", "a", "b", "--jobs", "0"], "Invalid value for '--jobs': 0 is not in the range x>=1"),
        (["pack", "a", "b", "--energy", "1.5"], "Invalid value for '--energy': 1.5 is not in the range 0<x<=1"),
        (["pack", "a", "b", "--energy", "nan"], "Invalid value for '--energy': 'nan' is not a finite number"),
        (["pack", "a", "b", "--max-error", "-1"], "Invalid value for '--max-error': -1.0 is not in the range 0<x<1"),
        (
            ["pack", "a", "b", "--share", "5:4,5:3"],
            "Invalid value for '--share': the layout names an anchor for layer 5 twice",
        ),
        (
            ["unpack", "a", "b", "--max-shard-size", "5G"],
            "Invalid value for '--max-shard-size': '5G' is not a size. Write bytes, or a number with kB, MB, GB, TB "
            "(powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024): 500MB, 2GiB, 1.5GB",
        ),
        (
            ["--limit", "rnak=3", "inspect", "a"],
            "Invalid value for '--limit': 'rnak=3' is not NAME=VALUE with NAME one of manifest_bytes, header_bytes, "
            "tensors, shards, sidecars, dimensions, tensor_bytes, total_bytes, rank",
        ),
    ],
)  # fmt: skip
def test_a_wrong_option_is_told_in_one_line(arguments: list[str], told: str, run: Run) -> None:
    known = arguments[0] in OPTIONS and "a" in arguments
    command = f"deltafmt {arguments[0]}" if known else "deltafmt"
    expected = f"deltafmt: error: {told}\ndeltafmt: hint: See: {command} --help\n"
    assert run(*arguments) == (2, "", expected)


# Packing and back


def test_a_round_trip_gives_the_same_bytes(run: Run, tuned: Path, base: Path) -> None:
    code, out, err = run("pack", "tuned", "packed", "--base", "base")
    assert (code, err) == (0, "")
    assert "exact: every tensor comes back equal to the original, bit for bit" in out
    code, out, err = run("unpack", "packed", "restored", "--base", "base")
    assert (code, err) == (0, "")
    for name in ("model.safetensors", "config.json"):
        assert Path("restored", name).read_bytes() == (tuned / name).read_bytes()
    code, out, err = run("verify", "packed", "--base", "base", "--against", "tuned")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["OK", "OK", "OK"]
    assert "tuned: every tensor and file is the same, bit for bit" in out


def test_json_is_one_object_with_the_sizes_on_disk(run: Run, tuned: Path, base: Path) -> None:
    code, out, err = run("pack", "tuned", "packed", "--base", "base", "--json")
    assert (code, err) == (0, "")
    report = object_in(out)
    assert report["logical_bytes"] == sum(path.stat().st_size for path in tuned.iterdir())
    assert report["stored_bytes"] == sum(path.stat().st_size for path in Path("packed").iterdir())
    assert report["ratio"] == report["stored_bytes"] / report["logical_bytes"]
    assert sum(report["roles"].values()) == report["stored_bytes"]
    assert (report["exact"], report["max_rel_error"], report["dry_run"]) == (True, 0, False)
    assert report["seconds"] > 0
    assert set(report["tensors"]) == set(weights(1))
    tensor = report["tensors"]["encoder.layer.0.output.dense.weight"]
    assert (tensor["shape"], tensor["dtype"], tensor["logical_bytes"]) == ([128, 128], "F32", 4 * 128 * 128)
    assert (tensor["method"], tensor["rel_error"]) == ("patch-lowrank", 0), "the fixture's change has rank 32"
    assert 4 <= tensor["rank"] <= 32
    for arguments in (["inspect", "packed"], ["verify", "packed"], ["unpack", "packed", "restored", "--base", "base"]):
        code, out, err = run(*arguments, "--json")
        assert (code, err) == (0, "")
        assert object_in(out)["stored_bytes"] == report["stored_bytes"]


def test_a_dry_run_writes_nothing_and_says_so(run: Run, base: Path) -> None:
    before = sorted(Path().rglob("*"))
    code, out, err = run("pack", "base", "deep/packed", "--dry-run")
    assert (code, err) == (0, "")
    assert out.endswith("Dry run: nothing was written.\n")
    assert sorted(Path().rglob("*")) == before
    _, told, _ = run("pack", "base", "packed", "--dry-run", "--json")
    assert object_in(told)["dry_run"] is True
    assert object_in(told)["stored_bytes"] == object_in(run("pack", "base", "packed", "--json")[1])["stored_bytes"]


def test_a_long_list_is_dumped_only_when_asked_for(run: Run, tmp_path: Path) -> None:
    names = {f"layer.{place}.norm.bias": np.arange(8, dtype=np.float32) + place for place in range(300)}
    write(tmp_path / "many", names)
    assert run("pack", "many", "packed")[0] == 0
    _, out, _ = run("inspect", "packed")
    assert len(out.splitlines()) < 40
    assert "300 tensors" in out
    _, out, _ = run("inspect", "packed", "--tensors")
    assert set(names) <= set(out.split())


def test_inspect_shows_what_shares_and_which_base_is_needed(run: Run, base: Path, tuned: Path, tmp_path: Path) -> None:
    tied = weights(5, layers=1) | {"lm_head.weight": weights(5)["encoder.layer.0.output.dense.weight"]}
    write(tmp_path / "tied", tied)
    run("pack", "tied", "packed-tied")
    _, out, _ = run("inspect", "packed-tied")
    assert "lm_head.weight   encoder.layer.0.output.dense.weight   ref\n" in out
    assert "2: config.json, model.safetensors" in out
    run("pack", "tuned", "packed", "--base", "base", "--rank", str(RANK))
    _, out, _ = run("inspect", "packed")
    assert "pass --base " in out
    assert "rank   tensors\n──────────────\n   4         3\n" in out
    _, out, _ = run("inspect", "packed", "--json")
    assert object_in(out)["ranks"] == dict.fromkeys(weights(1), RANK)
    assert object_in(out)["files"] == ["config.json", "model.safetensors"]


# Verifying


def test_a_lossy_archive_passes_by_the_error_it_states(run: Run, base: Path, tuned: Path) -> None:
    _, out, _ = run("pack", "tuned", "packed", "--base", "base", "--rank", str(RANK), "--json")
    report = object_in(out)
    assert (report["exact"], report["method"]) == (False, "lowrank")
    code, out, err = run("verify", "packed", "--base", "base", "--against", "tuned")
    assert (code, err) == (0, "")
    assert "tuned: 3 tensors off by the error that the archive states, all else is the same" in out
    run("unpack", "packed", "restored", "--base", "base")
    original, restored = (load_file(Path(folder, "model.safetensors")) for folder in ("tuned", "restored"))
    _, out, _ = run("verify", "packed", "--base", "base", "--against", "tuned", "--json")
    verified = object_in(out)
    assert (verified["equal"], verified["as_stated"]) == (False, True)
    for name, weight in original.items():
        error = np.linalg.norm(restored[name] - weight) / np.linalg.norm(weight)
        assert 1e-4 < error < 1e-1
        assert verified["tensors"][name]["rel_error"] == pytest.approx(error, rel=1e-3)
        assert report["tensors"][name]["rel_error"] == pytest.approx(error, rel=1e-3)


def test_a_lossy_archive_fails_beside_another_checkpoint(run: Run, base: Path, tuned: Path) -> None:
    run("pack", "tuned", "packed", "--base", "base", "--rank", str(RANK))
    code, out, _ = run("verify", "packed", "--base", "base", "--against", "base")
    assert code == 5
    assert "DIFFERENT  against  base: 3 differences" in out
    run("unpack", "packed", "restored", "--base", "base")
    Path("restored/config.json").write_text("{}\n")
    code, out, _ = run("verify", "packed", "--base", "base", "--against", "restored", "--json")
    assert code == 5
    assert object_in(out)["differences"] == {"config.json": "another file"}


def test_differences_are_shown_worst_first(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "one", weights(1, layers=4))
    other = weights(1, layers=4)
    name = "encoder.layer.{}.output.dense.weight".format
    other[name(0)][3, 5] += 0.01
    other[name(2)] *= 2
    other[name(3)] = other[name(3)][:64]
    write(tmp_path / "other", other)
    run("pack", "one", "packed")
    code, out, err = run("verify", "packed", "--against", "other")
    assert (code, err) == (5, "")
    rows = [line.split()[0] for line in out.splitlines() if line.startswith("encoder")]
    assert rows == [name(3), name(2), name(0)]
    assert f"{name(2)}   relative error 0.5, none stated" in out
    assert f"{name(3)}   F32 [128, 128] in the archive, F32 [64, 128] in the checkpoint" in out


def test_equal_means_equal_bits(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "one", {"zeros": np.zeros(4, np.float32), "ones": np.ones(4, np.float32)})
    write(tmp_path / "other", {"zeros": -np.zeros(4, np.float32), "ones": np.ones(4, np.float32)})
    run("pack", "one", "packed")
    code, out, _ = run("verify", "packed", "--against", "other", "--json")
    assert code == 5
    assert list(object_in(out)["differences"]) == ["zeros"]


def test_json_has_null_for_what_is_no_number(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "one", {"weight": np.array([1, np.nan], np.float32)})
    write(tmp_path / "other", {"weight": np.array([1, 2], np.float32)})
    run("pack", "one", "packed")
    code, out, err = run("verify", "packed", "--against", "other", "--json")
    assert (code, err) == (5, "")
    assert object_in(out)["tensors"]["weight"]["rel_error"] is None


def test_without_its_base_an_archive_is_checked_as_far_as_it_goes(run: Run, base: Path, tuned: Path) -> None:
    run("pack", "tuned", "packed", "--base", "base")
    code, out, err = run("verify", "packed")
    assert (code, err) == (0, "")
    assert "NOT CHECKED  base     3 tensors could not be rebuilt without the base: pass --base " in out
    code, out, _ = run("verify", "packed", "--json")
    assert code == 0
    assert (object_in(out)["base_checked"], len(object_in(out)["unchecked"])) == (False, 3)
    code, out, err = run("verify", "packed", "--against", "tuned")
    assert (code, out) == (6, "")
    assert err.startswith("deltafmt: error: packed: ")
