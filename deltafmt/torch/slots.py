"""Where the tensors of an archive go in a model, and which of them a fused layer can hold as base and factors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..manifest import Manifest
from ..operators import Lowrank, Operator, Patch, Ref, Stored, Sum
from .skeleton import misfit
from .tensors import same_as


@dataclass(frozen=True)
class Slot:
    """One tensor of the archive and the parameters or buffers of the model that it becomes; several where the model
    ties them."""

    tensor: str
    places: tuple[str, ...]


@dataclass(frozen=True)
class Low:
    """A weight as base plus `scale * b^T a`.

    Attributes:
        base: a tensor or a stored array; None for zero.
        a, b: stored arrays, `[rank, columns]` and `[rank, rows]`.
    """

    base: Ref | Stored | None
    a: str
    b: str
    scale: float


def slots(model: nn.Module, manifest: Manifest) -> tuple[list[Slot], list[str]]:
    """Match the model's parameters and persistent buffers with the tensors of an archive, by name.

    As `from_pretrained` does, a model finds its weights in an archive of itself with or without a head: with or
    without `base_model_prefix` in the names.

    Returns:
        The slots, and the parameters that the archive has nothing for.
    """
    prefix = getattr(model, "base_model_prefix", "")
    ties: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        ties.setdefault(id(parameter), []).append(name)
    found, missing = [], []
    for names in ties.values():
        tensors: dict[str, list[str]] = {}
        homeless = []
        for name in names:
            tensor = _stored_name(name, prefix, manifest)
            if tensor is None:
                homeless.append(name)
            else:
                tensors.setdefault(_first_alike(tensor, tensors, manifest), []).append(name)
        if not tensors:
            missing += homeless
        for tensor, places in tensors.items():
            found.append(Slot(tensor, (*places, *homeless)))
            homeless = []
    parameters = {name for names in ties.values() for name in names}
    buffers = {name: _stored_name(name, prefix, manifest) for name in model.state_dict() if name not in parameters}
    found += [Slot(tensor, (name,)) for name, tensor in buffers.items() if tensor is not None]
    return found, missing


def check_shapes(model: nn.Module, found: list[Slot], manifest: Manifest, archive: Path) -> None:
    """Raise `UsageError` where the configuration and the weights do not fit."""
    state = model.state_dict()
    for slot in found:
        needed, stored = list(state[slot.places[0]].shape), list(manifest.tensors[slot.tensor].shape)
        if needed != stored:
            raise misfit(archive, slot.tensor, needed, stored)


def low_rank_form(manifest: Manifest, name: str) -> Low | None:
    """A tensor as base and factors, if its recipe is that, or a patch of it: the patch is left out."""
    same = same_as(manifest, name)
    if same.base is not None:
        return None
    recipe: Operator = manifest.tensors[same.tensor].recipe
    if isinstance(recipe, Patch):
        recipe = recipe.prediction
    base: Ref | Stored | None = None
    if isinstance(recipe, Sum) and len(recipe.terms) == 2:
        first, recipe = recipe.terms
        if not isinstance(first, Ref | Stored):
            return None
        base = first
    if not isinstance(recipe, Lowrank) or not isinstance(recipe.a, Stored) or not isinstance(recipe.b, Stored):
        return None
    if isinstance(base, Ref) and base.base is None:
        base = same_as(manifest, base.tensor)
    return Low(base, recipe.a.array, recipe.b.array, recipe.scale)


def highest_rank(manifest: Manifest) -> int:
    """Of all tensors that are base and factors; 0 if none is."""
    lows = (low_rank_form(manifest, name) for name in manifest.tensors)
    return max((manifest.arrays[low.a].shape[0] for low in lows if low is not None), default=0)


def _stored_name(name: str, prefix: str, manifest: Manifest) -> str | None:
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if candidate in manifest.tensors:
            return candidate
    return None


def _first_alike(tensor: str, others: dict[str, list[str]], manifest: Manifest) -> str:
    """The first of `others` that is the same tensor; or itself."""
    return next((other for other in others if same_as(manifest, other) == same_as(manifest, tensor)), tensor)
