"""Training of a delta model: only factors learn, from text and from the original model's logits (arXiv 2501.18596)."""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from ..errors import DeltafmtError, UsageError
from ..report import Progress, silent
from ..sources import PathLike
from .adapters import add_lora, merge_lora, own_norms
from .architecture import blocks
from .objective import Objective, check_head, head, hidden_states
from .replacement import Replacement
from .state import State, begin
from .structure import Plan
from .training import History, Training
from .weights import Weights

__all__ = ["History", "Training", "train"]

_VARIANTS = 64
"""Of a block, each of which is compiled: with and without deltas, of other ranks, the first one to train."""


def train(
    student: nn.Module,
    teacher: nn.Module | None,
    plan: Plan | None,
    text: torch.Tensor,
    training: Training,
    *,
    directory: PathLike | None = None,
    device: torch.device | str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    source: PathLike | None = None,
    seconds: float | None = None,
) -> History:
    """Train the parameters of a causal language model that require gradients, in place.

    Both models are in evaluation mode (no dropout) and stay on `device`. What trains learns in float32, whatever its
    dtype in the model. Ctrl-C ends the training after the step, with a checkpoint; a second one at once.

    Args:
        student: from `initialise.delta_model`; or any model of transformers with something to train.
        teacher: the original model: for distillation and replacement. Without it there is neither. What it shares with
            the student is moved and held once.
        plan: what was made delta modules of; None: no replacement.
        text: tokens, integers `[tokens]`.
        directory: where log and checkpoints go; None: nowhere.
        device: where to train; by default where the student is.
        resume: go on from the last checkpoint in `directory`, if there is one, with a student that was made as for the
            first call. On a CPU the result is the same, bit for bit, as without a break.
        progress: called with tokens done, tokens in all, and the loss in words.
        source: the checkpoint that the model is from: its tokenizer goes into checkpoints.
        seconds: stop this many after the call, with a checkpoint: `resume` goes on from there.

    Raises:
        UsageError: nothing to train, too little text, `directory` holds another training.
        UnsupportedError: a model whose logits are computed in an unusual way.
        IntegrityError: what resuming takes is damaged or gone.
        DeltafmtError: the loss is no number.
    """
    deadline = math.inf if seconds is None else time.perf_counter() + seconds
    place = torch.device(device) if device is not None else next(student.parameters()).device
    if text.ndim != 1 or len(text) <= training.length:
        raise UsageError("too little text", expected=f"more than {training.length} tokens", found=len(text))
    folder = None if directory is None else Path(directory)
    for model in (student, teacher):
        if model is not None:
            model.to(place).eval()
    check_head(student, text[: min(32, len(text))].long()[None].to(place))
    if folder is not None:
        begin(folder, student, resume)
    if training.norms:
        own_norms(student)
    added = [] if training.lora is None else add_lora(student, training.lora, training.seed)
    # Deltas are in their places here: so each factor has its name in the model.
    weights = Weights(student, training, fused=place.type == "cuda")
    replacement = Replacement(
        teacher, student, plan, begin=training.replace_from, until=training.replace_until, seed=training.seed
    )
    tokens = text.to(torch.int32).to(place)  # uint16 cannot be indexed everywhere
    history = History()
    state = State(folder, student, teacher, plan, weights, training, text, source)
    if resume and state.load(history) and history.steps >= training.steps:
        merge_lora(student, added)
        return history
    try:
        with _interruptible() as interrupted, _objective(student, teacher, tokens, training) as objective_of:
            _run(
                objective_of,
                tokens,
                training,
                weights,
                replacement,
                history,
                state,
                progress or silent,
                lambda: interrupted() or time.perf_counter() > deadline,
            )
    finally:
        replacement.finish()
    if not history.interrupted:
        merge_lora(student, added)
    return history


_Loss = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@contextlib.contextmanager
def _objective(
    student: nn.Module, teacher: nn.Module | None, text: torch.Tensor, training: Training
) -> Iterator[_Loss]:
    """Gives the loss and its parts for ids `[batch, length + 1]`, computed by compiled blocks if that is asked for and
    works."""
    teacher = teacher if training.distil else None
    weights = training.cross_entropy, training.distil, training.temperature
    if training.compiled:
        layers = [layer for model in (student, teacher) if model is not None for layer in blocks(model)]
        first = text[: training.length + 1].expand(training.batch, -1)
        with torch._dynamo.config.patch(recompile_limit=_VARIANTS):
            compiled = functools.partial(_loss, student, teacher, Objective(*weights, compiled=True))
            try:
                if _works(compiled, student, layers, first):
                    yield compiled
                    return
            finally:
                for layer in layers:
                    layer._compiled_call_impl = None
    yield functools.partial(_loss, student, teacher, Objective(*weights))


def _works(loss: _Loss, student: nn.Module, layers: list[nn.Module], ids: torch.Tensor) -> bool:
    """Compile a step. Whether that works."""
    try:
        for layer in layers:
            layer.compile(dynamic=False)
        loss(ids.long())[0].backward()  # type: ignore[no-untyped-call]
        return True
    except Exception as error:  # whatever a compiler may raise: there is no C compiler, no Triton, a bug
        reason = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(f"the training could not be compiled: {reason}", stacklevel=2)
        return False
    finally:
        student.zero_grad()


def _loss(
    student: nn.Module, teacher: nn.Module | None, objective: Objective, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = ids[:, :-1], ids[:, 1:].reshape(-1)
    taught = None
    if teacher is not None:
        with torch.no_grad():
            taught = hidden_states(teacher, inputs)
    return objective(
        hidden_states(student, inputs), head(student), targets, taught, None if teacher is None else head(teacher)
    )


def _run(
    objective_of: _Loss,
    text: torch.Tensor,
    training: Training,
    weights: Weights,
    replacement: Replacement,
    history: History,
    state: State,
    progress: Progress,
    interrupted: Callable[[], bool],
) -> None:
    """The steps from `history.steps` on. The device is waited for only where something is logged or saved."""
    begins = _windows(len(text), training).to(text.device)
    offsets = torch.arange(training.length + 1, device=text.device)
    parts = torch.zeros(2, device=text.device)
    replaced, since = 0.0, history.steps
    clock = time.perf_counter()
    for step in range(history.steps, training.steps):
        replaced += replacement.draw(step, training.steps)
        for batch in begins[step]:
            loss, found = objective_of(text[batch[:, None] + offsets].long())
            (loss / training.accumulate).backward()  # type: ignore[no-untyped-call]
            parts += found / training.accumulate
        gradient = weights.step(training.rate_at(step))
        done = step + 1
        history.steps, history.tokens = done, done * training.step_tokens
        is_last = done == training.steps
        history.interrupted = not is_last and interrupted()
        due = training.checkpoint_every is not None and done % training.checkpoint_every == 0
        if not (is_last or history.interrupted or due or done % training.log_every == 0):
            continue
        steps = done - since
        cross_entropy, divergence = (parts / steps).tolist()  # waits for the device
        now = time.perf_counter()
        history.seconds += now - clock
        history.log.append(
            {
                "step": done,
                "tokens": history.tokens,
                "loss": training.cross_entropy * cross_entropy + training.distil * divergence,
                "cross_entropy": cross_entropy,
                "kl": divergence,
                "gradient": float(gradient),
                "rate": training.rate_at(step),
                "replaced": replaced / steps,
                "tokens_per_second": steps * training.step_tokens / (now - clock),
            }
        )
        if not math.isfinite(cross_entropy + divergence):
            raise DeltafmtError(f"the loss is no number at step {done}", hint="Lower the learning rate")
        state.log(history.log[-1])
        progress(history.tokens, training.steps * training.step_tokens, f"loss {history.log[-1]['loss']:.4f}")
        if is_last or history.interrupted or due:
            replacement.finish()
            state.save(history)
        parts.zero_()
        replaced, since, clock = 0.0, done, time.perf_counter()
        if history.interrupted:
            break
    if history.seconds:
        history.tokens_per_second = state.fresh_steps(history) * training.step_tokens / history.seconds


def _windows(tokens: int, training: Training) -> torch.Tensor:
    """Where each sequence begins: `[steps, accumulate, batch]`.

    The text is cut into windows, all of them are taken in random order, and it is cut anew, elsewhere (or, if it is
    documents, where these begin): so all tokens are seen about equally often. A window has one token more than a
    sequence, which is the last one's target.
    """
    random = torch.Generator().manual_seed(training.seed)
    wanted = training.steps * training.accumulate * training.batch
    cut: list[torch.Tensor] = []
    have = 0
    while have < wanted:
        room = tokens - 1 - training.length
        first = int(torch.randint(min(training.length, room + 1), (1,), generator=random))
        if training.document is not None:
            begins = torch.arange(0, room + 1, training.document)
        else:
            begins = torch.arange(first, room + 1, training.length)
        cut.append(begins[torch.randperm(len(begins), generator=random)])
        have += len(begins)
    return torch.cat(cut)[:wanted].reshape(training.steps, training.accumulate, training.batch)


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Gives what says whether Ctrl-C was pressed. The second one is as always."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.getsignal(signal.SIGINT) or signal.SIG_DFL

    def press(number: int, frame: FrameType | None) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
