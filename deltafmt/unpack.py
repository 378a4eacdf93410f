"""`unpack`: an archive becomes the checkpoint it was packed from."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .dtypes import Bits, Dtype, round_to, widen
from .durable import NewFile, Staging
from .errors import UsageError
from .gemm import one_thread_each
from .layout import OutputFile, new_layout, original_layout, output_dtype
from .limits import DEFAULT_LIMITS, Limits
from .names import escaped
from .pieces import Piece, check_rest_of_bases, pieces
from .pipeline import IN_FLIGHT_BYTES, Pipeline
from .reader import Archive
from .report import Progress, UnpackReport, silent
from .roles import checkpoint_bytes, tensor_reports
from .scratch import BufferPool
from .sources import Bases, PathLike, check_apart, each_base, open_archive
from .writer import copied

_BLOCK_ELEMENTS = 1 << 16  # of which norms are taken at a time


def unpack(
    src: PathLike,
    dst: PathLike,
    *,
    base: Bases | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
    limits: Limits = DEFAULT_LIMITS,
) -> UnpackReport:
    """Unpack an archive into a plain Hugging Face checkpoint at `dst`.

    Of a lossless archive every file is identical, byte for byte, to the one that was packed; each tensor is checked
    against its digest before anything appears at `dst`.

    Args:
        src: the archive.
        dst: the directory to create.
        base: the base it was packed against, if it was: a path, a Hub id, a sequence of these in any order if there are
            several, or a mapping of base ids to these.
        dtype: cast float tensors (`bfloat16`, `float16`, `float32`, `float64`); the report says what that loses.
        max_shard_size: bytes; write new shards of at most this size in place of the original ones.
        jobs: threads; one per processor if None.
        overwrite: replace `dst` if it holds a checkpoint or an archive.
        progress: called as the work goes on.
        limits: caps on what is accepted from `src` and `base`.

    Raises:
        WrongBaseError: a base is needed and missing, or what is given is another model.
        IntegrityError, MalformedError, UnsupportedError: the archive is damaged or unknown (spec/reasons.md).
        UsageError: `dst` exists; an unknown dtype.
        AccessError: writing failed.
    """
    started = time.perf_counter()
    cast = output_dtype(dtype) if dtype is not None else None
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(open_archive(src, base, limits=limits))
        check_apart(Path(dst), archive.path, *each_base(base))
        area = stack.enter_context(Staging(Path(dst), overwrite=overwrite))
        if archive.computes:
            stack.enter_context(one_thread_each())
        pipeline = stack.enter_context(Pipeline(jobs))
        plain = cast is None and max_shard_size is None
        layout = original_layout(archive) if plain else new_layout(archive, cast, max_shard_size)
        unpacker = _Unpacker(archive, pipeline, progress)
        for output in layout.files:
            unpacker.write(output, area.create(output.name))
        if layout.index is not None:
            area.write(layout.index[0], [layout.index[1]])
        for name, part in archive.sidecars.items():
            _, found = copied(area, name, part)
            archive.check_sidecar(name, found)
        check_rest_of_bases(archive, pipeline)
        area.commit()
        reports = {
            name: replace(report, dtype=unpacker.dtypes[name], rel_error=unpacker.errors.get(name, report.rel_error))
            for name, report in tensor_reports(archive.manifest, archive.stored_size).items()
        }
        files = (
            *(output.name for output in layout.files),
            *archive.sidecars,
            *([layout.index[0]] if layout.index else []),
        )
        return UnpackReport(
            logical_bytes=checkpoint_bytes(archive.manifest),
            stored_bytes=archive.input_bytes,
            exact=archive.manifest.exact and not unpacker.errors,
            max_rel_error=max((report.rel_error or 0.0 for report in reports.values()), default=0.0),
            seconds=time.perf_counter() - started,
            tensors=reports,
            written_bytes=sum((Path(dst) / name).stat().st_size for name in files),
            source=str(src),
            destination=str(dst),
            files=tuple(sorted(files)),
        )


class _Written(NamedTuple):
    """A piece of a tensor; if it was cast, the norms of what its finite values lost thereby, and of these."""

    bits: Bits
    lost: float = 0.0
    norm: float = 0.0


class _Unpacker:
    """Writes weight files.

    Attributes:
        dtypes: in which each tensor was written.
        errors: the relative error of each tensor that was cast.
    """

    def __init__(self, archive: Archive, pipeline: Pipeline, progress: Progress) -> None:
        self._archive, self._pipeline, self._progress = archive, pipeline, progress
        self._buffers = BufferPool(IN_FLIGHT_BYTES)
        self._done = 0
        self._total = archive.manifest.logical_bytes
        self.dtypes: dict[str, str] = {}
        self.errors: dict[str, float] = {}

    def write(self, output: OutputFile, file: NewFile) -> None:
        """Write one weight file: rebuilt and written piece by piece in parallel, digested in order."""
        file.append(len(output.header).to_bytes(8, "little") + output.header)
        begins = dict(zip(output.tensors, accumulate(info.nbytes for info in output.tensors.values()), strict=True))
        begins = {name: file.position + end - output.tensors[name].nbytes for name, end in begins.items()}
        self.dtypes.update((name, info.dtype.name) for name, info in output.tensors.items())
        running = hashlib.sha256()
        lost = norm = 0.0
        for piece, written in self._pipeline.ordered(
            pieces(self._archive, output.tensors, self._pipeline),
            lambda piece: self._rebuild(piece, output.tensors[piece.name].dtype, file, begins[piece.name]),
            lambda piece: piece.nbytes,
        ):
            self._progress(self._done, self._total, piece.name)
            self._done += written.bits.nbytes
            lost, norm = math.hypot(lost, written.lost), math.hypot(norm, written.norm)
            if self._archive.manifest.tensors[piece.name].exact:
                running.update(written.bits)
                if piece.last:
                    self._archive.check_tensor(piece.name, "sha256:" + running.hexdigest())
                    running = hashlib.sha256()
            if piece.last:
                if self._archive.tensors[piece.name].dtype != output.tensors[piece.name].dtype:
                    self.errors[piece.name] = self._error(piece.name, lost, norm)
                lost = norm = 0.0
            self._buffers.give(written.bits)
        file.finish()

    def _error(self, name: str, lost: float, norm: float) -> float:
        """The relative error of a tensor that was cast, to the original: at most that, if it was an approximation."""
        error = lost / norm if norm else lost
        before = self._archive.manifest.tensors[name].rel_error or 0.0
        return before + error * (1 + before)  # the norm of what was cast is at most 1 + before times the original's

    def _rebuild(self, piece: Piece, dtype: Dtype, file: NewFile, begin: int) -> _Written:
        """Rebuild a piece and write it as `dtype` into the tensor that begins at byte `begin` of the file."""
        rebuilder = piece.rebuilder.result()
        bits = self._buffers.take(rebuilder.dtype.bits, piece.hi - piece.lo)
        rebuilder.read(piece.lo, piece.hi, bits)
        lost = norm = 0.0
        cast = bits
        if dtype != rebuilder.dtype:
            cast, lost, norm = _cast(bits, rebuilder.dtype, dtype, piece.name)
        file.write_at(begin + piece.lo * dtype.width, cast)
        return _Written(bits, lost, norm)


def _cast(bits: Bits, source: Dtype, target: Dtype, name: str) -> _Written:
    """Elements in another float dtype. Raises `UsageError` if a finite value would become infinite."""
    values = widen(bits, source, np.dtype("f8" if "F64" in (source.name, target.name) else "f4"))
    rounded = round_to(values, target)
    back, finite = widen(rounded, target, values.dtype), np.isfinite(values)
    overflowed = finite & ~np.isfinite(back)
    if overflowed.any():
        raise UsageError(
            f"{np.count_nonzero(overflowed)} values of tensor '{escaped(name)}' are too large for {target.name}",
            hint="Choose a wider dtype, such as bfloat16 or float32",
        )
    lost = norm = 0.0
    for begin in range(0, values.size, _BLOCK_ELEMENTS):
        block = slice(begin, begin + _BLOCK_ELEMENTS)
        exact, found = (np.where(finite[block], each[block], 0).astype("f8", copy=False) for each in (values, back))
        lost, norm = math.hypot(lost, _norm(found - exact)), math.hypot(norm, _norm(exact))
    return _Written(rounded, lost, norm)


def _norm(values: npt.NDArray[np.float64]) -> float:
    """Of any size: squares alone would leave the range of a double."""
    exponent = int(np.frexp(np.abs(values).max(initial=0))[1])
    scaled = np.ldexp(values, -exponent)
    return math.ldexp(math.sqrt(float(np.dot(scaled, scaled))), exponent)
