"""Valid cases of `decayed`: weights that AdamW only decayed, every edge of its table, and recipes around it."""

# ruff: noqa: E501 (descriptions in one line)

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from vectors.draft import Draft, ref
from vectors.evaluate import decayed
from vectors.exact import FIELDS, Real, multiply, pattern, real
from vectors.valid import corrected, patched, valid
from vectors.valid_exact import ODD, plus, product, times
from vectors.valid_groups import BOUNDS, MARGINS, near
from vectors.values import Json, Tensor, bits, noise, numbers, weights, words

# Dtype -> what a step of AdamW leaves of a weight, 1 minus learning rate times decay, and the number of steps.
DECAY = {
    "F32": (1 - Fraction(1, 10**6), 12),
    "F16": (1 - Fraction(1, 1000), 8),
    "BF16": (1 - Fraction(1, 100), 3),
}


def node(x: Json, table: Json) -> Json:
    return {"op": "decayed", "x": x, "table": table}


def table_of(gaps: Sequence[int], changes: Sequence[int]) -> Tensor:
    """A table of two rows; what is below 0 is meant modulo 2^32."""
    assert len(gaps) == len(changes)
    return bits("U32", *(number % 2**32 for number in (*gaps, *changes)))._replace(shape=[2, len(gaps)])


def after_training(x: Tensor) -> Tensor:
    """What the steps of AdamW leave of numbers; odd ones are put back as they were."""
    factor, count = DECAY[x.dtype]
    patterns = []
    for u in words(x):
        value = real(u, x.dtype)
        for _ in range(count):
            value = multiply(value, Real(False, factor), x.dtype)
        patterns.append(pattern(value, x.dtype) if ordinary(u, x.dtype) else u)
    return bits(x.dtype, *patterns)._replace(shape=x.shape)


def ordinary(u: int, dtype: str) -> bool:
    exponent_bits, mantissa_bits = FIELDS[dtype]
    return 0 < u >> mantissa_bits & (1 << exponent_bits) - 1 < (1 << exponent_bits) - 1


def observed(x: Tensor, after: Tensor) -> Tensor:
    """The table of what happened to each mantissa, one column for all that follow each other and moved alike."""
    moves: dict[int, int] = {}
    for u, v in zip(words(x), words(after), strict=True):
        mantissa = u % (1 << FIELDS[x.dtype][1])
        if ordinary(u, x.dtype):
            assert moves.setdefault(mantissa, u - v) == u - v, "rounded into the subnormals"
    gaps: list[int] = []
    changes: list[int] = []
    last = moved = 0
    for mantissa in sorted(moves):
        if moves[mantissa] != moved or not gaps:
            gaps.append(mantissa - last)
            changes.append(moves[mantissa] - moved)
            last, moved = mantissa, moves[mantissa]
    return table_of(gaps, changes)


@valid(
    "what AdamW leaves of weights without a gradient, F32, F16, BF16: of a base, stored, tied; odd numbers as they were"
)
def decayed_training() -> Draft:
    draft = Draft()
    base = {dtype: near(f"decay {dtype}", dtype, 400) for dtype in DECAY}
    after = {dtype: after_training(x) for dtype, x in base.items()}
    tables = {dtype: observed(x, after[dtype]) for dtype, x in base.items()}
    draft.with_base(base | {f"{dtype}.table": table for dtype, table in tables.items()})
    for dtype in DECAY:
        table = draft.array(f"{dtype}#table", tables[dtype], "planes", "zstd", 50)
        draft.exact(dtype, after[dtype], node(ref(dtype, "base"), table))
        draft.exact(f"{dtype} tied", after[dtype], ref(dtype))
        stored = draft.array(f"{dtype}#x", base[dtype], "float-planes", "zstd", 150)
        draft.exact(f"{dtype} stored", after[dtype], node(stored, ref(f"{dtype}.table", "base")))
        draft.exact(f"{dtype} before", base[dtype], ref(dtype, "base"))
        draft.stored(f"{dtype} table", tables[dtype])
        draft.exact(f"{dtype} by tensors", after[dtype], node(ref(f"{dtype} before"), ref(f"{dtype} table")))
    return draft


def case(
    draft: Draft, name: str, dtype: str, gaps: Sequence[int], changes: Sequence[int], pairs: Sequence[tuple[int, int]]
) -> None:
    """Add a tensor of which each pattern and what becomes of it are written down."""
    x = draft.array(f"{name}#x", bits(dtype, *(u for u, _ in pairs)))
    table = draft.array(f"{name}#table", table_of(gaps, changes))
    draft.exact(name, bits(dtype, *(v for _, v in pairs)), node(x, table))


def still(*patterns: int) -> list[tuple[int, int]]:
    return [(u, u) for u in patterns]


@valid(
    "steps one by one: across a binade, into zeros, subnormals, infinities and NaNs, around 2^(w-1) and 2^32; signs; odd numbers stay"
)
def decayed_steps() -> Draft:
    draft = Draft()
    down = [(0x3C01, 0x3BFE), (0x3C00, 0x3BFD), (0xBC01, 0xBBFE), (0x3FFF, 0x3FFC)]
    case(draft, "F16 down", "F16", [0], [3], [*down, *still(*ODD["F16"])])
    up = [(0x3BFF, 0x3C01), (0xBBFE, 0xBC00), (0x7BFF, 0x7C01), (0xFBFE, 0xFC00), (0x3C00, 0x3C02)]
    case(draft, "F16 up", "F16", [0], [-2], [*up, *still(*ODD["F16"])])
    low = [(0x0400, 0x0000), (0x8400, 0x8000), (0x0401, 0x0001), (0x87FF, 0x83FF), (0x0800, 0x0400)]
    case(draft, "F16 to zero", "F16", [0], [0x400], low)
    around = [(0x0400, 0x7F00), (0x8400, 0xFF00), (0x04FF, 0x7FFF), (0x0500, 0x0000), (0xC500, 0xC000)]
    case(draft, "F16 around", "F16", [0], [0x500], around)
    case(draft, "F16 all around", "F16", [0], [0x8000], still(0x3C00, 0xBC00, 0x0400, 0xFBFF))
    case(draft, "F16 all around and one", "F16", [0], [0x12348001], [(0x3C00, 0x3BFF), (0x8400, 0x83FF)])
    sums = [(0x3C00, 0x3C01), (0x3C01, 0x3BFF), (0xBC02, 0xBC03), (0x3C03, 0x3C02), (0x3FFF, 0x3FFE)]
    case(draft, "F16 sums around 2^32", "F16", [0, 1, 1, 1], [-1, 3, -3, 2], sums)

    down = [(0x3F80, 0x3F7E), (0xBF81, 0xBF7F), (0x3FFF, 0x3FFD), (0x0080, 0x007E), (0x8081, 0x807F)]
    case(draft, "BF16 down", "BF16", [0], [2], [*down, *still(*ODD["BF16"])])
    up = [(0x7F7F, 0x7F80), (0xFF7F, 0xFF80), (0x3F7F, 0x3F80), (0xBFFF, 0xC000), (0x0080, 0x0081)]
    case(draft, "BF16 up", "BF16", [0], [2**32 - 1], [*up, *still(*ODD["BF16"])])
    around = [(0x0080, 0x0000), (0x8080, 0x8000), (0x3F80, 0x3F00), (0x00FF, 0x007F)]
    case(draft, "BF16 to zero", "BF16", [0], [0x8080], around)
    around = [(0x0080, 0x7F7F), (0x8080, 0xFF7F), (0x3F80, 0x3E7F), (0x0181, 0x0080)]
    case(draft, "BF16 around", "BF16", [0], [0x101], around)

    down = [(0x3F800000, 0x3F7FFFFF), (0xBF800001, 0xBF800000), (0x00800000, 0x007FFFFF), (0x80800000, 0x807FFFFF)]
    case(draft, "F32 down", "F32", [0], [1], [*down, *still(*ODD["F32"])])
    up = [(0x7F7FFFFF, 0x7F800000), (0xFF7FFFFF, 0xFF800000), (0x3F7FFFFF, 0x3F800000), (0xBF800000, 0xBF800001)]
    case(draft, "F32 up", "F32", [0], [-1], [*up, *still(*ODD["F32"])])
    around = [(0x3F800000, 0x3F800000), (0x80800000, 0x80800000), (0x00800005, 0x00800005)]
    case(draft, "F32 all around", "F32", [0], [2**31], around)
    around = [(0x00800000, 0x7FFFFFFF), (0x80800000, 0xFFFFFFFF), (0x3F800000, 0x3EFFFFFF), (0x00FFFFFF, 0x007FFFFE)]
    case(draft, "F32 around", "F32", [0], [2**31 + 2**23 + 1], around)
    sums = [(0x3F800000, 0x3F800001), (0x3F800001, 0x3F7FFFFF), (0x3F800002, 0x3F800004), (0xBF800003, 0xBF800003)]
    case(draft, "F32 sums around 2^32", "F32", [0, 1, 1, 1], [-1, 3, -4, 2], sums)
    sums = [(0x3F800000, 0x3F800002), (0x3F800001, 0x3F800003), (0x3F800002, 0x3F800004), (0xBF800003, 0xBF800005)]
    case(draft, "F32 sums far around 2^32", "F32", [0, 1, 1, 1], [-2, 2**31, 2**31, 0], sums)
    return draft


BOUNDED: dict[str, tuple[list[int], list[int], dict[int, int]]] = {
    # name: gaps; changes; the step of some mantissas, -1 for the last
    "none reached": ([9], [1], {0: 0, 1: 0, 8: 0, 9: 1, 10: 1, -1: 1}),
    "the first is 0": ([0], [1], {0: 1, 1: 1, -1: 1}),
    "equal": ([4, 0, 0, 1, 0], [1, 2, 4, 8, -5], {0: 0, 3: 0, 4: 7, 5: 10, 6: 10, -1: 10}),
    "equal to 0": ([0, 0, 3, 0], [1, 2, 4, 8], {0: 3, 2: 3, 3: 15, -1: 15}),
    "up to 2^32": ([5, 2**32 - 5, 1], [1, 2, 4], {0: 0, 1: 0, 4: 0, 5: 1, -1: 1}),
    "beyond 2^32": ([5, 2**32 - 1, 2, 0], [1, 2, 4, 8], {0: 0, 3: 0, 4: 0, 5: 1, 6: 1, -1: 1}),
    "up to 2^33": ([3, *[2**31] * 4, 1], [1, 2, 4, 8, 16, 32], {0: 0, 2: 0, 3: 1, 4: 1, -1: 1}),
    "far beyond": ([2**32 - 1] * 20 + [20], [1] * 21, dict.fromkeys([*range(21), -1], 0)),
}


@valid(
    "bounds one by one: none reached, equal ones, the last mantissa, beyond all mantissas, sums beyond 2^32 that are never reached"
)
def decayed_bounds() -> Draft:
    draft = Draft()
    for dtype, one, sign in (("F32", 0x3F800000, 1 << 31), ("F16", 0x3C00, 1 << 15), ("BF16", 0x3F80, 1 << 15)):
        count = 1 << FIELDS[dtype][1]
        of_this_dtype: dict[str, tuple[list[int], list[int], dict[int, int]]] = {
            "last mantissa": ([1, count - 2], [1, 2], {0: 0, 1: 1, -2: 1, -1: 3}),
            "beyond mantissas": ([1, count - 1], [1, 2], {0: 0, 1: 1, -1: 1}),
            "beyond at once": ([count], [5], {0: 0, 1: 0, -1: 0}),
        }
        for name, (gaps, changes, steps) in (BOUNDED | of_this_dtype).items():
            starts = (one, sign + one + 2 * count)  # 1.0 and -4.0
            pairs = [(start + f % count, start + f % count - step) for start in starts for f, step in steps.items()]
            case(draft, f"{dtype} {name}", dtype, gaps, changes, pairs)
    return draft


@valid(
    "tables of one column and of as many as F16 and BF16 have mantissas; in planes and chunks, segments, by rows; one for three dtypes"
)
def decayed_tables() -> Draft:
    draft = Draft()
    for dtype in ("F16", "BF16"):
        exponent_bits, mantissa_bits = FIELDS[dtype]
        count, most = 1 << mantissa_bits, (1 << exponent_bits) - 2
        starts = [field * count + side * 2**15 for field, side in ((0, 1), (1, 1), (most // 2, 0), (most + 1, 0))]
        every = bits(dtype, *(start + f for start in starts for f in range(count)))  # the first and last stay
        x = draft.array(f"{dtype}#every", every, "planes", "zstd", 999)
        ones = [0] + [1] * (count - 1)
        cleared = [u - u % count if ordinary(u, dtype) else u for u in words(every)]
        table = draft.array(f"{dtype}#cleared", table_of(ones, ones), "planes", "zstd", 300)
        draft.exact(f"{dtype} cleared", bits(dtype, *cleared), node(x, table))
        turned = [u ^ count - 1 if ordinary(u, dtype) else u for u in words(every)]  # the step of f is 2 f + 1 - count
        table = draft.array(f"{dtype}#turned", table_of(ones, [1 - count] + [2] * (count - 1)), "none", "zstd")
        draft.exact(f"{dtype} turned", bits(dtype, *turned), node(x, table))
        changes = [int.from_bytes(noise(f"{dtype} {i}", 4), "little") for i in range(count)]
        table = draft.segments(f"{dtype}#noise", table_of(ones, changes), count, [count], [count])
        draft.computed(f"{dtype} noise", dtype, every.shape, node(x, table))
        table = draft.array(f"{dtype}#zeros", table_of([0] * count, [1] * count), "planes", "zstd", 256)
        less = [(u - count) % 2**15 + u // 2**15 * 2**15 if ordinary(u, dtype) else u for u in words(every)]
        draft.exact(f"{dtype} all bounds 0", bits(dtype, *less), node(x, table))
    shared = draft.array("shared", table_of([0, 40, 30, 30], [1, 2, -5, 9]), "none", "none", 3)
    for dtype in DECAY:
        x = draft.array(f"{dtype}#x", weights(f"shared {dtype}", dtype, 9, 8))
        draft.computed(f"{dtype} shared", dtype, [9, 8], node(x, shared))
    draft.stored("three rows", bits("U32", *range(15))._replace(shape=[3, 5]))
    draft.stored("one row", bits("U32", *range(5))._replace(shape=[1, 5]))
    for name in ("three rows", "one row"):  # cut or filled up to the shape of the tensor: 2, 5
        x = draft.array(f"{name}#x", weights(name, "BF16", 2, 5))
        draft.computed(f"by {name}", "BF16", [2, 5], node(x, {"op": "rows", "x": ref(name)}))
    return draft


@valid(
    "decayed tensors without dimensions, without elements, of one element, of four dimensions, of rows filled up; tables of as many columns as elements"
)
def decayed_shapes() -> Draft:
    draft = Draft()
    one = draft.array("one column", table_of([0], [6]))
    three = draft.array("three columns", table_of([0, 3, 50], [1, 2, 3]))
    for dtype in DECAY:
        for shape in ([], [0], [3, 0], [0, 3], [1], [3], [3, 1], [2, 3, 2, 1]):
            x = draft.array(f"{dtype} {shape}#x", weights(f"{dtype} {shape}", dtype, *shape))
            draft.computed(f"{dtype} {shape}", dtype, shape, node(x, three if math.prod(shape) >= 3 else one))
        x = draft.array(f"{dtype} rows#x", weights(f"{dtype} rows", dtype, 2))
        draft.computed(f"{dtype} rows", dtype, [3], node({"op": "rows", "x": x}, three))  # more columns than `x` has
    return draft


@valid(
    "decayed rows, patches, references and decayed weights; in sums, scaled, low rank, each in F32 and F64; an approximation"
)
def decayed_in_recipes() -> Draft:
    draft = Draft()
    base = {dtype: near(f"in recipes {dtype}", dtype, 30)._replace(shape=[6, 5]) for dtype in DECAY}
    draft.with_base(base | {"magnitude": weights("decayed magnitude", "F32", 6)})
    table = draft.array("table", table_of([0, 30, 30, 30], [1, 1, 1, -4]))
    steps = draft.arrays["table"].tensor
    double = draft.array("double", weights("double", "F64", 6, 5))
    for dtype, x in base.items():
        mine = node(ref(dtype, "base"), table)
        for count in (8, 4):
            rows = node({"op": "rows", "x": ref(dtype, "base")}, table)
            draft.computed(f"{dtype} of {count} rows", dtype, [count, 5], rows)
        draft.computed(f"{dtype} rows of decayed", dtype, [8, 5], {"op": "rows", "x": mine})
        draft.computed(f"{dtype} twice", dtype, [6, 5], node(mine, table))
        draft.computed(f"{dtype} once", dtype, [6, 5], mine)
        draft.computed(f"{dtype} twice by reference", dtype, [6, 5], node(ref(f"{dtype} once"), table))
        changed = bits(dtype, *(u ^ 1 for u in words(x)))._replace(shape=x.shape)
        patched(draft, f"{dtype} changed", changed, x, ref(dtype, "base"))
        draft.exact(f"{dtype} of a patched", decayed(changed, steps), node(ref(f"{dtype} changed"), table))
        patch = draft.entries[f"{dtype} changed"]["recipe"]
        draft.exact(f"{dtype} of a patch", decayed(changed, steps), node(patch, table))
        low = product(draft, dtype, ("I16", "I8"), (100, 100), (6, 5), 2, 2.0**-20)
        draft.computed(f"{dtype} merged", dtype, [6, 5], plus(mine, low))
        scaled = times(mine, node(ref("magnitude", "base"), table))
        draft.computed(f"{dtype} scaled", "BF16", [6, 5], scaled)
        draft.computed(f"{dtype} in F64", "F64", [6, 5], plus(scaled, double))
        wide = product(draft, f"{dtype} wide", ("I32", "I8"), (2**25, 100), (6, 5), 2, 2.0**-38)
        draft.computed(f"{dtype} in F64, rounded", dtype, [6, 5], plus(mine, wide))
    draft.lossy("approximation", draft.tensors["F32 once"], node(ref("F32", "base"), table))
    a, b = (draft.array(f"low#{name}", weights(name, "F32", 2, n)) for name, n in (("a", 5), ("b", 6)))
    low = {"op": "lowrank", "a": node(a, table), "b": node(b, table), "scale": 0.75}
    draft.approximate("float factors", "BF16", [6, 5], plus(node(ref("BF16", "base"), table), low))
    return draft


@valid(
    "patches of decayed weights: plain, grouped by exponent, of another dtype, by margin of a sum; as a writer stores frozen rows"
)
def decayed_corrected() -> Draft:
    draft = Draft()
    draft.with_base({dtype: near(f"corrected {dtype}", dtype, 90) for dtype in DECAY})
    for dtype in DECAY:
        x = draft.base_tensors[dtype]
        table = draft.array(f"{dtype}#table", observed(x, after_training(x)), "planes", "zstd")
        mine = node(ref(dtype, "base"), table)
        corrected(draft, f"{dtype} plain", dtype, [90], mine)
        corrected(draft, f"{dtype} by exponent", dtype, [90], mine, "exponent", BOUNDS[dtype], 40)
        for target in ("F32", "BF16", "F64"):
            if target != dtype:
                corrected(draft, f"{dtype} to {target}", target, [90], mine, "exponent", BOUNDS[target], 90, "planes")
        one = numbers("F32", [], [0.75])
        scaled = times(mine, draft.array(f"{dtype}#one", one))
        corrected(draft, f"{dtype} by margin", "BF16", [90], scaled, "margin", MARGINS["F32"], 33)
    return draft


@valid("recipes as large as they may be: decayed 31 times, a table 31 nodes deep, 4,096 nodes with all tables")
def decayed_many_nodes() -> Draft:
    draft = Draft()
    draft.with_base({"u": weights("many nodes", "F32", 2, 3)})
    table = draft.array("table", table_of([0, 2**20, 2**21], [1, 2, -5]))
    deep, x = table, ref("u", "base")
    for _ in range(31):
        x = node(x, table)
    for _ in range(30):
        deep = {"op": "rows", "x": deep}
    draft.computed("deep x", "F32", [2, 3], x)
    draft.computed("deep table", "F32", [2, 3], node(ref("u", "base"), deep))
    draft.computed("s", "F32", [2, 3], plus(*[node(ref("u", "base"), table)] * 21))
    draft.computed("w", "F32", [2, 3], plus(*[ref("s")] * 63))
    return draft
