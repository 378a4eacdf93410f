"""How the package refuses what `hostile` made: which error, for which reason, and that nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

import deltafmt
from deltafmt import DeltafmtError, MalformedError


def refused(archive: Path, reason: str, kind: type[DeltafmtError] = MalformedError) -> str:
    """`open` refuses; the message, which is short and one line."""
    with pytest.raises(DeltafmtError) as caught:
        deltafmt.open(archive)
    assert type(caught.value) is kind, caught.value
    assert caught.value.reason == reason, caught.value
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000
    return str(caught.value)


def refused_later(archive: Path, reason: str, kind: type[DeltafmtError] = MalformedError) -> str:
    """`verify` and `unpack` refuse; nothing is left behind."""
    for verb in (deltafmt.verify, lambda src: deltafmt.unpack(src, archive.parent / "out")):
        with pytest.raises(DeltafmtError) as caught:
            verb(archive)
        assert type(caught.value) is kind, caught.value
        assert caught.value.reason == reason, caught.value
    assert not (archive.parent / "out").exists()
    return str(caught.value)
