"""How the command line ends: exit codes, messages, streams, what an interruption leaves."""

from __future__ import annotations

import hashlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import deltafmt
from command_line import Run, object_in, start, weights, write
from deltafmt import cli
from deltafmt.cli import main
from deltafmt.native import library

ESCAPE = "\x1b"


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
        "deltafmt: error: 'base' is a plain checkpoint and no archive\n"
        "deltafmt: hint: To make one of it: deltafmt pack SRC DST\n",
    )


def test_what_is_no_archive_is_told_what_it_is(run: Run, base: Path, tmp_path: Path) -> None:
    run("pack", "base", "packed")
    shard = next(path for path in Path("packed").iterdir() if path.suffix == ".safetensors")
    (tmp_path / "cut-off").mkdir()
    shutil.copy(shard, "cut-off")
    (tmp_path / "empty").mkdir()
    for source, told, hint in (
        (str(shard), "is one shard of an archive", "Name the directory that holds deltafmt.json"),
        ("packed/deltafmt.json", "is the manifest of an archive", "Name the directory that holds deltafmt.json"),
        ("cut-off", "but shards of an archive", "incomplete"),
        ("base/model.safetensors", "is a plain weight file", "deltafmt pack"),
        ("empty", "there is no deltafmt.json", "Name the directory that holds"),
        ("base/config.json", "there is no deltafmt.json", "Name the directory that holds"),
    ):
        for command in (["inspect"], ["verify"], ["unpack"]):
            code, out, err = run(*command, source, *(["out"] if command == ["unpack"] else []))
            assert (code, out) == (3, ""), source
            error, told_to_do = err.splitlines()
            assert told in error and source in error, source
            assert hint in told_to_do, source


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


def test_who_has_no_kernels_is_told_where_it_takes_time(run: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("pack", "base", "with", "-v")[2].count("kernels") == 0
    assert "kernels: C\n" in start("--version").communicate()[0]
    monkeypatch.setattr(library, "LIBRARY", None)
    assert run("pack", "base", "small")[2] == ""
    for command in (["pack", "base", "packed"], ["unpack", "packed", "restored"]):
        assert run(*command, "-v")[2].count("deltafmt: note: kernels: numpy") == 1
    monkeypatch.setattr(cli, "MANY_BYTES", 1000)
    for command in (["pack", "base", "again"], ["unpack", "packed", "twice"]):
        code, out, err = run(*command, "--json")
        object_in(out)
        assert code == 0 and err.startswith("deltafmt: note: kernels: numpy") and err.count("\n") == 1
    assert run("unpack", "packed", "third", "-q") == (0, "", "")


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


@pytest.mark.parametrize("way", ["module", "script", "library"])
def test_ctrl_c_while_it_is_being_imported(way: str, tmp_path: Path) -> None:
    """The first thing that takes time is numpy: one is put in its place that presses Ctrl-C."""
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy/__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n" * 2)
    script = tmp_path / ("deltafmt" if way == "script" else "program")
    script.write_text("from deltafmt.cli import main\nmain()\n")
    process = subprocess.Popen(
        [sys.executable, *(["-m", "deltafmt"] if way == "module" else [str(script)]), "--version"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(deltafmt.__file__).parents[1])])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = process.communicate()
    if way == "library":  # what Ctrl-C means there is up to the program
        assert "KeyboardInterrupt" in err
    else:
        assert (process.returncode, out, err) == (130, "", "")
