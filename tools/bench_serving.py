"""Loading and running packed models with torch: what it costs beside plain checkpoints, on real models.

- load: every tensor of a lossless archive as torch tensors, beside `safetensors.torch.load_file` of the original and
  ZipNN, cold and warm;
- merge: one layer's `base + B A`, beside PEFT's `merge_and_unload` of the same layer, and beside the same in torch, in
  blocks of rows;
- shared: a whole model of shared layers and factors, beside the limit (reading the bytes, and the bare products); what
  a fused model keeps resident, beside the dense one and beside what the archive stores; forward passes, fused beside
  dense, at batch 1 and 64, with the arithmetic that the factors add, and how far the logits are apart;
- tenants: five fused fine-tunes of one base in one process;
- first: from nothing to one small tensor, on archives of different sizes.

Where a figure was asked for, the table has it beside what was measured.

MiniLM and its fine-tune are real; SmolLM2's weights are dequantised, and sharing its layers without training (as here)
ruins the model: sizes and times are real, what it says is not.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from zipnn import ZipNN

import deltafmt
import deltafmt.torch
import fixtures
import merges
import synthetic
import train_lora
from deltafmt.manifest import Manifest
from deltafmt.operators import Lowrank, Ref, Stored, Sum
from measure import Cell, Report, Timed, in_turns

THREADS = 2
WEIGHTS = "model.safetensors"
SIDE = 4096
SHARED = "sequential:3"
RANK = 64
BLOCK = 256  # rows
TENANTS = 5
BF16_ROUNDING = 2.0**-8
"""Rounding to nearest changes a normal number by at most this share of it."""
DEVIATIONS = 8


# --- Loading --------------------------------------------------------------------------------------------------------


def loading(report: Report, work: Path, repeats: int) -> None:
    """The fine-tune of pair A against its base, and the base by itself."""
    base32, tuned32 = fixtures.minilm(), fixtures.finetune()
    base16 = synthetic.cast_checkpoint(base32, work / "base16", "BF16")
    tuned16 = synthetic.cast_checkpoint(tuned32, work / "tuned16", "BF16")
    cases = {
        "fine-tune, bf16": (tuned16, base16),
        "fine-tune, fp32": (tuned32, base32),
        "base alone, bf16": (base16, None),
    }
    rows: list[dict[str, Cell]] = []
    for title, (model, base) in cases.items():
        archive = work / "archive"
        deltafmt.pack(model, archive, base=base, overwrite=True)
        zipped = zip_weights(model, work / "zipped")
        read = [*archive.glob("*.safetensors"), *([base / WEIGHTS] if base else [])]

        def load(archive: Path = archive, base: Path | None = base) -> object:
            return deltafmt.torch.load_state_dict(archive, base=base)

        def plain(model: Path = model) -> object:
            return {name: tensor.clone() for name, tensor in load_file(model / WEIGHTS).items()}

        expected = load_file(model / WEIGHTS)
        if not equal(expected, deltafmt.torch.load_state_dict(archive, base=base)):
            raise SystemExit(f"{title}: not the original")
        if not equal({name: expected[name] for name in zipped}, unzipped(zipped)):
            raise SystemExit(f"{title}: ZipNN does not give the original")
        warm = in_turns(
            {
                "deltafmt": Timed(load),
                "safetensors": Timed(plain),
                "ZipNN": Timed(lambda zipped=zipped: unzipped(zipped)),
            },
            repeats,
        )
        cold = {
            "deltafmt": cold_seconds(load, read, repeats),
            "safetensors": cold_seconds(plain, [model / WEIGHTS], repeats),
            "ZipNN": cold_seconds(lambda zipped=zipped: unzipped(zipped), zipped.values(), repeats),  # type: ignore[misc]
        }
        rows.append(
            {
                "model": title,
                **{f"{name}, warm s": seconds for name, seconds in warm.items()},
                **{f"{name}, cold s": seconds for name, seconds in cold.items()},
                "times safetensors, warm": warm["deltafmt"] / warm["safetensors"],
                "times safetensors, cold": cold["deltafmt"] / cold["safetensors"],
                "times ZipNN, warm": warm["deltafmt"] / warm["ZipNN"],
                "times ZipNN, cold": cold["deltafmt"] / cold["ZipNN"],
            }
        )
    note = "All tensors. Of the base, digests are checked. What safetensors maps is copied. ZipNN uses no base."
    note += " Every load gave the original, bit for bit. No ratio was asked for."
    report.table("Full load of lossless archives", rows, note)


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """The same names, dtypes and bits."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def cold_seconds(load: Callable[[], object], files: Iterable[Path], repeats: int) -> float:
    """Median seconds with the files out of the page cache, as far as the system lets go of them."""
    seconds = []
    for _ in range(repeats):
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        load()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def zip_weights(model: Path, folder: Path) -> dict[str, Path]:
    """Each float tensor compressed by ZipNN into a file of its own: name -> file."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    files = {}
    for index, (name, tensor) in enumerate(load_file(model / WEIGHTS).items()):
        if tensor.is_floating_point():
            codec = ZipNN(input_format="torch", threads=THREADS)
            files[name] = folder / str(index)
            files[name].write_bytes(codec.compress(tensor))
    return files


def unzipped(files: Mapping[str, Path]) -> dict[str, torch.Tensor]:
    """What `zip_weights` wrote, as tensors."""
    codec = ZipNN(input_format="torch", threads=THREADS)
    return {name: codec.decompress(path.read_bytes()) for name, path in files.items()}


# --- Merging one layer ----------------------------------------------------------------------------------------------


def merging(report: Report, work: Path, repeats: int) -> None:
    """`base + B A -> bf16` of one layer of 4096 x 4096."""
    rows = [_merge_row(work, rank, repeats) for rank in (16, 64)]
    note = f"""GB/s of bf16 output. deltafmt reads base and factors from files (cached); the others have them in memory.
Blocks: {BLOCK} rows at a time, in fp32 in one buffer that is there, into a result that is there.
Asked for: a comparison with PEFT, where 0.13-0.15 GB/s were measured, and 1.26 in blocks of rows."""
    report.table(f"Merging one layer, {SIDE} x {SIDE}", rows, note)


def _merge_row(work: Path, rank: int, repeats: int) -> dict[str, Cell]:
    base = torch.nn.Sequential(torch.nn.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
    layer = get_peft_model(base, config).base_model.model[0]
    weight = layer.base_layer.weight.detach().clone()
    for folder, tensor in (("layer-base", weight), ("layer-tuned", weight + layer.get_delta_weight("default"))):
        (work / folder).mkdir(exist_ok=True)
        save_file({"weight": tensor.to(torch.bfloat16)}, work / folder / WEIGHTS)
    deltafmt.pack(work / "layer-tuned", work / "layer", base=work / "layer-base", rank=rank, overwrite=True)

    lora_a, lora_b = (layer.get_submodule(f"lora_{letter}.default").weight.detach().float() for letter in "AB")
    buffer, merged = torch.empty(BLOCK, SIDE), torch.empty_like(weight)

    def blocks() -> None:
        for top in range(0, SIDE, BLOCK):
            rows = slice(top, top + BLOCK)
            merged[rows] = buffer.copy_(weight[rows]).addmm_(lora_b[rows], lora_a)

    def unmerged() -> tuple[()]:
        if layer.merged:
            layer.unmerge()
        return ()

    with deltafmt.open(work / "layer", base=work / "layer-base", framework="pt") as archive:
        timed = {
            "PEFT": Timed(layer.merge, unmerged),
            "torch in blocks": Timed(blocks),
            "deltafmt": Timed(lambda: archive.get_tensor("weight")),
        }
        speed = {name: weight.nbytes / seconds / 1e9 for name, seconds in in_turns(timed, repeats).items()}
    ratios = {f"times {name}": speed["deltafmt"] / speed[name] for name in ("PEFT", "torch in blocks")}
    return {"rank": rank, **speed, **ratios}


# --- Shared layers --------------------------------------------------------------------------------------------------


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

    def limit(dtype: torch.dtype) -> Callable[[], None]:
        ready = [(base.to(dtype), b.to(dtype).T, a.to(dtype), scale) for base, b, a, scale in sums]

        def run() -> None:
            for path in files:
                np.fromfile(path, np.uint8)
            for base, b, a, scale in ready:
                torch.addmm(base, b, a, alpha=scale)

        return run

    dtype = sums[0][0].dtype
    limits = {f"limit, {str(each).removeprefix('torch.')}": limit(each) for each in {dtype: 0, torch.float32: 0}}
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
    note = (
        "The limit reads the files, and calls addmm with the weights of the model itself, in its own dtype and in fp32."
    )
    report.table(f"Full load of shared layers, SmolLM2, {SHARED}, rank {RANK}", rows, note)


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
            "dense MB": resident(dense) / 1e6,
            "fused MB": resident(fused) / 1e6,
            "stored arrays, not compressed, MB": stored_bytes(archive) / 1e6,
            "fused / dense": resident(fused) / resident(dense),
            "fused / stored": resident(fused) / stored_bytes(archive),
            "asked": "<= 1.1",
        }
    ]
    report.table(
        f"Resident weights, SmolLM2, {SHARED}, rank {RANK}",
        rows,
        "The archive's bases are compressed, the resident ones are not.",
    )
    with deltafmt.open(archive) as opened:
        forward(report, dense, fused, products(opened._archive.manifest))


def stored_bytes(archive: Path) -> int:
    """Bytes of all stored arrays of an archive, as they are in memory."""
    with deltafmt.open(archive) as opened:
        return sum(array.numel * array.dtype.width for array in opened._archive.manifest.arrays.values())


def resident(*models: torch.nn.Module) -> int:
    """Bytes of the storages of models' parameters and buffers, each counted once."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def forward(report: Report, dense: torch.nn.Module, fused: torch.nn.Module, made: Iterable[str]) -> None:
    """One token each for a batch of 1 and 64, in float32 (bfloat16 is slow on most processors)."""
    dense, fused = dense.float().eval(), fused.float().eval()
    hidden = int(dense.config.hidden_size)  # type: ignore[union-attr,arg-type]
    weights = [weight for name, weight in dense.named_parameters() if name in set(made)]
    rows: list[dict[str, Cell]] = []
    for batch in (1, 64):
        tokens = torch.arange(batch)[:, None] + 100
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
                "batch": batch,
                **{f"{name}, s": value for name, value in seconds.items()},
                "fused / dense": seconds["fused"] / seconds["dense"],
                "asked: overhead 2r/d": 2 * RANK / hidden,
                "logits, largest": float(logits.detach().abs().max()),
                "furthest apart": float(apart.max()),
                "asked: its bound": bound,
            }
        )
    note = """Bound: the dense model has each sum W = base + B A rounded to bf16, error e, |e| <= 2^-8 |W|; the fused
one never rounds it. To first order a logit z moves by the sum of e dz/dW over all these weights. Rounding errors taken
as independent and of mean 0, Hoeffding's inequality says that it moves by more than t with a probability of at most
2 exp(-t^2 / 2 s^2), where s is 2^-8 times the norm of W dz/dW: at t = 8 s less than one in 10^13. s is worked out for
the logit that moved most. What fp32 rounds in the products, about (d + r) 2^-24, is a hundredth of that."""
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
    own = [stored_bytes(archive) for archive in archives]
    alone = sum(tensor.nbytes for tensor in load_file(base / WEIGHTS).values())
    rows: list[dict[str, Cell]] = [
        {
            "fine-tunes": TENANTS,
            "base MB": alone / 1e6,
            "stored beside it, all five, MB": sum(own) / 1e6,
            "resident MB": resident(*models) / 1e6,
            "each by itself, MB": sum(map(resident, models)) / 1e6,
            "resident / (base once + stored)": resident(*models) / (alone + sum(own)),
            "asked": "<= 1.1, base once",
        }
    ]
    report.table("Five fused fine-tunes of MiniLM, rank 16, fp32", rows)


# --- First tensor ---------------------------------------------------------------------------------------------------


def first_tensor(report: Report, work: Path, repeats: int) -> None:
    """Open, read one small tensor, close."""
    rows: list[dict[str, Cell]] = []
    for megabytes in (100, 1000):
        model, archive = work / f"random-{megabytes}", work / f"packed-{megabytes}"
        synthetic.sharded_random(model, megabytes * 10**6, 500 * 10**6)
        deltafmt.pack(model, archive)
        with deltafmt.open(archive) as opened:
            name = min(opened.keys(), key=lambda each: np.prod(opened.get_slice(each).get_shape()))

        def read(archive: Path = archive, name: str = name) -> None:
            with deltafmt.open(archive, framework="pt") as opened:
                opened.get_tensor(name)

        rows.append({"archive of MB": megabytes, "ms": 1000 * in_turns({"first": Timed(read)}, repeats)["first"]})
    report.table(
        "Time to first tensor",
        rows,
        "From a path to the smallest tensor; torch is imported already. No figure was asked for.",
    )


def shared(report: Report, work: Path, repeats: int) -> None:
    """All that is measured on the model of shared layers."""
    archive = shared_model(work)
    low_rank_load(report, archive, repeats)
    memory(report, archive)


PARTS: dict[str, Callable[[Report, Path, int], None]] = {
    "load": loading,
    "merge": merging,
    "shared": shared,
    "tenants": tenants,
    "first": first_tensor,
}


def main() -> None:
    """Run all parts, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="JSON instead of markdown")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, of which the median counts")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    torch.set_num_threads(THREADS)
    report = Report(options.json)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for part in options.parts or PARTS:
            PARTS[part](report, work, options.repeats)
    report.finish()


if __name__ == "__main__":
    main()
