"""`inspect`: what is inside an archive, without reading tensor bytes."""

from __future__ import annotations

import time

from .limits import DEFAULT_LIMITS, Limits
from .report import InspectReport
from .roles import checkpoint_bytes, refers_to, role_bytes, tensor_reports
from .sources import PathLike, open_archive


def inspect(src: PathLike, *, limits: Limits = DEFAULT_LIMITS) -> InspectReport:
    """Sizes by role, ranks, and who refers to whom. The base is not needed.

    Raises:
        MalformedError, UnsupportedError, IntegrityError: as opening the archive does.
    """
    started = time.perf_counter()
    with open_archive(src, limits=limits) as archive:
        manifest = archive.manifest
        weights, index = [file.name for file in manifest.checkpoint.files], manifest.checkpoint.index
        reports = tensor_reports(manifest, archive.stored_size)
        return InspectReport(
            logical_bytes=checkpoint_bytes(manifest),
            stored_bytes=archive.input_bytes,
            exact=manifest.exact,
            max_rel_error=max((report.rel_error or 0.0 for report in reports.values()), default=0.0),
            seconds=time.perf_counter() - started,
            tensors=reports,
            source=str(src),
            version=manifest.version,
            shards=len(manifest.shards),
            roles=role_bytes(manifest, archive.stored_size, archive.manifest_bytes, archive.input_bytes),
            ranks={name: report.rank for name, report in reports.items() if report.rank is not None},
            sharing={
                name: ", ".join(found) for name, tensor in manifest.tensors.items() if (found := refers_to(tensor))
            },
            bases={
                name: {
                    "digest": base.digest,
                    "repo": base.repo,
                    "revision": base.revision,
                    "tensors": len(base.tensors),
                }
                for name, base in manifest.bases.items()
            },
            files=tuple(sorted([*weights, *manifest.sidecars, *(index[:1] if index else ())])),
            annotations=dict(manifest.annotations),
        )
