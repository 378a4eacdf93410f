"""Several fine-tunes of one base in one batch: each row of it goes through its own fine-tune.

Base weights are multiplied once for the whole batch, factors are gathered by row and multiplied batch by batch (`bmm`),
as S-LoRA (Sheng et al. 2023) and Punica (Chen et al. 2023) do it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from ..errors import UnsupportedError, UsageError
from .fill import bases_of, cast_of
from .fused import BASES, BasePool, Delta, DeltaConv1D, DeltaEmbedding, Factors, OnBase, Outline
from .skeleton import settings

_Stacks = dict[tuple[Factors, ...], tuple[torch.Tensor, torch.Tensor]]


class MultiTenant(nn.Module):
    """Fused models of one base as one model: `tenants(input_ids, rows=[0, 2, 2])` runs the rows of the batch through
    the first, third and third of them.

    Args:
        models: from `load_model(mode="fused", bases=cache)`, all of one architecture and with one cache. They may be
            swapped or merged later: frozen weights are shared with them, factors and buffers are copied.
        example: inputs of the model by name, with two rows or more, to see once which of its layers get the rows of the
            batch as their first axis; by default the `dummy_inputs` of transformers, which are ids of tokens.

    Layers that are fused in every model gather their factors. A layer that is not, and differs, runs once for each
    model that has rows in the batch.

    Raises:
        UsageError: no models, one that is not fused, or not of one architecture and configuration; or the model does
            not run with `example`.
        UnsupportedError: a module that holds differing weights or buffers is no leaf, or does not have the rows of the
            batch as the first axis of its only input and of its output (relative positions, experts).
    """

    def __init__(self, models: Sequence[nn.Module], example: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if not models or any(type(model) is not type(models[0]) for model in models):
            raise UsageError("models of one architecture are needed", found=[type(model).__name__ for model in models])
        first: Any = models[0]
        for model in models:
            bases_of(model)
        if any(settings(model.config) != settings(first.config) for model in models):
            raise UsageError("models of one configuration are needed")
        copies: dict[int, Any] = {
            id(each): each for model in models for each in model.parameters() if not each.requires_grad
        }
        self.model: Any = copy.deepcopy(first, copies).eval()
        del self.model.__dict__[BASES]  # nothing to be swapped
        everyone = [dict(model.named_modules(remove_duplicate=False)) for model in models]
        different = [
            path
            for path in everyone[0]
            # A path that not all have is inside a fused layer.
            if all(path in modules for modules in everyone) and _differ([modules[path] for modules in everyone])
        ]
        seen = _seen_batch_first(self.model, first.dummy_inputs if example is None else example) if different else set()
        self._selection = Selection(len(models))
        stacks: _Stacks = {}
        for path in different:
            layers = [modules[path] for modules in everyone]
            own = self.model.get_submodule(path)
            if any(not isinstance(layer, Delta) and any(layer.children()) for layer in layers):
                what = f"the module '{path}' has weights that differ, and modules in it"
                raise UnsupportedError(what, hint="Run the models one by one")
            if own not in seen:
                raise UnsupportedError(
                    f"the module '{path}' differs, and does not have the rows of the batch as its input's first axis",
                    hint="Run the models one by one; a module that the example does not reach needs another example",
                )
            stacked = _stacked(layers, own, self._selection, stacks)
            parent, _, leaf = path.rpartition(".")
            self.model.get_submodule(parent).add_module(
                leaf, stacked or PerTenant([copy.deepcopy(layer, copies) for layer in layers], self._selection)
            )

    @contextmanager
    def rows(self, rows: Sequence[int] | torch.Tensor) -> Iterator[Any]:
        """Inside, `model` (which this gives) takes batches of as many rows as these, for the models with these numbers;
        so can `generate`. Each thread chooses for itself."""
        try:
            chosen = torch.as_tensor(rows)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError("rows are numbers of models", expected="integers", found=repr(rows)[:80]) from error
        with self._selection.chosen(chosen):
            yield self.model

    def forward(self, *inputs: Any, rows: Sequence[int] | torch.Tensor, **options: Any) -> Any:
        with self.rows(rows) as model:
            return model(*inputs, **options)


class Selection:
    """Which fine-tune each row of the batch is for; all layers of a model look here. Each thread sees what it chose."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._of_thread = threading.local()  # torch.compile follows it, and no ContextVar

    def __reduce__(self) -> tuple[type[Selection], tuple[int]]:
        return Selection, (self._count,)

    @contextmanager
    def chosen(self, rows: torch.Tensor) -> Iterator[None]:
        """Inside, rows are for these. Raises `UsageError` for numbers of no model."""
        if rows.is_floating_point() or rows.dtype == torch.bool:
            raise UsageError("rows are numbers of models", expected="integers", found=rows.tolist())
        if rows.dim() != 1 or bool(((rows < 0) | (rows >= self._count)).any()):
            raise UsageError("rows are numbers of models", expected=f"0 to {self._count - 1}", found=rows.tolist())
        before = getattr(self._of_thread, "rows", None)
        self._of_thread.rows = rows.long()
        try:
            yield
        finally:
            self._of_thread.rows = before

    def expand(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` with one row for each of the batch, and the numbers `[batch]` of their models, on its device."""
        rows: torch.Tensor | None = getattr(self._of_thread, "rows", None)
        if rows is None:
            raise UsageError(
                "no rows were chosen", hint="Call the MultiTenant, or its model inside rows(...) in the same thread"
            )
        rows = rows.to(x.device)
        if x.shape[0] == 1:  # the same for all rows, such as positions
            x = x.expand(len(rows), *x.shape[1:])
        if x.shape[0] != len(rows):
            raise UsageError("the batch has another size than rows", expected=len(rows), found=x.shape[0])
        return x, rows


class MultiDeltaLinear(OnBase):
    """A linear layer with factors of several fine-tunes.

    Args:
        down, up: `[n, r, in]` and `[n, r, out]`, the scales in them.
        bias: `[n, out]` or None.
        transposed: weights are `[in, out]`, as in `Conv1D`, and not `[out, in]`.
        selection: which rows are whose.
    """

    def __init__(
        self,
        down: torch.Tensor,
        up: torch.Tensor,
        bias: torch.Tensor | None,
        transposed: bool,
        selection: Selection,
    ) -> None:
        super().__init__()
        self.down, self.up = (nn.Parameter(factor, requires_grad=False) for factor in (down, up))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.transposed = transposed
        self._selection = selection

    @property
    def weight(self) -> torch.Tensor:
        """Dtype, device and shape of each fine-tune's."""
        shape = (self.up.shape[2], self.down.shape[2])
        return Outline(shape[::-1] if self.transposed else shape, self.down.dtype, self.down.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: `[batch, ..., in]`; gives `[batch, ..., out]`."""
        x, rows = self._selection.expand(x)
        flat = x.reshape(len(rows), -1, x.shape[-1])
        y = torch.bmm(torch.bmm(flat, self.down[rows].mT), self.up[rows])
        if self.bias is not None:
            y = y + self.bias[rows, None]
        y = y.reshape(*x.shape[:-1], -1)
        base = self.base
        if base is None:
            return y
        return y + F.linear(x, base.t() if self.transposed else base)


class MultiDeltaEmbedding(OnBase):
    """An embedding with factors of several fine-tunes: `lora_a [n, r, width]`, `lora_b [n, r, vocabulary]`."""

    def __init__(self, lora_a: torch.Tensor, lora_b: torch.Tensor, selection: Selection) -> None:
        super().__init__()
        self.lora_a, self.lora_b = (nn.Parameter(factor, requires_grad=False) for factor in (lora_a, lora_b))
        self._selection = selection

    @property
    def weight(self) -> torch.Tensor:
        """Dtype, device and shape of each fine-tune's."""
        return Outline((self.lora_b.shape[2], self.lora_a.shape[2]), self.lora_a.dtype, self.lora_a.device)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """`indices`: `[batch, ...]`; gives `[batch, ..., width]`."""
        indices, rows = self._selection.expand(indices)
        flat = indices.reshape(len(rows), -1)
        taken = self.lora_b.transpose(1, 2)[rows[:, None], flat]
        update = torch.bmm(taken, self.lora_a[rows]).reshape(*indices.shape, -1)
        base = self.base
        return update if base is None else update + F.embedding(indices, base)


class PerTenant(nn.Module):
    """A layer that each fine-tune has for itself: it runs once for each that has rows in the batch."""

    def __init__(self, layers: Sequence[nn.Module], selection: Selection) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.holders = nn.ModuleList(
            layer.holder for layer in layers if isinstance(layer, Delta) and layer.holder is not None
        )
        self._selection = selection

    @property
    def weight(self) -> torch.Tensor:
        """Dtype, device and shape of the first one's."""
        weight: Any = self.layers[0].weight
        return Outline(tuple(weight.shape), weight.dtype, weight.device)

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
    """Whether they are fused, of different kinds, or have different parameters or buffers of their own."""
    first, *others = layers
    if isinstance(first, BasePool | Factors):
        return False  # looked at with the layers that use them
    if any(isinstance(layer, Delta) or type(layer) is not type(first) for layer in layers):
        return True
    mine = _tensors(first)
    return any(
        mine.keys() != theirs.keys() or not all(_same(mine[name], theirs[name]) for name in mine)
        for theirs in map(_tensors, others)
    )


def _tensors(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Parameters and buffers of its own."""
    return {**module._parameters, **module._buffers}


def _same(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    if mine is None or theirs is None or mine is theirs:
        return mine is theirs
    return (mine.dtype, mine.device) == (theirs.dtype, theirs.device) and torch.equal(mine, theirs)


def _seen_batch_first(model: nn.Module, example: Mapping[str, Any]) -> set[nn.Module]:
    """The modules that take one tensor and give one, both with the rows of the batch as the first axis, or one for all
    of them: found by running two batches of different sizes. With a fused layer, those that are tied to it."""
    fits: dict[nn.Module, bool] = {}
    size = 0

    def look(module: nn.Module, inputs: Any, options: Any, output: Any) -> None:
        axes = {each.shape[:1] for each in (*inputs, output) if isinstance(each, torch.Tensor)}
        alone = len(inputs) == 1 and not options and all(isinstance(each, torch.Tensor) for each in (*inputs, output))
        fits[module] = fits.get(module, True) and alone and axes in ({(size,)}, {(1,)})

    device = cast_of(model).device
    tensors = {name: each.to(device) for name, each in example.items() if isinstance(each, torch.Tensor)}
    most = min((len(each) for each in tensors.values() if each.dim()), default=0)
    if most < 2:
        raise UsageError("the example needs tensors of two rows or more", expected="rows of a batch", found=most)
    hooks = [module.register_forward_hook(look, with_kwargs=True) for module in model.modules()]
    try:
        with torch.no_grad():
            for size in (most, most - 1):
                model(**{**example, **{name: each[:size] if each.dim() else each for name, each in tensors.items()}})
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{type(model).__name__} does not run with the example: {str(error)[:200]}",
            hint="Pass inputs of it to MultiTenant: example={'pixel_values': ...}",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    tied = {module.factors: fit for module, fit in fits.items() if isinstance(module, Delta)}
    for module in model.modules():
        if isinstance(module, Delta):
            fits.setdefault(module, tied.get(module.factors, False))
    return {module for module, fit in fits.items() if fit}


def _stacked(
    layers: Sequence[nn.Module], own: nn.Module, selection: Selection, stacks: _Stacks
) -> MultiDeltaLinear | MultiDeltaEmbedding | None:
    """One layer for all fine-tunes on the base that `own` has, a copy of the first layer. None if they are not all
    fused with one base."""
    fused = [layer for layer in layers if isinstance(layer, Delta)]
    first = fused[0] if fused else None
    if first is None or len(fused) < len(layers) or not isinstance(own, Delta):
        return None
    if any(type(layer) is not type(first) or layer.base is not first.base for layer in fused):
        return None
    key = tuple(layer.factors for layer in fused)
    if key not in stacks:
        stacks[key] = _stack(key, first.dtype)
    a, b = stacks[key]
    layer: MultiDeltaLinear | MultiDeltaEmbedding
    if isinstance(first, DeltaEmbedding):
        layer = MultiDeltaEmbedding(a, b, selection)
    else:
        given = [each.bias.detach() for each in fused if each.bias is not None]
        transposed = isinstance(first, DeltaConv1D)
        down, up = (b, a) if transposed else (a, b)
        layer = MultiDeltaLinear(down, up, torch.stack(given) if given else None, transposed, selection)
    layer.refer(own.holder, own.held)
    return layer


def _stack(factors: Sequence[Factors], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors one upon the other, scales in them, those of lower rank filled up with zeros."""
    rank = max(each.rank for each in factors)
    pairs = [each.pair(dtype) for each in factors]
    a, b = (
        torch.stack([F.pad(pair[which].detach(), (0, 0, 0, rank - pair[which].shape[0])) for pair in pairs])
        for which in (0, 1)
    )
    return a, b
