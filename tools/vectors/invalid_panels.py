"""Invalid recipes with `panels`: steps 4, 5 and 8 of spec/reasons.md."""

from __future__ import annotations

from vectors.draft import Draft, ref
from vectors.invalid_exact import U, recipe
from vectors.spoil import add
from vectors.valid_exact import plus
from vectors.valid_panels import node
from vectors.values import weights

recipe("panels-of-wide", "operand", "panels of what is wide", node(plus(U, U), 2, 2))
recipe("panels-shape", "operand", "panels of fewer rows than the tensor has", node(U, 2, 2), (6, 3))
recipe("panels-turned", "operand", "panels of as many elements in another shape", node(U, 2, 2), (3, 4))
recipe("panels-dimensions", "operand", "panels of a matrix for a 3-d tensor", node(U, 2, 2), (4, 3, 1))
recipe("panels-of-vector", "operand", "panels of a vector", node(ref("m"), 2, 2), (4,), "F32")
recipe("panels-of-scalar", "operand", "panels of a 0-d tensor", node(ref("one"), 1, 1), (), "F32")
recipe("panels-dtype", "operand", "panels of another dtype than the tensor", node(U, 2, 2), dtype="F16")
recipe("panels-no-tensor", "operand", "a tensor that does not exist, in panels", node(ref("nobody"), 2, 2))
for key in ("rows", "columns"):
    recipe(f"panels-without-{key}", "schema", f"no {key}", {k: v for k, v in node(U, 2, 2).items() if k != key})
    recipe(f"panels-no-{key}", "schema", f"0 {key}", node(U, 2, 2) | {key: 0})
    recipe(f"panels-negative-{key}", "schema", f"-1 {key}", node(U, 2, 2) | {key: -1})
    recipe(f"panels-{key}-float", "schema", f"2.0 {key}", node(U, 2, 2) | {key: 2.0})
    recipe(f"panels-{key}-true", "schema", f"{key} that are true", node(U, 2, 2) | {key: True})
    recipe(f"panels-{key}-too-many", "schema", f"2^63 {key}", node(U, 2, 2) | {key: 2**63})


def narrow() -> Draft:
    draft = Draft()
    x = draft.array("x", weights("narrow panels", "BF16", 1, 4097))
    draft.exact("w", weights("narrow panels", "BF16", 1, 4097), node(x, 1, 1))
    return draft


add("panels-narrow", "operand", "4,097 panels side by side", narrow)
recipe("panels-list", "schema", "panels of a list", node(U, 2, 2) | {"x": [U]})
recipe("panels-key", "schema", "panels with an unknown key", node(U, 2, 2) | {"axis": 1})
recipe("panels-operator", "operator", "an unknown operator within panels", node({"op": "take"}, 2, 2))
recipe("cycle-in-panels", "cycle", "panels of itself", node(ref("w"), 2, 2))
recipe("coverage-digest-on-panels", "coverage", "a digest on panels of a bounded tensor", node(ref("bounded"), 2, 2))
recipe("digest-of-panels", "digest", "panels of what was stored row by row", node(U, 2, 2))
