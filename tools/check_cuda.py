"""What can only be seen on a GPU: that numbers are the same there, that models fill it, and how fast fused layers are.

- exact: sums of a base and integer factors on the device, in full precision and with TF32 (which must give others);
- load: a model of shared layers (random, Llama-shaped) dense, fused and lazy: weights and logits compared, memory;
- swap: two fine-tunes of one base, in place and in one batch;
- forward: fused beside dense, one token for each of 1 and 64 sequences, as it is and compiled.

Says what differs and ends with 1 if anything does. Needs `deltafmt[hf]`. With `--device cpu` it runs anywhere.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import deltafmt
import deltafmt.torch
import merges
from exact_factors import at_the_bound, by_torch
from measure import Cell, Report

RANK = 64
PROMPT = 32


class Findings:
    """What was not as it should be."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def expect(self, what: str, true: bool) -> str:
        """Note it if it is not true; returns what to print."""
        if not true:
            self.wrong.append(what)
        return "yes" if true else "NO"


# --- Exact ----------------------------------------------------------------------------------------------------------


def exact(report: Report, findings: Findings, device: torch.device, side: int) -> None:
    """Base and integer factors whose products need every bit of float32, added up on the device."""
    rows: list[dict[str, Cell]] = []
    for rank in (16, 64, 256):
        case = at_the_bound(rank, (side, side))
        delta = (case.b.T.astype(np.float64) @ case.a.astype(np.float64)) * 2.0**case.exponent
        # In float64 nothing has been rounded yet: products are integers up to 2^24, and the base is near them.
        expected = (case.base.astype(np.float64) + delta).astype(np.float32).view(np.uint32)
        found = {}
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            found[precision] = by_torch(case, "F32", device)
        torch.set_float32_matmul_precision("highest")
        same = findings.expect(f"exact sums, rank {rank}", np.array_equal(found["highest"], expected))
        # The check can fail: with TF32, where there is such a thing, the numbers are others.
        other = int(np.count_nonzero(found["high"] != expected))
        if device.type == "cuda":
            findings.expect(f"TF32 gives other sums, rank {rank}", other > 0)
        rows.append(
            {"rank": rank, "full precision": same, "elements that TF32 changes": f"{other / expected.size:.1%}"}
        )
    report.table(f"Integer factors, {side} x {side}, on {device}", rows)


# --- Models ---------------------------------------------------------------------------------------------------------


def shared_layers(path: Path, hidden: int, layers: int) -> Path:
    """A random Llama in bf16 whose odd layers are the layer before and a difference of rank `RANK`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=8192,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).bfloat16()
    blocks = model.model.layers
    for anchor, block in zip(blocks[::2], blocks[1::2], strict=True):
        for weight, own in zip(anchor.parameters(), block.parameters(), strict=True):
            if own.ndim == 2:
                b, a = torch.randn(own.shape[0], RANK), torch.randn(RANK, own.shape[1])
                own.data = (weight.data.float() + 0.02 / RANK**0.5 * 0.3 * (b @ a)).bfloat16()
    model.save_pretrained(path)
    return path


def loads(report: Report, findings: Findings, work: Path, device: torch.device, hidden: int, layers: int) -> Any:
    """Dense, fused and lazy, from one lossy and one lossless archive. Returns the dense and the fused model."""
    source = shared_layers(work / "source", hidden, layers)
    archive, lossless = work / "archive", work / "lossless"
    share = ",".join(f"{anchor + 1}:{anchor}" for anchor in range(0, layers, 2))
    deltafmt.pack(source, archive, method="lowrank", share=share, rank=RANK)
    deltafmt.pack(source, lossless)
    original = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16).to(device).eval()
    ids = torch.arange(2 * PROMPT, device=device).reshape(2, PROMPT)
    rows: list[dict[str, Cell]] = []
    models: dict[str, Any] = {}

    def measured(name: str, load: Callable[[], Any], reference: torch.Tensor | None, bound: float) -> torch.Tensor:
        before = allocated(device)
        begin = time.perf_counter()
        model = load()
        synchronize(device)
        seconds = time.perf_counter() - begin
        with torch.inference_mode():
            logits: torch.Tensor = model(ids).logits.float()
        models[name] = model
        apart = 0.0 if reference is None else float((logits - reference).norm() / reference.norm())
        findings.expect(f"{name}: logits", apart <= bound)
        findings.expect(f"{name}: on the device", all(each.device.type == device.type for each in model.parameters()))
        rows.append(
            {"model": name, "seconds": seconds, "MB on the device": (allocated(device) - before) / 1e6, "logits": apart}
        )
        return logits

    load = deltafmt.torch.load_model
    with torch.inference_mode():
        plain = original(ids).logits.float()
    measured("lossless, full", lambda: load(lossless, device=device), plain, 0.0)
    state, loaded = original.state_dict(), models["lossless, full"].state_dict()
    same = all(torch.equal(state[name].view(torch.int16), loaded[name].view(torch.int16)) for name in state)
    findings.expect("lossless, full: weights", same and state.keys() == loaded.keys())
    del models["lossless, full"], state, loaded
    measured("lossless, lazy", lambda: load(lossless, "lazy", device=device), plain, 0.0)
    del models["lossless, lazy"]
    dense = measured("lossy, full", lambda: load(archive, device=device), None, 0.0)
    # Dense weights are rounded to bf16 once more, the fused product is rounded by itself: a few steps of 2^-9 each.
    measured("lossy, fused", lambda: load(archive, "fused", device=device), dense, 0.03)
    measured("lossy, fused, fp32", lambda: load(archive, "fused", device=device, dtype=torch.float32), dense, 0.03)
    del models["lossy, fused, fp32"]
    stored = sum(file.stat().st_size for file in archive.iterdir())
    note = f"{original.num_parameters() / 1e6:.0f} M parameters; the lossy archive is {stored / 1e6:.0f} MB. "
    report.table(f"A model of shared layers on {device}", rows, note + "logits: relative distance.")
    generated = [
        models[name].generate(ids[:, :8], attention_mask=torch.ones_like(ids[:, :8]), max_new_tokens=8, do_sample=False)
        for name in models
    ]
    findings.expect("generate", all(each.shape == (2, 16) for each in generated))
    return models["lossy, full"], models["lossy, fused"]


def tenants(report: Report, findings: Findings, work: Path, device: torch.device) -> None:
    """Two merged LoRAs of one base: loaded fused on the device, swapped, and both in one batch."""
    base = shared_layers(work / "base", 256, 4)
    archives = []
    for seed in (1, 2):
        merged = merges.merged_lora(base, work / f"merged{seed}", 8, 2.0, seed)
        archives.append(work / f"tuned{seed}")
        deltafmt.pack(merged, archives[-1], base=base)
    cache = deltafmt.torch.BaseCache()
    both = [
        deltafmt.torch.load_model(path, "fused", base=base, bases=cache, device=device, dtype=torch.float32)
        for path in archives
    ]
    ids = torch.arange(2 * PROMPT, device=device).reshape(2, PROMPT)
    with torch.inference_mode():
        alone = [model(ids).logits for model in both]
        together = deltafmt.torch.MultiTenant(both)(ids, rows=[1, 0]).logits
        deltafmt.torch.swap(both[0], archives[1])
        swapped = both[0](ids).logits
    differ = float((alone[0] - alone[1]).abs().max())
    apart = max(float((together[0] - alone[1][0]).abs().max()), float((together[1] - alone[0][1]).abs().max()))
    row: dict[str, Cell] = {
        "two fine-tunes differ by": differ,
        "a row of the batch and alone": apart,
        "after swap": findings.expect("swap", torch.equal(swapped, alone[1])),
    }
    findings.expect("rows of a batch", apart < 1e-3 < differ)
    report.table(f"Two fine-tunes of one base on {device}", [row], "Largest differences of logits, fp32.")


# --- Forward --------------------------------------------------------------------------------------------------------


def forward(report: Report, findings: Findings, dense: Any, fused: Any, device: torch.device, repeats: int) -> None:
    """One token of each sequence, bf16; ms, median."""
    rows: list[dict[str, Cell]] = []
    hidden, wide = dense.config.hidden_size, dense.config.intermediate_size
    added = RANK * (hidden + wide) / (hidden * wide)
    for compiled in (False, True):
        ways = {"dense": dense, "fused": fused}
        if compiled:
            ways = {name: torch.compile(model) for name, model in ways.items()}
        for batch in (1, 64):
            ids = torch.arange(batch, device=device)[:, None]
            with torch.inference_mode():
                logits = {name: model(ids, use_cache=False).logits.float() for name, model in ways.items()}
                took = {
                    name: median_ms(partial(model, ids, use_cache=False), device, repeats)
                    for name, model in ways.items()
                }
            apart = float((logits["fused"] - logits["dense"]).norm() / logits["dense"].norm())
            findings.expect(f"fused forward, batch {batch}, compiled {compiled}", apart <= 0.03)
            rows.append(
                {
                    "batch": batch,
                    "compiled": "yes" if compiled else "no",
                    **took,
                    "fused / dense": took["fused"] / took["dense"],
                    "arithmetic added to an MLP layer": added,
                    "logits apart": apart,
                }
            )
    report.table(f"Forward on {device}, bf16, rank {RANK}", rows, "ms, median.")


def median_ms(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median over runs, after a few that are not counted."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    return float(np.median(times))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int:
    """Bytes of the device's memory that tensors take."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", action="store_true", help="JSON instead of markdown")
    options = parser.parse_args()
    report, findings = Report(options.json), Findings()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        exact(report, findings, options.device, 4096 if options.device.type == "cuda" else 512)
        tenants(report, findings, work, options.device)
        dense, fused = loads(report, findings, work, options.device, options.hidden, options.layers)
        forward(report, findings, dense, fused, options.device, options.repeats)
    report.finish()
    if findings.wrong:
        raise SystemExit("not as it should be: " + "; ".join(findings.wrong))


if __name__ == "__main__":
    main()
