"""How to train, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..errors import UsageError
from ..limits import check_count, is_finite

_COUNTS = ("tokens", "batch", "length", "accumulate", "log_every", "document", "lora", "checkpoint_every")
_FRACTIONS = ("warmup", "replace_from", "replace_until")
_NOT_NEGATIVE = ("rate", "temperature", "cross_entropy", "distil", "weight_decay", "clip")
_POSITIVE = ("rate", "temperature")


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

    Raises `UsageError` for a number that makes no sense; it names the argument.
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
        for name in _COUNTS:
            check_count(name, getattr(self, name), 1)
        check_count("seed", self.seed, 0)
        for name in (*_FRACTIONS, *_NOT_NEGATIVE):
            value = getattr(self, name)
            if not is_finite(value) or value < 0 or (name in _FRACTIONS and value > 1):
                wanted = "0 to 1" if name in _FRACTIONS else "0 or more"
                raise UsageError(f"{name} is no number that it may be", expected=wanted, found=repr(value))
        for name in _POSITIVE:
            if getattr(self, name) == 0:
                raise UsageError(f"{name} must be positive", found=0)
        pair = self.betas if isinstance(self.betas, (tuple, list)) else ()
        if not (len(pair) == 2 and all(is_finite(beta) and 0 <= beta < 1 for beta in pair)):
            raise UsageError("betas are two numbers", expected="each from 0 to less than 1", found=repr(self.betas))
        if self.cross_entropy == self.distil == 0:
            raise UsageError("without cross_entropy and distil there is no loss", hint="Let one of them be positive")

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
