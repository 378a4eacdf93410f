"""Invalid recipes with integer factors, `scaled`, `rows`: steps 2, 4, 5 and 8 of spec/reasons.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vectors.draft import Draft, ref
from vectors.spoil import add, manifest, put
from vectors.valid_exact import diagonal, given_product, plus, times, whole
from vectors.values import Json, Tensor, bits, digest, numbers, tensor, weights


def fixed(recipe: Json, shape: Sequence[int] = (4, 3), dtype: str = "BF16") -> Json:
    """A manifest's entry of an exact tensor whose bytes nobody gets to see."""
    return {"dtype": dtype, "shape": list(shape), "recipe": recipe, "digest": digest(b"")}


def parts() -> Draft:
    """`w` = `u` + integer low rank, scaled a row; with further arrays and tensors for recipes to misuse.

    The manifest's entry of `w` is put in place of what is there; all arrays stay in use.
    """
    draft = Draft()
    draft.with_base({"u": weights("parts", "BF16", 4, 3)})
    draft.stored("m", numbers("F32", [4], [1, 2, 3, 0.5]))
    draft.stored("one", numbers("F32", [], [0.5]))
    draft.stored("one of one", numbers("F32", [1], [0.5]))
    draft.stored("column", numbers("F32", [4, 1], [1, 2, 3, 0.5]))
    draft.stored("whole", whole("I32", [4], [1, 2, 3, 4]))
    draft.stored("matrix", whole("I32", [4, 3], range(12)))
    draft.stored("small float", tensor("small float", "F8_E4M3", 4, 3))
    draft.stored("a", whole("I16", [2, 3], [9, -5, 3, 1, 0, 2]))
    draft.stored("b", whole("I8", [2, 4], [7, 1, -9, 3, 0, 1, 2, -1]))
    draft.stored("a float", numbers("F32", [2, 3], [1] * 6))
    draft.stored("four rows", whole("I8", [4, 3], range(12)))
    draft.stored("four columns", whole("I8", [4, 4], range(16)))
    draft.stored("residual", bits("U16", *[0] * 12)._replace(shape=[4, 3]))
    draft.stored("wide residual", bits("U32", *[0] * 12)._replace(shape=[4, 3]))
    draft.stored("double", numbers("F64", [4, 3], [1.0] * 12))
    draft.lossy("lossy a", whole("I16", [2, 3], [9, -5, 3, 1, 0, 2]), draft.array("lossy a", draft.tensors["a"]))
    low: Json = {"op": "lowrank", "a": ref("a"), "b": ref("b"), "scale": 0.25}
    draft.computed("w", "BF16", [4, 3], times(plus(ref("u", "base"), low), ref("m")))
    factors = {x: weights(f"float {x}", "F32", 2, n) for x, n in (("x", 3), ("y", 4))}
    node = {"op": "lowrank", "a": draft.array("x", factors["x"]), "b": draft.array("y", factors["y"])}
    draft.approximate("bounded", "BF16", [4, 3], node)
    return draft


LOW: Json = {"op": "lowrank", "a": ref("a"), "b": ref("b"), "scale": 0.25}
FLOATS_LOW: Json = {"op": "lowrank", "a": {"op": "stored", "array": "x"}, "b": {"op": "stored", "array": "y"}}
U = ref("u", "base")
SUM = plus(U, LOW)


def recipe(
    name: str, reason: str, description: str, node: Any, shape: Sequence[int] = (4, 3), dtype: str = "BF16"
) -> None:
    """`w` has another recipe, and shape or dtype."""
    manifest(name, reason, description, put(fixed(node, shape, dtype), "tensors", "w"), parts)


# Integer factors -----------------------------------------------------------------------------------

for label, scale in (
    ("3", 3),
    ("0", 0),
    ("minus-1", -1),
    ("tenth", 0.1),
    ("2-101", 2.0**101),
    ("2-minus-101", 2.0**-101),
    ("next-to-1", 1 + 2.0**-52),
    ("subnormal", 5e-324),
):
    recipe(f"exact-scale-{label}", "operand", f"integer factors with the scale {scale}", LOW | {"scale": scale})
recipe("exact-mixed-factors", "operand", "a float and an integer factor", LOW | {"a": ref("a float")})
recipe("exact-lossy-factor", "operand", "an integer factor that is an approximation", LOW | {"a": ref("lossy a")})
recipe("exact-swapped-factors", "operand", "integer factors swapped", LOW | {"a": ref("b"), "b": ref("a")})
too_many = {"op": "lowrank", "a": ref("four rows"), "b": ref("four columns")}
recipe("exact-rank-too-big", "operand", "integer factors of rank 4 of a 4 x 3 tensor", too_many)
recipe("exact-integer-tensor", "operand", "integer factors of an integer tensor", LOW, dtype="I32")
recipe("exact-wide-factor", "operand", "a factor that is wide", LOW | {"a": plus(ref("a float"), ref("a float"))})


def inexact(name: str, description: str, dtype: str, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    def make() -> Draft:
        draft = Draft()
        draft.computed("w", dtype, [b.shape[1], a.shape[1]], given_product(draft, "w", a, b, scale))
        return draft

    add(f"inexact-{name}", "inexact", description, make)


def beyond(dtypes: tuple[str, str], x: int, y: int) -> tuple[Tensor, Tensor]:
    """Factors of rank 2 with largest columns (x, 0) and (y, 1): no sum of products is larger than x y or 1."""
    return whole(dtypes[0], [2, 2], [x, 0, 0, 1]), whole(dtypes[1], [2, 2], [y, 0, 1, 1])


F32_BEYOND = "2^48 + 2^24 in F32"
inexact("f32", f"{F32_BEYOND}, though no sum exceeds 2^24", "BF16", *beyond(("I16", "I16"), 4096, 4096))
inexact("f32-scaled", f"{F32_BEYOND}, with a scale of 2^-20", "F32", *beyond(("I16", "I16"), 4096, 4096), 2.0**-20)
inexact("f32-negative", f"{F32_BEYOND}, of negative numbers", "F16", *beyond(("I16", "I16"), -4096, 4096))
other = beyond(("I16", "I16"), 4096, 4096)[::-1]
inexact("f32-other-factor", f"{F32_BEYOND}, the larger column in a", "BF16", *other)
inexact("f64", "2^106 + 2^60 in F64", "F32", *beyond(("I32", "I32"), 2**30, 2**23))
inexact("f64-lowest", "2^106 + 2^62 in F64, of the lowest integer", "F64", *beyond(("I32", "I32"), -(2**31), 2**22))
inexact("f64-of-bf16", "2^106 + 2^52 in F64, for a BF16 tensor", "BF16", *beyond(("I32", "I32"), 2**26, 2**27))
lowest = (
    whole("I8", [5, 5], [-128] * 20 + [1, 0, 0, 0, 0]),
    whole("I16", [5, 5], [-(2**15), 0, 0, 0, 0] * 4 + [0, 1, 0, 0, 0]),
)
inexact("lowest", "2^48 + 2^32 in F32, of the lowest integers, whose sizes their dtypes lack", "BF16", *lowest)
parallel = (whole("I16", [3, 3], [4096] * 9), whole("I16", [3, 3], [1366] * 9))
inexact("parallel", "3 components that add up to 2^24 + 2^13", "F32", *parallel)
squares = diagonal("I32", 4, -(2**31))
inexact("wraps", "2^124 in F64: 2^62 twice, whose product is 0 in integers of 64 bits", "F64", squares, squares)
columns = whole("I32", [4, 4], [-(2**31)] * 16)
inexact("wraps-columns", "2^128 in F64: columns of 2^64, which is 0 in integers of 64 bits", "F64", columns, columns)
narrow = whole("I16", [4, 4], [-(2**15)] * 16)
inexact("wraps-f32", "2^64 in F32, which is 0 in integers of 64 bits", "BF16", narrow, narrow)


def inexact_inside() -> Draft:
    draft = Draft()
    draft.with_base({"u": weights("inside", "BF16", 2, 2)})
    low = given_product(draft, "w", *beyond(("I16", "I16"), 4096, 4096), 2.0**-30)
    draft.computed("v", "BF16", [2, 2], plus(ref("u", "base"), low))
    zero = draft.segments("zero", bits("U16", 0, 0, 0, 0)._replace(shape=[2, 2]), 4, [4])
    node = {"op": "patch", "prediction": draft.entries["v"]["recipe"], "residual": zero}
    draft.exact("w", draft.tensors["v"], node | {"groups": {"by": "margin", "bounds": [4]}})
    del draft.tensors["v"], draft.entries["v"]
    return draft


add(
    "inexact-in-a-prediction",
    "inexact",
    "integer factors beyond the bound in the prediction of a patch",
    inexact_inside,
)

# Scaled and rows -----------------------------------------------------------------------------------

recipe("scaled-integer", "operand", "scaled integers", times(ref("matrix"), ref("one")))
recipe("scaled-small-float", "operand", "scaled 8-bit floats", times(ref("small float"), ref("one")))
recipe("scaled-by-integers", "operand", "a scale of integers", times(U, ref("whole")))
recipe("scaled-by-wide", "operand", "a scale that is wide", times(U, times(U, ref("one"))))
recipe("scaled-by-one-of-one", "operand", "a scale of shape [1] for 4 rows", times(U, ref("one of one")))
recipe("scaled-by-column", "operand", "a scale of shape [rows, 1]", times(U, ref("column")))
recipe("scaled-by-matrix", "operand", "a scale of the tensor's own shape", times(U, ref("double")))
recipe("scaled-shape", "operand", "x of another shape than the tensor", times(ref("a float"), ref("one")))
recipe(
    "scaled-scalar-by-rows", "operand", "a 0-d tensor scaled by [1]", times(ref("one"), ref("one of one")), (), "F32"
)
recipe(
    "scaled-to-integers",
    "operand",
    "scaled floats for an integer tensor",
    times(ref("double"), ref("one")),
    dtype="I32",
)
recipe(
    "scaled-in-sum-shape",
    "operand",
    "a sum of [4] within scaled, for a tensor of [4, 3]",
    times(plus(ref("m"), ref("m")), ref("one")),
)
recipe("rows-of-wide", "operand", "rows of what is wide", {"op": "rows", "x": plus(U, U)}, (6, 3))
recipe("rows-columns", "operand", "rows of another length", {"op": "rows", "x": U}, (4, 2))
recipe("rows-dimensions", "operand", "rows of another number of dimensions", {"op": "rows", "x": U}, (4,))
recipe("rows-three-dimensions", "operand", "rows of a matrix for a 3-d tensor", {"op": "rows", "x": U}, (6, 3, 1))
recipe("rows-of-scalar", "operand", "rows of a 0-d tensor", {"op": "rows", "x": ref("one")}, (3,), "F32")
recipe("rows-scalar", "operand", "rows for a 0-d tensor", {"op": "rows", "x": ref("m")}, (), "F32")
recipe("rows-dtype", "operand", "rows of another dtype than the tensor", {"op": "rows", "x": U}, (6, 3), "F16")
recipe(
    "scaled-no-array", "operand", "an array that does not exist, as a scale", times(U, {"op": "stored", "array": "M"})
)
recipe("rows-no-tensor", "operand", "a tensor that does not exist, within rows", {"op": "rows", "x": ref("nobody")})
recipe("scaled-without-scale", "schema", "scaled without a scale", {"op": "scaled", "x": U})
recipe("scaled-number", "schema", "scaled by a number in the manifest", {"op": "scaled", "x": U, "scale": 0.5})
recipe("scaled-key", "schema", "scaled with an unknown key", times(U, ref("one")) | {"axis": 0})
recipe("rows-list", "schema", "rows of a list", {"op": "rows", "x": [U]})
recipe("rows-key", "schema", "rows with a number of them", {"op": "rows", "x": U, "rows": 4})
recipe("operator-in-scaled", "operator", "an unknown operator as a scale", times(U, {"op": "norm"}))
recipe("operator-in-rows", "operator", "an unknown operator within rows", {"op": "rows", "x": {"op": "take"}})
recipe("cycle-in-scaled", "cycle", "itself, scaled", times(ref("w"), ref("one")))
recipe("cycle-in-rows", "cycle", "rows of itself", {"op": "rows", "x": ref("w")})


def nested(levels: int) -> Json:
    node = U
    for _ in range(levels - 1):
        node = {"op": "rows", "x": node}
    return node


recipe("cycle-deep-rows", "cycle", "rows of rows, 33 nodes deep", nested(33))
recipe(
    "coverage-digest-on-scaled",
    "coverage",
    "a digest on scaled floats of a float low rank",
    times(plus(U, FLOATS_LOW), ref("m")),
)
recipe("coverage-digest-on-low-rank", "coverage", "a digest on a low rank of float factors", FLOATS_LOW)
recipe(
    "coverage-digest-on-rows",
    "coverage",
    "a digest on rows of a bounded tensor",
    {"op": "rows", "x": ref("bounded")},
    (6, 3),
)
recipe("coverage-digest-on-mixed-sum", "coverage", "a digest on an exact and a bounded term", plus(U, LOW, FLOATS_LOW))
recipe("coverage-digest-on-sum-of-ref", "coverage", "a digest on a sum with a bounded tensor", plus(U, ref("bounded")))
recipe("digest-of-exact-sum", "digest", "a sum of exact terms that gives other bytes than promised", SUM)
recipe("digest-of-scaled", "digest", "a scaled tensor that gives other bytes than promised", times(U, ref("m")))
recipe("digest-of-rows", "digest", "rows that give other bytes than promised", {"op": "rows", "x": U})
recipe("digest-of-low-rank", "digest", "integer factors that give other bytes than promised", LOW)


def other_order() -> Draft:
    """A digest of what another order of the terms would give."""
    draft = Draft()
    columns = {"x": [1e8, 1.0], "y": [3.0, 2.0], "z": [-1e8, 3.0]}
    x, y, z = (draft.array(name, numbers("F32", [2], column)) for name, column in columns.items())
    draft.exact("w", draft.recipe(plus(x, z, y), "F32", [2]).exact(), plus(x, y, z))
    return draft


def without_base() -> Draft:
    draft = parts()
    draft.base = {}
    return draft


add("digest-of-another-order", "digest", "the digest of a sum in another order", other_order)
add("base-missing-in-scaled", "base-missing", "no base for a reference within scaled", without_base)


def with_a_second_base(change: Callable[[Draft], object]) -> Callable[[], Draft]:
    """An average of two bases, of which something is changed after it is drawn up."""

    def make() -> Draft:
        draft = Draft()
        draft.with_base({"u": weights("first", "BF16", 4, 3)})
        draft.other_bases["second"] = {"u": weights("second", "BF16", 4, 3)}
        draft.computed("w", "BF16", [4, 3], plus(U, ref("u", "second")))
        change(draft)
        return draft

    return make


def swap(draft: Draft) -> None:
    """The manifest knows the one base under the other's id, and recipes accordingly."""

    def edit(m: Json) -> None:
        m["bases"] = {"base": m["bases"]["second"], "second": m["bases"]["base"]}
        for term, base in zip(m["tensors"]["w"]["recipe"]["terms"], ("second", "base"), strict=True):
            term["base"] = base

    draft.edit_manifest = edit


add("base-swapped", "base-mismatch", "two bases, each given as the other", with_a_second_base(swap))
