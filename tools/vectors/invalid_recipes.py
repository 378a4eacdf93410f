"""Invalid recipes: operands, cycles, coverage; step 5 of spec/reasons.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vectors.draft import Draft, chain, ref
from vectors.spoil import TERMS, add, append, based, both, drop, low_rank, manifest, plain_archive, put
from vectors.values import Json, bits, digest, tensor

# Step 5 --------------------------------------------------------------------------------------------

A, B = ({"op": "stored", "array": f"w#lora_{x}"} for x in "ab")
manifest(
    "operand-no-array",
    "operand",
    "an array that does not exist",
    put({"op": "stored", "array": "W"}, "tensors", "tied", "recipe"),
)
manifest(
    "operand-no-tensor",
    "operand",
    "a reference to a tensor that does not exist",
    put(ref("nobody"), "tensors", "tied", "recipe"),
)
manifest(
    "operand-no-base",
    "operand",
    "a base that does not exist",
    put(ref("same", "other"), "tensors", "same", "recipe"),
    based,
)
manifest(
    "operand-no-base-tensor",
    "operand",
    "a tensor that its base lacks",
    put(ref("nobody", "base"), "tensors", "same", "recipe"),
    based,
)
manifest("operand-shape", "operand", "a recipe of another shape", put([4, 6], "tensors", "w", "shape"))
manifest("operand-dtype", "operand", "a recipe of another dtype of the same width", put("F16", "tensors", "w", "dtype"))
for name, array in (("array", "nobody"), ("dtype", "bias")):
    manifest(
        f"operand-checkpoint-{name}",
        "operand",
        f"a second original file whose header is {array!r}",
        append({"name": "b.safetensors", "header": array}, "checkpoint", "files"),
    )
manifest(
    "operand-swapped-factors",
    "operand",
    "a and b swapped",
    both(put(B, *TERMS, 1, "a"), put(A, *TERMS, 1, "b")),
    low_rank,
)
manifest("operand-one-term", "operand", "a sum of one term", drop(*TERMS, 0), low_rank)
manifest(
    "operand-65-terms",
    "operand",
    "a sum of 65 terms",
    lambda m: m["tensors"]["w"]["recipe"]["terms"].extend([ref("u")] * 63),
    low_rank,
)
manifest(
    "operand-term-shape",
    "operand",
    "terms of two shapes",
    lambda m: m["tensors"]["w"]["recipe"]["terms"].append(A),
    low_rank,
)
manifest(
    "operand-prediction-wide",
    "operand",
    "a patch of a wide prediction that is bounded",
    lambda m: m["tensors"]["w"].update(
        recipe={"op": "patch", "prediction": m["tensors"]["w"]["recipe"], "residual": ref("u")}
    ),
    low_rank,
)


def factors(
    dtype: str, rank: int, columns: int, rows: int, target: str = "F32", shape: Sequence[int] = (4, 3)
) -> Callable[[], Draft]:
    def make() -> Draft:
        draft = Draft()
        a, b = tensor("a", dtype, rank, columns), tensor("b", dtype, rank, rows)
        recipe = {"op": "lowrank", "a": draft.array("a", a), "b": draft.array("b", b)}
        draft.tensors["w"] = tensor("w", target, *shape)
        draft.entries["w"] = {"dtype": target, "shape": list(shape), "recipe": recipe, "rel_error": 0.5}
        return draft

    return make


add("operand-rank-too-big", "operand", "rank 4 of a 4 x 3 tensor", factors("F32", 4, 3, 4))
add("operand-rank-zero", "operand", "rank 0", factors("F32", 0, 3, 4))
for dtype in ("I64", "U8", "U16", "BOOL"):
    add(f"operand-{dtype.lower()}-factors", "operand", f"factors of dtype {dtype}", factors(dtype, 2, 3, 4))
add("operand-small-float-factors", "operand", "factors of 8-bit floats", factors("F8_E4M3", 2, 3, 4))
add("operand-lowrank-vector", "operand", "a low-rank tensor of one dimension", factors("F32", 1, 1, 4, shape=(4,)))
add("operand-lowrank-integer", "operand", "a wide recipe for an integer tensor", factors("F32", 2, 3, 4, "I32"))
add("operand-lowrank-small-float", "operand", "a wide recipe for an 8-bit float", factors("F32", 2, 3, 4, "F8_E5M2"))


def patch_of(
    target: str, prediction: str, correction: str, shape: Sequence[int] = (6,), predicted: Sequence[int] = (6,)
) -> Callable[[], Draft]:
    def make() -> Draft:
        draft = Draft()
        part = draft.array("residual", tensor("residual", correction, *shape))
        node = draft.array("prediction", tensor("p", prediction, *predicted))
        draft.exact("w", tensor("w", target, 6), {"op": "patch", "prediction": node, "residual": part})
        return draft

    return make


add("operand-prediction-shape", "operand", "a prediction of another shape", patch_of("I16", "I16", "U16", (6,), (2, 3)))
add("operand-residual-width", "operand", "a residual of another width", patch_of("BF16", "BF16", "U32"))
add("operand-residual-signed", "operand", "a residual that is signed", patch_of("BF16", "BF16", "I16"))
add("operand-residual-shape", "operand", "a residual of another shape", patch_of("BF16", "BF16", "U16", (2, 3)))
add("operand-prediction-f8", "operand", "an 8-bit float prediction of BF16", patch_of("BF16", "F8_E5M2", "U16"))
add("operand-prediction-of-f8", "operand", "a BF16 prediction of an 8-bit float", patch_of("F8_E4M3", "BF16", "U8"))
add("operand-prediction-integer", "operand", "a U16 prediction of BF16", patch_of("BF16", "U16", "U16"))
add("operand-prediction-of-integer", "operand", "an F32 prediction of I32", patch_of("I32", "F32", "U32"))
add("operand-prediction-unsigned", "operand", "a U16 prediction of I16", patch_of("I16", "U16", "U16"))


def bounded_prediction() -> Draft:
    draft = low_rank()
    recipe = {
        "op": "patch",
        "prediction": ref("w"),
        "residual": draft.array("residual", bits("U16", *[0] * 12)._replace(shape=[4, 3])),
    }
    draft.exact("v", draft.tensors["w"], recipe)
    return draft


add("operand-prediction-bounded", "operand", "a patch of a bounded tensor", bounded_prediction)


def integer_term() -> Draft:
    draft = low_rank()
    draft.entries["w"]["recipe"]["terms"][0] = draft.array("integers", tensor("integers", "I16", 4, 3))
    return draft


add("operand-term-integer", "operand", "a term that is an integer array", integer_term)
manifest("cycle-self", "cycle", "a tensor that refers to itself", put(ref("tied"), "tensors", "tied", "recipe"))


def ring(*names: str) -> Callable[[], Draft]:
    def make() -> Draft:
        draft = plain_archive()
        for name, other in zip(names, (*names[1:], names[0]), strict=True):
            draft.exact(name, draft.tensors["bias"], ref(other))
        return draft

    return make


def deep(levels: int) -> Callable[[], Draft]:
    def make() -> Draft:
        draft = Draft()
        t = bits("U16", 1, 2, 3)
        node, zero = draft.array("start", t), draft.array("zero", bits("U16", 0, 0, 0))
        for _ in range(levels - 1):
            node = {"op": "patch", "prediction": node, "residual": zero}
        draft.exact("w", t, node)
        return draft

    return make


add("cycle-two", "cycle", "two tensors that refer to each other", ring("x", "y"))
add("cycle-three", "cycle", "three tensors in a ring", ring("x", "y", "z"))
add("cycle-long", "cycle", "a ring of 1,100 tensors", ring(*map(str, range(1100))))
manifest("cycle-in-sum", "cycle", "a sum with itself as a term", put(ref("w"), *TERMS, 0), low_rank)
add("cycle-deep-recipe", "cycle", "a recipe of 33 nodes, one in another", deep(33))


def chained(depth: int) -> Callable[[], Draft]:
    def make() -> Draft:
        draft = Draft()
        chain(draft, depth)
        return draft

    return make


def chained_backwards() -> Draft:
    """A chain in which the first tensor refers to the second, and so on."""
    draft = Draft()
    t = tensor("chain", "U8", 1)
    for number in range(1200):
        draft.exact(f"t{number:04}", t, ref(f"t{number + 1:04}"))
    draft.stored("t1200", t)
    return draft


def patched_chain() -> Draft:
    """A reference to a recipe of 32 nodes."""
    draft = deep(32)()
    draft.exact("tied", draft.tensors["w"], ref("w"))
    return draft


add("cycle-chain-of-33", "cycle", "a chain of 32 references: 33 nodes with the stored one", chained(33))
add("cycle-long-chain", "cycle", "a chain of 1,200 references: a reader must not recurse along them", chained(1201))
add("cycle-long-chain-backwards", "cycle", "the same, with the deepest tensor first", chained_backwards)
add("cycle-ref-to-deep-recipe", "cycle", "a reference to a recipe of 32 nodes", patched_chain)
manifest(
    "cycle-many-nodes",
    "cycle",
    "sums of 64 references to sums of 64 references: over 4,096 nodes, though only 5 deep",
    lambda m: m["tensors"].update(
        {
            name: {"dtype": "BF16", "shape": [4, 3], "recipe": {"op": "sum", "terms": [ref(of)] * 64}, "rel_error": 0.0}
            for name, of in (("s1", "w"), ("s2", "s1"))
        }
    ),
    low_rank,
)
manifest("coverage-unused-array", "coverage", "an array nobody uses", drop("tensors", "bias"))
TO_DIGEST = both(drop("tensors", "w", "rel_error"), put(digest(b""), "tensors", "w", "digest"))
manifest("coverage-digest-on-sum", "coverage", "a digest on a sum", TO_DIGEST, low_rank)
manifest(
    "coverage-digest-on-ref",
    "coverage",
    "a digest on a reference to a bounded tensor",
    lambda m: m["tensors"].update(v={"dtype": "BF16", "shape": [4, 3], "recipe": ref("w"), "digest": digest(b"")}),
    low_rank,
)


def lossy(recipe: Json) -> Callable[[], Draft]:
    """`w`, stored but an approximation, and an exact tensor by a recipe that reads it."""

    def make() -> Draft:
        draft = Draft()
        t = bits("U16", 1, 2, 3)
        draft.lossy("w", t, draft.array("w", t))
        draft.stored("zero", bits("U16", 0, 0, 0))
        draft.exact("v", t, recipe)
        return draft

    return make


add("coverage-digest-on-ref-to-lossy", "coverage", "a digest on a reference to an approximation", lossy(ref("w")))
add(
    "operand-prediction-lossy",
    "operand",
    "a patch of a stored tensor that has a rel_error instead of a digest",
    lossy({"op": "patch", "prediction": ref("w"), "residual": {"op": "stored", "array": "zero"}}),
)
