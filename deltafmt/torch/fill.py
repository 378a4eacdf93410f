"""Filling a skeleton: fused layers put in, factors and bases and all else read, each thing once."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import nn

from ..dtypes import Bits, Dtype
from ..errors import UsageError
from ..gemm import one_thread_each
from ..operators import Ref, Stored
from ..operators.base import Read
from ..pipeline import Pipeline
from ..reader import Archive
from .bases import BaseCache
from .fused import BASES, POOL, BasePool, Delta, Factors, deltas, fused_like
from .recipes import Low, low_rank_form, same_as
from .slots import Slot
from .tensors import Cast, Item, read_items, read_tensors, room_for, torch_dtype


class _Weight(NamedTuple):
    """Where a dense weight comes from, and the dtype that it gets if it is a float."""

    source: Ref | Stored
    dtype: torch.dtype


def bases_of(model: nn.Module) -> BaseCache:
    """Where a fused model has its bases from. Raises `UsageError` for a model that was not loaded fused."""
    bases = model.__dict__.get(BASES)
    if not isinstance(bases, BaseCache):
        raise UsageError("the model was not loaded with mode='fused'", hint="Use deltafmt.torch.load_model")
    return bases


def cast_of(model: nn.Module) -> Cast:
    """The device and dtype that a fused model has now: most of its weights, not the factors, which may be narrower."""
    sizes: Counter[tuple[torch.device, torch.dtype]] = Counter()
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not name.endswith(("lora_a", "lora_b")):
            sizes[weight.device, weight.dtype] += weight.numel()
    return Cast(*sizes.most_common(1)[0][0])


def fill(
    model: nn.Module,
    archive: Archive,
    found: list[Slot],
    device: torch.device | None,
    bases: BaseCache,
    rank: int | None,
    max_bytes: int | None,
    jobs: int | None,
) -> None:
    """Give a skeleton its weights. `found` covers all of its parameters; all weights are frozen but float factors.

    Matrices that are the same share one parameter. Vectors do not: it would save nothing, and biases are often all
    zeros in several places.
    """
    fused = _fusable(model, archive, found)
    dense = {slot: _Weight(same_as(archive.manifest, slot.tensor), slot.dtype) for slot in found if slot not in fused}
    under = {slot: _Weight(low.base, slot.dtype) for slot, low in fused.items() if low.base is not None}
    weights = list(dict.fromkeys((*dense.values(), *under.values())))
    places = {place for slot in found for place in slot.places}
    fixed = sum(_nbytes(archive, weight) for weight in weights if not _is_vector(archive, weight))
    fixed += sum(_nbytes(archive, weight) for weight in dense.values() if _is_vector(archive, weight))
    fixed += sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in places)
    of_factors = _Sizes(archive, {(low, slot.dtype) for slot, low in fused.items()})
    most = rank
    if max_bytes is not None:
        most = of_factors.fitting_rank(rank, max_bytes, fixed)
    with room_for(fixed + of_factors.nbytes(most), device, "Take another device, max_bytes= or mode='lazy'"):
        anchors = {base.source.tensor for base in under.values() if _is_own(base.source)}
        parameters = _read_weights(archive, weights, device, bases, jobs, rank, anchors)
        factors = _read_factors(archive, fused, device, most, jobs)
    for slot, low in fused.items():
        for place in slot.places:
            _put_delta(model, place, factors[low, slot.dtype])
    owners: dict[_Weight, tuple[nn.Module, str]] = {}
    taken: set[nn.Parameter] = set()
    for slot, weight in dense.items():
        parameter = parameters[weight]
        if parameter in taken and _is_vector(archive, weight):
            parameter = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for place in slot.places:
            module, leaf = _parent(model, place)
            if leaf in module._parameters:
                setattr(module, leaf, parameter)
                owners.setdefault(weight, (module, leaf))
                taken.add(parameter)
            else:
                module._buffers[leaf] = parameter.detach().clone()  # which the model may change, and nobody shares
    pool = BasePool()
    for slot in fused:
        base = under.get(slot)
        if base is not None and base not in owners:
            owners[base] = (pool, pool.add(parameters[base]))
        holder, name = (None, "") if base is None else owners[base]
        for place in slot.places:
            module, _ = _parent(model, place)
            assert isinstance(module, Delta)
            module.refer(holder, name)
    if pool._parameters:
        model.add_module(POOL, pool)
    move_buffers(model, device)
    model.eval()
    object.__setattr__(model, BASES, bases)


def take_over(model: Any, other: Any) -> None:
    """Make a model of transformers another of the same architecture: its weights, its name, its settings of generation.

    Its modules stay, but where their kind differs.
    """
    places = {module: name for name, module in other.named_modules()}
    mine = dict(model.named_modules(remove_duplicate=False))
    model._modules.pop(POOL, None)
    for name, theirs in other.named_modules(remove_duplicate=False):
        ours = mine.get(name)
        if isinstance(theirs, Factors):
            continue  # part of a fused layer
        if isinstance(ours, Delta) and type(ours) is type(theirs):
            assert isinstance(theirs, Delta)
            ours.factors, ours.bias = theirs.factors, theirs.bias
            ours.refer(theirs.holder, theirs.held)
        elif ours is None or isinstance(ours, Delta | BasePool) or isinstance(theirs, Delta | BasePool):
            parent, leaf = _parent(model, name)
            parent.add_module(leaf, theirs.train(model.training))
        else:
            ours._parameters.update(theirs._parameters)
            ours._buffers.update(theirs._buffers)
    for layer in deltas(model).values():
        if layer.holder is not None and not isinstance(layer.holder, BasePool):
            layer.refer(model.get_submodule(places[layer.holder]), layer.held)
    model.config._name_or_path = model.name_or_path = other.name_or_path
    if hasattr(other, "generation_config"):
        model.generation_config = other.generation_config


def move_buffers(model: nn.Module, device: torch.device | None) -> None:
    """Buffers that the model computes go where its weights are; they keep their dtypes."""
    if device is not None:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)


def listed(names: list[str]) -> str:
    """Some names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _fusable(model: nn.Module, archive: Archive, found: list[Slot]) -> dict[Slot, Low]:
    """The tensors that become fused layers: those that are smaller so.

    Those that others have as their base stay dense; so does, with a warning, what a module uses in a way that is not
    known here, and what is made of a base in another way than by factors.
    """
    forms = {slot: low_rank_form(archive.manifest, slot.tensor) for slot in found}
    bases = {low.base for low in forms.values() if low is not None}
    fused, refused, unlike = {}, [], []
    for slot, low in forms.items():
        if same_as(archive.manifest, slot.tensor) in bases:
            continue
        if low is None:
            if _refers(archive, slot.tensor):
                unlike += [place.removesuffix(".weight") for place in slot.places]
            continue
        (rank, columns), (_, rows) = (archive.manifest.arrays[name].shape for name in (low.a, low.b))
        if rank * (rows + columns) >= rows * columns:
            continue
        parents = [_parent(model, place) for place in slot.places]
        if all(leaf == "weight" and fused_like(module) is not None for module, leaf in parents):
            fused[slot] = low
        else:
            refused += [
                f"{place.rpartition('.')[0]} ({type(module).__name__})"
                for place, (module, _) in zip(slot.places, parents, strict=True)
            ]
    if refused:
        warnings.warn(
            f"{archive.location}: no fused form of these modules, they are dense: {listed(refused)}", stacklevel=5
        )
    if unlike:
        warnings.warn(
            f"{archive.location}: these modules are stored as changes of a base, but not as factors, and have no fused "
            f"form, they are dense: {listed(unlike)}",
            stacklevel=5,
        )
    return fused


def _refers(archive: Archive, name: str) -> bool:
    """Whether a tensor is a matrix made of another one, and not the same as that."""
    ref = same_as(archive.manifest, name)
    if not _is_own(ref):
        return False
    tensor = archive.manifest.tensors[ref.tensor]
    return len(tensor.shape) == 2 and any(isinstance(node, Ref) for node in tensor.recipe.walk())


def _put_delta(model: nn.Module, place: str, factors: Factors) -> None:
    path = place.rpartition(".")[0]
    parent, leaf = _parent(model, path)
    make = fused_like(model.get_submodule(path))
    assert make is not None
    parent.add_module(leaf, make(factors))


def _parent(model: nn.Module, place: str) -> tuple[nn.Module, str]:
    path, _, leaf = place.rpartition(".")
    return model.get_submodule(path), leaf


def _read_weights(
    archive: Archive,
    weights: list[_Weight],
    device: torch.device | None,
    bases: BaseCache,
    jobs: int | None,
    rank: int | None,
    anchors: set[str],
) -> dict[_Weight, nn.Parameter]:
    """Dense weights, frozen; those of a base from the cache where it has them. Those in `anchors` are exact."""
    read: dict[_Weight, nn.Parameter] = {}
    items: dict[_Weight, Item] = {}
    names: dict[torch.dtype, list[str]] = {}
    for weight in weights:
        digest, cast = _base_digest(archive, weight), Cast(device, weight.dtype)
        known = None if digest is None else bases.known(digest, torch_dtype(_facts(archive, weight)[0]), cast)
        if _is_own(weight.source):
            names.setdefault(weight.dtype, []).append(weight.source.tensor)
        elif known is not None:
            read[weight] = known
        else:
            items[weight] = _item(archive, weight, cast)
    tensors: dict[_Weight, torch.Tensor] = {}
    for dtype, group in names.items():
        of_group = read_tensors(archive, group, Cast(device, dtype), jobs, rank=rank, exact=anchors)
        tensors |= {_Weight(Ref(name), dtype): tensor for name, tensor in of_group.items()}
    with Pipeline(jobs) as pipeline, one_thread_each():
        tensors |= read_items(items, pipeline)
    for weight, tensor in tensors.items():
        read[weight] = nn.Parameter(tensor, requires_grad=False)
        if (digest := _base_digest(archive, weight)) is not None:
            stored = torch_dtype(_facts(archive, weight)[0])
            read[weight] = bases.add(digest, stored, Cast(device, weight.dtype), read[weight])
    return read


def _is_own(source: Ref | Stored) -> TypeGuard[Ref]:
    """Whether it is a tensor of the archive, not of a base."""
    return isinstance(source, Ref) and source.base is None


def _item(archive: Archive, weight: _Weight, cast: Cast) -> Item:
    source = weight.source

    def read(bits: Bits) -> None:  # binds in a worker: a base tensor is verified before it is read
        if isinstance(source, Stored):
            archive.array_reader(source.array)(0, bits.size, bits)
        else:
            assert source.base is not None
            archive.base_reader(source.base, source.tensor).read(0, bits.size, bits)

    return Item(*_facts(archive, weight), read, cast)


def _base_digest(archive: Archive, weight: _Weight) -> str | None:
    source = weight.source
    if isinstance(source, Stored) or source.base is None:
        return None
    return archive.manifest.bases[source.base].tensors[source.tensor].digest


def _facts(archive: Archive, weight: _Weight) -> tuple[Dtype, tuple[int, ...]]:
    source, manifest = weight.source, archive.manifest
    if isinstance(source, Stored):
        array = manifest.arrays[source.array]
        return array.dtype, array.shape
    if source.base is None:
        tensor = manifest.tensors[source.tensor]
        return tensor.dtype, tensor.shape
    of_base = manifest.bases[source.base].tensors[source.tensor]
    return of_base.dtype, of_base.shape


def _is_vector(archive: Archive, weight: _Weight) -> bool:
    return len(_facts(archive, weight)[1]) < 2


def _nbytes(archive: Archive, weight: _Weight) -> int:
    dtype, shape = _facts(archive, weight)
    return math.prod(shape) * Cast(dtype=weight.dtype).result(torch_dtype(dtype)).itemsize


def _read_factors(
    archive: Archive, fused: Mapping[Slot, Low], device: torch.device | None, rank: int | None, jobs: int | None
) -> dict[tuple[Low, torch.dtype], Factors]:
    """The first `rank` components of each pair, integers as they are, floats no wider than the model's weights."""
    items = {}
    for name in {name: None for low in fused.values() for name in (low.a, low.b)}:
        array = archive.manifest.arrays[name]
        shape = (array.shape[0] if rank is None else min(rank, array.shape[0]), array.shape[1])
        items[name] = Item(array.dtype, shape, _from_start(archive.array_reader(name)), Cast(device))
    with Pipeline(jobs) as pipeline:
        tensors = read_items(items, pipeline)

    def factors(low: Low, dtype: torch.dtype) -> Factors:
        a, b = (tensors[name].to(_factor_dtype(tensors[name].dtype, dtype, low)) for name in (low.a, low.b))
        return Factors(a, b, low.scale)

    forms = dict.fromkeys((low, slot.dtype) for slot, low in fused.items())
    return {(low, dtype): factors(low, dtype) for low, dtype in forms}


def _from_start(read: Read) -> Callable[[Bits], object]:
    return lambda bits: read(0, bits.size, bits)


def _factor_dtype(stored: torch.dtype, weight: torch.dtype, low: Low) -> torch.dtype:
    """Floats are no wider than the weight; without a base they are all that tells its dtype."""
    asked = Cast(dtype=weight).result(stored)
    return asked if low.base is None or asked.itemsize < stored.itemsize else stored


class _Sizes:
    """Of factors, by how many components are read."""

    def __init__(self, archive: Archive, forms: Iterable[tuple[Low, torch.dtype]]) -> None:
        self._where = archive.location
        self._ranks: list[int] = []
        self._widths: list[int] = []  # bytes of one component
        for low, dtype in forms:
            arrays = [archive.manifest.arrays[name] for name in (low.a, low.b)]
            self._ranks.append(arrays[0].shape[0])
            widths = (each.shape[1] * _factor_dtype(torch_dtype(each.dtype), dtype, low).itemsize for each in arrays)
            self._widths.append(sum(widths))

    def nbytes(self, rank: int | None) -> int:
        pairs = zip(self._widths, self._ranks, strict=True)
        return sum(width * (each if rank is None else min(rank, each)) for width, each in pairs)

    def fitting_rank(self, most: int | None, max_bytes: int, fixed: int) -> int:
        """The largest rank, up to `most`, of which the factors fit in `max_bytes` beside what is `fixed`."""
        if fixed > max_bytes:
            raise UsageError(
                "the model does not fit in max_bytes, not even without its factors",
                where=self._where,
                expected=f"at least {fixed}",
                found=max_bytes,
            )
        rank = max(self._ranks, default=0) if most is None else most
        while fixed + self.nbytes(rank) > max_bytes:
            rank -= 1
        return rank
