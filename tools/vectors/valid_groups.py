"""Valid cases of `patch` with wide predictions and with groups."""

# ruff: noqa: E501 (descriptions in one line)

from __future__ import annotations

from vectors.draft import Draft, ref
from vectors.valid import corrected, misses, valid
from vectors.valid_exact import ODD, given_product, plus, product, times, whole
from vectors.values import FLOATS, Json, Tensor, bits, numbers, weights

# Bounds in the middle of what the exponents of `weights` are, groups without elements below, between and above them.
BOUNDS = {
    "BF16": [1, 50, 60, 117, 119, 120, 121, 122, 200, 255, 300, 2047],
    "F32": [1, 2, 118, 120, 121, 254, 255],
    "F16": [1, 6, 8, 9, 10, 11, 30, 31, 32],
    "F64": [1, 700, 1014, 1016, 1017, 1018, 2046, 2047],
}


def near(label: str, dtype: str, count: int) -> Tensor:
    """Trained-like weights behind odd numbers of both signs."""
    odd, plain = bits(dtype, *ODD[dtype]), weights(label, dtype, count - len(ODD[dtype]))
    return Tensor(dtype, [count], odd.data + plain.data)


@valid(
    "groups by exponent of BF16, F16, F32, F64, a segment a group: 3 chunks, groups without elements, one group alone"
)
def groups_by_exponent() -> Draft:
    draft = Draft()
    base = {dtype: near(f"exponents {dtype}", dtype, 600) for dtype in FLOATS}
    draft.with_base(base)
    for dtype in FLOATS:
        corrected(draft, dtype, dtype, [600], ref(dtype, "base"), "exponent", BOUNDS[dtype], 270)
        corrected(draft, f"{dtype} one bound", dtype, [600], ref(dtype, "base"), "exponent", [2047], 1000)
        signs = [0x8000 * (i % 3 - 1) for i in range(600)]  # half way around for what has 16 bits
        corrected(
            draft, f"{dtype} far", dtype, [600], ref(dtype, "base"), "exponent", BOUNDS[dtype], 600, "planes", signs
        )
    return draft


@valid(
    "groups without segments: residuals in order of their groups in the other encodings; 255 bounds; chunks of 1 and 7"
)
def groups_in_other_encodings() -> Draft:
    draft = Draft()
    base = {dtype: near(f"other {dtype}", dtype, 60) for dtype in FLOATS}
    draft.with_base(base)
    for dtype, filter_, chunk in (
        ("BF16", "none", 7),
        ("F16", "planes", 25),
        ("F32", "planes", 60),
        ("F64", "none", 1),
    ):
        corrected(draft, dtype, dtype, [60], ref(dtype, "base"), "exponent", BOUNDS[dtype], chunk, filter_)
    corrected(draft, "255 bounds", "BF16", [60], ref("BF16", "base"), "exponent", range(1, 256), 0, "none")
    corrected(draft, "255 other bounds", "F64", [60], ref("F64", "base"), "exponent", range(850, 1105), 0, "none")
    return draft


@valid("groups by exponent of a prediction of another dtype: the exponent of what it is converted to")
def groups_of_conversions() -> Draft:
    draft = Draft()
    draft.with_base({dtype: near(f"conversion {dtype}", dtype, 50) for dtype in FLOATS})
    for source in FLOATS:
        for dtype in (d for d in FLOATS if d != source):
            corrected(draft, f"{source} to {dtype}", dtype, [50], ref(source, "base"), "exponent", BOUNDS[dtype], 30)
    return draft


# Bounds of margins: where most lie for weights of a few per cent, groups without elements, subnormals, infinities.
MARGINS = {
    "F32": [1, 2, 90, 104, 108, 110, 111, 112, 113, 114, 200, 255],
    "F64": [1, 900, 985, 991, 992, 993, 994, 1000, 1004, 1006, 1007, 1008, 1009, 1010, 1100, 2047],
}
# Accumulation type to dtype: the dtypes of base and factors, their sizes, and the scale.
PAIRS: dict[str, tuple[str, str, tuple[str, str], tuple[int, int], float]] = {
    "F32 to BF16": ("BF16", "BF16", ("I16", "I8"), (20000, 100), 2.0**-30),
    "F32 to F16": ("F16", "F16", ("I16", "I16"), (1500, 1500), 2.0**-32),
    "F64 to F32": ("F32", "F32", ("I32", "I16"), (2**29, 10000), 2.0**-60),
    "F64 to BF16": ("BF16", "BF16", ("I32", "I8"), (2**30, 100), 2.0**-48),
    "F64 to F16": ("F16", "F16", ("I32", "I32"), (2**24, 2**24), 2.0**-60),
    "F64 to BF16, by an F64 base": ("BF16", "F64", ("I16", "I8"), (20000, 100), 2.0**-30),
}


def merged(draft: Draft, name: str) -> tuple[str, Json]:
    """The dtype of the target, and base + low rank; the base has odd numbers and small ones, too."""
    dtype, source, kinds, sizes, scale = PAIRS[name]
    tiny = numbers(
        source, [8], [(-1) ** i * 2.0 ** (-13 - i % 3 if source == "F16" else -127 - i % 3) for i in range(8)]
    )
    t = near(f"{name} base", source, 72)
    t = Tensor(source, [10, 8], t.data + tiny.data)
    draft.base_tensors[name] = t
    return dtype, plus(ref(name, "base"), product(draft, name, kinds, sizes, [10, 8], 3, scale))


def with_margins(draft: Draft, names: dict[str, str]) -> None:
    """Merged LoRAs, each corrected as a case says: name -> how elements are grouped."""
    for name, by in names.items():
        dtype, node = merged(draft, name)
        bounds = {"margin": MARGINS[name[:3]], "exponent": BOUNDS[dtype]}.get(by, [])
        corrected(draft, name, dtype, [10, 8], node, by, bounds, 37)
    draft.with_base(draft.base_tensors)


@valid(
    "groups by margin of base + integer factors, for all pairs of types: misses on both sides, NaNs, infinities, subnormals"
)
def groups_by_margin() -> Draft:
    draft = Draft()
    with_margins(draft, dict.fromkeys(PAIRS, "margin"))
    return draft


@valid("a wide prediction without groups, of every pair of types")
def patch_wide() -> Draft:
    draft = Draft()
    with_margins(draft, dict.fromkeys(PAIRS, ""))
    return draft


@valid("groups by exponent of a wide prediction, of every pair of types")
def groups_of_wide() -> Draft:
    draft = Draft()
    with_margins(draft, dict.fromkeys(PAIRS, "exponent"))
    return draft


@valid(
    "margins one by one: values on, beside and half way to the boundary, of both signs, 1 up and 1 down; every bound"
)
def margin_edges() -> Draft:
    draft = Draft()
    for name, wide, dtype, n in (
        ("F32 to BF16", "F32", "BF16", 16),
        ("F32 to F16", "F32", "F16", 13),
        ("F64 to F32", "F64", "F32", 29),
        ("F64 to F16", "F64", "F16", 42),
        ("F64 to BF16", "F64", "BF16", 45),
    ):
        one, infinite, top = (0x3F800000, 0x7F800000, 1 << 31) if wide == "F32" else (0x3FF << 52, 0x7FF << 52, 1 << 63)
        half = 1 << n - 1
        beside = [0, 1, 2, 3, 4, 7, 8, half // 2 - 1, half // 2, half - 1, half]
        places = [u + half + side * d for u in (0, 2**n, one, one + 2**n) for side in (-1, 1) for d in beside]
        places += [infinite - half + d for d in (-half, -1, 0, 1, half - 1)]
        patterns = [u | sign for sign in (0, top) for u in places]
        patterns += [infinite, infinite | top, infinite | 1, infinite | top | 5]  # the sign of a NaN counts for nothing
        t = bits(wide, *patterns)
        node = times(draft.array(f"{name}#x", t), draft.array(f"{name}#one", numbers("F32", [], [1])))
        bounds = range(1, 256) if wide == "F32" else [1, *range(800, 1053), 2047]
        for label, steps in (("up", [1]), ("down", [-1]), ("any", [0, 1, -1, 2, -2])):
            cycle = [steps[i % len(steps)] for i in range(len(patterns))]
            corrected(draft, f"{name} {label}", dtype, t.shape, node, "margin", bounds, 0, "none", cycle)
    return draft


@valid(
    "a BF16 base of an F32 fine-tune, plain and by exponent; an F32 one of a BF16 fine-tune; patches of scaled, rows, patches"
)
def patch_of_recipes() -> Draft:
    draft = Draft()
    draft.with_base({"bf16": weights("cast", "BF16", 6, 5), "f32": weights("cast 2", "F32", 6, 5)})
    wide = misses("wide steps", 30)
    corrected(draft, "F32 of BF16", "F32", [6, 5], ref("bf16", "base"), steps=[1000 * d for d in wide])
    corrected(draft, "by exponent", "F32", [6, 5], ref("bf16", "base"), "exponent", BOUNDS["F32"], steps=wide)
    corrected(draft, "BF16 of F32", "BF16", [6, 5], ref("f32", "base"))
    scale = draft.array("scale", numbers("F32", [6], [0.5, 1.25, 3, -1, 0, 0.1]))
    corrected(draft, "scaled", "BF16", [6, 5], times(ref("bf16", "base"), scale), "margin", MARGINS["F32"], 7)
    corrected(draft, "rows", "BF16", [8, 5], {"op": "rows", "x": ref("bf16", "base")}, "exponent", BOUNDS["BF16"], 13)
    corrected(draft, "rows in F32", "F32", [4, 5], {"op": "rows", "x": ref("bf16", "base")}, "exponent", BOUNDS["F32"])
    low = product(draft, "low", ("I8", "I8"), (100, 100), [6, 5], 2, 2.0**-20)
    corrected(draft, "low rank alone", "F16", [6, 5], low, "margin", MARGINS["F32"], 11)
    inner = draft.entries["scaled"]["recipe"]  # a patch within a sum within a patch
    corrected_sum = plus(ref("f32", "base"), low)
    corrected(draft, "sum", "BF16", [6, 5], corrected_sum, "margin", MARGINS["F32"], 7)
    draft.exact("scaled again", draft.tensors["scaled"], inner)
    draft.computed("in a sum", "F32", [6, 5], plus(ref("sum"), ref("scaled"), low))
    # Groups of what is in groups itself: a reader needs room for both residuals.
    corrected(draft, "by exponent, of groups", "BF16", [6, 5], ref("scaled"), "exponent", BOUNDS["BF16"], 7)
    third = plus(ref("by exponent, of groups"), low)
    corrected(draft, "by margin, of groups", "BF16", [6, 5], third, "margin", MARGINS["F32"], 7)
    return draft


@valid("a DoRA merge in BF16 as a writer stores it: base + low rank, scaled by a number a row, corrected by margin")
def groups_dora() -> Draft:
    draft = Draft()
    draft.with_base({"w": weights("dora base", "BF16", 12, 10)})
    low = product(draft, "w", ("I16", "I8"), (5000, 100), [12, 10], 3, 2.0**-28)
    magnitude = draft.array("w#magnitude", numbers("F32", [12], [1 + i / 77 for i in range(12)]))
    merged_rows = times(plus(ref("w", "base"), low), magnitude)
    corrected(draft, "w", "BF16", [12, 10], merged_rows, "margin", MARGINS["F32"], 50)
    corrected(draft, "one group", "BF16", [12, 10], merged_rows, "margin", [1], 120)
    a, b = whole("I32", [1, 10], range(-5, 5)), whole("I8", [1, 12], range(12))
    wide = plus(ref("w", "base"), given_product(draft, "wide", a, b, 2.0**-9))
    corrected(draft, "in F64", "F32", [12, 10], wide, "margin", MARGINS["F64"], 33)
    return draft
