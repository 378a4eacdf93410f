"""What the recipes of an archive make of its tensors: the same as another, or base and factors."""

from __future__ import annotations

from dataclasses import dataclass

from ..edge import PrefixScope
from ..manifest import Manifest
from ..operators import Lowrank, Operator, Ref, Scope, Stored, Sum
from ..operators.forms import base_and_lowrank
from ..reader import Archive


@dataclass(frozen=True)
class Low:
    """A weight as base plus `scale * b^T a`.

    Attributes:
        base: a tensor or a stored array; None for zero.
        a, b: stored arrays, `[rank, columns]` and `[rank, rows]`.
    """

    base: Ref | Stored | None
    a: str
    b: str
    scale: float


def same_as(manifest: Manifest, name: str) -> Ref:
    """The tensor that `name` is, of the archive or of a base: references that add nothing are followed to their end."""
    while isinstance(recipe := manifest.tensors[name].recipe, Ref):
        if recipe.base is not None:
            return recipe
        name = recipe.tensor
    return Ref(name)


def low_rank_form(manifest: Manifest, name: str) -> Low | None:
    """A tensor as base and factors, if its recipe is that, or a patch of it: the patch is left out."""
    same = same_as(manifest, name)
    found = None if same.base is not None else base_and_lowrank(manifest.tensors[same.tensor].recipe)
    if found is None:
        return None
    base, (a, b) = found.base, found.lowrank.operands()
    if not (isinstance(base, Ref | Stored | None) and isinstance(a, Stored) and isinstance(b, Stored)):
        return None
    if isinstance(base, Ref) and base.base is None:
        base = same_as(manifest, base.tensor)
    return Low(base, a.array, b.array, found.lowrank.scale)


def prefix(archive: Archive, name: str, rank: int) -> tuple[Operator, Scope] | None:
    """What makes a tensor of the first `rank` components of its factors, without the patch that made it exact.

    None if it has no more than these. What it is added to is whole, whatever that is made of.
    """
    low = low_rank_form(archive.manifest, name)
    if low is None or archive.manifest.arrays[low.a].shape[0] <= rank:
        return None
    part = Lowrank(Stored(low.a), Stored(low.b), low.scale if rank else 0.0)  # a product has one component at least
    recipe = part if low.base is None else Sum((low.base, part))
    return recipe, PrefixScope(archive.manifest, frozenset({low.a, low.b}), max(rank, 1))
