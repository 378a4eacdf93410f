"""The search for cyclic garbage is off while an archive is opened, and afterwards as it was."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest

import deltafmt
from deltafmt import MalformedError, process, reader
from deltafmt.manifest import Manifest
from deltafmt.manifest_parser import parse_manifest
from hostile import f32, write_checkpoint


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    source = write_checkpoint(tmp_path / "source", {"w": f32(6, 4)})
    deltafmt.pack(source, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("on", [True, False])
def test_it_is_afterwards_as_it_was(archive: Path, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    known = parse_manifest

    def watched(*arguments: Any) -> Manifest:
        seen.append(gc.isenabled())
        return known(*arguments)

    monkeypatch.setattr(reader, "parse_manifest", watched)
    try:
        gc.enable() if on else gc.disable()
        deltafmt.open(archive).close()
        assert gc.isenabled() is on
        (archive / "deltafmt.json").write_bytes(b"{}")
        with pytest.raises(MalformedError):
            deltafmt.open(archive)
        assert gc.isenabled() is on
    finally:
        gc.enable()
    assert seen == [False, False]


def test_the_last_of_several_threads_puts_it_back() -> None:
    both, first_left = threading.Barrier(2), threading.Event()

    def first() -> None:
        with process.without_collecting():
            both.wait()
        first_left.set()

    thread = threading.Thread(target=first)
    thread.start()
    with process.without_collecting():
        both.wait()
        first_left.wait()
        assert not gc.isenabled()
        with process.without_collecting():
            pass
        assert not gc.isenabled()
    thread.join()
    assert gc.isenabled()
