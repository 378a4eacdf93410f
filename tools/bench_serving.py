"""Loading and running packed models with torch: what it costs beside plain checkpoints, on real models.

- load: every tensor of a lossless archive as torch tensors, beside `safetensors.torch.load_file` of the original and
  ZipNN, cold and warm;
- merge: one layer's `base + B A`, beside PEFT's `merge_and_unload` of a model of that layer, its `merge` of the layer,
  and beside the same in torch, in blocks of rows;
- shared: a whole model of shared layers and factors, beside the limit (getting the bytes, and the bare products); what
  a fused model keeps resident, beside the dense one and beside what the archive stores; forward passes, fused beside
  dense, at batch 1 and 64, with the arithmetic that the factors add, and how far the logits are apart;
- tenants: five fused fine-tunes of one base in one process;
- first: from nothing to one small tensor, on archives of different sizes, beside loading all of it.

Where a figure was asked for, the table has it beside what was measured.

MiniLM and its fine-tune are real; SmolLM2's weights are dequantised, and sharing its layers without training (as here)
ruins the model: sizes and times are real, what it says is not.
"""

from __future__ import annotations

import argparse
import copy
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
import synthetic
from measure import Cell, Report, Timed, in_turns
from serving_fused import shared, tenants

THREADS = 2
WEIGHTS = "model.safetensors"
SIDE = 4096
BLOCK = 256  # rows


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
PEFT: merge_and_unload of a model that is this layer, made anew before each run, and merge of the layer alone.
Blocks: {BLOCK} rows at a time, in fp32 in one buffer that is there, into a result that is there.
Asked for: a comparison with PEFT, where 0.13-0.15 GB/s were measured, and 1.26 in blocks of rows."""
    report.table(f"Merging one layer, {SIDE} x {SIDE}", rows, note)


def _merge_row(work: Path, rank: int, repeats: int) -> dict[str, Cell]:
    base = torch.nn.Sequential(torch.nn.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(base, config)
    unmerged, layer = copy.deepcopy(model), model.base_model.model[0]
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

    def unmerge() -> tuple[()]:
        if layer.merged:
            layer.unmerge()
        return ()

    with deltafmt.open(work / "layer", base=work / "layer-base", framework="pt") as archive:
        timed = {
            "merge_and_unload": Timed(lambda model: model.merge_and_unload(), lambda: (copy.deepcopy(unmerged),)),
            "layer.merge": Timed(layer.merge, unmerge),
            "torch in blocks": Timed(blocks),
            "deltafmt": Timed(lambda: archive.get_tensor("weight")),
        }
        speed = {name: weight.nbytes / seconds / 1e9 for name, seconds in in_turns(timed, repeats).items()}
    ratios = {f"times {name}": speed["deltafmt"] / speed[name] for name in speed if name != "deltafmt"}
    return {"rank": rank, **speed, **ratios}


# --- First tensor ---------------------------------------------------------------------------------------------------


def first_tensor(report: Report, work: Path, repeats: int) -> None:
    """Open, read one small tensor, close; beside the same with all tensors."""
    rows: list[dict[str, Cell]] = []
    for megabytes, hidden in ((10, 256), (100, 1024), (1000, 2048)):
        model, archive = work / f"random-{megabytes}", work / f"packed-{megabytes}"
        synthetic.sharded_random(model, megabytes * 10**6, 500 * 10**6, hidden=hidden, vocabulary=8 * hidden)
        deltafmt.pack(model, archive)
        with deltafmt.open(archive) as opened:
            names = opened.keys()
            name = min(names, key=lambda each: np.prod(opened.get_slice(each).get_shape()))

        def read(archive: Path = archive, name: str = name) -> None:
            with deltafmt.open(archive, framework="pt") as opened:
                opened.get_tensor(name)

        def load(archive: Path = archive) -> object:
            return deltafmt.torch.load_state_dict(archive)

        seconds = in_turns({"first": Timed(read), "all": Timed(load)}, repeats)
        rows.append(
            {
                "archive, MB": sum(path.stat().st_size for path in archive.iterdir()) / 1e6,
                "tensors": len(names),
                "first tensor, ms": 1000 * seconds["first"],
                "all, ms": 1000 * seconds["all"],
                "first / all": seconds["first"] / seconds["all"],
            }
        )
    note = "From a path to the smallest tensor, and to all of them; torch is imported already. No figure was asked for."
    report.table("Time to first tensor", rows, note)


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
