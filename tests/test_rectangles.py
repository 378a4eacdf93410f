"""Rectangles of tensors: bit for bit what is cut out of the whole, and within the bound where that depends on order."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deltafmt
from deltafmt import rebuild
from deltafmt.operators.base import Rectangle
from deltafmt.pipeline import Pool
from deltafmt.reader import Archive
from deltafmt.rebuild import read_rectangle_in_pieces
from deltafmt.sources import open_archive
from hostile import Json, Tensor, derived, edit, lowrank, patch, ref, stored, sum_of, write_checkpoint

SHAPE = 150, 7, 11
ROW = math.prod(SHAPE[1:])
RANK = 5
BOUNDED = {"floats", "floats twice"}


def scaled(x: Json, scale: str) -> Json:
    return {"op": "scaled", "x": x, "scale": stored(scale)}


def panels(x: Json, rows: int, columns: int) -> Json:
    return {"op": "panels", "x": x, "rows": rows, "columns": columns}


RECIPES = {
    "plain": ("F32", stored("wide")),
    "tied": ("BF16", ref("half")),
    "integers": ("F32", sum_of(stored("wide"), lowrank("ia", "ib", scale=2.0**-9))),
    "integers, bf16": ("BF16", sum_of(stored("half"), lowrank("ia", "ib", scale=2.0**-9))),
    "another order": ("BF16", sum_of(lowrank("ia", "ib", scale=2.0**-9), stored("half"))),
    "three terms": ("BF16", sum_of(stored("half"), lowrank("ia", "ib", scale=2.0**-9), stored("wide"))),
    "nested": ("F32", sum_of(stored("wide"), sum_of(stored("half"), lowrank("ia", "ib", scale=2.0**-9)))),
    "scaled by row": ("F16", scaled(sum_of(stored("half"), stored("wide")), "by row")),
    "scaled in a sum": ("BF16", sum_of(stored("wide"), scaled(lowrank("ia", "ib"), "number"))),
    "rows": ("F32", {"op": "rows", "x": stored("short")}),
    "panels": ("F32", panels(stored("wide"), 13, 20)),
    "panels of another": ("BF16", panels(ref("patched"), 150, 7)),
    "panels in a sum": ("BF16", sum_of(panels(stored("half"), 4, 33), lowrank("ia", "ib", scale=2.0**-9))),
    "of panels": ("F32", sum_of(ref("panels"), stored("half"))),
    "patched": ("BF16", patch(sum_of(stored("half"), lowrank("ia", "ib", scale=2.0**-9)), stored("residual"))),
    "of another": ("BF16", sum_of(ref("patched"), lowrank("ia", "ib", scale=2.0**-12))),
    "floats": ("BF16", sum_of(stored("half"), lowrank("fa", "fb", scale=0.3))),
    "floats twice": ("F32", sum_of(stored("wide"), lowrank("fa", "fb"), lowrank("fa", "fb", scale=-0.7))),
}
"""Name -> dtype and recipe, all of one shape."""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    root = tmp_path_factory.mktemp("rectangles")
    random = np.random.default_rng(0)
    values = {
        "wide": ("F32", random.standard_normal(SHAPE).astype("<f4")),
        "half": ("BF16", random.standard_normal(SHAPE).astype(ml_dtypes.bfloat16)),
        "short": ("F32", random.standard_normal((101, *SHAPE[1:])).astype("<f4")),
        "residual": ("U16", random.integers(0, 9, SHAPE).astype("<u2")),
        "by row": ("F32", random.standard_normal(SHAPE[0]).astype("<f4")),
        "number": ("F32", np.array(0.37, "<f4")),
        "ia": ("I8", random.integers(-127, 128, (RANK, ROW)).astype("i1")),
        "ib": ("I8", random.integers(-127, 128, (RANK, SHAPE[0])).astype("i1")),
        "fa": ("F32", random.standard_normal((RANK, ROW)).astype("<f4")),
        "fb": ("F32", random.standard_normal((RANK, SHAPE[0])).astype("<f4")),
    }
    tensors = {name: Tensor(dtype, array.shape, array.tobytes()) for name, (dtype, array) in values.items()}
    deltafmt.pack(write_checkpoint(root / "src", tensors), root / "packed")

    def change(document: Json) -> None:
        for name, (dtype, recipe) in RECIPES.items():
            derived(document, name, recipe, dtype, SHAPE)
        document["tensors"]["patched"] |= {"digest": "sha256:" + 64 * "0"}
        del document["tensors"]["patched"]["rel_error"]

    with open_archive(edit(root / "packed", change)) as opened:
        yield opened


@st.composite
def rectangles(draw: st.DrawFn) -> Rectangle:
    top, bottom = sorted(draw(st.tuples(*[st.integers(0, SHAPE[0])] * 2)))
    left, right = sorted(draw(st.tuples(*[st.integers(0, ROW)] * 2)))
    return Rectangle(top, bottom, left, right)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", RECIPES)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=rectangles(), block=st.sampled_from([ROW // 2, ROW, 10 * ROW, 1 << 20]))
def test_a_rectangle_is_cut_out_of_the_whole(archive: Archive, name: str, part: Rectangle, block: int) -> None:
    rebuilder = archive.rebuilder(name)
    whole = np.empty(math.prod(SHAPE), rebuilder.dtype.bits)
    rebuilder.read(0, whole.size, whole)
    expected = whole.reshape(SHAPE[0], ROW)[part.top : part.bottom, part.left : part.right]
    found = np.empty(part.shape, rebuilder.dtype.bits)
    with pytest.MonkeyPatch.context() as patching, contextlib.closing(Pool(2)) as pool:
        patching.setattr(rebuild, "_BLOCK_ELEMENTS", block)
        patching.setattr(rebuild, "_PIECE_ELEMENTS", block // 2)
        rebuilder.read_rectangle(part, found)
        pieces = np.empty_like(found)
        read_rectangle_in_pieces(rebuilder, part, pieces, pool)
    kind = rebuilder.dtype.values
    if name in BOUNDED:
        for each in (found, pieces):
            values, wanted = (bits.view(kind).astype(np.float64) for bits in (each, expected))
            ulp = np.abs(wanted) * 2.0**-rebuilder.dtype.mantissa_bits
            assert (np.abs(values - wanted) <= ulp + 64 * RANK * 2.0**-24).all()
    else:
        assert np.array_equal(found, expected)
        assert np.array_equal(pieces, expected)
