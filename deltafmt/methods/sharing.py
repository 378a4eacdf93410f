"""Which tensors of one model share an anchor layer, and whether that makes sense (DeltaLLM, arXiv 2501.18596).

An anchor block keeps its weights; a delta block keeps factors of its difference to the anchor. This pays for models
that were trained that way and hardly ever for others, so `likeness` measures it and `sharing_makes_sense` judges.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from ..checkpoint import Checkpoint
from ..dtypes import Shape
from ..errors import UsageError
from .svd import Float32, energy, spectrum

Part: TypeAlias = Literal["attention", "mlp"]
Parts: TypeAlias = Literal["attention", "mlp", "both"]

_ATTENTION_PARENT = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn?|feed_?forward|denserelu\w*|(shared_)?experts?|intermediate|output|(gate|up|down|gate_up)_proj"
    r"|fc_?(1|2|in|out)|c_fc|w[123]|wi(_[01])?|lin(ear)?_?[12]|dense_(h_to_4h|4h_to_h)",
    re.IGNORECASE,
)
_ATTENTION_LEAF = re.compile(
    r"[qkvo]_(proj|lin)|w?qkv(_proj)?|w[qkvo]|query(_key_value)?|key|value|out_(proj|lin)", re.IGNORECASE
)

_SAME_DIRECTION = 0.1  # a cosine below this is what unrelated layers show
_WORTHWHILE = 0.9  # the anchor must lower the error of the same rank by a tenth
_USABLE = 0.5  # a relative error above this leaves no working layer


@dataclass(frozen=True)
class Sequential:
    """One anchor block serves the ``following`` blocks after it, then the next block is an anchor."""

    following: int

    def anchors(self, layers: Sequence[int]) -> dict[int, int]:
        """The anchor of each delta layer among ``layers``, in ascending order."""
        period = self.following + 1
        return {layer: layers[place - place % period] for place, layer in enumerate(layers) if place % period}


@dataclass(frozen=True)
class Explicit:
    """Each delta layer with its anchor, as the user wrote them."""

    pairs: Mapping[int, int]


Layout: TypeAlias = Sequential | Explicit


@dataclass(frozen=True)
class ShareMap:
    """Which tensors are deltas of which.

    ``anchors`` maps a delta tensor's name to its anchor tensor's. ``layers`` maps a delta layer to its anchor layer.
    ``problems`` says why the request cannot be carried out as asked; empty if it can.
    """

    anchors: dict[str, str]
    layers: dict[int, int]
    problems: tuple[str, ...] = ()


def parse_layout(text: str) -> Layout:
    """Read ``sequential:K``, ``alternating`` (that is, ``sequential:1``), or a map ``LAYER:ANCHOR,...``: ``5:4,6:4``.

    Raises ValueError, fit for the user, if it is none of these, or if a layer has two anchors or an anchor has one.
    """
    stripped = text.strip()
    if stripped == "alternating":
        return Sequential(1)
    if found := re.fullmatch(r"sequential:([0-9]{1,9})", stripped):
        following = int(found[1])
        if following == 0:
            raise ValueError("sequential:K needs K of at least 1, the number of blocks that share each anchor")
        return Sequential(following)
    pairs: dict[int, int] = {}
    for item in stripped.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,9})\s*:\s*([0-9]{1,9})\s*", item)
        if not found:
            raise ValueError(
                f"layout {text!r} is neither 'alternating' nor 'sequential:K' nor a map LAYER:ANCHOR,... like '5:4,6:4'"
            )
        layer, anchor = int(found[1]), int(found[2])
        if layer in pairs:
            raise ValueError(f"the layout names an anchor for layer {layer} twice")
        pairs[layer] = anchor
    if chained := sorted(set(pairs) & set(pairs.values())):
        raise ValueError(f"layers {_listed(chained)} are both deltas and anchors; an anchor keeps its own weights")
    return Explicit(pairs)


def share_map(
    tensors: Mapping[str, tuple[str, Shape]],
    layout: Layout,
    *,
    keep_first: int = 2,
    keep_last: int = 2,
    parts: Parts = "mlp",
) -> ShareMap:
    """Which tensors of a model share an anchor's.

    Shared are the two-dimensional linear weights of attention, MLP or both, where the anchor layer has a tensor of the
    same name but for the layer number, with the same dtype and shape. Norms, biases and MoE routers never are.

    Args:
        tensors: name -> (dtype, shape) of every tensor of the model.
        keep_first, keep_last: blocks left untouched at either end of each stack; an explicit map overrides them.

    Raises ValueError for an unknown ``parts`` or negative counts; what only the model shows is in ``problems``.
    """
    if parts not in ("attention", "mlp", "both"):
        raise ValueError(f"parts must be 'attention', 'mlp' or 'both', got {parts!r}")
    if keep_first < 0 or keep_last < 0:
        raise ValueError(f"keep_first and keep_last must not be negative, got {keep_first} and {keep_last}")
    stacks = _stacks(tensors)
    if not stacks:
        return ShareMap({}, {}, ("no transformer blocks were recognised in the tensor names",))
    if isinstance(layout, Explicit):
        known = {layer for blocks in stacks.values() for layer in blocks}
        named = set(layout.pairs) | set(layout.pairs.values())
        if unknown := sorted(named - known):
            problem = f"the layout names layers {_listed(unknown)}; the model has layers {_listed(sorted(known))}"
            return ShareMap({}, {}, (problem,))

    has_experts = any("expert" in name.lower() for name in tensors)
    anchors: dict[str, str] = {}
    layers: dict[int, int] = {}
    for blocks in stacks.values():
        ordered = sorted(blocks)
        inner = ordered[keep_first : max(keep_first, len(ordered) - keep_last)]
        pairs = layout.pairs if isinstance(layout, Explicit) else layout.anchors(inner)
        for layer, anchor in sorted(pairs.items()):
            if layer not in blocks or anchor not in blocks:
                continue
            for suffix, name in blocks[layer].items():
                counterpart = blocks[anchor].get(suffix)
                part = _part(suffix, has_experts)
                if counterpart is None or part is None or parts not in (part, "both"):
                    continue
                if len(tensors[name][1]) == 2 and tensors[name] == tensors[counterpart]:
                    anchors[name] = counterpart
                    layers[layer] = anchor
    if anchors:
        return ShareMap(anchors, layers)
    sizes = _listed(sorted(len(blocks) for blocks in stacks.values()))
    kept = f", of which the first {keep_first} and the last {keep_last} stay untouched"
    if isinstance(layout, Explicit):
        kept = ""
    wanted = "attention or MLP" if parts == "both" else parts
    return ShareMap({}, {}, (f"the layout shares no {wanted} weight of this model: it has {sizes} blocks{kept}",))


def shared_layers(checkpoint: Checkpoint, layout: str, parts: Parts) -> ShareMap:
    """`share_map` of a checkpoint. Raises `UsageError` if nothing can be shared so."""
    facts = {name: (info.dtype.name, info.shape) for name, info in checkpoint.tensors.items()}
    try:
        shared = share_map(facts, parse_layout(layout), parts=parts)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if shared.problems:
        raise UsageError("; ".join(shared.problems), where=checkpoint.location)
    return shared


def _stacks(names: Iterable[str]) -> dict[str, dict[int, dict[str, str]]]:
    """Block stacks by what precedes the layer number: prefix -> layer -> suffix -> tensor name.

    A number counts layers if some name occurs with another number in its place; in each name, the first such does.
    """
    seen: dict[tuple[str, str], set[int]] = defaultdict(set)
    for name in names:
        for prefix, layer, suffix in _numbers(name):
            seen[prefix, suffix].add(layer)
    counting = {prefix for (prefix, _), layers in seen.items() if len(layers) > 1}
    stacks: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in names:
        for prefix, layer, suffix in _numbers(name):
            if prefix in counting:
                stacks[prefix][layer][suffix] = name
                break
    return stacks


def _numbers(name: str) -> list[tuple[str, int, str]]:
    """Each number among the dotted components of ``name``, with what precedes and what follows it."""
    components = name.split(".")
    return [
        (".".join(components[:place]), int(component), ".".join(components[place + 1 :]))
        for place, component in enumerate(components)
        if component.isascii() and component.isdecimal() and len(component) < 10
    ]


def _part(suffix: str, has_experts: bool) -> Part | None:
    """What a tensor of a block belongs to, by its name after the layer number; None for norms, routers and the unknown.

    Parents decide before leaves: BERT's ``attention.output.dense`` is attention, RWKV's ``feed_forward.key`` is not.
    """
    *components, kind = suffix.split(".")
    if kind == "bias" or any("norm" in component.lower() for component in components[-1:]):
        return None
    if any(component in ("router", "shared_expert_gate") for component in components):
        return None
    if has_experts and components[-1:] == ["gate"]:
        return None
    if any(_ATTENTION_PARENT.search(component) for component in components):
        return "attention"
    if any(_MLP.fullmatch(component) for component in components):
        return "mlp"
    if any(_ATTENTION_LEAF.fullmatch(component) for component in components):
        return "attention"
    return None


def _listed(numbers: Sequence[int]) -> str:
    """Numbers for a message; runs as ``0-11``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


@dataclass(frozen=True)
class Likeness:
    """How much an anchor helps one weight at one rank. Errors are relative to the Frobenius norm of the weight.

    ``cosine``: of weight and anchor as vectors. ``delta_error``: of anchor plus the best ``rank`` components of the
    difference. ``plain_error``: of the best ``rank`` components of the weight itself, without an anchor.
    """

    rank: int
    cosine: float
    delta_error: float
    plain_error: float


@dataclass(frozen=True)
class Verdict:
    """Whether sharing makes sense; ``reasons`` carry the numbers, for or against."""

    sensible: bool
    reasons: tuple[str, ...]


def sample_pairs(shared: ShareMap, count: int = 6) -> list[tuple[str, str]]:
    """Up to ``count`` (delta tensor, anchor tensor) pairs, spread evenly over the map."""
    pairs = list(shared.anchors.items())
    wanted = min(count, len(pairs))
    return [pairs[(2 * place + 1) * len(pairs) // (2 * wanted)] for place in range(wanted)]


def likeness(weight: Float32, anchor: Float32, rank: int, *, seed: int = 0) -> Likeness:
    """Measure what ``anchor`` [out, in] does for ``weight`` [out, in] at ``rank`` components.

    Raises ValueError if the shapes differ, or as `truncated_svd`.
    """
    if weight.shape != anchor.shape:
        raise ValueError(f"a weight of shape {list(weight.shape)} cannot share an anchor of shape {list(anchor.shape)}")
    own, other = energy(weight), energy(anchor)
    if own == 0:
        return Likeness(rank, 0.0, 0.0 if other == 0 else math.inf, 0.0)
    delta = spectrum(weight - anchor, rank, seed=seed)
    plain = spectrum(weight, rank, seed=seed)
    # |w - x|^2 = |w|^2 + |x|^2 - 2 w.x, all measured in float64
    cosine = (own + other - delta.total) / (2 * math.sqrt(own * other)) if other > 0 else 0.0
    return Likeness(rank, float(np.clip(cosine, -1, 1)), math.sqrt(delta.tail / own), math.sqrt(plain.tail / own))


def sharing_makes_sense(sample: Sequence[Likeness]) -> Verdict:
    """Judge sharing by a sample of its pairs: the median must beat plain low rank clearly, and leave a working layer.

    Ordinary models: cosine about 0, error 0.96-1.10 with an anchor against 0.68-0.78 without, at a tenth of full rank.
    Raises ValueError for an empty sample.
    """
    if not sample:
        raise ValueError("the sample of shared pairs is empty")
    cosine = statistics.median(pair.cosine for pair in sample)
    delta = statistics.median(pair.delta_error for pair in sample)
    plain = statistics.median(pair.plain_error for pair in sample)
    rank = statistics.median_low(pair.rank for pair in sample)
    numbers = f"at rank {rank}, relative error {delta:.3g} with the anchor against {plain:.3g} without"
    reasons: list[str] = []
    if delta > _WORTHWHILE * plain:
        reasons.append(f"the anchor does not help: {numbers}")
    if delta > _USABLE:
        reasons.append(f"too little would be left of the weights: {numbers}")
    if not reasons:
        return Verdict(True, (f"the anchor helps: {numbers} (median of {len(sample)} pairs)",))
    if abs(cosine) < _SAME_DIRECTION:
        reasons.insert(0, f"the layers are not alike: cosine {cosine:.3f} (median of {len(sample)} pairs)")
    return Verdict(False, tuple(reasons))
