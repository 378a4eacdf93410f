"""Where the tensors of an archive go in a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..manifest import Manifest
from .recipes import same_as
from .skeleton import misfit


@dataclass(frozen=True)
class Slot:
    """One tensor of the archive and the parameters or buffers of the model that it becomes; several where the model
    ties them. `dtype` is what it gets if it is a float."""

    tensor: str
    places: tuple[str, ...]
    dtype: torch.dtype


def slots(model: nn.Module, manifest: Manifest) -> tuple[list[Slot], list[str]]:
    """Match the model's parameters and persistent buffers with the tensors of an archive, by name.

    As `from_pretrained` does, a model finds its weights in an archive of itself with or without a head: with or
    without `base_model_prefix` in the names.

    Returns:
        The slots, and the parameters that the archive has nothing for.
    """
    prefix = getattr(model, "base_model_prefix", "")
    state = model.state_dict()
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
            found.append(Slot(tensor, (*places, *homeless), state[places[0]].dtype))
            homeless = []
    parameters = {name for names in ties.values() for name in names}
    buffers = {name: _stored_name(name, prefix, manifest) for name in state if name not in parameters}
    found += [Slot(tensor, (name,), state[name].dtype) for name, tensor in buffers.items() if tensor is not None]
    return found, missing


def check_shapes(model: nn.Module, found: list[Slot], manifest: Manifest, archive: Path) -> None:
    """Raise `UsageError` where the configuration and the weights do not fit."""
    state = model.state_dict()
    for slot in found:
        needed, stored = list(state[slot.places[0]].shape), list(manifest.tensors[slot.tensor].shape)
        if needed != stored:
            raise misfit(archive, slot.tensor, needed, stored)


def _stored_name(name: str, prefix: str, manifest: Manifest) -> str | None:
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if candidate in manifest.tensors:
            return candidate
    return None


def _first_alike(tensor: str, others: dict[str, list[str]], manifest: Manifest) -> str:
    """The first of `others` that is the same tensor; or itself."""
    return next((other for other in others if same_as(manifest, other) == same_as(manifest, tensor)), tensor)
