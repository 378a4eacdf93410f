"""Whole models that others made, merged and packed against what they were made from: every file comes back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import deltafmt
import merges
from command_line import Run
from deltafmt import WrongBaseError
from hostile import Json, manifest, tree
from plain_checkpoint import NUMPY, held, read_checkpoint, write_checkpoint

HIDDEN, INNER, TOKENS, RANK, NEW = 192, 384, 512, 4, 8
LINEAR = {"self_attn.q_proj": (HIDDEN, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
EMBEDDING = "model.embed_tokens.weight"
SLACK = 512  # bytes a tensor, for headers of frames, code tables and directories

Sizes = dict[str, int]


def model(folder: Path, dtype: str, seed: int, layers: int = 2) -> Path:
    """A small Llama of random weights."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (TOKENS, HIDDEN)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LINEAR.items()}
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (HIDDEN,)
    arrays = {
        name: (0.02 * random.standard_normal(shape, np.float32) + (len(shape) == 1)).astype(NUMPY[dtype])
        for name, shape in shapes.items()
    }
    write_checkpoint(folder, [held(name, array) for name, array in arrays.items()])
    (folder / "config.json").write_text(f'{{"model_type": "llama", "vocab_size": {TOKENS}}}\n')
    (folder / "tokenizer.json").write_text("{}\n")
    return folder


class Merge(NamedTuple):
    """How a model is made, from folders of bases to a new folder, and what the result is worth in bits a weight.

    `bits` are of the linear layers; `recipe` is theirs: the operators in it, sorted.
    """

    make: Callable[[Sequence[Path], Path], object]
    recipe: Sequence[str]
    bits: float
    dtypes: Sequence[str] = ("BF16", "F32")
    bases: int = 1


LOW_RANK = ["lowrank", "patch", "ref", "stored", "stored", "stored", "sum"]
PATCHED = ["patch", "ref", "stored"]
MIXED = ["patch", "ref", "ref", "scaled", "scaled", "stored", "stored", "stored", "sum"]
# Of entries of a factor 16 bits each, and 0.3 bits of misses; the largest share of factors have the square matrices.
LOW_RANK_BITS = 0.3 + 16 * RANK * 2 / HIDDEN
# Full noise of 1/100 of the weights in BF16: 0.02/100 over a last place of 2^-13 for the typical weight is 1.6 of them,
# and log2(1.6 sqrt(2 pi e)) = 2.8; smaller weights have smaller ones (1.3 bits on average for a normal distribution).
NOISE_BITS = 4.3

MERGES = {
    "lora": Merge(lambda bases, to: merges.merged_lora(bases[0], to, RANK, 3), LOW_RANK, LOW_RANK_BITS),
    "lora of F16": Merge(
        lambda bases, to: merges.merged_lora(bases[0], to, RANK, 3), LOW_RANK, LOW_RANK_BITS, dtypes=("F16",)
    ),
    "lora, rounded twice": Merge(
        lambda bases, to: merges.merged_lora(bases[0], to, RANK, 3, twice=True), LOW_RANK, LOW_RANK_BITS
    ),
    "fine-tune": Merge(lambda bases, to: merges.fine_tuned(bases[0], to, 1e-2), PATCHED, NOISE_BITS, dtypes=("BF16",)),
    "average": Merge(lambda bases, to: merges.averaged(bases[0], bases[1], to), MIXED, 0.4, bases=2),
    "uneven average": Merge(
        lambda bases, to: merges.averaged(bases[0], bases[1], to, weights=(0.3, 0.7)),
        MIXED,
        0.4,
        dtypes=("BF16",),
        bases=2,
    ),
    "slerp": Merge(
        lambda bases, to: merges.slerped(bases[0], bases[1], to, t=0.3), MIXED, 0.4, dtypes=("BF16",), bases=2
    ),
    # Two products, a sum, each rounded to F32: a last place is missed often, two seldom.
    "slerp of F32": Merge(
        lambda bases, to: merges.slerped(bases[0], bases[1], to, t=0.3), MIXED, 2.5, dtypes=("F32",), bases=2
    ),
}
CASES = [pytest.param(name, dtype, id=f"{name} {dtype}") for name, merge in MERGES.items() for dtype in merge.dtypes]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Two models of each dtype."""
    root = tmp_path_factory.mktemp("bases")
    return {
        dtype: [model(root / f"{dtype} {seed}", dtype, seed) for seed in (1, 2)] for dtype in ("BF16", "F16", "F32")
    }


def sums(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in tree(folder).items()}


def comes_back(source: Path, root: Path, base: Any) -> deltafmt.PackReport:
    report = deltafmt.pack(source, root / "packed", base=base, jobs=2)
    assert report.exact and report.max_rel_error == 0
    verified = deltafmt.verify(root / "packed", base=base, against=source)
    assert verified.equal, verified.differences
    deltafmt.unpack(root / "packed", root / "out", base=base)
    assert sums(root / "out") == sums(source)
    return report


def operators(recipe: Json) -> list[str]:
    """Every operator in a recipe, sorted."""
    found: list[str] = []

    def walk(node: object) -> None:
        if isinstance(node, dict):
            found.extend([node["op"]] if "op" in node else [])
            for each in node.values():
                walk(each)
        elif isinstance(node, list):
            for each in node:
                walk(each)

    walk(recipe)
    return sorted(found)


def linear(entries: Mapping[str, Any]) -> list[str]:
    return [name for name in entries if "proj" in name]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_merge_is_found_and_comes_back(tmp_path: Path, bases: dict[str, list[Path]], name: str, dtype: str) -> None:
    merge = MERGES[name]
    origins = bases[dtype][: merge.bases]
    merge.make(origins, tmp_path / "merged")
    report = comes_back(tmp_path / "merged", tmp_path, origins)
    recipes = manifest(tmp_path / "packed")["tensors"]
    assert len(linear(recipes)) == 6
    for tensor in linear(recipes):
        assert operators(recipes[tensor]["recipe"]) == merge.recipe, tensor
    logical = sum(np.prod(report.tensors[tensor].shape) for tensor in linear(recipes))
    stored = sum(report.tensors[tensor].stored_bytes for tensor in linear(recipes))
    assert stored <= merge.bits * logical / 8 + SLACK * 6


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_what_a_lora_leaves_alone_is_a_reference(tmp_path: Path, bases: dict[str, list[Path]], dtype: str) -> None:
    merges.merged_lora(bases[dtype][0], tmp_path / "merged", RANK, 3)
    report = deltafmt.pack(tmp_path / "merged", tmp_path / "packed", base=bases[dtype][0])
    for name, entry in manifest(tmp_path / "packed")["tensors"].items():
        if "proj" not in name:
            assert entry["recipe"] == {"op": "ref", "base": "base", "tensor": name}
            assert report.tensors[name].stored_bytes == 0


def test_decayed_rows_of_an_embedding(tmp_path: Path, bases: dict[str, list[Path]]) -> None:
    """Trained rows cost their noise; the others, seven of ten, almost nothing beside a number each."""
    merges.decayed_rows(bases["BF16"][0], tmp_path / "trained", decay=1e-5)
    report = comes_back(tmp_path / "trained", tmp_path, bases["BF16"][0])
    recipe = manifest(tmp_path / "packed")["tensors"][EMBEDDING]["recipe"]
    assert operators(recipe) == ["patch", "ref", "scaled", "stored", "stored"]
    moved, still = arrays(tmp_path / "trained")[EMBEDDING], arrays(bases["BF16"][0])[EMBEDDING]
    trained = np.count_nonzero(np.abs(moved.astype(float) / still.astype(float) - 1).max(axis=1) > 0.02)
    assert 0.2 * TOKENS < trained < 0.4 * TOKENS
    noise = NOISE_BITS * trained * HIDDEN / 8
    # Which rows are which is not told the coder of the noise: an entropy of at most one bit a weight more.
    mixed = -sum(share * np.log2(share) for share in (trained / TOKENS, 1 - trained / TOKENS)) * TOKENS * HIDDEN / 8
    assert report.tensors[EMBEDDING].stored_bytes <= noise + mixed + 4 * TOKENS + SLACK


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_added_tokens_cost_what_they_are(tmp_path: Path, bases: dict[str, list[Path]], dtype: str) -> None:
    base = bases[dtype][0]
    merges.tokens_added(base, tmp_path / "grown", NEW)
    report = comes_back(tmp_path / "grown", tmp_path, base)
    assert operators(manifest(tmp_path / "packed")["tensors"][EMBEDDING]["recipe"]) == [
        "patch",
        "ref",
        "rows",
        "stored",
    ]
    width = NUMPY[dtype].itemsize
    assert report.tensors[EMBEDDING].shape == (TOKENS + NEW, HIDDEN)
    assert report.tensors[EMBEDDING].stored_bytes <= NEW * HIDDEN * width + SLACK
    with deltafmt.open(tmp_path / "packed", base=base) as archive:
        lazy = archive.get_slice(EMBEDDING)
        expected = arrays(tmp_path / "grown")[EMBEDDING]
        for rows in (np.s_[: TOKENS - 3], np.s_[TOKENS - 2 : TOKENS + 2], np.s_[-NEW:], np.s_[TOKENS, 5:9]):
            assert lazy[rows].tobytes() == expected[rows].tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_rows_that_decay_beside_added_tokens_cost_next_to_nothing(
    tmp_path: Path, bases: dict[str, list[Path]], dtype: str
) -> None:
    """A token is added, then all is trained with weight decay: rows that no text uses only shrink."""
    base = bases[dtype][0]
    merges.tokens_added(base, tmp_path / "grown", NEW)
    decay = {"BF16": 1e-4, "F32": 1e-6}[dtype]  # so little does not show in bf16
    merges.decayed_rows(tmp_path / "grown", tmp_path / "trained", unused=0.9, decay=decay)
    report = comes_back(tmp_path / "trained", tmp_path, base)
    recipe = manifest(tmp_path / "packed")["tensors"][EMBEDDING]["recipe"]
    found = {"BF16": "scaled", "F32": "decayed"}[dtype]  # of float32 every step is rounded
    assert operators(recipe) == sorted(["patch", "ref", "rows", found, "stored", "stored"])
    width = NUMPY[dtype].itemsize
    changed = 0.15 * TOKENS + NEW  # rows, of which a tenth were drawn
    assert report.tensors[EMBEDDING].stored_bytes <= changed * HIDDEN * width + 9 * TOKENS + SLACK


@pytest.mark.parametrize("base_dtype", ["BF16", "F32"])
def test_low_rank_is_found_beside_added_tokens(tmp_path: Path, bases: dict[str, list[Path]], base_dtype: str) -> None:
    base = bases[base_dtype][0]
    random = np.random.default_rng(5)
    b, a = merges.factors(random, (TOKENS, HIDDEN), RANK, 1e-3)
    tensors = read_checkpoint(base)
    new = 0.02 * random.standard_normal((NEW, HIDDEN), np.float32)
    grown = [
        held(each.name, np.concatenate([each.load().astype(np.float32) + b @ a, new]).astype(NUMPY["BF16"]))
        if each.name == EMBEDDING
        else each
        for each in tensors
    ]
    write_checkpoint(tmp_path / "grown", grown)
    report = comes_back(tmp_path / "grown", tmp_path, base)
    recipe = manifest(tmp_path / "packed")["tensors"][EMBEDDING]["recipe"]
    assert operators(recipe) == ["lowrank", "patch", "ref", "rows", "stored", "stored", "stored", "sum"]
    factors = 16 * RANK * (TOKENS + HIDDEN) / 8
    assert report.tensors[EMBEDDING].stored_bytes <= factors + 0.4 * TOKENS * HIDDEN / 8 + 2 * NEW * HIDDEN + SLACK
    expected = arrays(tmp_path / "grown")[EMBEDDING]
    with deltafmt.open(tmp_path / "packed", base=base) as archive:
        lazy = archive.get_slice(EMBEDDING)
        for part in (np.s_[TOKENS - 2 : TOKENS + 2], np.s_[-NEW:, 3:70], np.s_[:, 5:9]):
            assert lazy[part].tobytes() == expected[part].tobytes()


def test_removed_tokens_cost_nothing(tmp_path: Path, bases: dict[str, list[Path]]) -> None:
    """The base of the test before is the fine-tune of this one."""
    base = bases["BF16"][0]
    merges.tokens_added(base, tmp_path / "grown", NEW)
    report = comes_back(base, tmp_path, tmp_path / "grown")
    assert operators(manifest(tmp_path / "packed")["tensors"][EMBEDDING]["recipe"]) == [
        "patch",
        "ref",
        "rows",
        "stored",
    ]
    assert report.tensors[EMBEDDING].stored_bytes <= SLACK


def arrays(folder: Path) -> dict[str, Any]:
    return {tensor.name: tensor.load() for tensor in read_checkpoint(folder)}


# --- Two bases ------------------------------------------------------------------------------------------------------


def test_a_mixture_needs_both_bases(tmp_path: Path, bases: dict[str, list[Path]]) -> None:
    first, second = bases["BF16"]
    merges.averaged(first, second, tmp_path / "mean")
    report = deltafmt.pack(tmp_path / "mean", tmp_path / "packed", base=[first, second])
    assert report.bases_needed == (str(first), str(second))
    deltafmt.unpack(tmp_path / "packed", tmp_path / "swapped", base=[second, first])
    assert sums(tmp_path / "swapped") == sums(tmp_path / "mean")
    third = model(tmp_path / "third", "BF16", 3)
    for others in ([first], [first, third], [third, second]):
        with pytest.raises(WrongBaseError):
            deltafmt.unpack(tmp_path / "packed", tmp_path / "refused", base=others)
    assert not (tmp_path / "refused").exists()


def test_a_mixture_of_three(tmp_path: Path, bases: dict[str, list[Path]]) -> None:
    third = model(tmp_path / "third", "BF16", 3)
    origins = [*bases["BF16"], third]
    parts = [arrays(origin) for origin in origins]
    mean = [
        held(name, (sum(part[name].astype(np.float32) for part in parts) / np.float32(3)).astype(first.dtype))
        for name, first in parts[0].items()
    ]
    write_checkpoint(tmp_path / "mean", mean)
    report = comes_back(tmp_path / "mean", tmp_path, origins)
    assert len(report.bases_needed) == 3
    recipe = manifest(tmp_path / "packed")["tensors"][EMBEDDING]["recipe"]
    assert operators(recipe).count("scaled") == 3
    assert report.tensors[EMBEDDING].stored_bytes <= 0.4 * TOKENS * HIDDEN / 8 + SLACK


# --- The same again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "average"])
def test_two_packs_are_the_same(tmp_path: Path, bases: dict[str, list[Path]], name: str) -> None:
    origins = bases["BF16"][: MERGES[name].bases]
    MERGES[name].make(origins, tmp_path / "merged")
    for copy, jobs in (("one", 1), ("again", 1), ("two", 2)):
        deltafmt.pack(tmp_path / "merged", tmp_path / copy, base=origins, jobs=jobs)
    assert sums(tmp_path / "one") == sums(tmp_path / "again") == sums(tmp_path / "two")


def test_archives_of_archives(tmp_path: Path, bases: dict[str, list[Path]], run: Run) -> None:
    """A packed base gives the same archive as the base; an archive packed again, the same model."""
    base = bases["BF16"][0]
    merges.merged_lora(base, tmp_path / "merged", RANK, 3)
    assert run("pack", str(base), "base")[0] == 0
    assert run("pack", "merged", "one", "--base", str(base))[0] == 0
    assert run("pack", "merged", "two", "--base", "base")[0] == 0
    tensors = [manifest(tmp_path / name)["tensors"] for name in ("one", "two")]
    assert tensors[0] == tensors[1]
    assert run("unpack", "one", "out", "--base", "base")[0] == 0
    assert sums(tmp_path / "out") == sums(tmp_path / "merged")
    assert run("verify", "two", "--base", str(base), "--against", "merged")[0] == 0
    deltafmt.pack(tmp_path / "merged", tmp_path / "alone")
    assert run("pack", "alone", "three", "--base", "base")[0] == 0
    assert run("unpack", "three", "again", "--base", "base")[0] == 0
    assert sums(tmp_path / "again") == sums(tmp_path / "merged")
    assert manifest(tmp_path / "three")["tensors"] == tensors[0]
