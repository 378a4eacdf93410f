"""The state of a training: what trains, its optimizer, and the directory of log and checkpoints.

frozen/         an archive of everything that does not train
step-00000100/  an archive whose base that is: factors in float32; beside them, as files of it, what resuming takes
log.jsonl       one line for every few steps
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from ..checkpoint import FilePart
from ..digests import digest, model_digest
from ..errors import IntegrityError, UsageError
from ..limits import DEFAULT_LIMITS
from ..names import TRAINING_STATE
from ..reader import read_manifest
from ..sources import PathLike
from .save import save, save_frozen
from .structure import Plan
from .training import History, Training

_STATE, _FACTS = TRAINING_STATE
_LOG = "log.jsonl"
_REMOVED = ".removed"
_KEPT = 2
"""Checkpoints that are kept: the last one, and one more."""
_FREE = ("checkpoint_every", "log_every")
"""Of a training, what its result does not depend on."""


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


class State:
    """Checkpoints and log of a training, in its directory if it has one."""

    def __init__(
        self,
        folder: Path | None,
        student: nn.Module,
        teacher: nn.Module | None,
        plan: Plan | None,
        weights: Weights,
        training: Training,
        text: torch.Tensor,
        source: PathLike | None,
    ) -> None:
        self._folder, self._student, self._plan, self._source = folder, student, plan, source
        self._weights, self._first = weights, 0
        self._facts: dict[str, Any] = {}
        if folder is not None:
            settings = json.loads(json.dumps(asdict(training)))
            self._facts = {
                "training": {name: value for name, value in settings.items() if name not in _FREE},
                "text": digest(text.cpu().long().numpy()),
                "frozen part": _frozen_digest(student, teacher),
            }

    def fresh_steps(self, history: History) -> int:
        """Steps of this call."""
        return history.steps - self._first

    def load(self, history: History) -> bool:
        """Take the last checkpoint over, if there is one. Raises `UsageError` if it is another training's."""
        from safetensors.torch import load_file

        found = checkpoints(self._folder) if self._folder is not None else []
        if not found:
            return False
        last = found[-1]
        sidecars = read_manifest(last, DEFAULT_LIMITS).sidecars
        for name in (_STATE, _FACTS):
            if name not in sidecars or FilePart(last / name).digest() != sidecars[name].digest:
                raise IntegrityError("not as it was written", where=str(last / name), hint="Remove this checkpoint")
        facts = json.loads((last / _FACTS).read_text())
        for key, value in self._facts.items():
            if facts.get(key) != value:
                raise UsageError(
                    f"the training to resume is another: its {key} differs",
                    where=str(last),
                    hint="Choose another directory",
                )
        self._weights.restore(load_file(last / _STATE))
        history.log, history.steps, history.tokens = facts["log"], facts["steps"], facts["tokens"]
        self._first = history.steps
        self._write_log(history.log)
        return True

    def log(self, line: dict[str, float]) -> None:
        if self._folder is not None:
            with (self._folder / _LOG).open("a") as file:
                file.write(json.dumps(line) + "\n")
                _flush(file)

    def _write_log(self, lines: list[dict[str, float]]) -> None:
        """What was logged after the checkpoint will be logged again."""
        assert self._folder is not None
        fresh = self._folder / f".{_LOG}.new"
        with fresh.open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            _flush(file)
        os.replace(fresh, self._folder / _LOG)

    def save(self, history: History) -> None:
        """Write a checkpoint; remove all but the last few."""
        from safetensors.torch import save_file

        if self._folder is None:
            return
        target = self._folder / f"step-{history.steps:08d}"
        facts = {**self._facts, "steps": history.steps, "tokens": history.tokens, "log": history.log}
        with tempfile.TemporaryDirectory() as scratch:
            files = {name: Path(scratch) / name for name in (_STATE, _FACTS)}
            save_file(self._weights.state(), files[_STATE])
            files[_FACTS].write_text(json.dumps(facts))
            save(
                self._student,
                self._plan,
                target,
                source=self._source,
                base=self._folder / "frozen",
                sidecars=files,
                overwrite=target.exists(),
            )
        for old in checkpoints(self._folder)[:-_KEPT]:
            _remove(old)


def begin(folder: Path, student: nn.Module, resume: bool) -> None:
    """Make the directory of a training, with what is frozen. Raises `UsageError` if one is there and not resumed.

    What a training left that ended before its first checkpoint is replaced.
    """
    found = checkpoints(folder)
    if found and not resume:
        raise UsageError("a training is here already", where=str(folder), hint="Resume it, or choose another directory")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f".step-*{_REMOVED}"):
        shutil.rmtree(old)
    if not found:
        (folder / _LOG).unlink(missing_ok=True)
    if not found or not (folder / "frozen").exists():
        save_frozen(student, folder / "frozen")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a training's directory, in order. Each is whole: they appear, and go, by being renamed."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8}", path.name))


def _remove(checkpoint: Path) -> None:
    """Under another name first: what is half removed must not be taken for a checkpoint."""
    gone = checkpoint.with_name(f".{checkpoint.name}{_REMOVED}")
    os.rename(checkpoint, gone)
    shutil.rmtree(gone)


def _flush(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _frozen_digest(student: nn.Module, teacher: nn.Module | None) -> str:
    """The digest of all that does not train, by name."""
    trained = {id(each) for each in student.parameters() if each.requires_grad}
    digests: dict[int, str] = {}  # most tensors are both models'
    found = {}
    for role, model in (("student", student), ("teacher", teacher)):
        for name, tensor in () if model is None else model.state_dict(keep_vars=True).items():
            if id(tensor) in trained:
                continue
            if id(tensor) not in digests:
                bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                digests[id(tensor)] = digest(bits)
            found[f"{role}/{name}"] = str(tensor.dtype), tuple(tensor.shape), digests[id(tensor)]
    return model_digest(found)
