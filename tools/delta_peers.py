"""What else stores a fine-tune losslessly against its base: the peers of `bench_merged.py`, files to files.

Each packs the one weight file of a checkpoint against that of another, and restores it. Those that compare byte by byte
get the base's tensors laid out like the fine-tune's; making that layout is part of packing and of unpacking.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmz
import numpy as np
import zstandard

from bench_lossless import laid_out_like, zipnn_pack, zipnn_unpack
from plain_checkpoint import NUMPY, Array

THREADS = 2
CHUNK = 1 << 18
"""Elements."""
LEVEL = 1

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Pair:
    """A fine-tune and its base, checkpoints of one weight file each, and the dtype of (almost) all their tensors."""

    model: Path
    base: Path
    dtype: str

    @property
    def nbytes(self) -> int:
        """Of the fine-tune's weight file."""
        return (self.model / WEIGHTS).stat().st_size


@dataclass(frozen=True)
class Measured:
    """What packing one pair came to: bytes, and seconds there and back."""

    stored: int
    pack_seconds: float
    unpack_seconds: float


@dataclass(frozen=True)
class Peer:
    """A way to store a pair in the directory `work`, whose `pack` returns the stored bytes."""

    pack: Callable[[Pair, Path], int]
    unpack: Callable[[Pair, Path, Path], None]
    prepare: Callable[[Pair, Path], None] = lambda pair, work: None

    def measure(self, pair: Pair, work: Path) -> Measured:
        """Pack and unpack once. Raises `SystemExit` if the file does not come back bit for bit."""
        work.mkdir()
        restored = work / "restored.safetensors"
        self.prepare(pair, work)
        begin = time.perf_counter()
        stored = self.pack(pair, work)
        packed = time.perf_counter()
        self.unpack(pair, work, restored)
        end = time.perf_counter()
        if restored.read_bytes() != (pair.model / WEIGHTS).read_bytes():
            raise SystemExit(f"{pair.model}: {restored} is not the original")
        shutil.rmtree(work)
        return Measured(stored, packed - begin, end - packed)


# --- Differences and zstandard --------------------------------------------------------------------------------------


def _differences(coded: Callable[[Array, Array], Array], restored: Callable[[Array, Array], Array]) -> Peer:
    """Elements coded against the base's, split into byte planes, each compressed with zstandard, chunk by chunk."""

    def pack(pair: Pair, work: Path) -> int:
        header, elements, base = _elements(pair)

        def chunk(begin: int) -> list[bytes]:
            part = slice(begin, begin + CHUNK)
            planes = coded(elements[part], base[part]).view(np.uint8).reshape(-1, elements.itemsize)
            return [zstandard.compress(planes[:, i].tobytes(), LEVEL) for i in range(elements.itemsize)]

        frames = [frame for frames in _each(chunk, elements.size) for frame in frames]
        lengths = np.array([len(frame) for frame in frames], "<u4").tobytes()
        (work / "packed").write_bytes(b"".join([header, lengths, *frames]))
        return (work / "packed").stat().st_size

    def unpack(pair: Pair, work: Path, target: Path) -> None:
        bits = np.dtype(f"u{NUMPY[pair.dtype].itemsize}")
        packed = (work / "packed").read_bytes()
        end = 8 + int.from_bytes(packed[:8], "little")
        base = np.frombuffer(laid_out_like(pair.model, pair.base), bits, offset=end)
        count = -(-base.size // CHUNK) * bits.itemsize
        lengths = np.frombuffer(packed, "<u4", count, end)
        ends = np.cumsum(lengths, dtype=np.int64) + end + lengths.nbytes
        out = np.empty(base.size, bits)

        def chunk(begin: int) -> None:
            part, first = slice(begin, begin + CHUNK), begin // CHUNK * bits.itemsize
            planes = np.empty((out[part].size, bits.itemsize), np.uint8)
            for i in range(bits.itemsize):
                stop = ends[first + i]
                frame = packed[stop - lengths[first + i] : stop]
                planes[:, i] = np.frombuffer(zstandard.decompress(frame), np.uint8)
            out[part] = restored(planes.reshape(-1).view(bits), base[part])

        for _ in _each(chunk, base.size):
            pass
        with target.open("wb") as file:
            file.write(packed[:end])
            file.write(out.data)

    return Peer(pack, unpack)


def _elements(pair: Pair) -> tuple[bytes, Array, Array]:
    """The fine-tune's header, its tensors and the base's, laid out alike, as unsigned integers."""
    bits = np.dtype(f"u{NUMPY[pair.dtype].itemsize}")
    raw = (pair.model / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    base = laid_out_like(pair.model, pair.base)
    return raw[:end], np.frombuffer(raw, bits, offset=end), np.frombuffer(base, bits, offset=end)


def _each(chunk: Callable[[int], Any], size: int) -> Iterable[Any]:
    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(chunk, range(0, size, CHUNK))


def _ordered(bits: Array) -> Array:
    """Bit patterns of floats as integers in the order of the numbers."""
    top = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    return np.where(bits & top, ~bits, bits | top)


def _unordered(ordered: Array) -> Array:
    top = ordered.dtype.type(1 << (8 * ordered.itemsize - 1))
    return np.where(ordered & top, ordered ^ top, ~ordered)


def _zigzag(bits: Array, base: Array) -> Array:
    """The difference of ordered patterns: 0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
    difference = (_ordered(bits) - _ordered(base)).view(f"i{bits.itemsize}")
    coded: Array = ((difference << 1) ^ (difference >> (8 * bits.itemsize - 1))).view(bits.dtype)
    return coded


def _unzigzag(coded: Array, base: Array) -> Array:
    difference = (coded >> 1) ^ (~(coded & 1) + coded.dtype.type(1))
    return _unordered(_ordered(base) + difference)


# --- Packages -------------------------------------------------------------------------------------------------------


def _zipnn_pack(pair: Pair, work: Path) -> int:
    zipnn_pack(pair.model, work / "packed", pair.dtype, pair.base)
    return (work / "packed").stat().st_size


def _zipnn_unpack(pair: Pair, work: Path, target: Path) -> None:
    zipnn_unpack(work / "packed", target, pair.dtype, pair.model, pair.base)


def _lmz_prepare(pair: Pair, work: Path) -> None:
    """lmz keeps the base in the same archive: it is there already, and what the fine-tune adds counts."""
    (work / "base").mkdir()
    shutil.copyfile(pair.base / WEIGHTS, work / "base" / "base.safetensors")
    (work / "tuned").mkdir()
    shutil.copyfile(pair.model / WEIGHTS, work / "tuned" / "tuned.safetensors")
    lmz.compress(str(work / "base"), str(work / "packed"), workers=THREADS)


def _lmz_pack(pair: Pair, work: Path) -> int:
    before = (work / "packed").stat().st_size
    lmz.append(str(work / "packed"), str(work / "tuned"), workers=THREADS)
    return (work / "packed").stat().st_size - before


def _lmz_unpack(pair: Pair, work: Path, target: Path) -> None:
    lmz.extract(str(work / "packed"), "tuned.safetensors", str(target))


PEERS = {
    "XOR + zstd": _differences(np.bitwise_xor, np.bitwise_xor),
    "ordered difference + zstd": _differences(_zigzag, _unzigzag),
    "ZipNN delta": Peer(_zipnn_pack, _zipnn_unpack),
    "lmz": Peer(_lmz_pack, _lmz_unpack, _lmz_prepare),
}
"""By name. lmz is installed as `lmzip`."""


def _z4ai() -> dict[str, Peer]:
    """z4ai, where it is installed: there is no wheel of it."""
    if importlib.util.find_spec("z4ai") is None:
        return {}
    from z4ai import model_delta, rans

    def prepare(pair: Pair, work: Path) -> None:
        rans.available()  # compiles its entropy coder, the first time

    def pack(pair: Pair, work: Path) -> int:
        model_delta.compress_file(pair.model / WEIGHTS, pair.base / WEIGHTS, work / "packed", threads=THREADS)
        return (work / "packed").stat().st_size

    def unpack(pair: Pair, work: Path, target: Path) -> None:
        model_delta.decompress_file(work / "packed", pair.base / WEIGHTS, target)

    return {"z4ai": Peer(pack, unpack, prepare)}


TUNED_PEERS = _z4ai()
"""More, for full fine-tunes only: packing is slow."""
