"""Invalid patches of wide predictions and with groups: steps 2, 5 and 8 of spec/reasons.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vectors.draft import Draft, ref
from vectors.invalid_exact import FLOATS_LOW, LOW, SUM, U, fixed, parts, recipe
from vectors.spoil import add, based, both, drop, manifest, put
from vectors.valid import corrected
from vectors.valid_exact import plus
from vectors.values import Json, bits, weights

GROUPS = ("tensors", "w", "recipe", "groups")


def correction(prediction: Json, residual: Json, by: str = "", bounds: Sequence[int] = (4,)) -> Json:
    node = {"op": "patch", "prediction": prediction, "residual": residual}
    return node | ({"groups": {"by": by, "bounds": list(bounds)}} if by else {})


ZERO, WIDE_ZERO = ({"op": "stored", "array": name} for name in ("residual", "wide residual"))
recipe(
    "prediction-wide-of-integers",
    "operand",
    "a wide prediction of an integer tensor",
    correction(SUM, WIDE_ZERO),
    dtype="I32",
)
recipe(
    "prediction-wide-bounded", "operand", "a wide prediction with float factors", correction(plus(U, FLOATS_LOW), ZERO)
)
recipe(
    "prediction-rows-bounded",
    "operand",
    "a prediction by rows of a bounded tensor",
    correction({"op": "rows", "x": ref("bounded")}, ZERO),
)
recipe("residual-wide", "operand", "a residual that is wide", correction(U, SUM))
recipe(
    "residual-rows-shape",
    "operand",
    "rows as a residual for a prediction of another shape",
    correction(ref("m"), {"op": "rows", "x": ref("residual")}),
)
recipe(
    "groups-of-ref", "operand", "groups of a residual that is a reference", correction(U, ref("residual"), "exponent")
)
recipe(
    "groups-of-rows", "operand", "groups of a residual by rows", correction(U, {"op": "rows", "x": ZERO}, "exponent")
)
recipe(
    "groups-of-integers",
    "operand",
    "groups of an integer tensor",
    correction(ref("matrix"), WIDE_ZERO, "exponent"),
    dtype="I32",
)
recipe("margin-of-ref", "operand", "a margin of a prediction that has a dtype", correction(U, ZERO, "margin"))
recipe(
    "margin-of-f32-ref",
    "operand",
    "a margin of an F32 prediction of BF16",
    correction({"op": "rows", "x": ref("column")}, ZERO, "margin"),
)
recipe("margin-of-f32", "operand", "a margin from F32 to F32", correction(SUM, WIDE_ZERO, "margin"), dtype="F32")


def of_f64() -> Draft:
    draft = parts()
    draft.stored("zero", bits("U64", *[0] * 12)._replace(shape=[4, 3]))
    node = correction(plus(ref("double"), LOW), {"op": "stored", "array": "zero"}, "margin")
    draft.entries["w"] = fixed(node, dtype="F64")
    draft.tensors["w"] = draft.tensors["double"]
    return draft


def of_8_bits() -> Draft:
    draft = parts()
    draft.stored("zero", bits("U8", *[0] * 12)._replace(shape=[4, 3]))
    node = correction(ref("small float"), {"op": "stored", "array": "zero"}, "exponent")
    draft.entries["w"] = fixed(node, dtype="F8_E4M3")
    draft.tensors["w"] = draft.tensors["small float"]
    return draft


add("margin-of-f64", "operand", "a margin from F64 to F64", of_f64)
add("groups-of-8-bits", "operand", "groups of an 8-bit float", of_8_bits)

GOOD = {"by": "exponent", "bounds": [100, 120]}
WRONG: dict[str, tuple[str, Any]] = {
    "list": ("groups that are a list", [100, 120]),
    "null": ("groups that are null", None),
    "without-by": ("groups by nothing", {"bounds": [100, 120]}),
    "by-unknown": ("groups by something unknown", GOOD | {"by": "mantissa"}),
    "by-number": ("groups by a number", GOOD | {"by": 1}),
    "without-bounds": ("groups without bounds", {"by": "exponent"}),
    "key": ("groups with an unknown key", GOOD | {"count": 3}),
    "bounds-number": ("bounds that are a number", GOOD | {"bounds": 100}),
    "bounds-empty": ("no bound", GOOD | {"bounds": []}),
    "bounds-256": ("256 bounds", GOOD | {"bounds": list(range(1, 257))}),
    "bounds-0": ("a bound of 0", GOOD | {"bounds": [0, 120]}),
    "bounds-2048": ("a bound of 2,048", GOOD | {"bounds": [120, 2048]}),
    "bounds-negative": ("a bound below 0", GOOD | {"bounds": [-1, 120]}),
    "bounds-descending": ("bounds that descend", GOOD | {"bounds": [120, 100]}),
    "bounds-equal": ("two equal bounds", GOOD | {"bounds": [100, 120, 120]}),
    "bounds-fraction": ("a bound written as 120.0", GOOD | {"bounds": [100, 120.0]}),
    "bounds-text": ("a bound that is a string", GOOD | {"bounds": [100, "120"]}),
    "bounds-true": ("a bound that is true", GOOD | {"bounds": [True, 120]}),
}
for name, (description, groups) in WRONG.items():
    manifest(f"groups-{name}", "schema", description, put(groups, *GROUPS), based)


def on_another_operator(m: Json) -> None:
    m["tensors"]["same"]["recipe"]["groups"] = GOOD


manifest("groups-on-ref", "schema", "groups on a reference", on_another_operator, based)


def grouped(change: Callable[[Json], object]) -> Callable[[], Draft]:
    """`w` corrected by exponent, its bounds changed afterwards: other bytes."""

    def make() -> Draft:

        draft = Draft()
        draft.with_base({"u": weights("grouped", "BF16", 40)})
        corrected(draft, "w", "BF16", [40], ref("u", "base"), "exponent", [119, 121], 0, "planes")
        change(draft.entries["w"]["recipe"])
        return draft

    return make


add(
    "digest-of-other-bounds",
    "digest",
    "groups with other bounds than the residual was ordered by",
    grouped(put([118, 120], "groups", "bounds")),
)
add("digest-without-groups", "digest", "the residual of groups, without groups", grouped(drop("groups")))
add(
    "digest-of-no-order",
    "digest",
    "one group, of a residual that has three",
    grouped(both(put([2047], "groups", "bounds"))),
)


def of_other_chunks() -> Draft:
    draft = Draft()
    draft.with_base({"u": weights("grouped", "BF16", 40)})
    corrected(draft, "v", "BF16", [40], ref("u", "base"), "exponent", [119, 121], 16, "planes")
    corrected(draft, "w", "BF16", [40], ref("v"), "exponent", [119, 121], 8, "planes")
    return draft


add("groups-of-other-chunks", "operand", "groups of a tensor that has groups in other chunks", of_other_chunks)
