"""What trains, and its optimizer."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..errors import UsageError
from .training import Training


class Weights:
    """What trains: parameters of the model, a float32 copy of those that are narrower, and AdamW on these."""

    def __init__(self, model: nn.Module, training: Training, *, fused: bool) -> None:
        self.named = {name: each for name, each in model.named_parameters() if each.requires_grad and each.numel()}
        if not self.named:
            raise UsageError("nothing of the student can be trained", hint="No parameter requires gradients")
        self.masters = {
            name: each if each.dtype == torch.float32 else each.detach().float() for name, each in self.named.items()
        }
        self._narrow = [name for name, each in self.named.items() if self.masters[name] is not each]
        self._clip = training.clip if training.clip > 0 else math.inf
        self.optimizer = torch.optim.AdamW(
            list(self.masters.values()),
            lr=training.rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
            fused=fused,
        )

    def step(self, rate: float) -> torch.Tensor:
        """Update, forget the gradients; gives their norm, before it was clipped."""
        for name in self._narrow:
            gradient = self.named[name].grad
            self.masters[name].grad = None if gradient is None else gradient.float()
        norm = torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self._clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name in self._narrow:
                self.named[name].copy_(self.masters[name])
                self.named[name].grad = None
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next step depends on, as tensors by name."""
        tensors = {f"weight/{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.optimizer.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Raises `UsageError` if they are of another model."""
        expected = {name: master.shape for name, master in self.masters.items()}
        found = {name.partition("/")[2]: each.shape for name, each in tensors.items() if name.startswith("weight/")}
        if expected != found:
            raise UsageError("the checkpoint is of another model: what trains is not the same")
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[f"weight/{name}"])
                self.named[name].copy_(master)
        for name, tensor in tensors.items():
            key, _, weight = name.partition("/")
            if key != "weight":
                master = self.masters[weight]
                on_device = key != "step" or self.optimizer.defaults["fused"]
                self.optimizer.state[master][key] = tensor.to(master.device) if on_device else tensor
