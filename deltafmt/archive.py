"""`deltafmt.open`: an archive that reads like `safetensors.safe_open`."""

from __future__ import annotations

import importlib.util
import operator
from types import EllipsisType, TracebackType
from typing import Any, Literal, TypeAlias

import numpy as np

from .dtypes import Bits, Dtype, Shape
from .errors import MissingExtraError, UsageError
from .limits import DEFAULT_LIMITS, Limits, check_count
from .pipeline import Pool
from .reader import Archive
from .rebuild import Rebuilder, read_in_pieces
from .sources import Bases, PathLike, open_archive

Framework: TypeAlias = Literal["np", "numpy", "pt", "torch"]
_Index: TypeAlias = int | slice | EllipsisType

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool",
    "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip


def open(
    path: PathLike,
    base: Bases | None = None,
    framework: Framework = "np",
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
        jobs: threads that rebuild one large tensor together; by default as many as there are processors.
        limits: caps on what is accepted; see `deltafmt.Limits`.

    Returns:
        A context manager with `keys`, `get_tensor`, `get_slice`, `metadata`; thread-safe.

    Raises:
        MalformedError, UnsupportedError, IntegrityError: as spec/reasons.md says.
        WrongBaseError: `base` is another model.
        MissingExtraError: `"pt"` without torch.
        UsageError: another framework, or `jobs` is no number of threads.
    """
    check_count("jobs", jobs, 1)
    if framework not in ("np", "numpy", "pt", "torch"):
        raise UsageError(f"unknown framework {framework!r}", hint="Choose 'np' or 'pt'")
    if framework in ("pt", "torch") and importlib.util.find_spec("torch") is None:
        raise MissingExtraError("torch tensors need torch", extra="torch")
    return OpenArchive(open_archive(path, base, limits=limits), framework in ("pt", "torch"), jobs)


class OpenArchive:
    """An open archive; mirrors `safetensors.safe_open`. Close it, or use it in a `with` block."""

    def __init__(self, archive: Archive, torch: bool, jobs: int | None) -> None:
        self._archive = archive
        self._torch = torch
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
        rebuilder = self._archive.rebuilder(name)
        info = self._archive.tensors[name]
        bits = np.empty(info.count, info.dtype.bits)
        read_in_pieces(rebuilder, 0, bits.size, bits, self._pool)
        return self._shown(bits, info.dtype, info.shape)

    def get_slice(self, name: str) -> TensorSlice:
        """A lazy view of a tensor: `get_shape`, `get_dtype`, and indexing that decodes only the chunks it needs."""
        return TensorSlice(self._archive.rebuilder(name), self._shown, self._pool)

    def tensor_bytes(self, name: str) -> bytes:
        """The bytes of a tensor as a safetensors file holds them."""
        return self._archive.read_whole(name).tobytes()

    def _shown(self, bits: Bits, dtype: Dtype, shape: Shape) -> Any:
        if not self._torch:
            return bits.view(dtype.values).reshape(shape)
        import torch

        return torch.from_numpy(bits.view(np.uint8)).view(getattr(torch, _TORCH_NAMES[dtype.name])).reshape(shape)

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
    """A tensor that is read where it is indexed, as safetensors' `PySafeSlice`."""

    def __init__(self, rebuilder: Rebuilder, shown: Any, pool: Pool) -> None:
        self._rebuilder, self._shown, self._pool = rebuilder, shown, pool

    def get_shape(self) -> list[int]:
        return list(self._rebuilder.target.shape)

    def get_dtype(self) -> str:
        """The safetensors name of the dtype."""
        return self._rebuilder.dtype.name

    def __getitem__(self, index: _Index | tuple[_Index, ...]) -> Any:
        """Basic indexing (integers, slices, `...`); the rows that the first axis asks for are decoded, no others."""
        shape = self._rebuilder.target.shape
        first, *rest = _expanded(index, len(shape)) or [slice(None)]
        if not shape:
            return self._read(0, 1, ())
        size = shape[0]
        if isinstance(first, slice):
            start, stop, step = first.indices(size)
            rows = range(start, stop, step)
            lo, hi = (min(rows), max(rows) + 1) if rows else (0, 0)
            within: Any = slice(None) if step == 1 else [row - lo for row in rows]
        else:
            row = operator.index(first)
            if not -size <= row < size:
                raise IndexError(f"index {row} is out of bounds for axis 0 with size {size}")
            lo = row % size
            hi, within = lo + 1, 0
        return self._read(lo, hi, shape[1:])[(within, *rest)]

    def _read(self, lo: int, hi: int, row_shape: Shape) -> Any:
        row = int(np.prod(row_shape, dtype=object))
        bits = np.empty((hi - lo) * row, self._rebuilder.dtype.bits)
        read_in_pieces(self._rebuilder, lo * row, hi * row, bits, self._pool)
        shape = (hi - lo, *row_shape) if self._rebuilder.target.shape else ()
        return self._shown(bits, self._rebuilder.dtype, shape)


def _expanded(index: _Index | tuple[_Index, ...], dimensions: int) -> list[int | slice]:
    """The index as one entry per axis that it names, the ellipsis written out."""
    parts = list(index) if isinstance(index, tuple) else [index]
    places = [place for place, part in enumerate(parts) if part is Ellipsis]
    if len(places) > 1:
        raise IndexError("an index can only have a single ellipsis ('...')")
    if len(parts) - len(places) > dimensions:
        raise IndexError(
            f"too many indices: the tensor has {dimensions} dimensions, {len(parts) - len(places)} were indexed"
        )
    if places:
        parts[places[0] : places[0] + 1] = [slice(None)] * (dimensions - len(parts) + 1)
    return [part for part in parts if not isinstance(part, EllipsisType)]
