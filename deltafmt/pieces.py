"""Tensors of an archive cut into pieces, in parallel and across tensors: what `unpack` writes and `verify` checks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple, Protocol

from .checkpoint import TensorInfo
from .pipeline import Pipeline
from .reader import Archive
from .rebuild import Rebuilder, good_step

PIECE_BYTES = 4 << 20
_AHEAD = 8  # tensors whose recipes are bound, and whose base tensors are verified, before their turn


class Rebuilding(Protocol):
    """Tensors that can be rebuilt, such as those of an archive."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def rebuilder(self, name: str) -> Rebuilder: ...


class Piece(NamedTuple):
    """Elements `[lo, hi)` of a tensor; `last` if none follow. `rebuilder` is ready, or being made ready, by then."""

    name: str
    rebuilder: Future[Rebuilder]
    lo: int
    hi: int
    last: bool

    @property
    def nbytes(self) -> int:
        """A bound of what the piece takes in memory."""
        return 8 * (self.hi - self.lo)


def pieces(archive: Rebuilding, names: Iterable[str], pipeline: Pipeline) -> Iterator[Piece]:
    """The pieces of these tensors, in order, about 4 MiB each; an empty tensor has one empty piece."""
    ahead: deque[tuple[str, Future[Rebuilder]]] = deque()
    for name in names:
        ahead.append((name, pipeline.submit(partial(archive.rebuilder, name))))
        if len(ahead) > _AHEAD:
            yield from _split(archive, *ahead.popleft())
    while ahead:
        yield from _split(archive, *ahead.popleft())


def _split(archive: Rebuilding, name: str, rebuilder: Future[Rebuilder]) -> Iterator[Piece]:
    info = archive.tensors[name]
    elements = PIECE_BYTES // info.dtype.width
    if rebuilder.exception() is None:  # waits until it is bound, while pieces of earlier tensors are worked on
        step = rebuilder.result().step(elements)
    else:  # any will do: the piece raises it, when it is its turn
        step = good_step(info.shape, info.dtype.width, elements)
    for lo in range(0, max(info.count, 1), step):
        hi = min(lo + step, info.count)
        yield Piece(name, rebuilder, lo, hi, hi == info.count)


def check_rest_of_bases(archive: Archive, pipeline: Pipeline) -> None:
    """Check the digests of base tensors that no recipe asked for: a base must be the whole of what it was."""
    for base in archive.bases.values():
        for _ in pipeline.ordered(base.unverified(), base.verify, base.nbytes):
            pass
