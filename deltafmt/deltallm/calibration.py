"""What a model does on some text: the inputs of its linear layers, and how much each block changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from .architecture import blocks


@torch.no_grad()
def second_moments(model: nn.Module, batches: Iterable[torch.Tensor], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """`E[x x^T]` of each named linear layer's inputs: float32 `[in, in]`, on the model's device.

    Args:
        batches: integers `[sequences, tokens]`, anywhere; all tokens count alike.

    Raises `ValueError` without any token.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def gather(name: str, x: torch.Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1]).float()
        gram = (flat.t() @ flat).double()
        sums[name] = sums[name] + gram if name in sums else gram
        counts[name] = counts.get(name, 0) + len(flat)

    def hook(name: str) -> Any:
        return lambda _module, arguments: gather(name, arguments[0])

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in dict.fromkeys(names)]
    _run(model, batches, hooks)
    return {name: (total / counts[name]).float() for name, total in sums.items()}


@torch.no_grad()
def block_influence(model: nn.Module, batches: Iterable[torch.Tensor]) -> list[float]:
    """How much each block changes the hidden states: 1 minus the mean cosine of its input and output, 0 for a block
    that could be left out (ShortGPT, arXiv 2403.03853, equation 1). `batches` as for `second_moments`."""
    stack = blocks(model)
    sums: list[list[torch.Tensor]] = [[] for _ in stack]
    counts = [0] * len(stack)

    def hook(layer: int) -> Any:
        def gather(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            before = arguments[0] if arguments else keywords["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosines = F.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[layer].append(cosines.double().sum())
            counts[layer] += cosines.numel()

        return gather

    hooks = [block.register_forward_hook(hook(layer), with_kwargs=True) for layer, block in enumerate(stack)]
    _run(model, batches, hooks)
    return [1 - float(sum(each)) / count for each, count in zip(sums, counts, strict=True)]


def _run(model: nn.Module, batches: Iterable[torch.Tensor], hooks: Sequence[Any]) -> None:
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    seen = 0
    try:
        for batch in batches:
            model(input_ids=batch.to(device, torch.long), use_cache=False)
            seen += batch.numel()
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    if not seen:
        raise ValueError("the calibration text holds no token")
