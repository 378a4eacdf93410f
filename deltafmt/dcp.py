"""`torch.distributed.checkpoint` reads archives: each rank rebuilds the part of every tensor that its shards lie in.

    from deltafmt.dcp import DeltafmtReader
    torch.distributed.checkpoint.load(model.state_dict(), storage_reader=DeltafmtReader("model.dfmt", base="base"))

The reader tells the planner of every tensor whole; which block of it a rank wants (any placement of a `DTensor`, any
mesh, or plain tensors) is the planner's affair. Loading needs no room beyond the destination but a few MiB.

Split by rows (`Shard(0)`), a rank reads the chunks that hold its rows, about 256K elements each, and rebuilds its rows
and no others. Split by columns (`Shard(1)`), it does so too of weights that were packed for it (`pack
--tensor-parallel N`), and computes its columns of a low-rank product and of what that is added to. Of others it reads
as much as for the whole tensor: chunks hold whole rows, so stored and base tensors are decoded in these, and lossless
patches are made in these.

A tensor that a model has under two names (tied weights) and the checkpoint under one is in the archive under one, too:
leave the other out of the state dict, or pass `DefaultLoadPlanner(allow_partial_load=True)`.
"""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

from .checkpoint import TensorInfo
from .errors import MissingExtraError
from .gemm import one_thread_each
from .limits import DEFAULT_LIMITS, Limits, check_count
from .operators.base import Rectangle
from .pipeline import Pool
from .reader import Archive, is_archive
from .rebuild import read_rectangle_in_pieces
from .sources import Bases, PathLike, open_archive
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

_BLOCK_ELEMENTS = 1 << 21


class DeltafmtReader(StorageReader):
    """Reads one archive for `torch.distributed.checkpoint.load`. Close it, or use it in a `with` block.

    Args:
        path: the archive's directory, or a Hub id.
        base, jobs, limits: as of `deltafmt.open`.

    A base tensor is read whole once, for its digest, before any part of it is used.

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
        check_count("jobs", jobs, 1)
        self._base, self._limits = base, limits
        self._path, self._archive = path, self._opened(path)
        self._pool = Pool(jobs)

    def _opened(self, path: PathLike) -> Archive:
        return open_archive(path, self._base, limits=self._limits)

    def reset(self, checkpoint_id: PathLike | None = None) -> None:
        """Called before each load; with `load(..., checkpoint_id=path)` another archive of the same bases is read.

        If that cannot be opened, the reader stays with the archive that it has.
        """
        if checkpoint_id is not None and os.fspath(checkpoint_id) != os.fspath(self._path):
            other = self._opened(checkpoint_id)
            self._archive.close()
            self._path, self._archive = checkpoint_id, other

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: PathLike) -> bool:
        """Whether this is the directory of an archive."""
        return is_archive(Path(checkpoint_id))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Every tensor, whole. Reads no tensor bytes."""
        self._archive._check_open()
        return Metadata({name: _described(info) for name, info in self._archive.tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with one_thread_each() if self._archive.computes else nullcontext():
            for item in plan.items:
                tensor = planner.resolve_tensor(item).detach()
                self._fill(tensor, item)
                planner.commit_tensor(item, tensor)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _fill(self, tensor: torch.Tensor, item: ReadItem) -> None:
        """Put the block of a stored tensor that an item names into `tensor`, which has the shape of the block."""
        rebuilder = self._archive.rebuilder(item.storage_index.fqn)
        dtype, shape = rebuilder.dtype, rebuilder.target.shape
        if tensor.numel() == 0:
            return
        into = tensor if shape else tensor.view(1)
        missing = 2 - len(shape)  # dimensions
        top, left, *further = (*item.storage_offsets, *[0] * missing)
        rows, columns, *lengths = (*item.lengths, *[1] * missing)
        deeper: list[Any] = [slice(at, at + length) for at, length in zip(further, lengths, strict=True)]
        inner = math.prod(shape[2:])  # elements of one column: further dimensions are read whole
        step = max(rebuilder.rows_in(_BLOCK_ELEMENTS), 1)
        # Blocks end where chunks do, so that only the first and the last chunk of a part may be decoded for few rows.
        for begin, end in pairwise([top, *range((top // step + 1) * step, top + rows, step), top + rows]):
            part = Rectangle(begin, end, left * inner, (left + columns) * inner)
            block = torch.empty(part.shape, dtype=torch_dtype(dtype))
            bits = block.view(torch.uint8).numpy().view(dtype.bits)
            read_rectangle_in_pieces(rebuilder, part, bits, self._pool)
            place = into[begin - top : end - top]
            place.copy_(block.view(end - begin, columns, *shape[2:])[(..., *deeper)].reshape(place.shape))

    def close(self) -> None:
        """Close the archive and its bases."""
        self._pool.close()
        self._archive.close()

    def __enter__(self) -> DeltafmtReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _described(stored: TensorInfo) -> TensorStorageMetadata:
    size = torch.Size(stored.shape)
    properties = TensorProperties(dtype=torch_dtype(stored.dtype))
    return TensorStorageMetadata(properties, size, [ChunkStorageMetadata(torch.Size([0] * len(size)), size)])
