"""Tensors of an open archive as torch tensors: read side by side, each of them once."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
import torch

from ..archive import OpenArchive, TensorSlice, usable_device
from ..dtypes import DTYPES, Bits, Dtype, Shape
from ..errors import UsageError
from ..gemm import one_thread_each
from ..manifest import Manifest
from ..operators import Operator, Ref, Scope, Target
from ..operators.base import Read, Rectangle, TensorReader, in_memory
from ..pipeline import Pipeline, Pool
from ..reader import Archive
from ..rebuild import Rebuilder, read_in_pieces
from .recipes import prefix, same_as

_Key = TypeVar("_Key", bound=Hashable)

_KEPT_BYTES = 256 << 20
_Place: TypeAlias = "tuple[int, int] | Rectangle"

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
    """Raises `UsageError` as `check_float` and `deltafmt.archive.usable_device` do."""
    if dtype is not None:
        check_float(dtype)
    return Cast(None if device is None else usable_device(device), dtype)


def check_float(dtype: object) -> None:
    """Raises `UsageError` for what is none of torch's floating-point dtypes."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"{dtype!r} is no floating-point dtype of torch", hint="Pass one, such as torch.bfloat16")


def nbytes(archive: Archive, cast: Cast) -> int:
    """Bytes of all tensors, each name for itself."""
    return sum(info.count * cast.result(torch_dtype(info.dtype)).itemsize for info in archive.tensors.values())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether numpy, Python or torch found no memory: torch has no class of its own for that of the CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def room_for(needed: int, device: torch.device | None, hint: str) -> Iterator[None]:
    """Where a device, or memory, turns out to have no room for `needed` bytes: raise `UsageError`."""
    free = torch.cuda.mem_get_info(device)[0] if device is not None and device.type == "cuda" else None
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(
            "there is no room in memory" if device is None else f"there is no room on the device '{device}'",
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
    """Rebuild tensors, each of them once; what several refer to, here or in a base, comes first, and is not read again
    for these.

    Names that mean the same tensor share one torch tensor. Where `cast` changes something, tensors that others refer to
    are kept as they were until those are done.

    Args:
        rank: of tensors that are stored as base and factors, use at most so many components; but of those in `exact`.
    """
    manifest = archive.manifest
    meaning = {name: same_as(manifest, name) for name in names}
    wanted = dict.fromkeys(meaning.values())
    shared = [ref for ref, uses in _referred(manifest, wanted).items() if uses > 1 and ref not in wanted]
    memory = _Memory(archive)
    tensors: dict[Ref, torch.Tensor] = {}
    with contextlib.closing(Pool(jobs)) as pool, Pipeline(jobs) as pipeline, one_thread_each():
        levels = _levels(manifest, [*shared, *wanted])
        for number, level in enumerate(levels):
            memory.keep(_referred(manifest, [ref for later in levels[number:] for ref in later]))
            items = {}
            for ref in level:
                most = rank if ref in wanted and ref.tensor not in exact else None
                items[ref] = _item(archive, ref, most, memory, pool, cast if ref in wanted else Cast())
            tensors |= {ref: tensor for ref, tensor in read_items(items, pipeline).items() if ref in wanted}
    return {name: tensors[ref] for name, ref in meaning.items()}


def _item(archive: Archive, ref: Ref, rank: int | None, memory: _Memory, pool: Pool, cast: Cast) -> Item:
    recipe: Operator = ref
    scope: Scope = archive.scope
    cut = None
    if ref.base is None:
        target = archive.scope.target(ref.tensor)
        cut = None if rank is None else prefix(archive, ref.tensor, rank)
        recipe, scope = cut or (archive.manifest.tensors[ref.tensor].recipe, scope)
    else:
        of_base = archive.manifest.bases[ref.base].tensors[ref.tensor]
        target = Target(ref.tensor, of_base.dtype, of_base.shape, np.dtype("f4"))

    def read(bits: Bits) -> None:
        rebuilder = Rebuilder(recipe, memory, scope, target)
        read_in_pieces(rebuilder, 0, bits.size, bits, pool)
        if cut is None:
            memory.offer(ref, bits)

    return Item(target.dtype, target.shape, read, cast)


class _Memory:
    """A `Source` that has tensors which were read already; everything else is the archive's."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._wanted: Container[Ref] = ()
        self._bits: dict[Ref, Bits] = {}

    def keep(self, wanted: Container[Ref]) -> None:
        """From now on keep these, and no others."""
        self._wanted = wanted
        self._bits = {ref: bits for ref, bits in self._bits.items() if ref in wanted}

    def offer(self, ref: Ref, bits: Bits) -> None:
        if ref in self._wanted:
            self._bits[ref] = bits

    def array_reader(self, name: str) -> Read:
        return self._archive.array_reader(name)

    def tensor_reader(self, name: str) -> TensorReader:
        return self._known(same_as(self._archive.manifest, name)) or self._archive.tensor_reader(name)

    def base_reader(self, base: str, name: str) -> TensorReader:
        return self._known(Ref(name, base)) or self._archive.base_reader(base, name)

    def _known(self, ref: Ref) -> TensorReader | None:
        known = self._bits.get(ref)
        return None if known is None else in_memory(known, _shape(self._archive.manifest, ref))


class SharedPieces:
    """Slices of an open archive's tensors for whoever reads each of them once, in any order and any threads.

    A piece of a tensor that several recipes refer to is read once, whoever else waits for it, and kept until all have
    had it, or this is gone; so long as there is room for it: at most `_KEPT_BYTES` are.
    """

    def __init__(self, archive: OpenArchive) -> None:
        self._opened, self._archive = archive, archive._archive
        manifest = self._archive.manifest
        named = Counter(same_as(manifest, name) for name in manifest.tensors)
        self._uses = named + _referred(manifest, named)
        self._pieces: dict[tuple[Ref, _Place], tuple[Bits, int]] = {}
        self._room = _KEPT_BYTES
        self._lock = threading.Lock()
        self._reading: defaultdict[tuple[Ref, _Place], threading.Lock] = defaultdict(threading.Lock)

    def get_slice(self, name: str) -> TensorSlice:
        """As of `deltafmt.archive.OpenArchive`."""
        shared = self._uses[same_as(self._archive.manifest, name)] > 1
        return TensorSlice(self._opened, self._rebuilder(name, Ref(name) if shared else None))

    def _rebuilder(self, name: str, recipe: Operator | None = None) -> Rebuilder:
        recipe = recipe or self._archive.manifest.tensors[name].recipe
        return Rebuilder(recipe, self, self._archive.scope, self._archive.scope.target(name))

    def array_reader(self, name: str) -> Read:
        return self._archive.array_reader(name)

    def tensor_reader(self, name: str) -> TensorReader:
        ref = same_as(self._archive.manifest, name)
        if ref.base is not None:
            return self.base_reader(ref.base, ref.tensor)
        return self._reader(ref, self._rebuilder(ref.tensor))

    def base_reader(self, base: str, name: str) -> TensorReader:
        return self._reader(Ref(name, base), self._archive.base_reader(base, name))

    def _reader(self, ref: Ref, reader: TensorReader) -> TensorReader:
        return _SharedReader(self, ref, reader) if self._uses[ref] > 1 else reader

    def once(self, ref: Ref, place: _Place, out: Bits, read: Callable[[], None]) -> None:
        """Put a piece of a tensor into `out`: by `read`, or as it was read before."""
        with self._lock:
            reading = self._reading[ref, place]
        with reading:  # references have no cycles: neither have those who wait
            with self._lock:
                known, left = self._pieces.pop((ref, place), (None, self._uses[ref]))
                if known is not None and left > 1:
                    self._pieces[ref, place] = known, left - 1
                elif known is not None:
                    self._room += known.nbytes
            if known is not None:
                np.copyto(out, known)
                return
            read()
            with self._lock:
                if (ref, place) not in self._pieces and out.nbytes <= self._room:
                    self._room -= out.nbytes
                    self._pieces[ref, place] = out.copy(), left - 1


@dataclass(frozen=True)
class _SharedReader:
    """A `TensorReader` of a tensor that several recipes refer to."""

    pieces: SharedPieces
    ref: Ref
    reader: TensorReader

    @property
    def granularity(self) -> int:
        return self.reader.granularity

    def read(self, lo: int, hi: int, out: Bits) -> None:
        self.pieces.once(self.ref, (lo, hi), out, lambda: self.reader.read(lo, hi, out))

    def read_rectangle(self, part: Rectangle, out: Bits) -> None:
        self.pieces.once(self.ref, part, out, lambda: self.reader.read_rectangle(part, out))


def _shape(manifest: Manifest, ref: Ref) -> Shape:
    return (manifest if ref.base is None else manifest.bases[ref.base]).tensors[ref.tensor].shape


def _referred(manifest: Manifest, refs: Iterable[Ref]) -> Counter[Ref]:
    """How often recipes of these tensors refer to others, each by where it is stored: in the archive or in a base."""
    nodes = (node for ref in refs if ref.base is None for node in manifest.tensors[ref.tensor].recipe.walk())
    return Counter(
        node if node.base is not None else same_as(manifest, node.tensor) for node in nodes if isinstance(node, Ref)
    )


def _levels(manifest: Manifest, refs: Sequence[Ref]) -> list[list[Ref]]:
    """The tensors in groups: each refers to tensors of earlier groups, if to any of these."""
    left, levels = list(refs), []
    while left:
        waiting = set(left)
        ready = [ref for ref in left if waiting.isdisjoint(_referred(manifest, [ref]))]
        levels.append(ready)
        waiting.difference_update(ready)
        left = [ref for ref in left if ref in waiting]
    return levels
