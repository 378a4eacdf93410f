"""Promises 20, 26 and 30: no content runs, the same input gives the same bytes, and old archives open for ever."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import deltafmt
from hostile import Tensor, f32, tree, write_checkpoint

ROOT = Path(__file__).parents[1]
INVALID = ROOT / "spec/vectors/invalid"
FROZEN = sorted((ROOT / "tests/data").glob("archive-*"))


def run(code: str, *arguments: str | Path, cwd: Path, **environment: str) -> str:
    """Run Python code in a process of its own; what it prints."""
    env = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# --- 20: nothing in a file runs -------------------------------------------------------------------------------------

_AUDITED = """
import sys
from pathlib import Path
import deltafmt

def everything(archive, base, out):
    errors = []
    def attempt(verb):
        try:
            verb()
        except deltafmt.DeltafmtError as error:
            errors.append(str(error))
        else:
            errors.append(None)
    attempt(lambda: deltafmt.inspect(archive))
    attempt(lambda: deltafmt.verify(archive, base=base))
    attempt(lambda: deltafmt.unpack(archive, out, base=base))
    for framework in ("np", "pt") if with_torch else ("np",):
        def read():
            with deltafmt.open(archive, base=base, framework=framework) as opened:
                for name in opened.keys():
                    opened.get_tensor(name)
                opened.metadata()
        attempt(read)
    return errors

work, frozen, corpus = map(Path, sys.argv[1:4])
with_torch = sys.argv[4] == "torch"
everything(frozen / "archive", frozen / "base", work / "warm up")  # whatever a good archive needs is imported now
everything(frozen / "lossy", frozen / "base", work / "warm up too")
everything(work / "nothing", None, work / "x")
try:
    deltafmt.open(next((corpus / "json-not-utf8").parent.iterdir()) / "archive")
except deltafmt.DeltafmtError:
    pass

FORBIDDEN = ("import", "exec", "compile", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn",
             "subprocess.Popen",
             "pickle.find_class", "marshal.loads", "ctypes.dlopen", "socket.connect", "code.__new__",
             "os.startfile", "pty.spawn", "os.symlink", "os.link", "os.chmod", "os.putenv")
seen = []

def hook(event, arguments):
    if event in FORBIDDEN:
        seen.append((event, repr(arguments)[:200]))
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path, flags = os.fsdecode(arguments[0]), arguments[2]
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not os.path.abspath(path).startswith(str(work)):
            seen.append((event, path))
    elif event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate"):
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes)) else ""
        if os.path.isabs(path) and not path.startswith(str(work)):
            seen.append((event, path))

import os
import shutil
sys.addaudithook(hook)
cases = 0
for case in sorted(corpus.iterdir()):
    if not (case / "case.json").exists():
        continue
    cases += 1
    base = case / "base"
    errors = everything(case / "archive", base if base.is_dir() else None, work / "out")
    shutil.rmtree(work / "out", ignore_errors=True)  # unpack leaves some checks to verify
    assert any(errors), case.name
    assert all(error is None or error.isprintable() for error in errors), case.name
    if seen:
        print(case.name, seen)
        seen.clear()
print("cases", cases)
"""


@pytest.mark.parametrize("framework", ["none", pytest.param("torch", marks=pytest.mark.slow)])
def test_20_no_content_of_a_hostile_archive_runs(tmp_path: Path, framework: str) -> None:
    count = len(list(INVALID.glob("*/case.json")))
    assert count > 100
    before = tree(INVALID)
    assert run(_AUDITED, tmp_path, FROZEN[0], INVALID, framework, cwd=tmp_path) == f"cases {count}\n"
    assert tree(INVALID) == before


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
@pytest.mark.parametrize("place", ["source", "base"])
def test_20_a_pickle_that_runs_is_refused(tmp_path: Path, name: str, place: str) -> None:
    (tmp_path / "hostile").mkdir()
    torch.save({"w": torch.zeros(2), "x": Bomb(tmp_path / "ran")}, tmp_path / "hostile" / name)
    good = write_checkpoint(tmp_path / "good", {"w": f32(2)})
    source, base = (tmp_path / "hostile", None) if place == "source" else (good, tmp_path / "hostile")
    with pytest.raises(deltafmt.DeltafmtError) as caught:
        deltafmt.pack(source, tmp_path / "packed", base=base)
    assert name in str(caught.value)
    assert caught.value.hint
    (tmp_path / "hostile" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(deltafmt.DeltafmtError):
        deltafmt.pack(source, tmp_path / "packed", base=base)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "packed").exists()


# --- 26: the same bytes ---------------------------------------------------------------------------------------------

_PACK = """
import sys, locale
import deltafmt
try:
    locale.setlocale(locale.LC_ALL, "")
except locale.Error:
    pass
src, dst, base, jobs, options = sys.argv[1:]
deltafmt.pack(src, dst, base=base or None, jobs=int(jobs), shard_bytes=500, **eval(options))
"""


def _tensors(seed: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    tensors = {f"layer.{place}.weight": f32(50, 40, seed=seed + place) for place in range(12)}
    tensors["head"] = tensors["tied"] = f32(60, 50, seed=99)
    tensors["ids"] = Tensor("I64", (500,), rng.integers(0, 9, 500).tobytes())
    tensors["empty"] = Tensor("F32", (0,), b"")
    return tensors


@pytest.mark.parametrize(
    ("against", "options"),
    [
        pytest.param(False, "{}", id="alone"),
        pytest.param(True, "{}", id="against a base"),
        pytest.param(True, "{'rank': 4}", id="low rank", marks=pytest.mark.slow),
    ],
)
def test_26_the_same_input_gives_the_same_bytes(tmp_path: Path, against: bool, options: str) -> None:
    sidecars = {"config.json": b"{}", "z.txt": b"z", "a.txt": b"a", "sub/é.txt": b"x", "sub/b.txt": b"b"}
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    one = write_checkpoint(tmp_path / "1/src", _tensors(0), sidecars, shards=3)
    two = tmp_path / "2/src"
    for path in sorted((path for path in one.rglob("*") if path.is_file()), reverse=True):  # created in another order
        (two / path.relative_to(one)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, two / path.relative_to(one))
    changed = {
        name: tensor
        if tensor.dtype != "F32"
        else tensor._replace(data=bytes(reversed(tensor.data[:8])) + tensor.data[8:])
        for name, tensor in _tensors(0).items()
    }
    for place in ("1", "2"):
        write_checkpoint(tmp_path / place / "base", changed, {})
    base = "base" if against else ""
    runs = [
        ("1", "src", {"PYTHONHASHSEED": "0", "TZ": "UTC", "LC_ALL": "C"}, 1),
        (
            "2",
            "src",
            {"PYTHONHASHSEED": "12345", "TZ": "Pacific/Chatham", "LC_ALL": "tr_TR.UTF-8", "HOME": "/nowhere"},
            4,
        ),
        ("1", "../1/src", {"PYTHONHASHSEED": "7", "TZ": "America/St_Johns", "LC_ALL": "de_DE", "PYTHONUTF8": "1"}, 2),
    ]
    archives = []
    for number, (cwd, source, environment, jobs) in enumerate(runs):
        os.utime(one / "config.json", (number, number))
        run(_PACK, source, f"../out{number}", base, str(jobs), options, cwd=tmp_path / cwd, **environment)
        archives.append(tree(tmp_path / f"out{number}"))
    assert archives[0] == archives[1] == archives[2]
    assert len([name for name in archives[0] if name.startswith("deltafmt-")]) > 1


def test_26_packing_what_was_unpacked_gives_the_same_archive(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "src", _tensors(3), shards=2)
    deltafmt.pack(source, tmp_path / "packed")
    deltafmt.unpack(tmp_path / "packed", tmp_path / "out")
    deltafmt.pack(tmp_path / "out", tmp_path / "again")
    assert tree(tmp_path / "packed") == tree(tmp_path / "again")
    deltafmt.pack(tmp_path / "packed", tmp_path / "from archive")
    deltafmt.unpack(tmp_path / "from archive", tmp_path / "out 2")
    assert tree(source) == tree(tmp_path / "out") == tree(tmp_path / "out 2")


# --- 30: old archives -----------------------------------------------------------------------------------------------

# Of every frozen file; whoever has to change one of these has broken the promise.
DIGESTS = {
    "archive-1.0": "db890bbee6f330e834508501e61e4792636002923eb8ee0527598d99176d1406",
}


def _digest_of(folder: Path) -> str:
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(tree(folder).items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_30_there_is_a_frozen_archive_of_this_format_and_none_has_changed() -> None:
    assert {folder.name: _digest_of(folder) for folder in FROZEN} == DIGESTS
    assert json.loads((FROZEN[0] / "archive/deltafmt.json").read_bytes())["version"] == "1.0"


@pytest.mark.parametrize("frozen", FROZEN, ids=lambda folder: folder.name)
def test_30_old_archives_open_for_ever(frozen: Path, tmp_path: Path) -> None:
    deltafmt.unpack(frozen / "archive", tmp_path / "out", base=frozen / "base")
    assert tree(tmp_path / "out") == tree(frozen / "expected")
    assert deltafmt.verify(frozen / "archive", base=frozen / "base", against=frozen / "expected").equal
    with deltafmt.open(frozen / "archive", base=frozen / "base") as archive:
        assert archive.get_tensor("scalar").tobytes() == b"\x01\x7c"
        assert archive.get_slice("ids")[0, 3:5].tolist() == [3, 4]
        assert archive.metadata() == {"format": "pt"}


@pytest.mark.parametrize("frozen", FROZEN, ids=lambda folder: folder.name)
def test_30_old_lossy_archives_give_the_same_values_for_ever(frozen: Path, tmp_path: Path) -> None:
    lossy = "model.layers.0.mlp.up_proj.weight"
    report = deltafmt.unpack(frozen / "lossy", tmp_path / "out", base=frozen / "base")
    assert [name for name, tensor in report.tensors.items() if tensor.method == "lowrank"] == [lossy]
    with (
        deltafmt.open(frozen / "lossy", base=frozen / "base") as archive,
        deltafmt.open(frozen / "archive", base=frozen / "base") as exact,
    ):
        for name in exact.keys():  # noqa: SIM118
            found, wanted = archive.get_tensor(name), exact.get_tensor(name)
            if name == lossy:  # the original is its base plus a product of rank 2, so that hardly anything is lost
                assert np.max(np.abs(found - wanted)) < 1e-6
            else:
                assert found.tobytes() == wanted.tobytes()
