"""`torch.distributed.checkpoint` reads archives: each rank rebuilds the rows that its shards lie in, and no others.

    from deltafmt.dcp import DeltafmtReader
    torch.distributed.checkpoint.load(model.state_dict(), storage_reader=DeltafmtReader("model.dfmt", base="base"))

The reader tells the planner of every tensor whole; which block of it a rank wants (any placement of a `DTensor`, any
mesh, or plain tensors) is the planner's affair. Loading needs no room beyond the destination but a few MiB.

A tensor that a model has under two names (tied weights) and the checkpoint under one is in the archive under one, too:
leave the other out of the state dict, or pass `DefaultLoadPlanner(allow_partial_load=True)`.
"""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from .archive import OpenArchive, TensorSlice
from .archive import open as open_archive
from .dtypes import DTYPES
from .errors import MissingExtraError
from .gemm import one_thread_each
from .limits import DEFAULT_LIMITS, Limits
from .reader import is_archive
from .sources import Bases, PathLike
from .torch.tensors import torch_dtype

try:
    import torch
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )
    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
    from torch.distributed.checkpoint.storage import StorageReader
    from torch.futures import Future
except ImportError as error:
    raise MissingExtraError("torch.distributed.checkpoint needs torch", extra="torch") from error

_BLOCK_ELEMENTS = 1 << 20


class DeltafmtReader(StorageReader):
    """Reads one archive for `torch.distributed.checkpoint.load`. Close it, or use it in a `with` block.

    Args:
        path: the archive's directory, or a Hub id.
        base, jobs, limits: as of `deltafmt.open`.

    Attributes:
        elements_loaded: elements put into state dicts so far, by this rank.
        elements_built: elements rebuilt for that. As many where tensors are split by rows (`Shard(0)`) or not at all;
            rows are rebuilt whole, so where columns are split, those of the other ranks are in it.

    Raises:
        DeltafmtError: as `deltafmt.open`; while loading, torch wraps what a rank raises into `CheckpointException`.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        base: Bases | None = None,
        jobs: int | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self._options: dict[str, Any] = {"base": base, "jobs": jobs, "limits": limits}
        self._path = path
        self._archive = self._opened()
        self.elements_loaded = 0
        self.elements_built = 0

    def _opened(self) -> OpenArchive:
        return open_archive(self._path, framework="pt", **self._options)

    def reset(self, checkpoint_id: PathLike | None = None) -> None:
        """Called before each load; with `load(..., checkpoint_id=path)` another archive of the same bases is read."""
        if checkpoint_id is not None and os.fspath(checkpoint_id) != os.fspath(self._path):
            self._archive.close()
            self._path = checkpoint_id
            self._archive = self._opened()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: PathLike) -> bool:
        """Whether this is the directory of an archive."""
        return is_archive(Path(checkpoint_id))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Every tensor, whole. Reads no tensor bytes."""
        return Metadata({name: _described(self._archive.get_slice(name)) for name in self._archive.keys()})  # noqa: SIM118

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with one_thread_each() if self._archive._archive.computes else nullcontext():
            for item in plan.items:
                tensor = planner.resolve_tensor(item).detach()
                self._fill(tensor, item)
                planner.commit_tensor(item, tensor)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _fill(self, tensor: torch.Tensor, item: ReadItem) -> None:
        """Put the block of a stored tensor that an item names into `tensor`, which has the shape of the block."""
        stored = self._archive.get_slice(item.storage_index.fqn)
        shape = stored.get_shape()
        if not shape:
            tensor.copy_(stored[...])
            self._count(1, 1)
            return
        offsets, lengths = list(item.storage_offsets), list(item.lengths)
        row = math.prod(shape[1:])
        within = tuple(slice(at, at + length) for at, length in zip(offsets[1:], lengths[1:], strict=True))
        step = max(_BLOCK_ELEMENTS // max(row, 1), 1)
        for begin in range(0, lengths[0], step):
            end = min(begin + step, lengths[0])
            tensor[begin:end].copy_(stored[(slice(offsets[0] + begin, offsets[0] + end), *within)])
            self._count(math.prod((end - begin, *lengths[1:])), (end - begin) * row)

    def _count(self, loaded: int, built: int) -> None:
        self.elements_loaded += loaded
        self.elements_built += built

    def close(self) -> None:
        """Close the archive and its bases."""
        self._archive.close()

    def __enter__(self) -> DeltafmtReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _described(stored: TensorSlice) -> TensorStorageMetadata:
    size = torch.Size(stored.get_shape())
    properties = TensorProperties(dtype=torch_dtype(DTYPES[stored.get_dtype()]))
    return TensorStorageMetadata(properties, size, [ChunkStorageMetadata(torch.Size([0] * len(size)), size)])
