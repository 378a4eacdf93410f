"""Filling a skeleton: fused layers put in, factors and bases and all else read, each thing once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

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
from .fused import POOL, BasePool, Delta, Factors, deltas, fused_like
from .slots import Low, Slot, low_rank_form
from .tensors import Cast, Item, read_items, read_tensors, same_as, torch_dtype

_Weight = Ref | Stored  # where a dense weight comes from


def bases_of(model: nn.Module) -> BaseCache:
    """Where a fused model has its bases from. Raises `UsageError` for a model that was not loaded fused."""
    bases = model.__dict__.get("_deltafmt_base_cache")
    if not isinstance(bases, BaseCache):
        raise UsageError("the model was not loaded with mode='fused'", hint="Use deltafmt.torch.load_model")
    return bases


def cast_of(model: nn.Module) -> Cast:
    """The device and dtype that a fused model has now; its factors may be narrower."""
    names = model.named_parameters()
    weight = next(each for name, each in names if each.is_floating_point() and not name.endswith(("lora_a", "lora_b")))
    return Cast(weight.device, weight.dtype)


def fill(
    model: nn.Module,
    archive: Archive,
    found: list[Slot],
    cast: Cast,
    bases: BaseCache,
    rank: int | None,
    max_bytes: int | None,
    jobs: int | None,
    *,
    only_cut: bool = False,
) -> None:
    """Give a skeleton its weights. `found` covers all of its parameters; all weights are frozen but float factors.

    `only_cut`: nothing is fused but weights of which `rank` leaves components out.

    Matrices that are the same share one parameter. Vectors do not: it would save nothing, and biases are often all
    zeros in several places.
    """
    fused = _fusable(model, archive, found, rank if only_cut else None)
    dense = {slot: same_as(archive.manifest, slot.tensor) for slot in found if slot not in fused}
    weights: dict[_Weight, None] = dict.fromkeys(dense.values())
    weights |= dict.fromkeys(low.base for low in fused.values() if low.base is not None)
    if max_bytes is not None:
        places = {place for slot in found for place in slot.places}
        fixed = sum(_nbytes(archive, weight, cast) for weight in weights if not _is_vector(archive, weight))
        fixed += sum(_nbytes(archive, weight, cast) for weight in dense.values() if _is_vector(archive, weight))
        fixed += sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in places)
        rank = _fitting_rank(archive, fused.values(), cast, rank, max_bytes - fixed, max_bytes)
    parameters = _read_weights(archive, list(weights), cast, bases, jobs)
    factors = _read_factors(archive, list(dict.fromkeys(fused.values())), cast, rank, jobs)
    for slot, low in fused.items():
        for place in slot.places:
            _put_delta(model, place, factors[low])
    owners: dict[_Weight, tuple[nn.Module, str]] = {}
    for slot, weight in dense.items():
        parameter = parameters[weight]
        if weight in owners and _is_vector(archive, weight):
            parameter = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for place in slot.places:
            module, leaf = _parent(model, place)
            if leaf in module._parameters:
                setattr(module, leaf, parameter)
                owners.setdefault(weight, (module, leaf))
            else:
                module._buffers[leaf] = parameter.data
    pool = BasePool()
    for slot, low in fused.items():
        if low.base is not None and low.base not in owners:
            owners[low.base] = (pool, pool.add(parameters[low.base]))
        holder, name = (None, "") if low.base is None else owners[low.base]
        for place in slot.places:
            module, _ = _parent(model, place)
            assert isinstance(module, Delta)
            module.refer(holder, name)
    if pool._parameters:
        model.add_module(POOL, pool)
    move_buffers(model, cast)
    model.eval()
    object.__setattr__(model, "_deltafmt_base_cache", bases)


def take_over(model: nn.Module, other: nn.Module) -> None:
    """Give a model the weights of another of the same architecture. Its modules stay, but where their kind differs."""
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


def move_buffers(model: nn.Module, cast: Cast) -> None:
    """Buffers that the model computes go where its weights are; they keep their dtypes."""
    if cast.device is not None:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(cast.device)


def listed(names: list[str]) -> str:
    """Some names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _fusable(model: nn.Module, archive: Archive, found: list[Slot], above: int | None) -> dict[Slot, Low]:
    """The tensors that become fused layers: those that are smaller so, or, with `above`, those of a higher rank.

    Those that others have as their base stay dense; so does, with a warning, what a module uses in a way that is not
    known here.
    """
    forms = {slot: low_rank_form(archive.manifest, slot.tensor) for slot in found}
    bases = {low.base for low in forms.values() if low is not None}
    fused, refused = {}, []
    for slot, low in forms.items():
        if low is None or same_as(archive.manifest, slot.tensor) in bases:
            continue
        (rank, columns), (_, rows) = (archive.manifest.arrays[name].shape for name in (low.a, low.b))
        if rank * (rows + columns) >= rows * columns if above is None else rank <= above:
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
    return fused


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
    archive: Archive, weights: list[_Weight], cast: Cast, bases: BaseCache, jobs: int | None
) -> dict[_Weight, nn.Parameter]:
    """Dense weights, frozen; those of a base from the cache where it has them."""
    read: dict[_Weight, nn.Parameter] = {}
    items: dict[_Weight, Item] = {}
    names = []
    for weight in weights:
        digest = _base_digest(archive, weight)
        if isinstance(weight, Ref) and weight.base is None:
            names.append(weight.tensor)
        elif (
            digest is not None
            and (known := bases.known(digest, torch_dtype(_facts(archive, weight)[0]), cast)) is not None
        ):
            read[weight] = known
        else:
            items[weight] = _item(archive, weight)
    tensors: dict[_Weight, torch.Tensor] = {}
    tensors |= {Ref(name): tensor for name, tensor in read_tensors(archive, names, cast, jobs).items()}
    with Pipeline(jobs) as pipeline, one_thread_each():
        tensors |= read_items(items, cast, pipeline)
    for weight, tensor in tensors.items():
        read[weight] = nn.Parameter(tensor, requires_grad=False)
        if (digest := _base_digest(archive, weight)) is not None:
            read[weight] = bases.add(digest, torch_dtype(_facts(archive, weight)[0]), cast, read[weight])
    return read


def _item(archive: Archive, weight: _Weight) -> Item:
    dtype, shape = _facts(archive, weight)

    def read(bits: Bits) -> None:  # binds in a worker: a base tensor is verified before it is read
        if isinstance(weight, Stored):
            archive.array_reader(weight.array)(0, bits.size, bits)
        else:
            assert weight.base is not None
            archive.base_reader(weight.base, weight.tensor)(0, bits.size, bits)

    return Item(dtype, shape, read)


def _base_digest(archive: Archive, weight: _Weight) -> str | None:
    if isinstance(weight, Stored) or weight.base is None:
        return None
    return archive.manifest.bases[weight.base].tensors[weight.tensor].digest


def _facts(archive: Archive, weight: _Weight) -> tuple[Dtype, tuple[int, ...]]:
    if isinstance(weight, Stored):
        array = archive.manifest.arrays[weight.array]
        return array.dtype, array.shape
    if weight.base is None:
        tensor = archive.manifest.tensors[weight.tensor]
        return tensor.dtype, tensor.shape
    of_base = archive.manifest.bases[weight.base].tensors[weight.tensor]
    return of_base.dtype, of_base.shape


def _is_vector(archive: Archive, weight: _Weight) -> bool:
    return len(_facts(archive, weight)[1]) < 2


def _nbytes(archive: Archive, weight: _Weight, cast: Cast) -> int:
    dtype, shape = _facts(archive, weight)
    return torch.Size(shape).numel() * cast.result(torch_dtype(dtype)).itemsize


def _read_factors(
    archive: Archive, lows: Iterable[Low], cast: Cast, rank: int | None, jobs: int | None
) -> dict[Low, Factors]:
    """The first `rank` components of each pair, integers as they are, floats no wider than the model's weights."""
    items = {}
    for name in {name: None for low in lows for name in (low.a, low.b)}:
        array = archive.manifest.arrays[name]
        shape = (array.shape[0] if rank is None else min(rank, array.shape[0]), array.shape[1])
        items[name] = Item(array.dtype, shape, _from_start(archive.array_reader(name)))
    with Pipeline(jobs) as pipeline:
        tensors = read_items(items, Cast(cast.device), pipeline)
    narrow = {name: tensor.to(_factor_dtype(tensor.dtype, cast)) for name, tensor in tensors.items()}
    return {low: Factors(narrow[low.a], narrow[low.b], low.scale) for low in lows}


def _from_start(read: Read) -> Callable[[Bits], object]:
    return lambda bits: read(0, bits.size, bits)


def _factor_dtype(stored: torch.dtype, cast: Cast) -> torch.dtype:
    asked = cast.result(stored)
    return asked if asked.itemsize < stored.itemsize else stored


def _fitting_rank(
    archive: Archive, lows: Iterable[Low], cast: Cast, most: int | None, room: int, max_bytes: int
) -> int:
    """The largest rank, up to `most`, of which the factors take at most `room` bytes."""
    if room < 0:
        raise UsageError(
            "the model does not fit in max_bytes, not even without its factors",
            where=archive.location,
            expected=f"at least {max_bytes - room}",
            found=max_bytes,
        )
    ranks: list[int] = []
    widths: list[int] = []  # bytes of one component
    for low in dict.fromkeys(lows):
        arrays = [archive.manifest.arrays[name] for name in (low.a, low.b)]
        ranks.append(arrays[0].shape[0])
        widths.append(sum(each.shape[1] * _factor_dtype(torch_dtype(each.dtype), cast).itemsize for each in arrays))
    rank = max(ranks, default=0) if most is None else most
    while sum(width * min(rank, each) for width, each in zip(widths, ranks, strict=True)) > room:
        rank -= 1
    return rank
