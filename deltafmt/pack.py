"""`pack`: a checkpoint becomes an archive."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .durable import DryRun, Staging
from .errors import UsageError
from .gemm import check_subnormals, one_thread_each
from .limits import DEFAULT_LIMITS, Limits, check_count
from .manifest import Manifest
from .methods.lowrank import Request
from .methods.panels import MAX_TENSOR_PARALLEL, not_in_panels
from .methods.sharing import Parts, shared_layers
from .names import is_misleading
from .operators import Ref
from .packer import Packer
from .pipeline import Pipeline
from .reader import Archive
from .repack import Repacker
from .report import PackReport, Progress, silent
from .roles import pack_report
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
from .writer import SHARD_BYTES

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
    tensor_parallel: int | None = None,
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
        tensor_parallel: ranks, up to 64. Weights that tensor parallelism splits by columns (by their names: `o_proj`,
            `down_proj`, ...) are stored in as many panels of columns, so that each rank reads its own, and take
            somewhat longer to read as a whole. Not weights that are small or stored as a difference: a base is read as
            a whole anyway, to be sure that it is the right one. Those split by rows need nothing.
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
    check_count("tensor_parallel", tensor_parallel, 1, MAX_TENSOR_PARALLEL)
    given = [base] if isinstance(base, (str, os.PathLike)) else list(base or ())
    request = _request(
        method,
        len(given),
        rank=rank,
        energy=energy,
        max_error=max_error,
        target_bytes=target_size,
        share=share,
        share_parts=share_parts,
        include=tuple(include),
        exclude=tuple(exclude),
        force=force,
    )
    if single_file:
        _check_file_name(Path(dst).name)
    report = partial(
        pack_report,
        started=time.perf_counter(),
        single_file=single_file,
        source=str(src),
        destination=str(dst),
        base=str(given[0]) if given else None,
        bases=tuple(map(str, given)),
        dry_run=dry_run,
    )
    with contextlib.ExitStack() as stack:
        source, origins = local_path(src), {base_id(place): local_path(each) for place, each in enumerate(given)}
        checkpoint = stack.enter_context(open_source(source, base=list(origins.values()), limits=limits))
        check_apart(Path(dst), source, *origins.values())
        staging = DryRun if dry_run else Staging
        area = stack.enter_context(staging(Path(dst), overwrite=overwrite, single_file=single_file))
        if method == "auto" and request is None and share is None and is_lossy(checkpoint):
            if tensor_parallel is not None:
                raise UsageError(
                    "a lossy archive is packed as it is, not for tensor parallelism",
                    where=str(src),
                    hint="Leave that option out; of low-rank factors each rank computes its part anyway",
                )
            repacker = Repacker(checkpoint, area, progress, shard_bytes)
            manifest = repacker.run()
            area.commit()
            return report(manifest, repacker.writer.array_bytes.__getitem__, method="repack")
        check_source(checkpoint)
        references = {name: stack.enter_context(open_source(origin, limits=limits)) for name, origin in origins.items()}
        pipeline = stack.enter_context(Pipeline(jobs))
        if request is None:  # a lossy request decomposes one tensor at a time, with all threads
            stack.enter_context(one_thread_each())
        packer = Packer(checkpoint, references, pipeline, area, progress, shard_bytes, tensor_parallel or 1)
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
    size: dict[str, Any] = {} if isinstance(checkpoint, Archive) else {"logical_bytes": checkpoint.input_bytes}
    return report(
        manifest,
        packer.array_bytes,
        **size,
        bases_needed=tuple(str(each) for name, each in zip(origins, given, strict=True) if name in manifest.bases),
        method="lossless" if request is None else "lowrank",
        non_finite=packer.non_finite,
        notes=tuple(_in_vain(manifest, anchors, lossy=request is not None, tensor_parallel=tensor_parallel or 1)),
    )


def _request(method: str, bases: int, **options: Any) -> Request | None:
    """What may be lost; None if nothing may.

    Args:
        bases: how many are given.
        options: the fields of `Request`.

    Raises:
        UsageError: options contradict each other or the method, or a value is out of range.
    """
    limits = ("rank", "energy", "max_error", "target_bytes")
    lossy = method == "lowrank" or any(options[name] is not None for name in limits)
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}", hint=f"Choose one of {', '.join(METHODS)}")
    if method == "lossless" and lossy:
        raise UsageError("a lossy option contradicts the method lossless", hint="Leave the option or the method out")
    if not lossy:
        if options["include"] or options["exclude"] or options["force"]:
            raise UsageError(
                "include, exclude and force choose what may be lost, and nothing may",
                hint="Add a lossy option, such as --rank",
            )
        return None
    request = Request(**options)
    if bases > 1:
        raise UsageError(
            f"a lossy option goes with one base, and {bases} are given",
            hint="Leave out all but one --base, or the lossy option: lossless packing takes several",
        )
    return request


def _in_vain(manifest: Manifest, anchors: Mapping[str, str], *, lossy: bool, tensor_parallel: int) -> Iterator[str]:
    """What was asked for and came to nothing, in words.

    Args:
        anchors: tensors that might have shared one of their anchor layer.
    """
    nodes = (node for name in anchors for node in manifest.tensors[name].recipe.walk())
    if anchors and not any(isinstance(node, Ref) and node.base is None for node in nodes):
        yield "no layer shares anything: no tensor is smaller as a difference to that of its anchor layer"
    if tensor_parallel > 1:
        missing, known = not_in_panels(manifest)
        if missing or not known:
            yield (
                f"{missing} of {known} weights that tensor parallelism splits by columns are not stored in panels for "
                f"{tensor_parallel} ranks: they are small, differences, or have other columns"
                if known
                else "nothing is stored for tensor parallelism: no weight has the name of one that it splits by columns"
            )
    if lossy and manifest.exact:
        yield "no tensor became low rank: all of them are stored without loss"


def _check_file_name(name: str) -> None:
    if not name.endswith(".safetensors"):
        raise UsageError("a single file must be named *.safetensors", found=name, hint="Add the suffix to the name")
    if is_misleading(name):
        what = "a single file of this name would make other tools load an archive wrongly"
        raise UsageError(what, found=name, hint="Choose another name")
