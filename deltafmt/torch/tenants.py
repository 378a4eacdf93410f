"""Several fine-tunes of one base in one batch: each row of it goes through its own fine-tune.

Base weights are multiplied once for the whole batch, factors are gathered by row and multiplied batch by batch (`bmm`),
as S-LoRA (Sheng et al. 2023) and Punica (Chen et al. 2023) do it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from ..errors import UnsupportedError, UsageError
from .fill import bases_of
from .fused import BasePool, Delta, DeltaConv1D, DeltaEmbedding, Factors
from .skeleton import settings


class MultiTenant(nn.Module):
    """Fused models of one base as one model: `tenants(input_ids, rows=[0, 2, 2])` runs the rows of the batch through
    the first, third and third of them.

    Args:
        models: from `load_model(mode="fused", bases=cache)`, all of one architecture and with one cache. They stay as
            they are; what they have in common is shared with them, factors are copied.

    Layers that are fused in every model gather their factors. A layer that is not, and differs, runs once for each
    model that has rows in the batch.

    Raises:
        UsageError: no models, one that is not fused, or not of one architecture and configuration.
        UnsupportedError: a module that holds differing weights is no leaf.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models or any(type(model) is not type(models[0]) for model in models):
            raise UsageError("models of one architecture are needed", found=[type(model).__name__ for model in models])
        first: Any = models[0]
        for model in models:
            bases_of(model)
        if any(settings(model.config) != settings(first.config) for model in models):
            raise UsageError("models of one configuration are needed")
        shared = {id(tensor): tensor for tensor in (*first.parameters(), *first.buffers())}
        self.model: Any = copy.deepcopy(first, shared)
        self._selection = Selection(len(models))
        stacks: dict[tuple[Factors, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        everyone = [dict(model.named_modules(remove_duplicate=False)) for model in models]
        for path in everyone[0]:
            layers = [modules[path] for modules in everyone if path in modules]
            if len(layers) < len(models) or not (isinstance(layers[0], Delta) or _differ(layers)):
                continue  # inside a fused layer, or the same in all
            parent, _, leaf = path.rpartition(".")
            self.model.get_submodule(parent).add_module(leaf, _together(layers, path, self._selection, stacks))

    @contextmanager
    def rows(self, rows: Sequence[int] | torch.Tensor) -> Iterator[Any]:
        """Inside, `model` (which this gives) takes batches of as many rows as these, for the models with these numbers;
        so can `generate`."""
        try:
            chosen = torch.as_tensor(rows)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError("rows are numbers of models", expected="integers", found=repr(rows)[:80]) from error
        self._selection.choose(chosen)
        try:
            yield self.model
        finally:
            self._selection.choose(None)

    def forward(self, *inputs: Any, rows: Sequence[int] | torch.Tensor, **options: Any) -> Any:
        with self.rows(rows) as model:
            return model(*inputs, **options)


class Selection:
    """Which fine-tune each row of the batch is for; all layers of a model look here."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._rows: torch.Tensor | None = None

    def choose(self, rows: torch.Tensor | None) -> None:
        """Raises `UsageError` for numbers of no model."""
        if rows is not None and (rows.is_floating_point() or rows.dtype == torch.bool):
            raise UsageError("rows are numbers of models", expected="integers", found=rows.tolist())
        if rows is not None and (rows.dim() != 1 or bool(((rows < 0) | (rows >= self._count)).any())):
            raise UsageError("rows are numbers of models", expected=f"0 to {self._count - 1}", found=rows.tolist())
        self._rows = None if rows is None else rows.long()

    def expand(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` with one row for each of the batch, and the numbers `[batch]` of their models, on its device."""
        if self._rows is None:
            raise UsageError("no rows were chosen", hint="Call the MultiTenant, or its model inside rows(...)")
        rows = self._rows.to(x.device)
        if x.shape[0] == 1:  # the same for all rows, such as positions
            x = x.expand(len(rows), *x.shape[1:])
        if x.shape[0] != len(rows):
            raise UsageError("the batch has another size than rows", expected=len(rows), found=x.shape[0])
        return x, rows


class MultiDeltaLinear(nn.Module):
    """A linear layer with factors of several fine-tunes.

    Args:
        base: the layer that has the base: `DeltaLinear` or `DeltaConv1D`, of which only the base is used.
        down, up: `[n, r, in]` and `[n, r, out]`, the scales in them.
        bias: `[n, out]` or None.
        selection: which rows are whose.
    """

    like: Delta

    def __init__(
        self, base: Delta, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None, selection: Selection
    ) -> None:
        super().__init__()
        object.__setattr__(self, "like", base)
        self.down, self.up = (nn.Parameter(factor, requires_grad=False) for factor in (down, up))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._selection = selection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: `[batch, ..., in]`; gives `[batch, ..., out]`."""
        x, rows = self._selection.expand(x)
        flat = x.reshape(len(rows), -1, x.shape[-1])
        y = torch.bmm(torch.bmm(flat, self.down[rows].mT), self.up[rows])
        if self.bias is not None:
            y = y + self.bias[rows, None]
        y = y.reshape(*x.shape[:-1], -1)
        base = self.like.base
        if base is None:
            return y
        return y + F.linear(x, base.t() if isinstance(self.like, DeltaConv1D) else base)


class MultiDeltaEmbedding(nn.Module):
    """An embedding with factors of several fine-tunes: `lora_a [n, r, width]`, `lora_b [n, r, vocabulary]`."""

    like: Delta

    def __init__(self, base: Delta, lora_a: torch.Tensor, lora_b: torch.Tensor, selection: Selection) -> None:
        super().__init__()
        object.__setattr__(self, "like", base)
        self.lora_a, self.lora_b = (nn.Parameter(factor, requires_grad=False) for factor in (lora_a, lora_b))
        self._selection = selection

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """`indices`: `[batch, ...]`; gives `[batch, ..., width]`."""
        indices, rows = self._selection.expand(indices)
        flat = indices.reshape(len(rows), -1)
        taken = self.lora_b.transpose(1, 2)[rows[:, None], flat]
        update = torch.bmm(taken, self.lora_a[rows]).reshape(*indices.shape, -1)
        base = self.like.base
        return update if base is None else update + F.embedding(indices, base)


class PerTenant(nn.Module):
    """A layer that each fine-tune has for itself: it runs once for each that has rows in the batch."""

    def __init__(self, layers: Sequence[nn.Module], selection: Selection) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._selection = selection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: `[batch, ...]`."""
        x, rows = self._selection.expand(x)
        result: torch.Tensor | None = None
        for number in sorted(set(rows.tolist())):
            mine = rows == number
            part = self.layers[number](x[mine])
            if result is None:
                result = part.new_empty((len(rows), *part.shape[1:]))
            result[mine] = part
        assert result is not None
        return result


def _differ(layers: Sequence[nn.Module]) -> bool:
    """Whether they are of different kinds, or have different parameters of their own."""
    first, *others = layers
    if isinstance(first, BasePool | Factors):
        return False  # looked at with the layers that use them
    if any(type(other) is not type(first) for other in others):
        return True
    return any(
        mine is not theirs and not (mine is not None and theirs is not None and torch.equal(mine, theirs))
        for other in others
        for mine, theirs in zip(first._parameters.values(), other._parameters.values(), strict=True)
    )


def _together(
    layers: Sequence[nn.Module],
    path: str,
    selection: Selection,
    stacks: dict[tuple[Factors, ...], tuple[torch.Tensor, torch.Tensor]],
) -> nn.Module:
    """One layer for all fine-tunes."""
    fused = [layer for layer in layers if isinstance(layer, Delta)]
    if len(fused) == len(layers) and all(
        type(layer) is type(fused[0]) and layer.base is fused[0].base for layer in fused
    ):
        return _stacked(fused, selection, stacks)
    if any(not isinstance(layer, Delta) and any(layer.children()) for layer in layers):
        raise UnsupportedError(f"the module '{path}' has weights that differ, and modules in it")
    return PerTenant(layers, selection)


def _stacked(
    layers: Sequence[Delta],
    selection: Selection,
    stacks: dict[tuple[Factors, ...], tuple[torch.Tensor, torch.Tensor]],
) -> nn.Module:
    first = layers[0]
    key = tuple(layer.factors for layer in layers)
    if key not in stacks:
        stacks[key] = _stack(key, torch.float32 if first.base is None else first.base.dtype)
    a, b = stacks[key]
    if isinstance(first, DeltaEmbedding):
        return MultiDeltaEmbedding(first, a, b, selection)
    biases = [layer.bias for layer in layers]
    given = [bias.detach() for bias in biases if bias is not None]
    down, up = (b, a) if isinstance(first, DeltaConv1D) else (a, b)
    return MultiDeltaLinear(first, down, up, torch.stack(given) if given else None, selection)


def _stack(factors: Sequence[Factors], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors one upon the other, scales in them, those of lower rank filled up with zeros."""
    rank = max(each.rank for each in factors)
    pairs = [each.pair(dtype) for each in factors]
    a, b = (
        torch.stack([F.pad(pair[which].detach(), (0, 0, 0, rank - pair[which].shape[0])) for pair in pairs])
        for which in (0, 1)
    )
    return a, b
