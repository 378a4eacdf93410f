"""Delta layers brought nearer to their anchors by what does not change what they compute.

A layer's function stays when the channels of its MLP, its heads, or the heads within a group trade places, and when a
factor moves from one of its weights to the next. Anchor and delta layer were trained apart, so which of these equal
layers lies nearest to the anchor is worth finding before the difference is taken (as for whole models: Ainsworth et
al., "Git Re-Basin", arXiv 2209.04836, section 3.2).

- Channels: rows of gate and up with columns of down; heads: rows of q, k and v with columns of o. The pairing with the
  largest inner product between the layer and its anchor.
- Scales, with signs: columns of the layers that read a norm, against its weight and bias; rows of up against columns of
  down, if the MLP is gated; rows of v against columns of o. The anchor, divided by the scales, is what a layer finds
  of it: where the two are not alike, the layer grows, and the anchor weighs less in it. All are powers of two, so that
  no weight is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from .architecture import FAMILIES, block_name, blocks, family, submodule
from .assignment import assign
from .structure import Plan

_LARGEST = 3  # exponent of a scale
_PAIRINGS = 2  # how often places are found, given the scales, and scales, given the places
_ROUNDS = 3  # of scales, each kind given the other


@torch.no_grad()
def align(model: nn.Module, plan: Plan, *, channels: bool = True, heads: bool = True, scales: bool = True) -> None:
    """Change the delta layers of `model` in place, so that their weights lie nearer to their anchors'.

    The model computes what it did; anchors and all other layers stay as they are. Moments of inputs that were measured
    before do not hold any more. No parameter of a delta layer may be another layer's, too.

    Raises `UsageError` for models whose symmetries are not known: no family's `model_types` has theirs.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    names = family(model)
    if kind not in names.model_types:
        known = sorted(each for other in FAMILIES for each in other.model_types)
        raise UsageError(
            "this model's symmetries are not known",
            expected=", ".join(known),
            found=kind,
            hint="Do without align: a delta model does not depend on it",
        )
    for layer in range(len(blocks(model))):
        prefix = block_name(model, layer)
        if any(f"{prefix}.{name}" in plan.anchors for name in names.mlp):
            _align_mlp(_mlp(model, plan, prefix), model.get_submodule(f"{prefix}.{names.mlp_norm}"), channels, scales)
        if any(f"{prefix}.{name}" in plan.anchors for name in names.attention):
            norm = model.get_submodule(f"{prefix}.{names.attention_norm}")
            _align_attention(_attention(model, plan, prefix), norm, heads, scales)


def _align_mlp(mlp: _Mlp, norm: nn.Module, channels: bool, scales: bool) -> None:
    for _ in range(_PAIRINGS if channels and scales else 1):
        if channels:
            _match_channels(mlp, signs=scales)
        if scales:
            _scale_mlp(mlp)
    _apply(norm, mlp.ins, mlp.down)


def _align_attention(attention: _Attention, norm: nn.Module, heads: bool, scales: bool) -> None:
    for _ in range(_PAIRINGS if heads and scales else 1):
        if heads:
            _match_heads(attention)
        if scales:
            _scale_attention(attention)
    _apply(norm, [attention.q, attention.k, attention.v], attention.o)


# A layer in parts


class _Slice:
    """Some rows of a linear layer: the weight as `[out, in]` where it lies, however the layer stores it.

    Attributes:
        bias: of these rows, or None.
        anchor: the same rows of the anchor's weight; None for a layer that is no delta.
        rows, columns: scales to be applied to the weight: `[out]` and `[in]`, float64.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, anchor: torch.Tensor | None) -> None:
        self.weight, self.bias, self.anchor = weight, bias, anchor
        self.rows = torch.ones(len(weight), dtype=torch.float64, device=weight.device)
        self.columns = torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)

    def pair(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The weight and what its scales leave of the anchor, relative to the weight's norm; nothing without anchor."""
        if self.anchor is not None:
            weight = self.weight.double()
            size = weight.norm().clamp_min(torch.finfo(torch.float64).tiny)
            yield weight / size, self.anchor.double() / (self.rows[:, None] * self.columns * size)

    def reorder_rows(self, order: torch.Tensor) -> None:
        self.weight.copy_(self.weight[order])
        if self.bias is not None:
            self.bias.copy_(self.bias[order])

    def reorder_columns(self, order: torch.Tensor) -> None:
        self.weight.copy_(self.weight[:, order])

    def apply_scales(self) -> None:
        self.weight.mul_((self.rows[:, None] * self.columns).to(self.weight.dtype))
        if self.bias is not None:
            self.bias.mul_(self.rows.to(self.bias.dtype))


@dataclass(frozen=True)
class _Mlp:
    """`ins` are gate and up if it is gated, or else the one layer before the activation."""

    ins: list[_Slice]
    down: _Slice

    @property
    def gated(self) -> bool:
        return len(self.ins) == 2


@dataclass(frozen=True)
class _Attention:
    """`q` and `o` have `groups * heads` heads, `k` and `v` one for each group."""

    q: _Slice
    k: _Slice
    v: _Slice
    o: _Slice
    groups: int
    heads: int


def _mlp(model: nn.Module, plan: Plan, prefix: str) -> _Mlp:
    names = family(model)
    ins = _parts(model, plan, prefix, names.ins, (1, 1) if names.gated else (1,))
    return _Mlp(ins, _split(model, plan, f"{prefix}.{names.down}")[0])


def _attention(model: nn.Module, plan: Plan, prefix: str) -> _Attention:
    config: Any = model.config
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    names = family(model)
    q, k, v = _parts(model, plan, prefix, names.qkv, (heads, groups, groups))
    return _Attention(q, k, v, _split(model, plan, f"{prefix}.{names.output}")[0], groups, heads // groups)


def _parts(
    model: nn.Module, plan: Plan, prefix: str, ways: tuple[tuple[str, ...], ...], shares: tuple[int, ...]
) -> list[_Slice]:
    """The parts of a block that are a layer each, or one layer in these proportions, whichever way the model has."""
    way = next(way for way in ways if submodule(model, f"{prefix}.{way[0]}") is not None)
    if len(way) == len(shares):
        return [_split(model, plan, f"{prefix}.{name}")[0] for name in way]
    return _split(model, plan, f"{prefix}.{way[0]}", shares)


def _split(model: nn.Module, plan: Plan, name: str, shares: tuple[int, ...] = (1,)) -> list[_Slice]:
    """The rows of one layer, cut in these proportions."""
    module = model.get_submodule(name)
    weight, bias = _oriented(module), module.bias
    assert bias is None or isinstance(bias, torch.Tensor)
    anchor = _oriented(model.get_submodule(plan.anchors[name])) if name in plan.anchors else None
    slices, begin = [], 0
    for share in shares:
        rows = slice(begin, begin + len(weight) * share // sum(shares))
        own_bias = None if bias is None else bias.detach()[rows]
        slices.append(_Slice(weight[rows], own_bias, None if anchor is None else anchor[rows]))
        begin = rows.stop
    return slices


def _oriented(module: nn.Module) -> torch.Tensor:
    """The weight of a `Linear`, or of a `Conv1D` transposed: `[out, in]`, a view."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().t()


# Places


def _match_channels(mlp: _Mlp, signs: bool) -> None:
    """With `signs`, a channel of a gated MLP may be negated between up and down: its scale does that afterwards."""
    size = len(mlp.ins[0].weight)
    if mlp.gated and signs:
        gate, up = mlp.ins
        _reset(up, mlp.down)
        gain = _gain(size, [gate]) + _gain(size, [up], [mlp.down]).abs()
    else:
        gain = _gain(size, mlp.ins, [mlp.down])
    order = _assigned(gain)
    for each in mlp.ins:
        each.reorder_rows(order)
    mlp.down.reorder_columns(order)


def _match_heads(attention: _Attention) -> None:
    """The best order within each pair of groups, and with these gains the best order of groups."""
    q, k, v, o = attention.q, attention.k, attention.v, attention.o
    groups, heads = attention.groups, attention.heads
    _reset(v, o)
    of_heads = _gain(groups * heads, [q], [o]).cpu().view(groups, heads, groups, heads)
    of_groups = _gain(groups, [k, v]).cpu()
    within = torch.empty(groups, groups, heads, dtype=torch.long)
    for place in range(groups):
        for own in range(groups):
            gain = of_heads[place, :, own]
            within[place, own] = order = _assigned(gain)
            of_groups[place, own] += gain[torch.arange(heads), order].sum()
    group_order = _assigned(of_groups)
    head_order = torch.cat([own * heads + within[place, own] for place, own in enumerate(group_order.tolist())])
    q.reorder_rows(_elements(head_order, len(q.weight)).to(q.weight.device))
    o.reorder_columns(_elements(head_order, o.weight.shape[1]).to(o.weight.device))
    for each in (k, v):
        each.reorder_rows(_elements(group_order, len(each.weight)).to(each.weight.device))


def _gain(parts: int, rows: Sequence[_Slice], columns: Sequence[_Slice] = ()) -> torch.Tensor:
    """Inner products of each of the anchor's `parts`, which are rows or columns, with each of the layer's own."""
    gain = torch.zeros(parts, parts, dtype=torch.float64, device=rows[0].weight.device)
    pairs = [pair for each in rows for pair in each.pair()]
    pairs += [(weight.t(), anchor.t()) for each in columns for weight, anchor in each.pair()]
    for weight, anchor in pairs:
        gain += anchor.reshape(parts, -1) @ weight.reshape(parts, -1).t()
    return gain


def _assigned(gain: torch.Tensor) -> torch.Tensor:
    """For each of the anchor's places, which of the layer's own comes there."""
    return torch.from_numpy(assign(gain.cpu().numpy())).to(gain.device)


def _elements(order: torch.Tensor, size: int) -> torch.Tensor:
    """An order of parts as an order of the elements that they consist of."""
    return torch.arange(size).view(len(order), -1)[order].flatten()


# Scales


def _scale_mlp(mlp: _Mlp) -> None:
    for _ in range(_ROUNDS):
        _fit_columns(mlp.ins)
        if mlp.gated:
            up, down = mlp.ins[1], mlp.down
            _reset(up, down)
            up.rows = _fitted(_products(up, 1), _products(down, 0))
            down.columns = 1 / up.rows


def _scale_attention(attention: _Attention) -> None:
    v, o = attention.v, attention.o
    groups, heads = attention.groups, attention.heads
    for _ in range(_ROUNDS):
        _fit_columns([attention.q, attention.k, v])
        _reset(v, o)
        of_output = _products(o, 0).view(2, groups, heads, -1).sum(2).flatten(1)  # all heads of a group read its v
        v.rows = _fitted(_products(v, 1), of_output)
        o.columns = 1 / v.rows.view(groups, 1, -1).expand(-1, heads, -1).flatten()


def _reset(rows: _Slice, columns: _Slice) -> None:
    """Forget the scales between one layer's rows and the next layer's columns."""
    rows.rows.fill_(1)
    columns.columns.fill_(1)


def _fit_columns(ins: list[_Slice]) -> None:
    """The scales of the inputs that these layers share."""
    for each in ins:
        each.columns.fill_(1)
    products = torch.stack([_products(each, 0) for each in ins]).sum(0)
    columns = _fitted(products, torch.zeros_like(products))
    for each in ins:
        each.columns = columns


def _products(each: _Slice, along: int) -> torch.Tensor:
    """Inner products of weight and anchor, and of the anchor with itself, along rows (1) or columns (0): `[2, n]`."""
    products = torch.zeros(2, each.weight.shape[1 - along], dtype=torch.float64, device=each.weight.device)
    for weight, anchor in each.pair():
        products += torch.stack([(weight * anchor).sum(along), (anchor * anchor).sum(along)])
    return products


def _fitted(divided: torch.Tensor, multiplied: torch.Tensor) -> torch.Tensor:
    """For each place the scale s with the least `|w - x / s|^2 + |v - y s|^2`, given the `_products` `[2, n]` of w and
    x, and of v and y. 1 where there is no anchor."""
    sizes = 2.0 ** torch.arange(-_LARGEST, _LARGEST + 1, dtype=torch.float64, device=divided.device)
    scales = torch.cat([sizes, -sizes])[:, None]
    errors = divided[1] / scales**2 - 2 * divided[0] / scales + multiplied[1] * scales**2 - 2 * multiplied[0] * scales
    best = scales[errors.argmin(0), 0]
    return torch.where(divided[1] + multiplied[1] > 0, best, torch.ones_like(best))


def _apply(norm: nn.Module, ins: list[_Slice], out: _Slice) -> None:
    for parameter in (norm.weight, getattr(norm, "bias", None)):
        if parameter is not None:
            assert isinstance(parameter, torch.Tensor)
            parameter.div_(ins[0].columns.to(parameter.dtype))
    for each in (*ins, out):
        each.apply_scales()
