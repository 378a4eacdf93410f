"""What the parts of an archive are for: which stored arrays a tensor owns, by which method, at what size."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .manifest import Manifest, Tensor
from .operators import Decayed, Lowrank, Operator, Patch, Ref, Scaled, Stored, Sum
from .report import PackReport, TensorReport

ROLES = ("base", "factors", "residual", "layout", "sidecar", "manifest", "overhead")


def array_roles(manifest: Manifest) -> dict[str, str]:
    """Each stored array's role.

    `base` (weights stored whole), `factors`, `residual`, or `layout` (headers and index of the original files).
    """
    roles = dict.fromkeys(manifest.checkpoint.arrays, "layout")
    for tensor in manifest.tensors.values():
        _mark(tensor.recipe, "base", roles)
    return roles


def _mark(node: Operator, role: str, roles: dict[str, str]) -> None:
    if isinstance(node, Stored):
        roles.setdefault(node.array, role)
    elif isinstance(node, Patch):
        _mark(node.prediction, role, roles)
        _mark(node.residual, "residual", roles)
    elif isinstance(node, Scaled | Decayed):
        x, numbers = node.operands()
        _mark(x, role, roles)
        _mark(numbers, "factors", roles)
    else:
        for operand in node.operands():
            _mark(operand, "factors" if isinstance(node, Lowrank) else role, roles)


def role_bytes(
    manifest: Manifest, array_bytes: Callable[[str], int], manifest_bytes: int, stored_bytes: int
) -> dict[str, int]:
    """Bytes of an archive by role; they add up to `stored_bytes`. `overhead` is shard headers and padding."""
    roles = dict.fromkeys(ROLES, 0)
    for array, role in array_roles(manifest).items():
        roles[role] += array_bytes(array)
    roles["manifest"] = manifest_bytes
    roles["sidecar"] = sum(sidecar.size for sidecar in manifest.sidecars.values())
    roles["overhead"] = stored_bytes - sum(roles.values())
    return roles


def checkpoint_bytes(manifest: Manifest) -> int:
    """Bytes of the original checkpoint as safetensors: weight files, index and sidecars."""
    texts = sum(manifest.arrays[name].numel for name in manifest.checkpoint.arrays)
    sidecars = sum(sidecar.size for sidecar in manifest.sidecars.values())
    return 8 * len(manifest.checkpoint.files) + texts + manifest.logical_bytes + sidecars


def method(tensor: Tensor, manifest: Manifest) -> str:
    """How a tensor is stored.

    `raw`, `compressed`, `panels` (compressed, by columns), `ref` (inside the archive), `base-ref`, `patch` (of a base
    as it is), `patch-layer` (of another tensor of the archive), `patch-lowrank`, `patch-scaled`, `patch-decayed`,
    `patch-mixture` (of what is computed from these), `lowrank` (not exact).
    """
    recipe = tensor.recipe
    if isinstance(recipe, Stored):
        return "raw" if manifest.arrays[recipe.array].encoding.is_raw else "compressed"
    if isinstance(recipe, Ref):
        return "ref" if recipe.base is None else "base-ref"
    if isinstance(recipe, Patch):
        kinds = {type(node) for node in recipe.prediction.walk()}
        names = {Lowrank: "-lowrank", Sum: "-mixture", Scaled: "-scaled", Decayed: "-decayed"}
        plain = "-layer" if any(node.base is None for node in recipe.walk() if isinstance(node, Ref)) else ""
        return "patch" + next((name for kind, name in names.items() if kind in kinds), plain)
    return "lowrank" if isinstance(recipe, (Sum, Lowrank)) else recipe.op


def rank(tensor: Tensor, manifest: Manifest) -> int | None:
    """The rank of a tensor's low-rank part; the sum, if there are several."""
    ranks = [
        manifest.arrays[node.a.array].shape[0]
        for node in tensor.recipe.walk()
        if isinstance(node, Lowrank) and isinstance(node.a, Stored)
    ]
    return sum(ranks) if ranks else None


def refers_to(tensor: Tensor) -> list[str]:
    """The tensors a recipe refers to; those of a base as `base:name`."""
    nodes = (node for node in tensor.recipe.walk() if isinstance(node, Ref))
    return [node.tensor if node.base is None else f"{node.base}:{node.tensor}" for node in nodes]


def tensor_reports(manifest: Manifest, array_bytes: Callable[[str], int]) -> dict[str, TensorReport]:
    """A report on every tensor. `array_bytes` gives the stored size of a stored array."""
    reports = {}
    for name, tensor in manifest.tensors.items():
        owned = {node.array for node in tensor.recipe.walk() if isinstance(node, Stored)}
        reports[name] = TensorReport(
            method=method(tensor, manifest),
            dtype=tensor.dtype.name,
            shape=tensor.shape,
            logical_bytes=tensor.nbytes,
            stored_bytes=sum(array_bytes(array) for array in owned),
            rank=rank(tensor, manifest),
            rel_error=0.0 if tensor.exact else tensor.rel_error,
        )
    return reports


def pack_report(
    manifest: Manifest, array_bytes: Callable[[str], int], started: float, *, single_file: bool, **facts: Any
) -> PackReport:
    """What was written: sizes, errors and methods, in total and per tensor.

    Args:
        started: when, by `time.perf_counter`.
        facts: fields of the report that the manifest does not tell; `logical_bytes` if the input may have had
            another size, as a pickle has.
    """
    manifest_bytes = len(manifest.to_bytes())
    stored = manifest.archive_bytes(manifest_bytes, single_file=single_file)
    reports = tensor_reports(manifest, array_bytes)
    errors = [report.rel_error for report in reports.values() if report.rel_error is not None]
    return PackReport(
        **{"logical_bytes": checkpoint_bytes(manifest)} | facts,
        stored_bytes=stored,
        exact=manifest.exact,
        max_rel_error=max(errors, default=0.0),
        seconds=time.perf_counter() - started,
        tensors=reports,
        roles=role_bytes(manifest, array_bytes, manifest_bytes, stored),
    )
