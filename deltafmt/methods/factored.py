"""One tensor factored to the rank that a criterion, an error bound or the noise floor asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..dtypes import Dtype
from ..operators import Lowrank, Operator, Ref, Stored, Sum
from ..writer import ArchiveWriter
from .difference import Difference, StoredFactors
from .ranks import Criterion, ErrorBound, NoiseFloor, search
from .svd import Float32

_TRIES = 5  # decompositions spent on one error bound
_ARITHMETIC = 1e-6  # relative error that a float32 decomposition and product may leave
_ROUNDING = 1.05  # how much more than measured rounding may add at the next rank


@dataclass(frozen=True)
class Factored:
    """A tensor ready to be written: what it is a difference to, its factors, and the error measured on the result."""

    reference: Ref | None
    factors: StoredFactors
    rel_error: float

    @property
    def rank(self) -> int:
        return self.factors.rank

    def write(self, name: str, writer: ArchiveWriter) -> Operator:
        """Add the factors of tensor `name` to the archive; return the recipe."""
        if self.rank == 0:
            assert self.reference is not None
            return self.reference
        a, b = (
            Stored(writer.add_bits(f"{name}#{role}", self.factors.dtype, bits.shape, bits.reshape(-1)))
            for role, bits in (("lora_a", self.factors.a), ("lora_b", self.factors.b))
        )
        low = Lowrank(a, b)
        return low if self.reference is None else Sum((self.reference, low))


def approximated(difference: Difference, criterion: Criterion, limit: int) -> Factored | None:
    """The approximation of the rank that `criterion` asks for; None if it takes more than `limit` components."""
    found = _searched(difference, difference.matrix(), criterion, limit)
    return found and found[0]


def _searched(
    difference: Difference, matrix: Float32, criterion: Criterion, limit: int
) -> tuple[Factored, float] | None:
    """The approximation that the criterion asks for, and the squared norm of what its components leave out.

    None if it takes more than `limit` components, or there is nothing to approximate.
    """
    if not np.isfinite(matrix).all():
        return None
    choice = search(matrix, criterion, limit)
    if choice.factors is None or choice.known.total == 0:
        return None
    reference = difference.reference
    if choice.factors.rank == 0 and (reference is None or reference.dtype != difference.info.dtype):
        return None
    left_out = choice.known.error_energy(choice.factors.rank)
    stored = difference.rounded(matrix, choice.factors, left_out)
    return Factored(None if reference is None else reference.ref, stored, difference.error(stored)), left_out


def within(difference: Difference, bound: float, limit: int) -> Factored | None:
    """The smallest rank whose measured error keeps the bound; None if that is more than `limit`.

    What rounding adds is known only once it is done; the next try allows for it.
    """
    matrix, energy = difference.matrix(), difference.energy()
    allowed = bound**2 * energy
    for _ in range(_TRIES):
        found = _searched(difference, matrix, ErrorBound(allowed), limit)
        if found is None or found[0].rel_error <= bound:
            return found and found[0]
        added = found[0].rel_error ** 2 * energy - found[1]
        allowed = bound**2 * energy - _ROUNDING * added
        if allowed <= 0:
            break
    return None


def above_noise(difference: Difference, limit: int) -> Factored | None:
    """What rises above rounding noise, if that leaves an error at rounding level.

    The noise is that of the tensor's rounding, or where this explains too little, of its reference's too, which may
    have been rounded after the difference was made.
    """
    level = _rounding_level(difference.info.dtype)
    for roundings in (1, 2) if difference.reference is not None else (1,):
        edge = difference.noise_edge(rounded_reference=roundings == 2)
        found = approximated(difference, NoiseFloor(edge), limit)
        if found is not None and found.rank and found.rel_error <= level * math.sqrt(roundings):
            return found
    return None


def _rounding_level(dtype: Dtype) -> float:
    """The largest relative rms error of rounding to nearest: an ulp over the root of 12, at a power of two.

    Or what float32 arithmetic adds, where that is more.
    """
    return max(math.ldexp(1, -dtype.mantissa_bits) / math.sqrt(12), _ARITHMETIC)
