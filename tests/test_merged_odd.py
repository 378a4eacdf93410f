"""Odd and hostile pairs of base and tensor: every bit comes back, whatever they hold, and no more is stored than
without the predictions that are computed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deltafmt
from deltafmt.dtypes import DTYPES
from deltafmt.methods.lossless import Coding, candidates
from deltafmt.methods.prediction import Elements, Referred
from deltafmt.operators import Ref
from deltafmt.operators.patch import predicts
from hostile import Tensor, tree, write_checkpoint
from merges import factors, ulp
from plain_checkpoint import NUMPY, held
from plain_checkpoint import write_checkpoint as write_plain

Array = npt.NDArray[Any]

SIDE = 160
STEP = ulp(0.02, "BF16")  # last place of a typical weight


def normal(*shape: int, dtype: str = "BF16", deviation: float = 0.02, seed: int = 0) -> Array:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(deviation)
    return values.astype(NUMPY[dtype])


def low(rank: int, rms: float, shape: tuple[int, int] = (SIDE, SIDE)) -> Array:
    b, a = factors(np.random.default_rng(9), shape, rank, rms)
    return b @ a


def wide(values: Array) -> Array:
    return values.astype(np.float32)


def put(values: Array, number: float) -> Array:
    changed = values.copy()
    changed[5, 7] = number
    return changed


def cast(values: Array, dtype: str) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(NUMPY[dtype])


def pairs() -> dict[str, tuple[Array, Array]]:
    """(base, tensor) of one shape each."""
    w = normal(SIDE, SIDE)
    zeros = np.zeros_like(w)
    merged = cast(wide(w) + low(4, 3 * STEP), "BF16")
    huge = w.astype(np.float64) * 2e39
    subnormal = (w.view(np.uint16) & 0x807F).view(w.dtype)
    bytes_ = np.random.default_rng(1).integers(-50, 50, (SIDE, SIDE))
    f8, f8_step = normal(SIDE, SIDE, dtype="F8_E4M3", deviation=1), np.float32(0.1)
    f16 = normal(SIDE, SIDE, dtype="F16", deviation=1e-6)
    patterns = np.random.default_rng(2).integers(0, 1 << 16, (2, SIDE, SIDE), np.uint16)
    return {
        "nan": (w, put(merged, np.nan)),
        "nan in the base": (put(w, np.nan), merged),
        "nan in both": (put(w, np.nan), put(merged, np.nan)),
        "infinite": (w, put(merged, -np.inf)),
        "infinite base": (put(w, np.inf), merged),
        "all nan": (np.full_like(w, np.nan), merged),
        "every pattern": (patterns[0].view(w.dtype), patterns[1].view(w.dtype)),
        "from zeros": (zeros, merged),
        "to zeros": (w, zeros),
        "low rank alone": (zeros, cast(low(4, 0.02), "BF16")),
        "zeros to negative zeros": (zeros, -zeros),
        "subnormal": (subnormal, subnormal[::-1].copy()),
        "subnormal, low rank": (subnormal, cast(wide(subnormal) + low(4, 1e-39), "BF16")),
        "subnormal F16": (f16, cast(wide(f16) + low(4, 1e-6), "F16")),
        "subnormal F32": (wide(w) * np.float32(1e-40), wide(w) * np.float32(1e-40) + low(4, 1e-41)),
        "overflow": (cast(huge, "BF16"), cast(huge + low(4, 3 * STEP).astype(np.float64) * 1e42, "BF16")),
        "overflow to F16": (wide(w) * np.float32(3e6), cast(wide(w) * np.float32(3e6), "F16")),
        "near the largest": (cast(huge, "BF16"), cast(huge + low(4, 1e37), "BF16")),
        "rank 1": (w, cast(wide(w) + low(1, 3 * STEP), "BF16")),
        "shifted": (w, cast(wide(w) + np.float32(3 * STEP), "BF16")),
        "small update": (w, cast(wide(w) + low(4, 0.05 * STEP), "BF16")),
        "large update": (w, cast(wide(w) + low(4, 1000 * STEP), "BF16")),
        "F32, larger than all": (wide(w), wide(w) + low(4, 50)),
        "full rank": (w, cast(wide(w) + wide(normal(SIDE, SIDE, deviation=1e-3, seed=4)), "BF16")),
        "unrelated": (w, normal(SIDE, SIDE, seed=5)),
        "negated": (w, -w),
        "doubled": (w, cast(2 * wide(w), "BF16")),
        "transposed": (w, np.ascontiguousarray(w.T)),
        "constant": (np.full_like(w, 0.5), np.full_like(w, 0.25)),
        "one row": (normal(1, 9000), cast(wide(normal(1, 9000)) * np.float32(1.01), "BF16")),
        "one column": (normal(9000, 1), cast(wide(normal(9000, 1)) * np.float32(1.01), "BF16")),
        "two rows": (normal(2, 5000), cast(wide(normal(2, 5000)) + low(1, STEP, (2, 5000)), "BF16")),
        "two columns": (normal(5000, 2), cast(wide(normal(5000, 2)) + low(1, STEP, (5000, 2)), "BF16")),
        "1-d": (normal(9000), cast(wide(normal(9000)) * np.float32(1.01), "BF16")),
        "0-d": (normal(), normal(seed=1)),
        "empty": (normal(0, 5), normal(0, 5)),
        "rows without elements": (normal(5, 0), normal(7, 0)),
        "from no rows": (normal(0, SIDE), w),
        "to no rows": (w, normal(0, SIDE)),
        "3-d": (normal(40, 30, 5), cast(wide(normal(40, 30, 5)) + low(2, STEP, (40, 150)).reshape(40, 30, 5), "BF16")),
        "other last dimension": (w, w.reshape(SIDE // 2, -1)),
        "I8": (bytes_.astype(np.int8), np.rint(bytes_ + low(4, 3)).astype(np.int8)),
        "F8": (f8, cast(wide(f8) + low(4, 1) * f8_step, "F8_E4M3")),
        "F64": (w.astype(np.float64), w.astype(np.float64) + low(4, 3 * STEP)),
        "F64 to BF16": (w.astype(np.float64) * 1.1, merged),
        "BF16 to F64": (w, wide(merged).astype(np.float64)),
        "F16 to BF16": (cast(wide(w), "F16"), merged),
        "BF16 to F16": (w, cast(wide(merged), "F16")),
        "F8 to BF16": (f8, normal(SIDE, SIDE, deviation=1)),
        "I8 to BF16": (bytes_.astype(np.int8), w),
    }


PAIRS = pairs()


class Packed:
    """All pairs in two checkpoints, packed."""

    def __init__(self, root: Path) -> None:
        self.base, self.tuned, self.archive = root / "base", root / "tuned", root / "packed"
        write_plain(self.base, [held(name, base) for name, (base, _) in PAIRS.items()])
        write_plain(self.tuned, [held(name, tuned) for name, (_, tuned) in PAIRS.items()])
        self.report = deltafmt.pack(self.tuned, self.archive, base=self.base, jobs=1)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return Packed(tmp_path_factory.mktemp("odd"))


def elements(array: Array) -> Elements:
    dtype = DTYPES[next(name for name, kind in NUMPY.items() if kind == array.dtype)]
    return Elements(dtype, array.shape, array.reshape(-1).view(dtype.bits))


def plain_bytes(base: Array, tuned: Array) -> float:
    """What is stored without any computed prediction."""
    wanted, like = elements(tuned), elements(base)
    usable = base.shape == tuned.shape and tuned.size > 0 and predicts(like.dtype, wanted.dtype)
    references = [Referred(Ref("w", "base"), like.dtype, like.bits)] if usable else []
    return min(map(Coding.estimate, candidates(wanted, references)))


def test_every_bit_comes_back(packed: Packed, tmp_path: Path) -> None:
    deltafmt.unpack(packed.archive, tmp_path / "out", base=packed.base)
    assert tree(tmp_path / "out") == tree(packed.tuned)
    verified = deltafmt.verify(packed.archive, base=packed.base, against=packed.tuned)
    assert verified.equal, verified.differences


@pytest.mark.parametrize("name", PAIRS)
def test_no_more_is_stored_than_without(packed: Packed, name: str) -> None:
    assert packed.report.tensors[name].stored_bytes <= plain_bytes(*PAIRS[name])


@pytest.mark.parametrize("name", PAIRS)
def test_parts_are_those_of_the_original(packed: Packed, name: str) -> None:
    tuned = PAIRS[name][1]
    with deltafmt.open(packed.archive, base=packed.base) as archive:
        assert archive.get_tensor(name).tobytes() == tuned.tobytes()
        if tuned.ndim:
            lazy = archive.get_slice(name)
            for rows in (np.s_[3:5], np.s_[-2:], np.s_[::-3]):
                assert lazy[rows].tobytes() == tuned[rows].tobytes()


@pytest.mark.parametrize(
    ("name", "rank"),
    [("low rank alone", 4), ("rank 1", 1), ("shifted", 1), ("large update", 4), ("3-d", 2)],
)
def test_what_is_odd_but_low_rank_is_found(packed: Packed, name: str, rank: int) -> None:
    assert packed.report.tensors[name].rank == rank


@pytest.mark.parametrize("name", ["full rank", "unrelated", "every pattern", "transposed", "1-d", "I8"])
def test_what_is_not_has_no_rank(packed: Packed, name: str) -> None:
    assert packed.report.tensors[name].rank is None


def archive_bytes(root: Path, base: Array, tuned: Array) -> int:
    for folder, array in (("base", base), ("tuned", tuned)):
        write_plain(root / folder, [held(f"model.layers.{place}.weight", array) for place, array in enumerate(array)])
    return deltafmt.pack(root / "tuned", root / "packed", base=root / "base", dry_run=True).stored_bytes


@pytest.mark.parametrize("side", [64, 80, 96, 128])
@pytest.mark.parametrize("ulps", [0.5, 1])
def test_small_merges_never_make_the_archive_larger(tmp_path: Path, side: int, ulps: float) -> None:
    """Manifest and headers included: entries of more arrays take hundreds of bytes. The same pairs, one NaN in each of
    the bases, cannot have a prediction computed."""
    base = np.stack([normal(side, side, seed=seed) for seed in range(4)])
    tuned = cast(wide(base) + low(8, ulps * STEP, (side, side)), "BF16")
    found = archive_bytes(tmp_path / "found", base, tuned)
    base[:, 0, 0] = np.nan
    spoilt = archive_bytes(tmp_path / "spoilt", base, tuned)
    assert found <= spoilt + 4 * 16  # a NaN and its residual, in bytes


def test_parts_that_are_sampled_do_not_mislead(tmp_path: Path) -> None:
    """Sizes of large tensors are estimated from the second and the fourth quarter."""
    base = normal(1024, 1024)
    for name, touched in {"others": [0, 2], "these": [1, 3]}.items():
        tuned = base.copy()
        for quarter in touched:
            rows = slice(256 * quarter, 256 * (quarter + 1))
            tuned[rows] = cast(wide(base[rows]) * np.float32(1.01), "BF16")
        report = comes_back(tmp_path / name, {"w": base}, {"w": tuned})
        # Half of the rows are as they were; the others within two last places of it: at most two bits a weight.
        assert report.tensors["w"].stored_bytes <= 2 * base.size / 8 / 2 + 16384


def comes_back(root: Path, base: dict[str, Array], tuned: dict[str, Array]) -> deltafmt.PackReport:
    write_plain(root / "base", [held(name, array) for name, array in base.items()])
    write_plain(root / "tuned", [held(name, array) for name, array in tuned.items()])
    report = deltafmt.pack(root / "tuned", root / "packed", base=root / "base")
    deltafmt.unpack(root / "packed", root / "out", base=root / "base")
    assert tree(root / "out") == tree(root / "tuned")
    return report


# --- Anything -------------------------------------------------------------------------------------------------------

DTYPE = st.sampled_from(["BF16", "F16", "F32"])
EDGES = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-45, 3e38, 65504, 1.0], np.float32)


@settings(max_examples=25, deadline=None)
@given(
    DTYPE,
    DTYPE,
    st.sampled_from([(64, 70), (1, 5000), (4100, 1), (20, 15, 17), (5000,), (90, 50)]),
    st.floats(-45, 38),  # decimal exponent of the weights
    st.floats(-8, 8),  # of the update, relative to them
    st.integers(0, 3),  # rank
    st.booleans(),  # rows scaled
    st.integers(0, 3),  # edges in the base, and as many in the tensor
    st.integers(-1, 2),  # rows more
    st.integers(0, 2**32),
)
def test_any_pair_comes_back(
    like: str,
    dtype: str,
    shape: tuple[int, ...],
    size: float,
    change: float,
    rank: int,
    scaled: bool,
    edges: int,
    more: int,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        base = cast(random.standard_normal(shape) * 10.0**size, like)
        rows, columns = shape[0], int(np.prod(shape[1:]))
        update = random.standard_normal((rows, rank)) @ random.standard_normal((rank, columns))
        factor = 1 + 10.0**change * random.standard_normal(rows) * scaled
        changed = base.astype(np.float64).reshape(rows, columns) * factor[:, None] + update * 10.0 ** (size + change)
        tuned = cast(changed.reshape(shape), dtype)
        for array in (base, tuned):
            array.reshape(-1)[random.integers(0, array.size, edges)] = cast(random.choice(EDGES, edges), "F32").astype(
                array.dtype
            )
    tuned = np.concatenate([tuned, tuned[:more]]) if more >= 0 else tuned[:more]
    with tempfile.TemporaryDirectory() as folder:
        comes_back(Path(folder), {"w": base}, {"w": tuned})


@pytest.mark.parametrize("count", [2, 3])
def test_mixtures_of_bases_with_odd_values(tmp_path: Path, count: int) -> None:
    """Equal bases, zeros, infinities, and bases of several dtypes: nothing is divided by zero."""
    w = wide(normal(80, 80))
    bases = {
        "zeros": [np.zeros((80, 80), np.float32)] * 3,
        "equal": [w, w, w],
        "infinite": [put(w, np.inf), w + 1, w + 2],
        "opposite": [w, -w, w],
        "dtypes": [cast(w, "BF16"), wide(normal(80, 80, seed=1)), cast(wide(normal(80, 80, seed=2)), "F16")],
        "huge": [w * np.float32(3e38), wide(normal(80, 80, seed=1)) * np.float32(3e38), w],
    }
    for place in range(count):
        # Bases must differ: one number tells them apart.
        own = held("own", np.array([place], np.int64))
        write_plain(tmp_path / f"{place}", [own, *(held(name, arrays[place]) for name, arrays in bases.items())])
    with np.errstate(all="ignore"):
        mixed = {
            name: cast(np.mean([array.astype(np.float64) for array in arrays[:count]], axis=0), "BF16")
            for name, arrays in bases.items()
        }
    write_plain(tmp_path / "mixed", [held(name, array) for name, array in mixed.items()])
    origins = [tmp_path / f"{place}" for place in range(count)]
    deltafmt.pack(tmp_path / "mixed", tmp_path / "packed", base=origins)
    deltafmt.unpack(tmp_path / "packed", tmp_path / "out", base=origins)
    assert tree(tmp_path / "out") == tree(tmp_path / "mixed")


def test_dtypes_that_have_no_arithmetic(tmp_path: Path) -> None:
    """Every dtype of the format, as base and as tensor; whichever they are, they come back."""
    random = np.random.default_rng(0)
    widths = {"C64": 8, "BOOL": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U64": 8, "I16": 2, "BF16": 2, "F64": 8}
    base = {
        name: Tensor(name, (70, 70), random.integers(0, 2, 4900 * width, np.uint8).tobytes())
        for name, width in widths.items()
    }
    tuned = {name: each._replace(data=bytes(byte ^ 1 for byte in each.data)) for name, each in base.items()}
    swapped = dict(zip(base, reversed(tuned.values()), strict=True))
    write_checkpoint(tmp_path / "base", base)
    for name, tensors in {"tuned": tuned, "swapped": swapped}.items():
        write_checkpoint(tmp_path / name, tensors)
        deltafmt.pack(tmp_path / name, tmp_path / f"{name} packed", base=tmp_path / "base")
        deltafmt.unpack(tmp_path / f"{name} packed", tmp_path / f"{name} out", base=tmp_path / "base")
        assert tree(tmp_path / f"{name} out") == tree(tmp_path / name)
