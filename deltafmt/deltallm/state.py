"""The state of a training: the directory of its log and checkpoints.

frozen/          an archive of everything that does not train
step-00000100/   an archive whose base that is: factors, in float32, and whatever else trains
state-00000100/  what resuming takes beside the last of these, an archive, too: the optimizer's moments, what trains in
                 float32 (of factors only the order of their components), and training.json: what is no tensor
log.jsonl        one line for every few steps
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import nn

from ..archive import open as open_lazily
from ..checkpoint import FilePart
from ..digests import digest, model_digest
from ..errors import IntegrityError, UsageError
from ..limits import DEFAULT_LIMITS
from ..operators import Lowrank, Stored
from ..pack import pack
from ..reader import read_manifest
from ..sources import PathLike, open_archive
from ..torch.fused import deltas
from .save import order, save, save_frozen
from .structure import Plan
from .training import History, Training
from .weights import Weights

_TENSORS_FILE, _FACTS_FILE = "training.safetensors", "training.json"
_LOG = "log.jsonl"
_REMOVED = ".removed"
_SCRATCH = ".scratch-"
_LEFT_BEHIND = re.compile(  # by a call that was killed: what was being written (`durable.Staging`), or removed
    rf"{re.escape(_SCRATCH)}.*|\..*{re.escape(_REMOVED)}|\.(state-\d{{8}}|step-\d{{8}}|frozen)\.deltafmt-[0-9a-f]{{12}}"
)
_KEPT = 2
"""Checkpoints that are kept: the last one, and one more, which cannot be resumed."""
_FREE = ("checkpoint_every", "log_every")
"""Of a training, what its result does not depend on."""


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
        self._identity: dict[str, Any] = {}
        if folder is not None:
            settings = json.loads(json.dumps(asdict(training)))
            self._identity = {
                "training": {name: value for name, value in settings.items() if name not in _FREE},
                "text": digest(text.cpu().long().numpy()),
                "frozen part": _frozen_digest(student, teacher),
            }

    def fresh_steps(self, history: History) -> int:
        """Steps of this call."""
        return history.steps - self._first

    def load(self, history: History) -> bool:
        """Take the last checkpoint over, if there is one. Raises `UsageError` if it is another training's."""
        found = checkpoints(self._folder) if self._folder is not None else []
        if not found:
            return False
        last = found[-1]
        state = state_of(last)
        if not state.is_dir():
            raise IntegrityError(
                f"'{state.name}' is not there, without which this training cannot be resumed",
                where=str(last),
                hint="Begin another one, in another directory",
            )
        facts = _read_facts(state)
        for key, value in self._identity.items():
            if facts.get(key) != value:
                raise UsageError(
                    f"the training to resume is another: its {key} differs",
                    where=str(last),
                    hint="Choose another directory",
                )
        with open_lazily(state, framework="pt") as archive:
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 - it is no dict
        whole = _with_factors(tensors, last)
        if _digest({name: whole[name] for name in whole.keys() - tensors.keys()}) != facts.get("factors"):
            raise IntegrityError(
                f"its factors are not those that '{state.name}' belongs to",
                where=str(last),
                hint="Copy both again, or begin another training, in another directory",
            )
        self._weights.restore(whole)
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
        """Write a checkpoint; remove all but the last few, and the state beside all but this one.

        Whenever this is cut short, the last checkpoint has its state: that is there before, and goes when another has.
        """
        from safetensors.torch import save_file

        if self._folder is None:
            return
        target = self._folder / f"step-{history.steps:08d}"
        state = state_of(target)
        whole = self._weights.state()
        left = _without_factors(whole, self._student)
        facts = {
            **self._identity,
            "steps": history.steps,
            "tokens": history.tokens,
            "log": history.log,
            "factors": _digest({name: whole[name] for name in whole.keys() - left.keys()}),
        }
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=self._folder) as scratch:
            save_file(left, Path(scratch) / _TENSORS_FILE)
            (Path(scratch) / _FACTS_FILE).write_text(json.dumps(facts))
            pack(scratch, state, overwrite=state.exists())
        save(
            self._student,
            self._plan,
            target,
            source=self._source,
            base=self._folder / "frozen",
            overwrite=target.exists(),
        )
        _prune(self._folder)


def begin(folder: Path, student: nn.Module, resume: bool) -> None:
    """Make the directory of a training, with what is frozen. Raises `UsageError` if one is there and not resumed.

    What a training left that ended before its first checkpoint is replaced.
    """
    found = checkpoints(folder)
    if found and not resume:
        raise UsageError("a training is here already", where=str(folder), hint="Resume it, or choose another directory")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if _LEFT_BEHIND.fullmatch(old.name):
            shutil.rmtree(old)
    _prune(folder)
    if not found:
        (folder / _LOG).unlink(missing_ok=True)
    if not found or not (folder / "frozen").exists():
        save_frozen(student, folder / "frozen")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a training's directory, in order. Each is whole: they appear, and go, by being renamed."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8}", path.name))


def state_of(checkpoint: Path) -> Path:
    """Where what resumes a checkpoint is, if it is the last one."""
    return checkpoint.with_name(checkpoint.name.replace("step", "state"))


def _read_facts(state: Path) -> dict[str, Any]:
    """What of a state is no tensor."""
    file, sidecars = state / _FACTS_FILE, read_manifest(state, DEFAULT_LIMITS).sidecars
    if _FACTS_FILE not in sidecars or FilePart(file).digest() != sidecars[_FACTS_FILE].digest:
        raise IntegrityError(
            "not as it was written", where=str(file), hint="Begin another training, in another directory"
        )
    facts: dict[str, Any] = json.loads(file.read_text())
    return facts


def _without_factors(tensors: dict[str, torch.Tensor], student: nn.Module) -> dict[str, torch.Tensor]:
    """The state without the factors that the checkpoint's archive has bit for bit; in place of a layer's the order in
    which they are there."""
    left = dict(tensors)
    for layer, delta in deltas(student).items():
        names = [f"weight/{layer}.factors.{role}" for role in ("lora_a", "lora_b")]
        if delta.factors.lora_a.dtype == torch.float32 and all(name in tensors for name in names):
            for name in names:
                del left[name]
            left[f"order/{layer}"] = order(delta.factors)
    return left


def _with_factors(tensors: dict[str, torch.Tensor], checkpoint: Path) -> dict[str, torch.Tensor]:
    """The state with the factors that are in the checkpoint's archive."""
    whole = {name: tensor for name, tensor in tensors.items() if not name.startswith("order/")}
    with open_archive(checkpoint) as archive:
        for name in tensors.keys() - whole.keys():
            layer = name.removeprefix("order/")
            recipe = archive.manifest.tensors[f"{layer}.weight"].recipe
            (low,) = (node for node in recipe.walk() if isinstance(node, Lowrank))
            for role, array in (("lora_a", low.a), ("lora_b", low.b)):
                assert isinstance(array, Stored)
                shape = archive.manifest.arrays[array.array].shape
                found = torch.from_numpy(archive.stored_array(array.array).view(np.float32)).view(shape)
                factor = torch.empty_like(found)
                factor[tensors[name]] = found
                whole[f"weight/{layer}.factors.{role}"] = factor
    return whole


def _prune(folder: Path) -> None:
    """Keep the last few checkpoints, and the state of the last one."""
    found = checkpoints(folder)
    for old in found[:-_KEPT]:
        _remove(old)
    needed = {state_of(last) for last in found[-1:]}
    for state in folder.glob("state-*"):
        if state not in needed:
            _remove(state)


def _remove(checkpoint: Path) -> None:
    """Under another name first: what is half removed must not be taken for a checkpoint."""
    gone = checkpoint.with_name(f".{checkpoint.name}{_REMOVED}")
    os.rename(checkpoint, gone)
    shutil.rmtree(gone)


def _flush(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of tensors by name."""
    return model_digest({name: (str(each.dtype), tuple(each.shape), _bits(each)) for name, each in tensors.items()})


def _bits(tensor: torch.Tensor) -> str:
    """The digest of a tensor's bytes."""
    return digest(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


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
                digests[id(tensor)] = _bits(tensor)
            found[f"{role}/{name}"] = str(tensor.dtype), tuple(tensor.shape), digests[id(tensor)]
    return model_digest(found)
