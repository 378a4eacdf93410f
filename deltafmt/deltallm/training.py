"""How to train, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..errors import UsageError


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        tokens: how many tokens to see; rounded up to whole steps.
        batch, length: sequences, and tokens in each, that go through the model at once.
        document: if the text consists of documents of so many tokens each: windows begin where these do.
        accumulate: batches in a step.
        rate: highest learning rate; it rises over `warmup`, a fraction of the steps, and falls as a cosine to zero.
        betas, weight_decay: of AdamW.
        clip: largest norm of a step's gradient; 0 for any.
        cross_entropy, distil, temperature: see `objective.Objective`.
        replace_from, replace_until: see `replacement.Replacement`; `replace_until=0`: all deltas from the beginning.
        norms: train norms as well, as the student's own.
        lora: rank of a low-rank update of every other linear layer in the blocks that is no anchor, merged at the end.
        seed: of batches and replacement.
        checkpoint_every: steps; None: only at the end, or when interrupted.
        log_every: steps.
        compiled: compile the blocks of both models and the loss, which takes a minute and makes steps on a GPU much
            shorter; where that fails, nothing is compiled, and a warning says so. Results differ by rounding.
    """

    tokens: int
    batch: int = 8
    length: int = 512
    document: int | None = None
    accumulate: int = 1
    rate: float = 5e-4
    warmup: float = 0.03
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    cross_entropy: float = 1.0
    distil: float = 1.0
    temperature: float = 1.0
    replace_from: float = 0.25
    replace_until: float = 0.5
    norms: bool = False
    lora: int | None = None
    seed: int = 0
    checkpoint_every: int | None = None
    log_every: int = 10
    compiled: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "length", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1", found=getattr(self, name))
        if not (self.rate > 0 and 0 <= self.warmup <= 1 and self.temperature > 0):
            raise UsageError("rate and temperature must be positive, and warmup a fraction of the steps")
        if not (0 <= self.replace_from <= 1 and 0 <= self.replace_until <= 1):
            raise UsageError("replace_from and replace_until must lie between 0 and 1")
        if self.cross_entropy <= 0 and self.distil <= 0:
            raise UsageError("cross_entropy or distil must be positive")

    @property
    def step_tokens(self) -> int:
        return self.batch * self.length * self.accumulate

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.step_tokens)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return self.rate * (step + 1) / warm
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


@dataclass
class History:
    """What a call of `train` did.

    Attributes:
        log: the lines of the log, of earlier calls too: `step` (steps done), `tokens`, `loss`, `cross_entropy`, `kl`
            (means since the line before), `gradient` (norm, of the last step), `rate`, `replaced` (fraction of delta
            modules in place), `tokens_per_second`.
        steps, tokens: done in all, by earlier calls too.
        seconds: of training in this call, without checkpoints.
        interrupted: whether it stopped before the end.
    """

    log: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    interrupted: bool = False
