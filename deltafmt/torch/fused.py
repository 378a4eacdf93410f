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

BASES = "_deltafmt_base_cache"
"""The attribute of a fused model that says where its bases are from."""


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
        lora_b: `[r, rows]`. Both floats, to be trained; or both integers, which stay integers in memory, are converted
            where they are used, and have no gradient: see `trainable`.
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
    wide = torch.promote_types(dtype, torch.float32)  # float16 ends at 65504
    return (a.to(wide) * half).to(dtype), (b.to(wide) * (scale / half)).to(dtype)


class Outline(torch.Tensor):
    """Dtype, device and shape of a weight that is not built: what modeling code looks at. Values it has none: whoever
    uses them gets a `UsageError`."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Outline:
        made: Outline = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any, **__: Any) -> NoReturn:  # type: ignore[override]
        raise UsageError(
            f"the weight of a fused layer is not built, but {func} needs its values",
            hint="Layers have merged_weight(); deltafmt.torch.merge(model) makes them dense, and so does mode='full'",
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Outline({tuple(self.shape)}, {self.dtype}, {self.device})"


class OnBase(nn.Module):
    """A layer that uses a base weight which another module owns.

    Attributes:
        holder, held: the module that owns it, and the name of its attribute; `refer` sets them.
    """

    holder: nn.Module | None
    held: str

    def __init__(self) -> None:
        super().__init__()
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


class Delta(OnBase, ABC):
    """What the fused layers have in common.

    Attributes:
        factors: the layer's own; layers that are tied share them.
        bias: as in the layer that it stands for, or None.
    """

    factors: Factors
    bias: nn.Parameter | None

    def __init__(self, factors: Factors, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.factors = factors
        self.register_parameter("bias", bias)

    @property
    def dtype(self) -> torch.dtype:
        """The weight's: that of the base, or else of float factors."""
        base, of_factors = self.base, self.factors.lora_a.dtype
        if base is not None:
            return base.dtype
        return of_factors if of_factors.is_floating_point else torch.get_default_dtype()

    @property
    def weight(self) -> torch.Tensor:
        """The weight's dtype, device and shape, without values."""
        if torch.compiler.is_compiling():
            return self.merged_weight()  # compilers cannot make an outline, and drop what is not used
        a, b = self.factors.lora_a, self.factors.lora_b
        return Outline((b.shape[1], a.shape[1]), self.dtype, a.device)

    def merged_weight(self) -> torch.Tensor:
        """The weight that this layer has, built anew each time: for whoever cannot do without."""
        base = self.base
        a, b = self.factors.pair(torch.promote_types(self.dtype, torch.float32))
        update = b.t() @ a
        return (update if base is None else base + update).to(self.dtype)

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
        weight = self.merged_weight().detach()
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

        weight = self.merged_weight().detach()
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
        of_rows = self.factors.lora_b[:, indices.flatten()]
        a, b = scaled(self.factors.lora_a, of_rows, self.factors.scale, self.dtype)
        low = (b.t() @ a).reshape(*indices.shape, -1)
        return low if rows is None else rows + low

    def dense(self) -> nn.Embedding:
        weight = self.merged_weight().detach()
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


def trainable(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Turn integer factors of a fused model, which have no gradient, into floats that can be trained, in place.

    Archives without loss hold factors as integers, those of `pack(method="lowrank")` hold floats, which are trainable
    as they are. All other weights stay frozen: other models may share them.
    """
    for module in model.modules():
        if isinstance(module, Factors):
            module.to_floats(dtype)


def merge(model: nn.Module) -> None:
    """Turn all fused layers into ordinary ones, in place, and let the bases go that only they needed.

    Every parameter is the model's own and can be trained after that: those that it shared with other models are copied.
    Layers that were stored as one share one parameter still. `swap` needs a fused model, and takes it no more.
    """
    made: dict[Factors, nn.Parameter] = {}
    for name, layer in deltas(model).items():
        parent, _, leaf = name.rpartition(".")
        dense = layer.dense().train(layer.training)
        dense.weight = made.setdefault(layer.factors, dense.weight)  # type: ignore[arg-type]
        setattr(model.get_submodule(parent), leaf, dense)
    model._modules.pop(POOL, None)
    for name in ("save_pretrained", BASES):
        model.__dict__.pop(name, None)
    _unshare(model, set(made.values()))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def _unshare(model: nn.Module, own: set[nn.Parameter]) -> None:
    """Copy all parameters but the model's own, one at a time. What is tied stays tied."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter not in own:
                places.setdefault(parameter, []).append((module, leaf))
    while places:
        parameter, found = places.popitem()
        copied = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for module, leaf in found:
            module._parameters[leaf] = copied
