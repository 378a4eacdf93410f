"""What the verbs report: plain dataclasses; `as_dict` is the `--json` output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

Progress: TypeAlias = Callable[[int, int, str], None]
"""Called with bytes (of an evaluation: tokens) done, and in total, and what is being worked on; from one thread."""


def silent(done: int, total: int, what: str) -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True)
class TensorReport:
    """One tensor: how it is stored, at what size (bytes) and error. `rank` is None where there is none."""

    method: str
    dtype: str
    shape: tuple[int, ...]
    logical_bytes: int
    stored_bytes: int
    rank: int | None = None
    rel_error: float | None = None


@dataclass(frozen=True)
class Report:
    """Common to all verbs.

    `logical_bytes` is the size of the checkpoint, `stored_bytes` that of the archive, every file counted.
    """

    logical_bytes: int
    stored_bytes: int
    exact: bool
    max_rel_error: float
    seconds: float
    tensors: dict[str, TensorReport] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Stored over logical bytes."""
        return self.stored_bytes / self.logical_bytes if self.logical_bytes else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class PackReport(Report):
    """`roles` is that of `InspectReport`.

    `base` is the first base given, `bases` are all; reading the archive takes those in `bases_needed`.
    `non_finite` counts the NaN and infinities of tensors that stay lossless for them, though more was asked. `notes`
    say, in words, what else was asked for and came to nothing.
    """

    source: str = ""
    destination: str = ""
    base: str | None = None
    bases: tuple[str, ...] = ()
    bases_needed: tuple[str, ...] = ()
    method: str = "lossless"
    dry_run: bool = False
    non_finite: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    roles: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class UnpackReport(Report):
    """`written_bytes` is the size of what was written; it is `logical_bytes` unless tensors were cast or moved.

    `exact` is false if a tensor was cast. The `dtype` of a tensor is the one it was written in, its `logical_bytes` are
    those of the original, and `rel_error` counts what its finite values lost to the cast. Of a tensor that was an
    approximation before, it is the most that both errors can make together.
    """

    written_bytes: int = 0
    source: str = ""
    destination: str = ""
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class VerifyReport(Report):
    """`against` is None if nothing was compared; `equal`: whether tensors and files are all the same, bit for bit.

    `as_stated` is true as well where nothing differs but lossy tensors, each by the error that the archive states.
    `unchecked` are the tensors that could not be rebuilt for want of a base, `bases_missing` the bases not given: by
    id, where to look for them.
    """

    source: str = ""
    against: str | None = None
    equal: bool | None = None
    as_stated: bool | None = None
    base_checked: bool = True
    bases_missing: dict[str, str | None] = field(default_factory=dict)
    unchecked: tuple[str, ...] = ()
    differences: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class InspectReport(Report):
    """`roles` maps base, factors, residual, layout, sidecar, manifest and overhead to bytes; `sharing` maps a tensor to
    what it refers to; `files` are those that `unpack` writes.
    """

    source: str = ""
    version: str = ""
    shards: int = 0
    roles: dict[str, int] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    sharing: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)
    annotations: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportReport(Report):
    """`loss` is the share of the whole change (Frobenius norm) that the base with the adapter merged lacks.

    `stored_bytes` is the size of what was written. `tensors` are those that the fine-tune changed; their `method` is
    `factors` (the archive's own), `svd`, or `left-out`, and their `rel_error` the share of their change that is lost.
    `left_out` says why.
    """

    source: str = ""
    destination: str = ""
    base: str | None = None
    format: str = "peft"
    rank: int = 0
    loss: float = 0.0
    left_out: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """One model, measured.

    Attributes:
        model: as it was named.
        mode: how an archive was loaded; `plain` for a checkpoint.
        bases: the bases given; `stored_bytes` are without them.
        perplexity, accuracy, agreement, kl: as those of `deltafmt.torch.evaluate.Evaluation`; the last two are None for
            the reference, and without one.
        parameters: how many numbers it computes with; what is tied or shared counts once.
        stored_bytes: of all of its files.
        resident_bytes: of parameters and buffers in memory.
        tokens_per_second: that go through it.
    """

    model: str
    mode: str
    dtype: str
    bases: tuple[str, ...]
    perplexity: float
    accuracy: float
    agreement: float | None
    kl: float | None
    parameters: int
    stored_bytes: int
    resident_bytes: int
    tokens_per_second: float


@dataclass(frozen=True)
class EvalReport:
    """What a model makes of a text, in windows of `length` tokens, `batch` at once; `tokens` were predicted.

    `against` is the reference, None without one.
    """

    text: str
    tokens: int
    length: int
    batch: int
    device: str
    model: Score
    against: Score | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)
