"""Valid cases of wide recipes of the exact grade: integer factors, sums, `scaled`; `rows`; NaNs in both grades."""

# ruff: noqa: E501 (descriptions in one line)

from __future__ import annotations

import math
from collections.abc import Sequence

from vectors.draft import Draft, ref
from vectors.exact import integers
from vectors.valid import patched, valid
from vectors.values import FLOATS, WIDTH, Json, Tensor, bits, noise, numbers, tensor, weights, words

MINUS_ZERO = {"F64": 1 << 63, "F32": 1 << 31, "F16": 1 << 15, "BF16": 1 << 15}
# Zeros of both signs, infinities, NaNs of both signs with payloads, the smallest and largest subnormal, the largest.
ODD = {
    "F64": [0, 1 << 63, 0x7FF << 52, 0xFFF << 52, 0x7FF0000000000123, 0xFFF8000000000001, 1, (1 << 63) + (1 << 52) - 1],
    "F32": [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7F800123, 0xFFC00001, 1, 0x807FFFFF],
    "F16": [0, 1 << 15, 0x7C00, 0xFC00, 0x7C12, 0xFE01, 1, 0x83FF],
    "BF16": [0, 1 << 15, 0x7F80, 0xFF80, 0x7F92, 0xFFC1, 1, 0x807F],
}


def plus(*terms: Json) -> Json:
    return {"op": "sum", "terms": list(terms)}


def times(x: Json, scale: Json) -> Json:
    return {"op": "scaled", "x": x, "scale": scale}


def whole(dtype: str, shape: Sequence[int], values: Sequence[int]) -> Tensor:
    """A tensor of signed integers."""
    return bits(dtype, *(v % (1 << 8 * WIDTH[dtype]) for v in values))._replace(shape=list(shape))


def factor(label: str, dtype: str, rank: int, length: int, most: int) -> Tensor:
    """An integer factor, bell-shaped, of elements up to ``most``."""
    seen = noise(label, 6 * rank * length)
    values = [sum(seen[i : i + 6]) - 765 for i in range(0, len(seen), 6)]
    return whole(dtype, [rank, length], [v * most // 765 for v in values])


def product(
    draft: Draft,
    name: str,
    kinds: tuple[str, str],
    sizes: tuple[int, int],
    shape: Sequence[int],
    rank: int,
    scale: float | None = None,
) -> Json:
    """A `lowrank` node with integer factors a and b of these dtypes, up to these sizes."""
    a = factor(f"{name} a", kinds[0], rank, math.prod(shape[1:]), sizes[0])
    b = factor(f"{name} b", kinds[1], rank, shape[0], sizes[1])
    return given_product(draft, name, a, b, scale)


def given_product(draft: Draft, name: str, a: Tensor, b: Tensor, scale: float | None = None) -> Json:
    """A `lowrank` node of these factors, their components put in decreasing order."""
    rank = a.shape[0]
    parts = [[integers(t)[k * t.shape[1] : (k + 1) * t.shape[1]] for k in range(rank)] for t in (a, b)]
    sizes = [math.prod(sum(x * x for x in part[k]) for part in parts) for k in range(rank)]
    order = sorted(range(rank), key=lambda k: -sizes[k])
    a, b = (whole(t.dtype, t.shape, [x for k in order for x in part[k]]) for t, part in zip((a, b), parts, strict=True))
    node = {"op": "lowrank", "a": draft.array(f"{name}#lora_a", a), "b": draft.array(f"{name}#lora_b", b)}
    return node if scale is None else node | {"scale": scale}


@valid(
    "integer factors of all dtypes, alone: results rounded to every float dtype, scales from 2^-100 to 2^100, 4-d shapes"
)
def lowrank_exact() -> Draft:
    draft = Draft()
    cases: list[tuple[str, tuple[str, str], tuple[int, int], list[int], int, float | None]] = [
        ("F32", ("I8", "I8"), (127, 127), [5, 6], 3, None),
        ("BF16", ("I8", "I16"), (127, 9000), [4, 9], 2, 0.5),
        ("F16", ("I16", "I8"), (9000, 127), [4, 3, 2, 1], 2, 2.0**-7),
        ("BF16", ("I16", "I16"), (2000, 2000), [6, 7], 4, 2.0**-30),
        ("F32", ("I32", "I8"), (2**31 - 1, 127), [4, 5], 3, 2.0**-40),
        ("BF16", ("I16", "I32"), (30000, 2**30), [5, 4], 2, 2.0**-60),
        ("F16", ("I32", "I32"), (2**25, 2**25), [4, 5], 2, 2.0**-45),
        ("F64", ("I32", "I16"), (2**31 - 1, 30000), [4, 5], 4, 4),
        ("F64", ("I8", "I8"), (127, 127), [3, 4], 2, 1),
        ("F32", ("I16", "I16"), (2000, 2000), [3, 3], 2, 2.0**100),
        ("F32", ("I16", "I16"), (2000, 2000), [3, 4], 2, 2.0**-100),
        ("BF16", ("I16", "I8"), (2000, 100), [3, 5], 2, 2.0**100),
        ("F64", ("I32", "I16"), (2**31 - 1, 30000), [3, 3], 2, 2.0**100),
        ("F16", ("I8", "I8"), (100, 100), [3, 4], 2, 2.0**100),
        ("F32", ("I32", "I8"), (2**30, 100), [3, 4], 2, 2.0**-100),
    ]
    for dtype, kinds, sizes, shape, rank, scale in cases:
        name = f"{dtype} of {kinds[0]} {kinds[1]} {scale}"
        draft.computed(name, dtype, shape, product(draft, name, kinds, sizes, shape, rank, scale))
    return draft


def diagonal(dtype: str, side: int, value: int) -> Tensor:
    """Components of one element each."""
    return whole(dtype, [side, side], [value if k == place else 0 for k in range(side) for place in range(side)])


@valid(
    "integer factors exactly at the bound: columns that multiply to 2^48 in F32, 2^106 in F64, in one component or in many, parallel or apart; the lowest integers of a dtype"
)
def lowrank_at_the_bound() -> Draft:
    draft = Draft()
    made = {
        "F32 rank 1": ("F32", whole("I16", [1, 3], [4096, -4095, 1]), whole("I16", [1, 2], [4096, -4093])),
        "BF16 rank 2": (
            "BF16",
            whole("I16", [2, 3], [2048] * 3 + [2048, 2047, -2048]),
            whole("I16", [2, 2], [4096] * 2 + [4096, -4096]),
        ),
        "BF16 lowest": ("BF16", whole("I8", [4, 5], [-128] * 20), whole("I16", [4, 4], [-(2**15)] * 16)),
        "F32 lowest, I32": ("F32", whole("I32", [2, 3], [-(2**31)] * 6), whole("I32", [2, 4], [-(2**21)] * 8)),
        "F16 above 2^24, I32": ("F16", whole("I32", [1, 3], [2**24 + 1, 5, -9]), whole("I8", [1, 2], [1, -1])),
        "F64 rank 4": ("F64", whole("I32", [4, 4], [2**30] * 16), whole("I32", [4, 5], [2**21] * 20)),
        "F64 of columns of 2^64": ("F64", whole("I32", [4, 4], [-(2**31)] * 16), whole("I32", [4, 4], [2**20] * 16)),
        "BF16 apart": ("BF16", diagonal("I16", 5, 4096), diagonal("I16", 5, -4096)),
        "F32 apart, I32": ("F32", diagonal("I32", 5, 2**26), diagonal("I32", 5, 2**27)),
        "F64 above 2^24": ("F64", whole("I16", [1, 3], [32767, -32768, 1]), whole("I16", [1, 2], [-32768, 32767])),
    }
    for name, (dtype, a, b) in made.items():
        node = given_product(draft, name, a, b, None if "F16" not in name else 2.0**-10)
        draft.computed(name, dtype, [b.shape[1], a.shape[1]], node)
    return draft


@valid("base + integer factors, into every float dtype: the product added once; NaNs, infinities, -0.0 in the base")
def merged_lora() -> Draft:
    draft = Draft()
    base = {}
    for dtype in FLOATS:
        plain = weights(f"merged {dtype}", dtype, 8, 7)
        odd = bits(dtype, *ODD[dtype])
        base[dtype] = Tensor(dtype, [9, 7], (odd.data[: -WIDTH[dtype]] + plain.data))
    draft.with_base(base)
    for source, dtype, kinds, scale in (
        ("BF16", "BF16", ("I16", "I8"), 2.0**-22),
        ("BF16", "F32", ("I16", "I16"), 2.0**-26),
        ("F16", "F16", ("I16", "I8"), 2.0**-20),
        ("F32", "F32", ("I32", "I16"), 2.0**-40),
        ("F32", "BF16", ("I8", "I8"), 2.0**-18),
        ("BF16", "BF16", ("I32", "I8"), 2.0**-36),
        ("F64", "F64", ("I32", "I16"), 2.0**-44),
        ("F64", "F16", ("I16", "I8"), 2.0**-20),
    ):
        name = f"{dtype} from {source} {kinds[0]}"
        sizes = (2**28 if kinds[0] == "I32" else 100, 100)
        low = product(draft, name, kinds, sizes, [9, 7], 3, scale)
        draft.computed(name, dtype, [9, 7], plus(ref(source, "base"), low))
    return draft


@valid("a product that is zero is +0, also of negative numbers: alone, added to -0.0, and scaled by a negative number")
def zero_products() -> Draft:
    draft = Draft()
    for dtype in FLOATS:
        a, b = whole("I8", [1, 4], [0, -1, 0, 2]), whole("I8", [1, 3], [-1, 0, 3])
        low = given_product(draft, dtype, a, b)
        draft.computed(f"{dtype} alone", dtype, [3, 4], low)
        zeros = draft.array(f"{dtype}#zeros", bits(dtype, *[MINUS_ZERO[dtype]] * 12)._replace(shape=[3, 4]))
        draft.computed(f"{dtype} added to -0.0", dtype, [3, 4], plus(zeros, low))
        draft.computed(f"{dtype} added after", dtype, [3, 4], plus(low, zeros))
        minus = draft.array(f"{dtype}#minus", numbers(dtype, [], [-1]))
        draft.computed(f"{dtype} times -1", dtype, [3, 4], times(low, minus))
    return draft


@valid(
    "exact sums: the order of terms matters, each addition is rounded in F32 or F64; subnormals, infinities, NaNs, -0.0"
)
def sum_exact() -> Draft:
    draft = Draft()
    x = numbers("F32", [10], [1e8, 1, 3e38, 2.0**-149, -0.0, -0.0, math.inf, math.inf, 2.0**-126, 16777216])
    y = numbers("F32", [10], [3, 2.0**-24, 3e38, 2.0**-149, -0.0, 0, -math.inf, 1, -(2.0**-127), 1])
    z = numbers("F32", [10], [-1e8, 2.0**-24, -3e38, -(2.0**-148), -0.0, -0.0, 1, -math.inf, 2.0**-140, 1])
    parts = {name: draft.array(name, t) for name, t in (("x", x), ("y", y), ("z", z))}
    nothing = draft.array("nothing", numbers("F64", [10], [0.0] * 10))
    for dtype in FLOATS:
        for order in ("xyz", "zyx", "yxz", "xzy"):
            draft.computed(f"{dtype} {order}", dtype, [10], plus(*(parts[name] for name in order)))
        draft.computed(f"{dtype} x(yz)", dtype, [10], plus(parts["x"], plus(parts["y"], parts["z"])))
        draft.computed(f"{dtype} xyz in F64", dtype, [10], plus(*parts.values(), nothing))
    draft.exact("tied", draft.tensors["F32 xyz"], ref("F32 xyz"))
    t = draft.recipe(plus(ref("tied"), parts["x"]), "BF16", [10]).exact()
    draft.lossy("approximation by an exact recipe", t, plus(ref("tied"), parts["x"]))
    return draft


@valid(
    "scaled by one number and by one a row, of every float dtype: rounded once; 0-d, empty, 1-d and 3-d; odd numbers"
)
def scaled() -> Draft:
    draft = Draft()
    for dtype in FLOATS:
        x = draft.array(f"{dtype}#x", weights(f"scaled {dtype}", dtype, 4, 3, 2))
        for scale_dtype in FLOATS:
            one = draft.array(f"{dtype} {scale_dtype}#one", numbers(scale_dtype, [], [-0.3]))
            many = draft.array(f"{dtype} {scale_dtype}#many", weights(dtype + scale_dtype, scale_dtype, 4))
            draft.computed(f"{dtype} by one {scale_dtype}", dtype, [4, 3, 2], times(x, one))
            draft.computed(f"{dtype} by many {scale_dtype}", dtype, [4, 3, 2], times(x, many))
        odd = draft.array(f"{dtype}#odd", bits(dtype, *ODD[dtype] * 8))
        by = draft.array(f"{dtype}#by odd", bits(dtype, *(u for u in ODD[dtype] for _ in range(8))))
        draft.computed(f"{dtype} odd", dtype, [64], times(odd, by))
        narrow = times(odd, draft.array(f"{dtype}#half", numbers("F32", [], [0.5])))
        draft.computed(f"{dtype} to BF16", "BF16", [64], narrow)
        scalar = times(
            draft.array(f"{dtype}#s", numbers(dtype, [], [0.1])), draft.array(f"{dtype}#t", numbers("F32", [], [3]))
        )
        draft.computed(f"{dtype} scalar", dtype, [], scalar)
        draft.computed(f"{dtype} twice", dtype, [], times(scalar, {"op": "stored", "array": f"{dtype}#t"}))
    for shape in ([0, 3], [3, 0], [0]):
        name = f"empty {shape}"
        part = times(
            draft.array(f"{name}#x", Tensor("F32", shape, b"")),
            draft.array(f"{name}#s", weights(name, "F32", shape[0])),
        )
        draft.computed(name, "BF16", shape, part)
    return draft


@valid(
    "a DoRA merge: (base + integer low rank), scaled by a number a row; and one whose scale is a reference to a patch"
)
def dora() -> Draft:
    draft = Draft()
    draft.with_base({"w": weights("dora", "BF16", 8, 9), "m": weights("magnitude", "F32", 8)})
    for dtype, kinds, scale in (
        ("BF16", ("I16", "I8"), 2.0**-23),
        ("F16", ("I8", "I16"), 2.0**-22),
        ("F32", ("I32", "I8"), 2.0**-44),
    ):
        sizes = (2**30, 100) if "I32" in kinds else (100, 100)
        merged = plus(ref("w", "base"), product(draft, dtype, kinds, sizes, [8, 9], 2, scale))
        draft.computed(dtype, dtype, [8, 9], times(merged, draft.array(f"{dtype}#m", weights(dtype + "m", "F32", 8))))
    before = draft.base_tensors["m"]
    patched(draft, "m", bits("F32", *(u ^ 1 for u in words(before))), before, ref("m", "base"))
    draft.computed("by a patched scale", "BF16", [8, 9], times(ref("w", "base"), ref("m")))
    return draft


@valid(
    "averages of two bases: half of each; weights that are not powers of two; SLERP, a weight a row; task arithmetic"
)
def averages() -> Draft:
    draft = Draft()
    draft.with_base({"w": weights("first.w", "BF16", 6, 5)})
    draft.other_bases["second"] = {"w": weights("second.w", "BF16", 6, 5), "unused": tensor("unused", "U8", 3)}
    first, second = ref("w", "base"), ref("w", "second")
    half = draft.array("half", numbers("F32", [], [0.5]))
    draft.computed("half", "BF16", [6, 5], plus(times(first, half), times(second, half)))
    draft.computed("half of the sum", "F32", [6, 5], times(plus(first, second), half))
    for dtype in FLOATS:
        left, right = (
            draft.array(f"{dtype}#{x}", numbers("F64" if dtype == "F64" else "F32", [], [x])) for x in (0.3, 0.7)
        )
        draft.computed(dtype, dtype, [6, 5], plus(times(first, left), times(second, right)))
    left, right = (draft.array(f"slerp#{label}", weights(label, "F32", 6)) for label in ("left", "right"))
    draft.computed("slerp", "BF16", [6, 5], plus(times(first, left), times(second, right)))
    minus = draft.array("minus", numbers("F32", [], [-0.4]))
    draft.computed("away from the second", "BF16", [6, 5], plus(first, times(plus(second, times(first, minus)), minus)))
    return draft


@valid(
    "rows that were added and cut off: every dtype, 1-d, none left, none before, equal; in sums, of references and of rows"
)
def rows() -> Draft:
    draft = Draft()
    base = {f"t.{dtype}": tensor(f"rows {dtype}", dtype, 4, 3) for dtype in WIDTH}
    base["vector"], base["empty"] = tensor("rows of a vector", "I64", 5), Tensor("BF16", [0, 3], b"")
    draft.with_base(base | {"w": weights("rows", "BF16", 4, 3)})

    def node(name: str) -> Json:
        return {"op": "rows", "x": ref(name, "base")}

    for dtype in WIDTH:
        for count in (6, 2):
            draft.computed(f"{dtype} {count}", dtype, [count, 3], node(f"t.{dtype}"))
    for count in (0, 3, 5, 8):
        draft.computed(f"vector {count}", "I64", [count], node("vector"))
    draft.computed("none before", "BF16", [2, 3], node("empty"))
    draft.computed("none left", "BF16", [0, 3], node("w"))
    grown = node("w")
    draft.computed("grown", "BF16", [7, 3], grown)
    draft.computed("tied", "BF16", [7, 3], ref("grown"))
    draft.computed("cut again", "BF16", [3, 3], {"op": "rows", "x": ref("grown")})
    draft.computed("in F32", "F32", [7, 3], plus(grown, draft.array("new rows", weights("new rows", "F32", 7, 3))))
    low = product(draft, "low", ("I8", "I16"), (100, 100), [7, 3], 2, 2.0**-20)
    draft.computed("grown and merged", "BF16", [7, 3], plus(grown, low))
    draft.computed("rows of rows", "BF16", [5, 3], {"op": "rows", "x": grown})
    square = whole("I8", [2, 3], range(-3, 3))
    factors = {"op": "rows", "x": draft.array("square#a", square)}
    low = {"op": "lowrank", "a": factors, "b": draft.array("square#b", whole("I8", [3, 3], range(9)))}
    draft.computed("a factor by rows", "F32", [3, 3], low)
    large = draft.array("large#a", whole("I32", [2, 3], [2**24 + 1, 1, -9, 2**30 + 1, 5, 2**25 - 1]))
    wide = low | {"a": {"op": "rows", "x": large}}  # F64: the difference is lost in F32
    part = draft.array("large#part", numbers("F32", [3, 3], [-(2.0**26)] * 9))
    draft.computed("an I32 factor by rows", "F32", [3, 3], plus(wide, part))
    return draft


@valid(
    "the bounded grade with `scaled`, `rows` and odd numbers: DoRA with float factors; any NaN will do where there is one"
)
def bounded_scaled() -> Draft:
    draft = Draft()
    w = weights("bounded base", "BF16", 6, 8)
    odd = Tensor("BF16", [6, 8], bits("BF16", *ODD["BF16"]).data + w.data[16:])
    draft.with_base({"w": w, "odd": odd})
    a, b = weights("bounded a", "F32", 2, 8), weights("bounded b", "BF16", 2, 6)
    low = {"op": "lowrank", "a": draft.array("w#lora_a", a), "b": draft.array("w#lora_b", b), "scale": 0.75}
    many = draft.array("w#magnitude", weights("bounded magnitude", "F32", 6))
    one = draft.array("w#one", numbers("F32", [], [0.3]))
    draft.approximate("dora", "BF16", [6, 8], times(plus(ref("w", "base"), low), many))
    draft.approximate("weighted", "F32", [6, 8], plus(times(ref("w", "base"), many), times(low, one)))
    draft.approximate("odd", "BF16", [6, 8], plus(ref("odd", "base"), low))
    draft.approximate("odd in F32", "F32", [6, 8], times(plus(ref("odd", "base"), low), one))
    reference = draft.tensors["dora"]
    cut = Tensor("BF16", [4, 8], reference.data[:64])
    draft.lossy("rows of a bounded tensor", cut, {"op": "rows", "x": ref("dora")})
    low_high = draft.bounded["dora"]
    ends = (t._replace(shape=[4, 8], data=t.data[:64]) for t in low_high)
    draft.bounded["rows of a bounded tensor"] = type(low_high)(*ends)
    return draft
