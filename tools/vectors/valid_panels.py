"""Valid cases of `panels`: elements stored so that those of a few columns are together."""

from __future__ import annotations

from vectors.draft import Draft, ref
from vectors.valid import patched, valid
from vectors.valid_exact import plus, product, times
from vectors.values import WIDTH, Json, Tensor, numbers, tensor, weights


def node(x: Json, rows: int, columns: int) -> Json:
    return {"op": "panels", "x": x, "rows": rows, "columns": columns}


@valid("panels of every dtype; blocks and panels that divide the matrix or not, of one row or column, larger than it")
def panels() -> Draft:
    draft = Draft()
    for dtype in WIDTH:
        x = draft.array(dtype, tensor(f"panels {dtype}", dtype, 7, 10))
        draft.computed(dtype, dtype, [7, 10], node(x, 3, 4))
    x = draft.array("w", weights("panels", "BF16", 12, 10), "float-planes", "zstd", 20)
    for rows, columns in ((4, 5), (1, 3), (12, 1), (5, 10), (5, 9), (100, 4), (4, 100), (2**63 - 1, 2**63 - 1)):
        draft.computed(f"{rows} x {columns}", "BF16", [12, 10], node(x, rows, columns))
    deep = draft.array("deep", weights("deep panels", "F32", 4, 3, 2, 5), "float-planes", "zstd", 16)
    draft.computed("four dimensions", "F32", [4, 3, 2, 5], node(deep, 3, 8))
    for shape in ([0, 5], [5, 0], [1, 1], [3, 0, 2]):
        x = draft.array(f"{shape}", weights(f"{shape}", "F16", *shape))
        draft.computed(f"of shape {shape}", "F16", shape, node(x, 2, 2))
    wide = draft.array("wide", weights("wide panels", "BF16", 2, 4096), "float-planes", "zstd")
    draft.computed("4,096 panels", "BF16", [2, 4096], node(wide, 2, 1))
    return draft


@valid("panels of references and of panels; scaled, in sums and patches, and below what refers to them; bounded")
def panels_within() -> Draft:
    draft = Draft()
    draft.with_base({"w": weights("panels of a base", "BF16", 6, 8)})
    of_base = draft.computed("of a base", "BF16", [6, 8], node(ref("w", "base"), 4, 3))
    stored = node(draft.array("stored", weights("panels", "F32", 6, 8), "float-planes", "zstd", 12), 4, 3)
    draft.computed("stored", "F32", [6, 8], stored)
    draft.computed("tied", "F32", [6, 8], ref("stored"))
    draft.computed("of panels", "F32", [6, 8], node(ref("stored"), 2, 5))
    draft.computed("twice", "F32", [6, 8], node(node(ref("stored"), 2, 5), 3, 2))
    low = product(draft, "low", ("I8", "I16"), (100, 100), [6, 8], 2, 2.0**-20)
    draft.computed("and low rank", "BF16", [6, 8], plus(node(ref("w", "base"), 4, 3), low))
    many = draft.array("magnitudes", weights("magnitudes", "F32", 6))
    draft.computed("scaled", "F32", [6, 8], times(plus(ref("stored"), node(ref("of a base"), 5, 2)), many))
    draft.computed("fewer rows", "F32", [5, 8], {"op": "rows", "x": ref("stored")})
    patched(draft, "patched", weights("patched panels", "BF16", 6, 8), of_base, ref("of a base"))
    patched(draft, "of patched", weights("patched", "BF16", 6, 8), of_base, node(ref("w", "base"), 4, 3))
    a, b = weights("bounded a", "F32", 2, 8), weights("bounded b", "BF16", 2, 6)
    factors = {"op": "lowrank", "a": draft.array("w#lora_a", a), "b": draft.array("w#lora_b", b), "scale": 0.75}
    draft.approximate("bounded", "BF16", [6, 8], plus(node(ref("w", "base"), 4, 3), factors))
    shared = draft.array("shared#a", numbers("F32", [2, 8], [x / 16 for x in range(16)]))
    by_panels = {"op": "lowrank", "a": node(shared, 1, 3), "b": ref("square"), "scale": 0.5}
    draft.stored("square", Tensor("BF16", [2, 2], weights("square", "BF16", 2, 2).data))
    draft.approximate("a factor by panels", "F32", [2, 8], by_panels)
    return draft
