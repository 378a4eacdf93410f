"""The exact grade of computed tensors: the same bits whatever multiplies, in whatever ranges (spec/arithmetic.md)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deltafmt
from deltafmt import MalformedError
from deltafmt.dtypes import DTYPES
from deltafmt.gemm import OntoBf16, Product, Wide
from deltafmt.manifest_parser import parse_manifest
from deltafmt.operators import Lowrank, Operator, Rows, Scaled, Stored, Sum
from deltafmt.scope import ManifestScope
from deltafmt.sources import open_archive
from exact_factors import MOST, at_the_bound, by_torch
from hostile import (
    MANIFEST,
    ZEROS,
    Json,
    Tensor,
    canonical,
    derived,
    edit,
    f32,
    lowrank,
    manifest,
    patch,
    ref,
    seal,
    stored,
    sum_of,
    write_checkpoint,
)
from in_memory import KINDS, NUMPY, WAYS, Array, every_way, rebuilder, subject_of
from refusal import refused

NAN = {"F64": 0x7FF8 << 48, "F32": 0x7FC00000, "F16": 0x7E00, "BF16": 0x7FC0}


def bits_of(values: Array, dtype: str) -> Array:
    """Floats rounded to a dtype; every NaN the one without a sign."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = values.astype(NUMPY[dtype])
    bits = rounded.view(DTYPES[dtype].bits).copy()
    bits[np.isnan(values)] = NAN[dtype]
    return bits.reshape(-1)


def added(left: Array, right: Array, wide: str) -> Array:
    """One addition, rounded once: of float32 by way of float64, which is innocuous; of float64 in fractions."""
    if wide == "F32":
        with np.errstate(over="ignore", invalid="ignore"):
            return (left.astype(np.float64) + right.astype(np.float64)).astype(np.float32)
    pairs = zip(left.astype(np.float64).flat, right.astype(np.float64).flat, strict=True)
    return np.array([float(Fraction(a) + Fraction(b)) for a, b in pairs]).reshape(left.shape)


# --- Integer factors ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    a: Array
    b: Array
    factors: str
    exponent: int
    base: Array
    base_dtype: str
    dtype: str
    wide: str
    cuts: tuple[int, ...]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any shape, dtypes and exponent; the maxima as large as they may be, or nearly."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=3)))
    out, in_ = shape[0], math.prod(shape[1:])
    rank = draw(st.integers(1, min(out, in_)))
    factors = draw(st.sampled_from(["I8", "I16", "I32"]))
    dtype, base_dtype = draw(st.sampled_from(["F64", "F32", "F16", "BF16"])), draw(st.sampled_from(["F32", "BF16"]))
    wide = "F64" if "F64" in (dtype, base_dtype) or factors == "I32" else "F32"
    largest = min(np.iinfo(NUMPY[factors]).max, math.isqrt(MOST[wide] // rank))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    a, b = (rng.integers(-largest, largest + 1, (rank, size)).astype(NUMPY[factors]) for size in (in_, out))
    if draw(st.booleans()):
        a, b = (np.where(factor > 0, largest, -largest).astype(factor.dtype) for factor in (a, b))
    exponent = draw(st.integers(-100, 100))
    # Near the product, so that the addition rounds in most elements.
    near = math.log2(largest) * 2 + exponent + draw(st.integers(-12, 12))
    base = (rng.standard_normal(shape) * 2.0 ** min(max(near, -120), 120)).astype(NUMPY[base_dtype])
    cuts = tuple(draw(st.lists(st.integers(0, out * in_), max_size=4)))
    return Case(shape, a, b, factors, exponent, base, base_dtype, dtype, wide, cuts)


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans())
def test_base_and_integer_factors(case: Case, base_first: bool) -> None:
    product = Lowrank(Stored("a"), Stored("b"), 2.0**case.exponent)
    terms: tuple[Operator, ...] = (Stored("w"), product) if base_first else (product, Stored("w"))
    arrays = {"w": (case.base_dtype, case.base), "a": (case.factors, case.a), "b": (case.factors, case.b)}
    subject = rebuilder(Sum(terms), arrays, case.dtype, case.shape, case.wide)
    # Python's integers, and one addition.
    exact = case.b.astype(object).T @ case.a.astype(object)
    delta = np.array([math.ldexp(float(int(value)), case.exponent) for value in exact.flat]).reshape(case.shape)
    values = added(case.base.astype(np.float64), delta, case.wide)
    found = every_way(subject, case.cuts)
    if case.wide == "F64" and case.dtype == "BF16":  # ml_dtypes rounds twice
        assert_nearest_bf16(found, values.reshape(-1))
    else:
        assert np.array_equal(found, bits_of(values, case.dtype))


def assert_nearest_bf16(found: Array, values: Array) -> None:
    """No neighbour is nearer, and none that is as near is even; infinity stands where the next number would."""
    for step in (0xFFFF, 1):
        with np.errstate(invalid="ignore"):  # beyond infinity there are signalling NaN
            numbers = [bits.view(ml_dtypes.bfloat16).astype(np.float64) for bits in (found, found + np.uint16(step))]
        mine, other = (np.abs(np.clip(each, -(2.0**128), 2.0**128) - values) for each in numbers)
        assert not np.any((other < mine) | ((other == mine) & (found % 2 == 1)))


def factors_up_to(total: int) -> tuple[Array, Array]:
    """`a [2, 2]`, `b [2, 2]` with parallel columns, so that an element is `-total`, a power of two."""
    bits = total.bit_length() - 2
    assert total == 2 << bits
    x, y = 1 << bits // 2, 1 << bits - bits // 2
    return np.array([[x, -1], [x, x]]), np.array([[-y, 1], [-y, y]])


@pytest.mark.parametrize(("factors", "wide"), [("I16", "F32"), ("I32", "F64"), ("I16", "F64")])
@pytest.mark.parametrize("exponent", [-100, 0, 100])
def test_the_bound_is_met_exactly(factors: str, wide: str, exponent: int) -> None:
    total = min(MOST[wide], 2**28) if factors == "I16" else MOST[wide]
    a, b = (factor.astype(NUMPY[factors]) for factor in factors_up_to(total))
    arrays = {"a": (factors, a), "b": (factors, b)}
    subject = rebuilder(Lowrank(Stored("a"), Stored("b"), 2.0**exponent), arrays, wide, (2, 2), wide)
    found = every_way(subject).view(NUMPY[wide])
    expected = [
        Fraction(2) ** exponent * sum(int(b[k, o]) * int(a[k, i]) for k in range(2)) for o in range(2) for i in range(2)
    ]
    assert [Fraction(float(value)) for value in found] == expected
    assert expected[0] == -total * Fraction(2) ** exponent


@pytest.mark.parametrize(("factors", "wide"), [("I16", "F32"), ("I32", "F64"), ("I32", "F32")])
@pytest.mark.parametrize("larger", ["a", "b"])
def test_one_more_is_refused(factors: str, wide: str, larger: str) -> None:
    """Though no element is larger than allowed: in the largest columns, an element of one meets a zero."""
    wide = "F64" if factors == "I32" else wide
    side = 1 << MOST[wide].bit_length() // 2
    assert side <= np.iinfo(NUMPY[factors]).max
    more, less = np.array([[side, 0], [1, 1]]), np.array([[MOST[wide] // side, 0], [0, 1]])
    a, b = (factor.astype(NUMPY[factors]) for factor in ((more, less) if larger == "a" else (less, more)))
    arrays = {"a": (factors, a), "b": (factors, b)}
    subject = rebuilder(Lowrank(Stored("a"), Stored("b")), arrays, wide, (2, 2), wide)
    for read in (lambda: subject.read(0, 4, np.empty(4, subject.dtype.bits)), lambda: subject.reference(1, 2)):
        with pytest.raises(MalformedError) as caught:
            read()
        assert caught.value.reason == "inexact"
        assert str(MOST[wide] ** 2 + (MOST[wide] // side) ** 2) in str(caught.value)


@pytest.mark.parametrize(("factors", "wide"), [("I8", "F32"), ("I16", "F32"), ("I16", "F64"), ("I32", "F64")])
def test_the_bound_against_integers_without_end(factors: str, wide: str) -> None:
    """Of random factors around the bound, and of the lowest integers, whose squares do not add up in 64 bits."""
    rng = np.random.default_rng(3)
    limits = np.iinfo(NUMPY[factors])
    seen = set()
    for rank in (1, 2, 4, 7, 9):
        for most in (limits.max, min(limits.max, 2 * math.isqrt(MOST[wide] // rank)), 3):
            pair = [rng.integers(-most - 1, most + 1, (rank, size)).astype(NUMPY[factors]) for size in (9, 11)]
            for a, b in (pair, [np.full_like(factor, -most - 1) for factor in pair]):
                largest = [max(sum(x * x for x in column) for column in factor.T.tolist()) for factor in (a, b)]
                allowed = largest[0] * largest[1] <= MOST[wide] ** 2
                arrays = {"a": (factors, a), "b": (factors, b)}
                subject = rebuilder(Lowrank(Stored("a"), Stored("b")), arrays, wide, (11, 9), wide)
                if allowed:
                    found = every_way(subject).view(NUMPY[wide]).reshape(11, 9)
                    assert np.array_equal(found.astype(np.int64), b.astype(np.int64).T @ a.astype(np.int64))
                else:
                    with pytest.raises(MalformedError, match=str(largest[0] * largest[1])):
                        subject.read(0, 99, np.empty(99, subject.dtype.bits))
                seen.add(allowed)
    assert seen == ({True} if (factors, wide) in (("I8", "F32"), ("I16", "F64")) else {True, False})


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_sum_of_zeros_is_a_positive_zero(rank: int, dtype: str) -> None:
    """Zeros of either factor meet negative numbers of the other, in every component; the base is -0.0."""
    a = np.zeros((rank, 12), np.int8)
    b = np.full((rank, 9), -3, np.int8)
    a[:, 4:8], b[:, ::2] = -5, 0
    zeros = np.full((9, 12), -0.0, NUMPY[dtype])
    arrays = {"w": (dtype, zeros), "a": ("I8", a), "b": ("I8", b)}
    product = Lowrank(Stored("a"), Stored("b"), 0.25)
    recipes = (product, Sum((Stored("w"), product)), Sum((product, Stored("w"))))
    expected = bits_of((b.astype(np.int64).T @ a.astype(np.int64)) * np.float32(0.25), dtype)
    assert np.count_nonzero(expected == 0) == 9 * 12 - 4 * 4
    for recipe in recipes:
        assert np.array_equal(every_way(rebuilder(recipe, arrays, dtype, (9, 12)), (5, 40)), expected)


def test_the_smallest_integers_count_as_large_as_they_are() -> None:
    """-128 times -128, 1,024 times over, is 2^24 and no more."""
    factor = np.full((1024, 1024), -128, np.int8)
    arrays = {"a": ("I8", factor), "b": ("I8", factor)}
    subject = rebuilder(Lowrank(Stored("a"), Stored("b")), arrays, "F32", (1024, 1024))
    part = np.empty(3, np.uint32)
    subject.read(1022, 1025, part)
    assert part.view(np.float32).tolist() == [2.0**24] * 3


def test_blocks_and_chunks_of_a_large_tensor() -> None:
    """Several blocks, odd ranges, both orders of the terms, two products: all the same."""
    rng = np.random.default_rng(0)
    shape = (1100, 1031)
    arrays = {
        "w": ("BF16", (rng.standard_normal(shape) * 0.02).astype(ml_dtypes.bfloat16)),
        **{name: ("I16", rng.integers(-900, 901, (8, shape[1]), np.int16)) for name in ("a", "c")},
        **{name: ("I8", rng.integers(-127, 128, (8, shape[0]), np.int8)) for name in ("b", "d")},
    }
    recipe = Sum(
        (Stored("w"), Lowrank(Stored("a"), Stored("b"), 2.0**-26), Lowrank(Stored("c"), Stored("d"), 2.0**-25))
    )
    found = every_way(rebuilder(recipe, arrays, "BF16", shape), (1, 1031, 5000, 700_000, 700_001))
    a, b, c, d = (arrays[name][1].astype(np.int64) for name in "abcd")
    values = arrays["w"][1].astype(np.float64)
    values = added(values, (b.T @ a) * 2.0**-26, "F32")
    values = added(values, (d.T @ c) * 2.0**-25, "F32")
    assert np.array_equal(found, bits_of(values, "BF16"))


# --- Who multiplies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factors", "base", "dtype", "wide"), KINDS)
@pytest.mark.parametrize("rank", [1, 7, 64])
def test_torch_computes_the_same(factors: str, base: str, dtype: str, wide: str, rank: int) -> None:
    """Factors at the bound: product, addition and rounding by torch, with one thread and two, whole and in rows."""
    exact = at_the_bound(rank, (200, 300), wide, base, seed=rank)
    ours = every_way(subject_of(exact, factors, base, dtype), (1, 40_001)).reshape(exact.base.shape)
    for threads in (1, 2):
        for rows in (None, 1, 37):
            assert np.array_equal(by_torch(exact, dtype, rows=rows, threads=threads), ours), (threads, rows)


def shortened(operand: Array, bits: int) -> Array:
    """Floats with so many bits behind the point, rounded to nearest, ties to even."""
    mantissa, exponent = np.frexp(operand)
    rounded: Array = np.ldexp(np.rint(np.ldexp(mantissa, bits + 1)), exponent - bits - 1).astype(operand.dtype)
    return rounded


def short_product(bits: int) -> type[Product]:
    """A product that rounds its operands first, as TF32 (10 bits behind the point), bf16 (7) and float32 (23) do.

    The reference has them whole.
    """

    class Short(Product):
        def __init__(self, a: Wide, b: Wide) -> None:
            super().__init__(a, b)
            self._short = Product(shortened(a, bits), shortened(b, bits))

        def add(self, into: Wide, top: int, left: int, first: bool) -> None:
            self._short.add(into, top, left, first)

        def onto_bf16(self, top: int, rows: int) -> OntoBf16 | None:
            return self._short.onto_bf16(top, rows)

    return Short


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("factors", "base", "dtype", "wide"), KINDS)
def test_a_product_that_shortens_its_operands_is_found_out(
    way: str, factors: str, base: str, dtype: str, wide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever switches TF32 on, or another such mode, fails the check of all tests here. With no bit less it passes."""
    exact = at_the_bound(4, wide=wide, base=base)
    subject = subject_of(exact, factors, base, dtype)
    whole = 23 if wide == "F32" else 52
    monkeypatch.setattr(deltafmt.operators.lowrank, "Product", short_product(whole))
    assert np.array_equal(every_way(subject.again(), ways=[way]).reshape(exact.base.shape), by_torch(exact, dtype))
    for bits in (10, 7) if wide == "F32" else (23, 10, 7):
        monkeypatch.setattr(deltafmt.operators.lowrank, "Product", short_product(bits))
        with pytest.raises(AssertionError, match=way):
            every_way(subject.again(), ways=[way])


# --- Sums, scaled, NaN ----------------------------------------------------------------------------------------------


def test_a_sum_in_a_sum_is_added_up_first() -> None:
    small, one = np.full(3, 2.0**-24, np.float32), np.array([1, -1, 2], np.float32)
    arrays = {"s": ("F32", small), "one": ("F32", one)}
    nested = Sum((Stored("one"), Sum((Stored("s"), Stored("s")))))
    flat = Sum((Stored("one"), Stored("s"), Stored("s")))
    found = [every_way(rebuilder(recipe, arrays, "F32", (3,))).view(np.float32).tolist() for recipe in (nested, flat)]
    assert found[0] == [1 + 2.0**-23, -1 + 2.0**-23, 2.0]
    assert found[1] == [1.0, -1 + 2.0**-23, 2.0]


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_a_computed_nan_has_no_sign(dtype: str) -> None:
    base = np.array([0x7F800001, 0xFFC12345, 0x7F800000, 0xFF800000, 0x80000000, 0x3F800000], np.uint32)
    other = np.array([0, 0, 0xFF800000, 0xFF800000, 0x80000000, 0xFFFFFFFF], np.uint32)
    arrays = {"w": ("F32", base.view(np.float32)), "v": ("F32", other.view(np.float32))}
    wide = "F64" if dtype == "F64" else "F32"
    found = every_way(rebuilder(Sum((Stored("w"), Stored("v"))), arrays, dtype, (6,), wide), (1, 5))
    infinity = int(bits_of(np.array([-np.inf]), dtype)[0])
    minus_zero = 1 << (8 * DTYPES[dtype].width - 1)
    assert found.tolist() == [NAN[dtype], NAN[dtype], NAN[dtype], infinity, minus_zero, NAN[dtype]]


def test_nan_and_infinity_beside_integer_factors() -> None:
    w = np.array([[np.nan, np.inf, -np.inf], [-0.0, 3.4e38, -np.nan]], np.float32)
    a, b = np.array([[0, 1, 1]], np.int8), np.array([[1, 1]], np.int8)
    arrays: dict[str, tuple[str, Array]] = {"w": ("F32", w), "a": ("I8", a), "b": ("I8", b)}
    subject = rebuilder(Sum((Stored("w"), Lowrank(Stored("a"), Stored("b"), 2.0**100))), arrays, "F32", (2, 3))
    values = every_way(subject, (2, 4))
    assert values[[0, 5]].tolist() == [NAN["F32"]] * 2
    assert values[1:5].view(np.float32).tolist() == [np.inf, -np.inf, 0.0, np.float32(3.4e38)]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 7), max_size=3).map(tuple),
    by_row=st.booleans(),
    kinds=st.tuples(*[st.sampled_from(["F32", "F16", "BF16"])] * 3),
    seed=st.integers(0, 2**32),
    cuts=st.lists(st.integers(0, 343), max_size=4).map(tuple),
)
def test_scaled(
    shape: tuple[int, ...], by_row: bool, kinds: tuple[str, str, str], seed: int, cuts: tuple[int, ...]
) -> None:
    """Alone, as a later term, and around a sum; each product rounded once, -0.0 and infinity as they come."""
    rng = np.random.default_rng(seed)
    special = np.array([-0.0, 0.0, np.inf, -np.inf, 1.0, 2.0**-14])

    def floats(size: tuple[int, ...], kind: str) -> Array:
        values = np.where(rng.random(size) < 0.1, rng.choice(special, size), rng.standard_normal(size))
        return np.asarray(values).astype(NUMPY[kind])

    x, y, s = floats(shape, kinds[0]), floats(shape, kinds[1]), floats(shape[:1] if by_row else (), kinds[2])
    arrays = {"x": (kinds[0], x), "y": (kinds[1], y), "s": (kinds[2], s)}
    scale = s.astype(np.float64).reshape(s.shape + (1,) * (len(shape) - s.ndim))
    with np.errstate(all="ignore"):
        product = (x.astype(np.float64) * scale).astype(np.float32)
        total = added(x, y, "F32")
        expected = {
            Scaled(Stored("x"), Stored("s")): product,
            Sum((Stored("y"), Scaled(Stored("x"), Stored("s")))): added(y, product, "F32"),
            Scaled(Sum((Stored("x"), Stored("y"))), Stored("s")): (total * scale).astype(np.float32),
        }
    for recipe, values in expected.items():
        for dtype in ("F32", "BF16"):
            found = every_way(rebuilder(recipe, arrays, dtype, shape), cuts)
            assert np.array_equal(found, bits_of(np.asarray(values), dtype))


# --- Rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "U8", "I32", "F64"])
@pytest.mark.parametrize("rest", [(), (5,), (2, 3)])
@pytest.mark.parametrize(("had", "has"), [(4, 7), (7, 4), (4, 4), (0, 3), (3, 0)])
def test_rows(dtype: str, rest: tuple[int, ...], had: int, has: int) -> None:
    x = np.arange(1, had * math.prod(rest) + 1).reshape(had, *rest).astype(NUMPY[dtype])
    found = every_way(rebuilder(Rows(Stored("x")), {"x": (dtype, x)}, dtype, (has, *rest)), (1, 11, 23))
    expected = np.zeros((has, *rest), x.dtype)
    expected[: min(had, has)] = x[: min(had, has)]
    assert found.tobytes() == expected.tobytes()


# --- In archives ----------------------------------------------------------------------------------------------------


def rows(x: Json) -> Json:
    return {"op": "rows", "x": x}


def scaled(x: Json, scale: str) -> Json:
    return {"op": "scaled", "x": x, "scale": stored(scale)}


def exactly(document: Json, name: str, recipe: Json, values: Tensor) -> None:
    derived(document, name, recipe, values.dtype, values.shape)
    del document["tensors"][name]["rel_error"]
    document["tensors"][name]["digest"] = "sha256:" + hashlib.sha256(values.data).hexdigest()


def integers(dtype: str, *shape: int, seed: int = 0, most: int = 100) -> Tensor:
    values = np.random.default_rng(seed).integers(-most, most + 1, shape)
    return Tensor(dtype, shape, values.astype(NUMPY[dtype]).tobytes())


def values_of(tensor: Tensor) -> Array:
    return np.frombuffer(tensor.data, NUMPY[tensor.dtype]).reshape(tensor.shape)


@pytest.mark.parametrize("factors", ["I16", "I32"])
def test_an_archive_of_exact_tensors(tmp_path: Path, factors: str) -> None:
    """Digests of what was computed by hand hold, through references, with any number of threads."""
    parts = {
        "w": f32(60, 40),
        "s": f32(60, seed=1),
        "old": f32(50, 40, seed=2),
        "0": Tensor("U32", (60, 40), bytes(9600)),
    }
    parts |= {"a": integers(factors, 3, 40, most=2000), "b": integers(factors, 3, 60, seed=1, most=1300)}
    w, s, old, a, b = (values_of(parts[name]) for name in ("w", "s", "old", "a", "b"))
    wide = "F64" if factors == "I32" else "F32"  # an integer factor of 32 bits asks for it
    delta = (b.astype(np.int64).T @ a.astype(np.int64)) * 2.0**-20
    moved = added(w, delta, wide)
    grown = np.concatenate([old, np.zeros((10, 40), np.float32)])
    scaled_values = (grown.astype(np.float64) * s[:, None]).astype(np.float32)
    moved = moved.astype(np.float32)
    recipes = {
        "moved": (sum_of(stored("w"), lowrank("a", "b", scale=2.0**-20)), moved),
        "again": (sum_of(ref("moved"), ref("moved")), moved * 2),
        "grown": (rows(stored("old")), grown),
        "scaled": (scaled(ref("grown"), "s"), scaled_values),
        "patched": (patch(ref("again"), stored("0")), moved * 2),
    }
    # Each is packed as what it must become, twice, so that a stored array that is needed no more is still used.
    for name, (_, values) in recipes.items():
        parts[name] = parts[f"{name}, stored"] = Tensor("F32", values.shape, values.tobytes())
    source = write_checkpoint(tmp_path / "src", parts)
    deltafmt.pack(source, tmp_path / "packed")

    def change(document: Json) -> None:
        tensors = document["tensors"]
        for name, (recipe, _) in recipes.items():
            array = next(array for array in (name, f"{name}, stored", "again") if array in document["arrays"])
            tensors[name]["recipe"], tensors[f"{name}, stored"]["recipe"] = recipe, stored(array)

    edit(tmp_path / "packed", change)
    assert deltafmt.verify(tmp_path / "packed").exact
    for jobs in (1, 2):
        assert deltafmt.unpack(tmp_path / "packed", tmp_path / "out", jobs=jobs, overwrite=True).exact
        assert (tmp_path / "out/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    with deltafmt.open(tmp_path / "packed") as opened:
        assert opened.get_slice("again")[7:9, 3:].tobytes() == (moved * 2)[7:9, 3:].tobytes()


def test_32_bit_factors_are_accumulated_in_float64(tmp_path: Path) -> None:
    """One element: 1 + 2^-24 + 2^-50, rounded to float32, is 1 unless the second sum is kept in float64."""
    parts = {name: Tensor("F32", (1, 1), np.float32(value).tobytes()) for name, value in (("w", 1), ("tiny", 2.0**-50))}
    parts |= {name: Tensor("I32", (1, 1), np.int32(value).tobytes()) for name, value in (("a", 1), ("b", 2))}
    parts |= {"short": Tensor("I16", (1, 1), np.int16(1).tobytes())}
    deltafmt.pack(write_checkpoint(tmp_path / "src", parts), tmp_path / "packed")

    def change(document: Json) -> None:
        products = {
            "long": lowrank("a", "b", scale=2.0**-25),
            "mixed": lowrank("a", "short", scale=2.0**-24),
            "small": lowrank("short", "short", scale=2.0**-24),
        }
        for name, product in products.items():
            derived(document, name, sum_of(stored("w"), product, stored("tiny")), "F32", (1, 1))

    with open_archive(edit(tmp_path / "packed", change)) as archive:
        found = {name: archive.read_whole(name).view(np.float32).tolist() for name in ("long", "mixed", "small")}
    assert found == {"long": [1 + 2.0**-23], "mixed": [1 + 2.0**-23], "small": [1.0]}


def test_nested_reads_have_buffers_of_their_own(tmp_path: Path) -> None:
    """Tensors of several blocks that refer to one another; rows and dtypes that cut them into other blocks."""
    rng = np.random.default_rng(3)
    count = 1_200_007
    x = rng.integers(-1000, 1000, count).astype(np.float32)
    parts = {"x": Tensor("F32", (count,), x.tobytes()), "two": Tensor("F16", (), np.float16(2).tobytes())}
    deltafmt.pack(write_checkpoint(tmp_path / "src", parts), tmp_path / "packed")

    def change(document: Json) -> None:
        derived(document, "double", scaled(ref("x"), "two"), "F64", (count,))
        derived(document, "more", sum_of(ref("x"), scaled(ref("double"), "two")), "F32", (count,))
        derived(document, "longer", rows(ref("more")), "F32", (count + 9,))
        nested = sum_of(ref("double"), scaled(ref("more"), "two"))
        derived(document, "most", sum_of(stored("x"), nested), "F32", (count,))

    with deltafmt.open(edit(tmp_path / "packed", change)) as opened:
        assert np.array_equal(opened.get_tensor("longer"), np.append(5 * x, np.zeros(9, np.float32)))
        assert np.array_equal(opened.get_tensor("most"), 13 * x)
        assert np.array_equal(opened.get_slice("most")[99_999:800_003], 13 * x[99_999:800_003])


PARTS = {
    "w": f32(6, 4), "row": f32(6), "one": f32(), "1-d": f32(24), "many": f32(9, 4), "wider": f32(6, 5),
    "a": integers("I8", 2, 4), "b": integers("I16", 2, 6), "l": integers("I64", 2, 4), "u": integers("U8", 2, 4),
    "fa": f32(2, 4), "fb": f32(2, 6), "columns": f32(4), "i": integers("I32", 6, 4), "is": integers("I32", 6),
}  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exact")
    deltafmt.pack(write_checkpoint(root / "src", PARTS), root / "packed")
    return root / "packed"


def check(packed: Path, recipe: Json, dtype: str = "F32", shape: tuple[int, ...] = (6, 4), exact: bool = False) -> None:
    """Check the manifest with this recipe in it."""
    document = manifest(packed)
    derived(document, "x", recipe, dtype, shape)
    if exact:
        exactly(document, "x", recipe, Tensor(dtype, shape, b""))
    data = seal(canonical(document | {"$checksum": ZEROS}))
    ManifestScope(parse_manifest(data, MANIFEST)).check()


@pytest.mark.parametrize(
    ("recipe", "shape", "dtype"),
    [
        pytest.param(lowrank("a", "fb"), (6, 4), "F32", id="an integer and a float factor"),
        pytest.param(lowrank("fa", "b"), (6, 4), "F32", id="a float and an integer factor"),
        pytest.param(lowrank("l", "b"), (6, 4), "F32", id="64 bits"),
        pytest.param(lowrank("u", "b"), (6, 4), "F32", id="unsigned"),
        *[
            pytest.param(lowrank("a", "b", scale=scale), (6, 4), "F32", id=f"scale {scale}")
            for scale in (0, -1, 3, 0.75, 2.0**101, 2.0**-101, 1 + 2.0**-52)
        ],
        pytest.param(scaled(stored("wider"), "row"), (6, 4), "F32", id="scaled, another shape"),
        pytest.param(scaled(stored("i"), "row"), (6, 4), "F32", id="scaled integers"),
        pytest.param(scaled(stored("w"), "is"), (6, 4), "F32", id="scaled by integers"),
        pytest.param(scaled(stored("w"), "columns"), (6, 4), "F32", id="scaled by column"),
        pytest.param(scaled(stored("w"), "1-d"), (6, 4), "F32", id="scaled by element"),
        pytest.param({**scaled(stored("w"), ""), "scale": lowrank("fa", "fb")}, (6, 4), "F32", id="wide scale"),
        pytest.param(scaled(stored("one"), "row"), (), "F32", id="rows of a number"),
        pytest.param(scaled(stored("w"), "row"), (6, 4), "I32", id="scaled to integers"),
        pytest.param(rows(stored("wider")), (6, 4), "F32", id="columns"),
        pytest.param(rows(stored("row")), (6, 4), "F32", id="rows of one dimension"),
        pytest.param(rows(stored("one")), (6,), "F32", id="rows of a number"),
        pytest.param(rows(stored("row")), (), "F32", id="rows to a number"),
        pytest.param(rows(stored("many")), (6, 4), "BF16", id="rows of another dtype"),
        pytest.param(rows(lowrank("fa", "fb")), (6, 4), "F32", id="wide rows"),
        pytest.param(rows(stored("none")), (6, 4), "F32", id="rows of nothing"),
    ],
)
def test_operands_that_do_not_fit(packed: Path, recipe: Json, shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(MalformedError) as caught:
        check(packed, recipe, dtype, shape)
    assert caught.value.reason == "operand"
    assert "/tensors/x" in str(caught.value)


def test_integer_factors_that_are_approximations(tmp_path: Path) -> None:
    deltafmt.pack(write_checkpoint(tmp_path / "src", PARTS), tmp_path / "packed")

    def change(document: Json) -> None:
        derived(document, "about a", stored("a"), "I8", (2, 4))
        derived(document, "x", {**lowrank("a", "b"), "a": ref("about a")})

    refused(edit(tmp_path / "packed", change), "operand")


@pytest.mark.parametrize(
    "recipe",
    [
        lowrank("a", "b", scale=2.0**-100),
        lowrank("a", "b", scale=2.0**100),
        sum_of(stored("w"), lowrank("a", "b")),
        scaled(sum_of(stored("w"), lowrank("a", "b")), "row"),
        scaled(stored("w"), "one"),
        rows(stored("many")),
    ],
)
def test_what_is_exact_may_have_a_digest(packed: Path, recipe: Json) -> None:
    check(packed, recipe, exact=True)


@pytest.mark.parametrize(
    "recipe",
    [lowrank("fa", "fb"), sum_of(stored("w"), lowrank("fa", "fb")), scaled(lowrank("fa", "fb"), "row")],
)
def test_what_is_bounded_may_not(packed: Path, recipe: Json) -> None:
    with pytest.raises(MalformedError) as caught:
        check(packed, recipe, exact=True)
    assert caught.value.reason == "coverage"
