"""A packed model as a state dict: all of it, or lazily, tensor by tensor and slice by slice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import EllipsisType, TracebackType
from typing import Literal, TypeAlias, overload

import torch

from ..archive import OpenArchive, TensorSlice
from ..archive import open as open_lazily
from ..dtypes import DTYPES
from ..limits import check_count
from ..sources import Bases, PathLike, open_archive
from .tensors import SAFETENSORS_NAMES, Cast, check_bases, nbytes, new_cast, read_tensors, room_for, torch_dtype

_Part: TypeAlias = int | slice | EllipsisType
Index: TypeAlias = _Part | tuple[_Part, ...]


@overload
def load_state_dict(
    path: PathLike,
    *,
    device: torch.device | str | None = ...,
    dtype: torch.dtype | None = ...,
    base: Bases | None = ...,
    lazy: Literal[False] = ...,
    jobs: int | None = ...,
) -> dict[str, torch.Tensor]: ...


@overload
def load_state_dict(
    path: PathLike,
    *,
    device: torch.device | str | None = ...,
    dtype: torch.dtype | None = ...,
    base: Bases | None = ...,
    lazy: Literal[True],
    jobs: int | None = ...,
) -> LazyStateDict: ...


def load_state_dict(
    path: PathLike,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    base: Bases | None = None,
    lazy: bool = False,
    jobs: int | None = None,
) -> dict[str, torch.Tensor] | LazyStateDict:
    """Load a packed model.

    Args:
        path: the archive's directory, or a Hub id.
        device: where the tensors go; by default they stay on the CPU.
        dtype: what floating-point tensors are cast to; by default they keep theirs.
        base: the base it was packed against, or several, as in `deltafmt.open`.
        lazy: read nothing yet; give a `LazyStateDict`, to be closed by the caller. The base is looked at all the same:
            it must be there, with the right names, dtypes and shapes, and its smallest tensor that is needed the right
            one; the digests of the others are checked as they are read.
        jobs: threads; one per processor if None.

    Returns:
        Name -> tensor, in the order of the archive. Tensors that are stored once under several names are one tensor:
        clone them before you train them in place.

    Raises:
        MalformedError, UnsupportedError, IntegrityError: as spec/reasons.md says.
        WrongBaseError: a base is missing, or is another model.
        UsageError: `dtype` is no float, or `device` cannot be used or has no room; or `jobs` is no number of threads.
    """
    check_count("jobs", jobs, 1)
    cast = new_cast(device, dtype)
    if lazy:
        with ExitStack() as stack:
            opened = stack.enter_context(open_lazily(path, base, "pt", jobs=jobs))
            check_bases(opened._archive, opened.keys())
            stack.pop_all()  # the caller closes it
        return LazyStateDict(opened, cast)
    hint = "Take another device, or lazy=True and not all of it"
    with open_archive(path, base) as archive, room_for(nbytes(archive, cast), cast.device, hint):
        return read_tensors(archive, archive.tensors, cast, jobs)


class LazyStateDict(Mapping[str, "LazyTensor"]):
    """Names -> `LazyTensor`s, which read the archive where they are indexed. Close it, or use it in a `with` block."""

    def __init__(self, archive: OpenArchive, cast: Cast) -> None:
        self._archive, self._cast = archive, cast
        self._names = dict.fromkeys(archive.keys())

    def __getitem__(self, name: str) -> LazyTensor:
        if name not in self._names:
            raise KeyError(name)
        return LazyTensor(self._archive.get_slice(name), self._cast)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def close(self) -> None:
        """Close the archive and its bases. Reading afterwards raises `UsageError`."""
        self._archive.close()

    def __enter__(self) -> LazyStateDict:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LazyTensor:
    """A tensor that is read where it is indexed, as safetensors' `PySafeSlice`."""

    def __init__(self, archived: TensorSlice, cast: Cast) -> None:
        self._archived, self._cast = archived, cast

    def get_shape(self) -> list[int]:
        return self._archived.get_shape()

    def get_dtype(self) -> str:
        """The safetensors name of the dtype that indexing gives."""
        return SAFETENSORS_NAMES[self._cast.result(torch_dtype(DTYPES[self._archived.get_dtype()]))]

    def __getitem__(self, index: Index) -> torch.Tensor:
        """Basic indexing: as of `deltafmt.archive.TensorSlice`."""
        found: torch.Tensor = self._archived[index]
        return self._cast(found)
