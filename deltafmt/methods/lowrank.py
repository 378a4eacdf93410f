"""Low rank: a tensor as factors, on top of its base's tensor, of an anchor layer's, or of nothing.

The rank is given, follows from an error or an energy to keep, from the noise floor of the dtype, or from a byte budget
that all tensors share. What does not pay, anchors, and tensors with NaN or infinity stay lossless.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import numpy as np

from ..checkpoint import Checkpoint
from ..dtypes import DTYPES, Bits
from ..encodings import compressed
from ..errors import RefusedError, UsageError
from ..operators import Ref
from ..operators.patch import predicts
from ..pipeline import Pipeline
from ..report import Progress
from ..shard_writer import header_room, raw_bytes
from ..sources import BASE_ID
from .difference import Difference, encoded_bytes
from .factored import Factored, above_noise, approximated, within
from .lossless import Coding, candidates
from .prediction import Elements, Referred
from .ranks import (
    Candidate,
    EnergyFraction,
    ErrorBound,
    FixedRank,
    allocate,
    break_even,
)
from .sharing import Likeness, Parts, ShareMap, likeness, parse_layout, sample_pairs, shared_layers, sharing_makes_sense
from .svd import spectrum_of, truncated_svd

_SHORTEST = 0.6  # coded factors never take less than this of their bytes; a rank that fails even so is not looked at
_TYPICAL_RANK = 10  # layers are compared at this fraction of full rank, unless a rank is asked for
_FIRST_COUNT = 32  # singular values that a budget looks at first; where it would spend more, at least twice as many
# What an archive spends on bookkeeping, at most, in bytes beside names:
_EMPTY_BYTES = 2000  # on nothing
_TENSOR_BYTES = 220  # on a tensor, in the manifest; also on a file
_QUOTED = 4  # one character in so many of a manifest, or fewer, is one that a single file has to escape
_ARRAY_BYTES = 370  # on a stored array, in manifest and shard header
_BASE_TENSOR_BYTES = 140  # on a tensor of the base
_ROLE = "#residual"  # what array names may add to tensor names
_FEWER_CODE_WORSE = 1.02  # a few components take this much more each than many

__all__ = ["Factored", "LowrankMethod", "Request"]

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Request:
    """What may be lost, and how.

    At most one of `rank`, `energy`, `max_error` and `target_bytes` is set. With none, the components that rise above
    the rounding noise of the dtype are kept: a true low-rank delta is found, anything else stays lossless.

    Args:
        rank: components of every tensor.
        energy: the share of a delta's squared Frobenius norm to keep, in (0, 1].
        max_error: the largest relative error of a rebuilt tensor, below 1.
        target_bytes: size of the whole archive; spent where it lowers the error most.
        share: which layers share an anchor layer: `sequential:K`, `alternating`, or a map `LAYER:ANCHOR,...`.
        share_parts: which parts of these layers: `mlp`, `attention` or `both`.
        include, exclude: globs over tensor names: which may become low rank. No `include` means all.
        force: do what the numbers advise against.

    Raises:
        UsageError: a value is out of range, or two exclude each other.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    target_bytes: int | None = None
    share: str | None = None
    share_parts: Parts = "both"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    force: bool = False

    def __post_init__(self) -> None:
        given = [option for option, value in self._limits() if value is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} exclude each other", hint="Give one of them")
        if self.rank is not None and self.rank < 1:
            raise UsageError("the rank is too small", expected="at least 1", found=self.rank)
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError("the energy to keep is out of range", expected="above 0, up to 1", found=self.energy)
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise UsageError("the error bound is out of range", expected="above 0, below 1", found=self.max_error)
        if self.target_bytes is not None and self.target_bytes < 1:
            raise UsageError("the target size is too small", expected="at least 1 byte", found=self.target_bytes)
        if self.share_parts not in ("mlp", "attention", "both"):
            raise UsageError("unknown parts to share", expected="mlp, attention or both", found=self.share_parts)
        if self.share is not None:
            try:
                parse_layout(self.share)
            except ValueError as error:
                raise UsageError(str(error)) from error

    @property
    def is_limited(self) -> bool:
        """Whether it says how much to keep."""
        return any(value is not None for _, value in self._limits())

    def _limits(self) -> list[tuple[str, float | None]]:
        return [
            ("--rank", self.rank),
            ("--energy", self.energy),
            ("--max-error", self.max_error),
            ("--target-size", self.target_bytes),
        ]

    def selects(self, name: str) -> bool:
        """Whether a tensor may become low rank, by its name."""
        included = not self.include or any(fnmatchcase(name, glob) for glob in self.include)
        return included and not any(fnmatchcase(name, glob) for glob in self.exclude)


class LowrankMethod:
    """Decides for each tensor of a checkpoint whether it becomes low rank, and factors it.

    Args:
        request: what may be lost.
        checkpoint: what is packed.
        reference: its base, if there is one.

    Attributes:
        non_finite: tensors met that stay lossless for their NaN or infinities, and how many of these each has.

    Raises:
        UsageError: the request does not fit the input.
    """

    def __init__(
        self,
        request: Request,
        checkpoint: Checkpoint,
        reference: Checkpoint | None,
        pipeline: Pipeline,
        progress: Progress,
        *,
        single_file: bool = False,
    ) -> None:
        self._single_file = single_file
        self.non_finite: dict[str, int] = {}
        self._request, self._checkpoint, self._reference = request, checkpoint, reference
        self._pipeline, self._progress = pipeline, progress
        self._references: dict[str, Ref | None] = {}  # of every tensor that may become low rank
        self._ranks: dict[str, int | None] | None = None  # what a byte budget gives to each; None for lossless
        # One decomposition at a time: it uses all processors, and holds several float32 copies of its tensor.
        self._decomposing = threading.Lock()
        if request.share is not None and reference is not None:
            raise UsageError("sharing layers and a base exclude each other", hint="Give either --share or --base")
        if request.share is None and reference is None and not request.is_limited:
            raise UsageError(
                "how much may be lost?",
                hint="Give one of --rank, --energy, --max-error and --target-size, or a --base, or --share",
            )

    def plan(self) -> None:
        """Decide what becomes low rank, and spend the byte budget if there is one. Call once, before `factor`.

        Raises:
            UsageError: nothing can become low rank.
            RefusedError: sharing would make no sense, or the budget is too small; not if forced.
        """
        shared = self._share_map() if self._request.share is not None else None
        for name, info in self._checkpoint.tensors.items():
            if not (info.dtype.is_float and len(info.shape) > 1 and info.count and self._request.selects(name)):
                continue
            if shared is not None:
                if name in shared.anchors:
                    self._references[name] = Ref(shared.anchors[name])
            elif self._reference is None:
                self._references[name] = None
            elif (like := self._reference.tensors.get(name)) and like.dtype.is_float and like.shape == info.shape:
                self._references[name] = Ref(name, BASE_ID)
        if not self._references:
            raise UsageError(
                f"none of the {len(self._checkpoint.tensors)} tensors can become low rank",
                where=self._checkpoint.location,
                hint="Those are float matrices that --include and --exclude select, in the base with the same shape",
            )
        if self._request.target_bytes is not None:
            self._ranks = self._spend(self._request.target_bytes)

    # Sharing

    def _share_map(self) -> ShareMap:
        """The layers that share an anchor. Raises `RefusedError` if they are not alike."""
        assert self._request.share is not None
        shared = shared_layers(self._checkpoint, self._request.share, self._request.share_parts)
        selected = {name: anchor for name, anchor in shared.anchors.items() if self._request.selects(name)}
        shared = ShareMap(selected, shared.layers)
        if not self._request.force and (sample := list(self._likenesses(shared))):
            verdict = sharing_makes_sense(sample)
            if not verdict.sensible:
                raise RefusedError(
                    f"sharing these layers makes no sense: {'; '.join(verdict.reasons)}",
                    where=self._checkpoint.location,
                    hint="Leave --share out, or add --force to share them all the same",
                )
        return shared

    def _likenesses(self, shared: ShareMap) -> Iterator[Likeness]:
        pairs = sample_pairs(shared)
        for done, (name, anchor) in enumerate(pairs):
            self._progress(done, len(pairs), "comparing layers")
            info = self._checkpoint.tensors[name]
            weight, other = (
                Difference(info, self._checkpoint.read_whole(each), None).matrix() for each in (name, anchor)
            )
            rank = min(self._request.rank or max(min(info.shape) // _TYPICAL_RANK, 1), *info.shape)
            if np.isfinite(weight).all() and np.isfinite(other).all():
                yield likeness(weight, other, rank)

    # One tensor

    def factor(self, name: str, bits: Bits) -> Factored | None:
        """Factor a tensor, or None if it is to stay lossless. May be called from many threads.

        Args:
            bits: all its elements, flat.
        """
        if name not in self._references or (self._ranks is not None and self._ranks.get(name) is None):
            return None
        difference = self._difference(name, bits)
        reference = difference.reference
        if reference is not None and reference.dtype == difference.info.dtype and np.array_equal(bits, reference.bits):
            return None
        lossless = min(coding.estimate() for coding in self._codings(name, bits, reference))
        with self._decomposing:
            factored = self._factored(name, difference, lossless)
        if factored is None or not math.isfinite(factored.rel_error) or factored.factors.stored_bytes() >= lossless:
            return None
        return factored

    def _difference(self, name: str, bits: Bits) -> Difference:
        ref = self._references[name]
        return Difference(self._checkpoint.tensors[name], bits, None if ref is None else self._prediction(ref))

    def _prediction(self, ref: Ref) -> Referred:
        source = self._checkpoint if ref.base is None else self._reference
        assert source is not None
        return Referred(ref, source.tensors[ref.tensor].dtype, source.read_whole(ref.tensor))

    def _codings(self, name: str, bits: Bits, reference: Referred | None) -> Iterator[Coding]:
        """The ways to store a tensor lossless. Only a base predicts there: anchors do not."""
        info = self._checkpoint.tensors[name]
        predicted = reference is not None and reference.ref.base is not None and predicts(reference.dtype, info.dtype)
        return candidates(Elements(info.dtype, info.shape, bits), [reference] if reference and predicted else [])

    def _factored(self, name: str, difference: Difference, lossless: float) -> Factored | None:
        request = self._request
        if count := difference.non_finite():
            self.non_finite[name] = count
            return None
        limit = break_even(difference.out, difference.in_, int(lossless / _SHORTEST), 2)
        if self._ranks is not None:
            rank = self._ranks[name] or 0
            return approximated(difference, FixedRank(rank) if rank else ErrorBound(math.inf), rank)
        if request.rank is not None:
            return approximated(difference, FixedRank(request.rank), limit)
        if request.energy is not None:
            return approximated(difference, EnergyFraction(request.energy), limit)
        if request.max_error is not None:
            return within(difference, request.max_error, limit)
        return above_noise(difference, limit)

    # A byte budget

    def _spend(self, target: int) -> dict[str, int | None]:
        """The rank of every tensor within `target` bytes. Raises `RefusedError` if the smallest archive is larger."""
        lossless: dict[str, int] = {}
        total = sum(info.nbytes for info in self._checkpoint.tensors.values())
        for name, size in self._each(self._checkpoint.tensors, self._lossless_bytes):
            lossless[name] = size
            self._progress(0, total, f"measuring {name}")
        fixed = self._bookkeeping_bytes(sum(lossless.values()))
        fixed += sum(size for name, size in lossless.items() if name not in self._references)
        known: dict[str, Candidate] = {}
        counts = dict.fromkeys(self._references, _FIRST_COUNT)
        wanting = list(self._references)

        def survey(name: str) -> Candidate | None:
            return self._candidate(name, counts[name], lossless[name])

        while True:
            for name, candidate in self._each(wanting, survey):
                self._progress(0, total, f"decomposing {name}")
                if candidate is None:
                    fixed += lossless[name]
                else:
                    known[name] = candidate
            allocation = allocate(known, target - fixed)
            # A spectrum shorter than asked for ends where it would no longer pay.
            wanting = [name for name in allocation.starved if len(known[name].known.values) == counts[name]]
            if not wanting:
                break
            uniform = (target - fixed) // sum(candidate.component_bytes for candidate in known.values())
            counts.update({name: max(2 * counts[name], uniform + uniform // 4) for name in wanting})
        smallest = fixed + allocation.stored_bytes
        if not allocation.feasible and not self._request.force:
            raise RefusedError(
                f"the target size of {target:,} bytes cannot be met: at the smallest ranks it takes {smallest:,} bytes",
                where=self._checkpoint.location,
                hint=f"Use --target-size {smallest}, or --force to get the smallest archive there is",
            )
        return allocation.ranks

    def _each(self, names: Iterable[str], work: Callable[[str], _Result]) -> Iterator[tuple[str, _Result]]:
        tensors = self._checkpoint.tensors
        return self._pipeline.ordered(names, work, lambda name: 2 * tensors[name].nbytes)

    def _lossless_bytes(self, name: str) -> int:
        info, bits = self._checkpoint.tensors[name], self._checkpoint.read_whole(name)
        like = self._reference.tensors.get(name) if self._reference is not None else None
        alike = like is not None and like.shape == info.shape and info.count
        codings = self._codings(name, bits, self._prediction(Ref(name, BASE_ID)) if alike else None)
        return encoded_bytes(min(codings, key=Coding.estimate))

    def _candidate(self, name: str, count: int, lossless: int) -> Candidate | None:
        """What a budget has to know of a tensor with up to `count` singular values; None if it must stay lossless."""
        difference = self._difference(name, self._checkpoint.read_whole(name))
        with self._decomposing:
            matrix = difference.matrix()
            if broken := difference.non_finite():
                self.non_finite[name] = broken
            if broken or not np.isfinite(matrix).all():
                return None
            factors = truncated_svd(matrix, count)
            known = spectrum_of(matrix, factors, count)
            stored = difference.rounded(matrix, factors, known.tail)
            component = 2 * sum(matrix.shape)
            if stored.rank:
                component = math.ceil(_FEWER_CODE_WORSE * stored.stored_bytes() / stored.rank)
            limit = max(0, lossless - 1) // component
            if limit < factors.rank:
                known = spectrum_of(matrix, factors.prefix(limit), limit)
        reference = difference.reference
        replaceable = reference is not None and reference.dtype == difference.info.dtype
        return Candidate(known, component, lossless, difference.energy(), least_rank=0 if replaceable else 1)

    def _bookkeeping_bytes(self, lossless: int) -> int:
        """An upper bound of what an archive takes beside its tensors' data: files, manifest, shard headers.

        Args:
            lossless: the data of all tensors without loss; a header may be padded by a thousandth of it.
        """
        checkpoint = self._checkpoint
        room = header_room((name + _ROLE, len(info.shape)) for name, info in checkpoint.tensors.items())
        size, described = min(lossless // 1000, 3 * room), _EMPTY_BYTES
        layout = [(file.name, file.header) for file in checkpoint.files]
        if checkpoint.index is not None:
            layout.append(checkpoint.index)
        for name, content in layout:
            coding = Coding(DTYPES["U8"], compressed(DTYPES["U8"], (len(content),)), raw_bytes(content))
            size += encoded_bytes(coding)
            described += _array_bytes(name) + _TENSOR_BYTES
        for name, part in checkpoint.sidecars.items():
            size += part.nbytes()
            described += len(json.dumps(name)) + _TENSOR_BYTES
        for name in checkpoint.tensors:
            arrays = 2 if name in self._references else 1
            described += arrays * _array_bytes(name + _ROLE) + 2 * len(json.dumps(name)) + _TENSOR_BYTES
        for name in self._reference.tensors if self._reference is not None else ():
            described += len(json.dumps(name)) + _BASE_TENSOR_BYTES
        if self._single_file:
            described += described // _QUOTED
        return size + described


def _array_bytes(name: str) -> int:
    return _ARRAY_BYTES + 3 * len(json.dumps(name))
