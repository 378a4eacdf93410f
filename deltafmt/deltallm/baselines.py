"""Other ways to make a causal language model smaller, to be compared with shared layers and deltas.

- `drop_layers`: whole layers go, those that change their input least (ShortGPT, arXiv 2403.03853);
- `merge_layers`: layers go, and what they held is averaged into the layer before each (as in MKA, arXiv 2406.16330);
- `svd_model`: each matrix becomes two factors, without any sharing; weighted by what the inputs are, if that is known
  (as SVD-LLM, arXiv 2403.07378; ASVD, arXiv 2312.05821, knows the size of each input only).

None changes the model it is given, and each gives a new one that holds the same parameters where it can. All parameters
are frozen but factors; a model without any can train a LoRA (`lora_rank`), which goes into its weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..torch.evaluate import parameters
from .architecture import blocks, linears
from .initialise import factors, put_factors, twin
from .structure import Structure, ranks_for, weight_shape


def drop_layers(model: nn.Module, influence: Sequence[float], remove: float) -> nn.Module:
    """Drop the layers of the least influence.

    Args:
        model: a causal language model of transformers.
        influence: of each layer, as `calibration.block_influence` measures it.
        remove: the fraction of the model's parameters to remove. Layers are whole: as many go as come nearest to it.

    Raises:
        UsageError: no layer, or no fewer than all, would go.
    """
    gone = _least(model, influence, remove)
    smaller = twin(model)
    _keep(smaller, [layer for layer in range(len(blocks(model))) if layer not in gone])
    return smaller


def merge_layers(model: nn.Module, influence: Sequence[float], remove: float) -> nn.Module:
    """Average the layers of the least influence into the layer before each.

    Neighbours among them, and the layer before these, become one layer: the mean of their linear layers, weighted by
    their influence, with the norms of the first.

    Args:
        model, influence, remove: as in `drop_layers`. The first layer stays.

    Raises:
        UsageError: as `drop_layers`.
    """
    weights = [max(value, 1e-6) for value in influence]
    gone = _least(model, [math.inf, *influence[1:]], remove)
    smaller = twin(model)
    layers = blocks(smaller)
    kept = [layer for layer in range(len(layers)) if layer not in gone]
    for first, after in zip(kept, [*kept[1:], len(layers)], strict=True):
        group = range(first, after)
        if len(group) > 1:
            _average(smaller, group, [weights[layer] for layer in group])
    _keep(smaller, kept)
    return smaller


def svd_model(
    model: nn.Module,
    remove: float,
    *,
    names: Sequence[str] | None = None,
    moments: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Replace linear layers by the truncated SVD of their weights.

    Args:
        model: a causal language model of transformers.
        remove: the fraction of the model's parameters to remove. All layers keep the same fraction of theirs.
        names: the linear layers; by default those of all MLPs but in the blocks at either end that `Structure` keeps.
        moments: `E[x x^T]` of each layer's input, `[in, in]`, as `calibration.second_moments` measures it. With these
            the factors are those with the least mean squared error of the layer's *output*.

    Raises:
        UsageError: these layers do not have as many parameters as are to go, or are none that factors can stand for.
    """
    if names is None:
        inner = range(Structure.keep_first, len(blocks(model)) - Structure.keep_last)
        names = [name for layer in inner for name in linears(model, layer, "mlp")]
    shapes = {name: weight_shape(model.get_submodule(name)) for name in names}
    ranks = ranks_for(remove * parameters(model), parameters(model), shapes)
    if remove <= 0 or not all(ranks.values()):
        raise UsageError("no rank is left for some layer, or nothing is to be removed", found=remove)
    smaller = twin(model)
    for name, rank in ranks.items():
        moment = None if moments is None else moments[name]
        put_factors(smaller, name, factors(model.get_submodule(name), None, rank, moment))
    return smaller


def lora_rank(model: nn.Module, numbers: int) -> int:
    """The rank, at least 1, with which LoRAs (arXiv 2106.09685) of all linear layers of the blocks have about as many
    numbers: for `Training(lora=)`."""
    return max(1, round(numbers / lora_numbers(model)))


def lora_numbers(model: nn.Module) -> int:
    """How many numbers the LoRAs of all linear layers of the blocks have for each rank."""
    layers = itertools.chain(*(linears(model, layer, "both").values() for layer in range(len(blocks(model)))))
    return sum(sum(weight_shape(module)) for module in layers)


def _least(model: nn.Module, influence: Sequence[float], remove: float) -> set[int]:
    """The layers of the least influence, as many as have about a fraction of the model's parameters."""
    layers = blocks(model)
    if len(influence) != len(layers):
        raise UsageError("one influence for each layer is needed", expected=len(layers), found=len(influence))
    if unknown := [layer for layer, value in enumerate(influence) if math.isnan(value)]:
        raise UsageError(f"the influence of layer {unknown[0]} is no number")
    each = sum(parameter.numel() for parameter in layers.parameters()) / len(layers)
    count = round(remove * parameters(model) / each)
    if not 0 < count < len(layers):
        raise UsageError(
            "no such part of the model consists of whole layers",
            expected=f"between {each / parameters(model):.3f} and {(len(layers) - 1) * each / parameters(model):.3f}",
            found=remove,
        )
    # Of equals, later ones.
    return set(sorted(range(len(layers)), key=lambda layer: (influence[layer], -layer))[:count])


def _keep(model: nn.Module, kept: Sequence[int]) -> None:
    """Leave only some layers in a model, in place, and let it know."""
    layers = blocks(model)
    chosen = [layers[layer] for layer in kept]
    del layers[:]
    for number, layer in enumerate(chosen):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # which part of a cache is this layer's
                module.layer_idx = number  # type: ignore[assignment]
        layers.append(layer)
    config: Any = model.config
    types = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(chosen)
    if types is not None:
        config.layer_types = [types[layer] for layer in kept]


def _average(model: nn.Module, group: Sequence[int], weights: Sequence[float]) -> None:
    """Put the weighted mean of the linear layers of some blocks into the first of these."""
    shares = [weight / sum(weights) for weight in weights]
    alike = zip(*(linears(model, layer, "both").values() for layer in group), strict=True)
    for modules in alike:
        for name, parameter in list(modules[0].named_parameters()):
            parts = (module.get_parameter(name).float() * share for module, share in zip(modules, shares, strict=True))
            mean = torch.stack(list(parts)).sum(0).to(parameter.dtype)
            setattr(modules[0], name, nn.Parameter(mean, requires_grad=False))
