"""Predictions in memory against what a reader gets from the archive that they are written to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deltafmt
from deltafmt.dtypes import DTYPES, Bits
from deltafmt.methods.prediction import Computed, Elements, Referred
from deltafmt.operators import Lowrank, Ref, Scaled, Sum, Target
from deltafmt.operators.groups import Groups
from deltafmt.sources import open_archive
from hostile import manifest, read_shard
from plain_checkpoint import NUMPY, held, write_checkpoint

Array = npt.NDArray[Any]

OUT, IN, RANK, EXPONENT = 48, 100, 3, -14
REF = Ref("w", "base")


def normal(*shape: int, dtype: str = "BF16", seed: int = 0) -> Array:
    return (0.02 * np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(NUMPY[dtype])


def elements(array: Array) -> Elements:
    dtype = DTYPES[next(name for name, kind in NUMPY.items() if kind == array.dtype)]
    return Elements(dtype, array.shape, array.reshape(-1).view(dtype.bits))


BASE = normal(OUT, IN)
SCALE = (1 + normal(OUT, dtype="F32", seed=3)).astype(np.float32)
A, B = (np.random.default_rng(5).integers(-9, 10, (RANK, side)).astype(np.int8) for side in (IN, OUT))


def predicted_by_the_book(base: Array) -> Array:
    """scale * W rounded, the sum of products exact, the addition rounded: fp32, as spec/operators says."""
    product = B.astype(np.int64).T @ A.astype(np.int64)
    added = np.ldexp(product.astype(np.float32), EXPONENT)
    wide: Array = SCALE[:, None] * base.astype(np.float32) + added
    return wide


def prediction(dtype: str) -> Computed:
    target = Target("w", DTYPES[dtype], (OUT, IN), np.dtype(np.float32))
    arrays = {"scale": elements(SCALE), "lora_a": elements(A), "lora_b": elements(B)}
    return Computed(
        target,
        {REF: elements(BASE)},
        arrays,
        lambda nodes: Sum((Scaled(REF, nodes["scale"]), Lowrank(nodes["lora_a"], nodes["lora_b"], 2.0**EXPONENT))),
    )


@settings(deadline=None)  # the first may have to import what multiplies
@given(st.integers(0, OUT * IN), st.integers(0, OUT * IN), st.sampled_from(["BF16", "F16"]))
def test_any_part_is_predicted_by_the_book(one: int, other: int, dtype: str) -> None:
    lo, hi = sorted((one, other))
    groups = Groups("margin", tuple(range(80, 130, 2)))
    bits, grouping = prediction(dtype).predicted(lo, hi, DTYPES[dtype], groups)
    wide = predicted_by_the_book(BASE).reshape(-1)[lo:hi]
    assert bits.tobytes() == wide.astype(NUMPY[dtype]).tobytes()
    assert grouping is not None and grouping.up is not None
    low_bits = 16 if dtype == "BF16" else 13
    patterns = wide.view(np.uint32).astype(np.int64)
    border = (patterns >> low_bits << low_bits) + (1 << (low_bits - 1))
    distance = wide.astype(np.float64) - border.astype(np.uint32).view(np.float32).astype(np.float64)
    exponents = np.where(distance == 0, 0, np.frexp(distance)[1] + 126)
    assert grouping.numbers.tolist() == [sum(bound <= key for bound in groups.bounds) for key in exponents]
    assert grouping.up.tolist() == (distance < 0).tolist()


def test_without_groups_there_are_no_keys() -> None:
    bits, grouping = prediction("BF16").predicted(7, 900, DTYPES["BF16"], None)
    assert (len(bits), grouping) == (893, None)


def test_groups_tell_hits_from_misses() -> None:
    """Misses only where the prediction is near a border: then bounds pay, and none do where there are no misses."""
    found = prediction("BF16")
    exact = predicted_by_the_book(BASE)
    bits = exact.astype(ml_dtypes.bfloat16).view(np.uint16).reshape(-1)
    assert found.groups(bits, DTYPES["BF16"], 1 << 18) is None
    noise = 2.0**-16 * np.random.default_rng(1).standard_normal(exact.shape)
    near = (exact + noise).astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16).reshape(-1)
    assert 0.01 < np.mean(near != bits) < 0.3
    groups = found.groups(near, DTYPES["BF16"], 1 << 18)
    assert groups is not None and groups.by == "margin"
    _, grouping = found.predicted(0, near.size, DTYPES["BF16"], groups)
    assert grouping is not None
    missed = near != bits
    close = grouping.numbers == 0
    assert missed[close].mean() > 5 * missed[~close].mean()


@pytest.mark.parametrize("like", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_a_reference_is_converted(like: str, dtype: str) -> None:
    base = normal(5000, dtype=like)
    kind = DTYPES[dtype]
    found = Referred(REF, DTYPES[like], elements(base).bits)
    groups = Groups("exponent", (10, 50, 100, 120, 121, 1015))
    bits, grouping = found.predicted(100, 300, kind, groups)
    expected = base[100:300].astype(np.float64).astype(NUMPY[dtype])
    assert bits.tobytes() == expected.tobytes()
    assert grouping is not None
    nonzero = expected.astype(np.float64)
    bias = {"BF16": 126, "F32": 126, "F16": 14, "F64": 1022}[dtype]
    keys = np.maximum(np.frexp(nonzero)[1] + bias, 0)
    assert grouping.numbers.tolist() == [sum(bound <= key for bound in groups.bounds) for key in keys]


def test_few_elements_and_integers_are_not_grouped() -> None:
    few, many = normal(4000), normal(1 << 18)
    for array, dtype in ((few, "BF16"), (many, "I16")):
        bits = array.view(DTYPES[dtype].bits)
        assert Referred(REF, DTYPES[dtype], bits).groups(bits, DTYPES[dtype], 1 << 18) is None
    tuned = (many.astype(np.float32) + normal(1 << 18, dtype="F32", seed=1) / 100).astype(many.dtype)
    groups = Referred(REF, DTYPES["BF16"], many.view(np.uint16)).groups(tuned.view(np.uint16), DTYPES["BF16"], 1 << 18)
    assert groups is not None and groups.by == "exponent"


def packed_lora(root: Path, dtype: str) -> tuple[Path, Array]:
    """A merge of rank 4, packed, and its base; `root` holds both checkpoints."""
    base = normal(256, 256, dtype=dtype)
    b, a = (np.random.default_rng(seed).standard_normal((256, 4), np.float32) for seed in (1, 2))
    merged = (base.astype(np.float32) + np.float32(2e-4) * (b @ a.T)).astype(base.dtype)
    for name, array in (("base", base), ("merged", merged)):
        write_checkpoint(root / name, [held("w", array)])
    deltafmt.pack(root / "merged", root / "packed", base=root / "base")
    return root / "packed", base


def rebuilt(archive: Path, name: str) -> Array:
    """A stored array of an archive."""
    with open_archive(archive) as opened:
        entry = opened.manifest.arrays[name]
        bits: Bits = np.empty(int(np.prod(entry.shape)), entry.dtype.bits)
        opened.array_reader(name)(0, bits.size, bits)
        return np.asarray(bits.view(entry.dtype.values).reshape(entry.shape))


def predicted_from(archive: Path, base: Array) -> Array:
    """The prediction in the archive's recipe, from its factors as the archive's own reader gives them."""
    recipe = manifest(archive)["tensors"]["w"]["recipe"]
    low = recipe["prediction"]["terms"][1]
    factors = {part: rebuilt(archive, low[part]["array"]).astype(np.int64) for part in "ab"}
    accumulator = np.float64 if base.dtype == np.float32 else np.float32
    product = np.ldexp((factors["b"].T @ factors["a"]).astype(accumulator), int(np.log2(low["scale"])))
    predicted: Array = (base.astype(accumulator) + product).astype(base.dtype)
    return predicted


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_what_is_stored_predicts_nearly_all(tmp_path: Path, dtype: str) -> None:
    """The factors alone, by int64 arithmetic, give nine of ten weights; the residual is not what carries the merge."""
    archive, base = packed_lora(tmp_path, dtype)
    merged = np.fromfile(tmp_path / "merged" / "model.safetensors", np.uint8)[-base.nbytes :].view(base.dtype)
    assert np.mean(predicted_from(archive, base).reshape(-1) == merged) > 0.9


def test_own_bytes_are_at_least_what_the_arrays_take(tmp_path: Path) -> None:
    """By these, predictions are compared."""
    archive, base = packed_lora(tmp_path, "BF16")
    header, _ = read_shard(archive)
    a, b = (rebuilt(archive, f"w#lora_{part}") for part in "ab")
    target = Target("w", DTYPES["BF16"], base.shape, np.dtype(np.float32))
    found = Computed(
        target,
        {REF: elements(base)},
        {"lora_a": elements(a), "lora_b": elements(b)},
        lambda nodes: Sum((REF, Lowrank(nodes["lora_a"], nodes["lora_b"], 2.0**EXPONENT))),
    )
    stored = 0
    for part in "ab":
        begin, end = header[f"w#lora_{part}"]["data_offsets"]
        stored += end - begin
    assert stored <= found.own_bytes
    assert stored <= a.nbytes + b.nbytes + 256
