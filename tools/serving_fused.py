"""What fused models cost beside dense ones: one of shared layers, and several fine-tunes of one base.

Two parts of `bench_serving.py`, which runs them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import deltafmt
import deltafmt.torch
import fixtures
import merges
import train_lora
from deltafmt.dtypes import Bits
from deltafmt.manifest import Manifest
from deltafmt.operators import Lowrank, Ref, Stored, Sum
from deltafmt.pipeline import Pool
from deltafmt.reader import Archive
from deltafmt.torch.evaluate import resident_bytes
from measure import Cell, Report, Timed, in_turns

SHARED = "sequential:3"
RANK = 64
TENANTS = 5
BF16_ROUNDING = 2.0**-8
"""Rounding to nearest changes a normal number by at most this share of it."""
DEVIATIONS = 8


# --- Shared layers --------------------------------------------------------------------------------------------------


def shared(report: Report, work: Path, repeats: int) -> None:
    """All that is measured on the model of shared layers."""
    archive = shared_model(work)
    low_rank_load(report, archive, repeats)
    memory(report, archive)


def shared_model(work: Path) -> Path:
    """The archive of SmolLM2 in bf16, of shared layers and factors."""
    model = train_lora.base("smollm2", "bfloat16")
    archive = work / "shared"
    deltafmt.pack(model, archive, method="lowrank", share=SHARED, rank=RANK, force=True)
    return archive


def low_rank_load(report: Report, archive: Path, repeats: int) -> None:
    """Everything of a model of shared layers, beside the limit."""
    files = [path for path in archive.iterdir() if path.suffix == ".safetensors"]
    with deltafmt.open(archive, framework="pt") as opened:
        sums = operands(opened)

    def limit(read: Callable[[], object], dtype: torch.dtype) -> Callable[[], None]:
        ready = [(base.to(dtype), b.to(dtype).T, a.to(dtype), scale) for base, b, a, scale in sums]

        def run() -> None:
            read()
            for base, b, a, scale in ready:
                torch.addmm(base, b, a, alpha=scale)

        return run

    def read_files() -> None:
        for path in files:
            np.fromfile(path, np.uint8)

    limits = {
        f"limit, {str(dtype).removeprefix('torch.')}": limit(read_files, dtype)
        for dtype in {sums[0][0].dtype: 0, torch.float32: 0}
    }
    limits["limit with decoding, float32"] = limit(lambda: decoded(archive), torch.float32)
    load = Timed(lambda: deltafmt.torch.load_state_dict(archive))
    seconds = in_turns({"deltafmt": load, **{name: Timed(run) for name, run in limits.items()}}, repeats)
    rows: list[dict[str, Cell]] = [
        {
            "products": len(sums),
            **{f"{name}, s": value for name, value in seconds.items()},
            **{f"times the {name}": seconds["deltafmt"] / seconds[name] for name in limits},
            "asked": "<= 1.3",
        }
    ]
    note = """The limit reads the files, and calls addmm with the weights of the model itself, in its own dtype and in
fp32. With decoding, it reads the stored arrays as load does, checksums and all: then a ratio says what is left
beside that."""
    report.table(f"Full load of shared layers, SmolLM2, {SHARED}, rank {RANK}", rows, note)


def decoded(archive: Path) -> list[Bits]:
    """All stored arrays as they are, each decoded once, side by side; nothing is computed of them."""
    with contextlib.closing(Archive(archive)) as opened, contextlib.closing(Pool()) as pool:
        arrays = opened.manifest.arrays
        found = {name: np.empty(array.numel, array.dtype.bits) for name, array in arrays.items()}
        readers = {name: opened.array_reader(name) for name in arrays}

        def decode(piece: tuple[str, int]) -> None:
            name, begin = piece
            end = min(begin + arrays[name].encoding.chunk, arrays[name].numel)
            readers[name](begin, end, found[name][begin:end])

        pool.each(
            [(name, begin) for name, array in arrays.items() for begin in range(0, array.numel, array.encoding.chunk)],
            decode,
        )
    return list(found.values())


def operands(opened: deltafmt.OpenArchive) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]:
    """Base `[out, in]`, b `[r, out]`, a `[r, in]` and scale of every tensor that is a base plus a product."""
    manifest = opened._archive.manifest
    found = []
    for name in products(manifest):
        recipe = manifest.tensors[name].recipe
        assert isinstance(recipe, Sum)
        base, low = recipe.terms
        assert isinstance(base, (Ref, Stored)) and isinstance(low, Lowrank)
        whole = opened.get_tensor(base.tensor) if isinstance(base, Ref) else _array(opened, base)
        found.append((whole, _array(opened, low.b), _array(opened, low.a), low.scale))
    return found


def products(manifest: Manifest) -> list[str]:
    """The tensors that low-rank products are part of."""
    return [
        name
        for name, tensor in manifest.tensors.items()
        if any(isinstance(node, Lowrank) for node in tensor.recipe.walk())
    ]


def _array(opened: deltafmt.OpenArchive, node: object) -> torch.Tensor:
    """A stored array, as float32."""
    assert isinstance(node, Stored)
    array = opened._archive.manifest.arrays[node.array]
    bits = opened._archive.stored_array(node.array)
    return torch.from_numpy(bits.view(array.dtype.values).astype(np.float32).reshape(array.shape))


def memory(report: Report, archive: Path) -> None:
    """Bytes of all parameters and buffers, each memory counted once."""
    dense = deltafmt.torch.load_model(archive, "full")
    fused = deltafmt.torch.load_model(archive, "fused")
    rows: list[dict[str, Cell]] = [
        {
            "dense MB": resident_bytes(dense) / 1e6,
            "fused MB": resident_bytes(fused) / 1e6,
            "stored arrays, not compressed, MB": array_bytes(archive) / 1e6,
            "fused / dense": resident_bytes(fused) / resident_bytes(dense),
            "fused / stored": resident_bytes(fused) / array_bytes(archive),
            "asked": "<= 1.1",
        }
    ]
    report.table(
        f"Resident weights, SmolLM2, {SHARED}, rank {RANK}",
        rows,
        "The archive's bases are compressed, the resident ones are not.",
    )
    forward(report, dense, fused, archive)


def array_bytes(archive: Path) -> int:
    """Bytes of all stored arrays of an archive, as they are in memory."""
    with deltafmt.open(archive) as opened:
        return sum(array.numel * array.dtype.width for array in opened._archive.manifest.arrays.values())


def forward(report: Report, dense: torch.nn.Module, fused: torch.nn.Module, archive: Path) -> None:
    """One token each for a batch of 1 and 64, in float32 (bfloat16 is slow on most processors)."""
    dense, fused = dense.float().eval(), fused.float().eval()
    hidden = int(dense.config.hidden_size)  # type: ignore[union-attr,arg-type]
    with deltafmt.open(archive, framework="pt") as opened:
        sums = dict(zip(products(opened._archive.manifest), operands(opened), strict=True))
    weights = [dense.get_parameter(name) for name in sums]
    rows: list[dict[str, Cell]] = []
    inputs = [torch.arange(batch)[:, None] + 100 for batch in (1, 64)]
    for tokens in inputs:
        with torch.no_grad():
            seconds = in_turns(
                {
                    "dense": Timed(lambda tokens=tokens: dense(tokens)),
                    "fused": Timed(lambda tokens=tokens: fused(tokens)),
                },
                5,
            )
            others = fused(tokens).logits
        logits = dense(tokens).logits
        apart = (logits.detach() - others).abs()
        worst = int(apart.argmax())
        bound = logit_bound(logits.flatten()[worst], weights)
        if apart.flatten()[worst] > bound:
            raise SystemExit("logits are further apart than rounding explains")
        rows.append(
            {
                "batch": len(tokens),
                **{f"{name}, s": value for name, value in seconds.items()},
                "fused / dense": seconds["fused"] / seconds["dense"],
                "asked: overhead 2r/d": 2 * RANK / hidden,
                "logits, largest": float(logits.detach().abs().max()),
                "furthest apart": float(apart.max()),
                "asked: its bound": bound,
            }
        )
    with torch.no_grad():
        for name, (base, b, a, scale) in sums.items():
            dense.get_parameter(name).copy_(torch.addmm(base.float(), b.T, a, alpha=scale))
        for row, tokens in zip(rows, inputs, strict=True):
            row["furthest apart, dense not rounded"] = float((dense(tokens).logits - fused(tokens).logits).abs().max())
    note = """Bound: the dense model has each sum W = base + B A rounded to bf16, error e, |e| <= 2^-8 |W|; the fused
one never rounds it. To first order a logit z moves by the sum of e dz/dW over all these weights. Rounding errors taken
as independent and of mean 0, Hoeffding's inequality says that it moves by more than t with a probability of at most
2 exp(-t^2 / 2 s^2), where s is 2^-8 times the norm of W dz/dW: at t = 8 s less than one in 10^13. s is worked out for
the logit that moved most. What fp32 rounds in the products, about (d + r) 2^-24, is a hundredth of that. The last
column is that alone: the dense model has the same sums, of the same factors, in fp32."""
    report.table("Forward, one token each, fp32", rows, note)


def logit_bound(logit: torch.Tensor, weights: list[torch.nn.Parameter]) -> float:
    """How far one logit moves at most, to first order, if each of these weights is rounded to bf16.

    By Hoeffding (1963), theorem 2: the chance that it moves further is less than 2 exp(-DEVIATIONS^2 / 2).
    """
    slopes = torch.autograd.grad(logit, weights)
    squares = [float((weight.detach() * slope).square().sum()) for weight, slope in zip(weights, slopes, strict=True)]
    return DEVIATIONS * BF16_ROUNDING * math.sqrt(math.fsum(squares))


# --- Five fine-tunes of one base ------------------------------------------------------------------------------------


def tenants(report: Report, work: Path, _repeats: int) -> None:
    """The real fine-tune of MiniLM and four made ones, fused, in one process."""
    base = fixtures.minilm()
    made = [merges.fine_tuned(base, work / f"tenant-{seed}", seed=seed) for seed in range(TENANTS - 1)]
    archives = []
    for place, model in enumerate([fixtures.finetune(), *made]):
        archives.append(work / f"tenant-packed-{place}")
        deltafmt.pack(model, archives[-1], base=base, rank=16, force=True)
    cache = deltafmt.torch.BaseCache()
    models = [deltafmt.torch.load_model(archive, "fused", base=base, bases=cache) for archive in archives]
    own = [array_bytes(archive) for archive in archives]
    alone = sum(tensor.nbytes for tensor in load_file(base / "model.safetensors").values())
    rows: list[dict[str, Cell]] = [
        {
            "fine-tunes": TENANTS,
            "base MB": alone / 1e6,
            "stored beside it, all five, MB": sum(own) / 1e6,
            "resident MB": resident_bytes(*models) / 1e6,
            "each by itself, MB": sum(map(resident_bytes, models)) / 1e6,
            "resident / (base once + stored)": resident_bytes(*models) / (alone + sum(own)),
            "asked": "<= 1.1, base once",
        }
    ]
    report.table("Five fused fine-tunes of MiniLM, rank 16, fp32", rows)
