"""`verify`: every digest of an archive, and equality with a checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from .checkpoint import Checkpoint
from .dtypes import SILENT, Bits, Dtype, widen
from .gemm import one_thread_each
from .layout import original_layout
from .limits import DEFAULT_LIMITS, Limits
from .operators import Stored
from .operators.base import Read
from .pieces import Piece, check_rest_of_bases, pieces
from .pipeline import Pipeline
from .reader import Archive
from .report import Progress, VerifyReport, silent
from .roles import checkpoint_bytes, tensor_reports
from .sources import Bases, PathLike, open_archive, open_source

_PIECE_ELEMENTS = 1 << 20


def verify(
    src: PathLike,
    *,
    base: Bases | None = None,
    against: PathLike | None = None,
    jobs: int | None = None,
    progress: Progress = silent,
    limits: Limits = DEFAULT_LIMITS,
) -> VerifyReport:
    """Check every byte of an archive; with `against`, compare it with a checkpoint tensor by tensor.

    Without a base that an archive refers to, what does not need it is checked (`base_checked` is then False).

    Args:
        src: the archive.
        base: the base it was packed against: a path, a Hub id, a sequence of these in any order if there are several,
            or a mapping of base ids to these.
        against: a checkpoint (or archive) to compare with; the report then has `equal`, `differences` and the relative
            error per tensor.
        jobs: threads; one per processor if None.
        progress: called as the work goes on.
        limits: caps on what is accepted from every source.

    Raises:
        IntegrityError, MalformedError, UnsupportedError: the archive is damaged or unknown (spec/reasons.md).
        WrongBaseError: `base` is another model; or `against` is given, and the base is needed and missing.
    """
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(open_archive(src, base, limits=limits))
        other = stack.enter_context(open_source(against, limits=limits)) if against is not None else None
        if archive.computes:
            stack.enter_context(one_thread_each())
        pipeline = stack.enter_context(Pipeline(jobs))
        checker = _Checker(archive, other, pipeline, progress)
        checker.check_arrays()
        original_layout(archive)
        errors = checker.check_tensors()
        for name, part in archive.sidecars.items():
            archive.check_sidecar(name, part.digest())
        check_rest_of_bases(archive, pipeline)
        differences = _differences(archive, other, errors, checker.unequal) if other is not None else {}
        reports = {
            name: replace(report, rel_error=errors.get(name, report.rel_error))
            for name, report in tensor_reports(archive.manifest, archive.stored_size).items()
        }
        return VerifyReport(
            logical_bytes=checkpoint_bytes(archive.manifest),
            stored_bytes=archive.input_bytes,
            exact=archive.manifest.exact,
            max_rel_error=max((report.rel_error or 0.0 for report in reports.values()), default=0.0),
            seconds=time.perf_counter() - started,
            tensors=reports,
            source=str(src),
            against=None if against is None else str(against),
            equal=None if other is None else not differences,
            as_stated=None if other is None else all(_is_stated(archive, name, errors) for name in differences),
            base_checked=archive.bases.keys() == archive.manifest.bases.keys(),
            bases_missing={
                name: base.repo for name, base in archive.manifest.bases.items() if name not in archive.bases
            },
            unchecked=tuple(checker.unchecked),
            differences=differences,
        )


class _Compared(NamedTuple):
    """A rebuilt piece beside the same piece of the other checkpoint.

    `same`: whether all bits are equal (-0.0 is not 0.0). `difference`, `original`: squared norms of the difference and
    of the other's values.
    """

    bits: Bits
    same: bool = True
    difference: float = 0.0
    original: float = 0.0


class _Checker:
    def __init__(self, archive: Archive, other: Checkpoint | None, pipeline: Pipeline, progress: Progress) -> None:
        self._archive, self._other, self._pipeline, self._progress = archive, other, pipeline, progress
        self._done = 0
        self._total = archive.manifest.logical_bytes
        self.unequal: set[str] = set()
        self.unchecked: list[str] = []

    def check_arrays(self) -> None:
        """Check the digests of stored arrays that are not, as they are, a tensor whose digest is checked anyway."""
        tensors = self._archive.manifest.tensors.values()
        covered = {
            tensor.recipe.array
            for tensor in tensors
            if isinstance(tensor.recipe, Stored)
            and tensor.digest == self._archive.manifest.arrays[tensor.recipe.array].digest
        }
        for name, array in self._archive.manifest.arrays.items():
            if name in covered:
                continue
            running = hashlib.sha256()
            step = max(_PIECE_ELEMENTS // array.encoding.chunk, 1) * array.encoding.chunk
            spans = [(lo, min(lo + step, array.numel)) for lo in range(0, array.numel, step)]
            read = partial(_read_span, self._archive.array_reader(name), array.dtype)
            for _, bits in self._pipeline.ordered(spans, read, lambda span: 8 * (span[1] - span[0])):
                running.update(bits)
            self._archive.check_array(name, "sha256:" + running.hexdigest())

    def check_tensors(self) -> dict[str, float]:
        """Rebuild every tensor that can be and check its digest; the relative error of each to the other checkpoint."""
        errors: dict[str, float] = {}
        names = list(self._archive.manifest.tensors)
        if self._other is None:
            self.unchecked = [name for name in names if self._lacks_base(name)]
        unchecked = set(self.unchecked)
        checked = [name for name in names if name not in unchecked]
        running = hashlib.sha256()
        difference = original = 0.0
        for piece, compared in self._pipeline.ordered(
            pieces(self._archive, checked, self._pipeline), self._compare, lambda piece: 2 * piece.nbytes
        ):
            name = piece.name
            self._progress(self._done, self._total, name)
            self._done += compared.bits.nbytes
            running.update(compared.bits)
            difference, original = difference + compared.difference, original + compared.original
            if not compared.same:
                self.unequal.add(name)
            if not piece.last:
                continue
            if self._archive.manifest.tensors[name].exact:
                self._archive.check_tensor(name, "sha256:" + running.hexdigest())
            if self._comparable(name):
                error = (difference / original) ** 0.5 if original else difference**0.5
                errors[name] = error if name in self.unequal else 0.0  # a NaN equals itself here
            running = hashlib.sha256()
            difference = original = 0.0
        return errors

    def _compare(self, piece: Piece) -> _Compared:
        """Rebuild a piece and compare it with the other checkpoint, where that has a tensor like it."""
        rebuilder = piece.rebuilder.result()
        dtype = rebuilder.dtype
        bits = np.empty(piece.hi - piece.lo, dtype.bits)
        rebuilder.read(piece.lo, piece.hi, bits)
        if self._other is None or not self._comparable(piece.name):
            return _Compared(bits)
        expected = np.empty_like(bits)
        self._other.read(piece.name, piece.lo, piece.hi, expected)
        same = np.array_equal(bits, expected)
        if not dtype.is_float:
            return _Compared(bits, same, float(np.count_nonzero(bits != expected)), float(bits.size))
        values = widen(expected, dtype, np.dtype("f8"))
        with np.errstate(**SILENT):
            original = float(np.dot(values, values))
            if same:
                return _Compared(bits, original=original)
            wrong = np.where(bits == expected, 0.0, widen(bits, dtype, np.dtype("f8")) - values)
            return _Compared(bits, False, float(np.dot(wrong, wrong)), original)

    def _lacks_base(self, name: str) -> bool:
        return any(base not in self._archive.bases for base in self._archive.scope.bases_needed(name))

    def _comparable(self, name: str) -> bool:
        return self._other is not None and self._other.tensors.get(name) == self._archive.tensors[name]


def _read_span(read: Read, dtype: Dtype, span: tuple[int, int]) -> Bits:
    bits = np.empty(span[1] - span[0], dtype.bits)
    read(*span, bits)
    return bits


def _is_stated(archive: Archive, name: str, errors: dict[str, float]) -> bool:
    """Whether a difference is a lossy tensor's, by the error that the manifest states.

    To 1 %, and to rounding, which may fall out otherwise on another machine (spec/arithmetic.md).
    """
    tensor = archive.manifest.tensors.get(name)
    if tensor is None or tensor.rel_error is None or name not in errors:
        return False
    return abs(errors[name] - tensor.rel_error) <= 0.01 * tensor.rel_error + 2.0 ** -(tensor.dtype.mantissa_bits + 1)


def _differences(archive: Archive, other: Checkpoint, errors: dict[str, float], unequal: set[str]) -> dict[str, str]:
    """What differs between an archive and a checkpoint, by name of tensor or file."""
    found: dict[str, str] = {}
    for name in sorted(archive.tensors.keys() | other.tensors.keys()):
        ours, theirs = archive.tensors.get(name), other.tensors.get(name)
        if ours != theirs:
            facts = [f"{info.dtype.name} {list(info.shape)}" if info else "no such tensor" for info in (ours, theirs)]
            found[name] = f"{facts[0]} in the archive, {facts[1]} in the checkpoint"
        elif name in unequal:
            stated = archive.manifest.tensors[name].rel_error
            found[name] = f"relative error {errors[name]:.3g}, {'none' if stated is None else f'{stated:.3g}'} stated"
    for name in sorted(archive.sidecars.keys() | other.sidecars.keys()):
        sidecar, part = archive.manifest.sidecars.get(name), other.sidecars.get(name)
        if sidecar is None or part is None:
            found[name] = f"only in the {'checkpoint' if sidecar is None else 'archive'}"
        elif part.digest() != sidecar.digest:
            found[name] = "another file"
    layouts = [dict(_layout(checkpoint)) for checkpoint in (archive, other)]
    for name in sorted(layouts[0].keys() | layouts[1].keys()):
        if layouts[0].get(name) != layouts[1].get(name):
            found.setdefault(name, "another header, or laid out in other files")
    return found


def _layout(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    """What a checkpoint's weight files and index hold beside tensors, by file name."""
    for file in checkpoint.files:
        yield file.name, file.header
    if checkpoint.index is not None:
        yield checkpoint.index
