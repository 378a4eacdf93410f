"""Reading on small devices: numpy arrays of common types, and as much of a low-rank archive as there is room for.

Needs the bare package only: of what comes with that numpy, zstandard, xxhash (each chunk has a checksum), ml_dtypes
(bfloat16 and float8) and threadpoolctl; no torch, no transformers. An archive in a single file (`pack --single-file`)
brings its sidecars along.

    with edge.open("packed.safetensors", max_bytes=300_000_000) as model:
        tokenizer = model.sidecar("tokenizer.json")
        weight = model.get("model.layers.0.mlp.up_proj.weight", "float32")
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from types import TracebackType
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from .checkpoint import TensorInfo
from .digests import digest
from .dtypes import SILENT, Dtype, Shape, widen
from .errors import RefusedError, UsageError
from .limits import DEFAULT_LIMITS, Limits, check_count
from .manifest import Manifest
from .names import escaped
from .operators import Facts, Lowrank, Stored
from .reader import Archive
from .scope import ManifestScope
from .scratch import borrowed
from .sources import Bases, PathLike, open_archive

View: TypeAlias = Literal["native", "float32", "uint16"]

_PIECE_ELEMENTS = 1 << 18


def open(
    path: PathLike,
    base: Bases | None = None,
    *,
    max_bytes: int | None = None,
    rank: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> EdgeArchive:
    """Open an archive, or the part of it that there is room for. No tensor bytes are read until they are asked for.

    Low-rank factors are stored component by component, the largest first: of those of approximate tensors the first
    few are a coarser model (spec/operators/lowrank.md). Exact tensors are read whole, always.

    Args:
        path: the archive's directory or single file, or a Hub id.
        base: the base or bases it was packed against, as for `deltafmt.open`.
        max_bytes: read at most so many bytes of the archive to get every tensor: of the components, the largest number
            that fits is read, the same of all tensors. Manifest, headers and chunk tables count; sidecars and the base
            do not.
        rank: read at most so many components of each tensor.
        limits: caps on what is accepted; see `deltafmt.Limits`.

    Raises:
        RefusedError: not even one component of each tensor fits in `max_bytes`.
        UsageError: `rank` is less than 1, or a number is none.
        MalformedError, UnsupportedError, IntegrityError: as spec/reasons.md says.
        WrongBaseError: `base` is another model.
    """
    check_count("rank", rank, 1)
    check_count("max_bytes", max_bytes, 0)
    archive = open_archive(path, base, limits=limits)
    try:
        return EdgeArchive(archive, max_bytes, rank)
    except BaseException:
        archive.close()
        raise


class EdgeArchive:
    """An open archive, or a prefix of it. Thread-safe; close it, or use it in a `with` block.

    Attributes:
        rank: components read of each low-rank tensor that may be cut; None for all.
        bytes_to_read: bytes of the archive that are read for all tensors, as `open` counts them.
    """

    def __init__(self, archive: Archive, max_bytes: int | None, rank: int | None) -> None:
        self._archive = archive
        self._factors = _factors(archive.manifest)
        self.rank = self._fitting(max_bytes, rank) if max_bytes is not None else rank
        self.bytes_to_read = self._bytes_of(self.rank)
        archive.scope = PrefixScope(archive.manifest, self._factors, self.rank)

    def keys(self) -> list[str]:
        """Names of all tensors, in the order of the manifest."""
        return list(self._archive.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def dtype(self, name: str) -> str:
        """The safetensors name of a tensor's dtype."""
        return self._info(name).dtype.name

    def get(self, name: str, dtype: View = "native", *, rows: slice | None = None) -> npt.NDArray[Any]:
        """A tensor, rebuilt piece by piece into the array that is returned; nothing else as large is held.

        Args:
            name: one of `keys`.
            dtype: `"native"` for the tensor's own (bfloat16 and float8 as `ml_dtypes` has them); `"float32"` for the
                values of any float dtype (of F64: rounded); `"uint16"` for the bits of a dtype of two bytes.
            rows: of the first axis, in steps of 1; only the chunks that hold them are read.

        Raises:
            UsageError: an unknown name; a dtype that the tensor does not have; rows of a 0-d tensor, or no slice of
                whole numbers.
            IntegrityError, WrongBaseError: what is read is damaged, or the base is missing.
        """
        info = self._info(name)
        shape, lo, hi = info.shape, 0, info.count
        if rows is not None:
            start, stop = _bounds(rows, shape, name)
            row = math.prod(shape[1:])
            lo, hi, shape = start * row, stop * row, (stop - start, *shape[1:])
        out = np.empty(hi - lo, _viewed(info.dtype, dtype, name))
        rebuilder = self._archive.rebuilder(name)
        step = rebuilder.step(_PIECE_ELEMENTS)
        for begin, end in pairwise([lo, *range((lo // step + 1) * step, hi, step), hi]):
            piece = out[begin - lo : end - lo]
            if dtype != "float32" or info.dtype.name == "F32":
                rebuilder.read(begin, end, piece.view(info.dtype.bits))
            else:
                with borrowed(info.dtype.bits, end - begin) as bits, np.errstate(**SILENT):
                    rebuilder.read(begin, end, bits)
                    widen(bits, info.dtype, piece.dtype, piece)
        return out.reshape(shape)

    def sidecars(self) -> list[str]:
        """Names of the other files of the checkpoint."""
        return list(self._archive.sidecars)

    def sidecar(self, name: str) -> bytes:
        """The content of one of them, checked against its digest. Raises `UsageError`, `IntegrityError`."""
        part = self._archive.sidecars.get(name)
        if part is None:
            where = self._archive.location
            raise UsageError(f"there is no sidecar '{escaped(name)}'", where=where, hint="sidecars() lists them")
        content = b"".join(part.blocks())
        self._archive.check_sidecar(name, digest(content))
        return content

    def _info(self, name: str) -> TensorInfo:
        info = self._archive.tensors.get(name)
        if info is None:
            where = self._archive.location
            raise UsageError(f"there is no tensor '{escaped(name)}'", where=where, hint="keys() lists them")
        return info

    def _fitting(self, max_bytes: int, rank: int | None) -> int | None:
        """The largest rank, up to `rank`, with which all that is read fits in `max_bytes`."""
        if self._bytes_of(rank) <= max_bytes:
            return rank
        arrays = self._archive.manifest.arrays
        full = max((arrays[name].shape[0] for name in self._factors), default=1)
        fits, fails = 0, full if rank is None else min(rank, full)
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self._bytes_of(middle) <= max_bytes else (fits, middle)
        if not fits:
            raise RefusedError(
                "the archive does not fit"
                if self._factors
                else "the archive does not fit, and has nothing to leave out",
                where=self._archive.location,
                expected=f"at most {max_bytes} bytes to read",
                found=self._bytes_of(1),
                hint="Raise max_bytes, or pack with fewer components",
            )
        return fits

    def _bytes_of(self, rank: int | None) -> int:
        archive, manifest = self._archive, self._archive.manifest
        elsewhere = sum(sidecar.size for sidecar in manifest.sidecars.values())
        elsewhere += sum(archive.stored_size(name) for name in manifest.arrays)
        read = 0
        for name in _uses(manifest):
            components, width = manifest.arrays[name].shape if name in self._factors else (0, 0)
            if rank is not None and components:
                read += archive.prefix_bytes(name, min(rank, components) * width)
            else:
                read += archive.stored_size(name)
        return archive.input_bytes - elsewhere + read

    def close(self) -> None:
        """Close the archive's files and its bases. Reading afterwards raises `UsageError`."""
        self._archive.close()

    def __enter__(self) -> EdgeArchive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PrefixScope(ManifestScope):
    """The names of a manifest, where factors have their first components only: all that a reader then asks for."""

    def __init__(self, manifest: Manifest, factors: frozenset[str], rank: int | None) -> None:
        super().__init__(manifest)
        self._factors, self._rank = factors, rank

    def array(self, name: str) -> Facts | None:
        facts = super().array(name)
        if facts is None or self._rank is None or name not in self._factors:
            return facts
        return Facts(facts.dtype, (min(self._rank, facts.shape[0]), facts.shape[1]), facts.exact, facts.chunk)


def _factors(manifest: Manifest) -> frozenset[str]:
    """The stored arrays that are float factors of approximate tensors, and nothing else."""
    uses, found = _uses(manifest), set[str]()
    for tensor in manifest.tensors.values():
        for node in tensor.recipe.walk() if not tensor.exact else ():
            if isinstance(node, Lowrank) and isinstance(node.a, Stored) and isinstance(node.b, Stored):
                names = {node.a.array, node.b.array}
                if all(uses[name] == 1 and manifest.arrays[name].dtype.is_float for name in names):
                    found |= names
    return frozenset(found)


def _uses(manifest: Manifest) -> Counter[str]:
    """How often each stored array is in the recipe of a tensor."""
    nodes = (node for tensor in manifest.tensors.values() for node in tensor.recipe.walk())
    return Counter(node.array for node in nodes if isinstance(node, Stored))


def _viewed(source: Dtype, wanted: View, name: str) -> np.dtype[Any]:
    """The numpy type in which a tensor is given. Raises `UsageError` if it cannot be."""
    if wanted == "native":
        return source.values
    if wanted == "float32" and source.name.startswith(("F", "BF")):
        return np.dtype(np.float32)
    if wanted == "uint16" and source.width == 2:
        return np.dtype(np.uint16)
    raise UsageError(
        f"tensor '{escaped(name)}' cannot be had as {wanted}",
        found=source.name,
        hint="'float32' is for floats, 'uint16' for dtypes of two bytes, 'native' for all",
    )


def _bounds(rows: slice, shape: Shape, name: str) -> tuple[int, int]:
    """Where a slice of rows begins and ends. Raises `UsageError` if it is none or has steps, or there are no rows."""
    if shape and isinstance(rows, slice) and rows.step in (None, 1) and bool not in (type(rows.start), type(rows.stop)):
        with suppress(TypeError):  # no whole numbers
            start, stop, _ = rows.indices(shape[0])
            return start, max(start, stop)
    what = "is read by slices of whole numbers, in steps of 1, only" if shape else "has no rows"
    hint = "Leave rows out, or write slice(start, stop)"
    raise UsageError(f"tensor '{escaped(name)}' {what}", found=repr(rows)[:80], hint=hint)
