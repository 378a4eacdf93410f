"""Layers whose weight is `base + scale * b^T a`, computed without ever building that sum.

For a linear layer `y = x W^T + scale (x a^T) b + bias` (LoRA, Hu et al. 2021, equation 3, with the factors as an
archive holds them). The base belongs to somebody else and may serve many layers and models; a layer owns its factors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from ..errors import UsageError

_Layer = TypeVar("_Layer", bound=nn.Module)


POOL = "deltafmt_bases"
"""The module of a model that holds bases which are no layer's own weight."""


class BasePool(nn.Module):
    """Base weights that no layer of the model owns by itself, as frozen parameters `base_0`, `base_1`, ..."""

    def add(self, weight: nn.Parameter) -> str:
        """Hold one more; returns its name."""
        name = f"base_{len(self._parameters)}"
        self.register_parameter(name, weight)
        return name


class Factors(nn.Module):
    """The low-rank part of a weight `[rows, columns]`: `scale * lora_b^T lora_a`.

    Args:
        lora_a: `[r, columns]`, component 0 first.
        lora_b: `[r, rows]`. Both floats, to be trained; or both integers, which stay integers in memory and are
            converted where they are used.
        scale: of integers a power of two.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def __init__(self, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float = 1.0) -> None:
        super().__init__()
        floats = lora_a.is_floating_point()
        self.lora_a = nn.Parameter(lora_a, requires_grad=floats)
        self.lora_b = nn.Parameter(lora_b, requires_grad=floats)
        self.scale = scale

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]

    def pair(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`a` and `b` as `dtype`, the scale in them."""
        return scaled(self.lora_a, self.lora_b, self.scale, dtype)

    def prefix(self, rank: int) -> Factors:
        """The first `rank` components, as views: each prefix is the best of its length that the writer knew."""
        return Factors(self.lora_a.detach()[:rank], self.lora_b.detach()[:rank], self.scale)

    def to_floats(self, dtype: torch.dtype = torch.float32) -> None:
        """Turn integer factors into floats that can be trained."""
        if not self.lora_a.is_floating_point():
            a, b = self.pair(dtype)
            self.lora_a, self.lora_b, self.scale = nn.Parameter(a.detach()), nn.Parameter(b.detach()), 1.0

    def extra_repr(self) -> str:
        return f"rank={self.rank}, dtype={self.lora_a.dtype}, scale={self.scale:g}"


def scaled(a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors as `dtype`, each with about half of the scale's exponent, so that large integers do not overflow."""
    if scale == 1:
        return a.to(dtype), b.to(dtype)
    half = 2.0 ** (math.frexp(scale)[1] // 2)
    return a.to(dtype) * half, b.to(dtype) * (scale / half)


class Delta(nn.Module, ABC):
    """What the fused layers have in common.

    Attributes:
        factors: the layer's own; layers that are tied share them.
        bias: as in the layer that it stands for, or None.
        holder, held: the module that owns the base, and the name of its attribute; `refer` sets them.
    """

    factors: Factors
    bias: nn.Parameter | None
    holder: nn.Module | None
    held: str

    def __init__(self, factors: Factors, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.factors = factors
        self.register_parameter("bias", bias)
        self.refer(None)

    def refer(self, holder: nn.Module | None, name: str = "weight") -> None:
        """Take the base weight from a module that owns it, which does not become part of this one: no key of a state
        dict is added, and what moves or copies the model moves and copies the base once. None: the base is zero."""
        object.__setattr__(self, "holder", holder)
        self.held = name

    @property
    def base(self) -> torch.Tensor | None:
        """The base weight, as its owner has it now. None if it is zero."""
        if self.holder is None:
            return None
        found: torch.Tensor = getattr(self.holder, self.held)
        return found

    @property
    def weight(self) -> torch.Tensor:
        """The weight that this layer has, built anew each time: for whoever cannot do without."""
        base = self.base
        wide = torch.float32 if base is None or base.dtype.itemsize < 4 else base.dtype
        a, b = self.factors.pair(wide)
        update = b.t() @ a
        return update if base is None else (base + update).to(base.dtype)

    @abstractmethod
    def dense(self) -> nn.Module:
        """The ordinary layer with this weight."""


class DeltaLinear(Delta):
    """Stands for `nn.Linear`: weight `[out, in]`, `lora_a [r, in]`, `lora_b [r, out]`.

    Raises `RuntimeError`, as torch does, for inputs of another width.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: `[..., in]`; gives `[..., out]`."""
        base = self.base
        y = None if base is None else F.linear(x, base, self.bias)
        if self.factors.rank == 0 and y is not None:
            return y
        a, b = self.factors.pair(x.dtype)
        return _added(y, self.bias, F.linear(x, a), b)

    def dense(self) -> nn.Linear:
        weight = self.weight.detach()
        return _filled(nn.Linear(weight.shape[1], weight.shape[0], self.bias is not None, "meta"), weight, self.bias)

    @property
    def in_features(self) -> int:
        return self.factors.lora_a.shape[1]

    @property
    def out_features(self) -> int:
        return self.factors.lora_b.shape[1]


class DeltaConv1D(Delta):
    """Stands for `Conv1D` of transformers, a linear layer with weight `[in, out]`: `lora_a [r, out]`,
    `lora_b [r, in]`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x`: `[..., in]`; gives `[..., out]`."""
        base = self.base
        y = None if base is None else F.linear(x, base.t(), self.bias)
        if self.factors.rank == 0 and y is not None:
            return y
        a, b = self.factors.pair(x.dtype)
        return _added(y, self.bias, F.linear(x, b), a)

    def dense(self) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        weight = self.weight.detach()
        with torch.device("meta"):
            layer: nn.Module = Conv1D(weight.shape[1], weight.shape[0])
        return _filled(layer, weight, self.bias)

    @property
    def nx(self) -> int:
        return self.factors.lora_b.shape[1]

    @property
    def nf(self) -> int:
        return self.factors.lora_a.shape[1]


class DeltaEmbedding(Delta):
    """Stands for `nn.Embedding`: weight `[vocabulary, width]`, `lora_a [r, width]`, `lora_b [r, vocabulary]`."""

    def __init__(self, factors: Factors, padding_idx: int | None = None) -> None:
        super().__init__(factors)
        self.padding_idx = padding_idx

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """`indices`: integers `[...]`; gives `[..., width]`."""
        base = self.base
        rows = None if base is None else F.embedding(indices, base, self.padding_idx)
        if self.factors.rank == 0 and rows is not None:
            return rows
        dtype = rows.dtype if rows is not None else torch.get_default_dtype()
        of_rows = self.factors.lora_b[:, indices.flatten()]
        a, b = scaled(self.factors.lora_a, of_rows, self.factors.scale, dtype)
        low = (b.t() @ a).reshape(*indices.shape, -1)
        return low if rows is None else rows + low

    def dense(self) -> nn.Embedding:
        weight = self.weight.detach()
        layer = nn.Embedding(weight.shape[0], weight.shape[1], self.padding_idx, device="meta")
        return _filled(layer, weight, None)

    @property
    def num_embeddings(self) -> int:
        return self.factors.lora_b.shape[1]

    @property
    def embedding_dim(self) -> int:
        return self.factors.lora_a.shape[1]


def _added(y: torch.Tensor | None, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`y`, which has the bias in it, or else the bias, and `down @ up` added to it in the same pass."""
    if y is None:
        return down @ up if bias is None else down @ up + bias
    return torch.addmm(y.reshape(-1, y.shape[-1]), down.reshape(-1, down.shape[-1]), up).reshape(y.shape)


def _filled(layer: _Layer, weight: torch.Tensor, bias: nn.Parameter | None) -> _Layer:
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = bias
    return layer


def fused_like(module: nn.Module) -> Callable[[Factors], Delta] | None:
    """What makes the fused layer that can stand for a module with a weight; None if there is none.

    Only the very classes: one derived from them may do something else with its weight.
    """
    if type(module) is nn.Linear:
        return lambda factors: DeltaLinear(factors, module.bias)
    if type(module) is nn.Embedding and module.max_norm is None and not (module.sparse or module.scale_grad_by_freq):
        return lambda factors: DeltaEmbedding(factors, module.padding_idx)
    if type(module).__module__ == "transformers.pytorch_utils" and type(module).__name__ == "Conv1D":
        return lambda factors: DeltaConv1D(factors, module.bias)  # type: ignore[arg-type]
    return None


def deltas(model: nn.Module) -> dict[str, Delta]:
    """The fused layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Delta)}


def no_plain_checkpoint(*_: Any, **__: Any) -> NoReturn:
    """Takes the place of `save_pretrained`: what that would write, no `from_pretrained` could read back."""
    raise UsageError(
        "a fused or lazy model has no plain checkpoint",
        hint="Make a fused one dense first, with deltafmt.torch.merge(model); or load it with mode='full'",
    )


def merge(model: nn.Module) -> None:
    """Turn all fused layers into ordinary ones, in place, and let the bases go that only they needed.

    Every parameter can be trained after that. Layers that were stored as one share one parameter still.
    """
    made: dict[Factors, nn.Parameter] = {}
    for name, layer in deltas(model).items():
        parent, _, leaf = name.rpartition(".")
        dense = layer.dense().train(layer.training)
        dense.weight = made.setdefault(layer.factors, dense.weight)  # type: ignore[arg-type]
        setattr(model.get_submodule(parent), leaf, dense)
    model._modules.pop(POOL, None)
    model.__dict__.pop("save_pretrained", None)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
