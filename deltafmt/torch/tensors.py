"""Tensors of an open archive as torch tensors: read side by side, each of them once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from ..dtypes import DTYPES, Bits, Dtype, Shape
from ..errors import UsageError
from ..gemm import one_thread_each
from ..manifest import Manifest
from ..operators import Ref
from ..operators.base import Read
from ..pipeline import Pipeline, Pool
from ..reader import Archive
from ..rebuild import Rebuilder, read_in_pieces
from .recipes import prefix, same_as

_Key = TypeVar("_Key", bound=Hashable)

SAFETENSORS_NAMES = {getattr(torch, dtype.values.name): dtype.name for dtype in DTYPES.values()}
"""torch dtype -> its name in safetensors."""


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """The torch dtype of the same name: numpy, ml_dtypes and torch agree on them."""
    found: torch.dtype = getattr(torch, dtype.values.name)
    return found


@dataclass(frozen=True)
class Cast:
    """Where tensors go, and as what: floats become `dtype`, all others keep theirs. None leaves things as they are."""

    device: torch.device | None = None
    dtype: torch.dtype | None = None

    def result(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that tensors of `dtype` get."""
        return dtype if self.dtype is None or not dtype.is_floating_point else self.dtype

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self.device, dtype=self.result(tensor.dtype))


def new_cast(device: torch.device | str | None, dtype: torch.dtype | None) -> Cast:
    """Raises `UsageError` for a dtype that is none of torch's floats, and for a device that is unknown."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"{dtype} is no floating-point dtype of torch", hint="Pass one, such as torch.bfloat16")
    try:
        place = None if device is None else torch.empty(0, device=device).device  # with its number
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA asserts
        raise UsageError(f"the device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    return Cast(place, dtype)


def nbytes(archive: Archive, cast: Cast) -> int:
    """Bytes of all tensors, each name for itself."""
    return sum(info.count * cast.result(torch_dtype(info.dtype)).itemsize for info in archive.tensors.values())


@contextlib.contextmanager
def room_for(needed: int, device: torch.device | None, hint: str) -> Iterator[None]:
    """Where a device turns out to have no room for `needed` bytes: raise `UsageError`."""
    free = torch.cuda.mem_get_info(device)[0] if device is not None and device.type == "cuda" else None
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"there is no room on the device '{device}'",
            expected=f"{needed} bytes",
            found=None if free is None else f"{free} bytes that were free",
            hint=hint,
        ) from error


@dataclass(frozen=True)
class Item:
    """Something to be read as a whole, and what becomes of it: `read` fills all of its bits, in any thread."""

    dtype: Dtype
    shape: Shape
    read: Callable[[Bits], object]
    cast: Cast

    def tensor(self) -> torch.Tensor:
        tensor = torch.empty(self.shape, dtype=torch_dtype(self.dtype))
        self.read(tensor.reshape(-1).view(torch.uint8).numpy().view(self.dtype.bits))
        return self.cast(tensor)

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.shape)


def read_items(items: Mapping[_Key, Item], pipeline: Pipeline) -> dict[_Key, torch.Tensor]:
    """Read all items side by side. Beside the result, a bounded number of bytes is in memory before they are cast."""
    return dict(pipeline.ordered(items, lambda key: items[key].tensor(), lambda key: items[key].nbytes))


def check_bases(archive: Archive, names: Iterable[str]) -> None:
    """Find out early what can be found out cheaply: raises `WrongBaseError` if a base that tensors need is missing, or
    the smallest tensor that they need of it is another."""
    needed: dict[str, list[str]] = {}
    pending = list(dict.fromkeys(names))
    seen = set(pending)
    while pending:
        for node in archive.manifest.tensors[pending.pop()].recipe.walk():
            if isinstance(node, Ref) and node.base is not None:
                needed.setdefault(node.base, []).append(node.tensor)
            elif isinstance(node, Ref) and node.tensor not in seen:
                seen.add(node.tensor)
                pending.append(node.tensor)
    for name, tensors in needed.items():
        base = archive.base(name)
        base.verify(min(tensors, key=base.nbytes))


def read_tensors(
    archive: Archive,
    names: Iterable[str],
    cast: Cast,
    jobs: int | None = None,
    *,
    rank: int | None = None,
    exact: Container[str] = (),
) -> dict[str, torch.Tensor]:
    """Rebuild tensors, each of them once; what others refer to comes first, and is not read again for these.

    Names that mean the same tensor share one torch tensor. Where `cast` changes something, tensors that others refer to
    are kept as they were until those are done.

    Args:
        rank: of tensors that are stored as base and factors, use at most so many components; but of those in `exact`.
    """
    meaning = {name: same_as(archive.manifest, name) for name in names}
    wanted = {ref: name if ref.base is not None else ref.tensor for name, ref in reversed(meaning.items())}
    memory = _Memory(archive)
    tensors: dict[str, torch.Tensor] = {}
    with contextlib.closing(Pool(jobs)) as pool, Pipeline(jobs) as pipeline, one_thread_each():
        levels = _levels(archive.manifest, list(wanted.values()))
        for number, level in enumerate(levels):
            memory.keep(_referred(archive.manifest, [name for later in levels[number:] for name in later]))
            items = {name: _item(archive, name, None if name in exact else rank, memory, pool, cast) for name in level}
            tensors |= read_items(items, pipeline)
    return {name: tensors[wanted[ref]] for name, ref in meaning.items()}


def _item(archive: Archive, name: str, rank: int | None, memory: _Memory, pool: Pool, cast: Cast) -> Item:
    tensor = archive.manifest.tensors[name]
    cut = None if rank is None else prefix(archive, name, rank)
    recipe, scope = cut or (tensor.recipe, archive.scope)

    def read(bits: Bits) -> None:
        rebuilder = Rebuilder(recipe, memory, scope, archive.scope.target(name))
        read_in_pieces(rebuilder, 0, bits.size, bits, pool)
        if cut is None:
            memory.offer(name, bits)

    return Item(tensor.dtype, tensor.shape, read, cast)


class _Memory:
    """A `Source` that has tensors which were rebuilt already; everything else is the archive's."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._wanted: set[str] = set()
        self._bits: dict[str, Bits] = {}

    def keep(self, names: set[str]) -> None:
        """From now on keep these, and no others."""
        self._wanted = names
        self._bits = {name: bits for name, bits in self._bits.items() if name in names}

    def offer(self, name: str, bits: Bits) -> None:
        if name in self._wanted:
            self._bits[name] = bits

    def array_reader(self, name: str) -> Read:
        return self._archive.array_reader(name)

    def tensor_reader(self, name: str) -> Read:
        known = self._bits.get(same_as(self._archive.manifest, name).tensor)
        if known is None:
            return self._archive.tensor_reader(name)
        return lambda lo, hi, out: np.copyto(out, known[lo:hi])

    def base_reader(self, base: str, name: str) -> Read:
        return self._archive.base_reader(base, name)


def _referred(manifest: Manifest, names: Sequence[str]) -> set[str]:
    """The tensors of the archive that recipes of `names` refer to, each by the name it is stored under."""
    nodes = (node for name in names for node in manifest.tensors[name].recipe.walk() if isinstance(node, Ref))
    ends = (same_as(manifest, node.tensor) for node in nodes if node.base is None)
    return {end.tensor for end in ends if end.base is None}


def _levels(manifest: Manifest, names: Sequence[str]) -> list[list[str]]:
    """The tensors in groups: each refers to tensors of earlier groups, if to any of `names`."""
    left, levels = list(dict.fromkeys(names)), []
    while left:
        waiting = set(left)
        ready = [name for name in left if not (_referred(manifest, [name]) & waiting)]
        levels.append(ready)
        left = [name for name in left if name not in set(ready)]
    return levels
