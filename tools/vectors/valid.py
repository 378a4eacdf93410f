"""What the valid conformance cases share: each is a function that draws up an archive, registered under its name.

The cases are in valid_*.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vectors.corrections import coded, difference, exponents, grouped, margins, residual, stepped
from vectors.draft import Draft
from vectors.evaluate import converted_root
from vectors.exact import converted
from vectors.values import WIDTH, Json, Tensor, noise

CASES: dict[str, tuple[str, Callable[[], Draft]]] = {}
WIDE = ("sum", "lowrank", "scaled")


def valid(description: str) -> Callable[[Callable[[], Draft]], Callable[[], Draft]]:
    def register(case: Callable[[], Draft]) -> Callable[[], Draft]:
        CASES[case.__name__.replace("_", "-")] = description, case
        return case

    return register


def patched(draft: Draft, name: str, target: Tensor, prediction: Tensor, node: Json) -> None:
    """Add a tensor that is a patch of a prediction which ``node`` gives."""
    node = {
        "op": "patch",
        "prediction": node,
        "residual": draft.array(f"{name}#residual", residual(target, prediction), "planes", "zstd"),
    }
    draft.exact(name, target, node)


def misses(label: str, count: int) -> list[int]:
    """Differences between a good prediction and its target: mostly 0, some 1 and -1, a few of any size."""
    seen = noise(label, 2 * count)
    few = [0] * 200 + [1] * 25 + [-1] * 25 + [2, -3, 40, -200, 30000, -32768]
    return [few[seen[i]] + (seen[count + i] % 3 if seen[i] >= 250 else 0) for i in range(count)]


def corrected(
    draft: Draft,
    name: str,
    dtype: str,
    shape: list[int],
    node: Json,
    by: str = "",
    bounds: Sequence[int] = (),
    chunk: int = 0,
    filter_: str = "segments",
    steps: Sequence[int] | None = None,
) -> None:
    """Add a tensor that lies ``steps`` (None: `misses`) from the prediction of ``node``, wide or not.

    With groups ``by`` something if ``bounds`` are given, of which each then is a segment if the chunk is large.
    """
    recipe = draft.recipe({"op": "patch", "prediction": node}, dtype, shape)
    if node["op"] in WIDE:
        value = recipe.wide(node).value
        prediction = converted_root(value, dtype, shape)
    else:
        prediction = (
            converted(recipe.operand(node), dtype) if recipe.operand(node).dtype != dtype else recipe.operand(node)
        )
    count = len(prediction.data) // WIDTH[dtype]
    target = stepped(prediction, misses(name, count) if steps is None else steps)
    differences, chunk = difference(target, prediction), chunk or count
    sizes = [[min(chunk, count - begin)] for begin in range(0, count, chunk)]
    if bounds:
        keys = exponents(prediction) if by == "exponent" else margins(value, recipe.accumulator, dtype)
        differences, sizes = grouped(differences, keys, bounds, chunk, 1 << 8 * WIDTH[dtype])
    stored, array = coded(differences, target), f"{name}#residual"
    if filter_ == "segments":
        part = draft.segments(array, stored, chunk, *sizes)
    else:
        part = draft.array(array, stored, filter_, "none" if filter_ == "none" else "zstd", chunk)
    patch: Json = {"op": "patch", "prediction": node, "residual": part}
    draft.exact(name, target, patch | ({"groups": {"by": by, "bounds": list(bounds)}} if bounds else {}))
