"""`export_lora`: what a fine-tune changed, as a LoRA adapter that others load. Lossy, and it says what is lost."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from ..dtypes import Dtype
from ..durable import Staging
from ..errors import MalformedError, RefusedError, UsageError
from ..layout import output_dtype
from ..limits import DEFAULT_LIMITS, Limits
from ..names import escaped
from ..operators import Ref
from ..reader import Archive
from ..report import ExportReport, Progress, TensorReport, silent
from ..sources import Bases, PathLike, check_apart, each_base, open_archive
from .factors import Change, lowrank_part, lowrank_rank
from .gguf import check_gguf, write_gguf
from .modules import Modules
from .peft import Adapter, write_peft

__all__ = ["RANKS", "ExportReport", "Format", "export_lora"]

Format = Literal["peft", "gguf"]

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that PEFT, vLLM, SGLang and llama.cpp all load."""


def export_lora(
    src: PathLike,
    dst: PathLike,
    *,
    base: Bases | None = None,
    rank: int | None = None,
    format: Format = "peft",
    dtype: str = "float32",
    strict: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
    limits: Limits = DEFAULT_LIMITS,
) -> ExportReport:
    """Write what an archive changes in its base as a LoRA adapter, the new directory `dst`.

    Low-rank factors that the archive holds, of a merged LoRA or a lossy difference, are taken as they are. Any other
    change of a matrix becomes the best factors of the adapter's rank (truncated SVD). Norms, biases, convolutions, tied
    embeddings and tensors that the base lacks have no place in an adapter. All loss is measured on the weights that
    merging gives, in the dtype of the model.

    The adapter is in the one form that PEFT, vLLM, SGLang and llama.cpp read alike: one rank (of `RANKS`) for all
    modules, padded with zeros, the scale in B. Modules are named as in the model of the config's `architectures`.
    Memory: the adapter, and the largest changed matrix a few times in float32.

    Args:
        src: an archive packed against a base.
        dst: the directory to create: `adapter_config.json` and `adapter_model.safetensors`, or `adapter_model.gguf`.
        base: the base, or bases; of several, the adapter is for the first that the archive names.
        rank: the adapter's rank, raised to the next of `RANKS`; if None, the highest of the archive's factors.
        format: `peft`, or `gguf` (extra `gguf`; Llama and Mistral) for llama.cpp.
        dtype: of the factors: `float32`, `float16` or `bfloat16`.
        strict: refuse if any tensor has to be left out, before any work where that is known by then.
        overwrite: replace `dst` if it holds an adapter, a checkpoint or an archive.
        progress: called as the work goes on.
        limits: caps on what is accepted from `src` and `base`.

    Raises:
        WrongBaseError: the base is missing, or another model.
        UsageError: an archive that refers to no base; nothing to tell the rank by; `dst` exists; an unknown
            dtype or format.
        RefusedError: the fine-tune changed nothing that fits, or, if `strict`, something that does not.
        UnsupportedError: a GGUF adapter of another architecture, or of a config that does not tell what it needs.
        MissingExtraError: a GGUF adapter without `gguf`.
        IntegrityError, MalformedError: the archive is damaged (spec/reasons.md).
        AccessError: writing failed.
    """
    started = time.perf_counter()
    if format not in get_args(Format):
        raise UsageError(f"unknown format {format!r}", hint="Choose 'peft' or 'gguf'")
    stored_as = output_dtype(dtype)
    if stored_as.name == "F64":
        raise UsageError("an adapter in float64", hint="Choose float32, float16 or bfloat16")
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(open_archive(src, base, limits=limits))
        check_apart(Path(dst), archive.path, *each_base(base))
        work = _Export(archive, progress, stored_as)
        if format == "gguf":
            check_gguf(work.config, archive.location)
        if strict:
            _refuse_what_is_left_out(work)
        chosen = work.rank(rank)
        area = stack.enter_context(Staging(Path(dst), overwrite=overwrite))
        adapters = work.adapters(chosen)
        if strict:  # a change that is not finite is found on the way
            _refuse_what_is_left_out(work)
        if not adapters:
            raise RefusedError(
                "nothing that an adapter could hold differs from the base",
                where=archive.location,
                found=f"{len(work.left_out)} changed tensors that do not fit",
                hint="Use the base, or the whole model: deltafmt unpack",
            )
        repo = archive.manifest.bases[work.base]
        if format == "gguf":
            write_gguf(area, adapters, chosen, stored_as, work.config, repo.repo)
        else:
            write_peft(
                area,
                adapters,
                chosen,
                stored_as,
                modules=work.matrices,
                architecture=work.modules.architecture,
                base=(repo.repo, repo.revision),
            )
        files = tuple(sorted(path.name for path in area.path.iterdir()))
        area.commit()
        return ExportReport(
            logical_bytes=archive.manifest.logical_bytes,
            stored_bytes=sum((Path(dst) / name).stat().st_size for name in files),
            exact=work.loss == 0,
            max_rel_error=max((report.rel_error or 0.0 for report in work.reports.values()), default=0.0),
            seconds=time.perf_counter() - started,
            tensors=work.reports,
            source=str(src),
            destination=str(dst),
            base=repo.repo,
            format=format,
            rank=chosen,
            loss=work.loss,
            left_out=work.left_out,
            files=files,
        )


def _refuse_what_is_left_out(work: _Export) -> None:
    if work.left_out:
        name, reason = next(iter(work.left_out.items()))
        raise RefusedError(
            f"{len(work.left_out)} of {work.changed} changed tensors do not fit, the first is "
            f"'{escaped(name)}': {reason}",
            where=work.archive.location,
            hint="Without strict they are left out, and reported",
        )


class _Export:
    """The changes of an archive, one tensor after the other, and what becomes of each."""

    def __init__(self, archive: Archive, progress: Progress, dtype: Dtype) -> None:
        self.archive, self._progress, self._dtype = archive, progress, dtype
        manifest = archive.manifest
        if not manifest.bases:
            raise UsageError(
                "the archive refers to no base: it was packed without one, or nothing in the one given was of any use",
                where=archive.location,
                hint="Pack the fine-tune with --base, the model that it was made of: an adapter is what changed",
            )
        self.base = next(iter(manifest.bases))
        self.config = _config(archive)
        self.modules = Modules(self.config, manifest.bases[self.base].tensors)
        self.matrices = {
            self.modules.path(name)
            for name, tensor in manifest.bases[self.base].tensors.items()
            if _is_matrix(name, tensor.shape)
        }
        self.reports: dict[str, TensorReport] = {}
        self.left_out: dict[str, str] = {}
        self._fits = []
        for name in manifest.tensors:
            if self._changed(name):
                reason = self._misfit(name)
                if reason is None:
                    self._fits.append(name)
                else:
                    self.left_out[name] = reason
        self._energy = self._energy_left = 0.0

    @property
    def changed(self) -> int:
        """The number of changed tensors, as far as can be told without reading them."""
        return len({*self._fits, *self.left_out})

    @property
    def loss(self) -> float:
        return math.sqrt(self._energy_left / self._energy) if self._energy else 0.0

    def rank(self, wanted: int | None) -> int:
        """The adapter's rank."""
        if wanted is None:
            wanted = max((self._own_rank(name) for name in self._fits), default=0)
            if wanted == 0 and self._fits:
                raise UsageError(
                    "the archive holds no low-rank factors to tell the rank by",
                    where=self.archive.location,
                    hint="Choose one: --rank 64 (rank= in Python)",
                )
        if not 0 <= wanted <= RANKS[-1]:
            raise UsageError(f"no engine loads an adapter of rank {wanted}", expected=f"1 to {RANKS[-1]}")
        return next(rank for rank in RANKS if rank >= wanted)

    def adapters(self, rank: int) -> list[Adapter]:
        """All adapters, their factors of this rank."""
        found = []
        total = sum(self.archive.manifest.tensors[name].nbytes for name in (*self._fits, *self.left_out))
        done = 0
        for name in (*self._fits, *list(self.left_out)):
            self._progress(done, total, name)
            adapter = None if name in self.left_out else self._adapter(name, rank)
            if adapter is not None:
                found.append(adapter)
            elif name in self.left_out:
                self._lose(name)
            done += self.archive.manifest.tensors[name].nbytes
        return found

    def _changed(self, name: str) -> bool:
        """Whether a tensor is another than the base's, as far as can be told without reading it."""
        tensor = self.archive.manifest.tensors[name]
        own = self.archive.manifest.bases[self.base].tensors.get(name)
        if own is None or tensor.recipe == Ref(name, self.base):
            return own is None
        return tensor.digest is None or (tensor.digest, tensor.dtype) != (own.digest, own.dtype)

    def _misfit(self, name: str) -> str | None:
        """Why a tensor has no place in an adapter."""
        tensor = self.archive.manifest.tensors[name]
        own = self.archive.manifest.bases[self.base].tensors.get(name)
        if own is None:
            return "the base has no such tensor"
        if own.shape != tensor.shape:
            return f"its shape is {list(tensor.shape)}, the base's {list(own.shape)}"
        if not (tensor.dtype.is_float and own.dtype.is_float):
            return f"its dtype is {tensor.dtype.name}"
        if not _is_matrix(name, tensor.shape):
            return "it is no matrix" if len(tensor.shape) != 2 else "it is not the weight of a module"
        if self.modules.is_tied(name):
            return "it is the output layer as well, which would stay as it is"
        return None

    def _own_rank(self, name: str) -> int:
        part = lowrank_part(self.archive.manifest.tensors[name].recipe, name, self.base)
        return 0 if part is None else lowrank_rank(part, self.archive.scope, self.archive.scope.target(name))

    def _adapter(self, name: str, rank: int) -> Adapter | None:
        change = Change(self.archive, self.base, name)
        energy = change.energy()
        if energy == 0:  # of a lossy archive; or a zero of another sign
            return None
        try:
            method, factors = change.factors(rank)
        except ValueError:
            self.left_out[name] = "its change is not finite"
            return None
        used = factors.rank
        factors = factors.padded(rank).rounded(self._dtype)
        left = change.energy_left(factors)
        if not math.isfinite(left):
            self.left_out[name] = "its change is not finite"
            return None
        self._energy += energy
        self._energy_left += left
        self.reports[name] = self._report(name, method, used, math.sqrt(left / energy))
        return Adapter(self.modules.path(name), self.modules.kind(name), factors)

    def _lose(self, name: str) -> None:
        """Account for a tensor that is left out."""
        own = self.archive.manifest.bases[self.base].tensors.get(name)
        tensor = self.archive.manifest.tensors[name]
        self.reports[name] = self._report(name, "left-out", None, 1.0)
        if own is not None and own.shape == tensor.shape and own.dtype.is_float and tensor.dtype.is_float:
            energy = Change(self.archive, self.base, name).energy()
            if math.isfinite(energy):
                self._energy += energy
                self._energy_left += energy

    def _report(self, name: str, method: str, rank: int | None, loss: float) -> TensorReport:
        tensor = self.archive.manifest.tensors[name]
        nbytes = 0 if rank is None else rank * sum(tensor.shape) * self._dtype.width
        return TensorReport(method, tensor.dtype.name, tensor.shape, tensor.nbytes, nbytes, rank, loss)


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name.endswith(".weight")


def _config(archive: Archive) -> Mapping[str, Any]:
    """`config.json` of the model; empty if it has none."""
    part = archive.sidecars.get("config.json")
    if part is None:
        return {}
    try:
        config = json.loads(b"".join(part.blocks()))
    except ValueError as error:
        raise MalformedError("not JSON", where=f"{archive.location}: config.json") from error
    return config if isinstance(config, dict) else {}
