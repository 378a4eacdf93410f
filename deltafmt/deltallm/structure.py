"""Which weights of a model become an anchor's weight plus factors, and how many (DeltaLLM, arXiv 2501.18596)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from torch import nn

from ..errors import UsageError
from ..limits import check_count, is_finite
from ..methods.sharing import Explicit, Parts, Sequential, parse_layout
from ..torch.evaluate import parameters
from ..torch.fused import fused_like
from .architecture import block_name, blocks, linears


@dataclass(frozen=True)
class Structure:
    """What is asked for. Exactly one of `rank`, `ranks` and `remove` says how large the factors are.

    Attributes:
        layout: `alternating`, `sequential:K` or `LAYER:ANCHOR,...`, as `deltafmt pack --share` takes it.
        parts: which linear layers: `mlp`, `attention` or `both`.
        keep_first, keep_last: blocks at either end that are neither deltas nor anchors; a map overrides them.
        rank: components of every delta module.
        ranks: the same by the module's name, or as much of its end as tells it from others:
            `{"gate_proj": 64, "down_proj": 128}`, `{"mlp.c_proj": 64, "attn.c_proj": 32}`. Of several ends the longest
            holds; modules that are not named stay as they are.
        remove: fraction of the model's parameters to remove, 0.12 for 12 %; each delta module keeps the same fraction
            of its own parameters.
        delta_layers: how many blocks become deltas; as many as the layout allows if None. Without a measured importance
            it is the last of the layout.
    """

    layout: str = "alternating"
    parts: Parts = "mlp"
    keep_first: int = 2
    keep_last: int = 2
    rank: int | None = None
    ranks: Mapping[str, int] | None = None
    remove: float | None = None
    delta_layers: int | None = None


@dataclass(frozen=True)
class Plan:
    """What that means for one model.

    Attributes:
        anchors: each delta module's name, in the order of the model, and the name of its anchor module, which keeps its
            weight.
        ranks: each delta module's number of components.
    """

    anchors: dict[str, str]
    ranks: dict[str, int]


def plan(model: nn.Module, structure: Structure, importance: Sequence[float] | None = None) -> Plan:
    """Choose delta modules, their anchors and ranks.

    Args:
        importance: of each block, for example `block_influence`. With it, the delta blocks are those whose importances
            have the least sum, among all choices with at most K deltas in a row after an anchor (`sequential:K`;
            `alternating` is K = 1); without it, the layout's fixed places.

    Raises `UsageError` if the structure does not fit the model or the budget cannot be met.
    """
    _check(structure)
    pairs = _layers(len(blocks(model)), structure, importance)
    anchors: dict[str, str] = {}
    shapes: dict[str, tuple[int, int]] = {}
    named: dict[str, str | None] = {}
    for layer, anchor in sorted(pairs.items()):
        prefix, other = block_name(model, layer), block_name(model, anchor)
        theirs = linears(model, anchor, structure.parts)
        for name, module in linears(model, layer, structure.parts).items():
            counterpart = other + name.removeprefix(prefix)
            named[name] = _end(structure.ranks or {}, name)
            if structure.ranks is not None and named[name] is None:
                continue
            if fused_like(module) is None or type(theirs.get(counterpart)) is not type(module):
                raise UsageError(f"{name} ({type(module).__name__}) cannot be a delta of {counterpart}")
            shape, found = weight_shape(module), weight_shape(theirs[counterpart])
            if shape != found:
                raise UsageError(f"{name} cannot be a delta of {counterpart}", expected=shape, found=found)
            anchors[name], shapes[name] = counterpart, shape
    if named and (lost := [end for end in structure.ranks or {} if not any(_ends(name, end) for name in named)]):
        known = dict.fromkeys(name.rpartition(".")[2] for name in named)
        raise UsageError(
            f"ranks names {lost[0]!r}, and no delta module is called so",
            expected=", ".join(known),
            hint="Name modules of the delta layers and of the parts that were asked for",
        )
    if not anchors:
        raise UsageError(
            f"the layout {structure.layout!r} makes no delta module of this model's {len(blocks(model))} blocks",
            hint="Lower keep_first and keep_last, or name the layers: layout='5:4,7:6'",
        )
    if structure.remove is not None:
        return Plan(anchors, ranks_for(structure.remove * parameters(model), parameters(model), shapes))
    ranks = {name: _asked(structure, named[name]) for name in anchors}
    for name, rank in ranks.items():
        rows, columns = shapes[name]
        if rank * (rows + columns) >= rows * columns:
            most = (rows * columns - 1) // (rows + columns)
            raise UsageError(
                f"{name}: factors as large as the weight save nothing", expected=f"at most {most}", found=rank
            )
    return Plan(anchors, ranks)


def _check(structure: Structure) -> None:
    sizes = (structure.rank, structure.ranks, structure.remove)
    if sum(size is not None for size in sizes) != 1:
        raise UsageError("a structure has exactly one of rank, ranks and remove")
    if structure.parts not in ("mlp", "attention", "both"):
        raise UsageError("unknown parts", expected="'mlp', 'attention' or 'both'", found=repr(structure.parts))
    if structure.remove is not None and not (is_finite(structure.remove) and 0 < structure.remove < 1):
        raise UsageError("remove is a fraction of the parameters", expected="0 to 1", found=repr(structure.remove))
    if structure.ranks is not None and not isinstance(structure.ranks, Mapping):
        raise UsageError("ranks is a mapping of names to whole numbers", found=repr(structure.ranks))
    if not isinstance(structure.layout, str):
        raise UsageError("layout is a text", expected="such as 'alternating'", found=repr(structure.layout))
    check_count("rank", structure.rank, 0)
    for end, rank in (structure.ranks or {}).items():
        check_count(f"ranks[{end!r}]", rank, 0)
    check_count("keep_first", structure.keep_first, 0)
    check_count("keep_last", structure.keep_last, 0)
    check_count("delta_layers", structure.delta_layers, 1)


def _asked(structure: Structure, end: str | None) -> int:
    rank = structure.rank if end is None else (structure.ranks or {})[end]
    assert rank is not None
    return rank


def _end(ranks: Mapping[str, int], name: str) -> str | None:
    """The longest of these ends that a module's name has."""
    return max((end for end in ranks if _ends(name, end)), key=len, default=None)


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """Of a linear layer, as it is stored."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    rows, columns = weight.shape
    return rows, columns


# Blocks


def _layers(count: int, structure: Structure, importance: Sequence[float] | None) -> dict[int, int]:
    """The anchor block of each delta block."""
    if importance is not None and len(importance) != count:
        raise UsageError("one importance per block is needed", expected=count, found=len(importance))
    for layer, value in enumerate(() if importance is None else importance):
        if not is_finite(value):
            raise UsageError(f"the importance of block {layer} is no finite number", found=repr(value))
    try:
        layout = parse_layout(structure.layout)
    except ValueError as error:
        raise UsageError(str(error)) from error
    inner = range(structure.keep_first, max(structure.keep_first, count - structure.keep_last))
    wanted = structure.delta_layers
    if isinstance(layout, Sequential) and importance is not None:
        return _least_important(inner, layout.following, wanted, importance)
    pairs = dict(layout.pairs) if isinstance(layout, Explicit) else layout.anchors(inner)
    if unknown := sorted({layer for pair in pairs.items() for layer in pair if layer >= count}):
        raise UsageError(f"the layout names blocks {unknown}; the model has {count}")
    if wanted is None:
        return pairs
    _check_enough(wanted, len(pairs))
    ranked = sorted(pairs, key=lambda layer: (0.0 if importance is None else importance[layer], -layer))
    return {layer: pairs[layer] for layer in ranked[:wanted]}


def _least_important(inner: range, following: int, wanted: int | None, importance: Sequence[float]) -> dict[int, int]:
    """The `wanted` blocks, as many as there can be if None, of least total importance; no more than `following` in a
    row, and before each row its anchor. Among equals, later ones."""
    most = len(inner) - math.ceil(len(inner) / (following + 1))
    count = most if wanted is None else wanted
    _check_enough(count, most)

    @cache
    def best(place: int, row: int, left: int) -> tuple[float, tuple[int, ...]]:
        """Total and deltas from `place` on, after `row` deltas (`following` of them: or no anchor yet)."""
        if left == 0:
            return 0.0, ()
        if place == len(inner):
            return math.inf, ()
        skipped = best(place + 1, 0, left)
        if row == following:
            return skipped
        total, layers = best(place + 1, row + 1, left - 1)
        taken = (total + importance[inner[place]], (inner[place], *layers))
        return taken if taken[0] < skipped[0] else skipped

    anchors: dict[int, int] = {}
    for layer in best(0, following, count)[1]:
        anchors[layer] = anchors.get(layer - 1, layer - 1)
    return anchors


def _check_enough(wanted: int, most: int) -> None:
    if wanted > most:
        raise UsageError("the layout has fewer delta layers", expected=f"at most {most}", found=wanted)


# Ranks


def ranks_for(removed: float, total: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Ranks with which at least `removed` parameters go and hardly more: each module keeps the same fraction of its own
    parameters, and what rounding leaves is handed out one component each, to the modules that lost most by it."""
    dense = sum(rows * columns for rows, columns in shapes.values())
    room = dense - math.ceil(removed)
    if room < 0:
        raise UsageError(
            f"{removed / total:.1%} of the parameters cannot be removed, delta modules have {dense / total:.1%} in all",
            hint="More delta layers, parts='both', or a smaller fraction",
        )
    exact = {name: room / dense * rows * columns / (rows + columns) for name, (rows, columns) in shapes.items()}
    ranks = {name: math.floor(rank) for name, rank in exact.items()}
    room -= sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    for name in sorted(shapes, key=lambda name: exact[name] - ranks[name], reverse=True):
        if sum(shapes[name]) <= room:
            ranks[name] += 1
            room -= sum(shapes[name])
    return ranks
