"""Operators: the closed table of recipe nodes (spec/operators/), one file each.

Adding one is a change of the specification.
"""

from __future__ import annotations

from ..errors import MalformedError, UnsupportedError
from ..limits import RECIPE_DEPTH
from ..strictjson import Fields
from .base import Facts, Operator, Scope, Source, Target, Value
from .decayed import Decayed
from .lowrank import Lowrank
from .panels import Panels
from .patch import Patch
from .ref import Ref
from .rows import Rows
from .scaled import Scaled
from .stored import Stored
from .sum import Sum

OPERATORS: dict[str, type[Operator]] = {
    kind.op: kind for kind in (Stored, Ref, Sum, Lowrank, Scaled, Rows, Panels, Decayed, Patch)
}

_PLAIN = {"op", "array"}

__all__ = [
    "OPERATORS",
    "Decayed",
    "Facts",
    "Lowrank",
    "Operator",
    "Panels",
    "Patch",
    "Ref",
    "Rows",
    "Scaled",
    "Scope",
    "Source",
    "Stored",
    "Sum",
    "Target",
    "Value",
    "parse_recipe",
]


def parse_recipe(value: object, pointer: str, depth: int = 1) -> Operator:
    """A recipe from its JSON.

    Raises:
        UnsupportedError: an operator that is not in the table (reason `operator`).
        MalformedError: wrong fields (`schema`), too deep (`cycle`).
    """
    if depth > RECIPE_DEPTH:
        raise MalformedError(f"a recipe deeper than {RECIPE_DEPTH} nodes", where=pointer, reason="cycle")
    if isinstance(value, dict) and value.keys() == _PLAIN and value["op"] == "stored" and type(value["array"]) is str:
        return Stored(value["array"])  # nearly every recipe: not worth the general way
    fields = Fields(value, pointer)
    op = fields.text("op")
    kind = OPERATORS.get(op)
    if kind is None:
        raise UnsupportedError(
            f"unknown operator {op[:80]!a}",
            where=pointer,
            hint=f"This version knows {', '.join(OPERATORS)}. {UnsupportedError.next_step}",
            reason="operator",
        )
    recipe = kind.parse(fields, lambda key, operand: parse_recipe(operand, f"{pointer}/{key}", depth + 1), pointer)
    fields.done()
    return recipe
