"""The codec of fine-tunes by itself: tensors and their bases in memory to stored bytes in memory, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from deltafmt.dtypes import DTYPES, Shape
from deltafmt.encodings import StoredChunk, decode_chunks
from deltafmt.methods.lossless import Coding, candidates, smallest
from deltafmt.methods.prediction import Elements, Referred
from deltafmt.operators import Facts, Operator, Patch, Ref, Stored, Target, Value
from deltafmt.operators.base import Read, TensorReader, in_memory
from deltafmt.pieces import PIECE_BYTES
from deltafmt.pipeline import Pipeline
from deltafmt.rebuild import good_step
from plain_checkpoint import Array


@dataclass(frozen=True)
class Tuned:
    """A tensor of a fine-tune and its base, flat, as unsigned integers."""

    name: str
    dtype: str
    shape: Shape
    bits: Array
    base: Array


@dataclass(frozen=True)
class Encoded:
    """A tensor as it is stored: per chunk the bytes of its planes in one piece, and where each ends in it."""

    tuned: Tuned
    coding: Coding
    chunks: list[tuple[Array, list[int]]]

    @property
    def nbytes(self) -> int:
        """Stored bytes, chunk table included."""
        table = 8 * self.coding.encoding.table_words(self.coding.array_dtype, self.coding.bits.size)
        return table + sum(chunk.nbytes for chunk, _ in self.chunks)

    def value(self) -> Value:
        """What rebuilds any range of the tensor."""
        coding, dtype = self.coding, DTYPES[self.tuned.dtype]
        recipe: Operator = Stored("residual")
        if coding.prediction is not None:
            assert isinstance(coding.prediction, Referred)
            recipe = Patch(coding.prediction.ref, recipe, coding.groups)
        memory = _Memory(self)
        return recipe.bind(memory, memory, Target(self.tuned.name, dtype, self.tuned.shape, np.dtype(np.float32)))


class _Memory:
    """Where a recipe finds its one stored array and its one base tensor."""

    def __init__(self, encoded: Encoded) -> None:
        self._tuned, self._coding, self._chunks = encoded.tuned, encoded.coding, encoded.chunks

    def array(self, name: str) -> Facts | None:
        return Facts(self._coding.array_dtype, self._tuned.shape, exact=True, chunk=self._coding.encoding.chunk)

    def tensor(self, name: str) -> Facts | None:
        return None

    def base_tensor(self, base: str, name: str) -> Facts | None:
        return Facts(DTYPES[self._tuned.dtype], self._tuned.shape, exact=True)

    def array_reader(self, name: str) -> Read:
        def read(lo: int, hi: int, out: Array) -> None:
            # Only whole chunks are asked for.
            encoding = self._coding.encoding
            chunks = self._chunks[lo // encoding.chunk : encoding.chunks(hi)]
            decode_chunks([StoredChunk(*chunk, self._tuned.name) for chunk in chunks], encoding, out)

        return read

    def tensor_reader(self, name: str) -> TensorReader:
        raise KeyError(name)

    def base_reader(self, base: str, name: str) -> TensorReader:
        return in_memory(self._tuned.base, self._tuned.shape)


def encode(tensors: Sequence[Tuned], pipeline: Pipeline) -> list[Encoded]:
    """Choose a coding for each tensor and encode its chunks, as `pack` does; the search for a merge is left out."""

    def coding(tuned: Tuned) -> Coding:
        dtype = DTYPES[tuned.dtype]
        base = Referred(Ref(tuned.name, "base"), dtype, tuned.base)
        coding = smallest(candidates(Elements(dtype, tuned.shape, tuned.bits), [base]))
        coding.prepare()
        return coding

    codings = pipeline.ordered(tensors, coding, lambda tuned: tuned.bits.nbytes)
    return [
        Encoded(tuned, coding, [_as_in_a_file(planes) for _, planes in coding.encoded(pipeline)])
        for tuned, coding in codings
    ]


def _as_in_a_file(planes: Sequence[Any]) -> tuple[Array, list[int]]:
    return np.frombuffer(b"".join(planes), np.uint8), list(accumulate(len(memoryview(plane)) for plane in planes))


def decode(encoded: Sequence[Encoded], pipeline: Pipeline) -> list[Array]:
    """The way back, into fresh memory, in pieces as large as those of `unpack`."""
    outs = [np.empty_like(each.tuned.bits) for each in encoded]
    jobs = (
        (value, begin, out[begin : begin + step])
        for each, out in zip(encoded, outs, strict=True)
        for value, step in [(each.value(), good_step(each.tuned.shape, out.itemsize, PIECE_BYTES // out.itemsize))]
        for begin in range(0, out.size, step)
    )

    def rebuild(job: tuple[Value, int, Array]) -> None:
        value, lo, out = job
        value.bits(lo, lo + out.size, out)

    for _ in pipeline.ordered(jobs, rebuild, lambda job: job[2].nbytes):
        pass
    return outs
