"""The command line as users and scripts meet it: streams, exit codes, messages, JSON, what an interruption leaves."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deltafmt.cli import main, size

ESCAPE = "\x1b"
Arrays = dict[str, np.ndarray[Any, Any]]
Run = Callable[..., tuple[int, str, str]]

RANK = 4


def write(folder: Path, tensors: Arrays) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "bert"}\n')
    return folder


def weights(seed: int, layers: int = 3, width: int = 128) -> Arrays:
    random = np.random.default_rng(seed)
    return {
        f"encoder.layer.{layer}.output.dense.weight": random.standard_normal((width, width), np.float32)
        for layer in range(layers)
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", weights(1))


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """Each weight moved along many directions, a few of them far: rank 4 holds most of it, and not all."""
    random = np.random.default_rng(2)
    moved = {}
    for name, weight in weights(1).items():
        left, right = (random.standard_normal((128, 32), np.float32) for _ in range(2))
        strength = (2.0 ** -np.arange(32) / 32).astype(np.float32)
        moved[name] = weight + (left * strength) @ right.T
    return write(tmp_path / "tuned", moved)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in `tmp_path`; exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return command


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "deltafmt", *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def object_in(out: str) -> dict[str, Any]:
    """The one JSON object in a text, strictly read."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    parsed: dict[str, Any] = json.loads(out, parse_constant=refuse)
    assert isinstance(parsed, dict)
    return parsed


# Help and options


OPTIONS = {
    "pack": "--base --method --rank --energy --max-error --target-size --share --share-parts --include --exclude "
    "--force --jobs --overwrite --dry-run --json",
    "unpack": "--base --dtype --max-shard-size --jobs --overwrite --json",
    "inspect": "--tensors --json",
    "verify": "--base --against --json",
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
    assert (tensor["method"], tensor["rank"], tensor["rel_error"]) == ("patch", None, 0)
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


# Errors


def test_exit_1_input_that_is_not_there(run: Run) -> None:
    assert run("pack", "./nowhere", "packed") == (
        1,
        "",
        "deltafmt: error: './nowhere' does not exist\n"
        "deltafmt: hint: Name a directory, a weight file, or a Hub id (org/name)\n",
    )


def test_an_empty_path_is_not_the_current_directory(run: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an unset variable of a script leaves: `deltafmt unpack packed "$OUT" --overwrite`."""
    run("pack", "base", "packed")
    monkeypatch.chdir(base)
    before = sorted(base.iterdir())
    for arguments in (
        ("unpack", "../packed", "", "--overwrite"),
        ("pack", "", "../new"),
        ("pack", ".", "../new", "--base", ""),
        ("verify", "../packed", "--against", ""),
        ("inspect", ""),
    ):
        code = main(arguments)
        assert code == 2, arguments
    assert sorted(base.iterdir()) == before


def test_a_base_that_no_tensor_needs_is_not_missed(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "one", {"weight": np.ones(3, np.float32)})
    write(tmp_path / "other", {"something else": np.zeros(5, np.float32)})
    run("pack", "one", "packed", "--base", "other")
    code, out, err = run("verify", "packed")
    assert (code, err) == (0, "")
    assert "1 tensor rebuilt" in out and "NOT CHECKED" not in out


def test_a_base_that_needs_a_base_is_told_what_to_do(run: Run, base: Path, tuned: Path, tmp_path: Path) -> None:
    run("pack", "tuned", "packed", "--base", "base")
    write(tmp_path / "next", {name: weight + 1 for name, weight in weights(1).items()})
    code, out, err = run("pack", "next", "again", "--base", "packed")
    assert (code, out) == (6, "")
    assert "unpack it first" in err.splitlines()[1]
    # It holds all that is asked of it, by its digests: what came of that could not be unpacked with the same --base.
    assert run("pack", "tuned", "again", "--base", "packed")[0] == 6
    run("unpack", "packed", "unpacked", "--base", "base")
    assert run("pack", "next", "again", "--base", "unpacked")[0] == 0


def test_exit_2_destination_exists(run: Run, base: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    assert run("pack", "base", "packed") == (
        2,
        "",
        f"deltafmt: error: {tmp_path}/packed: the destination exists\n"
        "deltafmt: hint: Choose another, or pass --overwrite\n",
    )
    assert list((tmp_path / "packed").iterdir()) == []
    assert run("pack", "base", "packed", "--overwrite")[0] == 0


def test_exit_3_not_an_archive(run: Run, base: Path) -> None:
    assert run("inspect", "base") == (
        3,
        "",
        "deltafmt: error: no deltafmt.json in 'base'\n"
        "deltafmt: hint: Not a deltafmt archive (or an interrupted pack: run it again)\n",
    )


def test_exit_3_more_than_a_limit_allows_until_it_is_raised(run: Run, base: Path) -> None:
    for arguments in (["--limit", "tensors=1", "pack"], ["pack", "--limit", "tensors=1"]):
        code, out, err = run(*arguments, "base", "packed")
        assert (code, out) == (3, "")
    wanted = re.fullmatch(
        r"deltafmt: hint: If you trust the file, raise the limit: --limit (\w+=\d+)", err.splitlines()[1]
    )
    assert wanted is not None
    assert run("pack", "base", "packed", "--limit", wanted[1])[0] == 0
    for command in (["inspect", "packed"], ["verify", "packed"], ["unpack", "packed", "restored"]):
        assert run(*command, "--limit", "tensor_bytes=1KiB")[0] == 3
        assert run(*command, "--limit", "tensor_bytes=64KiB")[0] == 0


def test_exit_4_a_newer_version(run: Run, base: Path) -> None:
    run("pack", "base", "packed")
    manifest = Path("packed/deltafmt.json")
    begin = len('{"$checksum":"sha256:')
    content = bytearray(manifest.read_bytes().replace(b'"version":"1.0"', b'"version":"2.0"'))
    content[begin : begin + 64] = b"0" * 64  # as spec/manifest.md has it
    content[begin : begin + 64] = hashlib.sha256(content).hexdigest().encode()
    manifest.write_bytes(content)
    code, out, err = run("unpack", "packed", "restored")
    assert (code, out) == (4, "")
    assert re.match(r"deltafmt: error: packed/deltafmt.json.*2\.0.*\ndeltafmt: hint: ", err)


def test_exit_5_a_flipped_bit(run: Run, base: Path) -> None:
    run("pack", "base", "packed")
    shard = next(Path("packed").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    for command in (["verify", "packed"], ["unpack", "packed", "restored"]):
        code, out, err = run(*command)
        assert (code, out) == (5, "")
        assert err.startswith("deltafmt: error: packed/")
        code, out, told = run(*command, "--json")
        error = object_in(out)["error"]
        assert (code, error["exit_code"], error["class"]) == (5, 5, "IntegrityError")
        assert error["reason"] == "chunk-checksum"
        assert told == err
    assert not Path("restored").exists()


def test_exit_6_another_base(run: Run, base: Path, tuned: Path) -> None:
    run("pack", "tuned", "packed", "--base", "base")
    code, out, err = run("unpack", "packed", "restored", "--base", "tuned", "--json")
    assert code == 6
    error = object_in(out)["error"]
    assert set(error) == {"class", "reason", "message", "where", "expected", "found", "hint", "exit_code"}
    assert (error["class"], error["reason"], error["where"]) == ("WrongBaseError", "base-mismatch", "packed")
    assert error["expected"] != error["found"]
    assert err.splitlines()[0].startswith("deltafmt: error: packed: ")


def test_a_usage_error_is_json_too(run: Run) -> None:
    code, out, err = run("pack", "a", "b", "--rank", "0", "--json")
    error = object_in(out)["error"]
    assert (code, error["class"], error["exit_code"]) == (2, "UsageError", 2)
    assert err.startswith(f"deltafmt: error: {error['message']}\n")


def test_a_traceback_only_if_asked_for(run: Run, base: Path) -> None:
    assert "Traceback" not in run("inspect", "base")[2]
    assert "Traceback" in run("inspect", "base", "--verbose")[2]
    assert "Traceback" in run("-v", "inspect", "base")[2]


def test_verbose_names_tensors_and_quiet_says_nothing(run: Run, base: Path) -> None:
    code, out, err = run("pack", "base", "packed", "-v", "--json")
    assert code == 0
    object_in(out)
    assert set(weights(1)) <= set(err.split())
    assert run("verify", "packed", "-q") == (0, "", "")
    assert run("-q", "unpack", "packed", "restored") == (0, "", "")


def test_what_commands_a_terminal_is_escaped(run: Run) -> None:
    code, _, err = run("pack", f"./{ESCAPE}[31m\nred", "packed")
    assert code == 1
    assert err.splitlines()[0] == r"deltafmt: error: './\x1b[31m\nred' does not exist"


# As a process


def test_streams_of_a_pipe_carry_no_colours_and_no_progress(base: Path, tmp_path: Path) -> None:
    process = start("pack", base, tmp_path / "packed", env={**os.environ, "COLUMNS": "40"})
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert ESCAPE not in out
    assert out.splitlines()[1].endswith(str(tmp_path / "packed"))


def test_progress_is_for_a_terminal_and_leaves_stdout_alone(base: Path, tmp_path: Path) -> None:
    terminal, stderr = pty.openpty()
    command = [sys.executable, "-m", "deltafmt", "pack", str(base), str(tmp_path / "packed"), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env={**os.environ, "TERM": "xterm"})
    os.close(stderr)
    shown = b""
    try:
        while block := os.read(terminal, 4096):
            shown += block
    except OSError:  # how Linux ends a terminal that nobody writes to any more
        pass
    out, _ = process.communicate()
    os.close(terminal)
    assert process.returncode == 0
    assert b"packing" in shown
    assert object_in(out.decode())["exact"] is True


def test_a_reader_that_leaves_is_no_news(tmp_path: Path) -> None:
    write(tmp_path / "many", {f"tensor.{place:0200}": np.ones(1, np.float32) for place in range(500)})
    assert main(["-q", "pack", str(tmp_path / "many"), str(tmp_path / "packed")]) == 0
    process = start("inspect", tmp_path / "packed", "--tensors")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith("tensor")
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait()
    process.stderr.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes a while."""
    return write(tmp_path_factory.mktemp("large") / "model", weights(3, layers=24, width=1024))


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str, base: Path, tmp_path: Path) -> None:
    """Files opened later must not take the numbers of the streams: what is printed would go into them."""
    command = f'"$0" -m deltafmt pack base packed {closed}'
    subprocess.run(["sh", "-c", command, sys.executable], cwd=tmp_path, check=True, capture_output=True)
    assert main(["-q", "verify", str(tmp_path / "packed"), "--against", str(base)]) == 0


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGINT, "deltafmt: interrupted; nothing was left behind\n"),
        (signal.SIGTERM, "deltafmt: stopped by SIGTERM; nothing was left behind\n"),
    ],
    ids=["SIGINT", "SIGTERM"],
)
@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_a_signal_leaves_nothing_behind(
    verb: str, number: signal.Signals, told: str, large: Path, tmp_path: Path
) -> None:
    source = large
    if verb == "unpack":
        source = tmp_path / "source"
        assert main(["-q", "pack", str(large), str(source)]) == 0
    work = tmp_path / "work"
    work.mkdir()
    # A shell that runs tests in the background may have told us to ignore Ctrl-C, and children inherit that.
    process = start(
        verb, source, work / "deep" / "result", "--jobs", "1", preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)
    )
    while process.poll() is None and not any(path.is_file() for path in work.rglob("*")):
        time.sleep(0.001)
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (128 + number, "", told)
    assert list(work.iterdir()) == []
