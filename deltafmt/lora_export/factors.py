"""What a fine-tune changed in one tensor, as the two factors of an adapter, and what they leave out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import SILENT, Dtype, round_to, widen
from ..methods.svd import truncated_svd
from ..operators import Lowrank, Operator, Ref, Scope, Source, Target
from ..operators.forms import base_and_lowrank
from ..reader import Archive

Float32 = npt.NDArray[np.float32]
Wide = npt.NDArray[Any]

_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Factors:
    """A change `b.T @ a`: `a` float32 [r, columns], `b` float32 [r, rows] of the tensor, component-major."""

    a: Float32
    b: Float32

    @property
    def rank(self) -> int:
        return len(self.a)

    def padded(self, rank: int) -> Factors:
        """The same with zeros as further components."""
        return Factors(*(np.pad(factor, ((0, rank - self.rank), (0, 0))) for factor in (self.a, self.b)))

    def rounded(self, dtype: Dtype) -> Factors:
        """The values that are left once they are stored as `dtype`."""
        wide = np.dtype("f4")
        return Factors(*(widen(round_to(factor, dtype), dtype, wide) for factor in (self.a, self.b)))


def lowrank_part(recipe: Operator, name: str, base: str) -> Lowrank | None:
    """The low-rank node of a tensor that is its base plus that, patched or not; None if it is anything else."""
    found = base_and_lowrank(recipe)
    return found.lowrank if found is not None and found.base == Ref(name, base) else None


def lowrank_rank(part: Lowrank, scope: Scope, target: Target) -> int:
    """The rank of a low-rank node."""
    return part.a.infer(scope, target, target.name).shape[0]


class Change:
    """One float tensor of an archive beside the same of a base, of the same shape. Both are held as they are stored.

    Raises `WrongBaseError` if the base is missing or another.
    """

    def __init__(self, archive: Archive, base: str, name: str) -> None:
        self._archive, self._name = archive, name
        self._part = lowrank_part(archive.manifest.tensors[name].recipe, name, base)
        self._target = archive.scope.target(name)
        self._base_dtype = archive.manifest.bases[base].tensors[name].dtype
        self._wide = np.dtype("f8" if "F64" in (self._target.dtype.name, self._base_dtype.name) else "f4")
        self._tuned = archive.read_whole(name)
        self._base = np.empty(self._tuned.size, self._base_dtype.bits)
        archive.base_reader(base, name).read(0, self._base.size, self._base)

    def energy(self) -> float:
        """The squared Frobenius norm of the change."""
        with np.errstate(**SILENT):
            return math.fsum(_energy(tuned - base) for _, base, tuned in self._blocks())

    def factors(self, rank: int) -> tuple[str, Factors]:
        """At most `rank` components, and where they are from: `factors` (those of the archive) or `svd`.

        Raises `ValueError` if the change is not finite.
        """
        if self._part is not None:
            return "factors", self._stored(self._part, rank)
        found = truncated_svd(self._whole(), rank)
        return "svd", Factors(found.a, found.b)

    def energy_left(self, factors: Factors) -> float:
        """The squared Frobenius norm of what the base lacks with the factors merged and rounded to its dtype."""
        dtype, energies = self._target.dtype, []
        for rows, base, tuned in self._blocks():
            with np.errstate(**SILENT):
                merged = widen(round_to(base + factors.b[:, rows].T @ factors.a, dtype), dtype, self._wide)
                energies.append(_energy(tuned - merged))
        return math.fsum(energies)

    def _stored(self, part: Lowrank, rank: int) -> Factors:
        scope: Scope = self._archive.scope
        source: Source = self._archive
        a, b = (_values(node, source, scope, self._target)[:rank] for node in (part.a, part.b))
        return _balanced(a, b * part.scale)

    def _whole(self) -> Float32:
        out = np.empty((self._target.rows, self._target.row), np.float32)
        with np.errstate(**SILENT):
            for rows, base, tuned in self._blocks():
                out[rows] = tuned - base
        return out

    def _blocks(self) -> Iterator[tuple[slice, Wide, Wide]]:
        """Rows, and what the base and the tensor hold there, in the wider type."""
        row = self._target.row
        step = max(1, _BLOCK_ELEMENTS // max(row, 1))
        for top in range(0, self._target.rows, step):
            rows = slice(top, min(top + step, self._target.rows))
            flat = slice(rows.start * row, rows.stop * row)
            base = widen(self._base[flat], self._base_dtype, self._wide)
            tuned = widen(self._tuned[flat], self._target.dtype, self._wide)
            yield rows, base.reshape(-1, row), tuned.reshape(-1, row)


def _energy(values: Wide) -> float:
    return float(np.sum(np.square(values, dtype=np.float64)))


def _values(node: Operator, source: Source, scope: Scope, target: Target) -> Wide:
    """A factor as float64 [r, n]."""
    value = node.bind(source, scope, target)
    dtype = value.facts.dtype
    assert dtype is not None  # a factor has one: `Lowrank.infer`
    bits = np.empty(value.facts.count, dtype.bits)
    value.bits(0, bits.size, bits)
    return bits.view(dtype.values).astype(np.float64).reshape(value.facts.shape)


def _balanced(a: Wide, b: Wide) -> Factors:
    """Factors of one magnitude, component by component, so that 16 bits hold them as well as 32 do.

    They are moved by powers of two, so nothing is rounded but to float32.
    """
    exponents = [np.frexp(np.abs(factor).max(axis=1, initial=0))[1] for factor in (a, b)]
    shift = (exponents[1] - exponents[0])[:, None] // 2
    return Factors(np.ldexp(a, shift).astype(np.float32), np.ldexp(b, -shift).astype(np.float32))
