"""Lossless: stored / input and speed beside ZipNN and the entropy bound, on the same real bytes, in turns, in one run.

Models: all-MiniLM-L6-v2 and a real fine-tune of it, in fp32 as published and cast to bf16. ZipNN runs with its defaults
and the same number of threads. It changes its input in place, so each run gets a copy, made outside the timing.
Two comparisons:

- codec: one buffer in memory to another, no checks on either side;
- files: a checkpoint directory to an archive and back. deltafmt hashes, checks and fsyncs all it reads and writes;
  ZipNN reads the weight file, compresses, and writes (its documented script), with neither checksum nor fsync.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from zipnn import ZipNN

import deltafmt
import fixtures
import synthetic
from deltafmt import encodings
from deltafmt.dtypes import DTYPES
from deltafmt.scratch import STEP_BYTES
from measure import Cell, Report, Timed, in_turns
from plain_checkpoint import FLOATS, NUMPY, Array, read_checkpoint

THREADS = 2
LAYOUT = {"BF16": (8, 7), "F32": (8, 23)}
"""Exponent and mantissa bits."""


@dataclass(frozen=True)
class Case:
    """A model to pack from files to files, perhaps against a base."""

    title: str
    dtype: str
    model: Path
    base: Path | None = None


# --- The entropy bound ----------------------------------------------------------------------------------------------


def entropy_bound(bits: Array, dtype: str) -> float:
    """Order-0 entropy of sign, exponent, and mantissa in bytes from the top, each by itself, over the width.

    What an entropy coder can reach that looks at one field of one element at a time. `bits` are unsigned integers.
    """
    exponent, mantissa = LAYOUT[dtype]
    fields = [(exponent + mantissa, 1), (mantissa, exponent)]
    while mantissa:
        width = mantissa % 8 or 8
        mantissa -= width
        fields.append((mantissa, width))
    return sum(_entropy((bits >> shift) & ((1 << width) - 1), width) for shift, width in fields) / (8 * bits.itemsize)


def _entropy(symbols: Array, width: int) -> float:
    counts = np.bincount(symbols.astype(np.int64), minlength=1 << width)
    frequencies = counts[counts > 0] / symbols.size
    return float(-(frequencies * np.log2(frequencies)).sum())


# --- The codecs in memory -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """One array as deltafmt stores it: per chunk the stored bytes of its planes, as they go to a file."""

    encoding: encodings.Encoding
    chunks: list[list[Any]]
    count: int
    bits: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Stored bytes, the chunk table (one checksum and an end per plane, 8 bytes each) counted."""
        return sum(sum(map(len, planes)) + 8 * (1 + len(planes)) for planes in self.chunks)

    def as_read(self) -> list[tuple[Array, list[int]]]:
        """Per chunk its stored bytes as they come from a file, and where each plane ends in them."""
        return [
            (np.frombuffer(b"".join(planes), np.uint8), np.cumsum([len(plane) for plane in planes]).tolist())
            for planes in self.chunks
        ]


def encode(bits: Array, dtype: str, pool: ThreadPoolExecutor) -> Encoded:
    """Encode a flat array of unsigned integers as the package does for weights."""
    encoding = encodings.compressed(DTYPES[dtype], bits.shape)

    step = together(encoding, bits.itemsize) * encoding.chunk

    def several(begin: int) -> list[list[Any]]:
        return encodings.encode_chunks(bits[begin : begin + step], encoding)

    chunks = pool.map(several, range(0, bits.size, step))
    return Encoded(encoding, [chunk for some in chunks for chunk in some], bits.size, bits.dtype)


def decode(encoded: Encoded, chunks: list[tuple[Array, list[int]]], pool: ThreadPoolExecutor) -> Array:
    """The way back, into fresh memory. `chunks` is what `Encoded.as_read` gives."""
    out = np.empty(encoded.count, encoded.bits)
    count, size = together(encoded.encoding, out.itemsize), encoded.encoding.chunk

    def several(first: int) -> None:
        stored = [encodings.StoredChunk(*chunk, "benchmark") for chunk in chunks[first : first + count]]
        encodings.decode_chunks(stored, encoded.encoding, out[first * size : (first + count) * size])

    list(pool.map(several, range(0, len(chunks), count)))
    return out


def together(encoding: encodings.Encoding, width: int) -> int:
    """Chunks that the package encodes and decodes in one step."""
    return max(STEP_BYTES // (encoding.chunk * width), 1)


def zipnn(dtype: str, delta: bool = False) -> Any:
    """A ZipNN codec for buffers of `dtype`."""
    kind = {"delta_compressed_type": "byte"} if delta else {}
    return ZipNN(input_format="byte", bytearray_dtype=FLOATS[dtype], threads=THREADS, **kind)


def elements(checkpoint: Path, dtype: str) -> Array:
    """All tensors of `dtype` in a checkpoint, one after another, as unsigned integers."""
    bits = np.dtype(f"u{NUMPY[dtype].itemsize}")
    found = (tensor.load() for tensor in read_checkpoint(checkpoint) if tensor.dtype == dtype)
    return np.concatenate([array.reshape(-1).view(bits) for array in found])


def compare_codecs(report: Report, models: dict[str, Path], repeats: int) -> None:
    """One buffer to another. `models` maps a dtype to a checkpoint of it."""
    rows: list[dict[str, Cell]] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for dtype, model in models.items():
            rows += _compare_codec(f"MiniLM {dtype}", dtype, elements(model, dtype), pool, repeats)
    report.table("Codec, memory to memory", rows, "MB/s of original bytes, median; entropy bound: order 0, per field.")


def _compare_codec(
    title: str, dtype: str, bits: Array, pool: ThreadPoolExecutor, repeats: int
) -> list[dict[str, Cell]]:
    raw = bits.tobytes()
    rival = zipnn(dtype)
    ours, theirs = encode(bits, dtype, pool), bytes(rival.compress(bytearray(raw)))
    chunks = ours.as_read()
    if not np.array_equal(decode(ours, chunks, pool), bits) or bytes(rival.decompress(theirs)) != raw:
        raise SystemExit(f"{title}: bits were lost")
    timed = {
        "deltafmt pack": Timed(lambda: encode(bits, dtype, pool)),
        "zipnn pack": Timed(rival.compress, lambda: (bytearray(raw),)),
        "deltafmt unpack": Timed(lambda: decode(ours, chunks, pool)),
        "zipnn unpack": Timed(lambda: rival.decompress(theirs)),
        "memory copy": Timed(np.copyto, lambda: (np.zeros_like(bits), bits)),
    }
    speed = {name: len(raw) / seconds / 1e6 for name, seconds in in_turns(timed, repeats).items()}
    return [
        _row(title, "entropy bound", entropy_bound(bits, dtype), None, None),
        _row(title, "deltafmt", ours.nbytes / len(raw), speed["deltafmt pack"], speed["deltafmt unpack"]),
        _row(title, "zipnn", len(theirs) / len(raw), speed["zipnn pack"], speed["zipnn unpack"]),
        _row(title, "memory copy", 1.0, speed["memory copy"], speed["memory copy"]),
        _ratios(title, speed),
    ]


# --- From files to files --------------------------------------------------------------------------------------------


def zipnn_pack(model: Path, dst: Path, dtype: str, base: Path | None) -> None:
    """Compress the weight file of `model` as ZipNN's script does: read, compress, write."""
    data = bytearray((model / "model.safetensors").read_bytes())
    if base is None:
        packed = zipnn(dtype).compress(data)
    else:
        packed = zipnn(dtype, delta=True).compress(data, delta_second_data=laid_out_like(model, base))
    dst.write_bytes(packed)


def zipnn_unpack(packed: Path, dst: Path, dtype: str, model: Path, base: Path | None) -> None:
    """The way back. Of `model` only the header is read, and only if there is a base."""
    data = packed.read_bytes()
    if base is None:
        restored = zipnn(dtype).decompress(data)
    else:
        restored = zipnn(dtype, delta=True).decompress(data, delta_second_data=laid_out_like(model, base))
    dst.write_bytes(restored)


def laid_out_like(model: Path, base: Path) -> bytes:
    """The tensors of `base` at the offsets that tensors of the same name have in the weight file of `model`.

    ZipNN's delta compares byte by byte where it is told to; without this, differing headers would make it useless.
    """
    tensors = {tensor.name: tensor for tensor in read_checkpoint(base)}
    wanted = read_checkpoint(model)
    header = (model / "model.safetensors").stat().st_size - sum(tensor.nbytes for tensor in wanted)
    return bytes(header) + b"".join(tensors[tensor.name].load().tobytes() for tensor in wanted)


def compare_files(report: Report, work: Path, cases: Sequence[Case], repeats: int) -> None:
    """Directory to archive and back."""
    rows = [row for case in cases for row in _compare_files(case, work, repeats)]
    note = "stored / input of the weight file; sidecars, the same bytes on both sides, are left out; manifest counted."
    report.table("Files to files", rows, note)


def _compare_files(case: Case, work: Path, repeats: int) -> list[dict[str, Cell]]:
    model, base, dtype = case.model, case.base, case.dtype
    weights = model / "model.safetensors"
    size = weights.stat().st_size
    ours, restored = work / "archive", work / "restored"
    theirs, their_restored = work / "model.znn", work / "restored.safetensors"
    timed = {
        "deltafmt pack": Timed(lambda: deltafmt.pack(model, ours, base=base, jobs=THREADS, overwrite=True)),
        "zipnn pack": Timed(lambda: zipnn_pack(model, theirs, dtype, base)),
        "deltafmt unpack": Timed(lambda: deltafmt.unpack(ours, restored, base=base, jobs=THREADS, overwrite=True)),
        "zipnn unpack": Timed(lambda: zipnn_unpack(theirs, their_restored, dtype, model, base)),
    }
    speed = {name: size / seconds / 1e6 for name, seconds in in_turns(timed, repeats).items()}
    for path in (restored / "model.safetensors", their_restored):
        if path.read_bytes() != weights.read_bytes():
            raise SystemExit(f"{case.title}: {path} is not the original")
    stored = _size(ours) - (_size(model) - size)
    return [
        _row(case.title, "deltafmt", stored / size, speed["deltafmt pack"], speed["deltafmt unpack"]),
        _row(case.title, "zipnn", theirs.stat().st_size / size, speed["zipnn pack"], speed["zipnn unpack"]),
        _ratios(case.title, speed),
    ]


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _row(data: str, codec: str, ratio: float | None, pack: float | None, unpack: float | None) -> dict[str, Cell]:
    return {"data": data, "codec": codec, "stored / input": ratio, "pack": pack, "unpack": unpack}


def _ratios(data: str, speed: dict[str, float]) -> dict[str, Cell]:
    pack, unpack = (speed[f"deltafmt {verb}"] / speed[f"zipnn {verb}"] for verb in ("pack", "unpack"))
    return _row(data, "deltafmt / zipnn", None, pack, unpack)


def main() -> None:
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="JSON instead of markdown")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, of which the median counts")
    options = parser.parse_args()
    report = Report(options.json)
    base, tuned = fixtures.minilm(), fixtures.finetune()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        base16 = synthetic.cast_checkpoint(base, work / "base16", "BF16")
        tuned16 = synthetic.cast_checkpoint(tuned, work / "tuned16", "BF16")
        compare_codecs(report, {"BF16": base16, "F32": base}, options.repeats)
        cases = [
            Case("MiniLM BF16", "BF16", base16),
            Case("MiniLM F32", "F32", base),
            Case("fine-tune against base, BF16", "BF16", tuned16, base16),
            Case("fine-tune against base, F32", "F32", tuned, base),
        ]
        compare_files(report, work, cases, options.repeats)
    report.finish()


if __name__ == "__main__":
    main()
