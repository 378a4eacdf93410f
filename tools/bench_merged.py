"""Fine-tunes against their bases, lossless: merged LoRAs, real and synthetic, and full fine-tunes, beside what exists.

- synthetic merges: `round_bf16(W + s B A)` of known rank and size, into two blocks of SmolLM2 and a 4096 x 4096 matrix;
- real merges: LoRAs trained, merged and saved by PEFT (see `train_lora.py`; the first run trains them);
- full fine-tunes: the real pair, in bf16 and fp32, and synthetic ones; the codec by itself, from memory to memory;
- other ways that a model comes from others: decayed rows, added tokens, an average, a SLERP, a merge rounded twice;
- time: reading one merged tensor beside a plain low-rank sum of the same shape that is not corrected.

All from files to files, on the same bytes, in turns, in one run. Every file must come back bit for bit (SHA-256).
Needs `deltafmt[torch,bench]`. SmolLM2's weights are dequantised: good for merges, where only the change is stored.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

import deltafmt
import fixtures
import merges
import patch_codec
import synthetic
import train_lora
from delta_peers import PEERS, THREADS, TUNED_PEERS, WEIGHTS, Measured, Pair
from deltafmt.pipeline import Pipeline
from measure import Cell, Report, Timed, in_turns
from plain_checkpoint import FLOATS, NUMPY, read_checkpoint, write_checkpoint

RANKS = (8, 16, 32, 64)
ULPS = (0.3, 1.0, 4.0, 16.0)
CROSS = [(rank, 1.0) for rank in RANKS] + [(16, ulps) for ulps in ULPS if ulps != 1.0]
"""Rank and size of the update: every rank at one size, every size at one rank."""

SIDE = 4096
BLOCKS = ("model.layers.0.", "model.layers.14.")


@dataclass(frozen=True)
class Ours:
    """What packing a pair came to: bytes in all, without sidecars, and by role; seconds there and back."""

    measured: Measured
    factors: int
    residual: int


@dataclass
class Speeds:
    """Original megabytes per second of everything that ran, by codec, there and back."""

    pack: dict[str, list[float]] = field(default_factory=dict)
    unpack: dict[str, list[float]] = field(default_factory=dict)

    def add(self, codec: str, pair: Pair, measured: Measured) -> None:
        """Count one run."""
        self.pack.setdefault(codec, []).append(pair.nbytes / measured.pack_seconds / 1e6)
        self.unpack.setdefault(codec, []).append(pair.nbytes / measured.unpack_seconds / 1e6)

    def rows(self) -> list[dict[str, Cell]]:
        """Medians over the cases."""
        return [
            {
                "codec": codec,
                "pack": statistics.median(self.pack[codec]),
                "unpack": statistics.median(self.unpack[codec]),
            }
            for codec in self.pack
        ]


# --- One pair -------------------------------------------------------------------------------------------------------


def measure(pair: Pair, work: Path, bases: Sequence[Path] = ()) -> Ours:
    """Pack with deltafmt, unpack, compare. `bases` are more bases, if there are several."""
    archive, restored = work / "archive", work / "restored"
    base = [pair.base, *bases] if bases else pair.base
    begin = time.perf_counter()
    report = deltafmt.pack(pair.model, archive, base=base, jobs=THREADS)
    packed = time.perf_counter()
    deltafmt.unpack(archive, restored, base=base, jobs=THREADS)
    end = time.perf_counter()
    if sha256(restored / WEIGHTS) != sha256(pair.model / WEIGHTS):
        raise SystemExit(f"{pair.model}: {restored} is not the original")
    roles = report.roles
    stored = report.stored_bytes - roles["sidecar"]
    shutil.rmtree(archive)
    shutil.rmtree(restored)
    return Ours(Measured(stored, packed - begin, end - packed), roles["factors"], roles["residual"])


def row(pair: Pair, work: Path, speeds: Speeds, bases: Sequence[Path] = ()) -> dict[str, Cell]:
    """deltafmt and its peers on one pair: stored bits per weight of the file."""
    weights = weights_of(pair.model)
    ours = measure(pair, work, bases)
    speeds.add("deltafmt", pair, ours.measured)
    cells: dict[str, Cell] = {
        "stored / input": ours.measured.stored / pair.nbytes,
        "bits per weight": 8 * ours.measured.stored / weights,
        "factors": 8 * ours.factors / weights,
        "residual": 8 * ours.residual / weights,
        "pack, s": ours.measured.pack_seconds,
        "unpack, s": ours.measured.unpack_seconds,
        "bit-exact": "yes",
    }
    for name, peer in PEERS.items():
        measured = peer.measure(pair, work / "peer")
        speeds.add(name, pair, measured)
        cells[name] = 8 * measured.stored / weights
    return cells


def weights_of(checkpoint: Path) -> int:
    """How many."""
    return sum(int(np.prod(tensor.shape)) for tensor in read_checkpoint(checkpoint))


def sha256(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- The parts ------------------------------------------------------------------------------------------------------


def smollm2_blocks(dst: Path) -> Path:
    """Two blocks of SmolLM2 in bf16: all linear shapes that it has."""
    tensors = read_checkpoint(train_lora.base("smollm2", "bfloat16"))
    write_checkpoint(dst, [tensor for tensor in tensors if tensor.name.startswith(BLOCKS) and len(tensor.shape) == 2])
    return dst


def large_matrix(dst: Path) -> Path:
    """One random bf16 matrix of 4096 x 4096."""
    write_checkpoint(dst, [synthetic.normal("model.layers.0.mlp.up_proj.weight", (SIDE, SIDE), [1, SIDE])])
    return dst


def synthetic_merges(report: Report, work: Path, quick: bool, speeds: Speeds) -> None:
    """Merges of known rank and size."""
    grid = [(rank, ulps) for rank in RANKS for ulps in ULPS]
    bases = {"SmolLM2, 2 blocks": (smollm2_blocks(work / "smollm2"), [(16, ulps) for ulps in ULPS] if quick else grid)}
    if not quick:
        bases["4096 x 4096"] = (large_matrix(work / "large"), CROSS)
    for title, (base, cases) in bases.items():
        rows: list[dict[str, Cell]] = []
        for rank, ulps in cases:
            model = merges.merged_lora(base, work / "merged", rank, ulps)
            truth = sum(16 * rank * sum(tensor.shape) for tensor in read_checkpoint(base))
            weights = weights_of(base)
            cells = row(Pair(model, base, "BF16"), work, speeds)
            rows.append({"rank": rank, "ulps": ulps, "bf16 factors": truth / weights, **cells})
            shutil.rmtree(model)
        note = "Bits per weight. ulps: rms of the update, in units in the last place at the weights' rms."
        report.table(f"Synthetic merges into {title}", rows, note)


def real_merges(report: Report, work: Path, speeds: Speeds) -> None:
    """What PEFT trained, merged and saved."""
    rows: list[dict[str, Cell]] = []
    for title, merge in train_lora.MERGES.items():
        base, model = train_lora.merged(merge)
        pair = Pair(model, base, next(key for key, value in FLOATS.items() if value == merge.saved))
        adapter = 2 * train_lora.adapter_weights(merge) / pair.nbytes
        cells = row(pair, work, speeds)
        rows.append({"merge": title, "ulps": update_ulps(pair), "adapter in bf16 / input": adapter, **cells})
    report.table("Merges trained and merged by PEFT", rows, "ulps: median over the changed tensors.")


def update_ulps(pair: Pair) -> float:
    """Median over changed tensors: rms of the change, in units in the last place at the base's rms."""
    base = {tensor.name: tensor for tensor in read_checkpoint(pair.base)}

    def sizes() -> Iterator[float]:
        for tensor in read_checkpoint(pair.model):
            old, new = (each.load().astype(np.float32) for each in (base[tensor.name], tensor))
            if (change := merges.root_mean_square(new - old)) > 0:
                yield change / merges.ulp(merges.root_mean_square(old), tensor.dtype)

    return statistics.median(sizes())


def full_fine_tunes(report: Report, work: Path, quick: bool, speeds: Speeds) -> None:
    """The real pair, and base plus noise."""
    base32, tuned32 = fixtures.minilm(), fixtures.finetune()
    base16 = synthetic.cast_checkpoint(base32, work / "base16", "BF16")
    cases = {"real, bf16": Pair(synthetic.cast_checkpoint(tuned32, work / "tuned16", "BF16"), base16, "BF16")}
    if not quick:
        cases["real, fp32"] = Pair(tuned32, base32, "F32")
    for deviation in (1e-3,) if quick else (1e-2, 1e-3, 1e-4):
        model = merges.fine_tuned(base16, work / f"noise-{deviation:g}", deviation)
        cases[f"noise of {deviation:g}, bf16"] = Pair(model, base16, "BF16")
    rows: list[dict[str, Cell]] = []
    for title, pair in cases.items():
        cells = row(pair, work, speeds)
        for name, peer in TUNED_PEERS.items():
            measured = peer.measure(pair, work / "peer")
            cells[name] = 8 * measured.stored / weights_of(pair.model)
            cells |= {f"{name} pack, s": measured.pack_seconds, f"{name} unpack, s": measured.unpack_seconds}
        rows.append({"fine-tune": title, **cells})
    report.table("Full fine-tunes", rows, "" if TUNED_PEERS else "Without z4ai, which is not installed.")


def codec(report: Report, work: Path, quick: bool, repeats: int) -> None:
    """The real pair from memory to memory, without checksums: what coding and decoding the differences takes."""
    pairs = {"bf16": Pair(work / "tuned16", work / "base16", "BF16")}
    if not quick:
        pairs["fp32"] = Pair(fixtures.finetune(), fixtures.minilm(), "F32")
    rows: list[dict[str, Cell]] = []
    with Pipeline(THREADS) as pipeline:
        for title, pair in pairs.items():
            tensors = _in_memory(pair)
            size = sum(each.bits.nbytes for each in tensors)
            encoded = patch_codec.encode(tensors, pipeline)
            for each, out in zip(encoded, patch_codec.decode(encoded, pipeline), strict=True):
                if not np.array_equal(each.tuned.bits, out):
                    raise SystemExit(f"{title}: {each.tuned.name} is not the original")
            timed = {
                "pack": Timed(partial(patch_codec.encode, tensors, pipeline)),
                "unpack": Timed(partial(patch_codec.decode, encoded, pipeline)),
                "memory copy": Timed(lambda tensors=tensors: [each.bits.copy() for each in tensors]),
            }
            speed = {name: size / seconds / 1e6 for name, seconds in in_turns(timed, repeats).items()}
            ratio = sum(each.nbytes for each in encoded) / size
            rows.append({"fine-tune": f"real, {title}", "stored / input": ratio, **speed})
    report.table("Codec of fine-tunes, memory to memory", rows, "MB/s of original bytes, median.")


def _in_memory(pair: Pair) -> list[patch_codec.Tuned]:
    """The tensors of a pair that both have."""
    base = {tensor.name: tensor for tensor in read_checkpoint(pair.base)}
    unsigned = f"u{NUMPY[pair.dtype].itemsize}"
    return [
        patch_codec.Tuned(
            tensor.name,
            tensor.dtype,
            tensor.shape,
            *(each.load().reshape(-1).view(unsigned) for each in (tensor, base[tensor.name])),
        )
        for tensor in read_checkpoint(pair.model)
    ]


def other_merges(report: Report, work: Path, speeds: Speeds) -> None:
    """Everything else; in bf16, from the MiniLM pair that `full_fine_tunes` has left in `work`."""
    base, tuned = work / "base16", work / "tuned16"
    made = {
        "decayed rows": merges.decayed_rows(base, work / "decayed"),
        "8 tokens added": merges.tokens_added(base, work / "grown"),
        "average": merges.averaged(base, tuned, work / "average"),
        "SLERP": merges.slerped(base, tuned, work / "slerp"),
        "LoRA, rounded twice": merges.merged_lora(base, work / "twice", twice=True),
    }
    rows: list[dict[str, Cell]] = []
    for title, model in made.items():
        bases = [tuned] if title in ("average", "SLERP") else []
        # Peers know one base, of tensors of the same shapes.
        pair = Pair(model, base, "BF16")
        ours = measure(pair, work, bases)
        speeds.add("deltafmt", pair, ours.measured)
        rows.append(
            {
                "model": title,
                "bases": 1 + len(bases),
                "stored / input": ours.measured.stored / pair.nbytes,
                "pack, s": ours.measured.pack_seconds,
                "unpack, s": ours.measured.unpack_seconds,
                "bit-exact": "yes",
            }
        )
    report.table("Other merges, bf16", rows)


def reading_time(report: Report, work: Path, repeats: int) -> None:
    """Seconds to unpack a merged tensor, and to read it from an open archive; and the same of a low-rank sum of the
    same shape without residual."""
    base = work / "large"
    model = merges.merged_lora(base, work / "merged-16")
    name = read_checkpoint(base)[0].name
    begin = time.perf_counter()
    deltafmt.pack(model, work / "exact", base=base, jobs=THREADS)
    seconds = time.perf_counter() - begin
    deltafmt.pack(model, work / "plain", base=base, jobs=THREADS, rank=16)

    def unpack(archive: str) -> None:
        deltafmt.unpack(work / archive, work / "out", base=base, jobs=THREADS, overwrite=True)

    with (
        deltafmt.open(work / "exact", base=base, jobs=THREADS) as exact,
        deltafmt.open(work / "plain", base=base, jobs=THREADS) as plain,
    ):
        timed = {
            ("unpack", "merged, bit-exact"): Timed(lambda: unpack("exact")),
            ("unpack", "base + B A, no residual"): Timed(lambda: unpack("plain")),
            ("get_tensor", "merged, bit-exact"): Timed(lambda: exact.get_tensor(name)),
            ("get_tensor", "base + B A, no residual"): Timed(lambda: plain.get_tensor(name)),
        }
        taken = in_turns({", ".join(key): each for key, each in timed.items()}, repeats)
    rows: list[dict[str, Cell]] = []
    for way in ("unpack", "get_tensor"):
        merged, summed = taken[f"{way}, merged, bit-exact"], taken[f"{way}, base + B A, no residual"]
        rows.append(
            {"way": way, "merged, bit-exact, s": merged, "base + B A, s": summed, "times as long": merged / summed}
        )
    note = f"Packing the merge: {seconds:.1f} s. unpack: file to file, digests checked; get_tensor: open already."
    report.table(f"Rank 16, {SIDE} x {SIDE}, bf16", rows, note)


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="JSON instead of markdown")
    parser.add_argument("--quick", action="store_true", help="rank 16 on SmolLM2 and two full fine-tunes, nothing else")
    parser.add_argument("--repeats", type=int, default=5, help="runs of what is timed in turns")
    options = parser.parse_args()
    report, speeds = Report(options.json), Speeds()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        full_fine_tunes(report, work, options.quick, speeds)
        codec(report, work, options.quick, options.repeats)
        synthetic_merges(report, work, options.quick, speeds)
        if not options.quick:
            other_merges(report, work, speeds)
            reading_time(report, work, options.repeats)
            real_merges(report, work, speeds)
    report.table(
        "Speed over all cases", speeds.rows(), "MB/s of original bytes, files to files, median; recovery included."
    )
    report.finish()


if __name__ == "__main__":
    main()
