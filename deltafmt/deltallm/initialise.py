"""A model whose delta modules are the anchors' weights plus factors of the difference, to be trained further.

The factors minimise `E |(W - W_anchor - b^T a) x|^2`, x the delta module's inputs: by Eckart and Young the leading left
singular vectors of `(W - W_anchor) C^(1/2)`, `C = E[x x^T]`, and what they project the difference to. Without `C` it is
the truncated singular value decomposition of the difference itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..torch.fused import Factors, fused_like
from .structure import Plan


def delta_model(model: nn.Module, plan: Plan, *, moments: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """A new model that stands beside `model` and shares its parameters; only the delta modules are its own.

    They are `DeltaLinear` or `DeltaConv1D`, whose bases are the weights of the new model's anchor modules. Their
    factors are float32, components in descending order, and the only parameters that require gradients: those of
    `model` do not any more, as they are the same objects. What moves one of the models moves what they share.

    Args:
        moments: of delta modules' names, from `second_moments` of this very `model`: the difference is then weighted by
            the inputs that occur. `[in, in]`.

    Raises `UsageError` for names that the model does not have, and for one without a moment if there are any.
    """
    if moments is not None and (lost := [name for name in plan.anchors if name not in moments]):
        raise UsageError(f"there is no moment of '{lost[0]}'", hint="Measure those of all delta modules")
    made = twin(model)
    for name, anchor in plan.anchors.items():
        own, other = _module(model, name), _module(model, anchor)
        moment = None if moments is None else moments[name]
        put_factors(made, name, factors(own, other, plan.ranks[name], moment))
    for name, anchor in plan.anchors.items():
        made.get_submodule(name).refer(made.get_submodule(anchor))  # type: ignore[operator]
    return made


def twin(model: nn.Module) -> nn.Module:
    """A model of modules of its own, with the same parameters and buffers, all frozen."""
    held: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, held).requires_grad_(False)  # what deepcopy finds in its memo counts as copied


def put_factors(model: nn.Module, name: str, low: Factors) -> None:
    """Put the fused layer with these factors, and without a base, where a linear layer is.

    Raises `UsageError` for a module that has no fused form.
    """
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(name)
    make = fused_like(module)
    if make is None:
        raise UsageError(f"{name} ({type(module).__name__}) has no fused form")
    setattr(model.get_submodule(parent), leaf, make(low).train(module.training))


def factors(module: nn.Module, anchor: nn.Module | None, rank: int, moment: torch.Tensor | None = None) -> Factors:
    """The best `rank` components of the difference between the weights of two linear layers, or of one of them if
    `anchor` is None: float32, on the device of the weight. `Linear` or `Conv1D`; `moment`: `[in, in]`."""
    difference = _weight(module)
    if anchor is not None:
        difference = difference - _weight(anchor)
    if isinstance(module, nn.Linear):
        a, b = low_rank(difference, rank, moment)
    else:  # Conv1D: the weight lies transposed
        b, a = low_rank(difference.t(), rank, moment)
    return Factors(a, b)


def low_rank(matrix: torch.Tensor, rank: int, moment: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`a [rank, in]` and `b [rank, out]`, float32, such that `b^T a` is nearest to `matrix [out, in]`: for inputs with
    `E[x x^T] = moment [in, in]`, or for white ones. Components in descending order, both parts of equal norm.

    Raises `ValueError` for a rank beyond the smaller side.
    """
    rows, columns = matrix.shape
    if not 0 <= rank <= min(rows, columns):
        raise ValueError(f"rank {rank} of a matrix {rows} x {columns}")
    wide = matrix.detach().double()
    # Through the smaller Gram matrix, in float64: no slower than the float32 decomposition, and the same on a GPU.
    if rows <= columns:
        left = _leading(wide @ (wide if moment is None else wide @ moment.to(wide)).t(), rank)
    else:
        weighted = wide if moment is None else wide @ _root(moment.to(wide))
        left = weighted @ _leading(weighted.t() @ weighted, rank)
        left = left / left.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    # With U the leading left singular vectors, U U^T matrix is the best: no root has to be inverted.
    right = left.t() @ wide
    sizes = right.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return (right / sizes).float().contiguous(), (left.t() * sizes).float().contiguous()


def _leading(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """The eigenvectors of the largest eigenvalues, largest first, as columns."""
    vectors: torch.Tensor = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]
    return vectors


def _root(moment: torch.Tensor) -> torch.Tensor:
    """A square root of a moment, which is as good as singular: rounding below zero is cut off."""
    values, vectors = torch.linalg.eigh(moment)
    root: torch.Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().double()


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise UsageError(f"the model has no module '{name}' that the plan names") from error
