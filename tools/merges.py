"""Checkpoints that come from others: merged LoRAs, fine-tunes, decayed rows, added tokens, averages, SLERP.

Each function writes a real checkpoint from real ones by the exact formula that trainers and merge tools use, computed
in fp32 and rounded to the tensor's dtype once, at the end. The same arguments give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from plain_checkpoint import (
    FLOATS,
    INDEX,
    NUMPY,
    Array,
    Tensor,
    copy_sidecars,
    held,
    read_checkpoint,
    read_file,
    weight_files,
    write_file,
)

Change = Callable[[int, Tensor, Array], Array]
"""From a tensor's number in the checkpoint, the tensor, and its values in fp32 to its new values in fp32."""


# --- Trained further ------------------------------------------------------------------------------------------------


def merged_lora(src: Path, dst: Path, rank: int = 16, ulps: float = 1.0, seed: int = 0, twice: bool = False) -> Path:
    """Write `src` as if a LoRA had been trained on it and merged: `W' = round(W + s B A)` for every linear layer.

    `B` [out, rank] and `A` [rank, in] are normally distributed; the update's root mean square is `ulps` units in the
    last place (of the checkpoint's dtype) at the weights' root mean square. Embeddings, norms and biases stay as they
    are. With `twice`, the update is rounded before it is added, and then the sum: so PEFT does with `safe_merge`.
    Returns `dst`.
    """

    def merge(number: int, tensor: Tensor, weight: Array) -> Array:
        if len(tensor.shape) != 2 or "embed" in tensor.name or min(tensor.shape) <= 2 * rank:
            return weight
        rms = ulps * ulp(root_mean_square(weight), tensor.dtype)
        b, a = factors(np.random.default_rng([seed, number]), tensor.shape, rank, rms)
        update = b @ a
        merged: Array = weight + (update.astype(NUMPY[tensor.dtype]).astype(np.float32) if twice else update)
        return merged

    return _changed(src, dst, merge)


def fine_tuned(src: Path, dst: Path, deviation: float = 1e-3, seed: int = 0) -> Path:
    """Write `src` as if all of it had been trained further: to each tensor normal noise of `deviation` times the
    tensor's root mean square is added. Returns `dst`."""

    def tune(number: int, tensor: Tensor, weight: Array) -> Array:
        noise = np.random.default_rng([seed, number]).standard_normal(weight.shape, np.float32)
        tuned: Array = weight + np.float32(deviation * root_mean_square(weight)) * noise
        return tuned

    return _changed(src, dst, tune)


def decayed_rows(
    src: Path,
    dst: Path,
    unused: float = 0.7,
    decay: float = 1e-6,
    steps: int = 200,
    deviation: float = 1e-2,
    seed: int = 0,
) -> Path:
    """Write `src` as if it had been trained for `steps` with AdamW on text that leaves part of the vocabulary out.

    Rows of the word embedding without a gradient only decay: each step multiplies them by `1 - decay` (learning rate
    times weight decay) and rounds to fp32 (Loshchilov and Hutter 2019, algorithm 2). They are a share of `unused`. All
    else is changed as `fine_tuned` does it. Returns `dst`.
    """

    def train(number: int, tensor: Tensor, weight: Array) -> Array:
        rng = np.random.default_rng([seed, number])
        noise = rng.standard_normal(weight.shape, np.float32)
        trained: Array = weight + np.float32(deviation * root_mean_square(weight)) * noise
        if is_word_embedding(tensor.name):
            resting = rng.random(len(weight)) < unused
            rows: Array = weight[resting]
            for _ in range(steps):
                rows *= np.float32(1 - decay)
            trained[resting] = rows
        return trained

    return _changed(src, dst, train)


def tokens_added(src: Path, dst: Path, count: int = 8, seed: int = 0) -> Path:
    """Write `src` with `count` more rows at the end of the word embedding, and `vocab_size` in the config to match.

    New rows are the mean row plus normal noise of the rows' variance times 1e-9, as `resize_token_embeddings` of
    transformers draws them (there with the whole covariance, here with its diagonal). Returns `dst`.
    """

    def grow(number: int, tensor: Tensor, weight: Array) -> Array:
        if not is_word_embedding(tensor.name):
            return weight
        noise = np.random.default_rng([seed, number]).standard_normal((count, weight.shape[1]), np.float32)
        spread = np.float32(math.sqrt(1e-9)) * weight.std(axis=0)
        return np.concatenate([weight, weight.mean(axis=0) + spread * noise])

    _changed(src, dst, grow)
    config = json.loads((src / "config.json").read_text())
    config["vocab_size"] += count
    (dst / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return dst


# --- Merged from two models -----------------------------------------------------------------------------------------


def averaged(first: Path, second: Path, dst: Path, weights: tuple[float, float] = (0.5, 0.5)) -> Path:
    """Write the weighted mean of two models of the same tensors: `(u x + v y) / (u + v)`, mergekit's `linear`.

    Tensors that only `first` has, and integers, are `first`'s. Returns `dst`.
    """
    u, v = (np.float32(weight) for weight in weights)
    return _merged(first, second, dst, lambda x, y: (u * x + v * y) / (u + v))


def slerped(first: Path, second: Path, dst: Path, t: float = 0.5) -> Path:
    """Write the spherical interpolation of two models of the same tensors, tensor by tensor, as mergekit's `slerp`.

    Tensors that only `first` has, and integers, are `first`'s. Returns `dst`.
    """
    return _merged(first, second, dst, lambda x, y: slerp(x, y, t))


def slerp(x: Array, y: Array, t: float) -> Array:
    """The point at `t` on the arc from `x` to `y`, fp32 arrays of one shape (Shoemake 1985).

    As in mergekit, `(1 - t) x + t y` where the cosine of the angle between them is above 0.9995: a fine-tune is seldom
    further than that from its base.
    """
    lengths = np.linalg.norm(x), np.linalg.norm(y)
    cosine = np.sum((x / lengths[0]) * (y / lengths[1])) if min(lengths) > 1e-8 else np.float32(1)
    if abs(cosine) > 0.9995:
        return np.float32(1 - t) * x + np.float32(t) * y
    angle = np.arccos(cosine)
    begin, end = (np.float32(np.sin(part * angle) / np.sin(angle)) for part in (1 - t, t))
    blended: Array = begin * x + end * y
    return blended


# --- What these are made with ---------------------------------------------------------------------------------------


def factors(rng: np.random.Generator, shape: tuple[int, ...], rank: int, rms: float) -> tuple[Array, Array]:
    """Random fp32 factors `b` [out, rank] and `a` [rank, in] of an update of `shape` [out, in], of which the product
    has about the root mean square `rms`."""
    out, width = shape
    # An element of the product of standard normal factors has the variance `rank`.
    spread = np.float32(math.sqrt(rms / math.sqrt(rank)))
    b, a = (rng.standard_normal(shape, np.float32) for shape in ((out, rank), (rank, width)))
    return b * spread, a * spread


def root_mean_square(weight: Array) -> float:
    """Of an fp32 array; 0 if it is empty."""
    return float(np.linalg.norm(weight)) / math.sqrt(weight.size) if weight.size else 0.0


def ulp(value: float, dtype: str) -> float:
    """The distance of neighbouring numbers of `dtype` (`F64`, `F32`, `F16` or `BF16`) at a positive `value`."""
    precision = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}[dtype]
    return math.ldexp(1.0, math.frexp(value)[1] - precision)


def is_word_embedding(name: str) -> bool:
    """Whether a tensor is the token embedding, by the names that transformers gives it."""
    return name.endswith(("word_embeddings.weight", "embed_tokens.weight", "wte.weight"))


def _changed(src: Path, dst: Path, change: Change) -> Path:
    """Write `src` with every float tensor changed; files, order and sidecars stay. One file is in memory at a time."""
    copy_sidecars(src, dst)
    number = 0
    for path in weight_files(src):
        tensors = []
        for tensor in read_file(path):
            if tensor.dtype in FLOATS:
                changed = change(number, tensor, tensor.load().astype(np.float32))
                tensors.append(held(tensor.name, changed.astype(NUMPY[tensor.dtype])))
            else:
                tensors.append(tensor)
            number += 1
        write_file(dst / path.name, tensors)
    if (src / INDEX).exists():
        index = json.loads((src / INDEX).read_text())
        index["metadata"]["total_size"] = sum(tensor.nbytes for tensor in read_checkpoint(dst))
        (dst / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return dst


def _merged(first: Path, second: Path, dst: Path, blend: Callable[[Array, Array], Array]) -> Path:
    others = {tensor.name: tensor for tensor in read_checkpoint(second)}

    def merge(_: int, tensor: Tensor, weight: Array) -> Array:
        other = others.get(tensor.name)
        return weight if other is None else blend(weight, other.load().astype(np.float32))

    return _changed(first, dst, merge)


# --- Command line ---------------------------------------------------------------------------------------------------

DIRECTORY = click.Path(path_type=Path, file_okay=False)
SOURCE = click.Path(path_type=Path, file_okay=False, exists=True)


@click.group(help=__doc__)
def main() -> None:
    """The commands below."""


@main.command("lora")
@click.argument("src", type=SOURCE)
@click.argument("dst", type=DIRECTORY)
@click.option("--rank", default=16, show_default=True)
@click.option("--ulps", default=1.0, show_default=True, help="Size of the update in units in the last place.")
@click.option("--seed", default=0, show_default=True)
@click.option("--twice", is_flag=True, help="Round the update before it is added.")
def _lora(src: Path, dst: Path, rank: int, ulps: float, seed: int, twice: bool) -> None:
    """Add a random low-rank update to every linear layer of SRC, as a merged LoRA does."""
    click.echo(merged_lora(src, dst, rank, ulps, seed, twice))


@main.command("tune")
@click.argument("src", type=SOURCE)
@click.argument("dst", type=DIRECTORY)
@click.option("--deviation", default=1e-3, show_default=True, help="Relative to each tensor's root mean square.")
@click.option("--seed", default=0, show_default=True)
def _tune(src: Path, dst: Path, deviation: float, seed: int) -> None:
    """Add noise to every tensor of SRC, as full fine-tuning does."""
    click.echo(fine_tuned(src, dst, deviation, seed))


@main.command("average")
@click.argument("first", type=SOURCE)
@click.argument("second", type=SOURCE)
@click.argument("dst", type=DIRECTORY)
def _average(first: Path, second: Path, dst: Path) -> None:
    """The mean of two models."""
    click.echo(averaged(first, second, dst))


@main.command("slerp")
@click.argument("first", type=SOURCE)
@click.argument("second", type=SOURCE)
@click.argument("dst", type=DIRECTORY)
@click.option("-t", "t", default=0.5, show_default=True)
def _slerp(first: Path, second: Path, dst: Path, t: float) -> None:
    """The point between two models on the arc through both."""
    click.echo(slerped(first, second, dst, t))


if __name__ == "__main__":
    main()
