"""What a recipe is as a whole, for those who take it apart."""

from __future__ import annotations

from typing import NamedTuple

from .base import Operator
from .lowrank import Lowrank
from .patch import Patch
from .sum import Sum


class BaseAndLowrank(NamedTuple):
    """Something plus a low-rank product; a base of None is zero."""

    base: Operator | None
    lowrank: Lowrank


def base_and_lowrank(recipe: Operator) -> BaseAndLowrank | None:
    """A recipe as base and low-rank product, if it is that or a patch of it: the patch is left out."""
    if isinstance(recipe, Patch):
        recipe = recipe.prediction
    if isinstance(recipe, Lowrank):
        return BaseAndLowrank(None, recipe)
    if isinstance(recipe, Sum) and len(recipe.terms) == 2:
        base, part = recipe.terms
        return BaseAndLowrank(base, part) if isinstance(part, Lowrank) else None
    return None
