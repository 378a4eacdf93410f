"""Promises 18 and 19: references end, and operands fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import deltafmt
from deltafmt import DeltafmtError, MalformedError
from hostile import (
    ZEROS,
    Json,
    Tensor,
    derived,
    edit,
    f32,
    lowrank,
    patch,
    put,
    ref,
    stored,
    sum_of,
    write_checkpoint,
)

PARTS = {
    "w": f32(6, 4), "a": f32(2, 4, seed=1), "b": f32(2, 6, seed=2), "v": f32(6, 4, seed=3), "deep": f32(7, 4, seed=4),
    "deep b": f32(7, 6, seed=5), "i": Tensor("U32", (6, 4), bytes(96)), "h": Tensor("U16", (6, 4), bytes(range(48))),
    "half": Tensor("BF16", (6, 4), bytes(48)), "0-d": f32(), "1-d": f32(24), "flag": Tensor("BOOL", (6, 4), bytes(24)),
}  # fmt: skip


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    deltafmt.pack(write_checkpoint(root / "src", PARTS), root / "packed")
    return root / "packed"


@pytest.fixture
def archive(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "archive"))


def refused(archive: Path, reason: str) -> str:
    with pytest.raises(DeltafmtError) as caught:
        deltafmt.open(archive)
    assert type(caught.value) is MalformedError, caught.value
    assert caught.value.reason == reason, caught.value
    return str(caught.value)


# --- 18: references -------------------------------------------------------------------------------------------------


def _ring(names: list[str], wrap: Callable[[Json], Json] = lambda node: node) -> Callable[[Json], None]:
    def change(document: Json) -> None:
        for name, following in zip(names, [*names[1:], names[0]], strict=True):
            derived(document, name, wrap(ref(following)))

    return change


@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 34, 100])
def test_18_cycles(archive: Path, length: int) -> None:
    names = [f"x{place:03}" for place in range(length)]
    message = refused(edit(archive, _ring(names)), "cycle")
    assert names[0] in message
    if length <= 32:
        assert " -> " in message


def test_18_a_cycle_below_other_nodes(archive: Path) -> None:
    refused(edit(archive, _ring(["x", "y"], lambda node: sum_of(stored("w"), node))), "cycle")

    def exact(document: Json) -> None:
        _ring(["x", "y"], lambda node: patch(node, stored("i")))(document)
        for name in ("x", "y"):
            del document["tensors"][name]["rel_error"]
            document["tensors"][name]["digest"] = ZEROS

    refused(edit(archive, exact), "cycle")


def _chain(length: int, wrap: Callable[[Json], Json], backwards: bool) -> Callable[[Json], None]:
    """Tensors c000 -> c001 -> ... -> w; `backwards` names them so that the last is met first."""

    def change(document: Json) -> None:
        names = [f"c{length - place if backwards else place:03}" for place in range(length)]
        for name, following in zip(names, [*names[1:], "w"], strict=True):
            derived(document, name, wrap(ref(following)))

    return change


@pytest.mark.parametrize("backwards", [False, True])
def test_18_a_deep_chain(archive: Path, backwards: bool) -> None:
    deltafmt.open(edit(archive, _chain(31, lambda node: node, backwards))).close()
    refused(edit(archive, _chain(32, lambda node: node, backwards)), "cycle")
    refused(edit(archive, _chain(10_000, lambda node: node, backwards)), "cycle")


@pytest.mark.parametrize("backwards", [False, True])
def test_18_a_chain_of_deep_recipes(archive: Path, backwards: bool) -> None:
    def nested(node: Json) -> Json:
        for _ in range(30):
            node = sum_of(stored("w"), node)
        return node

    refused(edit(archive, _chain(40, nested, backwards)), "cycle")


def test_18_a_recipe_of_many_levels(archive: Path) -> None:
    def nested(depth: int) -> Callable[[Json], None]:
        def change(document: Json) -> None:
            node = stored("w")
            for _ in range(depth - 1):
                node = patch(node, stored("i"))
            derived(document, "x", node)

        return change

    with deltafmt.open(edit(archive, nested(32))) as opened:
        assert opened.get_tensor("x").tobytes() == PARTS["w"].data
    for depth in (33, 55):
        refused(edit(archive, nested(depth)), "cycle")


# --- 19: operands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "shape", "dtype"),
    [
        pytest.param(lowrank("b", "a"), (6, 4), "F32", id="swapped factors"),
        pytest.param(lowrank("deep", "deep b"), (6, 4), "F32", id="rank above min(in, out)"),
        pytest.param(lowrank("a", "deep b"), (6, 4), "F32", id="ranks differ"),
        pytest.param(lowrank("a", "b"), (4, 6), "F32", id="transposed"),
        pytest.param(lowrank("a", "b"), (24,), "F32", id="one dimension"),
        pytest.param(lowrank("i", "i"), (4, 4), "F32", id="integer factors"),
        pytest.param(lowrank("a", "b"), (6, 4), "I32", id="rounded to integers"),
        pytest.param(lowrank("a", "b"), (6, 4), "F8_E4M3", id="rounded to fp8"),
        pytest.param(lowrank("a", "none"), (6, 4), "F32", id="no such array"),
        pytest.param(lowrank("1-d", "b"), (6, 4), "F32", id="a factor of one dimension"),
        pytest.param({**lowrank("a", "b"), "a": lowrank("a", "b")}, (6, 4), "F32", id="wide factor"),
        pytest.param(sum_of(stored("w"), stored("a")), (6, 4), "F32", id="terms of two shapes"),
        pytest.param(sum_of(stored("w"), stored("1-d")), (6, 4), "F32", id="terms of equal size"),
        pytest.param(sum_of(stored("w"), stored("i")), (6, 4), "F32", id="integer term"),
        pytest.param(sum_of(stored("w"), stored("flag")), (6, 4), "F32", id="boolean term"),
        pytest.param(sum_of(stored("w"), stored("v")), (4, 6), "F32", id="root of another shape"),
        pytest.param(sum_of(stored("w"), stored("v")), (6, 4), "U32", id="sum rounded to integers"),
        pytest.param(sum_of(stored("w")), (6, 4), "F32", id="one term"),
        pytest.param(sum_of(*[stored("w")] * 65), (6, 4), "F32", id="65 terms"),
        pytest.param(sum_of(), (6, 4), "F32", id="no terms"),
        pytest.param(stored("w"), (6, 4), "BF16", id="another dtype"),
        pytest.param(stored("w"), (6, 4), "I32", id="another dtype of the same width"),
        pytest.param(stored("w"), (24,), "F32", id="another shape of the same size"),
        pytest.param(stored("W"), (6, 4), "F32", id="no such stored array"),
        pytest.param(ref("W"), (6, 4), "F32", id="no such tensor"),
        pytest.param({"op": "ref", "tensor": "w", "base": "base"}, (6, 4), "F32", id="no such base"),
        pytest.param(patch(stored("w"), stored("h")), (6, 4), "F32", id="residual too narrow"),
        pytest.param(patch(stored("w"), stored("w")), (6, 4), "F32", id="float residual"),
        pytest.param(patch(stored("i"), stored("i")), (6, 4), "F32", id="prediction from integers"),
        pytest.param(patch(stored("1-d"), stored("i")), (6, 4), "F32", id="prediction of another shape"),
        pytest.param(patch(lowrank("a", "b"), stored("i")), (6, 4), "F32", id="wide prediction that is not exact"),
        pytest.param(patch(stored("w"), sum_of(stored("w"), stored("v"))), (6, 4), "F32", id="wide residual"),
    ],
)
def test_19_operands(archive: Path, recipe: Json, shape: tuple[int, ...], dtype: str) -> None:
    message = refused(edit(archive, lambda document: derived(document, "x", recipe, dtype, shape)), "operand")
    assert "/tensors/x" in message


@pytest.mark.parametrize("scale", ["1", None, True, [1]])
def test_19_a_scale_that_is_no_number(archive: Path, scale: Any) -> None:
    refused(edit(archive, lambda d: derived(d, "x", lowrank("a", "b", scale=scale))), "schema")


@pytest.mark.parametrize("value", [1, 5, 2**40, 2**63 - 1])
def test_19_a_shard_out_of_range(archive: Path, value: int) -> None:
    refused(edit(archive, lambda document: put(document, "arrays/w/shard", value)), "schema")


def test_19_coverage(archive: Path) -> None:
    def exact(recipe: Json) -> Callable[[Json], None]:
        def change(document: Json) -> None:
            derived(document, "x", recipe)
            del document["tensors"]["x"]["rel_error"]
            document["tensors"]["x"]["digest"] = ZEROS

        return change

    for recipe in (sum_of(stored("w"), ref("y")), lowrank("a", "b"), patch(ref("y"), stored("i")), ref("y")):
        edit(archive, lambda document: derived(document, "y", lowrank("a", "b")))
        refused(edit(archive, exact(recipe)), "operand" if recipe["op"] == "patch" else "coverage")
    edit(archive, lambda document: (document["tensors"].pop("x"), document["tensors"].pop("w")))
    assert "'/arrays/w'" in refused(archive, "coverage") or "/arrays/w" in refused(archive, "coverage")


@pytest.mark.parametrize("value", [-1, -1e-300, True, "0", None])
def test_19_rel_error(archive: Path, value: Any) -> None:
    edit(archive, lambda document: derived(document, "x", lowrank("a", "b")))
    refused(edit(archive, lambda document: put(document, "tensors/x/rel_error", value)), "schema")


def test_19_checkpoint_headers(archive: Path) -> None:
    for name in ("w", "none"):
        index = {"name": "i.json", "array": name}
        refused(edit(archive, partial(put, path="checkpoint/index", value=index)), "operand")
