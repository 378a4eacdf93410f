"""How good and how large a causal language model is, by itself and beside the model that it was made from."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from ..errors import UsageError
from ..report import Progress, silent
from ..sources import PathLike

_ROWS = 1024
"""Positions whose logits are float32 at once: with 50,000 tokens in the vocabulary 200 MB."""


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a text, next token by next token.

    Attributes:
        perplexity: `exp` of the mean cross-entropy.
        accuracy: how often the likeliest token is the right one.
        agreement: how often it is the reference's likeliest; None without a reference.
        kl: mean Kullback-Leibler divergence of the model from the reference, `KL(reference || model)`, in nats.
        tokens: how many were predicted.
        seconds: of the model's own forward passes.
    """

    perplexity: float
    accuracy: float
    agreement: float | None
    kl: float | None
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else math.inf


def evaluate(
    model: nn.Module,
    tokens: torch.Tensor,
    *,
    reference: nn.Module | None = None,
    length: int = 512,
    batch: int = 8,
    device: torch.device | str | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Let a model predict a text in windows that do not overlap; the first token of each is given, not predicted.

    Args:
        model: a causal language model of transformers. It is in evaluation mode for the while.
        tokens: integers `[n]`. What does not fill the last window is left out, unless there is no other.
        reference: what it is compared with.
        length: tokens in a window.
        batch: windows at once.
        device: where the models are; by default, where the model's first parameter is.
        progress: told after each batch how many tokens are predicted, of how many.

    Raises:
        UsageError: fewer than two tokens, or in a window.
    """
    if tokens.numel() < 2 or length < 2 or batch < 1:
        found = f"{tokens.numel()} in windows of {length}"
        raise UsageError("there is nothing to predict", expected="two tokens or more", found=found)
    device = torch.device(device) if device is not None else next(model.parameters()).device
    windows = _windows(tokens, length)
    count = windows.shape[0] * (windows.shape[1] - 1)
    models = [model] if reference is None else [model, reference]
    modes = [each.training for each in models]
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    seconds, done = 0.0, 0
    try:
        for each in models:
            each.eval()
        with torch.no_grad():
            _logits(model, windows[:batch].to(device, torch.long))  # what a first call sets up is not timed
            for ids in torch.split(windows, batch):
                ids = ids.to(device, torch.long)
                _finish(device)
                begin = time.perf_counter()
                logits = _logits(model, ids)
                _finish(device)
                seconds += time.perf_counter() - begin
                others = None if reference is None else _logits(reference, ids)
                totals += _scores(logits, ids[:, 1:].reshape(-1), others)
                done += ids[:, 1:].numel()
                progress(done, count, "")
    finally:
        for each, mode in zip(models, modes, strict=True):
            each.train(mode)
    loss, right, same, kl = (totals / count).tolist()
    compared = reference is not None
    perplexity = math.inf if loss >= 700 else math.exp(loss)  # of NaN it is NaN
    return Evaluation(perplexity, right, same if compared else None, kl if compared else None, count, seconds)


def parameters(model: nn.Module) -> int:
    """How many numbers the parameters of a model hold; what is tied or shared counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def resident_bytes(*models: nn.Module) -> int:
    """Bytes in memory of models' parameters and buffers; what several share counts once, and whole. What a lazy model
    has not read is not in memory."""
    tensors = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta)
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def stored_bytes(path: PathLike) -> int:
    """Bytes of a file, or of all files in a directory."""
    root = Path(path)
    return root.stat().st_size if root.is_file() else sum(f.stat().st_size for f in root.rglob("*") if f.is_file())


def _windows(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """`[windows, length]`"""
    length = min(length, tokens.numel())
    return tokens[: tokens.numel() // length * length].view(-1, length)


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """For `[windows, length]`: `[windows * (length - 1), vocabulary]`; the last token predicts nothing we have."""
    output: Any = model(input_ids=ids, use_cache=False)
    logits: torch.Tensor = output.logits
    return logits[:, :-1].flatten(0, 1)


def _scores(logits: torch.Tensor, targets: torch.Tensor, others: torch.Tensor | None) -> torch.Tensor:
    """Sums over positions: cross-entropy, right, same as the others, KL; float64 `[4]`.

    `logits`, `others`: `[positions, vocabulary]`; `targets`: `[positions]`.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=logits.device)
    for rows in _slices(len(targets)):
        own = logits[rows].float()
        log_p = F.log_softmax(own, dim=-1)
        best = own.argmax(-1)
        sums[0] -= log_p.gather(1, targets[rows, None]).sum(dtype=torch.float64)
        sums[1] += (best == targets[rows]).sum()
        if others is not None:
            log_q = F.log_softmax(others[rows].float(), dim=-1)
            sums[2] += (best == log_q.argmax(-1)).sum()
            terms = F.kl_div(log_p, log_q, reduction="none", log_target=True)
            terms = terms.masked_fill(log_q == -math.inf, 0)  # what the reference rules out
            sums[3] += terms.sum(-1).sum(dtype=torch.float64)
    return sums


def _slices(count: int) -> Iterator[slice]:
    for begin in range(0, count, _ROWS):
        yield slice(begin, begin + _ROWS)


def _finish(device: torch.device) -> None:
    """Wait for what was asked of an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
