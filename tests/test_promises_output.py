"""Promises 13 and 23, and the destination: never touched without leave, never half there, nothing left beside it."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import deltafmt
from deltafmt import AccessError, DeltafmtError, DestinationError, IntegrityError
from hostile import Tensor, f32, names_in, tree, write_checkpoint

TENSORS = {"w": f32(60, 40), "v": f32(50, seed=1), "i": Tensor("I64", (3,), bytes(24))}
Verb = Callable[[Path], object]


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A folder with a checkpoint `src` and its archive `packed`, and nothing else."""
    source = write_checkpoint(tmp_path / "src", TENSORS, {"config.json": b"{}", "sub/vocab.txt": b"x"})
    deltafmt.pack(source, tmp_path / "packed")
    return tmp_path


def both(room: Path, overwrite: bool = False) -> list[Verb]:
    return [
        lambda dst: deltafmt.pack(room / "src", dst, overwrite=overwrite),
        lambda dst: deltafmt.unpack(room / "packed", dst, overwrite=overwrite),
    ]


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- 13: symlinks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("target", ["folder", "nowhere", "src"])
def test_13_a_link_at_the_destination(room: Path, overwrite: bool, target: str) -> None:
    (room / "folder").mkdir()
    (room / "folder/deltafmt.json").write_bytes(b"old")
    (room / "dst").symlink_to(target)
    before = {path: tree(room / path) for path in ("folder", "src", "packed")}
    for verb in both(room, overwrite=overwrite):
        with pytest.raises(DestinationError) as caught:
            verb(room / "dst")
        assert caught.value.exit_code == 2
        assert str(room / "dst") in str(caught.value) or str(room) in str(caught.value)
    assert before == {path: tree(room / path) for path in before}
    assert names_in(room) == ["dst", "folder", "packed", "src"]
    assert (room / "dst").is_symlink()


@pytest.mark.parametrize("kind", ["link to a folder", "dangling link", "file", "folder"])
def test_13_the_temporary_path_is_taken(room: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Nobody can guess it; whoever does gains nothing."""
    monkeypatch.setattr(secrets, "token_hex", lambda size: "00" * size)
    planted = room / f".dst.deltafmt-{'00' * 6}"
    (room / "victim").mkdir()
    if kind == "link to a folder":
        planted.symlink_to("victim")
    elif kind == "dangling link":
        planted.symlink_to("nothing")
    elif kind == "file":
        planted.write_bytes(b"mine")
    else:
        planted.mkdir()
    before = everything(room)
    for verb in both(room):
        with pytest.raises(AccessError, match="File exists"):
            verb(room / "dst")
    assert everything(room) == before


@pytest.mark.parametrize(
    "where", ["config.json", "sub", "model.safetensors", "deltafmt-00001.unfinished", "deltafmt.json"]
)
def test_13_links_planted_while_it_works(room: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """An attacker who can write beside the destination, and is fast, still writes through no link of ours."""
    victim = room / "victim"
    victim.mkdir()
    (victim / "file").write_bytes(b"precious")
    made = os.mkdir

    def plant(path: str | Path, mode: int = 0o777, **options: int) -> None:
        made(path, mode, **options)
        if ".dst.deltafmt-" in os.path.basename(path):
            (Path(path) / where).symlink_to(victim if where == "sub" else victim / "file")

    monkeypatch.setattr(os, "mkdir", plant)
    for verb in both(room):
        try:
            verb(room / "dst")
        except DeltafmtError:
            assert not (room / "dst").exists()
        else:  # it never wrote a file of this name
            shutil.rmtree(room / "dst")
        assert tree(victim).get("file") == b"precious"
        if where != "sub":
            assert names_in(victim) == ["file"]
    assert names_in(room) == ["packed", "src", "victim"]


def test_13_sidecars_that_are_links_are_copied_not_linked(room: Path) -> None:
    (room / "secret").write_bytes(b"content")
    (room / "src/link.txt").symlink_to("../secret")
    (room / "src/folder").symlink_to("sub")
    deltafmt.pack(room / "src", room / "dst")
    deltafmt.unpack(room / "dst", room / "out")
    for folder in ("dst", "out"):
        assert not any(path.is_symlink() for path in (room / folder).rglob("*"))
    assert tree(room / "out") == {
        **{
            path.relative_to(room / "src").as_posix(): path.read_bytes()
            for path in (room / "src").rglob("*")
            if path.is_file()
        },
        "folder/vocab.txt": b"x",
    }


# --- The destination ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["empty", "file", "archive", "checkpoint", "other"])
def test_an_existing_destination_is_untouched(room: Path, content: str) -> None:
    dst = room / "dst"
    if content == "file":
        dst.write_bytes(b"a file")
    elif content == "archive":
        shutil.copytree(room / "packed", dst)
    elif content == "checkpoint":
        shutil.copytree(room / "src", dst)
    else:
        dst.mkdir()
        if content == "other":
            (dst / "thesis.txt").write_bytes(b"years")
    before = tree(room), everything(room)
    for verb in both(room):
        with pytest.raises(DestinationError) as caught:
            verb(dst)
        assert str(dst) in str(caught.value)
    if content in ("file", "other"):
        for verb in both(room, overwrite=True):
            with pytest.raises(DestinationError):
                verb(dst)
    assert (tree(room), everything(room)) == before


@pytest.mark.parametrize("content", ["packed", "src"])
def test_overwrite_replaces_the_whole(room: Path, content: str) -> None:
    for verb, wanted in zip(both(room, overwrite=True), ("packed", "src"), strict=True):
        shutil.copytree(room / content, room / "dst", dirs_exist_ok=True)
        (room / "dst/left over.txt").write_bytes(b"x")
        verb(room / "dst")
        assert tree(room / "dst") == tree(room / wanted)
        assert names_in(room) == ["dst", "packed", "src"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_into_itself(room: Path, overwrite: bool) -> None:
    before = tree(room)
    base = write_checkpoint(room / "base", TENSORS)
    (room / "alias").symlink_to("src")
    calls: list[tuple[Verb, list[Path]]] = [
        (
            lambda dst: deltafmt.pack(room / "src", dst, overwrite=overwrite),
            [room / "src", room / "src/new", room / "alias/new", room, room / "packed/../src", room / "src/sub/.."],
        ),
        (
            lambda dst: deltafmt.pack(room / "src/model.safetensors", dst, overwrite=overwrite),
            [room / "src"],
        ),
        (lambda dst: deltafmt.pack(room / "src", dst, base=base, overwrite=overwrite), [base, base / "x"]),
        (lambda dst: deltafmt.unpack(room / "packed", dst, overwrite=overwrite), [room / "packed", room / "packed/x"]),
    ]
    for verb, destinations in calls:
        for dst in destinations:
            with pytest.raises(DestinationError):
                verb(dst)
    deltafmt.pack(room / "src", room / "child", base=base)
    for bases in (base, str(base), {"base": base}, {"base": str(base)}):
        with pytest.raises(DestinationError):
            deltafmt.unpack(room / "child", base, base=bases, overwrite=overwrite)
    assert tree(base)["model.safetensors"] == before["src/model.safetensors"]
    assert {name: content for name, content in tree(room).items() if name in before} == before


def test_parents_are_made_and_removed_again(room: Path) -> None:
    for verb in both(room):
        verb(room / "a/b/c")
        shutil.rmtree(room / "a")
    (room / "packed/config.json").unlink()
    with pytest.raises(IntegrityError):
        deltafmt.unpack(room / "packed", room / "a/b/c")
    assert names_in(room) == ["packed", "src"]


def test_overwrite_leaves_what_only_looks_like_a_checkpoint(room: Path) -> None:
    """Many a project has a config.json; with --overwrite its other files would be gone."""
    (room / "project").mkdir()
    (room / "project/config.json").write_bytes(b"{}")
    (room / "project/train.py").write_bytes(b"code")
    before = tree(room)
    for verb in both(room, overwrite=True):
        with pytest.raises(DestinationError, match="this is neither"):
            verb(room / "project")
    assert tree(room) == before


@pytest.mark.parametrize("name", ["d" * 255, "é" * 127])
def test_a_destination_may_have_any_name_that_the_file_system_takes(room: Path, name: str) -> None:
    deltafmt.pack(room / "src", room / name)
    deltafmt.unpack(room / name, room / "restored")
    assert tree(room / "restored") == tree(room / "src")


def test_dry_run_writes_nothing(room: Path) -> None:
    before = everything(room)
    report = deltafmt.pack(room / "src", room / "a/b", dry_run=True)
    assert everything(room) == before
    real = deltafmt.pack(room / "src", room / "dst")
    assert report.stored_bytes == real.stored_bytes == sum(len(content) for content in tree(room / "dst").values())


# --- Failures -------------------------------------------------------------------------------------------------------


class Interruption(BaseException):
    pass


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, Interruption, MemoryError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_in_the_progress_callback(room: Path, kind: type[BaseException], overwrite: bool) -> None:
    if overwrite:
        shutil.copytree(room / "packed", room / "dst")
    before = tree(room), everything(room)
    for pack in (True, False):
        count = 0
        for stop in range(1000):
            calls = 0

            def progress(done: int, total: int, what: str, stop: int = stop) -> None:
                nonlocal calls
                calls += 1
                if calls > stop:
                    raise kind("stop")

            try:
                if pack:
                    deltafmt.pack(room / "src", room / "dst", progress=progress, overwrite=overwrite, dry_run=False)
                else:
                    deltafmt.unpack(room / "packed", room / "dst", progress=progress, overwrite=overwrite)
            except kind:
                count += 1
                assert (tree(room), everything(room)) == before
            else:
                break
        assert count >= 2
        shutil.rmtree(room / "dst")
        if overwrite:
            shutil.copytree(room / "packed", room / "dst")


@pytest.mark.parametrize("verb", [0, 1])
def test_23_every_write_fails_once(room: Path, monkeypatch: pytest.MonkeyPatch, verb: int) -> None:
    """The disk is full at the n-th write, for every n: an error that names the file, and nothing left behind."""
    before = tree(room), everything(room)
    write, sync = os.pwrite, os.fsync
    calls = stop = 0

    def full() -> None:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise OSError(28, "No space left on device")

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        full()
        return write(fd, data, offset)

    def fsync(fd: int) -> None:
        full()
        sync(fd)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fsync", fsync)
    while True:
        calls = 0
        try:
            both(room)[verb](room / "dst")
        except AccessError as error:
            assert "No space left" in str(error)
            assert str(room) in str(error)
            if stop < calls - 1 or not (room / "dst").exists():
                assert (tree(room), everything(room)) == before
            else:  # the very last sync, behind the rename: whole, and said to be unsure
                assert tree(room / "dst") == tree(room / ("src" if verb else "packed"))
                shutil.rmtree(room / "dst")
            stop += 1
        else:
            break
    assert stop > 6


@pytest.mark.parametrize("stop", [1, 2])
def test_an_interruption_beside_the_renames(room: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """A signal right behind the rename of the old content, or of the new: one of both is at the destination."""
    shutil.copytree(room / "src", room / "dst")
    rename, calls = os.rename, 0

    def interrupted(source: Path, target: Path) -> None:
        nonlocal calls
        rename(source, target)
        calls += (room / "dst") in (source, target)
        if calls == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deltafmt.pack(room / "src", room / "dst", overwrite=True)
    assert tree(room / "dst") == tree(room / ("src" if stop == 1 else "packed"))


@pytest.mark.parametrize("failing", ["rename", "fsync"])
def test_23_every_rename_and_sync_fails_once_while_overwriting(
    room: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """The old content is back, or the new is there; with an unsynced rename the old is kept beside it."""
    shutil.copytree(room / "src", room / "dst")
    old, new = tree(room / "dst"), tree(room / "packed")
    work = getattr(os, failing)
    calls = stop = 0

    def fail(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == stop + 1:
            raise OSError(5, "Input/output error")
        work(*arguments)

    monkeypatch.setattr(os, failing, fail)
    while True:
        calls = 0
        try:
            deltafmt.pack(room / "src", room / "dst", overwrite=True)
        except AccessError as error:
            assert "Input/output error" in str(error)
            left = [name for name in names_in(room) if name not in ("dst", "packed", "src")]
            if left:
                assert tree(room / "dst") == new
                assert [tree(room / name) for name in left] == [old]
                shutil.rmtree(room / "dst")
                (room / left[0]).rename(room / "dst")
            assert tree(room / "dst") == old
            stop += 1
        else:
            break
    assert stop >= 3


def test_23_short_writes_are_continued(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[: max(1, len(data) // 3)], offset))
    deltafmt.pack(room / "src", room / "dst")
    deltafmt.unpack(room / "dst", room / "out")
    assert tree(room / "out") == tree(room / "src")


_LIMITED = """
import resource, signal, sys
import deltafmt
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
for verb, src in ((deltafmt.pack, "src"), (deltafmt.unpack, "packed")):
    try:
        verb(src, "dst")
    except deltafmt.AccessError as error:
        print(error.exit_code, "dst" in str(error), "File too large" in str(error))
"""


def test_23_a_file_size_limit(room: Path) -> None:
    before = tree(room), everything(room)
    done = subprocess.run([sys.executable, "-c", _LIMITED], cwd=room, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["1 True True"] * 2
    assert (tree(room), everything(room)) == before


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Path:
    """A file system of 64 KiB; its own process could not mount one without being root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if mount is None or subprocess.run([mount, *options], capture_output=True, check=False).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    return disk


def test_23_a_full_disk(tmp_path: Path, tiny_disk: Path) -> None:
    try:
        source = write_checkpoint(tmp_path / "src", {"w": f32(200, 200)})
        deltafmt.pack(source, tmp_path / "packed")
        for verb in (
            lambda: deltafmt.pack(source, tiny_disk / "dst"),
            lambda: deltafmt.unpack(tmp_path / "packed", tiny_disk / "a/dst"),
        ):
            with pytest.raises(AccessError, match="No space left") as caught:
                verb()
            assert caught.value.exit_code == 1
            assert str(tiny_disk) in str(caught.value)
            assert everything(tiny_disk) == []
    finally:
        subprocess.run(["umount", str(tiny_disk)], check=True)


def test_a_read_only_parent_or_a_file_in_the_way(room: Path) -> None:
    (room / "file").write_bytes(b"x")
    for verb in both(room):
        with pytest.raises(DeltafmtError) as caught:
            verb(room / "file/dst")
        assert caught.value.exit_code in (1, 2)
    assert names_in(room) == ["file", "packed", "src"]


def test_a_folder_where_a_weight_file_happens_to_lie_is_not_replaced(tmp_path: Path) -> None:
    """A single-file archive among other things makes no checkpoint of a folder."""
    source = write_checkpoint(tmp_path / "source", {"w": f32(4)})
    place = tmp_path / "models"
    (place / "notes").mkdir(parents=True)
    (place / "notes" / "a.txt").write_text("mine")
    deltafmt.pack(source, place / "packed.safetensors", single_file=True)
    with pytest.raises(DeltafmtError, match="neither"):
        deltafmt.pack(source, place, overwrite=True)
    assert (place / "notes" / "a.txt").read_text() == "mine"
    deltafmt.pack(source, tmp_path / "archive")
    deltafmt.pack(source, tmp_path / "archive", overwrite=True)
