"""Reads and writes plain Hugging Face checkpoints, tensor by tensor, so that large ones need little memory.

It shares no code with the package: what tests and benchmarks are made from must not come from the code under test.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Pieces = Callable[[], Iterator[Array]]
"""Gives a tensor's elements in order, in as many arrays as it likes."""

INDEX = "model.safetensors.index.json"
NUMPY: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The floating-point dtypes and what `torch_dtype` in a `config.json` calls them."""


@dataclass(frozen=True)
class Tensor:
    """A tensor that is not in memory: its name, safetensors dtype, shape, and where its elements come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Pieces

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * NUMPY[self.dtype].itemsize

    def load(self) -> Array:
        """All of it as one array of its shape."""
        return np.concatenate([piece.reshape(-1) for piece in self.pieces()]).reshape(self.shape)


def held(name: str, array: Array) -> Tensor:
    """A `Tensor` whose elements are in memory already."""
    dtype = next(key for key, value in NUMPY.items() if value == array.dtype)
    return Tensor(name, dtype, array.shape, lambda: iter([array]))


def read_file(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file in the order of their data, mapped, not read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)

    def tensor(name: str, entry: dict[str, Any]) -> Tensor:
        def pieces() -> Iterator[Array]:
            dtype, count = NUMPY[entry["dtype"]], math.prod(entry["shape"])
            if count:
                raw = np.memmap(path, np.uint8, "r", 8 + length + entry["data_offsets"][0], (count * dtype.itemsize,))
                yield raw.view(dtype).reshape(entry["shape"])
            else:
                yield np.empty(entry["shape"], dtype)

        return Tensor(name, entry["dtype"], tuple(entry["shape"]), pieces)

    return [tensor(name, entry) for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])]


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors files at the top of a checkpoint directory, in order of their names."""
    return sorted(checkpoint.glob("*.safetensors"))


def read_checkpoint(checkpoint: Path) -> list[Tensor]:
    """All tensors of a Hugging Face checkpoint directory, mapped, not read."""
    return [tensor for path in weight_files(checkpoint) for tensor in read_file(path)]


def write_file(path: Path, tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file of `tensors` in their order."""
    listed = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in listed:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in listed:
            for piece in tensor.pieces():
                file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        if file.tell() != 8 + len(text) + end:
            raise RuntimeError(f"{path}: a tensor gave another number of bytes than its shape says")


def write_checkpoint(dst: Path, tensors: Iterable[Tensor], max_shard_bytes: int | None = None) -> None:
    """Write `tensors` into the directory `dst`: one `model.safetensors`, or shards and an index as the Hub has them."""
    dst.mkdir(parents=True, exist_ok=True)
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if max_shard_bytes is not None and shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    if len(shards) == 1:
        write_file(dst / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(dst / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (dst / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def copy_sidecars(src: Path, dst: Path) -> None:
    """Copy every file of a checkpoint that is neither weights nor their index."""

    def weights(directory: str, names: list[str]) -> set[str]:
        return {name for name in names if Path(directory) == src and (name.endswith(".safetensors") or name == INDEX)}

    shutil.copytree(src, dst, ignore=weights, dirs_exist_ok=True)
