"""`pack`: a checkpoint becomes an archive."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, TensorInfo
from .digests import digest
from .dtypes import Bits
from .durable import DryRun, Staging
from .errors import UsageError
from .gemm import check_subnormals, one_thread_each
from .limits import DEFAULT_LIMITS, Limits
from .manifest import Base, BaseTensor, Manifest, Tensor
from .methods.lossless import Coding, choose
from .methods.lowrank import Factored, LowrankMethod, Request
from .methods.prediction import Elements, Referred
from .methods.sharing import Parts, shared_layers
from .names import is_misleading
from .operators import Ref
from .operators.patch import predicts
from .pipeline import IN_FLIGHT_BYTES, Pipeline
from .reader import Archive
from .repack import Repacker
from .report import PackReport, Progress, silent
from .roles import pack_report
from .scratch import BufferPool
from .sources import (
    PathLike,
    base_id,
    check_apart,
    check_source,
    check_usable_base,
    is_lossy,
    local_path,
    open_source,
    provenance,
)
from .version import __version__
from .writer import SHARD_BYTES, ArchiveWriter

_FEW_CHUNKS = 16  # a tensor of more is encoded by all threads together, chunk by chunk

METHODS = ("auto", "lossless", "lowrank")


def pack(
    src: PathLike,
    dst: PathLike,
    *,
    base: PathLike | Sequence[PathLike] | None = None,
    method: str = "auto",
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    target_size: int | None = None,
    share: str | None = None,
    share_parts: Parts = "both",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    force: bool = False,
    jobs: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    single_file: bool = False,
    progress: Progress = silent,
    shard_bytes: int = SHARD_BYTES,
    limits: Limits = DEFAULT_LIMITS,
) -> PackReport:
    """Pack a checkpoint into an archive at `dst`. Lossless unless a lossy option is given.

    Args:
        src, base: a local Hugging Face directory or weight file, a Hub id, or an archive. `base` is another model that
            `src` was made from, or several: each tensor is stored as its difference to whichever suits it best. What
            may be lost is measured against one base only.
            A lossy archive is packed as it is, with the same recipes, into one that needs no base; `base` is what `src`
            was packed against. Give none of the options below then: it cannot become another kind of archive.
        dst: the directory to create; with `single_file`, the file (`*.safetensors`). Nothing is written there unless
            the whole pack succeeds.
        method: `"lossless"`, `"lowrank"`, or `"auto"`: lowrank if one of the options below is given.
        rank, energy, max_error, target_size: how many components to keep: a number; the share (0 to 1) of the delta's
            squared norm to keep; the largest relative error of a tensor; bytes of the whole archive, spent where they
            lower the error most.
        share: layers of the model share an anchor layer: `"sequential:K"`, `"alternating"`, or `"5:4,6:4"`
            (layer:anchor). Not lossy by itself.
        share_parts: `"mlp"`, `"attention"` or `"both"`.
        include, exclude: glob patterns of the tensors that may become low-rank; all others stay lossless.
        force: share layers even if they are not alike.
        jobs: threads; one per processor if None.
        overwrite: replace `dst` if it holds a checkpoint or an archive.
        dry_run: do all the work, report the sizes, write nothing.
        single_file: write the whole archive, sidecars included, into one file.
        progress: called as the work goes on.
        shard_bytes: begin another shard once this many bytes are in one.
        limits: caps on what is accepted from `src` and `base`.

    Returns:
        Sizes, errors and methods, in total and per tensor.

    Raises:
        UsageError: `dst` exists, a base is given twice, or the request makes no sense (the message has the numbers).
        MalformedError, IntegrityError, UnsupportedError: `src` or `base` cannot be read.
        AccessError: reading or writing failed.
        UnsupportedError: this process flushes subnormal numbers to zero.
    """
    check_subnormals()
    request = None
    lossy = method == "lowrank" or any(option is not None for option in (rank, energy, max_error, target_size))
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}", hint=f"Choose one of {', '.join(METHODS)}")
    if method == "lossless" and lossy:
        raise UsageError("a lossy option contradicts the method lossless", hint="Leave the option or the method out")
    if lossy:
        request = Request(
            rank, energy, max_error, target_size, share, share_parts, tuple(include), tuple(exclude), force
        )
    elif include or exclude or force:
        raise UsageError(
            "include, exclude and force choose what may be lost, and nothing may",
            hint="Add a lossy option, such as --rank",
        )
    given = [base] if isinstance(base, (str, os.PathLike)) else list(base or ())
    if lossy and len(given) > 1:
        raise UsageError(
            f"a lossy option goes with one base, and {len(given)} are given",
            hint="Leave out all but one --base, or the lossy option: lossless packing takes several",
        )
    if single_file:
        _check_file_name(Path(dst).name)
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        source, origins = local_path(src), {base_id(place): local_path(each) for place, each in enumerate(given)}
        checkpoint = stack.enter_context(open_source(source, base=list(origins.values()), limits=limits))
        check_apart(Path(dst), source, *origins.values())
        staging = DryRun if dry_run else Staging
        area = stack.enter_context(staging(Path(dst), overwrite=overwrite, single_file=single_file))
        if method == "auto" and request is None and share is None and is_lossy(checkpoint):
            repacker = Repacker(checkpoint, area, progress, shard_bytes)
            manifest = repacker.run()
            area.commit()
            return pack_report(
                manifest,
                repacker.writer.array_bytes.__getitem__,
                started,
                single_file=single_file,
                source=str(src),
                destination=str(dst),
                base=str(given[0]) if given else None,
                bases=tuple(map(str, given)),
                method="repack",
                dry_run=dry_run,
            )
        check_source(checkpoint)
        references = {name: stack.enter_context(open_source(origin, limits=limits)) for name, origin in origins.items()}
        pipeline = stack.enter_context(Pipeline(jobs))
        if request is None:  # a lossy request decomposes one tensor at a time, with all threads
            stack.enter_context(one_thread_each())
        packer = _Packer(checkpoint, references, pipeline, area, progress, shard_bytes)
        for name, origin in origins.items():
            check_usable_base(references[name])
            packer.identify_base(name, *provenance(origin))
        if request is not None:
            packer.plan(request)
        anchors = shared_layers(checkpoint, share, share_parts).anchors if share is not None else {}
        if request is None:
            packer.share(anchors)
        manifest = packer.run()
        area.commit()
    return pack_report(
        manifest,
        packer.array_bytes,
        started,
        single_file=single_file,
        **({} if isinstance(checkpoint, Archive) else {"logical_bytes": checkpoint.input_bytes}),
        source=str(src),
        destination=str(dst),
        base=str(given[0]) if given else None,
        bases=tuple(map(str, given)),
        bases_needed=tuple(str(each) for name, each in zip(origins, given, strict=True) if name in manifest.bases),
        method="lossless" if request is None else "lowrank",
        dry_run=dry_run,
        non_finite=packer.non_finite,
        notes=tuple(_in_vain(manifest, anchors, lossy)),
    )


def _in_vain(manifest: Manifest, anchors: Mapping[str, str], lossy: bool) -> Iterator[str]:
    """What was asked for and came to nothing, in words.

    Args:
        anchors: tensors that might have shared one of their anchor layer.
    """
    nodes = (node for name in anchors for node in manifest.tensors[name].recipe.walk())
    if anchors and not any(isinstance(node, Ref) and node.base is None for node in nodes):
        yield "no layer shares anything: no tensor is smaller as a difference to that of its anchor layer"
    if lossy and manifest.exact:
        yield "no tensor became low rank: all of them are stored without loss"


def _check_file_name(name: str) -> None:
    if not name.endswith(".safetensors"):
        raise UsageError("a single file must be named *.safetensors", found=name, hint="Add the suffix to the name")
    if is_misleading(name):
        what = "a single file of this name would make other tools load an archive wrongly"
        raise UsageError(what, found=name, hint="Choose another name")


@dataclass(frozen=True)
class _Prepared:
    """A tensor read and looked at: its digest, and how it is to be stored unless it turns out to be a copy."""

    digest: str
    bits: Bits
    coding: Coding | None = None
    factored: Factored | None = None
    bases: Sequence[Referred] = ()


class _Packer:
    def __init__(
        self,
        checkpoint: Checkpoint,
        references: Mapping[str, Checkpoint],
        pipeline: Pipeline,
        area: Staging,
        progress: Progress,
        shard_bytes: int,
    ) -> None:
        self._checkpoint, self._references, self._pipeline, self._area = checkpoint, references, pipeline, area
        arrays = [(name, len(info.shape)) for name, info in checkpoint.tensors.items()]
        arrays += [(file.name, 1) for file in checkpoint.files]
        arrays += [(checkpoint.index[0], 1)] if checkpoint.index else []
        self._writer = ArchiveWriter(area, arrays, shard_bytes, len(references) + 1)
        self._bases: dict[str, Base] = {}
        self._copies: dict[tuple[str, tuple[int, ...], str], Ref] = {}
        self._lowrank: LowrankMethod | None = None
        self._anchors: Mapping[str, str] = {}
        self._is_anchor: frozenset[str] = frozenset()
        self._buffers = BufferPool(IN_FLIGHT_BYTES)
        self._progress = progress
        self._done = 0
        self._total = sum(info.nbytes for info in checkpoint.tensors.values())

    # The bases

    def identify_base(self, name: str, repo: str, revision: str | None) -> None:
        """Digest every tensor of a base: what it is known by from now on. Raises `UsageError` if it is known."""
        reference = self._references[name]
        tensors: dict[str, BaseTensor] = {}
        for (tensor, info), found in self._pipeline.ordered(
            reference.tensors.items(), lambda item: reference.digest(item[0]), lambda _: 1 << 20
        ):
            tensors[tensor] = BaseTensor(info.dtype, info.shape, found)
            self._copies.setdefault((info.dtype.name, info.shape, found), Ref(tensor, name))
            self._progress(0, self._total, "reading the base")
        found_base = Base(tensors, repo, revision)
        for other, known in self._bases.items():
            if known.digest == found_base.digest:
                raise UsageError(
                    "two bases are the same model",
                    where=reference.location,
                    found=self._references[other].location,
                    hint="Give each base once",
                )
        self._bases[name] = found_base

    # Methods

    def plan(self, request: Request) -> None:
        """Decide which tensors may lose something and how much. Raises `RefusedError` if the request makes no sense."""
        reference = next(iter(self._references.values()), None)
        self._lowrank = LowrankMethod(
            request,
            self._checkpoint,
            reference,
            self._pipeline,
            self._progress,
            single_file=self._area.single_file,
        )
        self._lowrank.plan()

    def share(self, anchors: Mapping[str, str]) -> None:
        """Let tensors be predicted by others of the checkpoint, those of their anchor layers."""
        self._anchors, self._is_anchor = anchors, frozenset(anchors.values())

    def _prepare(self, item: tuple[str, TensorInfo]) -> _Prepared:
        name, info = item
        bits = self._read(self._checkpoint, name)
        found = digest(bits)
        if self._lowrank is not None and (factored := self._lowrank.factor(name, bits)) is not None:
            return _Prepared(found, bits, factored=factored)
        if self._copy(name, (info.dtype.name, info.shape, found)) is not None:
            return _Prepared(found, bits)
        bases = list(self._predictions(name, info))
        coding = choose(name, Elements(info.dtype, info.shape, bits), bases)
        if coding.chunks <= _FEW_CHUNKS:
            coding.encode()
        return _Prepared(found, bits, coding, bases=bases)

    def _read(self, checkpoint: Checkpoint, name: str) -> Bits:
        """A whole tensor in a buffer of the pool; `_release` gives it back."""
        info = checkpoint.tensors[name]
        bits = self._buffers.take(info.dtype.bits, info.count)
        checkpoint.read(name, 0, info.count, bits)
        return bits

    def _release(self, prepared: _Prepared) -> None:
        self._buffers.give(prepared.bits)
        for base in prepared.bases:
            self._buffers.give(base.bits)

    def _predictions(self, name: str, info: TensorInfo) -> Iterator[Referred]:
        """The tensor of that name in each base, and that of its anchor layer, where alike but for the rows."""
        for ref, checkpoint in self._likes(name):
            like = checkpoint.tensors[ref.tensor]
            alike = len(like.shape) == len(info.shape) and like.shape[1:] == info.shape[1:]
            if alike and info.count and predicts(like.dtype, info.dtype):
                bits = self._buffers.take(like.dtype.bits, info.count)
                shared = min(like.count, info.count)
                checkpoint.read(ref.tensor, 0, shared, bits[:shared])
                bits[shared:] = 0
                yield Referred(ref, like.dtype, bits, resized=like.shape != info.shape)

    def _likes(self, name: str) -> Iterator[tuple[Ref, Checkpoint]]:
        for base, reference in self._references.items():
            if name in reference.tensors:
                yield Ref(name, base), reference
        if name in self._anchors:
            yield Ref(self._anchors[name]), self._checkpoint

    def _weight(self, item: tuple[str, TensorInfo]) -> int:
        name, info = item
        return info.nbytes + sum(checkpoint.tensors[ref.tensor].nbytes for ref, checkpoint in self._likes(name))

    # The work

    def run(self) -> Manifest:
        """Prepare tensors in parallel, encode their chunks in parallel, write everything in order."""
        for (name, info), prepared in self._pipeline.ordered(
            self._checkpoint.tensors.items(), self._prepare, self._weight
        ):
            self._progress(self._done, self._total, name)
            self._writer.tensors[name] = self._store(name, info, prepared)
            self._done += info.nbytes
            self._release(prepared)
        for sidecar, part in self._checkpoint.sidecars.items():
            self._writer.add_sidecar(sidecar, part)
        layout = self._writer.add_layout(self._checkpoint)
        self._progress(self._total, self._total, "done")
        nodes = (node for tensor in self._writer.tensors.values() for node in tensor.recipe.walk())
        used = {node.base for node in nodes if isinstance(node, Ref)}
        bases = {name: base for name, base in self._bases.items() if name in used}
        return self._writer.finish(layout, bases, {"producer": f"deltafmt {__version__}"})

    def _store(self, name: str, info: TensorInfo, prepared: _Prepared) -> Tensor:
        if prepared.factored is not None:
            recipe = prepared.factored.write(name, self._writer)
            return Tensor(info.dtype, info.shape, recipe, rel_error=prepared.factored.rel_error)
        identity = (info.dtype.name, info.shape, prepared.digest)
        if (copy := self._copy(name, identity)) is not None:
            return Tensor(info.dtype, info.shape, copy, digest=prepared.digest)
        self._copies.setdefault(identity, Ref(name))
        coding = prepared.coding
        assert coding is not None
        plain = coding.prediction is None
        stored = self._add(name if plain else f"{name}#residual", coding, info, prepared.digest if plain else None)
        return Tensor(info.dtype, info.shape, coding.recipe(name, stored, self._writer), digest=prepared.digest)

    def _copy(self, name: str, identity: tuple[str, tuple[int, ...], str]) -> Ref | None:
        """Where an equal tensor is. Anchors stand by themselves: a layer that refers to one might be the equal."""
        copy = self._copies.get(identity)
        return None if copy is not None and copy.base is None and name in self._is_anchor else copy

    def _add(self, wanted: str, coding: Coding, info: TensorInfo, known: str | None) -> str:
        running = None if known else hashlib.sha256()
        array_digest = (lambda: "sha256:" + running.hexdigest()) if running else (lambda: known or "")
        return self._writer.add_array(
            wanted, coding.array_dtype, info.shape, coding.encoding, self._chunks(coding, running), array_digest
        )

    def _chunks(self, coding: Coding, running: Any) -> Iterator[list[Any]]:
        width = coding.together * coding.encoding.chunk * coding.dtype.width
        done = self._done
        for _, chunks in self._pipeline.ordered(
            range(0, coding.chunks, coding.together), coding.several, lambda _: 2 * width, 32 << 20
        ):
            for elements, planes in chunks:
                if running is not None:
                    running.update(elements)
                self._done += elements.nbytes
                self._progress(self._done, self._total, "")
                yield planes
        self._done = done

    @property
    def non_finite(self) -> dict[str, int]:
        """NaN and infinities that kept a tensor lossless, per tensor."""
        return self._lowrank.non_finite if self._lowrank is not None else {}

    def array_bytes(self, name: str) -> int:
        return self._writer.array_bytes[name]
