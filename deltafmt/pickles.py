"""Torch checkpoints (`.bin`, `.pt`, `.pth`), read through torch's `weights_only` loader: no code of a file ever runs.

A pickled file is presented as the safetensors file it is to become, so the rest of deltafmt knows one kind of weights.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .dtypes import DTYPES, Bits, Dtype, Shape
from .errors import AccessError, IntegrityError, MalformedError, MissingExtraError, UnsupportedError, UsageError
from .limits import DEFAULT_LIMITS, Limits
from .names import check_name, escaped
from .safetensors_file import parse_header

if TYPE_CHECKING:
    import torch

_TORCH_NAMES = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}  # safetensors -> torch, in the order in which safetensors writes tensors: widest first
_WRITING_ORDER = {name: rank for rank, name in enumerate(_TORCH_NAMES)}
_OLDEST_SAFE_TORCH = (2, 6)  # before it weights_only could be made to run code: CVE-2025-32434
_ZIP_MAGIC = b"PK\x03\x04"
_ALIGNMENT = 8
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_REFUSED_OTHERWISE = re.compile(r"WeightsUnpickler error:\s*(.+)")
_WRAPPERS = ("state_dict", "model")
_CONVERT = "If you trust its author, convert it to safetensors first"


def safetensors_name(name: str) -> str:
    """The name of the safetensors file, or shard index, that a pickled one becomes.

    `pytorch_model-00001-of-00002.bin` -> `model-00001-of-00002.safetensors`, as transformers names them;
    `x.pt` -> `x.safetensors`.
    """
    renamed = re.sub(r"^pytorch_model(?=[.-])", "model", name)
    return re.sub(r"\.(bin|pt|pth)(?=$|\.index\.json$)", ".safetensors", renamed)


def safetensors_header(tensors: Mapping[str, tuple[Dtype, Shape]]) -> bytes:
    """The header that safetensors writes for these tensors: widest dtype first, then by name; padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (kind, shape) in sorted(tensors.items(), key=lambda item: (_WRITING_ORDER[item[1][0].name], item[0])):
        end = position + kind.nbytes(shape)
        header[name] = {"dtype": kind.name, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % _ALIGNMENT)


class PickledFile:
    """An open torch checkpoint, with the interface of `SafetensorsFile`. Reads are thread-safe.

    A file that `torch.save` wrote as a zip (torch 1.6 and newer) is mapped, not loaded: only what is read occupies
    memory. The older format can only be loaded whole.

    Attributes:
        path, size: the file and its size in bytes.
        header: the header of the safetensors file it becomes (without the length before it).
        entries: name -> `Entry`, in the order of that file. Tensors that share memory are all there, each in full.

    Raises:
        MissingExtraError: torch is not installed. `UsageError`: it is too old to be safe.
        AccessError: the file cannot be read.
        MalformedError: it needs code to load, is damaged, or holds something other than named tensors.
        UnsupportedError: a dtype or layout that safetensors does not have.
    """

    def __init__(self, path: Path, limits: Limits = DEFAULT_LIMITS) -> None:
        self.path = path
        where = str(path)
        require_torch(where)
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise AccessError(
                f"cannot open: {error.strerror}", where=where, hint="Check the path and its permissions"
            ) from error
        self._closing = threading.Lock()
        try:
            self.size = os.fstat(self._fd).st_size
            tensors = _state_dict(_load(path), where)
            limits.check("tensors", len(tensors), where)
            described = {name: _describe(tensor, f"{where}: {escaped(name)}") for name, tensor in tensors.items()}
            self.header = safetensors_header(described)
            self.entries = parse_header(self.header, where, limits)
            self._arrays = {name: _bits(tensor, described[name][0]) for name, tensor in tensors.items()}
        except BaseException:
            self.close()
            raise

    def read_elements(self, name: str, lo: int, hi: int, out: Bits) -> None:
        """Elements `[lo, hi)` of a tensor, row-major whatever its strides, into `out` (unsigned, of its width)."""
        # The file is mapped: reading behind its end would kill the process, so look first.
        if os.fstat(self._fd).st_size < self.size:
            raise IntegrityError(
                "the file became shorter while it was open",
                where=str(self.path),
                expected=self.size,
                found=os.fstat(self._fd).st_size,
                hint="Download the file again",
                reason="shard-size",
            )
        array = self._arrays[name]
        # A strided array is gathered element by element: slower, but no copy of the whole tensor.
        out[: hi - lo] = array.reshape(-1)[lo:hi] if array.flags.c_contiguous else array.flat[lo:hi]

    def close(self) -> None:
        with self._closing:
            self._arrays = {}
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def require_torch(where: str) -> None:
    """Raise `MissingExtraError` without torch, `UsageError` with one whose `weights_only` loader is unsafe."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(
            "a pickled checkpoint is read through torch, which is not installed", extra="torch", where=where
        ) from error
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < _OLDEST_SAFE_TORCH:
        raise UsageError(
            "the weights_only loader of this torch can be made to run code (CVE-2025-32434)",
            where=where,
            expected="torch 2.6 or newer",
            found=f"torch {torch.__version__}",
            hint="Upgrade it with: pip install 'torch>=2.6'",
        )


def _load(path: Path) -> Any:
    """What the pickle holds. `weights_only` is given explicitly: torch's environment variables cannot switch it off."""
    import torch

    where = str(path)
    try:
        mapped = _is_stored_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns about it also refuses, and that is reported below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise AccessError(f"cannot read: {error.strerror or error}", where=where) from error
    except MalformedError:
        raise
    except pickle.UnpicklingError as error:
        raise _refusal(str(error), where) from error
    except Exception as error:  # a damaged pickle can raise almost anything from inside torch
        first_line = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise MalformedError(
            f"torch cannot load it: {first_line}", where=where, hint="Download the file again"
        ) from error


def _is_stored_zip(path: Path) -> bool:
    """Whether torch can map the file: a zip, not compressed (torch would take the compressed bytes for the tensors)."""
    with path.open("rb") as file:
        if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            return False
        try:
            with zipfile.ZipFile(file) as archive:
                packed = [record.filename for record in archive.infolist() if record.compress_type]  # 0 is "stored"
        except zipfile.BadZipFile as error:
            raise MalformedError(f"a damaged zip: {error}", where=str(path), hint="Download the file again") from error
    if packed:
        raise MalformedError(
            f"the record '{escaped(packed[0])}' is compressed, which torch.save never does",
            where=str(path),
            hint=_CONVERT,
        )
    return True


def _refusal(message: str, where: str) -> MalformedError:
    code = _REFUSED_GLOBAL.search(message)
    if code:
        return MalformedError(f"loading it needs code: torch refused {code[1]}", where=where, hint=_CONVERT)
    other = _REFUSED_OTHERWISE.search(message)
    reason = other[1].strip() if other else message.splitlines()[0][:200]
    return MalformedError(
        f"not a checkpoint that loads without code: torch refused it ({reason})", where=where, hint=_CONVERT
    )


def _state_dict(value: object, where: str) -> dict[str, torch.Tensor]:
    """The named tensors: at the top, or under a single key `state_dict` or `model`. Nothing is left out silently."""
    import torch

    if isinstance(value, dict) and len(value) == 1:
        (key, inner), *_ = value.items()
        if key in _WRAPPERS and isinstance(inner, dict):
            value = inner
    if not isinstance(value, dict):
        raise MalformedError(
            "not a state dict", where=where, expected="a dict of tensors", found=type(value).__name__, hint=_CONVERT
        )
    others = [key for key, item in value.items() if not (isinstance(key, str) and isinstance(item, torch.Tensor))]
    if others:
        shown = ", ".join(f"{escaped(str(key))} ({type(value[key]).__name__})" for key in others[:5])
        raise MalformedError(
            f"{len(others)} of {len(value)} entries are not named tensors: {shown}{', ...' if len(others) > 5 else ''}",
            where=where,
            hint="Save the state dict alone: deltafmt would lose the rest",
        )
    return {check_name(name, where): tensor for name, tensor in value.items()}


def _describe(tensor: torch.Tensor, where: str) -> tuple[Dtype, Shape]:
    import torch

    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise UnsupportedError(
            "a tensor that is not a dense array",
            where=where,
            found=f"{tensor.layout} on {tensor.device}",
            hint="safetensors has dense tensors only: convert it before packing",
        )
    for name, torch_name in _TORCH_NAMES.items():
        if tensor.dtype is getattr(torch, torch_name, None):  # torch below 2.7 has fewer dtypes
            return DTYPES[name], tuple(tensor.shape)
    raise UnsupportedError(
        f"unknown dtype {str(tensor.dtype).removeprefix('torch.')}",
        where=where,
        hint=f"This version knows {', '.join(_TORCH_NAMES.values())}",
        reason="dtype",
    )


def _bits(tensor: torch.Tensor, kind: Dtype) -> Bits:
    """The tensor's memory, its strides kept, as a numpy array of unsigned integers."""
    import torch

    # Signed, because every torch has those. Only lazily negated or conjugated tensors are copied.
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[kind.width]
    plain = tensor.detach().resolve_conj().resolve_neg()
    array: Bits = plain.view(signed).numpy()
    return array.view(np.dtype(kind.bits))
