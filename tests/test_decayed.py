"""`decayed`: what weight decay leaves of weights without a gradient, as the specification and torch have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import deltafmt
from deltafmt.dtypes import DTYPES
from deltafmt.methods.decay import decay_table, may_have_decayed
from deltafmt.operators import Decayed, Patch, Stored
from hostile import manifest
from in_memory import Array, every_way, rebuilder
from plain_checkpoint import held, write_checkpoint

FORMATS = {"F32": (32, 23), "F16": (16, 10), "BF16": (16, 7)}
"""Width and mantissa bits."""


def moved(bits: int, table: list[list[int]], width: int, mantissa_bits: int) -> int:
    """spec/operators/decayed.md, word by word."""
    sign, u = bits >> (width - 1), bits % 2 ** (width - 1)
    f, e = u % 2**mantissa_bits, u >> mantissa_bits
    reached = [i for i in range(len(table[0])) if sum(table[0][: i + 1]) <= f]
    if e == 0 or e == 2 ** (width - 1 - mantissa_bits) - 1 or not reached:
        return bits
    step: int = sum(table[1][: reached[-1] + 1]) % 2**32
    value: int = (u - step) % (1 << (width - 1)) + (sign << (width - 1))
    return value


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[list[int]], list[int]]:
    """A dtype, a table, and bit patterns: some of them close to where steps change."""
    dtype = draw(st.sampled_from(sorted(FORMATS)))
    width, mantissa_bits = FORMATS[dtype]
    count = draw(st.integers(1, 9))
    gap = st.one_of(st.integers(0, 2**mantissa_bits // count + 1), st.integers(0, 3), st.integers(0, 2**32 - 1))
    step = st.one_of(st.integers(0, 5), st.integers(2**32 - 3, 2**32 - 1), st.integers(0, 2**32 - 1))
    table = [draw(st.lists(each, min_size=count, max_size=count)) for each in (gap, step)]
    near = [sum(table[0][: i + 1]) + offset for i in range(count) for offset in (-1, 0, 1)]
    exponents = st.integers(0, 2 ** (width - mantissa_bits) - 1)  # the sign with them
    mantissas = st.one_of(st.integers(0, 2**mantissa_bits - 1), st.sampled_from([f % 2**mantissa_bits for f in near]))
    elements = draw(st.lists(st.tuples(exponents, mantissas), min_size=count, max_size=60))
    return dtype, table, [(e << mantissa_bits) + f for e, f in elements]


@settings(max_examples=300, deadline=None)
@given(case=cases(), cuts=st.tuples(st.integers(0, 60), st.integers(0, 60)))
@example(("F32", [[0], [1]], [0x3F800000, 0xBF800000, 0, 1 << 31, 0x00800000, 0x7F800000, 0x7FC00001]), (1, 3))
def test_every_way_does_what_the_specification_says(
    case: tuple[str, list[list[int]], list[int]], cuts: tuple[int, int]
) -> None:
    dtype, table, elements = case
    expected = [moved(bits, table, *FORMATS[dtype]) for bits in elements]
    x: Array = np.array(elements, np.uint64).astype(DTYPES[dtype].bits).view(DTYPES[dtype].values)
    subject = rebuilder(
        Decayed(Stored("x"), Stored("table")),
        {"x": (dtype, x), "table": ("U32", np.array(table, np.uint32))},
        dtype,
        x.shape,
    )
    assert every_way(subject, cuts).tolist() == expected


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_table_may_have_a_step_for_every_mantissa(dtype: str) -> None:
    width, mantissa_bits = FORMATS[dtype]
    random = np.random.default_rng(0)
    table = np.stack([np.arange(1 << mantissa_bits) > 0, random.integers(0, 9, 1 << mantissa_bits)]).astype(np.uint32)
    x = np.arange(1 << 16, dtype=np.uint16)
    steps = np.cumsum(table[1])
    expected = [
        int(bits)
        if (bits >> mantissa_bits) % (1 << (width - 1 - mantissa_bits)) in (0, (1 << (width - 1 - mantissa_bits)) - 1)
        else ((int(bits) & 0x7FFF) - int(steps[bits % (1 << mantissa_bits)])) % (1 << 15) | (int(bits) & 0x8000)
        for bits in x
    ]
    arrays: dict[str, tuple[str, Array]] = {
        "x": (dtype, x.view(DTYPES[dtype].values)),
        "table": ("U32", table),
    }
    found = every_way(rebuilder(Decayed(Stored("x"), Stored("table")), arrays, dtype, x.shape), (7, 70, 700))
    assert found.tolist() == expected


# --- What torch.optim.AdamW leaves -----------------------------------------------------------------------------------

TOKENS, WIDTH = 3000, 96
EMBEDDING = "embeddings.word_embeddings.weight"


def trained(start: torch.Tensor, used: int, steps: int, rate: float, schedule: bool = True) -> torch.Tensor:
    """A word embedding after training with AdamW and a warm-up; only the first `used` tokens have a gradient."""
    weight = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.01)
    schedules = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, (steps - step) / steps) if schedule else 1.0
    )
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        gradient = torch.zeros_like(weight)
        gradient[:used] = torch.randn(used, WIDTH, generator=random)
        weight.grad = gradient
        optimizer.step()
        schedules.step()
    return weight.detach()


@pytest.fixture(scope="module")
def start() -> torch.Tensor:
    weight = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[5] = 0  # padding
    weight[-1, :4] = torch.tensor([1e-39, -1e-42, 0.0, -0.0])
    return weight


def packed(root: Path, before: Array, after: Array) -> tuple[deltafmt.PackReport, Any]:
    for name, array in (("base", before), ("tuned", after)):
        write_checkpoint(root / name, [held(EMBEDDING, array)])
    report = deltafmt.pack(root / "tuned", root / "packed", base=root / "base")
    deltafmt.unpack(root / "packed", root / "out", base=root / "base")
    assert (root / "out/model.safetensors").read_bytes() == (root / "tuned/model.safetensors").read_bytes()
    return report, manifest(root / "packed")["tensors"][EMBEDDING]["recipe"]


def holds_decay(recipe: Any) -> bool:
    return bool(recipe["op"] == "patch" and recipe["prediction"]["op"] == "decayed")


@pytest.mark.parametrize(("steps", "rate"), [(400, 2e-5), (60, 2e-4), (3, 5e-5), (1, 2e-3)])
def test_rows_without_a_gradient_cost_nothing(tmp_path: Path, start: torch.Tensor, steps: int, rate: float) -> None:
    """Of AdamW in float32: 1.2 MB of 3,000 tokens, of which 150 were used."""
    used = 150
    report, recipe = packed(tmp_path, start.numpy(), trained(start, used, steps, rate).numpy())
    assert holds_decay(recipe)
    entry = report.tensors[EMBEDDING]
    assert entry.method == "patch-decayed"
    table = manifest(tmp_path / "packed")["arrays"][recipe["prediction"]["table"]["array"]]["shape"]
    most = 4 * used * WIDTH + 8 * table[1] + 0.05 * (TOKENS - used) * WIDTH / 8
    assert entry.stored_bytes <= most + 512


def test_parts_of_it_are_read_alike(tmp_path: Path, start: torch.Tensor) -> None:
    after = trained(start, 150, 100, 2e-5).numpy()
    _, recipe = packed(tmp_path, start.numpy(), after)
    assert holds_decay(recipe)
    with deltafmt.open(tmp_path / "packed", base=tmp_path / "base") as archive:
        part = archive.get_slice(EMBEDDING)
        for where in (np.s_[140:160], np.s_[:, 7:9], np.s_[2990:, 90:], np.s_[[5, 2999, 0]]):
            assert part[where].tobytes() == after[where].tobytes()


def test_growth_is_decay_backwards(tmp_path: Path, start: torch.Tensor) -> None:
    """The original, packed against what was trained from it."""
    after = trained(start, 150, 100, 2e-5).numpy()
    report, recipe = packed(tmp_path, after, start.numpy())
    assert holds_decay(recipe)
    assert report.tensors[EMBEDDING].stored_bytes <= 6 * 150 * WIDTH


def test_added_tokens_beside_decay(tmp_path: Path, start: torch.Tensor) -> None:
    after = trained(start, 150, 100, 2e-5)
    grown = torch.cat([after, torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(2))])
    report, recipe = packed(tmp_path, start.numpy(), grown.numpy())
    assert recipe["prediction"]["x"]["op"] == "rows"
    assert report.tensors[EMBEDDING].stored_bytes <= 6 * 190 * WIDTH


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(1, -1, id="negated"),
        pytest.param(1e-38, 0.5e-38, id="subnormal"),
        pytest.param(1, 0, id="zero"),
        pytest.param(1e38, 3e40, id="infinite"),
    ],
)
def test_rows_that_decay_cannot_make_are_stored(
    tmp_path: Path, start: torch.Tensor, before: float, after: float
) -> None:
    with np.errstate(over="ignore"):
        packed(tmp_path, start.numpy() * np.float32(before), (start.numpy() * np.float64(after)).astype(np.float32))


def test_other_rows_may_have_changed_otherwise(tmp_path: Path, start: torch.Tensor) -> None:
    """A tenth of the rows decayed; all others are multiples of what they were: a number for each says it all."""
    numbers = 1 + 1e-3 * torch.randn(TOKENS, 1, generator=torch.Generator().manual_seed(3))
    after = start * numbers
    after[::10] = trained(start, 0, 100, 2e-5)[::10]
    report, recipe = packed(tmp_path, start.numpy(), after.numpy())
    assert recipe["prediction"]["op"] == "scaled"
    assert report.tensors[EMBEDDING].stored_bytes <= 9 * TOKENS + 0.2 * 4 * TOKENS * WIDTH


def test_training_of_all_weights_is_no_decay(tmp_path: Path, start: torch.Tensor) -> None:
    """With weight decay too: it is a small part of what changed."""
    after = trained(start, TOKENS, 100, 2e-5)
    assert not may_have_decayed(start.numpy(), after.numpy())
    _, recipe = packed(tmp_path, start.numpy(), after.numpy())
    assert recipe["op"] == "patch"
    assert recipe["prediction"] == {"op": "ref", "base": "base", "tensor": EMBEDDING}


def test_steps_are_read_off_in_spite_of_others() -> None:
    """Of every hundred weights one moved by chance, some of these two alike in a row: the table is the true one."""
    random = np.random.default_rng(0)
    bounds, steps = np.array([0, 1 << 20, 3 << 20, 6 << 20]), np.array([998, 1218, 1100, 1357])
    before = np.sort(random.integers(1 << 23, 2 << 23, 1 << 18).astype(np.uint32) | np.uint32(0x3D000000))
    mantissas = before & 0x7FFFFF
    moves = steps[np.searchsorted(bounds, mantissas, side="right") - 1]
    chance = random.random(moves.size) < 0.01
    moves[chance] += random.integers(-3, 4, int(chance.sum()))
    rows = (-1, 64)
    table = decay_table(before.reshape(rows), (before - moves.astype(np.uint32)).reshape(rows), np.arange(1 << 12))
    assert table is not None
    assert np.cumsum(table[1], dtype=np.uint32).tolist() == steps.tolist()
    assert np.abs(np.cumsum(table[0]) - bounds).max() < 200  # of 2^23, as close as weights are


def test_rows_times_numbers_of_their_own_are_no_decay(tmp_path: Path, start: torch.Tensor) -> None:
    numbers = 1 + 1e-3 * torch.randn(TOKENS, 1, generator=torch.Generator().manual_seed(3))
    report, recipe = packed(tmp_path, start.numpy(), (start * numbers).numpy())
    assert recipe["prediction"]["op"] == "scaled"
    assert report.tensors[EMBEDDING].stored_bytes <= 9 * TOKENS + 0.05 * TOKENS * WIDTH


def test_a_prediction_by_decay_is_what_is_read(start: torch.Tensor) -> None:
    """The recipe in memory against the optimizer's own result."""
    after = trained(start, 0, 50, 2e-5).numpy().view(np.uint32)
    before = start.numpy().view(np.uint32)
    changed = np.flatnonzero((before != after).any(axis=1))
    table = decay_table(before, after, changed)
    assert table is not None
    subject = rebuilder(
        Patch(Decayed(Stored("x"), Stored("table")), Stored("zero")),
        {
            "x": ("F32", before.view(np.float32)),
            "table": ("U32", table),
            "zero": ("U32", np.zeros(before.shape, np.uint32)),
        },
        "F32",
        before.shape,
    )
    assert np.mean(every_way(subject).reshape(before.shape) != after) < 1e-3
