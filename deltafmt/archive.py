"""`deltafmt.open`: an archive that reads like `safetensors.safe_open`."""

from __future__ import annotations

import importlib.util
import math
import operator
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from types import EllipsisType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from .dtypes import Bits, Dtype, Shape
from .errors import MissingExtraError, UsageError
from .gemm import one_thread_each
from .limits import DEFAULT_LIMITS, Limits, check_count
from .operators.base import Rectangle
from .pipeline import Pool
from .reader import Archive
from .rebuild import Rebuilder, read_in_pieces, read_rectangle_in_pieces
from .sources import Bases, PathLike, open_archive

if TYPE_CHECKING:
    import torch

Framework: TypeAlias = Literal["np", "numpy", "pt", "torch"]
_Index: TypeAlias = int | slice | EllipsisType | Sequence[int]
_Part: TypeAlias = int | slice | list[int]

_LITTLE = 1 << 18
"""Elements that are not worth a change of settings: it takes a millisecond."""


def open(
    path: PathLike,
    base: Bases | None = None,
    framework: Framework = "np",
    device: Any = "cpu",
    *,
    jobs: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> OpenArchive:
    """Open an archive for reading. No tensor bytes are read until they are asked for.

    Args:
        path: the archive's directory or single file, or a Hub id.
        base: the base it was packed against, if any: a path, a Hub id, a sequence of these in any order if there are
            several, or a mapping of base ids to these.
        framework: `"np"` for numpy arrays (`ml_dtypes` for bfloat16 and float8), `"pt"` for torch tensors.
        device: where torch tensors are to be: whatever torch takes for a device, such as `"cuda:1"` or 0. They are
            rebuilt in main memory and then moved. Of numpy, `"cpu"`.
        jobs: threads that rebuild one large tensor together; by default as many as there are processors.
        limits: caps on what is accepted; see `deltafmt.Limits`.

    Returns:
        A context manager with `keys`, `get_tensor`, `get_tensors`, `get_slice`, `metadata`; thread-safe.

    Raises:
        MalformedError, UnsupportedError, IntegrityError: as spec/reasons.md says.
        WrongBaseError: `base` is another model.
        MissingExtraError: `"pt"` without torch.
        UsageError: another framework, a device that is not there or has no values, or `jobs` is no number of threads.
    """
    check_count("jobs", jobs, 1)
    if framework not in ("np", "numpy", "pt", "torch"):
        raise UsageError(f"unknown framework {framework!r}", hint="Choose 'np' or 'pt'")
    if framework in ("pt", "torch") and importlib.util.find_spec("torch") is None:
        raise MissingExtraError("torch tensors need torch", extra="torch")
    of_torch = framework in ("pt", "torch")
    if device is not None and str(device) != "cpu":
        if not of_torch:
            raise UsageError(f"numpy arrays cannot be on the device {device!r}", hint="Leave it out, or choose 'pt'")
        device = usable_device(device)
    return OpenArchive(open_archive(path, base, limits=limits), of_torch, jobs, device)


def usable_device(device: Any) -> torch.device:
    """What torch takes for a device, with its number. Raises `UsageError` for one that is not there, and for `meta`,
    where tensors have no values."""
    import torch

    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError, ImportError) as error:  # torch raises any of these
        told = str(error).partition("\n")[0]
        raise UsageError(f"the device {str(device)!r} cannot be used", found=told, hint="Choose 'cpu'") from error
    if found.type == "meta":
        hint = "Choose 'cpu'; of a model, load_model(..., mode='lazy') reads weights when they are used"
        raise UsageError("the device 'meta' cannot be used: tensors have no values there", hint=hint)
    return found


class OpenArchive:
    """An open archive; mirrors `safetensors.safe_open` of version 0.8. Close it, or use it in a `with` block.

    What differs: `keys` come in the order of the manifest; there is no `backend`; what goes wrong raises the errors of
    deltafmt; and slices are indexed as `TensorSlice` says.
    """

    def __init__(self, archive: Archive, torch: bool, jobs: int | None, device: Any = "cpu") -> None:
        self._archive = archive
        self._torch = torch
        self._device = "cpu" if device is None else device
        self._pool = Pool(jobs)

    def keys(self) -> list[str]:
        """Names of all tensors, in the order of the manifest."""
        return list(self._archive.tensors)

    def offset_keys(self) -> list[str]:
        """The same; safetensors has it."""
        return self.keys()

    def metadata(self) -> dict[str, str] | None:
        """`__metadata__` of the first original weight file; None if it had none."""
        return self._archive.original_metadata()

    def get_tensor(self, name: str) -> Any:
        """A whole tensor, rebuilt: its original dtype and shape. Raises `UsageError` for an unknown name."""
        return self.get_slice(name)[...]

    def get_tensors(self) -> dict[str, Any]:
        """Every tensor by its name. All are in memory at once."""
        return {name: self.get_tensor(name) for name in self.keys()}

    def get_slice(self, name: str) -> TensorSlice:
        """A lazy view of a tensor: `get_shape`, `get_dtype`, and indexing that decodes only the chunks it needs."""
        return TensorSlice(self, self._archive.rebuilder(name))

    def tensor_bytes(self, name: str) -> bytes:
        """The bytes of a tensor as a safetensors file holds them."""
        return self._archive.read_whole(name).tobytes()

    def computing(self) -> AbstractContextManager[None]:
        """To be entered by whoever reads in several threads: if tensors are computed, numpy's BLAS has one thread for
        each of those meanwhile, in all of the process."""
        return one_thread_each() if self._computes else nullcontext()

    @cached_property
    def _computes(self) -> bool:
        return self._archive.computes

    def _read(self, rebuilder: Rebuilder, part: Rectangle) -> Bits:
        """A part of a tensor taken as a matrix, `[rows, columns]`."""
        row = rebuilder.target.row
        out = np.empty(part.shape, rebuilder.dtype.bits)
        with self.computing() if out.size > _LITTLE else nullcontext():
            if part.columns == row:
                read_in_pieces(rebuilder, part.top * row, part.bottom * row, out.reshape(-1), self._pool)
            else:
                read_rectangle_in_pieces(rebuilder, part, out, self._pool)
        return out

    def _shown(self, bits: Bits, dtype: Dtype, shape: Shape) -> Any:
        """`[m]` as an array or tensor."""
        if not self._torch:
            return bits.view(dtype.values).reshape(shape)
        import torch

        found = torch.from_numpy(bits.view(np.uint8)).view(getattr(torch, dtype.values.name)).reshape(shape)
        return found.to(self._device)

    def close(self) -> None:
        """Close the archive's files and its bases. Reading afterwards raises `UsageError`."""
        self._pool.close()
        self._archive.close()

    def __enter__(self) -> OpenArchive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorSlice:
    """A tensor that is read where it is indexed, as safetensors' `PySafeSlice`.

    Besides integers, slices (of any step) and `...`, a list of integers may stand for one dimension, as torch has it:
    the others are indexed as if it were not there. What safetensors leaves to torch is refused: several lists, masks,
    `None`, and a bool, which would be a mask to torch and a number to numpy.
    """

    def __init__(self, archive: OpenArchive, rebuilder: Rebuilder) -> None:
        self._archive, self._rebuilder = archive, rebuilder

    def get_shape(self) -> list[int]:
        return list(self._rebuilder.target.shape)

    def get_dtype(self) -> str:
        """The safetensors name of the dtype."""
        return self._rebuilder.dtype.name

    def __getitem__(self, index: _Index | tuple[_Index, ...]) -> Any:
        """The rows from the first to the last that are asked for are decoded, with what else is in their chunks, and of
        a low-rank product, or of what was packed for tensor parallelism, the columns from the first to the last; only
        the result is kept.

        Raises `IndexError` for what is out of range, too many indices or lists; `TypeError` for anything else.
        """
        shape = self._rebuilder.target.shape
        parts = _expanded(index, len(shape))
        runs = [_run(part, axis, shape[axis]) for axis, part in enumerate(parts)]
        runs += [(0, size, slice(None)) for size in shape[len(parts) :]]
        (top, bottom, _), (left, right, _) = (*runs, *[(0, 1, 0)] * 2)[:2]
        within = [place for _, _, place in runs[:2]] + parts[2:]
        inner = math.prod(shape[2:])  # elements of one column: of further axes all is read
        bits = self._archive._read(self._rebuilder, Rectangle(top, bottom, left * inner, right * inner))
        found = bits.reshape([end - begin for begin, end, _ in runs[:2]] + list(shape[2:]))
        found = found[tuple(slice(None) if isinstance(part, list) else part for part in within)]
        for axis, part in enumerate(within):
            if isinstance(part, list):  # one at most; the integers before it have taken their dimensions away
                kept = axis - sum(isinstance(each, int) for each in within[:axis])
                found = np.take(found, np.array(part, np.intp), kept)
        return self._archive._shown(np.ascontiguousarray(found).reshape(-1), self._rebuilder.dtype, found.shape)


def _run(part: _Part, axis: int, size: int) -> tuple[int, int, _Part]:
    """Where that which is asked of an axis begins and ends, and which part of that it is."""
    if isinstance(part, slice):
        start, stop, step = part.indices(size)
        asked = range(start, stop, step)
        return (min(asked), max(asked) + 1, slice(None, None, step)) if asked else (0, 0, slice(None))
    if isinstance(part, list):
        places = [_place(each, axis, size) for each in part]
        begin = min(places, default=0)
        return begin, max(places, default=-1) + 1, [place - begin for place in places]
    place = _place(part, axis, size)
    return place, place + 1, 0


def _place(index: int, axis: int, size: int) -> int:
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of bounds for axis {axis} with size {size}")
    return index % size


def _expanded(index: _Index | tuple[_Index, ...], dimensions: int) -> list[_Part]:
    """The index as one entry per axis that it names, the ellipsis written out."""
    parts = [
        part if isinstance(part, (slice, EllipsisType)) else _integers(part)
        for part in (index if isinstance(index, tuple) else (index,))
    ]
    places = [place for place, part in enumerate(parts) if part is Ellipsis]
    if len(places) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    if sum(isinstance(part, list) for part in parts) > 1:
        raise IndexError("an index can only have a single list")
    if len(parts) - len(places) > dimensions:
        raise IndexError(
            f"too many indices: the tensor has {dimensions} dimensions, {len(parts) - len(places)} were indexed"
        )
    if places:
        parts[places[0] : places[0] + 1] = [slice(None)] * (dimensions - len(parts) + 1)
    return [part for part in parts if not isinstance(part, EllipsisType)]


def _integers(part: Any) -> int | list[int]:
    """An integer, or several: a list, a range, an array or tensor of them. Raises `TypeError` for anything else."""
    plain = part.tolist() if hasattr(part, "tolist") else part
    if isinstance(plain, (list, range)):
        return [_integer(each) for each in plain]
    return _integer(plain)


def _integer(part: Any) -> int:
    if isinstance(part, (bool, np.bool_)):
        raise TypeError("a bool is no index")
    return operator.index(part)
