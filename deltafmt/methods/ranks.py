"""How many components a low-rank tensor keeps: by count, energy, error, noise floor, or a byte budget for many."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..dtypes import Dtype
from .svd import Factors, Float32, Float64, Spectrum, spectrum_of, truncated_svd

_FIRST_COUNT = 32  # components the search looks at first; doubled until the question is answered
_EDGE_MARGIN = 1.15  # noise varies from draw to draw, and a reference on the same grid adds to it
_ALMOST = 0.9  # lowers a lower bound by what squared singular values may be underestimated


class Criterion(Protocol):
    """What decides the rank of one tensor."""

    def rank(self, known: Spectrum) -> int | None:
        """The rank wanted, or None if more singular values are needed to tell."""
        ...

    def at_least(self, known: Spectrum) -> int:
        """A rank that the answer cannot be below, as far as ``known`` tells when it does not tell the answer."""
        ...


@dataclass(frozen=True)
class FixedRank:
    """Exactly ``count`` components, or all there are."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a fixed rank must be at least 1, got {self.count}")

    def rank(self, known: Spectrum) -> int | None:
        if len(known.values) >= self.count:
            return self.count
        return len(known.values) if known.complete else None

    def at_least(self, known: Spectrum) -> int:
        return self.count


@dataclass(frozen=True)
class EnergyFraction:
    """The fewest components that hold ``fraction`` (0 < fraction <= 1) of the squared Frobenius norm of the delta."""

    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"an energy fraction must lie in (0, 1], got {self.fraction}")

    def rank(self, known: Spectrum) -> int | None:
        return _fewest_within(known, self._allowed(known))

    def at_least(self, known: Spectrum) -> int:
        return _least_within(known, self._allowed(known))

    def _allowed(self, known: Spectrum) -> float:
        return (1 - self.fraction) * known.total


@dataclass(frozen=True)
class ErrorBound:
    """The fewest components whose squared error is at most ``allowed``, a squared Frobenius norm.

    For a relative error e of the whole weight W, that is ``e**2 * energy(W)``, less what rounding factors and weight
    will add.
    """

    allowed: float

    def __post_init__(self) -> None:
        if not self.allowed >= 0:
            raise ValueError(f"the squared error allowed must not be negative, got {self.allowed}")

    def rank(self, known: Spectrum) -> int | None:
        return _fewest_within(known, self.allowed)

    def at_least(self, known: Spectrum) -> int:
        return _least_within(known, self.allowed)


@dataclass(frozen=True)
class NoiseFloor:
    """Every component above ``edge``, the largest singular value of rounding noise (`noise_edge`); perhaps none."""

    edge: float

    def __post_init__(self) -> None:
        if not self.edge >= 0:
            raise ValueError(f"the edge of the noise must not be negative, got {self.edge}")

    def rank(self, known: Spectrum) -> int | None:
        above = int(np.count_nonzero(known.values > self.edge))
        return above if above < len(known.values) or known.complete else None

    def at_least(self, known: Spectrum) -> int:
        count, square = len(known.values), self.edge**2
        if count == 0 or known.values[-1] <= self.edge:
            return count
        # Below the edge each component holds at most its square; the rest lies above, none larger than the last known.
        excess = known.tail - (known.size - count) * square
        return count + max(0, math.ceil(excess / (float(known.values[-1]) ** 2 - square) * _ALMOST))


@dataclass(frozen=True)
class Choice:
    """The outcome of a search: the factors to keep, or the reason why low rank does not pay."""

    factors: Factors | None
    known: Spectrum
    reason: str = ""


def break_even(out: int, in_: int, dense_bytes: int, factor_width: int) -> int:
    """The largest rank at which factors of ``factor_width`` bytes an element are smaller than ``dense_bytes``; else 0.

    ``dense_bytes`` is what the tensor costs otherwise (compressed, if it would be), ``out`` and ``in_`` are its sides.
    """
    if out < 0 or in_ < 0 or factor_width < 1:
        raise ValueError(f"sides {out} x {in_} and a factor width of {factor_width} bytes describe no factors")
    if out == 0 or in_ == 0:
        return 0
    return max(0, min((dense_bytes - 1) // (factor_width * (out + in_)), out, in_))


def search(matrix: Float32, criterion: Criterion, limit: int, *, seed: int = 0) -> Choice:
    """Decompose ``matrix`` [out, in] just far enough for ``criterion`` to name a rank up to ``limit`` (`break_even`).

    Looks at 32 components and doubles; gives up as soon as the answer must exceed the limit. A rank of 0 (nothing but
    noise) gives empty factors. Raises ValueError as `truncated_svd`.
    """
    most = min(limit + 1, *matrix.shape)  # one more than may be kept tells "exactly the limit" from "more"
    count = min(_FIRST_COUNT, most)
    while True:
        factors = truncated_svd(matrix, count, seed=seed)
        known = spectrum_of(matrix, factors, count)
        rank = criterion.rank(known)
        if rank is not None and rank <= limit:
            return Choice(factors.prefix(rank), known)
        least = rank if rank is not None else max(criterion.at_least(known), factors.rank)
        if least > limit or count >= most:
            return Choice(None, known, f"it takes rank {max(least, limit + 1)} or more, low rank pays up to {limit}")
        count = min(max(2 * count, least), most)


def noise_edge(rounded: Sequence[tuple[Float32, Dtype]], *, seed: int = 0) -> float:
    """The largest singular value to expect in a difference of matrices that is nothing but their rounding to a dtype.

    Rounding to nearest errs by ``ulp / sqrt(12)`` rms, and the ulp of every element is known. For equal ulps the
    largest singular value of such noise is ``sigma * (sqrt(out) + sqrt(in))`` (Bai, Yin 1988); real weights are uneven
    enough for that to be half the true value, and the bound from the loudest row and column to be six times. So noise
    with exactly these variances is drawn and measured (parallel analysis: Horn 1965), and half the largest ulp is
    added for a single weight that outgrows all others.

    Args:
        rounded: each matrix [out, in] that was rounded, widened to float32, with the dtype it was rounded to (F32, F16
            or BF16): the target of a delta, and its reference too if the delta was made before that was rounded.

    Raises ValueError if there is none, the shapes differ, a dtype is another, or a value is not finite.
    """
    if not rounded or len({matrix.shape for matrix, _ in rounded}) != 1:
        raise ValueError("noise_edge needs one or more matrices of one shape")
    for _, dtype in rounded:
        if dtype.name not in ("F32", "F16", "BF16"):
            raise ValueError(f"the rounding noise of {dtype.name} is not known in float32")
    steps = _ulps(*rounded[0])
    for matrix, dtype in rounded[1:]:
        np.hypot(steps, _ulps(matrix, dtype), out=steps)
    if steps.size == 0:
        return 0.0
    largest = float(steps.max())
    signs = np.random.default_rng(seed).random(steps.shape, dtype=np.float32)
    signs -= 0.5
    # Random signs have the variance, hence the spectral edge, of the uniform error, and are steadier from draw to draw.
    noise = truncated_svd(np.copysign(steps, signs, out=steps), 1)
    top = float(noise.singular_values[0]) / math.sqrt(12)
    return _EDGE_MARGIN * math.hypot(top, largest / 2)


def _ulps(matrix: Float32, dtype: Dtype) -> Float32:
    """The spacing of ``dtype`` at each element: float32, same shape."""
    exponent_bits = 8 * dtype.width - 1 - dtype.mantissa_bits
    smallest_normal = 2.0 ** (2 - 2 ** (exponent_bits - 1))
    exponents = np.ascontiguousarray(matrix).view(np.uint32) & np.uint32(0x7F800000)
    powers = exponents.view(np.float32)  # the power of two at or below each magnitude
    np.maximum(powers, np.float32(smallest_normal), out=powers)
    return np.multiply(powers, np.float32(2.0**-dtype.mantissa_bits), out=powers)


def _fewest_within(known: Spectrum, allowed: float) -> int | None:
    within = np.flatnonzero(known.error_energies() <= allowed)
    if within.size:
        return int(within[0])
    return len(known.values) if known.complete else None  # only rounding is left, no rank gets below it


def _least_within(known: Spectrum, allowed: float) -> int:
    """No further component is larger than the last known one, so the excess needs at least this many of its size."""
    count = len(known.values)
    if count == 0 or known.tail <= allowed:
        return count
    return count + math.ceil((known.tail - allowed) / float(known.values[-1]) ** 2 * _ALMOST)


@dataclass(frozen=True)
class Candidate:
    """One tensor in a byte budget.

    ``known``: the spectrum of its delta (or of itself). ``component_bytes``: the two factor rows of one component.
    ``lossless_bytes``: what storing it exactly costs. ``weight_energy``: squared Frobenius norm of the whole weight.
    ``least_rank``: 0 if a base alone can stand in for it, else 1.
    """

    known: Spectrum
    component_bytes: int
    lossless_bytes: int
    weight_energy: float
    least_rank: int = 0


@dataclass(frozen=True)
class Allocation:
    """How a byte budget is spent.

    ``ranks``: per tensor, None for lossless. ``stored_bytes``: what they cost; where ``feasible`` is false this is the
    least possible, and still above the budget. ``error``: the sum of squared relative errors. ``starved``: tensors
    whose known singular values are all used while the budget would have taken more; with a longer spectrum the result
    may improve.
    """

    ranks: dict[str, int | None]
    stored_bytes: int
    error: float
    feasible: bool
    starved: tuple[str, ...] = ()


def allocate(candidates: Mapping[str, Candidate], budget: int) -> Allocation:
    """Spend ``budget`` bytes over many tensors so that the sum of their squared relative errors is as low as can be.

    Errors are relative to each tensor's own norm: the normalisations between layers undo its scale, so a large norm
    must not buy bytes; and it is the error that reports show.

    Water-filling: each step goes to the tensor that loses most error per byte, by its next component or by becoming
    lossless. Components come in descending order and lossless is taken only once it beats the next component, so gains
    per byte only fall; spending greedily is then optimal for every budget that it spends to the byte (Fox, "Discrete
    optimization via marginal analysis", 1966), and otherwise within one step's gain of it. Steps that no longer fit
    are passed over for smaller ones.
    """
    curves = {name: _relative_errors(candidate) for name, candidate in candidates.items()}
    ranks: dict[str, int | None] = {}
    steps: list[tuple[float, str, bool]] = []  # a heap: minus the gain per byte, tensor, whether to lossless
    starved: set[str] = set()
    spent = 0

    def offer(name: str, rank: int, *, may_be_lossless: bool) -> None:
        """Put the best next step of a tensor that has ``rank`` components on the heap."""
        candidate, curve = candidates[name], curves[name]
        component = lossless = 0.0
        if rank + 1 < len(curve):
            component = float(curve[rank] - curve[rank + 1]) / candidate.component_bytes
        elif not candidate.known.complete and spent + candidate.component_bytes <= budget:
            starved.add(name)
        if may_be_lossless:
            lossless = float(curve[rank]) / (candidate.lossless_bytes - rank * candidate.component_bytes)
        if component > 0 or lossless > 0:
            heapq.heappush(steps, (-max(component, lossless), name, lossless >= component))

    for name, candidate in candidates.items():
        least_bytes = candidate.least_rank * candidate.component_bytes
        lossless = candidate.lossless_bytes <= least_bytes or len(candidate.known.values) < candidate.least_rank
        ranks[name] = None if lossless else candidate.least_rank
        spent += candidate.lossless_bytes if lossless else least_bytes
    feasible = spent <= budget
    if feasible:
        for name, rank in ranks.items():
            if rank is not None:
                offer(name, rank, may_be_lossless=True)
    while steps:
        _, name, to_lossless = heapq.heappop(steps)
        candidate, rank = candidates[name], ranks[name]
        assert rank is not None
        cost = candidate.lossless_bytes - rank * candidate.component_bytes if to_lossless else candidate.component_bytes
        if spent + cost <= budget:
            spent += cost
            ranks[name] = None if to_lossless else rank + 1
            if not to_lossless:
                offer(name, rank + 1, may_be_lossless=True)
        elif to_lossless:  # it never will fit: what the others spend only grows
            offer(name, rank, may_be_lossless=False)
    error = math.fsum(float(curves[name][rank]) for name, rank in ranks.items() if rank is not None)
    return Allocation(ranks, spent, error, feasible, tuple(sorted(starved)))


def _relative_errors(candidate: Candidate) -> Float64:
    """The squared relative error of every rank from 0 up; all zero for a zero weight."""
    curve = candidate.known.error_energies()
    return curve / candidate.weight_energy if candidate.weight_energy > 0 else np.zeros_like(curve)
