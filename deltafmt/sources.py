"""Whatever a user may name as a source or a base, opened: an archive, a local checkpoint, or a Hub id."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from . import hf, hub
from .checkpoint import Checkpoint
from .errors import AccessError, DestinationError, MalformedError, MissingExtraError, UsageError
from .limits import DEFAULT_LIMITS, Limits
from .reader import Archive, is_archive, read_manifest

PathLike: TypeAlias = str | os.PathLike[str]
Bases: TypeAlias = PathLike | Checkpoint | Mapping[str, PathLike | Checkpoint]


def open_source(
    source: PathLike | Checkpoint, *, base: PathLike | None = None, limits: Limits = DEFAULT_LIMITS
) -> Checkpoint:
    """Open a model for reading; close it when done.

    Args:
        source: a directory or weight file, an archive, a Hub id (`org/name`, or `org/name@revision`), or a checkpoint
            that is open already.
        base: the base of the source, if that is an archive that has one.

    Raises:
        AccessError: it does not exist, or cannot be fetched.
        MalformedError, IntegrityError, UnsupportedError: it is damaged or unknown.
        WrongBaseError: `base` is another model.
    """
    if isinstance(source, Checkpoint):
        return source
    path = local_path(source)
    if not is_archive(path):
        return hf.open_plain(path, limits=limits)
    has_base = base is not None and bool(read_manifest(path, limits).bases)
    return open_archive(path, base if has_base else None, limits=limits)


def open_archive(path: PathLike, base: Bases | None = None, *, limits: Limits = DEFAULT_LIMITS) -> Archive:
    """Open an archive and its bases.

    Args:
        path: the archive's directory, or a Hub id.
        base: the base it was packed against; a mapping of base ids if there are several.

    Raises:
        MalformedError, UnsupportedError, IntegrityError: as spec/reasons.md says.
        WrongBaseError: `base` is another model.
    """
    folder = local_path(path, missing_is_malformed=True)
    bases: dict[str, Checkpoint] = {}
    try:
        if isinstance(base, Mapping):
            bases = {name: open_source(source, limits=limits) for name, source in base.items()}
        elif base is not None:
            bases = {BASE_ID: open_source(base, limits=limits)}
            if not read_manifest(folder, limits).bases:  # a base that is not needed does no harm
                bases.pop(BASE_ID).close()
        return Archive(folder, bases, limits=limits)
    except BaseException:
        for checkpoint in bases.values():
            checkpoint.close()
        raise


BASE_ID = "base"
"""The id under which `pack` records its base, and under which a base is looked for if no id is given."""


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


def check_source(checkpoint: Checkpoint) -> None:
    """Refuse to pack a lossy archive again: its errors would be forgotten. Raises `UsageError`."""
    _refuse_lossy(checkpoint, "packed again", "Unpack it first and pack the result, if that is meant")


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
    if isinstance(checkpoint, Archive) and not checkpoint.manifest.exact:
        lossy = sum(not tensor.exact for tensor in checkpoint.manifest.tensors.values())
        what = f"a lossy archive cannot be {role} ({lossy} tensors are approximations)"
        raise UsageError(what, where=checkpoint.location, hint=hint)
