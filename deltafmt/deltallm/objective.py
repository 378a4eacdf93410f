"""What is minimised: cross-entropy with the next token, and distillation of the teacher's logits (Hinton et al.,
arXiv 1503.02531), from hidden states, in slices.

Logits of a batch are the largest thing in the training of a small model: 32,768 tokens of a vocabulary of 49,152 take
6 GiB in float32, several times over. So they are made slice by slice, together with the gradient of the loss by the
hidden states, and let go (the idea of Liger Kernel's fused linear cross-entropy, arXiv 2410.10989).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from ..errors import UnsupportedError
from ..torch.fused import Delta

_SLICE = {"cuda": 1 << 28, "cpu": 1 << 23}
"""Logits at a time, by device."""


@dataclass(frozen=True)
class Objective:
    """The weights of the loss's parts, and the temperature of the distillation.

    Attributes:
        cross_entropy: weight of the mean negative log-probability of the next token.
        distil: weight of the mean KL divergence of the student from the teacher, both at `temperature`, times its
            square, so that gradients keep their size.
        compiled: compile what is done to the logits of a slice.
    """

    cross_entropy: float = 1.0
    distil: float = 1.0
    temperature: float = 1.0
    compiled: bool = False

    def __call__(
        self,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        teacher_hidden: torch.Tensor | None = None,
        teacher_head: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a batch of `N` tokens.

        Args:
            hidden, teacher_hidden: last hidden states `[N, width]`; no teacher: no distillation.
            head, teacher_head: the output embeddings `[vocabulary, width]`, of the same dtype.
            targets: the next tokens, int64 `[N]`.

        Returns:
            The loss, float32 `[]`, to go backward from; and its parts without weights, cross-entropy and KL, float32
            `[2]`.
        """
        teacher = teacher_hidden if self.distil else None
        loss, parts = _SlicedLoss.apply(hidden, head, targets, teacher, teacher_head, self)  # type: ignore[no-untyped-call]
        return loss, parts


def hidden_states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What a causal language model gives to its output embeddings: `[tokens, width]` for ids `[batch, length]`."""
    states: torch.Tensor = model.base_model(input_ids=ids, use_cache=False)[0]
    return states.reshape(-1, states.shape[-1])


def head(model: Any) -> torch.Tensor:
    """The output embeddings of a causal language model, `[vocabulary, width]`."""
    layer = model.get_output_embeddings()
    weight: torch.Tensor = layer.merged_weight() if isinstance(layer, Delta) else layer.weight
    return weight


def check_head(model: Any, ids: torch.Tensor) -> None:
    """Raise `UnsupportedError` if a model does anything to its logits but what a linear layer does. `ids`: `[1, T]`."""
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        found = F.linear(hidden_states(model, ids), head(model))
    tolerance = 2e-2 if found.dtype.itemsize == 2 else 1e-3  # rounding, by far
    expected, found = expected.float(), found.float()
    if expected.shape != found.shape or not (expected - found).norm() <= tolerance * expected.norm():
        raise UnsupportedError(
            f"{type(model).__name__} computes its logits in another way than as hidden states times output embeddings"
        )


class _SlicedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        teacher_hidden: torch.Tensor | None,
        teacher_head: torch.Tensor | None,
        objective: Objective,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, vocabulary = hidden.shape[0], head.shape[0]
        slices = -(-tokens * vocabulary // _SLICE.get(hidden.device.type, _SLICE["cpu"]))
        slice_loss = _compiled() if objective.compiled else _slice_loss
        of_hidden = torch.empty_like(hidden)
        of_head = torch.zeros_like(head, dtype=torch.float32) if head.requires_grad else None
        parts = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        end = 0
        for part in hidden.tensor_split(min(slices, tokens)):
            begin, end = end, end + part.shape[0]
            teacher = None
            if teacher_hidden is not None:
                assert teacher_head is not None
                teacher = F.linear(teacher_hidden[begin:end], teacher_head)
            logits = F.linear(part, head)
            gradient, sums = slice_loss(
                logits,
                teacher,
                targets[begin:end],
                objective.cross_entropy,
                objective.distil,
                objective.temperature,
            )
            parts += sums
            torch.mm(gradient, head, out=of_hidden[begin:end])
            if of_head is not None:
                of_head += gradient.t() @ part
        parts /= tokens
        ctx.tokens = tokens
        ctx.save_for_backward(of_hidden, of_head)
        ctx.mark_non_differentiable(parts)
        return objective.cross_entropy * parts[0] + objective.distil * parts[1], parts

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        of_hidden, of_head = ctx.saved_tensors
        factor = gradients[0] / ctx.tokens
        by_head = None if of_head is None else (of_head * factor).to(of_hidden.dtype)
        return of_hidden * factor.to(of_hidden.dtype), by_head, None, None, None, None


def _slice_loss(
    logits: torch.Tensor,
    teacher: torch.Tensor | None,
    targets: torch.Tensor,
    cross_entropy: float,
    distil: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a slice's loss, summed over its tokens, by its logits `[n, vocabulary]`, in their dtype; and the
    sums of cross-entropy and KL, `[2]`.

    By the logits z, the first has the gradient p - y, and the second, times T^2, T (p_T - q_T): p, q the probabilities
    of student and teacher, y the target.
    """
    of_student = F.log_softmax(logits, -1, dtype=torch.float32)
    targets = targets[:, None]
    loss = -of_student.gather(1, targets).sum()
    if teacher is None:
        gradient = of_student.exp_().mul_(cross_entropy)
        divergence = torch.zeros_like(loss)
    elif temperature == 1:
        of_teacher = F.log_softmax(teacher, -1, dtype=torch.float32)
        goal = of_teacher.exp()
        divergence = torch.dot(goal.view(-1), of_teacher.sub_(of_student).view(-1))
        gradient = of_student.exp_().mul_(cross_entropy + distil).sub_(goal, alpha=distil)
    else:
        softened = F.log_softmax(logits / temperature, -1, dtype=torch.float32)
        of_teacher = F.log_softmax(teacher / temperature, -1, dtype=torch.float32)
        goal = of_teacher.exp()
        divergence = torch.dot(goal.view(-1), of_teacher.sub_(softened).view(-1)) * temperature**2
        gradient = of_student.exp_().mul_(cross_entropy)
        gradient.add_(softened.exp_().sub_(goal), alpha=distil * temperature)
    gradient.scatter_add_(1, targets, torch.full_like(targets, -cross_entropy, dtype=gradient.dtype))
    return gradient.to(logits.dtype), torch.stack((loss, divergence))


@functools.cache
def _compiled() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return torch.compile(_pure_slice_loss, dynamic=False)


def _pure_slice_loss(
    logits: torch.Tensor,
    teacher: torch.Tensor | None,
    targets: torch.Tensor,
    cross_entropy: float,
    distil: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `_slice_loss`, for a compiler: nothing in place, no product that is not fused."""
    wide = logits.float()
    of_student = F.log_softmax(wide, -1)
    chosen = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    loss = -of_student.gather(1, targets[:, None]).sum()
    gradient = cross_entropy * (of_student.exp() - chosen.float())
    if teacher is None:
        return gradient.to(logits.dtype), torch.stack((loss, torch.zeros_like(loss)))
    softened = F.log_softmax(wide / temperature, -1)
    of_teacher = F.log_softmax(teacher.float() / temperature, -1)
    goal = of_teacher.exp()
    divergence = (goal * (of_teacher - softened)).sum() * temperature**2
    gradient = gradient + distil * temperature * (softened.exp() - goal)
    return gradient.to(logits.dtype), torch.stack((loss, divergence))
