"""What can train beside the factors of delta modules: norms, and low-rank updates of the other linear layers."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..torch.fused import POOL, BasePool, Delta, Factors, deltas, fused_like
from .architecture import blocks, family


def own_norms(student: nn.Module) -> None:
    """Give the student norms of its own, that can be trained."""
    for module in student.modules():
        if "norm" in type(module).__name__.lower():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    own = parameter.detach().clone()
                    module._parameters[name] = nn.Parameter(own, requires_grad=own.is_floating_point())


def add_lora(student: nn.Module, rank: int, seed: int) -> list[str]:
    """Put factors that add nothing yet over every linear layer of the blocks that is neither a delta nor the anchor of
    one. Their weights go into the model's pool of bases. Returns their names."""
    anchors = {id(delta.holder) for delta in deltas(student).values()}
    path = family(student).blocks
    pool = student._modules.get(POOL) or BasePool()
    assert isinstance(pool, BasePool)
    random = torch.Generator().manual_seed(seed)
    made: dict[nn.Module, Delta] = {}
    added = []
    for name, module in list(blocks(student).named_modules(prefix=path, remove_duplicate=False)):
        make = None if isinstance(module, Delta | Factors | nn.Embedding) else fused_like(module)
        if make is None or id(module) in anchors:
            continue
        if module not in made:
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            rows, columns = weight.shape
            # As PEFT begins a LoRA: the one factor uniform, the other zero.
            a = torch.empty(rank, columns).uniform_(-1, 1, generator=random) / math.sqrt(columns)
            factors = Factors(a.to(weight.device), torch.zeros(rank, rows, device=weight.device))
            made[module] = make(factors)
            made[module].refer(pool, pool.add(weight))
        parent, _, leaf = name.rpartition(".")
        student.get_submodule(parent)._modules[leaf] = made[module]
        added.append(name)
    if added:
        student.add_module(POOL, pool)
    return added


def merge_lora(student: nn.Module, added: list[str]) -> None:
    """Make ordinary layers again of what `add_lora` made."""
    made: dict[Delta, nn.Module] = {}
    held = []
    for name in added:
        parent, _, leaf = name.rpartition(".")
        layer = student.get_submodule(name)
        assert isinstance(layer, Delta)
        if layer not in made:
            made[layer] = layer.dense().eval()
            made[layer].requires_grad_(False)
            held.append(layer.held)
        student.get_submodule(parent)._modules[leaf] = made[layer]
    pool = student._modules.get(POOL)
    for name in held:
        assert pool is not None
        del pool._parameters[name]
    if pool is not None and not pool._parameters:
        del student._modules[POOL]
