"""Recipes bound to arrays in memory, and the check that every way of computing them gives the same bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from deltafmt import native
from deltafmt.dtypes import DTYPES
from deltafmt.methods.prediction import Elements, InMemory
from deltafmt.native import library
from deltafmt.operators import Lowrank, Operator, Stored, Sum, Target
from deltafmt.rebuild import Rebuilder
from exact_factors import Exact

Array = npt.NDArray[Any]
NUMPY: dict[str, npt.DTypeLike] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16,
    "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "U8": "u1",
}  # fmt: skip
WAYS = ("kernels", "numpy")


class Subject(Rebuilder):
    """A rebuilder that can be made again: what it reads of factors depends on who multiplies them."""

    def __init__(self, recipe: Operator, memory: InMemory, target: Target) -> None:
        super().__init__(recipe, memory, memory, target)
        self._made_of = recipe, memory, target

    def again(self) -> Subject:
        """Another like it."""
        return Subject(*self._made_of)


def rebuilder(
    recipe: Operator, arrays: dict[str, tuple[str, Array]], dtype: str, shape: tuple[int, ...], wide: str = "F32"
) -> Subject:
    memory = InMemory({}, {name: _elements(*array) for name, array in arrays.items()})
    target = Target("x", DTYPES[dtype], shape, np.dtype(NUMPY[wide]))
    facts = recipe.infer(memory, target, "/x")
    assert facts.exact
    assert facts.shape == shape
    return Subject(recipe, memory, target)


def _elements(dtype: str, array: Array) -> Elements:
    return Elements(DTYPES[dtype], array.shape, np.ascontiguousarray(array).reshape(-1).view(DTYPES[dtype].bits))


@contextmanager
def computed_by(way: str) -> Iterator[None]:
    """The kernels, which are built where these tests run, or numpy."""
    assert native.available()
    with pytest.MonkeyPatch.context() as patching:
        if way == "numpy":
            patching.setattr(library, "LIBRARY", None)
        yield


def every_way(subject: Subject, cuts: tuple[int, ...] = (), ways: Sequence[str] = WAYS) -> Array:
    """The bits, which the reference and every other way of computing them agree on; whole, and cut into ranges."""
    count = math.prod(subject.target.shape)
    expected = subject.reference(0, count)
    edges = [0, *sorted(min(cut, count) for cut in cuts), count]
    for way in ways:
        with computed_by(way):
            subject = subject.again()
            bits = np.empty(count, subject.dtype.bits)
            subject.read(0, count, bits)
            assert np.array_equal(bits, expected), way
            for lo, hi in pairwise(edges):
                part = np.empty(hi - lo, subject.dtype.bits)
                subject.read(lo, hi, part)
                assert np.array_equal(part, expected[lo:hi]), (way, lo, hi)
                assert np.array_equal(subject.reference(lo, hi), expected[lo:hi])
    return expected


# --- Sums that are hard to compute -----------------------------------------------------------------------------------

KINDS = [
    pytest.param("I16", "BF16", "BF16", "F32", id="BF16"),
    pytest.param("I16", "F16", "F16", "F32", id="F16"),
    pytest.param("I16", "BF16", "F32", "F32", id="F32"),
    pytest.param("I32", "F32", "F32", "F64", id="32-bit factors to F32"),
    pytest.param("I32", "F64", "F64", "F64", id="F64"),
]
"""Dtypes of factors, base and tensor, and what sums are added up in."""


def subject_of(exact: Exact, factors: str, base: str, dtype: str) -> Subject:
    """The recipe of a sum, the way that the package computes it."""
    a, b = (factor.astype(NUMPY[factors]) for factor in (exact.a, exact.b))
    recipe = Sum((Stored("w"), Lowrank(Stored("a"), Stored("b"), 2.0**exact.exponent)))
    arrays = {"w": (base, exact.base), "a": (factors, a), "b": (factors, b)}
    return rebuilder(recipe, arrays, dtype, exact.base.shape, exact.wide)
