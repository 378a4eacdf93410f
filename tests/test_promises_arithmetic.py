"""Promises 27 and 28: what recipes compute is what spec/arithmetic.md says, bit for bit or within its bound."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import deltafmt
from deltafmt.sources import open_archive
from hostile import ZEROS, Json, Tensor, derived, edit, f32, lowrank, patch, ref, stored, sum_of, write_checkpoint

Floats = npt.NDArray[np.float64]
NUMPY: dict[str, npt.DTypeLike] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}


# --- 27: patches, by hand in Python's integers ----------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("way")


def _patched(prediction: int, residual: int, width: int, is_float: bool) -> int:
    """spec/operators/patch.md, one element at a time."""
    top, ones = 1 << (width - 1), (1 << width) - 1

    def order(u: int) -> int:
        return u if not is_float else u ^ top if u & top == 0 else u ^ ones

    d = (residual >> 1) ^ (-(residual & 1) & ones)
    wanted = (order(prediction) + d) & ones
    return wanted if not is_float else wanted ^ top if wanted & top else wanted ^ ones


def test_27_patches_of_patches(tmp_path: Path) -> None:
    """Nested in the prediction, in the residual, and through references: all with the same buffers underneath."""
    rng = np.random.default_rng(5)
    names = ("p", "r", "s", "q")
    words = {name: rng.integers(0, 2**32, 24, dtype=np.uint32) for name in names}
    parts = {name: Tensor("U32", (6, 4), words[name].tobytes()) for name in names}
    deltafmt.pack(write_checkpoint(tmp_path / "src", parts), tmp_path / "packed")

    def change(document: Json) -> None:
        derived(document, "inner", patch(stored("r"), stored("s")), "U32")
        del document["tensors"]["inner"]["rel_error"]
        document["tensors"]["inner"]["digest"] = ZEROS
        for name, recipe in {
            "in residual": patch(stored("p"), patch(stored("r"), stored("s"))),
            "in residual by ref": patch(stored("p"), ref("inner")),
            "in prediction": patch(patch(stored("r"), stored("s")), stored("p")),
            "in prediction by ref": patch(ref("inner"), stored("p")),
            "in both": patch(ref("inner"), patch(stored("q"), ref("inner"))),
        }.items():
            derived(document, name, recipe, "U32")

    p, r, s, q = (words[name].tolist() for name in names)
    inner = [_patched(a, b, 32, False) for a, b in zip(r, s, strict=True)]
    expected = {
        "in residual": [_patched(a, b, 32, False) for a, b in zip(p, inner, strict=True)],
        "in prediction": [_patched(a, b, 32, False) for a, b in zip(inner, p, strict=True)],
        "in both": [_patched(a, _patched(b, c, 32, False), 32, False) for a, b, c in zip(inner, q, inner, strict=True)],
    }
    with deltafmt.open(edit(tmp_path / "packed", change)) as opened:
        for name, values in expected.items():
            assert opened.get_tensor(name).ravel().tolist() == values, name
            if name != "in both":
                assert opened.get_tensor(f"{name} by ref").ravel().tolist() == values, name


def test_27_references_share_no_buffers_while_they_are_read(tmp_path: Path) -> None:
    """Sums of sums over several blocks, through a tensor of the archive and one of a base that is an archive too."""
    count = (5 << 20) // 2
    small, large = (np.arange(count, dtype=np.float32) % modulus for modulus in (251, 1009))
    tensors = {"w": Tensor("F32", (count,), small.tobytes())}
    doubled = {"w": Tensor("F32", (count,), (small + small).tobytes())}
    deltafmt.pack(write_checkpoint(tmp_path / "single", tensors), tmp_path / "base")
    deltafmt.pack(write_checkpoint(tmp_path / "double", doubled), tmp_path / "twin")
    edit(tmp_path / "base", lambda d: derived(d, "w", sum_of(stored("w"), stored("w")), shape=(count,)))
    source = write_checkpoint(tmp_path / "src", {**doubled, "s": Tensor("F32", (count,), large.tobytes())})
    deltafmt.pack(source, tmp_path / "packed", base=tmp_path / "twin")

    def change(document: Json) -> None:
        from_base = {"op": "ref", "tensor": "w", "base": "base"}
        derived(document, "u", sum_of(stored("s"), from_base), shape=(count,))
        derived(document, "t", sum_of(stored("s"), ref("u"), ref("u")), shape=(count,))

    with deltafmt.open(edit(tmp_path / "packed", change), base=tmp_path / "base") as opened:
        np.testing.assert_array_equal(opened.get_tensor("u"), large + 2 * small)
        np.testing.assert_array_equal(opened.get_tensor("t"), 3 * large + 4 * small)
        part = slice(1_000_003, 2_200_001)
        np.testing.assert_array_equal(opened.get_slice("t")[part], (3 * large + 4 * small)[part])


# --- 27, 28: sums and products --------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A fast result and its reference (as float64), the bound on the value before it is rounded, and the dtype."""

    fast: Floats
    reference: Floats
    bound: Floats
    dtype: str


def _values(tensor: Tensor) -> Floats:
    return np.frombuffer(tensor.data, NUMPY[tensor.dtype]).astype(np.float64).reshape(tensor.shape)


def _random(dtype: str, *shape: int, seed: int, spread: float = 1.0) -> Tensor:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * np.exp2(rng.uniform(-spread, spread, shape))
    return Tensor(dtype, shape, values.astype(NUMPY[dtype]).tobytes())


def _case(root: Path, dtype: str, factor: str, base: str, shape: tuple[int, ...], rank: int, scale: float) -> Case:
    rows, columns = shape[0], int(np.prod(shape[1:]))
    parts = {
        "base": _random(base, *shape, seed=1, spread=8),
        "a": _random(factor, rank, columns, seed=2, spread=8),
        "b": _random(factor, rank, rows, seed=3, spread=8),
        "more": _random(dtype, *shape, seed=4),
    }
    deltafmt.pack(write_checkpoint(root / "src", parts), root / "packed")
    recipe = sum_of(stored("base"), lowrank("a", "b", scale=scale), ref("more"))
    edit(root / "packed", lambda document: derived(document, "x", recipe, dtype, shape))
    with open_archive(root / "packed") as archive:
        rebuilder = archive.rebuilder("x")
        count = rows * columns
        bits = np.empty(count, rebuilder.dtype.bits)
        rebuilder.read(0, count, bits)
        fast = bits.view(NUMPY[dtype]).astype(np.float64)
        reference = rebuilder.reference(0, count).view(NUMPY[dtype]).astype(np.float64)
    w, a, b, more = (_values(parts[name]) for name in ("base", "a", "b", "more"))
    wide = np.float64 if "F64" in (dtype, factor, base) else np.float32
    magnitude = np.abs(w).ravel() + (abs(scale) * np.abs(b.T) @ np.abs(a)).ravel() + np.abs(more).ravel()
    bound = 2 * (rank + 3 + 2) * (2.0**-53 if wide is np.float64 else 2.0**-24) * magnitude
    # The ordered reference again, by hand: each step rounded to the accumulation type.
    total = np.zeros((rows, columns), wide)
    factors_a, factors_b = a.astype(wide), b.astype(wide)
    for k in range(rank):
        total = total + (factors_b[k] * wide(scale))[:, None] * factors_a[k]
    total = np.add(np.add(w.astype(wide).reshape(rows, columns), total), more.astype(wide).reshape(rows, columns))
    assert np.array_equal(reference, total.astype(NUMPY[dtype]).astype(np.float64).ravel()) or wide is np.float64
    return Case(fast, total.astype(np.float64).ravel(), bound, dtype)


@pytest.mark.parametrize(
    ("dtype", "factor", "base", "shape", "rank", "scale"),
    [
        ("F32", "F32", "F32", (70, 50), 16, 0.3),
        ("F32", "F16", "BF16", (33, 4, 3), 12, -1e-3),
        ("BF16", "BF16", "BF16", (129, 65), 64, 1.0),
        ("F16", "F32", "F16", (65, 31), 1, 1e-2),
        ("F64", "F64", "F64", (40, 30), 30, 0.1),
        ("F64", "F32", "F32", (20, 30), 5, 1 / 3),
        ("F32", "F64", "BF16", (20, 30), 5, 1 / 3),
    ],
)
def test_28_the_fast_path_stays_within_its_bound(
    tmp_path: Path, dtype: str, factor: str, base: str, shape: tuple[int, ...], rank: int, scale: float
) -> None:
    case = _case(tmp_path, dtype, factor, base, shape, rank, scale)
    # Rounding is monotone: a value within the bound lies, rounded, between the rounded bounds.
    kind = NUMPY[dtype]
    with np.errstate(over="ignore"):
        low = (case.reference - case.bound).astype(kind).astype(np.float64)
        high = (case.reference + case.bound).astype(kind).astype(np.float64)
    assert np.all((case.fast >= low) & (case.fast <= high))


def test_28_any_range_of_a_bounded_tensor(tmp_path: Path) -> None:
    """Pieces of any size agree with the whole to within the bound, so a slice is not another model."""
    parts = {
        "w": _random("F32", 30, 20, seed=1),
        "a": _random("F32", 5, 20, seed=2),
        "b": _random("F32", 5, 30, seed=3),
    }
    deltafmt.pack(write_checkpoint(tmp_path / "src", parts), tmp_path / "packed")
    edit(tmp_path / "packed", lambda d: derived(d, "x", sum_of(stored("w"), lowrank("a", "b")), "F32", (30, 20)))
    exact = _values(parts["w"]) + _values(parts["b"]).T @ _values(parts["a"])
    magnitude = np.abs(_values(parts["w"])) + np.abs(_values(parts["b"])).T @ np.abs(_values(parts["a"]))
    bound = (2 * (5 + 2 + 2) * 2.0**-24 * magnitude + 8 * 2.0**-24 * magnitude).ravel()
    with open_archive(tmp_path / "packed") as archive:
        rebuilder = archive.rebuilder("x")
        for lo, hi in ((0, 1), (19, 21), (7, 193), (599, 600), (20, 40), (5, 5), (0, 600), (41, 58)):
            bits = np.empty(hi - lo, np.uint32)
            rebuilder.read(lo, hi, bits)
            assert np.all(np.abs(bits.view(np.float32) - exact.ravel()[lo:hi]) <= bound[lo:hi]), (lo, hi)


@pytest.mark.parametrize(
    ("dtype", "value", "wanted"),
    [
        ("BF16", 1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-7),  # above the tie; by way of float32 it would look like one
        ("BF16", 1 + 2.0**-8, 1.0),
        ("BF16", -(1 + 3 * 2.0**-8 - 2.0**-40), -(1 + 2.0**-7)),
        ("F16", 1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-10),
        ("F16", 65520.0, np.inf),
        ("F16", 65519.99999, 65504.0),
        ("F16", 2.0**-25, 0.0),
        ("F16", 2.0**-25 * (1 + 2.0**-30), 2.0**-24),
        ("F32", 1 + 2.0**-24 + 2.0**-50, 1 + 2.0**-23),
        ("BF16", 2.0**-134, 0.0),
        ("BF16", 2.0**-134 * (1 + 2.0**-30), 2.0**-133),
    ],
)
def test_27_values_are_rounded_once(tmp_path: Path, dtype: str, value: float, wanted: float) -> None:
    parts = {
        "x": Tensor("F64", (1, 1), np.float64(value).tobytes()),
        "zero": Tensor("F64", (1, 1), bytes(8)),
    }
    deltafmt.pack(write_checkpoint(tmp_path / "src", parts), tmp_path / "packed")
    edit(tmp_path / "packed", lambda d: derived(d, "y", sum_of(stored("x"), stored("zero")), dtype, (1, 1)))
    with open_archive(tmp_path / "packed") as archive:
        rebuilder = archive.rebuilder("y")
        bits = np.empty(1, rebuilder.dtype.bits)
        rebuilder.read(0, 1, bits)
        for found in (bits, rebuilder.reference(0, 1)):
            assert float(found.view(NUMPY[dtype])[0]) == wanted


@pytest.mark.parametrize(
    ("dtype", "positive"), [("BF16", 0x7FC0), ("F16", 0x7E00), ("F32", 0x7FC00000), ("F64", 0x7FF8 << 48)]
)
def test_27_a_computed_nan_is_quiet_and_has_no_sign(tmp_path: Path, dtype: str, positive: int) -> None:
    sources = np.array([0x7F800001, 0xFF800001, 0x7FC12345, 0xFFFFFFFF], np.uint32)
    values = Tensor("F32", (1, 4), sources.tobytes())
    deltafmt.pack(write_checkpoint(tmp_path / "src", {"x": values, "zero": f32(1, 4)}), tmp_path / "packed")
    edit(tmp_path / "packed", lambda d: derived(d, "y", sum_of(stored("x"), stored("zero")), dtype, (1, 4)))
    with open_archive(tmp_path / "packed") as archive:
        bits = archive.read_whole("y")
    assert bits.tolist() == [positive] * 4


@pytest.mark.parametrize(("dtype", "positive"), [("BF16", 0x7FC0), ("F16", 0x7E00)])
def test_27_a_converted_nan_is_quiet_with_the_sign_of_the_source(tmp_path: Path, dtype: str, positive: int) -> None:
    sources = np.array([0x7F800001, 0xFF800001, 0x7FC12345, 0xFFFFFFFF], np.uint32)
    parts = {"x": Tensor("F32", (1, 4), sources.tobytes()), "zero": Tensor("U16", (1, 4), bytes(8))}
    deltafmt.pack(write_checkpoint(tmp_path / "src", parts), tmp_path / "packed")
    edit(tmp_path / "packed", lambda d: derived(d, "y", patch(stored("x"), stored("zero")), dtype, (1, 4)))
    with open_archive(tmp_path / "packed") as archive:
        bits = archive.read_whole("y")
    assert bits.tolist() == [positive, positive | 0x8000, positive, positive | 0x8000]
