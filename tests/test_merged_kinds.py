"""What issues from merging, kind by kind: the recipe that is found, what it takes, and that every bit comes back.

Bounds of size are derived from what was done (rank, rows, noise), not from what the package makes of it.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

import deltafmt
from command_line import Run, object_in
from deltafmt import IntegrityError, WrongBaseError
from hostile import Json, manifest, read_shard, tree
from merges import factors, ulp
from plain_checkpoint import NUMPY, held, write_checkpoint

Array = npt.NDArray[Any]

DEVIATION = 0.02  # of all weights here
OUT, IN = 384, 256
DIRECTORY = 512  # bytes: more than headers of frames, code tables and directories of one tensor here
MISSES = 0.30  # bits a weight, the bar of the project


class Kind(NamedTuple):
    base: Array
    tuned: Array
    recipe: str
    bound: float  # bytes of all arrays of the tensor


def normal(*shape: int, dtype: str = "BF16", deviation: float = DEVIATION, seed: int = 0) -> Array:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(deviation)
    return values.astype(NUMPY[dtype])


def wide(values: Array) -> Array:
    return values.astype(np.float32)


def update(shape: tuple[int, int], rank: int, ulps: float, dtype: str = "BF16", seed: int = 1) -> Array:
    """A low-rank update, fp32, of which the root mean square is `ulps` last places of a typical weight."""
    b, a = factors(np.random.default_rng(seed), shape, rank, ulps * ulp(DEVIATION, dtype))
    return b @ a


def misses(size: int) -> float:
    return MISSES * size / 8


def factored(shape: tuple[int, int], rank: int, width: int = 2) -> float:
    """Bytes of misses and factors, `width` bytes to an entry."""
    return misses(math.prod(shape)) + width * rank * sum(shape) + DIRECTORY


def noise_bytes(tuned: Array, deviation: float) -> float:
    """Entropy of normal noise of `deviation`, rounded to the last places of each of `tuned`, exponents known."""
    mantissa = 7 if tuned.dtype == ml_dtypes.bfloat16 else 23
    exponents, counts = np.unique(np.frexp(wide(tuned))[1], return_counts=True)
    bits = 0.0
    for exponent, count in zip(exponents.tolist(), counts.tolist(), strict=True):
        sigma = deviation / math.ldexp(1, exponent - 1 - mantissa)  # in last places
        if sigma > 4:
            bits += count * math.log2(sigma * math.sqrt(2 * math.pi * math.e))
            continue
        edges = [math.erf((place + 0.5) / (sigma * math.sqrt(2))) for place in range(40)]
        shares = [edges[0]] + 2 * [(high - low) / 2 for low, high in pairwise(edges)]
        bits -= count * sum(share * math.log2(share) for share in shares if share > 0)
    return bits / 8


def lora(rank: int, ulps: float, dtype: str = "BF16", shape: tuple[int, int] = (OUT, IN)) -> Kind:
    base = normal(*shape, dtype=dtype)
    merged = (wide(base) + update(shape, rank, ulps, dtype)).astype(base.dtype)
    return Kind(base, merged, "patch(sum(ref, lowrank), residual)", factored(shape, rank))


def lora_of_convolution(*kernel: int) -> Kind:
    """A LoRA of a convolution is one of the matrix with all but the first dimension in one (PEFT)."""
    base = normal(96, 64, *kernel)
    shape = (96, 64 * math.prod(kernel))
    merged = (wide(base) + update(shape, 4, 3).reshape(base.shape)).astype(base.dtype)
    return Kind(base, merged, "patch(sum(ref, lowrank), residual)", factored(shape, 4))


def dora() -> Kind:
    """m (W + B A), as arXiv 2402.09353 merges: a magnitude for each row, about 1."""
    base = normal(OUT, IN)
    magnitudes = 1 + 0.02 * normal(OUT, 1, dtype="F32", deviation=1, seed=3)
    merged = (magnitudes * (wide(base) + update((OUT, IN), 8, 3))).astype(base.dtype)
    bound = factored((OUT, IN), 8) + 4 * OUT + misses(base.size)  # the magnitudes are only estimated
    return Kind(base, merged, "patch(sum(scaled(ref, scale), lowrank), residual)", bound)


def dora_in_fp32(change: float) -> Kind:
    """m / |W + B A| (W + B A), as PEFT computes it: where m did not change, the norms are divided by all the same."""
    base = normal(OUT, IN, dtype="F32")
    tuned = base + update((OUT, IN), 8, 3)
    magnitudes = np.linalg.norm(base, axis=1, keepdims=True) * (1 + change * normal(OUT, 1, dtype="F32", seed=3))
    merged = (magnitudes / np.linalg.norm(tuned, axis=1, keepdims=True)) * tuned
    rounded_twice = 2.5 * base.size / 8  # each time by up to half a last place, of one or two places at hand
    bound = 2 * 4 * 8 * (OUT + IN) + 8 * OUT + rounded_twice + DIRECTORY
    return Kind(base, merged, "patch(sum(scaled(ref, scale), lowrank), residual)", bound)


def two_loras() -> Kind:
    base = normal(OUT, IN)
    merged = (wide(base) + update((OUT, IN), 8, 2) + update((OUT, IN), 4, 5, seed=2)).astype(base.dtype)
    return Kind(base, merged, "patch(sum(ref, lowrank), residual)", factored((OUT, IN), 12))


def safely_merged_lora() -> Kind:
    """The update is rounded before it is added, as PEFT's `safe_merge` does."""
    base = normal(OUT, IN)
    rounded = wide(update((OUT, IN), 8, 3).astype(base.dtype))
    return lora(8, 3)._replace(tuned=(wide(base) + rounded).astype(base.dtype))


def decayed_rows() -> Kind:
    base = normal(OUT, IN)
    changed = wide(base)
    changed[100:] *= np.float32(0.998)
    return Kind(base, changed.astype(base.dtype), "patch(scaled(ref, scale), residual)", 4 * OUT + DIRECTORY)


def added_rows() -> Kind:
    base = normal(OUT, IN)
    new = normal(8, IN, seed=4)
    return Kind(base, np.concatenate([base, new]), "patch(rows(ref), residual)", new.nbytes + DIRECTORY)


def removed_rows() -> Kind:
    base = normal(OUT, IN)
    return Kind(base, base[:300].copy(), "patch(rows(ref), residual)", DIRECTORY)


def widened(deviation: float) -> Kind:
    """An fp32 fine-tune of a bf16 base."""
    base = normal(OUT, IN)
    tuned = wide(base) + normal(OUT, IN, dtype="F32", deviation=deviation, seed=5)
    return Kind(base, tuned, "patch(ref, residual)", 1.03 * noise_bytes(tuned, deviation) + DIRECTORY)


def narrowed(deviation: float) -> Kind:
    """A bf16 fine-tune of an fp32 base: the base is rounded before the patch."""
    base = normal(OUT, IN, dtype="F32")
    tuned = (base + normal(OUT, IN, dtype="F32", deviation=deviation, seed=5)).astype(ml_dtypes.bfloat16)
    # Rounded apart, they differ by the noise and by their two roundings of 1/12 of a squared last place each.
    spread = math.hypot(deviation, ulp(DEVIATION, "BF16") * math.sqrt(1 / 6))
    return Kind(base, tuned, "patch(ref, residual)", 1.03 * noise_bytes(tuned, spread) + DIRECTORY)


def lora_widened() -> Kind:
    """An fp32 merge into a bf16 base: updates are thousands of last places, so factors are finer."""
    base = normal(OUT, IN)
    merged = wide(base) + update((OUT, IN), 8, 3)
    return Kind(base, merged, "patch(sum(ref, lowrank), residual)", factored((OUT, IN), 8, width=4))


def lora_narrowed() -> Kind:
    base = normal(OUT, IN, dtype="F32")
    merged = (base + update((OUT, IN), 8, 3)).astype(ml_dtypes.bfloat16)
    return Kind(base, merged, "patch(sum(ref, lowrank), residual)", factored((OUT, IN), 8))


def lora_rounded_first(dtype: str) -> Kind:
    """The base was loaded in 16 bits, as training does, and merged then; the base that is published has more."""
    base = normal(OUT, IN, dtype=dtype, seed=9 if dtype == "F16" else 10)
    merged = (wide(base.astype(NUMPY["BF16"])) + update((OUT, IN), 8, 3)).astype(NUMPY["BF16"])
    recipe = "patch(sum(patch(ref, rounded), lowrank), residual)"
    return Kind(base, merged, recipe, factored((OUT, IN), 8) + DIRECTORY)


def fully_tuned(deviation: float, dtype: str = "BF16") -> Kind:
    base = normal(OUT, IN, dtype=dtype)
    tuned = (wide(base) + normal(OUT, IN, dtype="F32", deviation=deviation, seed=6)).astype(base.dtype)
    bound = 1.05 * noise_bytes(tuned, deviation) + 2 * DIRECTORY
    return Kind(base, tuned, "patch(ref, residual)", bound)


KINDS = {
    "rank 1": lora(1, 3),
    "rank 8": lora(8, 3),
    "rank 8, small": lora(8, 1),
    "rank 8, F16": lora(8, 3, "F16"),
    "rank 8, F32": lora(8, 3, "F32"),
    "rank 8, F32, large": lora(8, 1000, "F32"),
    "rank 32": lora(32, 3, shape=(576, 320)),
    "dora": dora(),
    "dora, F32": dora_in_fp32(1),
    "dora, F32, magnitudes as they were": dora_in_fp32(0),
    "two loras": two_loras(),
    "safely merged": safely_merged_lora(),
    "conv2d": lora_of_convolution(3, 3),
    "conv1d": lora_of_convolution(5),
    "decayed rows": decayed_rows(),
    "added rows": added_rows(),
    "removed rows": removed_rows(),
    "untouched": Kind(normal(OUT, IN, seed=7), normal(OUT, IN, seed=7), "ref", 0),
    "widened": widened(1e-5),
    "widened only": Kind(normal(OUT, IN, seed=8), wide(normal(OUT, IN, seed=8)), "patch(ref, residual)", DIRECTORY),
    "narrowed": narrowed(1e-4),
    "lora, widened": lora_widened(),
    "lora, narrowed": lora_narrowed(),
    "lora, rounded first": lora_rounded_first("F32"),
    "lora, rounded from F16": lora_rounded_first("F16"),
    "full, small": fully_tuned(1e-4),
    "full, large": fully_tuned(1e-3),
    "full, F32": fully_tuned(1e-5, "F32"),
}
SLICES: list[Any] = [
    np.s_[0], np.s_[-1], np.s_[17:19], np.s_[5:6, 3], np.s_[::97], np.s_[3:3], np.s_[40:20:-7, 1:9], np.s_[..., -1],
]  # fmt: skip


class Room(NamedTuple):
    base: Path
    tuned: Path
    packed: Path
    report: deltafmt.PackReport


def write(folder: Path, tensors: dict[str, Array]) -> Path:
    write_checkpoint(folder, [held(name, array) for name, array in tensors.items()])
    (folder / "config.json").write_text('{"model_type": "llama"}\n')
    return folder


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    """All kinds in one checkpoint, packed once. Tests leave it as it is."""
    root = tmp_path_factory.mktemp("kinds")
    base = write(root / "base", {name: kind.base for name, kind in KINDS.items()})
    tuned = write(root / "tuned", {name: kind.tuned for name, kind in KINDS.items()})
    return Room(base, tuned, root / "packed", deltafmt.pack(tuned, root / "packed", base=base, jobs=1))


def shape_of(node: Json) -> str:
    """A recipe without its numbers and names."""
    match node["op"]:
        case "stored":
            return str(node["array"]).partition("#")[2]
        case "patch":
            parts = [node["prediction"], node["residual"]]
        case "sum":
            parts = node["terms"]
        case "scaled":
            parts = [node["x"], node["scale"]]
        case "rows":
            parts = [node["x"]]
        case plain:
            return str(plain)
    return f"{node['op']}({', '.join(map(shape_of, parts))})"


def sums(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in tree(folder).items()}


def test_every_file_comes_back(room: Room, tmp_path: Path) -> None:
    assert room.report.exact
    deltafmt.unpack(room.packed, tmp_path / "out", base=room.base)
    assert sums(tmp_path / "out") == sums(room.tuned)
    verified = deltafmt.verify(room.packed, base=room.base, against=room.tuned)
    assert verified.equal and verified.base_checked


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_says_what_happened(room: Room, kind: str) -> None:
    recipe = manifest(room.packed)["tensors"][kind]["recipe"]
    assert shape_of(recipe) == KINDS[kind].recipe


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_what_that_is_worth(room: Room, kind: str) -> None:
    header, _ = read_shard(room.packed)
    entries = (entry for name, entry in header.items() if name.partition("#")[0] == kind)
    stored = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries)
    assert stored <= KINDS[kind].bound
    assert stored <= room.report.tensors[kind].stored_bytes  # which also counts the chunk table


@pytest.mark.parametrize(("kind", "rank"), [("rank 1", 1), ("rank 8", 8), ("two loras", 12), ("rank 32", 32)])
def test_the_rank_is_found(room: Room, kind: str, rank: int) -> None:
    arrays = manifest(room.packed)["arrays"]
    assert arrays[f"{kind}#lora_a"]["shape"] == [rank, KINDS[kind].tuned.shape[1]]
    assert arrays[f"{kind}#lora_b"]["shape"] == [rank, KINDS[kind].tuned.shape[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_those_of_the_original(room: Room, kind: str) -> None:
    tuned = KINDS[kind].tuned
    with deltafmt.open(room.packed, base=room.base) as archive:
        lazy = archive.get_slice(kind)
        for index in SLICES:
            if isinstance(index, tuple) and len(index) > tuned.ndim:
                continue
            expected = tuned[index]
            found = lazy[index]
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert found.tobytes() == expected.tobytes(), index


def test_the_command_line_tells_ranks_and_verifies(room: Room, run: Run) -> None:
    code, out, _ = run("inspect", str(room.packed), "--json")
    assert code == 0
    ranks = object_in(out)["ranks"]
    assert ranks == {name: ranks[name] for name, kind in KINDS.items() if "lowrank" in kind.recipe}
    assert (ranks["rank 8"], ranks["rank 32"], ranks["rank 1"]) == (8, 32, 1)
    assert run("unpack", str(room.packed), "out", "--base", str(room.base))[0] == 0
    assert sums(Path("out")) == sums(room.tuned)
    assert run("verify", str(room.packed), "--base", str(room.base), "--against", str(room.tuned))[0] == 0
    assert run("verify", str(room.packed), "--base", str(room.tuned))[0] == 6


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import hashlib, deltafmt
with deltafmt.open(sys.argv[1], base=sys.argv[2]) as archive:
    for name in archive.keys():
        print(hashlib.sha256(archive.get_tensor(name).tobytes()).hexdigest(), name)
"""


def test_torch_is_not_needed(room: Room) -> None:
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH, str(room.packed), str(room.base)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = {name: digest for digest, _, name in (line.partition(" ") for line in done.stdout.splitlines())}
    assert found == {name: hashlib.sha256(kind.tuned.tobytes()).hexdigest() for name, kind in KINDS.items()}


# --- Damage and other models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", ["rank 8#lora_a", "rank 8#lora_b", "rank 8#residual", "dora#scale", "dora#residual"])
def test_a_flipped_bit_is_found(room: Room, tmp_path: Path, array: str) -> None:
    archive = Path(shutil.copytree(room.packed, tmp_path / "archive"))
    shard = archive / manifest(archive)["shards"][0]["name"]
    header, data = read_shard(archive)
    begin, end = header[array]["data_offsets"]
    content = bytearray(shard.read_bytes())
    content[len(content) - len(data) + (begin + end) // 2] ^= 4
    shard.write_bytes(content)
    readers: list[Callable[[], object]] = [
        lambda: deltafmt.verify(archive, base=room.base),
        lambda: deltafmt.verify(archive),
        lambda: deltafmt.unpack(archive, tmp_path / "out", base=room.base),
        lambda: tensor_of(archive, room.base, array.partition("#")[0]),
    ]
    for reader in readers:
        with pytest.raises(IntegrityError):
            reader()
    assert not (tmp_path / "out").exists()


def tensor_of(archive: Path, base: Path, name: str) -> Array:
    with deltafmt.open(archive, base=base) as opened:
        tensor: Array = opened.get_tensor(name)
        return tensor


def test_another_base_is_refused(room: Room, tmp_path: Path) -> None:
    """One bit of one tensor is enough."""
    changed = {name: kind.base for name, kind in KINDS.items()}
    changed["rank 8"] = changed["rank 8"].copy()
    changed["rank 8"].view(np.uint16)[7, 7] ^= 1
    other = write(tmp_path / "other", changed)
    with pytest.raises(WrongBaseError):
        deltafmt.unpack(room.packed, tmp_path / "out", base=other)
    with pytest.raises(WrongBaseError):
        deltafmt.verify(room.packed, base=other)
    with pytest.raises(WrongBaseError):
        tensor_of(room.packed, other, "rank 8")
    assert not (tmp_path / "out").exists()


# --- The same again -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_threads_and_repetition_change_nothing(room: Room, tmp_path: Path) -> None:
    deltafmt.pack(room.tuned, tmp_path / "again", base=room.base, jobs=2)
    assert sums(tmp_path / "again") == sums(room.packed)


def test_a_packed_base_serves_as_the_base(room: Room, tmp_path: Path) -> None:
    deltafmt.pack(room.base, tmp_path / "base")
    deltafmt.unpack(room.packed, tmp_path / "out", base=tmp_path / "base")
    assert sums(tmp_path / "out") == sums(room.tuned)
