"""Low rank: speed of the rebuild and of the factorisation, and what `--share` finds in a model of known structure.

- rebuild: `base + B A -> bf16` of one 4096 x 4096 tensor from memory, beside the obvious expressions and a memory copy;
- exact: the same with integer factors, the same bits on every machine, beside the rebuild with float factors;
- factors: rank-64 factors of a 4096 x 4096 matrix beside the truncated full decomposition (LAPACK);
- sharing: a DeltaLLM-shaped model whose ranks and anchors are known, packed with `--share`.

Needs torch (for the expressions that it is compared with).
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import torch

import deltafmt
import fixtures
import synthetic
from deltafmt.checkpoint import TensorInfo
from deltafmt.dtypes import DTYPES
from deltafmt.methods.prediction import Elements, InMemory
from deltafmt.methods.svd import truncated_svd
from deltafmt.operators import Lowrank, Operator, Stored, Sum, Target
from deltafmt.pieces import Piece, pieces
from deltafmt.pipeline import Pipeline, Pool
from deltafmt.rebuild import Rebuilder, read_in_pieces
from measure import Cell, Report, Timed, in_turns
from plain_checkpoint import Array

SIDE = 4096
THREADS = 2
TENSORS = 5


# --- Rebuild --------------------------------------------------------------------------------------------------------


def rebuild_speed(report: Report, ranks: tuple[int, ...], repeats: int) -> None:
    """GB/s of bf16 output for `base + B A`, per rank and way of computing it."""
    rng = np.random.default_rng(0)
    base = (rng.standard_normal((SIDE, SIDE), np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    rows = [_rebuild_row(base, rank, rng, repeats) for rank in ranks]
    note = f"GB/s of bf16 output, median, {TENSORS} tensors in a row; all in memory; bf16 factors, for torch fp32."
    report.table(f"Rebuild base + B A -> bf16, {SIDE} x {SIDE}", rows, note)


def _rebuild_row(base: Array, rank: int, rng: np.random.Generator, repeats: int) -> dict[str, Cell]:
    a, b = (
        (rng.standard_normal((rank, SIDE), np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16) for _ in range(2)
    )
    memory = InMemory({}, {name: _elements("BF16", array) for name, array in {"w": base, "a": a, "b": b}.items()})
    subject = _Subject(Sum((Stored("w"), Lowrank(Stored("a"), Stored("b")))), memory, base.shape)
    out = subject.out
    wide_a, wide_b = a.astype(np.float32), b.astype(np.float32)
    base_t = torch.from_numpy(base.view(np.int16)).view(torch.bfloat16)
    a_t, b_t = torch.from_numpy(wide_a), torch.from_numpy(wide_b)
    product, buffer, out_t = torch.empty(base.shape), torch.empty(256, SIDE), torch.empty_like(base_t)

    def blocks() -> None:
        for top in range(0, SIDE, 256):
            buffer.copy_(base_t[top : top + 256]).addmm_(b_t[:, top : top + 256].T, a_t)
            out_t[top : top + 256] = buffer

    def several(run: Callable[[], object]) -> Timed:
        return Timed(lambda: [run() for _ in range(TENSORS)], _settle)

    timed = {
        "deltafmt, as unpack does it": Timed(lambda: subject.unpack(pipeline), _settle),
        "deltafmt, one call": several(lambda: subject.read(pool)),
        "numpy, one expression": several(
            lambda: (base.astype(np.float32) + wide_b.T @ wide_a).astype(ml_dtypes.bfloat16)
        ),
        "torch, one expression": several(lambda: (base_t.float() + b_t.T @ a_t).bfloat16()),
        "torch, blocks of 256 rows": several(blocks),
        "bare GEMM (torch, fp32)": several(lambda: torch.mm(b_t.T, a_t, out=product)),
        "memory copy": several(lambda: np.copyto(out, base.view(np.uint16).reshape(-1))),
    }
    pool = Pool(THREADS)
    with Pipeline(THREADS) as pipeline:
        speed = in_turns(timed, repeats)
    pool.close()
    return {"rank": rank} | {name: TENSORS * base.nbytes / seconds / 1e9 for name, seconds in speed.items()}


class _Subject:
    """Some tensors with the same recipe, in bf16, and where they are rebuilt."""

    def __init__(self, recipe: Operator, memory: InMemory, shape: tuple[int, ...]) -> None:
        self.out = np.empty(math.prod(shape), np.uint16)
        self.tensors = {f"w{number}": TensorInfo(DTYPES["BF16"], shape) for number in range(TENSORS)}
        self._recipe, self._memory = recipe, memory

    def rebuilder(self, name: str) -> Rebuilder:
        """The recipe, bound anew: its factors are read once for each tensor."""
        target = Target(name, DTYPES["BF16"], self.tensors[name].shape, np.dtype("f4"))
        return Rebuilder(self._recipe, self._memory, self._memory, target)

    def read(self, pool: Pool) -> None:
        """One tensor in one call, as `get_tensor` does it."""
        read_in_pieces(self.rebuilder("w0"), 0, self.out.size, self.out, pool)

    def unpack(self, pipeline: Pipeline) -> None:
        """All tensors, each into the same memory, piece by piece as `unpack` does it."""

        def rebuild(piece: Piece) -> None:
            piece.rebuilder.result().read(piece.lo, piece.hi, self.out[piece.lo : piece.hi])

        for _ in pipeline.ordered(pieces(self, self.tensors, pipeline), rebuild, lambda piece: piece.nbytes):
            pass


def exact_speed(report: Report, ranks: tuple[int, ...], repeats: int) -> None:
    """GB/s of bf16 output with integer factors and with float factors, both as `unpack` does it."""
    rng = np.random.default_rng(0)
    base = (rng.standard_normal((SIDE, SIDE), np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    rows: list[dict[str, Cell]] = []
    for rank in ranks:
        most = math.isqrt((1 << 24) // rank)
        integers = [rng.integers(-most, most + 1, (rank, SIDE), np.int16) for _ in range(2)]
        arrays = {"w": _elements("BF16", base)}
        for name, factor in zip("ab", integers, strict=True):
            arrays[name] = _elements("I16", factor)
            arrays[f"float {name}"] = _elements("BF16", factor.astype(ml_dtypes.bfloat16))
        memory = InMemory({}, arrays)
        exact, bounded = (
            _Subject(Sum((Stored("w"), Lowrank(Stored(a), Stored(b), 2.0**-36))), memory, base.shape)
            for a, b in (("a", "b"), ("float a", "float b"))
        )
        with Pipeline(THREADS) as pipeline:
            both = {"exact": exact, "bounded": bounded}
            timed = {name: Timed(partial(each.unpack, pipeline), _settle) for name, each in both.items()}
            seconds = in_turns(timed, repeats)
        speed = {name: TENSORS * base.nbytes / taken / 1e9 for name, taken in seconds.items()}
        rows.append({"rank": rank, **speed, "exact / bounded, time": seconds["exact"] / seconds["bounded"]})
    note = "GB/s of bf16 output, median; integer factors (I16), no residual, against bf16 factors; as unpack does it."
    report.table(f"Exact: base + 2^s B A -> bf16, {SIDE} x {SIDE}", rows, note)


def _elements(dtype: str, array: Array) -> Elements:
    return Elements(DTYPES[dtype], array.shape, array.reshape(-1).view(DTYPES[dtype].bits))


def _settle() -> tuple[()]:
    """Wait until the threads of the library that ran before have stopped spinning for more work."""
    time.sleep(0.3)
    return ()


# --- Factorisation --------------------------------------------------------------------------------------------------


def factor_speed(report: Report, rank: int) -> None:
    """Truncated against full decomposition, on noise (the flattest spectrum) and on a decaying spectrum."""
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((SIDE, SIDE), np.float32)
    decaying = (noise * (np.arange(1, SIDE + 1, dtype=np.float32) ** -0.5)) @ rng.standard_normal(
        (SIDE, SIDE), np.float32
    )
    rows: list[dict[str, Cell]] = []
    for title, matrix in {"noise": noise, "decaying": decaying}.items():
        begin = time.perf_counter()
        factors = truncated_svd(matrix, rank)
        truncated_seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        full_seconds = time.perf_counter() - begin
        found = float(np.linalg.norm(matrix - factors.b.T @ factors.a))
        rows.append(
            {
                "matrix": title,
                "truncated, s": truncated_seconds,
                "full, s": full_seconds,
                "times faster": full_seconds / truncated_seconds,
                "error / optimal error": found / float(np.linalg.norm(matrix - best)),
            }
        )
    report.table(f"Rank-{rank} factors of {SIDE} x {SIDE}", rows)


# --- Sharing --------------------------------------------------------------------------------------------------------


def rounding_error() -> float:
    """Relative error (Frobenius) of rounding normally distributed fp32 values to bf16."""
    values = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    rounded = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    return float(np.linalg.norm(rounded - values) / np.linalg.norm(values))


def sharing(report: Report) -> None:
    """Pack a DeltaLLM-shaped model with `--share` and compare what is found with what is true."""
    rows: list[dict[str, Cell]] = []
    with tempfile.TemporaryDirectory() as directory:
        model, archive = Path(directory) / "model", Path(directory) / "archive"
        truth = synthetic.delta_llm(fixtures.minilm(), model)
        packed = deltafmt.pack(model, archive, method="lowrank", share="sequential:3", rank=truth.rank)
        report_of = packed.as_dict()["tensors"]
        ranks = [report_of[name]["rank"] for name in truth.anchors]
        errors = [report_of[name]["rel_error"] or 0.0 for name in truth.anchors]
        rows.append(
            {
                "shared tensors": len(truth.anchors),
                "true rank": truth.rank,
                "found, lowest": min(rank or 0 for rank in ranks),
                "found, highest": max(rank or 0 for rank in ranks),
                "largest rel. error": max(errors),
                "bf16 rounding alone": rounding_error(),
                "archive / (base + factors)": packed.stored_bytes / truth.ideal_bytes,
                "archive / model": packed.stored_bytes / truth.logical_bytes,
            }
        )
    note = "base + factors: the bytes of anchors, unshared tensors and true factors in bf16, nothing compressed."
    report.table("DeltaLLM-shaped, 12 blocks, sequential:3", rows, note)


def main() -> None:
    """Run all four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="JSON instead of markdown")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, of which the median counts")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    report = Report(options.json)
    rebuild_speed(report, (16, 64, 256), options.repeats)
    exact_speed(report, (16, 64), options.repeats)
    factor_speed(report, 64)
    sharing(report)
    report.finish()


if __name__ == "__main__":
    main()
