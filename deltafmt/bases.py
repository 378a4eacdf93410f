"""Which of the models that a user gives is which base of an archive: told by their content, not by their order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from .checkpoint import Checkpoint
from .errors import UsageError, WrongBaseError
from .manifest import Base
from .reader import VerifiedBase


def matched(bases: Mapping[str, Base], given: Sequence[Checkpoint]) -> tuple[dict[str, Checkpoint], list[Checkpoint]]:
    """Find for each given checkpoint the base that it is, reading as little as tells them apart.

    Dtypes and shapes decide where they can. Between bases of one architecture a digest decides, of the smallest tensor
    in which they differ; and so it does between checkpoints that may all be the same base. A match is not a proof: the
    digests of all other tensors are left to `VerifiedBase`.

    Returns:
        Base id -> checkpoint, and the checkpoints that are none of the bases.

    Raises:
        UsageError: two checkpoints are the same model.
    """
    if len(bases) == len(given) == 1:  # nothing to choose: `VerifiedBase` says what is wrong with it, if anything is
        return dict(zip(bases, given, strict=True)), []
    claims: dict[str, list[Checkpoint]] = {name: [] for name in bases}
    for checkpoint in given:
        if (name := _likeliest(bases, checkpoint)) is not None:
            claims[name].append(checkpoint)
    found = {name: _settled(bases[name], claimants) for name, claimants in claims.items()}
    taken = {name: checkpoint for name, checkpoint in found.items() if checkpoint is not None}
    return taken, [each for each in given if not any(each is other for other in taken.values())]


def _likeliest(bases: Mapping[str, Base], checkpoint: Checkpoint) -> str | None:
    """The base that a checkpoint can only be, if it is one."""
    names = [name for name, base in bases.items() if _alike(base, checkpoint)]
    while len(names) > 1:
        first, *others = (bases[name] for name in names)
        differing = [
            tensor
            for tensor, entry in first.tensors.items()
            if any(other.tensors[tensor].digest != entry.digest for other in others)
        ]
        if not differing:
            break  # the same base under several ids: either will do
        tensor = _smallest_first(first, differing)[0]
        digest = checkpoint.digest(tensor)
        names = [name for name in names if bases[name].tensors[tensor].digest == digest]
    return names[0] if names else None


def _settled(base: Base, claimants: Sequence[Checkpoint]) -> Checkpoint | None:
    """The one that is a base, of several that may be."""
    remaining = list(claimants)
    for tensor in _smallest_first(base, base.tensors):
        if len(remaining) < 2:
            break
        remaining = [each for each in remaining if each.digest(tensor) == base.tensors[tensor].digest]
    if len(remaining) > 1:
        raise UsageError(
            "two bases are the same model",
            where=remaining[1].location,
            found=remaining[0].location,
            hint="Give each base once",
        )
    return remaining[0] if remaining else None


def _alike(base: Base, checkpoint: Checkpoint) -> bool:
    """Whether names, dtypes and shapes are those of the base."""
    return base.tensors.keys() == checkpoint.tensors.keys() and all(
        (entry.dtype, entry.shape) == (checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape)
        for name, entry in base.tensors.items()
    )


def _smallest_first(base: Base, tensors: Iterable[str]) -> list[str]:
    return sorted(tensors, key=lambda name: (base.tensors[name].nbytes, name))


def refuse(checkpoint: Checkpoint, bases: Mapping[str, Base], missing: Sequence[str], archive: str) -> NoReturn:
    """Raise `WrongBaseError`: a checkpoint is none of an archive's bases; say how it differs from the one it should be.

    Args:
        missing: ids of the bases that nothing else given is; at least one.
    """
    if len(missing) == 1:
        base = bases[missing[0]]
        verified = VerifiedBase(missing[0], base, checkpoint, archive)
        for tensor in _smallest_first(base, base.tensors):
            verified.verify(tensor)
    raise WrongBaseError(
        f"'{checkpoint.location}' is none of its bases",
        where=archive,
        expected=" or ".join(bases[name].repo or bases[name].digest for name in missing),
        hint="Pass the bases that it was packed against",
        reason="base-mismatch",
    )
