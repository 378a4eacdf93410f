"""Checkpoints to test and measure on that no package carries: casts, shardings, synthetic models of a known structure.

Everything is written in the Hugging Face layout (safetensors, an index where there are shards, `config.json`) and with
little memory: one tensor at a time, large random tensors piece by piece. The same arguments give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import ml_dtypes
import numpy as np

from merges import factors, root_mean_square
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
    write_checkpoint,
    write_file,
)

PIECE = 1 << 20
"""Elements that a random tensor is made of at a time."""


# --- Made from a real checkpoint ------------------------------------------------------------------------------------


def cast_checkpoint(src: Path, dst: Path, dtype: str) -> Path:
    """Write `src` with its floating-point tensors rounded to `dtype` (`F32`, `F16` or `BF16`); the rest stays as it is.

    Sidecars are copied, `torch_dtype` in `config.json` is set. Returns `dst`.
    """
    target = NUMPY[dtype]

    def cast(tensor: Tensor) -> Tensor:
        if tensor.dtype not in FLOATS:
            return tensor
        return Tensor(tensor.name, dtype, tensor.shape, lambda: (piece.astype(target) for piece in tensor.pieces()))

    copy_sidecars(src, dst)
    config = json.loads((src / "config.json").read_text())
    (dst / "config.json").write_text(json.dumps(config | {"torch_dtype": FLOATS[dtype]}, indent=2) + "\n")
    for path in weight_files(src):
        write_file(dst / path.name, map(cast, read_file(path)))
    if (src / INDEX).exists():
        index = json.loads((src / INDEX).read_text())
        index["metadata"]["total_size"] = sum(tensor.nbytes for tensor in read_checkpoint(dst))
        (dst / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return dst


def shard_checkpoint(src: Path, dst: Path, max_shard_bytes: int) -> Path:
    """Write `src` as `model-00001-of-0000N.safetensors` of at most `max_shard_bytes` of tensors each, with an index.

    A tensor larger than that gets a shard of its own. Returns `dst`.
    """
    copy_sidecars(src, dst)
    write_checkpoint(dst, read_checkpoint(src), max_shard_bytes)
    return dst


# --- Random ---------------------------------------------------------------------------------------------------------


def normal(name: str, shape: tuple[int, ...], seed: list[int], mean: float = 0.0, deviation: float = 0.02) -> Tensor:
    """A bf16 tensor of normally distributed values, made piece by piece each time it is asked for."""

    def pieces() -> Iterator[Array]:
        rng = np.random.default_rng(seed)
        left = math.prod(shape)
        while left:
            count = min(left, PIECE)
            values = rng.standard_normal(count, np.float32)
            yield (values * np.float32(deviation) + np.float32(mean)).astype(ml_dtypes.bfloat16)
            left -= count

    return Tensor(name, "BF16", shape, pieces)


def sharded_random(
    dst: Path, total_bytes: int, shard_bytes: int, seed: int = 0, hidden: int = 2048, vocabulary: int = 32000
) -> Path:
    """Write a random bf16 checkpoint shaped like Llama, of about `total_bytes`, in shards of at most `shard_bytes`.

    It has as many blocks as fit (MLP 4 * `hidden`, grouped queries 4 : 1) and at least one. Needs a few MB of memory,
    whatever its size. Returns `dst`.
    """
    narrow, wide = hidden // 4, 4 * hidden
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    ends = 2 * 2 * vocabulary * hidden
    blocks = max(1, (total_bytes - ends) // (2 * sum(map(math.prod, block.values()))))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocabulary, hidden)}
    for number in range(blocks):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in block.items()}
    shapes |= {"model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    tensors = [
        normal(f"{name}.weight", shape, [seed, number], mean=1.0 if "norm" in name else 0.0)
        for number, (name, shape) in enumerate(shapes.items())
    ]
    write_checkpoint(dst, tensors, shard_bytes)
    _write_llama_config(dst, hidden, wide, blocks, vocabulary)
    return dst


def many_tensors(dst: Path, count: int, seed: int = 0) -> Path:
    """Write a checkpoint of `count` random bf16 tensors of 32 x 32 in one file. Returns `dst`."""
    write_checkpoint(dst, (normal(f"model.layers.{i}.weight", (32, 32), [seed, i]) for i in range(count)))
    (dst / "config.json").write_text(
        json.dumps({"model_type": "synthetic", "torch_dtype": "bfloat16"}, indent=2) + "\n"
    )
    return dst


# --- Shaped like DeltaLLM -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharingTruth:
    """What `delta_llm` built: what a packer that finds the structure should find."""

    anchors: dict[str, str]
    """Name of each shared tensor -> name of the tensor of its anchor layer."""
    rank: int
    anchor_bytes: int
    """Bytes of every tensor that is not shared (anchors, untouched blocks, embedding, norms)."""
    factor_bytes: int
    """Bytes of the factors of every shared tensor, in bf16."""
    logical_bytes: int
    """Bytes of the tensors of the checkpoint."""

    @property
    def ideal_bytes(self) -> int:
        """Base plus factors, nothing entropy-coded."""
        return self.anchor_bytes + self.factor_bytes


def sequential_anchors(blocks: int, following: int, untouched: int = 2) -> dict[int, int]:
    """Shared block -> anchor block, where each anchor serves the `following` blocks after it (`sequential:K`).

    The first and last `untouched` blocks stand alone; a last run may be shorter.
    """
    first, end = untouched, blocks - untouched
    period = following + 1
    return {i: i - (i - first) % period for i in range(first, end) if (i - first) % period}


def delta_llm(
    src: Path,
    dst: Path,
    blocks: int = 12,
    rank: int = 16,
    following: int = 3,
    scale: float = 0.2,
    seed: int = 0,
    vocabulary: int = 4096,
) -> SharingTruth:
    """Write a Llama-shaped bf16 checkpoint whose blocks share anchors as DeltaLLM trains them, and return the truth.

    `src` is the MiniLM checkpoint: the linear layers of anchors and untouched blocks are its real matrices (384 wide,
    MLP 1,536; `up_proj` is a transposed second MLP matrix). It has 6 blocks; where more are needed, later ones take
    the same matrices with their rows rotated, so that no two tensors are equal. The embedding is MiniLM's first
    `vocabulary` rows. A shared linear layer is `bf16(anchor + B A)` with factors of true rank `rank`, and `B A` has
    about `scale` times the anchor's norm. Every block has norms of its own.
    """
    real = {tensor.name: tensor for tensor in read_checkpoint(src)}
    anchor_of = sequential_anchors(blocks, following)
    independent = [block for block in range(blocks) if block not in anchor_of]
    sources = {
        "self_attn.q_proj": "attention.self.query",
        "self_attn.k_proj": "attention.self.key",
        "self_attn.v_proj": "attention.self.value",
        "self_attn.o_proj": "attention.output.dense",
        "mlp.gate_proj": "intermediate.dense",
        "mlp.up_proj": "output.dense",
        "mlp.down_proj": "output.dense",
    }

    def linear(block: int, kind: str) -> Array:
        """Weight [out, in] of an anchor or untouched block."""
        turn, layer = divmod(independent.index(block), 6)
        weight = real[f"encoder.layer.{layer}.{sources[kind]}.weight"].load()
        weight = weight.T if kind == "mlp.up_proj" else weight
        rotated: Array = np.roll(weight, 31 * turn, axis=0).astype(ml_dtypes.bfloat16)
        return rotated

    def norm(block: int, kind: str) -> Array:
        layer = real[f"encoder.layer.{block % 6}.{kind}.LayerNorm.weight"].load()
        noise = np.random.default_rng([seed, block, len(kind)]).standard_normal(layer.shape, np.float32)
        own: Array = (layer + np.float32(0.01) * noise).astype(ml_dtypes.bfloat16)
        return own

    tensors = [held("model.embed_tokens.weight", _rows(real["embeddings.word_embeddings.weight"], vocabulary))]
    anchors: dict[str, str] = {}
    factor_bytes = 0
    for block in range(blocks):
        prefix = f"model.layers.{block}"
        tensors.append(held(f"{prefix}.input_layernorm.weight", norm(block, "attention.output")))
        tensors.append(held(f"{prefix}.post_attention_layernorm.weight", norm(block, "output")))
        for number, kind in enumerate(sources):
            name = f"{prefix}.{kind}.weight"
            anchor = anchor_of.get(block, block)
            weight = linear(anchor, kind)
            if anchor != block:
                wide = weight.astype(np.float32)
                rng = np.random.default_rng([seed, block, number])
                b, a = map(_exact, factors(rng, wide.shape, rank, scale * root_mean_square(wide)))
                weight = (wide + b @ a).astype(ml_dtypes.bfloat16)
                anchors[name] = f"model.layers.{anchor}.{kind}.weight"
                factor_bytes += 2 * rank * sum(weight.shape)
            tensors.append(held(name, weight))
    tensors.append(held("model.norm.weight", norm(blocks, "output")))
    write_checkpoint(dst, tensors)
    _write_llama_config(dst, 384, 1536, blocks, vocabulary, heads=12, key_value_heads=12, tied=True)
    return SharingTruth(
        anchors=anchors,
        rank=rank,
        anchor_bytes=sum(tensor.nbytes for tensor in tensors if tensor.name not in anchors),
        factor_bytes=factor_bytes,
        logical_bytes=sum(tensor.nbytes for tensor in tensors),
    )


def _exact(factor: Array) -> Array:
    """Values in fp32 that bf16 can represent."""
    rounded: Array = factor.astype(ml_dtypes.bfloat16).astype(np.float32)
    return rounded


def _rows(tensor: Tensor, count: int) -> Array:
    rows: Array = tensor.load()[:count].astype(ml_dtypes.bfloat16)
    return rows


def _write_llama_config(
    dst: Path,
    hidden: int,
    wide: int,
    blocks: int,
    vocabulary: int,
    heads: int = 32,
    key_value_heads: int = 8,
    tied: bool = False,
) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }
    (dst / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# --- Command line ---------------------------------------------------------------------------------------------------

DIRECTORY = click.Path(path_type=Path, file_okay=False)
SOURCE = click.Path(path_type=Path, file_okay=False, exists=True)


@click.group(help=__doc__)
def main() -> None:
    """The commands below."""


@main.command("cast")
@click.argument("src", type=SOURCE)
@click.argument("dst", type=DIRECTORY)
@click.option("--dtype", type=click.Choice(["F32", "F16", "BF16"]), default="BF16", show_default=True)
def _cast(src: Path, dst: Path, dtype: str) -> None:
    """Round the floating-point tensors of SRC to another dtype."""
    click.echo(cast_checkpoint(src, dst, dtype))


@main.command("shard")
@click.argument("src", type=SOURCE)
@click.argument("dst", type=DIRECTORY)
@click.option("--max-shard-bytes", type=int, default=10_000_000, show_default=True)
def _shard(src: Path, dst: Path, max_shard_bytes: int) -> None:
    """Split SRC into shards with an index."""
    click.echo(shard_checkpoint(src, dst, max_shard_bytes))


@main.command("random")
@click.argument("dst", type=DIRECTORY)
@click.option("--total-bytes", type=int, default=2_000_000_000, show_default=True)
@click.option("--shard-bytes", type=int, default=500_000_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def _random(dst: Path, total_bytes: int, shard_bytes: int, seed: int) -> None:
    """A random Llama-shaped bf16 checkpoint in shards."""
    click.echo(sharded_random(dst, total_bytes, shard_bytes, seed))


@main.command("delta-llm")
@click.argument("src", type=SOURCE)
@click.argument("dst", type=DIRECTORY)
@click.option("--blocks", default=12, show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--following", default=3, show_default=True, help="Blocks that share each anchor.")
@click.option("--seed", default=0, show_default=True)
def _delta_llm(src: Path, dst: Path, blocks: int, rank: int, following: int, seed: int) -> None:
    """A DeltaLLM-shaped checkpoint from MiniLM (SRC); prints what is true of it as JSON."""
    click.echo(json.dumps(asdict(delta_llm(src, dst, blocks, rank, following, seed=seed)), indent=2))


@main.command("many")
@click.argument("dst", type=DIRECTORY)
@click.option("--count", default=2000, show_default=True)
def _many(dst: Path, count: int) -> None:
    """A checkpoint of many small tensors."""
    click.echo(many_tensors(dst, count))


if __name__ == "__main__":
    main()
