"""Plain Hugging Face checkpoints on disk: a directory, a single safetensors file, or a pickled one."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .checkpoint import Checkpoint, FilePart, TensorInfo, WeightFileLayout
from .dtypes import Bits
from .errors import AccessError, DeltafmtError, IntegrityError, MalformedError
from .limits import DEFAULT_LIMITS, Limits
from .names import check_name, check_no_clash, check_sidecar_name, escaped
from .pickles import PickledFile, safetensors_name
from .safetensors_file import Entry, SafetensorsFile, is_carrier
from .strictjson import parse

_SAFETENSORS = ".safetensors"
_PICKLES = (".bin", ".pt", ".pth")
# What transformers, diffusers and peft save, in the order in which it is looked for; an index of it comes first.
_STANDARD_SAFETENSORS = ("model.safetensors", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors")
_STANDARD_PICKLES = ("pytorch_model.bin", "diffusion_pytorch_model.bin", "adapter_model.bin")
# Pickles that a trainer leaves beside the weights.
_TRAINING_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_AGAIN = "Download the checkpoint again"


class WeightFile(Protocol):
    """What `SafetensorsFile` and `PickledFile` have in common."""

    header: bytes
    entries: dict[str, Entry]

    def read_elements(self, name: str, lo: int, hi: int, out: Bits) -> None: ...

    def close(self) -> None: ...


def open_plain(source: str | Path, *, limits: Limits = DEFAULT_LIMITS) -> Checkpoint:
    """Open a checkpoint that is not a deltafmt archive.

    Args:
        source: a directory as transformers, diffusers or peft save it (and as the Hub cache links it), or one
            `.safetensors`, `.bin`, `.pt` or `.pth` file. In a directory safetensors win over pickles; every other file
            is a sidecar, except those in `.git/`, `.cache/huggingface/` and `__pycache__/`.

    Raises:
        AccessError: the source, or a file in it, cannot be read: missing, a broken link, a loop of links, a device.
        MalformedError: no weights in it, or a weight file or index that is not valid.
        IntegrityError: a shard is missing.
        MissingExtraError: a pickle, and torch is not installed.
        UnsupportedError: a dtype that is not known.
    """
    path = Path(source)
    mode = _status(path, str(path)).st_mode
    if stat.S_ISDIR(mode):
        folder = _list_folder(path, limits)
        choice = _choose(folder, str(path), limits)
    else:
        if path.suffix not in (_SAFETENSORS, *_PICKLES):
            hint = "A checkpoint is a directory, or a .safetensors, .bin, .pt or .pth file"
            raise MalformedError("not a file that holds weights", where=str(path), hint=hint)
        folder = {path.name: _regular(path)}
        choice = _Choice((path.name,), None)
    for name in folder:
        check_sidecar_name(name, str(path))
    return PlainCheckpoint(str(source), folder, choice, limits)


@dataclass(frozen=True)
class _Found:
    path: Path
    size: int


@dataclass(frozen=True)
class _Index:
    name: str
    data: bytes
    document: dict[str, Any]
    weight_map: dict[str, str]


@dataclass(frozen=True)
class _Choice:
    """The files of a folder that hold the weights."""

    names: tuple[str, ...]
    index: _Index | None


class PlainCheckpoint(Checkpoint):
    """A `Checkpoint` over open weight files; made by `open_plain`."""

    def __init__(self, location: str, folder: Mapping[str, _Found], choice: _Choice, limits: Limits) -> None:
        self.location = location
        self.input_bytes = sum(found.size for found in folder.values())
        given = {*choice.names, choice.index.name} if choice.index else set(choice.names)
        self.sidecars = {name: FilePart(found.path) for name, found in folder.items() if name not in given}
        self._files: list[WeightFile] = []
        self._holder: dict[str, WeightFile] = {}
        try:
            for name in choice.names:
                self._files.append(_open_weights(folder[name].path, limits))
            self.tensors = self._collect(choice.names, limits)
            if choice.index:
                self._check_index(choice, choice.index)
            self.files = tuple(
                WeightFileLayout(_written_name(name), file.header)
                for name, file in zip(choice.names, self._files, strict=True)
            )
            self.index = self._written_index(choice.index) if choice.index else None
            written = [*(file.name for file in self.files), *((self.index[0],) if self.index else ())]
            check_no_clash([*written, *self.sidecars], location)
        except BaseException:
            self.close()
            raise

    def _collect(self, names: tuple[str, ...], limits: Limits) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        origin: dict[str, str] = {}
        for file_name, file in zip(names, self._files, strict=True):
            for name, entry in file.entries.items():
                where = f"{self.location}: {file_name}"
                if name in tensors:
                    raise MalformedError(
                        f"the tensor '{escaped(name)}' is in '{origin[name]}' too",
                        where=where,
                        hint="Remove one of them",
                    )
                tensors[check_name(name, where)] = info = TensorInfo(entry.dtype, entry.shape)
                origin[name] = file_name
                self._holder[name] = file
                limits.check("dimensions", len(info.shape), f"{where}: {escaped(name)}")
                limits.check("tensor_bytes", info.nbytes, f"{where}: {escaped(name)}")
            limits.check("tensors", len(tensors), self.location)
        limits.check("total_bytes", sum(info.nbytes for info in tensors.values()), self.location)
        return tensors

    def _check_index(self, choice: _Choice, index: _Index) -> None:
        """Index and shards name the same tensors, each in the same file."""
        held = {
            name: file_name for file_name, file in zip(choice.names, self._files, strict=True) for name in file.entries
        }
        where = f"{self.location}: {index.name}"
        absent = [f"'{escaped(name)}' in '{file}'" for name, file in index.weight_map.items() if held.get(name) != file]
        if absent:
            raise MalformedError(
                f"the index names tensors that are not in their file: {_some(absent)}", where=where, hint=_AGAIN
            )
        extra = [f"'{escaped(name)}' in '{file}'" for name, file in held.items() if name not in index.weight_map]
        if extra:
            raise MalformedError(
                f"the index does not name all tensors of the shards: {_some(extra)}", where=where, hint=_AGAIN
            )

    def _written_index(self, index: _Index) -> tuple[str, bytes]:
        """The index as it will be written: verbatim, or rewritten for the safetensors files that pickles become."""
        if index.name.endswith(f"{_SAFETENSORS}.index.json"):
            return index.name, index.data
        metadata = index.document.get("metadata", {})
        document = {
            **index.document,
            "metadata": {**metadata, "total_size": sum(info.nbytes for info in self.tensors.values())},
            "weight_map": {name: _written_name(file) for name, file in index.weight_map.items()},
        }
        return _written_name(index.name), (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()

    def read(self, name: str, lo: int, hi: int, out: Bits) -> None:
        self._holder[name].read_elements(name, lo, hi, out)

    def close(self) -> None:
        for file in self._files:
            file.close()


def _written_name(name: str) -> str:
    return name if name.endswith((_SAFETENSORS, f"{_SAFETENSORS}.index.json")) else safetensors_name(name)


def _open_weights(path: Path, limits: Limits) -> WeightFile:
    if is_carrier(path):
        hint = "Name the file itself, not its directory"
        raise MalformedError("an archive in a single file, not plain weights", where=str(path), hint=hint)
    try:
        return SafetensorsFile(path, limits) if path.suffix == _SAFETENSORS else PickledFile(path, limits)
    except MalformedError as error:
        if _read(path, len(_LFS_POINTER)) == _LFS_POINTER:
            hint = "Fetch them with: git lfs pull"
            raise IntegrityError("a Git LFS pointer, not the weights", where=str(path), hint=hint) from error
        raise


def _read(path: Path, count: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise AccessError(f"cannot read: {error.strerror}", where=str(path)) from error


def _choose(folder: Mapping[str, _Found], where: str, limits: Limits) -> _Choice:
    """Find the weights among the files of a folder."""
    top = [name for name in folder if "/" not in name]
    safetensors = [name for name in top if name.endswith(_SAFETENSORS)]
    pickles = [name for name in top if name.endswith(_PICKLES) and not _TRAINING_STATE.fullmatch(name)]
    for standard, any_name in ((_STANDARD_SAFETENSORS, safetensors), (_STANDARD_PICKLES, pickles)):
        for single in standard:
            if f"{single}.index.json" in folder:
                return _choose_shards(folder, single, where, limits)
            if single in folder:
                return _Choice((single,), None)
        if len(any_name) == 1:
            return _Choice((any_name[0],), None)
    several = safetensors or pickles
    raise MalformedError(
        f"{len(several)} weight files and no index: {_some(several)}" if several else "no weights in it",
        where=where,
        hint=f"Looked for {', '.join((*_STANDARD_SAFETENSORS, *_STANDARD_PICKLES))}, each with .index.json, "
        "then for one *.safetensors, *.bin, *.pt or *.pth. Give one file, or the directory that holds the weights",
    )


def _choose_shards(folder: Mapping[str, _Found], single: str, where: str, limits: Limits) -> _Choice:
    index = _read_index(folder[f"{single}.index.json"], f"{single}.index.json", where, limits)
    shards = tuple(sorted(set(index.weight_map.values())))
    limits.check("shards", len(shards), f"{where}: {index.name}")
    missing = [f"'{escaped(name)}'" for name in shards if name not in folder]
    if missing:
        raise IntegrityError(
            f"{len(missing)} of {len(shards)} shards that the index names are missing: {_some(missing)}",
            where=f"{where}: {index.name}",
            hint=_AGAIN,
        )
    if single in folder and single not in shards:
        raise MalformedError(
            f"two sets of weights: '{single}', and the {len(shards)} shards of '{index.name}'",
            where=where,
            hint="Remove one of them",
        )
    return _Choice(shards, index)


def _read_index(found: _Found, name: str, where: str, limits: Limits) -> _Index:
    where = f"{where}: {name}"
    limits.check("manifest_bytes", found.size, where)
    data = _read(found.path)
    document = parse(data, where)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    suffixes = (_SAFETENSORS,) if name.endswith(f"{_SAFETENSORS}.index.json") else _PICKLES
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(document.get("metadata", {}), dict):
        raise MalformedError("not a shard index", where=where, expected="an object with a weight_map", hint=_AGAIN)
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not check_sidecar_name(file, where).endswith(suffixes):
            expected, shown = f"a {' or '.join(suffixes)} file", json.dumps(file)[:80]
            raise MalformedError(
                f"the tensor '{escaped(tensor)}' is in no weight file", where=where, expected=expected, found=shown
            )
    return _Index(name, data, document, weight_map)


def _list_folder(root: Path, limits: Limits) -> dict[str, _Found]:
    """Every file below a directory, links followed: relative name with `/` -> path and size, sorted by name."""
    found: dict[str, _Found] = {}
    pending: list[tuple[Path, str, frozenset[tuple[int, int]]]] = [(root, "", frozenset())]
    visited = 0
    while pending:
        folder, prefix, above = pending.pop()
        visited += 1
        status = _status(folder, str(folder))
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise AccessError("a link to a directory that contains it", where=str(folder), hint="Remove the link")
        for child in _children(folder):
            name = prefix + child.name
            if stat.S_ISDIR(_status(child, str(child)).st_mode):
                if child.name not in (".git", "__pycache__") and name != ".cache/huggingface":
                    check_sidecar_name(name, str(root))
                    pending.append((child, f"{name}/", above | {identity}))
            else:
                found[name] = _regular(child)
        limits.check("sidecars", max(len(found), visited), str(root))
    return dict(sorted(found.items()))


def _children(folder: Path) -> Iterable[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise AccessError(f"cannot list: {error.strerror}", where=str(folder), hint="Check its permissions") from error


def _regular(path: Path) -> _Found:
    """A file that can be packed. Raises `AccessError` for a pipe, socket or device, and where permission is missing."""
    status = _status(path, str(path))
    if not stat.S_ISREG(status.st_mode):
        raise AccessError("not a regular file: a pipe, socket or device", where=escaped(str(path)), hint="Remove it")
    if not os.access(path, os.R_OK):
        raise AccessError("cannot read: permission denied", where=escaped(str(path)), hint="Check its permissions")
    return _Found(path, status.st_size)


def _status(path: Path, where: str) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError as error:
        raise _no_such(path, where) from error
    except OSError as error:
        raise AccessError(
            f"cannot read: {error.strerror}", where=escaped(where), hint="Check the path, its links and its permissions"
        ) from error
    except ValueError as error:  # a NUL in the path
        raise AccessError(f"not a path: {error}", where=escaped(where)) from error


def _no_such(path: Path, where: str) -> DeltafmtError:
    if path.is_symlink():
        return AccessError(f"a broken link to '{escaped(os.readlink(path))}'", where=escaped(where), hint=_AGAIN)
    return AccessError("no such file or directory", where=escaped(where), hint="Check the path")


def _some(items: list[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(items[:5]) + more
