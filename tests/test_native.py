"""The kernels against numpy and against plain integers: the same bytes, whatever the sizes."""

from __future__ import annotations

import ctypes
import json
import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltafmt import native, strictjson
from deltafmt.dtypes import DTYPES, round_to
from deltafmt.encodings import planes, segments, zstd
from deltafmt.errors import MalformedError
from deltafmt.gemm import Product
from deltafmt.methods.grouping import kinds_by_exponent
from deltafmt.native import keys_differ, library
from deltafmt.operators.patch import difference

Array = npt.NDArray[Any]

sizes = st.one_of(st.integers(0, 70), st.sampled_from([255, 256, 4095, 4097, 9000]))


def without_kernels() -> pytest.MonkeyPatch:
    """Undo it to have them back."""
    patching = pytest.MonkeyPatch()
    patching.setattr(library, "LIBRARY", None)
    return patching


def bits(width: int, size: int, seed: int, most: int = 0) -> Array:
    """Random elements; of `most` bits, if it is given."""
    random = np.random.default_rng(seed).integers(0, 256, size * width, np.uint8).view(f"u{width}")
    return random >> np.array(8 * width - most, random.dtype) if most else random


@given(st.sampled_from([2, 4, 8]), st.booleans(), sizes, st.integers(0, 99))
def test_planes(width: int, floats: bool, size: int, seed: int) -> None:
    elements = bits(width, size, seed)
    found, expected = np.zeros((2, width, size), np.uint8)
    planes.split(elements, floats, list(found))
    patching = without_kernels()
    planes.split(elements, floats, list(expected))
    patching.undo()
    assert np.array_equal(found, expected)
    back = np.empty_like(elements)
    planes.merge(list(found), floats, back)
    assert np.array_equal(back, elements)


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.booleans(),
    st.lists(st.tuples(sizes, st.integers(0, 64)), min_size=1, max_size=6),
    st.integers(0, 99),
)
def test_segments(width: int, signed: bool, parts: list[tuple[int, int]], seed: int) -> None:
    """Of elements of few bits and of many: the same chunk, and the same elements read from it."""
    elements = np.concatenate([bits(width, size, seed, min(most, 8 * width)) for size, most in parts])
    lengths = [size for size, _ in parts]
    if elements.size == 0:
        return
    (found,) = segments.encode(elements, signed, [lengths])
    read, read_again = np.empty_like(elements), np.empty_like(elements)
    segments.decode([np.frombuffer(found, np.uint8)], signed, [read], read, "")
    patching = without_kernels()
    (expected,) = segments.encode(elements, signed, [lengths])
    segments.decode([np.frombuffer(found, np.uint8)], signed, [read_again], read_again, "")
    patching.undo()
    assert found == expected
    assert np.array_equal(read, elements)
    assert np.array_equal(read_again, elements)


@pytest.mark.parametrize("blocks", [3, 5000])
@pytest.mark.parametrize("others", [0, 8])
def test_a_frame_ends_where_its_plane_does(blocks: int, others: int) -> None:
    """By hand: blocks of one byte repeated 64 times. Whatever follows the last is refused, however many there are; of a
    frame by itself, and beside others, with which it might be decoded in one step."""
    head = b"\x28\xb5\x2f\xfd\xa0" + (64 * blocks).to_bytes(4, "little")
    body = [(64 << 3 | 1 << 1 | (at == blocks - 1)).to_bytes(3, "little") + bytes([at % 256]) for at in range(blocks)]
    frame = b"".join([head, *body])

    def decompress(odd: bytes) -> list[npt.NDArray[np.uint8]]:
        frames = [frame] * others
        frames.insert(others // 2, odd)
        return zstd.decompress([np.frombuffer(each, np.uint8) for each in frames], [64 * blocks] * len(frames), "")

    for plane in decompress(frame):
        assert np.array_equal(plane, np.repeat(np.arange(blocks).astype(np.uint8), 64))
    less = frame[:5] + (64 * blocks - 64).to_bytes(4, "little") + frame[9:]
    skippable = b"\x50\x2a\x4d\x18\0\0\0\0"
    for odd in (frame + b"\0", frame + skippable, frame + frame[:9] + body[-1], skippable + frame, less, frame[:-1]):
        with pytest.raises(MalformedError) as caught:
            decompress(odd)
        assert caught.value.reason == "chunk-size"


def test_every_bf16_and_its_ties() -> None:
    tails = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | tails).reshape(-1).view(np.float32)
    found = np.empty(values.size, np.uint16)
    native.round_bf16(values, found)
    assert np.array_equal(found, round_to(values, DTYPES["BF16"], signed_nan=False))
    wide = np.empty(1 << 16, np.float32)
    native.widen_bf16(np.arange(1 << 16, dtype=np.uint16), wide)
    assert np.array_equal(wide.view(np.uint32), np.arange(1 << 16, dtype=np.uint32) << 16)


@given(
    st.sampled_from(["BF16", "F16", "F32", "F64"]),
    st.sampled_from([1, 5, 700, 4000]),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_kinds_by_exponent(name: str, size: int, step: int, seed: int) -> None:
    """Residuals of any size, from none to those between numbers of either sign."""
    dtype = DTYPES[name]
    target = bits(dtype.width, size, seed)
    shifts = np.random.default_rng(seed).integers(0, 8 * dtype.width, size).astype(target.dtype)
    predicted = target + (bits(dtype.width, size, seed + 1) >> shifts)
    found = kinds_by_exponent(predicted, target, dtype, step)
    patching = without_kernels()
    expected = kinds_by_exponent(predicted, target, dtype, step)
    patching.undo()
    wider = np.zeros_like(found)
    wider[: expected.shape[0], : expected.shape[1]] = expected
    assert np.array_equal(found, wider)


@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([1, 2, 3, 9, 16, 17, 40, 256]),
    st.sampled_from([0, 1, 31, 32, 33, 511, 512, 513, 3000]),
    st.sampled_from([1, 100, 512, 600, 5000]),
    st.booleans(),
    st.sampled_from([0, 0.001, 0.02, 1]),
    st.integers(0, 99),
)
def test_residuals_in_order_of_groups(
    width: int, groups: int, size: int, chunk: int, mirrored: bool, missed: float, seed: int
) -> None:
    """A stable sort by the number within each chunk, whichever way it is done, however many are zero; and back."""
    random = np.random.default_rng(seed)
    predicted = bits(width, size, seed + 1)
    target = np.where(random.random(size) < missed, bits(width, size, seed), predicted)
    numbers = (groups * random.random(size) ** 3).astype(np.uint8)
    up = random.random(size) < 0.5 if mirrored else None
    sorted_, back = np.empty_like(target), predicted.copy()
    lengths = native.to_groups(target, predicted, up, numbers, chunk, sorted_)
    dtype = next(each for each in DTYPES.values() if each.is_float and each.width == width)
    residual = difference(target, predicted, dtype, up)
    for index, begin in enumerate(range(0, size, chunk)):
        part = slice(begin, begin + chunk)
        assert np.array_equal(sorted_[part], residual[part][np.argsort(numbers[part], kind="stable")])
        assert np.array_equal(lengths[index], np.bincount(numbers[part], minlength=256))
    native.from_groups(sorted_, up, numbers, groups, chunk, back)
    assert np.array_equal(back, target)


@settings(deadline=None)
@given(
    st.sampled_from([1, 2, 3, 9, 64]),  # of 64, the columns of one block do not fit the cache
    st.sampled_from([1, 2, 23, 24, 25, 47, 48, 49, 95, 96, 97, 400, 2100]),
    st.sampled_from([1, 3, 4, 5, 30, 90]),
    st.data(),
)
def test_products_of_integers(rank: int, columns: int, rows: int, data: st.DataObject) -> None:
    """Every part of it, alone and added, against the product of integers."""
    random = np.random.default_rng(rank * columns)
    a, b = random.integers(-99, 100, (rank, columns)), random.integers(-99, 100, (rank, rows))
    product, expected = Product(a.astype(np.float32), b.astype(np.float32)), b.T @ a
    top = data.draw(st.integers(0, rows - 1))
    bottom = data.draw(st.integers(top + 1, rows))
    left = data.draw(st.integers(0, columns - 1))
    right = data.draw(st.integers(left + 1, columns))
    part = expected[top:bottom, left:right]
    base = random.integers(-1000, 1000, part.shape)
    into = base.astype(np.float32)
    product.add(into, top, left, first=False)
    assert np.array_equal(into, base + part)
    product.add(into, top, left, first=True)
    assert np.array_equal(into, part)
    rows_of = product.onto_bf16(top, bottom - top)
    assert rows_of is not None
    part = expected[top:bottom]
    weights = random.standard_normal(part.shape).astype(ml_dtypes.bfloat16)
    weights.reshape(-1)[:: data.draw(st.integers(1, 50))] = data.draw(st.sampled_from([-np.nan, np.inf, -3e38, -0.0]))
    exact = (weights.astype(np.float32) + part.astype(np.float32)).reshape(-1)
    wide = np.empty(part.size, np.float32)
    rows_of.add_into(weights.view(np.uint16).reshape(-1), wide)
    assert np.array_equal(wide, exact, equal_nan=True)
    known = native.Bounds([100, 110, 118])
    marked, (numbers, expected_numbers), (up, expected_up) = weights.copy(), *np.empty((2, 2, part.size), np.uint8)
    rows_of.add_with_margins(marked.view(np.uint16).reshape(-1), known, numbers, up)
    native.margin_groups(exact, 16, known, expected_numbers, expected_up)
    assert np.array_equal(numbers, expected_numbers) and np.array_equal(up, expected_up)
    rows_of.add(weights.view(np.uint16).reshape(-1))
    rounded = round_to(exact, DTYPES["BF16"], signed_nan=False)
    assert all(np.array_equal(found.view(np.uint16).reshape(-1), rounded) for found in (weights, marked))
    assert [(x.tolist(), y.tolist()) for x, y in product.components()] == list(zip(a.tolist(), b.tolist(), strict=True))


def test_another_version_of_the_library_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that an older build left behind; nor is what is no library, or not there."""
    source = tmp_path / "other.c"
    source.write_text("int deltafmt_abi(void) { return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(tmp_path / "other.so"), str(source)], check=True)
    assert ctypes.CDLL(str(tmp_path / "other.so")).deltafmt_abi() == 0
    (tmp_path / "text.so").write_text("no library")
    for name in ("other.so", "text.so", "missing.so"):
        monkeypatch.setattr(library, "FILE", tmp_path / name)
        assert library._load() is None


def test_what_kernels_are_told_is_checked() -> None:
    even = np.zeros(10, np.uint16)
    with pytest.raises(ValueError):
        native.round_bf16(np.zeros(9, np.float32), even)
    with pytest.raises(ValueError):
        native.widen_bf16(even[::2], np.zeros(5, np.float32))
    with pytest.raises(ValueError):
        native.round_bf16(np.zeros(10, np.float32), np.broadcast_to(np.uint16(0), 10))
    for low_bits, count in ((3, [10]), (8, [11, -1])):  # for C, 3 is 8
        with pytest.raises(ValueError):
            native.split_segments(even, count, [low_bits] * len(count), [1] * len(count), np.zeros(99, np.uint8))


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask": -1},
        {"mask": 4096},
        {"mantissa_bits": 16},
        {"chunk": 0},
        {"numbers": np.zeros(3, np.uint8)},
        {"numbers": np.zeros(10, np.uint16)},
        {"numbers": np.broadcast_to(np.uint8(0), 10)},
        {"grouped": np.zeros(9, np.uint16)},
        {"grouped": np.zeros(10, np.uint32)},
        {"predicted": np.zeros(20, np.uint16)[::2]},
    ],
    ids=str,
)
def test_what_the_kernels_of_groups_are_told_is_checked(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"grouped": np.zeros(10, np.uint16), "mantissa_bits": 7, "mask": 0xFF, "chunk": 4}
    right |= {"groups": native.Bounds([120]), "numbers": np.zeros(4, np.uint8), "predicted": np.zeros(10, np.uint16)}
    native.from_exponent_groups(**right)
    native.from_exponent_groups(**right | {"chunk": 1 << 70, "numbers": np.zeros(10, np.uint8)})
    with pytest.raises(ValueError):
        native.from_exponent_groups(**right | wrong)


def test_group_numbers_are_of_so_many_groups() -> None:
    arrays = np.zeros(10, np.uint16), None, np.zeros(10, np.uint8)
    for groups in (0, 257):
        with pytest.raises(ValueError):
            native.from_groups(*arrays, groups, 10, np.zeros(10, np.uint16))


# Keys

json_keys = st.sampled_from(["", "a", "aa", "b", "é", "\U0001f600", ":", "{", "a b", ",", '"', "\\", "\n"])
json_values = st.recursive(
    st.one_of(json_keys, st.integers(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(st.tuples(json_keys, inner), max_size=4).map(tuple)),
    max_leaves=12,
)


def printed(value: object, space: str) -> str:
    """As JSON; a tuple is an object, of pairs, in this order, some maybe twice."""
    if isinstance(value, tuple):
        pairs = (f"{json.dumps(key, ensure_ascii=False)}{space}:{printed(item, space)}" for key, item in value)
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(printed(item, space) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def is_simple(value: object) -> bool:
    """Whether the keys of each object differ (many of them: rise, in UTF-8), and nothing has escapes."""
    if isinstance(value, tuple):
        names = [name.encode() for name, _ in value]
        differ = len(set(names)) == len(names) and (len(names) <= 8 or names == sorted(names))
        return differ and all(is_simple(name) and is_simple(item) for name, item in value)
    if isinstance(value, list):
        return all(map(is_simple, value))
    return not isinstance(value, str) or "\\" not in json.dumps(value, ensure_ascii=False)


@given(json_values, st.sampled_from(["", "", " ", "\n"]))
def test_keys_that_differ(value: object, space: str) -> None:
    differ = keys_differ(printed(value, space).encode())
    assert differ == is_simple(value) or (space and not differ)


@given(st.lists(st.sampled_from("abcdefghijklmnop"), max_size=14), st.booleans())
def test_of_many_keys_none_is_there_twice(names: list[str], ascending: bool) -> None:
    names = sorted(set(names)) if ascending else names
    differ = keys_differ(printed(tuple((name, [1]) for name in names), "").encode())
    assert differ or not ascending
    assert len(set(names)) == len(names) or not differ


@pytest.mark.parametrize(
    "text", ['{"a":1,"a":2}', '[[{"a":{"b":1,"b":1}}]]', '{"a":1,"a" :2}', '{"a":{},"a":{}}', '{"":1,"":1}']
)
def test_a_key_that_is_there_twice_is_seen_by_whoever_looks(text: str) -> None:
    assert not keys_differ(text.encode())
    for patching in (pytest.MonkeyPatch(), without_kernels()):
        with pytest.raises(MalformedError, match="duplicate key"):
            strictjson.parse(text.encode(), "here")
        patching.undo()


@given(st.binary(max_size=40))
def test_keys_of_what_is_no_json(data: bytes) -> None:
    for text in (data, b'{"' + data, data + b'{"a":[[{"', b"[" * 70 + data, b"]" + data):
        assert keys_differ(text) in (False, True)  # and nothing was read that is not there, as a sanitizer would say
