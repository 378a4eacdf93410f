"""Whatever a user may name as a source or a base, opened: an archive, a local checkpoint, or a Hub id."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeGuard

from . import hf_directory, hub
from .bases import matched, refuse
from .checkpoint import Checkpoint
from .errors import AccessError, DestinationError, MalformedError, MissingExtraError, UsageError
from .limits import DEFAULT_LIMITS, Limits
from .reader import Archive, is_archive, read_manifest

PathLike: TypeAlias = str | os.PathLike[str]
Bases: TypeAlias = PathLike | Checkpoint | Sequence[PathLike | Checkpoint] | Mapping[str, PathLike | Checkpoint]
"""The bases of an archive: one; several, in any order; or a mapping of base ids to them."""


def open_source(
    source: PathLike | Checkpoint, *, base: Sequence[PathLike] = (), limits: Limits = DEFAULT_LIMITS
) -> Checkpoint:
    """Open a model for reading; close it when done.

    Args:
        source: a directory or weight file, an archive, a Hub id (`org/name`, or `org/name@revision`), or a checkpoint
            that is open already.
        base: models among which are the bases of the source, if that is an archive that has some.

    Raises:
        AccessError: it does not exist, or cannot be fetched.
        MalformedError, IntegrityError, UnsupportedError: it is damaged or unknown.
        WrongBaseError: `base` is another model, and the only one.
    """
    if isinstance(source, Checkpoint):
        return source
    path = local_path(source)
    if not is_archive(path):
        return hf_directory.open_plain(path, limits=limits)
    return _open_archive(path, base, limits, strict=False)


def open_archive(path: PathLike, base: Bases | None = None, *, limits: Limits = DEFAULT_LIMITS) -> Archive:
    """Open an archive and its bases.

    Args:
        path: the archive's directory or single file, or a Hub id.
        base: the base or bases it was packed against. Which is which is told by their content, unless ids say so; those
            that `pack` was given and had no use for are not read.

    Raises:
        MalformedError, UnsupportedError, IntegrityError: as spec/reasons.md says.
        WrongBaseError: `base` is another model, or one of them is, and the right one is not there.
        UsageError: the archive has no base of an id given; or two of `base` are the same model.
    """
    return _open_archive(local_path(path, missing_is_malformed=True), base, limits, strict=True)


def _open_archive(folder: Path, base: Bases | None, limits: Limits, *, strict: bool) -> Archive:
    """`strict`: refuse what is given and is none of the bases, where one of these is missing."""
    with contextlib.ExitStack() as opened:
        given = [opened.enter_context(open_source(each, limits=limits)) for each in each_base(base)]
        found: dict[str, Checkpoint] = {}
        others: list[Checkpoint] = []
        if isinstance(base, Mapping):
            found = dict(zip(base, given, strict=True))
        elif given:
            known = read_manifest(folder, limits).bases
            found, others = matched(known, given)
            missing = [name for name in known if name not in found]
            if others and missing and strict:  # where all that are needed are there, another does no harm
                refuse(others[0], known, missing, str(folder))
        archive = Archive(folder, found, limits=limits)
        opened.pop_all()  # what it took is closed with it
    for checkpoint in others:
        checkpoint.close()
    return archive


def each_base(base: Bases | None) -> list[PathLike | Checkpoint]:
    """The bases as a list, however they were given."""
    if base is None:
        return []
    if isinstance(base, (str, os.PathLike, Checkpoint)):
        return [base]
    return list(base.values() if isinstance(base, Mapping) else base)


BASE_ID = "base"
"""The id under which `pack` records its base, or the first of several."""


def base_id(place: int) -> str:
    """The id under which `pack` records the base at a place of those given, from 0: `base`, `base2`, `base3`, ..."""
    return f"{BASE_ID}{place + 1}" if place else BASE_ID


def local_path(source: PathLike, *, missing_is_malformed: bool = False) -> Path:
    """The local path of a source, downloaded first if it is a Hub id.

    What exists is a path. `org/name` is a Hub id unless there is a directory `org`; a bare `name` is one if the Hub
    can be asked at all.
    """
    path = Path(source)
    if path.exists():
        return path
    text = os.fspath(source)
    if hub.looks_like_repo_id(text) and ("/" not in text or not path.parent.is_dir()):
        try:
            return _downloaded(text)
        except MissingExtraError:
            if "/" in text:
                raise
    if missing_is_malformed:
        raise MalformedError(
            f"'{text}' does not exist", hint="Name the directory that holds deltafmt.json", reason="not-an-archive"
        )
    raise AccessError(f"'{text}' does not exist", hint="Name a directory, a weight file, or a Hub id (org/name)")


def _downloaded(text: str) -> Path:
    repo, revision = hub.split_repo_id(text)
    return hub.download(repo, revision=revision)[0]


def provenance(source: PathLike) -> tuple[str, str | None]:
    """Where a base can be looked for: Hub id and commit if it is from the Hub, else the name of its directory or file.

    Nothing else of a local path is told: archives are made to be shared.
    """
    path = Path(os.path.abspath(local_path(source)))
    if (cached := _HUB_CACHE.search((path.parent if path.is_file() else path).as_posix())) is not None:
        return cached[1].replace("--", "/"), cached[2]
    return path.name, None


_HUB_CACHE = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$")


def check_apart(destination: Path, *sources: PathLike | Checkpoint | None) -> None:
    """Refuse a destination that is, holds, or lies in one of its sources. Raises `DestinationError`."""
    target = Path(os.path.realpath(destination))
    for source in sources:
        if source is None or isinstance(source, Checkpoint):
            continue
        origin = Path(os.path.realpath(source))
        if target == origin or origin in target.parents or target in origin.parents:
            raise DestinationError(
                "the destination and a source overlap",
                where=str(destination),
                found=str(source),
                hint="Choose a destination beside it",
            )


def is_lossy(checkpoint: Checkpoint) -> TypeGuard[Archive]:
    """Whether it is an archive some of whose tensors are approximations."""
    return isinstance(checkpoint, Archive) and not checkpoint.manifest.exact


def check_source(checkpoint: Checkpoint) -> None:
    """Refuse to pack a lossy archive in another way than it is: its errors would be forgotten. Raises `UsageError`."""
    _refuse_lossy(checkpoint, "packed in another way", "Leave the options out to keep it as it is, or unpack it first")


def check_usable_base(checkpoint: Checkpoint) -> None:
    """Refuse a base whose tensors are approximations, which differ from machine to machine when rebuilt, and one that
    lacks its own base: it could not be read again when the archive is unpacked.

    Raises `UsageError`, `WrongBaseError`.
    """
    _refuse_lossy(checkpoint, "a base", "Unpack it first and use the unpacked checkpoint as the base")
    if isinstance(checkpoint, Archive):
        for name in checkpoint.tensors:
            for base in checkpoint.scope.bases_needed(name):
                checkpoint.base(base)


def _refuse_lossy(checkpoint: Checkpoint, role: str, hint: str) -> None:
    if is_lossy(checkpoint):
        lossy = sum(not tensor.exact for tensor in checkpoint.manifest.tensors.values())
        what = f"a lossy archive cannot be {role} ({lossy} tensors are approximations)"
        raise UsageError(what, where=checkpoint.location, hint=hint)
