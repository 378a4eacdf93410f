"""Loading and running packed models with torch: what it costs beside plain checkpoints, on real models.

- load: every tensor of a lossless archive as torch tensors, beside `safetensors.torch.load_file` of the original, cold
  and warm, and ZipNN;
- merge: one layer's `base + B A`, beside PEFT's `merge_and_unload` of the same layer;
- low rank: a whole model of shared layers and factors, beside the limit (reading the bytes, and the bare products);
- memory: what a fused model keeps resident, beside the dense one and beside what the archive stores;
- forward: fused beside dense, at batch 1 and 64, with the arithmetic that the factors add;
- first tensor: from nothing to one small tensor, on archives of different sizes.

MiniLM and its fine-tune are real; SmolLM2's weights are dequantised, and sharing its layers without training (as here)
ruins the model: sizes and times are real, what it says is not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from zipnn import ZipNN

import deltafmt
import deltafmt.torch
import fixtures
import synthetic
import train_lora
from measure import Cell, Report, Timed, in_turns

THREADS = 2
WEIGHTS = "model.safetensors"
SIDE = 4096
SHARED = "sequential:3"
RANK = 64


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
        warm = in_turns(
            {
                "deltafmt": Timed(load),
                "safetensors": Timed(plain),
                "ZipNN": Timed(lambda zipped=zipped: unzip_weights(zipped)),
            },
            repeats,
        )
        cold = {
            "deltafmt": cold_seconds(load, read, repeats),
            "safetensors": cold_seconds(plain, [model / WEIGHTS], repeats),
        }
        rows.append(
            {
                "model": title,
                **{f"{name}, warm s": seconds for name, seconds in warm.items()},
                **{f"{name}, cold s": seconds for name, seconds in cold.items()},
                "times safetensors, warm": warm["deltafmt"] / warm["safetensors"],
                "cold": cold["deltafmt"] / cold["safetensors"],
                "times ZipNN, warm": warm["deltafmt"] / warm["ZipNN"],
            }
        )
    note = "All tensors. Of the base, digests are checked. What safetensors maps is copied. ZipNN uses no base."
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


def zip_weights(model: Path, folder: Path) -> Path:
    """Each tensor compressed by ZipNN into a file of its own."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for index, tensor in enumerate(load_file(model / WEIGHTS).values()):
        if tensor.is_floating_point():
            codec = ZipNN(input_format="torch", threads=THREADS)
            (folder / str(index)).write_bytes(codec.compress(tensor))
    return folder


def unzip_weights(folder: Path) -> list[Any]:
    """What `zip_weights` wrote, as tensors."""
    codec = ZipNN(input_format="torch", threads=THREADS)
    return [codec.decompress(path.read_bytes()) for path in sorted(folder.iterdir())]


# --- Merging one layer ----------------------------------------------------------------------------------------------


def merging(report: Report, work: Path, repeats: int) -> None:
    """`base + B A -> bf16` of one layer of 4096 x 4096."""
    rows = [_merge_row(work, rank, repeats) for rank in (16, 64)]
    note = "GB/s of bf16 output. deltafmt reads base and factors from files (cached)."
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

    def unmerged() -> tuple[()]:
        if layer.merged:
            layer.unmerge()
        return ()

    with deltafmt.open(work / "layer", base=work / "layer-base", framework="pt") as archive:
        timed = {"PEFT": Timed(layer.merge, unmerged), "deltafmt": Timed(lambda: archive.get_tensor("weight"))}
        speed = {name: weight.nbytes / seconds / 1e9 for name, seconds in in_turns(timed, repeats).items()}
    return {"rank": rank, **speed, "times as fast": speed["deltafmt"] / speed["PEFT"]}


# --- Shared layers --------------------------------------------------------------------------------------------------


def shared_model(work: Path) -> tuple[Path, Path]:
    """SmolLM2 in bf16, and its archive of shared layers and factors."""
    model = train_lora.base("smollm2", "bfloat16")
    archive = work / "shared"
    deltafmt.pack(model, archive, method="lowrank", share=SHARED, rank=RANK, force=True)
    return model, archive


def low_rank_load(report: Report, archive: Path, repeats: int) -> None:
    """Everything of a model of shared layers, beside the limit."""
    opened = deltafmt.open(archive)
    manifest = opened._archive.manifest
    files = [path for path in archive.iterdir() if path.suffix == ".safetensors"]
    products = [tensor for tensor in manifest.tensors.values() if "lowrank" in str(tensor.recipe.to_json())]
    shapes = [tensor.shape for tensor in products]
    operands = {
        shape: (torch.zeros(shape), torch.randn(shape[0], RANK), torch.randn(RANK, shape[1])) for shape in set(shapes)
    }
    opened.close()

    def limit() -> None:
        for path in files:
            np.fromfile(path, np.uint8)
        for shape in shapes:
            base, b, a = operands[shape]
            torch.addmm(base, b, a)

    seconds = in_turns(
        {
            "deltafmt": Timed(lambda: deltafmt.torch.load_state_dict(archive)),
            "limit: read + addmm": Timed(limit),
        },
        repeats,
    )
    rows: list[dict[str, Cell]] = [
        {
            "tensors": len(manifest.tensors),
            "of them products": len(shapes),
            **{f"{name}, s": value for name, value in seconds.items()},
            "times the limit": seconds["deltafmt"] / seconds["limit: read + addmm"],
        }
    ]
    report.table(f"Full load of shared layers, SmolLM2, {SHARED}, rank {RANK}", rows)


def memory(report: Report, model: Path, archive: Path) -> None:
    """Bytes of all parameters and buffers, each memory counted once."""
    dense = deltafmt.torch.load_model(archive, "full")
    fused = deltafmt.torch.load_model(archive, "fused")
    with deltafmt.open(archive) as opened:
        stored = sum(array.numel * array.dtype.width for array in opened._archive.manifest.arrays.values())
    rows: list[dict[str, Cell]] = [
        {
            "dense MB": resident(dense) / 1e6,
            "fused MB": resident(fused) / 1e6,
            "stored arrays, not compressed, MB": stored / 1e6,
            "fused / dense": resident(fused) / resident(dense),
            "fused / stored": resident(fused) / stored,
        }
    ]
    report.table(
        f"Resident weights, SmolLM2, {SHARED}, rank {RANK}",
        rows,
        "The archive's bases are compressed, the resident ones are not.",
    )
    forward(report, dense, fused)


def resident(model: torch.nn.Module) -> int:
    """Bytes of the storages of a model's parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def forward(report: Report, dense: torch.nn.Module, fused: torch.nn.Module) -> None:
    """One token each for a batch of 1 and 64, in float32 (bfloat16 is slow on most processors)."""
    dense, fused = dense.float().eval(), fused.float().eval()
    hidden = int(dense.config.hidden_size)  # type: ignore[union-attr,arg-type]
    rows: list[dict[str, Cell]] = []
    with torch.no_grad():
        for batch in (1, 64):
            tokens = torch.arange(batch)[:, None] + 100
            seconds = in_turns(
                {
                    "dense": Timed(lambda tokens=tokens: dense(tokens)),
                    "fused": Timed(lambda tokens=tokens: fused(tokens)),
                },
                5,
            )
            apart = (dense(tokens).logits - fused(tokens).logits).abs().max() / dense(tokens).logits.abs().max()
            rows.append(
                {
                    "batch": batch,
                    **{f"{name}, s": value for name, value in seconds.items()},
                    "fused / dense": seconds["fused"] / seconds["dense"],
                    "2r/d": 2 * RANK / hidden,
                    "logits apart, relative": float(apart),
                }
            )
    report.table("Forward, one token each, fp32", rows)


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
    report.table("Time to first tensor", rows, "From a path to the smallest tensor; torch is imported already.")


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="JSON instead of markdown")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, of which the median counts")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    report = Report(options.json)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        loading(report, work, options.repeats)
        merging(report, work, options.repeats)
        model, archive = shared_model(work)
        low_rank_load(report, archive, options.repeats)
        memory(report, model, archive)
        first_tensor(report, work, options.repeats)
    report.finish()


if __name__ == "__main__":
    main()
