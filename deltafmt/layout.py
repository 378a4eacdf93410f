"""The weight files that `unpack` writes: the original ones, or the same tensors in another dtype or other shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from .checkpoint import TensorInfo
from .dtypes import DTYPES, Dtype
from .errors import MalformedError, UsageError
from .limits import Limits
from .names import escaped
from .reader import Archive
from .safetensors_file import Entry, parse_header
from .strictjson import parse


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file: its header's bytes, and its tensors in the order of their data."""

    name: str
    header: bytes
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True)
class OutputLayout:
    files: tuple[OutputFile, ...]
    index: tuple[str, bytes] | None


def original_layout(archive: Archive) -> OutputLayout:
    """The layout of the original checkpoint.

    Raises `MalformedError` (reason `checkpoint`) if it does not fit the tensors.
    """
    files = []
    seen: set[str] = set()
    for file in archive.files:
        entries = _entries(archive, file.name, file.header, archive.limits)
        tensors = {name: TensorInfo(entry.dtype, entry.shape) for name, entry in entries.items()}
        for name, info in tensors.items():
            if name in seen or archive.tensors.get(name) != info:
                raise _unfit(
                    archive,
                    file.name,
                    f"'{escaped(name)}' is {'there twice' if name in seen else 'not the tensor of the manifest'}",
                )
            seen.add(name)
        files.append(OutputFile(file.name, file.header, tensors))
    for name in archive.tensors:
        if name not in seen:
            raise _unfit(archive, "the weight files", f"no file holds '{escaped(name)}'")
    return OutputLayout(tuple(files), archive.index)


def _entries(archive: Archive, name: str, header: bytes, limits: Limits) -> Mapping[str, Entry]:
    try:
        return parse_header(header, f"{archive.location}: header of {name}", limits)
    except MalformedError as error:
        error.reason = "checkpoint"
        raise


def _unfit(archive: Archive, file: str, what: str) -> MalformedError:
    return MalformedError(
        f"{file}: {what}",
        where=archive.location,
        reason="checkpoint",
    )


def output_dtype(name: str) -> Dtype:
    """The dtype of `unpack --dtype`: a safetensors or torch name of a float type. Raises `UsageError`."""
    known = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "fp32": "F32", "fp16": "F16"}
    name = str(name)  # or a dtype of torch
    found = DTYPES.get(known.get(name.lower().removeprefix("torch."), name.upper()))
    if found is None or not found.is_float:
        raise UsageError(
            f"cannot cast to {name!r}", hint="Choose bfloat16, float16, float32 or float64 (or BF16, F16, F32, F64)"
        )
    return found


def new_layout(archive: Archive, cast: Dtype | None, max_shard_bytes: int | None) -> OutputLayout:
    """The original layout with float tensors in another dtype, or in other shards.

    Shards are of at most `max_shard_bytes` of tensors; a larger tensor gets its own.
    """
    original = original_layout(archive)
    groups = [(file.name, _cast(file.tensors, cast), _metadata(file.header)) for file in original.files]
    index = original.index
    if max_shard_bytes is not None:
        groups, index = _reshard(groups, max_shard_bytes)
    elif index is not None and cast is not None:
        index = index[0], _index_bytes(groups)
    return OutputLayout(
        tuple(OutputFile(name, make_header(tensors, metadata), tensors) for name, tensors, metadata in groups), index
    )


_Group = tuple[str, dict[str, TensorInfo], dict[str, str]]


def _cast(tensors: Mapping[str, TensorInfo], cast: Dtype | None) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(cast if cast and info.dtype.is_float else info.dtype, info.shape)
        for name, info in tensors.items()
    }


def _metadata(header: bytes) -> dict[str, str]:
    metadata: dict[str, str] = parse(header, "header").get("__metadata__", {})
    return metadata


def _reshard(groups: list[_Group], max_shard_bytes: int) -> tuple[list[_Group], tuple[str, bytes] | None]:
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for _, tensors, _ in groups:
        for name, info in tensors.items():
            if shards[-1] and size + info.nbytes > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = info
            size += info.nbytes
    metadata = groups[0][2] if groups else {}
    if len(shards) == 1:
        return [("model.safetensors", shards[0], metadata)], None
    named = [
        (f"model-{place + 1:05d}-of-{len(shards):05d}.safetensors", tensors, metadata)
        for place, tensors in enumerate(shards)
    ]
    return named, ("model.safetensors.index.json", _index_bytes(named))


def _index_bytes(groups: list[_Group]) -> bytes:
    total = sum(info.nbytes for _, tensors, _ in groups for info in tensors.values())
    weight_map = {name: file for file, tensors, _ in groups for name in tensors}
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, ensure_ascii=False) + "\n"
    ).encode()


def make_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """A safetensors header for these tensors in this order, padded with spaces to a multiple of 8."""
    document: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, info in tensors.items():
        document[name] = {
            "dtype": info.dtype.name,
            "shape": info.shape,
            "data_offsets": [position, position + info.nbytes],
        }
        position += info.nbytes
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(-(-len(text) // 8) * 8)
