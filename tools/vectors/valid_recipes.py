"""Valid cases of rebuilding: references, bases, patch, low rank, sums."""

# ruff: noqa: E501 (descriptions and patterns in one line)

from __future__ import annotations

import json

from vectors.draft import Draft, chain, ref, safetensors
from vectors.exact import converted
from vectors.valid import corrected, patched, valid
from vectors.values import WIDTH, Json, Tensor, bits, numbers, tensor, weights, words

# Bit patterns worth having: zeros, smallest and largest subnormal, 1, largest, infinities, quiet and signalling NaNs.
QUIET, INFINITE = 0x7FF8 << 48, 0x7FF << 52
SPECIAL = {
    "F64": [0, 1 << 63, 1, (1 << 52) - 1, 0x3FF << 52, INFINITE - 1, INFINITE, INFINITE | 1 << 63, QUIET + 1, QUIET,
            0xFFF0000000000123, 0xBFF0000000000001],
    "F32": [0, 1 << 31, 1, 0x7FFFFF, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFF800123,
            0x7FC00000, 0xBF800001],
    "F16": [0, 0x8000, 1, 0x3FF, 0x3C00, 0x7BFF, 0x7C00, 0xFC00, 0x7E01, 0xFC23, 0x7E00, 0xBC01],
    "BF16": [0, 0x8000, 1, 0x7F, 0x3F80, 0x7F7F, 0x7F80, 0xFF80, 0x7FC1, 0xFF83, 0x7FC0, 0xBF81],
}  # fmt: skip
ANY = [0, 0x80, 1, 0x7F, 0x3C, 0x7B, 0x7C, 0xFC, 0x7D, 0xFF, 0x7E, 0xBC]  # for dtypes of one byte


@valid("tied tensors: references, a chain of them listed backwards, and two tensors that read one array")
def tied() -> Draft:
    draft = Draft()
    t = tensor("tied", "BF16", 4, 3)
    draft.exact("a", t, ref("b"))
    draft.exact("b", t, ref("c"))
    draft.stored("c", t, "float-planes", "zstd")
    draft.exact("again", t, {"op": "stored", "array": "c"})
    return draft


@valid("32 nodes deep through references, the most that is allowed: a chain of them, and patches of patched tensors")
def chain_of_32() -> Draft:
    draft = Draft()
    chain(draft, 32)
    u, zero = tensor("patched", "U16", 3), draft.array("zero", bits("U16", 0, 0, 0))
    node = draft.array("u", u)
    for number in range(16):  # the first is 2 nodes deep; each further one adds a patch and a reference
        draft.exact(f"p{number:02}", u, {"op": "patch", "prediction": node, "residual": zero})
        node = ref(f"p{number:02}")
    return draft


@valid("references into a base: all of its tensors are listed, only some are used; repo and revision are hints")
def base_ref() -> Draft:
    draft = Draft()
    base = {name: tensor(name, dtype, 3, 2) for name, dtype in (("w", "BF16"), ("unused", "F32"), ("mask", "BOOL"))}
    draft.with_base(base, repo="example/base", revision="main")
    draft.exact("w", base["w"], ref("w", "base"))
    draft.exact("tied", base["w"], ref("w"))
    draft.exact("other name", base["mask"], ref("mask", "base"))
    return draft


@valid("a base of two files with an index")
def base_sharded() -> Draft:
    draft = Draft()
    one, two = {"a": tensor("a", "F32", 2)}, {"b": tensor("b", "F16", 2, 2)}
    files = {"model-00001-of-00002.safetensors": safetensors(one), "model-00002-of-00002.safetensors": safetensors(two)}
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = json.dumps({"metadata": {}, "weight_map": places}).encode()
    draft.with_base(one | two, files | {"model.safetensors.index.json": index, "config.json": b"{}"})
    draft.exact("a", one["a"], ref("a", "base"))
    draft.exact("b", two["b"], ref("b", "base"))
    return draft


@valid("a base that is itself an archive, coded and with a tied tensor")
def base_archive() -> Draft:
    inner = Draft()
    t = weights("inner", "BF16", 8, 8)
    inner.stored("w", t, "float-planes", "zstd", 24)
    inner.exact("tied", t, ref("w"))
    draft = Draft()
    draft.with_base(dict(inner.tensors), inner.seal())
    target = bits("BF16", *(u + (i % 3) - 1 for i, u in enumerate(words(t))))._replace(shape=t.shape)
    patched(draft, "w", target, t, ref("w", "base"))
    draft.exact("tied", t, ref("tied", "base"))
    return draft


@valid("patch between all pairs of special values (zeros, subnormals, infinities, NaN payloads) of every float dtype")
def patch_floats() -> Draft:
    draft = Draft()
    base: dict[str, Tensor] = {}
    for dtype in (d for d in WIDTH if d.startswith(("F", "BF"))):
        patterns = SPECIAL.get(dtype, ANY)
        base[dtype] = bits(dtype, *(u for u in patterns for _ in patterns))
        patched(draft, dtype, bits(dtype, *(patterns * len(patterns))), base[dtype], ref(dtype, "base"))
    draft.with_base(base)
    return draft


@valid("patch of every dtype that is not a float, with differences that wrap around")
def patch_integers() -> Draft:
    draft = Draft()
    base: dict[str, Tensor] = {}
    for dtype in (d for d in WIDTH if not d.startswith(("F", "BF"))):
        base[dtype] = tensor("from" + dtype, dtype, 20)
        patched(draft, dtype, tensor("to" + dtype, dtype, 20), base[dtype], ref(dtype, "base"))
    draft.with_base(base)
    return draft


@valid("patch between any two of F64, F32, F16, BF16: ties to even, overflow, subnormals, NaNs of both signs")
def patch_conversions() -> Draft:
    draft = Draft()
    edges = {
        "F32": [
            *(0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7F8000, 0x7F7F7FFF, 0x00008000, 0x00018000),  # BF16
            *(0x80000001, 0x477FEFFF, 0x477FF000, 0x477FE000, 0x33000000, 0x33000001, 0x33800000, 0x33C00000),  # F16
            *(0x387FDFFF, 0x387FF000, 0x3F801000, 0x3F803000, 0x7F800001, 0xFFFFFFFF, 0xFF812345, 0x7FC00000),
        ],
        "F64": [
            *(
                0x3FF0100000000000,
                0x3FF0100000000001,
                0x3FF0300000000000,
                0x47EFEFFFFFFFFFFF,
                0x47EFF00000000000,
            ),  # BF16
            *(
                0x3FF0020000000000,
                0x3FF0020000000001,
                0x40EFFDFFFFFFFFFF,
                0x40EFFE0000000000,
                0x3E60000000000000,
            ),  # F16
            *(
                0x3FF0000010000000,
                0x3FF0000010000001,
                0x47EFFFFFEFFFFFFF,
                0x47EFFFFFF0000000,
                0x3690000000000000,
            ),  # F32
            *(0x3690000000000001, 0x7FF0000000000001, 0xFFF8000000000001, 0x8000000000000001),
        ],
        "F16": [0x0001, 0x8200, 0x7D01, 0xFFFF, 0x3C01, 0x3C07],
        "BF16": [0x0001, 0x8040, 0x7F81, 0xFFFF, 0x3F81, 0x4780, 0x477F, 0x3300, 0x3380],
    }
    base = {d: bits(d, *edges[d], *SPECIAL[d], *words(weights("narrow" + d, d, 20))) for d in edges}
    draft.with_base(base)
    for source, t in base.items():
        for dtype in (d for d in base if d != source):
            corrected(draft, f"{source} to {dtype}", dtype, t.shape, ref(source, "base"), filter_="planes")
            node = draft.array(
                f"zero for {source} to {dtype}", bits(f"U{8 * WIDTH[dtype]}", *[0] * t.shape[0]), "planes", "zstd"
            )
            prediction = {"op": "patch", "prediction": ref(source, "base"), "residual": node}
            draft.exact(f"{source} as {dtype}", converted(t, dtype), prediction)
    return draft


@valid("a recipe of 32 nodes: patch upon patch, one residual for all")
def patch_nested() -> Draft:
    draft = Draft()
    start = tensor("nested", "U16", 9)
    step = bits("U16", *[2] * 9)  # zigzag of 1
    node, residuals = draft.array("start", start), draft.array("step", step)
    for _ in range(31):
        node = {"op": "patch", "prediction": node, "residual": residuals}
    draft.exact("w", bits("U16", *((u + 31) & 0xFFFF for u in words(start))), node)
    return draft


@valid("a patch whose prediction and residual are references")
def patch_of_refs() -> Draft:
    draft = Draft()
    start, step = tensor("start", "U16", 9), bits("U16", *[2] * 9)
    draft.stored("start", start)
    draft.stored("step", step)
    by_ref = {"op": "patch", "prediction": ref("start"), "residual": ref("step")}
    draft.exact("w", bits("U16", *((u + 1) & 0xFFFF for u in words(start))), by_ref)
    return draft


def small_integers(label: str, dtype: str, *shape: int) -> Tensor:
    count = tensor(label, "U8", *shape)
    return numbers(dtype, list(shape), [float(x % 17 - 8) for x in count.data])


@valid(
    "low rank of small integers: every order of summation gives the same bytes; scales, a 4-d shape, all float dtypes"
)
def lowrank_integers() -> Draft:
    draft = Draft()
    for dtype, factor, scale, shape in (
        ("F32", "BF16", None, [4, 5]),
        ("BF16", "F16", 0.5, [6, 4]),
        ("F16", "F32", 2, [4, 3, 2, 1]),
        ("F64", "F64", -0.25, [3, 3]),
        ("BF16", "F64", 1.0, [2, 7]),
    ):
        name, columns = f"{dtype} of {factor}", len(tensor("", "U8", *shape[1:]).data)
        a, b = small_integers(name + "a", factor, 2, columns), small_integers(name + "b", factor, 2, shape[0])
        recipe: Json = {"op": "lowrank", "a": draft.array(name + "#a", a), "b": draft.array(name + "#b", b)}
        recipe = recipe if scale is None else recipe | {"scale": scale}
        draft.approximate(name, dtype, shape, recipe, small_integers(name, dtype, *shape))
    return draft


@valid("low rank of trained-like factors: bytes of the ordered reference, with the range that other orders may reach")
def lowrank_ordered() -> Draft:
    draft = Draft()
    for dtype, factor, scale in (
        ("F32", "F32", 0.1),
        ("F32", "BF16", 1.5),
        ("F64", "F32", 0.1),
        ("BF16", "F16", 3.0),
        ("F16", "F64", 7),
    ):
        name = f"{dtype} of {factor}"
        a, b = weights(name + "a", factor, 4, 9), weights(name + "b", factor, 4, 6)
        recipe = {"op": "lowrank", "a": draft.array(name + "#a", a), "b": draft.array(name + "#b", b), "scale": scale}
        draft.approximate(name, dtype, [6, 9], recipe)
    return draft


@valid("base + low rank in BF16, a sum of three terms with a nested sum, and references to bounded tensors")
def sums() -> Draft:
    draft = Draft()
    w = weights("base", "BF16", 6, 8)
    draft.with_base({"w": w})
    a, b = weights("sum a", "F32", 2, 8), weights("sum b", "F32", 2, 6)
    low: Json = {"op": "lowrank", "a": draft.array("w#lora_a", a), "b": draft.array("w#lora_b", b), "scale": 0.25}
    draft.approximate("w", "BF16", [6, 8], {"op": "sum", "terms": [ref("w", "base"), low]}, w)
    draft.lossy("tied", draft.tensors["w"], ref("w"), w)
    draft.bounded["tied"] = draft.bounded["w"]
    nested: Json = {"op": "sum", "terms": [{"op": "sum", "terms": [ref("w", "base"), low]}, draft.array("shift", w)]}
    draft.approximate("nested", "F32", [6, 8], nested)
    doubles = weights("doubles", "F64", 6, 8)
    wide: Json = {"op": "sum", "terms": [draft.array("doubles", doubles), ref("w", "base"), low]}
    draft.approximate("wide", "F16", [6, 8], wide)
    return draft


@valid(
    "sums whose rounding is decided by the accumulation type: F64 operands, ties in the final rounding, overflow to infinity"
)
def sum_rounding() -> Draft:
    draft = Draft()
    for dtype, left_dtype, left, right in (
        (
            "BF16",
            "F32",
            [1.0, 1.0, 1.0078125, 3.38e38, -3.38e38, 0.0],
            [2.0**-8, 2.0**-8 + 2.0**-20, 2.0**-8, 2e36, -2e36, -0.0],
        ),
        ("BF16", "F64", [1.0, 1.0, 1.0, -1.0, 0.0, 1e-45], [2.0**-8, 2.0**-8 + 2.0**-50, 2.0**-9, 1.0, 1e-39, 0.0]),
        (
            "F16",
            "F32",
            [65504.0, 65504.0, 2.0**-24, 1.0, -1.0, 0.0],
            [15.0, 16.0, 2.0**-25, 2.0**-11, 2.0**-12, 2.0**-25],
        ),
        (
            "F32",
            "F64",
            [1.0, 1.0, 1e39, 0.1, 2.0**-149, -0.0],
            [2.0**-24, 2.0**-24 + 2.0**-50, 1.0, 0.2, 2.0**-150, -0.0],
        ),
    ):
        name = f"{dtype} from {left_dtype}"
        x, y = numbers(left_dtype, [2, 3], left), numbers(left_dtype, [2, 3], right)
        recipe = {"op": "sum", "terms": [draft.array(f"{name}#x", x), draft.array(f"{name}#y", y)]}
        draft.computed(name, dtype, [2, 3], recipe)
    return draft


@valid(
    "approximations by exact recipes: a stored array, a reference to it, and a patch, with rel_error instead of digest"
)
def lossy_exact_recipes() -> Draft:
    draft = Draft()
    original, kept = numbers("F32", [4], [1.0, -2.0, 0.5, 3.0]), numbers("F32", [4], [1.0, -2.0, 0.5, 2.5])
    draft.lossy("w", kept, draft.array("w", kept), original)
    draft.lossy("tied", kept, ref("w"), original)
    zero = draft.array("zero", bits("U32", 0, 0, 0, 0))
    draft.lossy(
        "patched", kept, {"op": "patch", "prediction": {"op": "stored", "array": "w"}, "residual": zero}, original
    )
    return draft
