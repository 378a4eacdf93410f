"""Low rank end to end: packed, opened again, and measured against the original with plain numpy."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

import synthetic
from deltafmt.errors import RefusedError, UsageError
from deltafmt.methods.lowrank import Request
from deltafmt.operators import Lowrank, Ref, Stored, Sum
from deltafmt.pack import pack
from deltafmt.reader import Archive
from deltafmt.report import PackReport
from deltafmt.sources import open_archive
from deltafmt.unpack import unpack

Array = npt.NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)


def write(folder: Path, tensors: Mapping[str, Array]) -> Path:
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def unpacked(archive: Path, base: Path | None = None) -> dict[str, Array]:
    """Every tensor of an archive, in its own dtype and shape."""
    with open_archive(archive, base) as opened:
        return {
            name: opened.read_whole(name).view(info.dtype.values).reshape(info.shape)
            for name, info in opened.tensors.items()
        }


def error(rebuilt: Array, original: Array) -> float:
    wide = original.astype(np.float64)
    return float(np.linalg.norm(rebuilt.astype(np.float64) - wide) / np.linalg.norm(wide))


def same_bits(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def gaussian(seed: int, *shape: int) -> Array:
    return 0.02 * np.random.default_rng(seed).standard_normal(shape)


def low_rank(seed: int, rank: int, *shape: int) -> Array:
    """A matrix, flattened beyond its first dimension, of true rank `rank`, a third as large as `gaussian`."""
    rng = np.random.default_rng(seed)
    columns = math.prod(shape[1:])
    product = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, columns))
    scaled: Array = product * (0.02 / 3 / math.sqrt(rank))
    return scaled.reshape(shape)


def decaying(seed: int, decay: float, *shape: int) -> Array:
    """A matrix whose singular values fall by the factor `decay` each."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((shape[0], min(shape))))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], min(shape))))[0]
    matrix: Array = (left * decay ** np.arange(min(shape))) @ right.T
    return matrix


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 4, "energy": 0.5}, "--rank and --energy exclude each other"),
        ({"max_error": 0.1, "target_bytes": 9}, "--max-error and --target-size exclude each other"),
        ({"rank": 0}, "rank is too small"),
        ({"energy": 0.0}, "energy"),
        ({"energy": 1.5}, "energy"),
        ({"energy": math.nan}, "energy"),
        ({"max_error": 0.0}, "error bound"),
        ({"max_error": 1.0}, "error bound"),
        ({"target_bytes": 0}, "target size"),
        ({"share": "every-second"}, "neither"),
        ({"share_parts": "norms"}, "norms"),
    ],
)
def test_senseless_requests(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Request(**arguments)


def test_how_much_has_to_be_said(tmp_path: Path) -> None:
    source = write(tmp_path / "model", {"w": gaussian(0, 32, 32).astype(BF16)})
    with pytest.raises(UsageError, match="--rank, --energy, --max-error and --target-size"):
        pack(source, tmp_path / "archive", method="lowrank")
    with pytest.raises(UsageError, match="exclude each other"):
        pack(source, tmp_path / "archive", base=source, method="lowrank", share="alternating")
    with pytest.raises(UsageError, match="none of the 1 tensors"):
        pack(source, tmp_path / "archive", rank=2, include=["*.weight"])
    assert not (tmp_path / "archive").exists()


# --- On a base ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "base_dtype", "level"),
    [
        (BF16, BF16, 2.0**-8),
        (BF16, np.dtype("f4"), 2.0**-8),
        (np.dtype("f2"), np.dtype("f2"), 2.0**-11),
        (np.dtype("f4"), np.dtype("f4"), 2.0**-20),
        (np.dtype("f8"), np.dtype("f8"), 2.0**-20),
    ],
)
def test_a_true_rank_is_found(tmp_path: Path, dtype: Any, base_dtype: Any, level: float) -> None:
    """A delta of rank r, rounded with its weight: rank r, and an error as small as the rounding."""
    ranks = {"square": 5, "tall": 9, "wide": 1, "conv": 3}
    shapes = {"square": (160, 160), "tall": (320, 96), "wide": (96, 320), "conv": (64, 16, 3, 3)}
    base = {name: gaussian(seed, *shape).astype(base_dtype) for seed, (name, shape) in enumerate(shapes.items())}
    tuned = {
        name: (base[name].astype(np.float64) + low_rank(seed, ranks[name], *shape)).astype(dtype)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    base["bias"], tuned["bias"] = gaussian(8, 96).astype(base_dtype), gaussian(9, 96).astype(dtype)
    base["same"] = gaussian(10, 64, 64).astype(base_dtype)
    tuned["same"] = base["same"].astype(dtype)
    base_dir, archive = write(tmp_path / "base", base), tmp_path / "archive"

    report = pack(write(tmp_path / "tuned", tuned), archive, base=base_dir, method="lowrank")

    found = unpacked(archive, base_dir)
    for name, rank in ranks.items():
        entry = report.tensors[name]
        assert (entry.method, entry.rank) == ("lowrank", rank)
        measured = error(found[name], tuned[name])
        assert measured < level
        assert entry.rel_error == pytest.approx(measured, rel=0.02)
        assert entry.stored_bytes < entry.logical_bytes / 4
    for name in ("bias", "same"):
        assert same_bits(found[name], tuned[name])
        assert report.tensors[name].rel_error == 0


def test_what_is_not_low_rank_stays_lossless(tmp_path: Path) -> None:
    """Without a word on how much may be lost, only rounding may be; and no rank may cost more than the weight."""
    base = {"far": gaussian(0, 128, 128).astype(BF16), "near": gaussian(1, 128, 128).astype(BF16)}
    tuned = {
        "far": (base["far"].astype(np.float64) + gaussian(2, 128, 128)).astype(BF16),
        "near": (base["near"].astype(np.float64) + gaussian(3, 128, 128) / 10).astype(BF16),
    }
    base_dir, source = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    for number, options in enumerate(({"method": "lowrank"}, {"rank": 100}, {"energy": 1.0}, {"max_error": 1e-5})):
        archive = tmp_path / f"archive{number}"
        report = pack(source, archive, base=base_dir, **options)  # type: ignore[arg-type]
        assert report.exact
        found = unpacked(archive, base_dir)
        assert all(same_bits(found[name], tuned[name]) for name in tuned)


def test_a_base_within_the_error_bound_stands_in(tmp_path: Path) -> None:
    base = {"w": gaussian(0, 128, 128).astype(BF16)}
    tuned = {"w": (base["w"].astype(np.float64) + gaussian(1, 128, 128) / 50).astype(BF16)}
    base_dir, archive = write(tmp_path / "base", base), tmp_path / "archive"
    report = pack(write(tmp_path / "tuned", tuned), archive, base=base_dir, max_error=0.05)
    with open_archive(archive, base_dir) as opened:
        assert opened.manifest.tensors["w"].recipe == Ref("w", "base")
    assert same_bits(unpacked(archive, base_dir)["w"], base["w"])
    assert report.tensors["w"].rel_error == pytest.approx(error(base["w"], tuned["w"]), rel=1e-6)


# --- How much is kept -----------------------------------------------------------------------------------------------


def stored_factors(archive: Archive, name: str) -> tuple[Array, Array]:
    """The factors of a tensor, b [r, out] and a [r, in], widened to float64."""
    recipe = archive.manifest.tensors[name].recipe
    low = recipe.terms[-1] if isinstance(recipe, Sum) else recipe
    assert isinstance(low, Lowrank) and low.scale == 1
    factors = []
    for operand in (low.b, low.a):
        assert isinstance(operand, Stored)
        array = archive.manifest.arrays[operand.array]
        bits = np.empty(array.numel, array.dtype.bits)
        archive.array_reader(operand.array)(0, array.numel, bits)
        factors.append(bits.view(array.dtype.values).reshape(array.shape).astype(np.float64))
    return factors[0], factors[1]


@pytest.mark.parametrize("dtype", [BF16, np.dtype("f2"), np.dtype("f4"), np.dtype("f8")])
def test_factors_are_the_best_and_so_is_every_prefix(tmp_path: Path, dtype: Any) -> None:
    weight = decaying(0, 0.93, 200, 120).astype(dtype)
    archive = tmp_path / "archive"
    pack(write(tmp_path / "model", {"w": weight}), archive, rank=12)
    with open_archive(archive) as opened:
        b, a = stored_factors(opened, "w")
    assert (b.shape, a.shape) == ((12, 200), (12, 120))
    sizes = np.linalg.norm(b, axis=1) * np.linalg.norm(a, axis=1)
    assert np.all(np.diff(sizes) <= 0)
    singular = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    for rank in (1, 5, 12):
        best = math.sqrt(float(np.sum(singular[rank:] ** 2)) / float(np.sum(singular**2)))
        assert error(b[:rank].T @ a[:rank], weight) <= 1.01 * best


def test_energy_takes_the_fewest_components(tmp_path: Path) -> None:
    base = {"w": gaussian(0, 160, 96).astype(np.float32)}
    tuned = {"w": (base["w"] + 0.1 * decaying(1, 0.8, 160, 96)).astype(np.float32)}
    base_dir = write(tmp_path / "base", base)
    report = pack(write(tmp_path / "tuned", tuned), tmp_path / "archive", base=base_dir, energy=0.95)
    squares = np.linalg.svd((tuned["w"] - base["w"]).astype(np.float64), compute_uv=False) ** 2
    wanted = 1 + int(np.argmax(np.cumsum(squares) >= 0.95 * squares.sum()))
    assert report.tensors["w"].rank == wanted


@pytest.mark.parametrize("dtype", [BF16, np.dtype("f2"), np.dtype("f4")])
@pytest.mark.parametrize("bound", [0.3, 0.03, 0.003])
def test_the_error_bound_holds_after_rounding(tmp_path: Path, dtype: Any, bound: float) -> None:
    """Bounds just above rounding level too, where factors and weight add to what the rank leaves out."""
    tensors = {f"w{seed}": decaying(seed, 0.75, 96 + 8 * seed, 128).astype(dtype) for seed in range(4)}
    archive = tmp_path / "archive"
    report = pack(write(tmp_path / "model", tensors), archive, max_error=bound)
    found = unpacked(archive)
    for name, weight in tensors.items():
        assert error(found[name], weight) <= bound
        singular = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
        left = np.sqrt(np.cumsum(singular[::-1] ** 2)[::-1] / np.sum(singular**2))
        least = int(np.argmax(left <= bound))
        rank = report.tensors[name].rank
        if bound > 0.003 or dtype.itemsize > 2:
            assert rank is not None and least <= rank <= least + 1
        elif rank is None:  # rounding alone comes to nearly as much
            assert same_bits(found[name], weight)


@pytest.mark.parametrize("exponent", [-30, 30])
def test_factors_fit_their_dtype_at_any_scale(tmp_path: Path, exponent: int) -> None:
    weight = (decaying(0, 0.9, 96, 128) * 10.0**exponent).astype(np.float32)
    archive = tmp_path / "archive"
    report = pack(write(tmp_path / "model", {"w": weight}), archive, rank=8)
    assert error(unpacked(archive)["w"], weight) == pytest.approx(0.9**8, rel=0.02)
    assert report.tensors["w"].rank == 8


def test_short_factors_serve_a_coarse_float32_tensor(tmp_path: Path) -> None:
    """Sixteen bits a value, as long as that costs next to no accuracy."""
    weight = decaying(0, 0.95, 128, 256).astype(np.float32)
    archive = tmp_path / "archive"
    pack(write(tmp_path / "model", {"w": weight}), archive, rank=16)
    with open_archive(archive) as opened:
        assert {opened.manifest.arrays[name].dtype.width for name in ("w#lora_a", "w#lora_b")} == {2}
    assert error(unpacked(archive)["w"], weight) <= 1.02 * 0.95**16


def test_include_and_exclude(tmp_path: Path) -> None:
    names = ("layer.0.up", "layer.0.down", "layer.1.up", "head")
    tensors = {name: gaussian(seed, 64, 96).astype(BF16) for seed, name in enumerate(names)}
    source = write(tmp_path / "model", tensors)
    report = pack(source, tmp_path / "archive", rank=4, include=["layer.*", "embed*"], exclude=["*.down"])
    assert {name for name, entry in report.tensors.items() if entry.rank} == {"layer.0.up", "layer.1.up"}
    found = unpacked(tmp_path / "archive")
    assert all(same_bits(found[name], tensors[name]) for name in ("layer.0.down", "head"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"rank": 2}, {"max_error": 0.5}, {"target_size": 60_000}, {"method": "lowrank"}])
def test_non_finite_tensors_stay_lossless(tmp_path: Path, value: float, options: dict[str, Any]) -> None:
    base = {name: gaussian(seed, 96, 96).astype(BF16) for seed, name in enumerate(("tuned bad", "base bad", "good"))}
    tuned = {name: (weight.astype(np.float64) + low_rank(3, 2, 96, 96)).astype(BF16) for name, weight in base.items()}
    tuned["tuned bad"][3, 5] = value
    base["base bad"][7, 1] = value
    base_dir, archive = write(tmp_path / "base", base), tmp_path / "archive"
    report = pack(write(tmp_path / "tuned", tuned), archive, base=base_dir, **options)
    assert report.non_finite == {"tuned bad": 1, "base bad": 1}
    found = unpacked(archive, base_dir)
    for name in ("tuned bad", "base bad"):
        assert same_bits(found[name], tuned[name])
        assert report.tensors[name].rank is None
    assert report.tensors["good"].method in ("lowrank", "base-ref", "patch", "patch-lowrank")


@pytest.mark.parametrize("options", [{"rank": 1}, {"energy": 0.5}, {"max_error": 0.5}, {"target_size": 9_000}])
def test_odd_tensors_survive(tmp_path: Path, options: dict[str, Any]) -> None:
    """Empty, zero, thin, and beyond the range of float32."""
    tensors: dict[str, Array] = {
        "empty": np.zeros((0, 64), np.float32),
        "zero": np.zeros((64, 64), np.float32),
        "row": gaussian(0, 1, 64).astype(np.float32),
        "huge": 1e300 * gaussian(1, 64, 64),
        "integers": np.arange(4096).reshape(64, 64),
        "scalar": np.array(3, np.float32),
        "matrix": decaying(2, 0.5, 64, 64),
    }
    source = write(tmp_path / "model", tensors)
    report = pack(source, tmp_path / "archive", force=True, **options)
    found = unpacked(tmp_path / "archive")
    for name, tensor in tensors.items():
        if name not in ("matrix", "row"):
            assert same_bits(found[name], tensor), name
    assert report.tensors["matrix"].rank is not None
    with pytest.raises(UsageError):
        pack(write(tmp_path / "vectors", {"v": np.zeros(9)}), tmp_path / "other", **options)


# --- A byte budget --------------------------------------------------------------------------------------------------


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Eight matrices whose spectra fall at very different speeds, and a vector; with a sidecar."""
    decays = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
    tensors = {f"layer.{i}.weight": decaying(i, decay, 256, 256).astype(BF16) for i, decay in enumerate(decays)}
    folder = write(tmp_path / "model", {**tensors, "norm.weight": gaussian(9, 256).astype(BF16)})
    (folder / "vocab.txt").write_text("word\n" * 1000)
    return folder


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def squared_error(report: PackReport) -> float:
    return math.fsum((entry.rel_error or 0) ** 2 for entry in report.tensors.values())


def test_a_budget_beats_one_rank_for_all(tmp_path: Path, uneven: Path) -> None:
    uniform = pack(uneven, tmp_path / "uniform", rank=24)
    target = size_of(tmp_path / "uniform")
    spent = pack(uneven, tmp_path / "spent", target_size=target)
    assert 0.9 * target <= size_of(tmp_path / "spent") <= target
    assert squared_error(spent) < 0.8 * squared_error(uniform)
    ranks = [spent.tensors[f"layer.{i}.weight"].rank or 0 for i in (1, 3, 5)]
    assert ranks == sorted(ranks) and ranks[0] < ranks[-1]


@pytest.mark.parametrize("share_of_lossless", [0.4, 0.6, 0.9, 1.5])
def test_every_target_is_met(tmp_path: Path, uneven: Path, share_of_lossless: float) -> None:
    pack(uneven, tmp_path / "lossless")
    target = int(size_of(tmp_path / "lossless") * share_of_lossless)
    report = pack(uneven, tmp_path / "archive", target_size=target)
    assert size_of(tmp_path / "archive") == report.stored_bytes <= target
    assert report.exact == (share_of_lossless > 1)


def test_an_impossible_target_names_the_smallest(tmp_path: Path, uneven: Path) -> None:
    with pytest.raises(RefusedError) as refusal:
        pack(uneven, tmp_path / "archive", target_size=9_000)
    assert not (tmp_path / "archive").exists()
    found = re.search(r"--target-size (\d+)", str(refusal.value))
    assert found
    smallest = int(found[1])
    report = pack(uneven, tmp_path / "archive", target_size=smallest)
    assert report.stored_bytes <= smallest
    forced = pack(uneven, tmp_path / "forced", target_size=9_000, force=True)
    assert forced.stored_bytes <= smallest


def test_a_budget_on_a_base(tmp_path: Path) -> None:
    base = {f"layer.{i}": gaussian(i, 192, 192).astype(BF16) for i in range(6)}
    tuned = {
        name: (weight.astype(np.float64) + 0.05 * decaying(7, 0.6 + 0.07 * i, 192, 192)).astype(BF16)
        for i, (name, weight) in enumerate(base.items())
    }
    base_dir, source = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    lossless = pack(source, tmp_path / "lossless", base=base_dir)
    report = pack(source, tmp_path / "archive", base=base_dir, target_size=lossless.stored_bytes // 3)
    assert report.stored_bytes <= lossless.stored_bytes // 3
    found = unpacked(tmp_path / "archive", base_dir)
    for name, weight in tuned.items():
        assert error(found[name], weight) < error(base[name], weight)
        assert report.tensors[name].rel_error == pytest.approx(error(found[name], weight), rel=0.02, abs=1e-9)


# --- Sharing --------------------------------------------------------------------------------------------------------


def blocks(count: int, related: bool) -> dict[str, Array]:
    """Blocks of attention, MLP and norm; `related` ones are their left neighbour's anchor plus rank 3."""
    tensors: dict[str, Array] = {"model.embed_tokens.weight": gaussian(99, 50, 96).astype(BF16)}
    shapes = {"mlp.up_proj.weight": (192, 96), "self_attn.q_proj.weight": (96, 96)}
    for layer in range(count):
        for number, (kind, shape) in enumerate(shapes.items()):
            weight = gaussian(10 * layer + number, *shape)
            if related and layer % 2:
                left = tensors[f"model.layers.{layer - 1}.{kind}"].astype(np.float64)
                weight = left + low_rank(10 * layer + number, 3, *shape)
            tensors[f"model.layers.{layer}.{kind}"] = weight.astype(BF16)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = gaussian(layer, 96).astype(BF16)
    return tensors


def test_sharing_finds_the_anchors_rank(tmp_path: Path) -> None:
    tensors = blocks(8, related=True)
    archive = tmp_path / "archive"
    report = pack(write(tmp_path / "model", tensors), archive, method="lowrank", share="alternating", share_parts="mlp")
    deltas = {f"model.layers.{layer}.mlp.up_proj.weight" for layer in (3, 5)}
    found = unpacked(archive)
    with open_archive(archive) as opened:
        recipes = {name: opened.manifest.tensors[name].recipe for name in deltas}
    for name in tensors:
        if name not in deltas:
            assert same_bits(found[name], tensors[name]), name
            continue
        assert report.tensors[name].rank == 3
        assert error(found[name], tensors[name]) < 2.0**-8
        recipe = recipes[name]
        assert isinstance(recipe, Sum)
        assert recipe.terms[0] == Ref(re.sub(r"\d", lambda digit: str(int(digit[0]) - 1), name))


def test_an_explicit_map_reaches_the_first_blocks(tmp_path: Path) -> None:
    source = write(tmp_path / "model", blocks(4, related=True))
    report = pack(source, tmp_path / "archive", share="1:0", rank=3)
    shared = {name for name, entry in report.tensors.items() if entry.rank}
    assert shared == {"model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"}


def test_unlike_layers_are_not_shared(tmp_path: Path) -> None:
    source = write(tmp_path / "model", blocks(8, related=False))
    with pytest.raises(RefusedError) as refusal:
        pack(source, tmp_path / "archive", share="alternating", rank=4)
    numbers = [float(number) for number in re.findall(r"\d\.\d+", str(refusal.value))]
    # Of two independent Gaussian layers: hardly any cosine, and a difference 2**0.5 times as large as either.
    assert min(numbers) < 0.1 and 1.2 < max(numbers) < 1.42
    assert "--force" in str(refusal.value)
    assert not (tmp_path / "archive").exists()
    forced = pack(source, tmp_path / "archive", share="alternating", rank=4, force=True)
    assert sum(entry.rank == 4 for entry in forced.tensors.values()) == 4


@pytest.mark.parametrize(("layout", "message"), [("9:2", "layers 9"), ("sequential:2", "blocks")])
def test_a_layout_that_the_model_does_not_have(tmp_path: Path, layout: str, message: str) -> None:
    source = write(tmp_path / "model", blocks(4, related=True))
    with pytest.raises(UsageError, match=message):
        pack(source, tmp_path / "archive", method="lowrank", share=layout, force=True)


def test_a_delta_llm_of_real_weights(minilm_dir: Path, tmp_path: Path) -> None:
    """Real anchors, true rank 16: found in every shared tensor, in no more than 105 % of anchors and factors."""
    truth = synthetic.delta_llm(minilm_dir, tmp_path / "model", blocks=7, following=2, vocabulary=256)
    report = pack(tmp_path / "model", tmp_path / "archive", method="lowrank", share="sequential:2")
    ranks = {name: entry.rank for name, entry in report.tensors.items() if entry.rank}
    assert ranks == dict.fromkeys(truth.anchors, truth.rank)
    assert report.max_rel_error < 2.0**-8
    assert report.stored_bytes <= 1.05 * (truth.anchor_bytes + truth.factor_bytes)
    manifest = json.loads((tmp_path / "archive" / "deltafmt.json").read_bytes())
    for name, anchor in truth.anchors.items():
        assert manifest["tensors"][name]["recipe"]["terms"][0] == {"op": "ref", "tensor": anchor}


def test_sharing_is_lossless_unless_something_lossy_is_asked_for(minilm_dir: Path, tmp_path: Path) -> None:
    """Real anchors, true rank 16: found exactly, at less than 1 bit a weight beside the factors in bf16."""
    truth = synthetic.delta_llm(minilm_dir, tmp_path / "model", blocks=6, following=1, vocabulary=256)
    report = pack(tmp_path / "model", tmp_path / "archive", share="alternating")
    assert report.exact
    alone = pack(tmp_path / "model", tmp_path / "alone", method="lossless", dry_run=True)
    assert len(truth.anchors) == 7
    for name in truth.anchors:
        found = report.tensors[name]
        assert found.method == "patch-lowrank" and found.rank == truth.rank
        factors = 2 * truth.rank * sum(found.shape)
        assert found.stored_bytes < factors + found.logical_bytes / 16
        assert found.stored_bytes < alone.tensors[name].stored_bytes / 3
    unpack(tmp_path / "archive", tmp_path / "again")
    for path in (tmp_path / "model").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_layers_that_are_not_alike_lose_nothing_by_sharing(tmp_path: Path) -> None:
    source = write(tmp_path / "model", blocks(8, related=False))
    alone = pack(source, tmp_path / "alone", dry_run=True)
    shared = pack(source, tmp_path / "shared", share="alternating")
    assert shared.stored_bytes == alone.stored_bytes
