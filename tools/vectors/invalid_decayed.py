"""Invalid recipes with `decayed`: steps 2, 4, 5 and 8 of spec/reasons.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from vectors.draft import Draft, ref
from vectors.invalid_exact import fixed
from vectors.spoil import add, manifest, put
from vectors.valid import corrected
from vectors.valid_decayed import node, table_of
from vectors.valid_exact import plus, times, whole
from vectors.values import Json, Tensor, bits, numbers, tensor, weights

U, TABLE, SMALL = ref("u", "base"), ref("table"), ref("small")


def parts() -> Draft:
    """`w` = `u`, decayed; with further arrays and tensors for recipes to misuse, all arrays in use anyway."""
    draft = Draft()
    draft.with_base({"u": weights("decayed parts", "F32", 4, 3)})
    small = table_of([0, 9, 30], [1, 2, -5])
    draft.stored("table", table_of([0, 2**20, 2**21], [1, 2, -5]))
    draft.stored("small", small)
    for dtype in ("I32", "U64", "U16"):
        draft.stored(f"{dtype} table", Tensor(dtype, [2, 2], tensor(dtype, dtype, 2, 2).data))
    draft.stored("F32 table", weights("float table", "F32", 2, 3))
    for shape in ([], [2], [6], [1, 6], [3, 2], [6, 1], [2, 3, 1], [1, 2, 3], [2, 0]):
        data = small.data[: 4 if shape == [] else 8 if shape == [2] else 0 if 0 in shape else 24]
        draft.stored(f"table {shape}", Tensor("U32", shape, data))
    draft.lossy("lossy table", small, draft.array("lossy table", small))
    draft.stored("half", weights("half", "F16", 4, 3))
    draft.stored("brain", weights("brain", "BF16", 4, 3))
    draft.stored("double", weights("double", "F64", 4, 3))
    draft.stored("small float", tensor("decayed 8 bits", "F8_E4M3", 4, 3))
    draft.stored("signed", whole("I32", [4, 3], range(12)))
    draft.stored("residual", bits("U16", *[0] * 12)._replace(shape=[4, 3]))
    draft.stored("one", numbers("F32", [], [0.5]))
    x = weights("lossy x", "F32", 4, 3)
    draft.lossy("lossy", x, draft.array("lossy", x))
    a, b = weights("decayed a", "F32", 2, 3), weights("decayed b", "F32", 2, 4)
    low = {"op": "lowrank", "a": draft.array("a", a), "b": draft.array("b", b)}
    draft.approximate("bounded", "F32", [4, 3], low)
    draft.computed("w", "F32", [4, 3], node(U, TABLE))
    return draft


def recipe(
    name: str, reason: str, description: str, changed: Any, dtype: str = "F32", shape: Sequence[int] = (4, 3)
) -> None:
    """`w` has another recipe, and shape or dtype."""
    manifest(name, reason, description, put(fixed(changed, shape, dtype), "tensors", "w"), parts)


# Operands: x ---------------------------------------------------------------------------------------

recipe("decayed-wide", "operand", "a sum, decayed", node(plus(U, U), TABLE))
recipe("decayed-scaled", "operand", "what is scaled, decayed, in a sum", plus(node(times(U, ref("one")), TABLE), U))
recipe("decayed-signed", "operand", "integers, decayed", node(ref("signed"), TABLE), "I32")
recipe("decayed-unsigned", "operand", "a table as x", node(ref("table"), TABLE), "U32", (2, 3))
recipe("decayed-f64", "operand", "F64, decayed", node(ref("double"), TABLE), "F64")
recipe("decayed-f64-in-sum", "operand", "F64, decayed, in a sum", plus(U, node(ref("double"), TABLE)))
recipe("decayed-f8", "operand", "an 8-bit float, decayed", node(ref("small float"), SMALL), "F8_E4M3")
recipe("decayed-lossy", "operand", "an approximation, decayed", node(ref("lossy"), TABLE))
recipe("decayed-bounded", "operand", "a bounded tensor, decayed", node(ref("bounded"), TABLE))
recipe("decayed-rows-of-bounded", "operand", "rows of it, decayed", node({"op": "rows", "x": ref("bounded")}, TABLE))
manifest(
    "decayed-bounded-approximation",
    "operand",
    "a bounded tensor, decayed, as an approximation",
    put({"dtype": "F32", "shape": [4, 3], "recipe": node(ref("bounded"), TABLE), "rel_error": 0.5}, "tensors", "w"),
    parts,
)

# Operands: the table -------------------------------------------------------------------------------

for dtype in ("I32", "U64", "U16", "F32"):
    recipe(f"decayed-table-{dtype.lower()}", "operand", f"a table of {dtype}", node(U, ref(f"{dtype} table")))
for label, shape in (
    ("scalar", "[]"),
    ("of-two", "[2]"),
    ("vector", "[6]"),
    ("one-row", "[1, 6]"),
    ("three-rows", "[3, 2]"),
    ("turned", "[6, 1]"),
    ("third-dimension", "[2, 3, 1]"),
    ("first-dimension", "[1, 2, 3]"),
    ("empty", "[2, 0]"),
):
    recipe(f"decayed-table-{label}", "operand", f"a table of shape {shape}", node(U, ref(f"table {shape}")))
recipe(
    "decayed-table-empty-f16",
    "operand",
    "a table of shape [2, 0] for F16",
    node(ref("half"), ref("table [2, 0]")),
    "F16",
)
recipe("decayed-table-lossy", "operand", "a table that is an approximation", node(U, ref("lossy table")))
recipe("decayed-table-wide", "operand", "a table that is wide", node(U, plus(ref("F32 table"), ref("F32 table"))))
recipe("decayed-table-decayed", "operand", "a table that is decayed floats", node(U, node(ref("F32 table"), TABLE)))
recipe(
    "decayed-table-by-rows", "operand", "a table by rows: of the tensor's shape", node(U, {"op": "rows", "x": TABLE})
)
recipe("decayed-no-array", "operand", "a table that does not exist", node(U, {"op": "stored", "array": "Table"}))
recipe("decayed-no-tensor", "operand", "a table by a tensor that does not exist", node(U, ref("nobody")))
recipe("decayed-no-base-tensor", "operand", "a table that the base lacks", node(U, ref("table", "base")))


def too_long(columns: int, dtype: str, *shape: int, rows: int | None = None) -> Callable[[], Draft]:
    """A table of zeros for a tensor of this shape, or for so many rows of it."""

    def make() -> Draft:
        draft = Draft()
        width = 4 if dtype == "F32" else 2
        x = draft.array("x", Tensor(dtype, list(shape), bytes(width * math.prod(shape))), "none", "zstd")
        table = draft.array("table", Tensor("U32", [2, columns], bytes(8 * columns)), "none", "zstd")
        if rows is None:
            draft.computed("w", dtype, list(shape), node(x, table))
        else:
            draft.computed("w", dtype, [rows, *shape[1:]], node({"op": "rows", "x": x}, table))
        return draft

    return make


for name, description, make in (
    ("bf16", "129 columns for BF16 of 129 elements", too_long(129, "BF16", 129)),
    ("f16", "1,025 columns for F16 of 1,025 elements", too_long(1025, "F16", 1025)),
    ("f32", "65,537 columns for F32 of 65,537 elements", too_long(65537, "F32", 65537)),
    ("f32-elements", "13 columns for F32 of 12 elements", too_long(13, "F32", 4, 3)),
    ("bf16-elements", "13 columns for BF16 of 12 elements", too_long(13, "BF16", 4, 3)),
    ("scalar", "2 columns for what has no dimensions", too_long(2, "F32")),
    ("no-elements", "2 columns for what has no elements", too_long(2, "F32", 0, 3)),
    ("rows", "7 columns for 2 rows of 4 rows of 3 elements", too_long(7, "BF16", 4, 3, rows=2)),
    ("no-rows", "2 columns for no rows of 4 rows of 3 elements", too_long(2, "F32", 4, 3, rows=0)),
):
    add(f"decayed-table-long-{name}", "operand", description, make)

# Operands: what it is used for ---------------------------------------------------------------------

recipe("decayed-narrower", "operand", "decayed F32 for a BF16 tensor", node(U, TABLE), "BF16")
recipe("decayed-wider", "operand", "decayed BF16 for an F32 tensor", node(ref("brain"), SMALL))
recipe("decayed-other-16-bits", "operand", "decayed BF16 for an F16 tensor", node(ref("brain"), SMALL), "F16")
recipe("decayed-to-integers", "operand", "decayed F32 for an I32 tensor", node(U, TABLE), "I32")
recipe("decayed-turned", "operand", "decayed weights of another shape", node(U, TABLE), shape=(3, 4))
recipe("decayed-flat", "operand", "decayed weights for a vector", node(U, TABLE), shape=(12,))
recipe(
    "decayed-residual",
    "operand",
    "a residual that is decayed",
    {"op": "patch", "prediction": U, "residual": node(U, TABLE)},
)
MARGIN = {"groups": {"by": "margin", "bounds": [4]}}
recipe(
    "margin-of-decayed",
    "operand",
    "a margin of decayed weights",
    {"op": "patch", "prediction": node(U, TABLE), "residual": {"op": "stored", "array": "residual"}} | MARGIN,
    "BF16",
)


def of_other_chunks() -> Draft:
    draft = Draft()
    draft.with_base({"u": weights("decayed groups", "BF16", 40)})
    table = draft.array("table", table_of([0, 9, 30], [1, 2, -5]))
    corrected(draft, "v", "BF16", [40], ref("u", "base"), "exponent", [119, 121], 16, "planes")
    corrected(draft, "w", "BF16", [40], node(ref("v"), table), "exponent", [119, 121], 8, "planes")
    return draft


add(
    "groups-of-other-chunks-decayed",
    "operand",
    "groups of decayed weights that have groups in other chunks",
    of_other_chunks,
)

# Keys and operators --------------------------------------------------------------------------------

recipe("decayed-without-table", "schema", "decayed without a table", {"op": "decayed", "x": U})
recipe("decayed-without-x", "schema", "decayed without x", {"op": "decayed", "table": TABLE})
recipe("decayed-key", "schema", "decayed with an unknown key", node(U, TABLE) | {"steps": 3})
recipe("decayed-scale", "schema", "decayed with a scale", node(U, TABLE) | {"scale": TABLE})
recipe("decayed-table-list", "schema", "a table in the manifest", {"op": "decayed", "x": U, "table": [[0, 9], [1, 2]]})
recipe("decayed-table-nodes", "schema", "a list of tables", {"op": "decayed", "x": U, "table": [TABLE]})
recipe("decayed-table-text", "schema", "a table by the name of an array", {"op": "decayed", "x": U, "table": "table"})
recipe("decayed-table-null", "schema", "a table that is null", {"op": "decayed", "x": U, "table": None})
recipe("decayed-table-without-op", "schema", "a table without an operator", node(U, {"array": "table"}))
recipe("decayed-x-list", "schema", "a list of weights", {"op": "decayed", "x": [U], "table": TABLE})
recipe("operator-in-decayed", "operator", "an unknown operator as x", node({"op": "grown"}, TABLE))
recipe("operator-in-table", "operator", "an unknown operator as a table", node(U, {"op": "histogram"}))

# References ----------------------------------------------------------------------------------------

recipe("cycle-in-decayed", "cycle", "itself, decayed", node(ref("w"), TABLE))


def nested(x: Json, levels: int, of: Callable[[Json], Json]) -> Json:
    for _ in range(levels - 1):
        x = of(x)
    return x


def table_in_a_ring(m: Json) -> None:
    m["tensors"]["w"] = fixed(node(U, ref("ring")), dtype="F32")
    m["tensors"]["ring"] = fixed(ref("ring"), (2, 3), "U32")


recipe("cycle-deep-decayed", "cycle", "decayed again and again, 33 nodes deep", nested(U, 33, lambda x: node(x, TABLE)))
manifest("cycle-in-table", "cycle", "a table that refers to itself", table_in_a_ring, parts)
recipe(
    "cycle-deep-table",
    "cycle",
    "a table of rows of rows: 33 nodes deep",
    node(ref("F32 table"), nested({"op": "stored", "array": "table"}, 32, lambda x: {"op": "rows", "x": x})),
    shape=(2, 3),
)
recipe(
    "cycle-deep-table-by-reference",
    "cycle",
    "a table that is a reference, the 33rd node",
    node(ref("F32 table"), nested(TABLE, 31, lambda x: {"op": "rows", "x": x})),
    shape=(2, 3),
)


def many_nodes(m: Json) -> None:
    """Of `decayed-many-nodes`, whose `w` has 4,096 nodes, with one table by reference: a node more."""
    stored = node(U, {"op": "stored", "array": "table"})
    m["tensors"]["s"] = fixed(plus(*[stored] * 21), dtype="F32")
    m["tensors"]["one more"] = fixed(plus(*[stored] * 20, node(U, TABLE)), dtype="F32")
    m["tensors"]["w"] = fixed(plus(*[ref("s")] * 62, ref("one more")), dtype="F32")


manifest("cycle-many-tables", "cycle", "4,097 nodes, of which tables are 1,324", many_nodes, parts)

# Values --------------------------------------------------------------------------------------------

recipe("digest-of-decayed", "digest", "decayed weights that are others than promised", node(U, TABLE))


def spoiled(base: dict[str, Tensor]) -> Callable[[], Draft]:
    """A base of a table, which is another when it comes to reading; or none."""

    def make() -> Draft:
        draft = Draft()
        draft.with_base({"table": table_of([0, 9, 30], [1, 2, -5])})
        x = draft.array("x", weights("table in a base", "BF16", 4, 3))
        draft.computed("w", "BF16", [4, 3], node(x, ref("table", "base")))
        tensors = draft.base_tensors
        draft.with_base(base)
        draft.base_tensors, draft.base = tensors, draft.base if base else {}
        return draft

    return make


add("base-missing-table", "base-missing", "no base for a table", spoiled({}))
add(
    "base-other-table",
    "base-mismatch",
    "a base with another table",
    spoiled({"table": table_of([0, 9, 30], [1, 2, -4])}),
)
