"""Groups of `patch` (spec/operators/patch.md): keys, order, both ways of grouping, partial reads, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deltafmt
from deltafmt import DeltafmtError
from deltafmt.dtypes import DTYPES, Bits
from deltafmt.encodings import Encoding, StoredChunk, decode_chunks, encode_chunk
from deltafmt.gemm import round_wide
from deltafmt.operators import Operator, Patch, Ref, Stored, Sum, Target
from deltafmt.operators.base import Facts, Read, TensorReader, in_memory
from deltafmt.operators.groups import Groups, exponents, margins
from deltafmt.operators.patch import cast, correct_by_exponents, correct_in_groups, difference, difference_in_groups
from deltafmt.rebuild import Rebuilder
from hostile import Json, Tensor, edit, manifest, put, write_checkpoint

Array = npt.NDArray[Any]
pytestmark = pytest.mark.usefixtures("way")

FLOATS = ("F64", "F32", "F16", "BF16")
MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}


# --- Keys and order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bits", "key"),
    [("BF16", 0x3F80, 127), ("BF16", 0xBF80, 127), ("F32", 0xFF800000, 255), ("F16", 0xFC00, 31), ("F16", 0x8001, 0),
     ("F64", 0xBFF0000000000000, 1023), ("F64", 0x7FF8000000000000, 2047)],
)  # fmt: skip
def test_exponent_of_known_patterns(dtype: str, bits: int, key: int) -> None:
    assert exponents(np.array([bits], DTYPES[dtype].bits), DTYPES[dtype]).tolist() == [key]


@pytest.mark.parametrize("count", [1, 3, 8, 9, 40, 255])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [0, 1, 3, 31, 64, 2000, 9001])
def test_groups_and_their_order(count: int, dtype: str, size: int) -> None:
    """Of known keys: each in its group, each group in the flat order; and back."""
    kind, random = DTYPES[dtype], np.random.default_rng(count)
    most = {"F16": 31, "F64": 2047}.get(dtype, 255)
    possible = np.arange(1, 2048)
    bounds = tuple(sorted(random.choice(possible[: max(most, count)], count, replace=False).tolist()))
    groups = Groups("exponent", bounds)
    keys = random.normal(most / 2, most / 16, size).clip(0, most).astype(np.uint64)
    predicted = (keys << np.uint64(kind.mantissa_bits)).astype(kind.bits)
    predicted[::3] |= kind.bits.type(1 << (8 * kind.width - 1))
    bits = predicted ^ random.integers(0, 2, size).astype(kind.bits)  # the last place, of some
    group = [sum(bound <= key for bound in bounds) for key in keys.tolist()]
    order = sorted(range(size), key=group.__getitem__)
    grouping = groups.of_exponents(predicted, kind)
    found, lengths = difference_in_groups(groups, grouping, max(size, 1), bits, predicted, kind)
    assert lengths == [[group.count(number) for number in range(count + 1)]][: size > 0]
    assert found.tolist() == difference(bits, predicted, kind)[order].tolist()
    out, again = predicted.copy(), predicted.copy()
    correct_by_exponents(groups, max(out.size, 1), found.copy(), kind, again)
    correct_in_groups(groups, groups.of_exponents(predicted, kind), max(out.size, 1), found, kind, out)
    assert out.tolist() == again.tolist() == bits.tolist()


@pytest.mark.parametrize("misses", [0, 1, 7, 300, 5000])
@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
@pytest.mark.parametrize("chunk", [30_000, 4096, 777])
def test_few_misses_and_many(misses: int, dtype: str, chunk: int) -> None:
    """There is a way of its own for residuals that are nearly all zero."""
    kind, random = DTYPES[dtype], np.random.default_rng(misses)
    predicted = bits_of(random.standard_normal(20_003), dtype)
    bits, where = predicted.copy(), random.choice(predicted.size, misses, replace=False)
    bits[where] += random.integers(1, 1000, misses).astype(kind.bits)
    groups = Groups("exponent", (125, 126, 1021))
    grouping = groups.of_exponents(predicted, kind)
    grouped, _ = difference_in_groups(groups, grouping, chunk, bits, predicted, kind)
    assert np.count_nonzero(grouped) == misses
    out, again = predicted.copy(), predicted.copy()
    correct_by_exponents(groups, chunk, grouped.copy(), kind, again)
    correct_in_groups(groups, groups.of_exponents(predicted, kind), chunk, grouped, kind, out)
    assert np.array_equal(out, bits)
    assert np.array_equal(again, bits)


def test_bounds_that_no_key_reaches() -> None:
    predicted = bits_of(np.array([3.0, 0, -2e38, 1] * 5), "BF16")
    assert set(Groups("exponent", tuple(range(300, 320))).of_exponents(predicted, DTYPES["BF16"]).numbers) == {0}


def exact_margin(value: float, accumulator: str, target: str) -> tuple[int, bool]:
    """Key and side of a finite value, from exact fractions."""
    kind = {"F32": (np.float32, np.uint32, 23, 127), "F64": (np.float64, np.uint64, 52, 1023)}[accumulator]
    n = MANTISSA[accumulator] - MANTISSA[target]
    pattern = int(np.array(value, kind[0]).view(kind[1]))
    border = np.array((pattern >> n << n) + (1 << (n - 1)), kind[1]).view(kind[0])
    distance = Fraction(float(value)) - Fraction(float(border))
    size, exponent = abs(distance), kind[3]
    if size < Fraction(2) ** (1 - kind[3]):  # zero or subnormal
        return 0, distance < 0
    while size >= 2:
        size, exponent = size / 2, exponent + 1
    while size < 1:
        size, exponent = size * 2, exponent - 1
    return exponent, distance < 0


@pytest.mark.parametrize(
    ("accumulator", "target"),
    [("F32", "BF16"), ("F32", "F16"), ("F64", "F32"), ("F64", "BF16"), ("F64", "F16")],
)
@settings(max_examples=40)
@given(st.data())
def test_margin_is_the_exact_distance_to_the_border(accumulator: str, target: str, data: st.DataObject) -> None:
    values = np.array(
        data.draw(
            st.lists(
                st.floats(allow_nan=False, allow_infinity=False, width=64 if accumulator == "F64" else 32),
                min_size=1,
                max_size=20,
            )
        ),
        DTYPES[accumulator].values,
    )
    largest = np.finfo(values.dtype).max
    values = values[np.abs(values) < largest / 2]
    keys, up = margins(values.copy(), DTYPES[target])
    expected = [exact_margin(float(value), accumulator, target) for value in values]
    assert list(zip(keys.tolist(), up.tolist(), strict=True)) == expected
    groups = Groups("margin", (1, 60, 90, 104, 110, 118, 850, 960))  # of which the kernels see numbers, and no keys
    grouping = groups.of_margins(values, DTYPES[target])
    assert grouping.numbers.tolist() == [sum(bound <= key for bound in groups.bounds) for key, _ in expected]
    assert grouping.up is not None and grouping.up.tolist() == [up for _, up in expected]


def test_margin_of_what_is_not_finite() -> None:
    keys, up = margins(np.array([np.inf, -np.inf, np.nan, -np.nan], np.float32), DTYPES["BF16"])
    assert keys.tolist() == [255] * 4
    assert up.tolist() == [False] * 4


# --- Written and read again -----------------------------------------------------------------------------------------


class Memory:
    """Names stand for arrays in memory: where a recipe reads from, and what it is checked by.

    `r` is a stored residual of whatever dtype, in chunks; all others are tensors of a base, given as values.
    """

    def __init__(self, shape: tuple[int, ...], residual: Bits, chunk: int, lengths: list[list[int]] | None) -> None:
        self._shape, self._count, self._bits = shape, residual.size, residual.dtype
        self._encoding = Encoding("segments", "zstd", chunk)
        self._chunks = []
        for index in range(self._encoding.chunks(residual.size)):
            part = residual[index * chunk : (index + 1) * chunk]
            of_each = None if lengths is None else lengths[index]
            self._chunks.append(encode_chunk(part, self._encoding, lengths=of_each)[0])
        self.base: dict[str, tuple[str, Bits]] = {}

    def array(self, name: str) -> Facts:
        dtype = DTYPES[f"U{8 * self._bits.itemsize}"]
        return Facts(dtype, self._shape, exact=True, chunk=self._encoding.chunk)

    def tensor(self, name: str) -> None:
        return None

    def base_tensor(self, base: str, name: str) -> Facts:
        return Facts(DTYPES[self.base[name][0]], self._shape, exact=True)

    def array_reader(self, name: str) -> Read:
        whole, size = np.empty(self._count, self._bits), self._encoding.chunk
        for index, chunk in enumerate(self._chunks):
            stored = np.frombuffer(chunk, np.uint8)
            out = whole[index * size : (index + 1) * size]
            decode_chunks([StoredChunk(stored, [stored.size], name)], self._encoding, out)
        return lambda lo, hi, out: np.copyto(out, whole[lo:hi])

    def base_reader(self, base: str, name: str) -> TensorReader:
        return in_memory(self.base[name][1], self._shape)

    def tensor_reader(self, name: str) -> TensorReader:
        raise AssertionError(name)


def patched(
    bits: Bits, dtype: str, prediction: Operator, predicted: Bits, values: Array, groups: Groups | None, chunk: int
) -> tuple[Operator, Bits, list[list[int]] | None]:
    """The recipe of `bits`, its residual as stored, and the segments of each chunk. `values`: what is rounded."""
    recipe, kind = Patch(prediction, Stored("r"), groups), DTYPES[dtype]
    if groups is None:
        return recipe, difference(bits, predicted, kind), None
    parts, lengths = [], []
    for lo in range(0, bits.size, chunk):
        part = slice(lo, lo + chunk)
        by_margin = groups.by == "margin"
        grouping = groups.of_margins(values[part], kind) if by_margin else groups.of_exponents(predicted[part], kind)
        residual, counts = difference_in_groups(groups, grouping, chunk, bits[part], predicted[part], kind)
        parts.append(residual)
        lengths += counts
    return recipe, np.concatenate(parts), lengths


def check_ranges(
    memory: Memory, recipe: Operator, dtype: str, accumulator: str, shape: tuple[int, ...], bits: Bits
) -> None:
    """Read the tensor as a whole and in parts that begin and end within chunks of 300."""
    read = Rebuilder(recipe, memory, memory, Target("w", DTYPES[dtype], shape, DTYPES[accumulator].values))
    for lo, hi in ((0, 740), (0, 1), (299, 301), (299, 600), (300, 600), (650, 740), (10, 10)):
        out = np.empty(hi - lo, bits.dtype)
        read.read(lo, hi, out)
        assert out.tolist() == bits[lo:hi].tolist()


def bits_of(values: Array, dtype: str) -> Bits:
    with np.errstate(over="ignore"):
        return values.astype(DTYPES[dtype].values).view(DTYPES[dtype].bits).reshape(-1)


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_by_exponent_any_float_predicts_any_other(source: str, dtype: str) -> None:
    random = np.random.default_rng(3)
    shape, groups = (37, 20), Groups("exponent", (3, 9, 118, 121, 122, 1019))
    base = random.normal(0, 0.05, shape)
    base[0, :4] = [0, -0.0, np.inf, 1e-40]
    tuned = base + random.normal(0, 0.001, shape)
    tuned[1, :3] = [np.nan, -np.inf, -0.0]
    start, bits = bits_of(base, source), bits_of(tuned, dtype)
    predicted = cast(start, DTYPES[source], DTYPES[dtype]).copy()
    recipe, residual, lengths = patched(bits, dtype, Ref("w", "base"), predicted, predicted, groups, 300)
    memory = Memory(shape, residual, 300, lengths)
    memory.base["w"] = (source, start)
    check_ranges(memory, recipe, dtype, "F64" if "F64" in (source, dtype) else "F32", shape, bits)


def test_stored_order_and_residuals_by_hand() -> None:
    """BF16, bounds 127, 128: 0.5 and 1.0 and 2.0 have the exponents 126, 127, 128."""
    base = np.array([0x4000, 0x3F00, 0x3F80, 0xBF80, 0x3F00, 0xC000], np.uint16)
    tuned = np.array([0x4001, 0x3F00, 0x3F7F, 0xBF81, 0x3F02, 0xC000], np.uint16)
    groups, dtype = Groups("exponent", (127, 128)), DTYPES["BF16"]
    found, lengths = difference_in_groups(groups, groups.of_exponents(base, dtype), 6, tuned, base, dtype)
    # 0.5: 0 and +2; 1.0: -1, and the more negative -1; 2.0: +1 and 0; zigzag
    assert found.tolist() == [0, 4, 1, 1, 2, 0]
    assert lengths == [[2, 2, 2]]
    # Chunks of four: each is in order by itself.
    found, lengths = difference_in_groups(groups, groups.of_exponents(base, dtype), 4, tuned, base, dtype)
    assert found.tolist() == [0, 1, 1, 2, 4, 0]
    assert lengths == [[1, 2, 1], [1, 0, 1]]
    out = base.copy()
    correct_in_groups(groups, groups.of_exponents(base, dtype), 4, found, dtype, out)
    assert out.tolist() == tuned.tolist()


@pytest.mark.parametrize(
    ("accumulator", "dtype"), [("F32", "BF16"), ("F32", "F16"), ("F64", "F32"), ("F64", "BF16"), ("F64", "F16")]
)
@pytest.mark.parametrize("by", ["margin", "exponent", None])
def test_wide_prediction(accumulator: str, dtype: str, by: str | None) -> None:
    random = np.random.default_rng(4)
    shape = (37, 20)
    parts = {name: random.normal(0, 0.05, shape).astype(DTYPES[accumulator].values) for name in ("w", "v")}
    parts["w"][0, :4] = [np.inf, np.nan, 0, 1e-39]
    parts["v"][0, :4] = [np.nan, 0, -0.0, 0]
    total = (parts["w"] + parts["v"]).reshape(-1)
    bits = np.empty(total.size, DTYPES[dtype].bits)
    round_wide(total, DTYPES[dtype], bits)
    missed = random.random(total.size) < 0.1
    bits[missed] += random.choice([1, -1], total.size)[missed].astype(bits.dtype)

    groups = None if by is None else Groups(by, (90, 100, 108, 110, 112, 850, 950))
    rounded = np.empty_like(bits)
    round_wide(total, DTYPES[dtype], rounded)
    node = Sum((Ref("w", "base"), Ref("v", "base")))
    recipe, residual, lengths = patched(bits, dtype, node, rounded, total, groups, 300)
    memory = Memory(shape, residual, 300, lengths)
    memory.base = {name: (accumulator, bits_of(part, accumulator)) for name, part in parts.items()}
    check_ranges(memory, recipe, dtype, accumulator, shape, bits)


def test_misses_across_the_border_are_one_symbol() -> None:
    """Rounded the other way, whatever the sign and side: d = 1 where `up` is turned around is -1, so always r = 1."""
    values = np.array([1.0 + 2**-8 - 2**-20, 1.0 + 2**-8 + 2**-20], np.float32)
    values = np.concatenate([values, -values])
    bits = np.array([0x3F81, 0x3F80, 0xBF81, 0xBF80], np.uint16)  # 1.0 and 1.0078: each the wrong one

    rounded = np.array([0x3F80, 0x3F81, 0xBF80, 0xBF81], np.uint16)
    groups, dtype = Groups("margin", (110,)), DTYPES["BF16"]
    found, _ = difference_in_groups(groups, groups.of_margins(values, dtype), 4, bits, rounded, dtype)
    assert found.tolist() == [1, 1, 1, 1]


# --- Archives -------------------------------------------------------------------------------------------------------


def pair(folder: Path, dtype: str) -> tuple[Path, Path, bytes]:
    """A base and a fine-tune of it, with a tensor of many elements."""
    random = np.random.default_rng(5)
    kind = DTYPES[dtype].values
    base = random.normal(0, 0.05, (300, 500))
    tuned = (base + random.normal(0, 2e-4, base.shape)).astype(kind).tobytes()
    start = Tensor(dtype, base.shape, base.astype(kind).tobytes())
    return (
        write_checkpoint(folder / "base", {"w": start}),
        write_checkpoint(folder / "tuned", {"w": Tensor(dtype, base.shape, tuned)}),
        tuned,
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_pack_groups_what_it_patches(tmp_path: Path, dtype: str) -> None:
    base, tuned, content = pair(tmp_path, dtype)
    deltafmt.pack(tuned, tmp_path / "packed", base=base)
    recipe = manifest(tmp_path / "packed")["tensors"]["w"]["recipe"]
    assert recipe["groups"]["by"] == "exponent"
    deltafmt.unpack(tmp_path / "packed", tmp_path / "out", base=base)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()
    whole = np.frombuffer(content, DTYPES[dtype].values).reshape(300, 500)
    with deltafmt.open(tmp_path / "packed", base=base) as archive:
        part = archive.get_slice("w")[7:11, 3:490]
    assert np.asarray(part).tobytes() == whole[7:11, 3:490].tobytes()


def test_groups_are_smaller_than_a_plain_patch() -> None:
    random = np.random.default_rng(6)
    base = random.normal(0, 0.05, 200_000)
    start, tuned = bits_of(base, "BF16"), bits_of(base + random.normal(0, 2e-4, base.size), "BF16")
    groups = Groups("exponent", (118, 119, 120, 121, 122))
    grouping = groups.of_exponents(start, DTYPES["BF16"])
    grouped, lengths = difference_in_groups(groups, grouping, tuned.size, tuned, start, DTYPES["BF16"])
    plain = encode_chunk(difference(tuned, start, DTYPES["BF16"]), Encoding("planes", "zstd", 1 << 18))
    (chunk,) = encode_chunk(grouped, Encoding("segments", "zstd", 1 << 18), lengths=lengths[0])
    assert len(chunk) < 0.9 * sum(memoryview(plane).nbytes for plane in plain)


def bounds(value: object) -> Callable[[Json], Json]:
    return lambda document: put(document, "tensors/w/recipe/groups/bounds", value)


def unsigned(document: Json) -> None:
    document["tensors"]["w"]["recipe"]["residual"] = {"op": "rows", "x": document["tensors"]["w"]["recipe"]["residual"]}


HOSTILE: dict[str, tuple[Callable[[Json], object], str]] = {
    "no bounds": (bounds([]), "schema"),
    "256 bounds": (bounds(list(range(1, 257))), "schema"),
    "zero": (bounds([0, 3]), "schema"),
    "negative": (bounds([-1, 3]), "schema"),
    "2048": (bounds([3, 2048]), "schema"),
    "equal": (bounds([3, 3]), "schema"),
    "descending": (bounds([4, 3]), "schema"),
    "a fraction": (bounds([1.5]), "schema"),
    "true": (bounds([True, 3]), "schema"),
    "text": (bounds(["1"]), "schema"),
    "no list": (bounds(3), "schema"),
    "another way": (lambda document: put(document, "tensors/w/recipe/groups/by", "sign"), "schema"),
    "an unknown key": (lambda document: put(document, "tensors/w/recipe/groups/x", 1), "schema"),
    "null": (lambda document: put(document, "tensors/w/recipe/groups", None), "schema"),
    "no way": (lambda document: document["tensors"]["w"]["recipe"]["groups"].pop("by"), "schema"),
    "a margin of a tensor": (lambda document: put(document, "tensors/w/recipe/groups/by", "margin"), "operand"),
    "a residual that is computed": (unsigned, "operand"),
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("groups")
    base, tuned, _ = pair(root, "BF16")
    deltafmt.pack(tuned, root / "packed", base=base)
    return root


@pytest.mark.parametrize(("change", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_groups(packed: Path, tmp_path: Path, change: Callable[[Json], object], reason: str) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    for file in (packed / "packed").iterdir():
        (archive / file.name).write_bytes(file.read_bytes())
    edit(archive, change)
    with pytest.raises(DeltafmtError) as caught:
        deltafmt.open(archive, base=packed / "base")
    assert caught.value.reason == reason, caught.value


def test_255_bounds_are_accepted(packed: Path, tmp_path: Path) -> None:
    """Other bounds give other bits: `unpack` says so by the digest, and nothing else goes wrong."""
    archive = tmp_path / "archive"
    archive.mkdir()
    for file in (packed / "packed").iterdir():
        (archive / file.name).write_bytes(file.read_bytes())
    edit(archive, bounds(list(range(1, 256))))
    with pytest.raises(DeltafmtError) as caught:
        deltafmt.unpack(archive, tmp_path / "out", base=packed / "base")
    assert caught.value.reason == "digest"


def test_bf16_base_predicts_fp32(tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    base = random.normal(0, 0.05, (100, 200)).astype(np.float32)
    tuned = (base + random.normal(0, 1e-4, base.shape)).astype(np.float32)
    start = Tensor("BF16", base.shape, base.astype(ml_dtypes.bfloat16).tobytes())
    first = write_checkpoint(tmp_path / "base", {"w": start})
    second = write_checkpoint(tmp_path / "tuned", {"w": Tensor("F32", base.shape, tuned.tobytes())})
    deltafmt.pack(second, tmp_path / "packed", base=first)
    assert manifest(tmp_path / "packed")["tensors"]["w"]["recipe"]["op"] == "patch"
    deltafmt.unpack(tmp_path / "packed", tmp_path / "out", base=first)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
