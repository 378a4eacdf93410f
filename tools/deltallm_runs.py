"""The runs of the DeltaLLM experiment: a model is built, measured, trained and packed, and measured after each."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import deltafmt
import deltafmt.torch
import deltallm_subjects as subjects
from deltafmt.deltallm import Plan, Structure, align, block_influence, delta_model, plan, second_moments
from deltafmt.deltallm.architecture import blocks, linears
from deltafmt.deltallm.baselines import drop_layers, lora_numbers, lora_rank, merge_layers, svd_model
from deltafmt.deltallm.initialise import twin
from deltafmt.deltallm.save import save
from deltafmt.deltallm.state import checkpoints, state_of
from deltafmt.deltallm.train import Training, train
from deltafmt.torch.evaluate import Evaluation, evaluate, parameters, resident_bytes, stored_bytes

METHODS = ("delta", "svd", "asvd", "drop", "merge", "control")
INITIAL = ("plain", "weighted", "full")
"""How the deltas begin: SVD of the difference; weighted by the inputs; and with the layers aligned before."""

AFTERWARDS = 60.0
"""Seconds for measuring and packing after a training that stops by itself when its time is up."""


_COMPARED = 1024
"""Tokens on which logits are compared."""


@dataclass(frozen=True)
class Run:
    """One model that is built and trained. `structure` says how the deltas lie; of other methods it is empty."""

    model: str
    method: str
    remove: float
    seed: int
    tokens: int
    structure: str = ""

    @property
    def title(self) -> str:
        return f"{self.method} -{self.remove:.0%} {self.structure} seed {self.seed}, {self.tokens:,} tokens"


class Experiment:
    """The original, its text, and whatever all runs need of them."""

    def __init__(self, options: argparse.Namespace, out: Path) -> None:
        self.options, self.out = options, out
        self.device, self.dtype = torch.device(options.device), getattr(torch, options.dtype)
        if options.model_dir:
            self.subject = subjects.from_files(options.model_dir, options.tokens_file, options.held_out)
        else:
            self.subject = subjects.subject(options.model)
        self.original: Any = AutoModelForCausalLM.from_pretrained(self.subject.directory, dtype=self.dtype)
        self.original = self.original.to(self.device).eval().requires_grad_(False)
        held_out = self.subject.held_out
        if self.subject.document is not None:  # windows are whole documents
            options.length = self.subject.document
        self.held_out = held_out[: options.evaluate] if options.evaluate else held_out
        self.text = self.subject.train
        self._taught: dict[float, tuple[Any, Plan, dict[str, torch.Tensor] | None]] = {}

    # What all have in common

    @property
    def calibration(self) -> Iterator[torch.Tensor]:
        """Batches of text that is also trained on: `[batch, length]`."""
        length, batch = self.options.length, self.options.batch
        count = max(1, min(self.options.calibrate, self.text.numel()) // length)
        # From everywhere in the text, not from its beginning.
        begins = torch.linspace(0, self.text.numel() - length, count).long()
        begins = begins // (self.subject.document or 1) * (self.subject.document or 1)
        windows = torch.stack([self.text[begin : begin + length] for begin in begins.tolist()])
        yield from torch.split(windows, batch)

    @cached_property
    def influence(self) -> list[float]:
        return block_influence(self.original, self.calibration)

    @cached_property
    def original_scores(self) -> dict[str, Any]:
        """Of the original: what every record repeats."""
        found = scores(self.measured(self.original, reference=False))
        archive = self.out / "original"
        deltafmt.pack(self.subject.directory, archive, overwrite=True)
        stored = stored_bytes(archive)
        shutil.rmtree(archive)
        return found | {
            "parameters": parameters(self.original),
            "plain_bytes": 2 * parameters(self.original),
            "stored_bytes": stored,
            "resident_bytes": resident_bytes(self.original),
        }

    def measured(self, model: torch.nn.Module, reference: bool = True) -> Evaluation:
        return evaluate(
            model,
            self.held_out,
            reference=self.original if reference else None,
            length=self.options.length,
            batch=self.options.batch,
            device=self.device,
        )

    def structure(self, remove: float) -> Structure:
        options = self.options
        return Structure(
            layout=options.layout,
            parts=options.parts,
            keep_first=options.keep[0],
            keep_last=options.keep[1],
            remove=remove,
            delta_layers=options.delta_layers,
        )

    def plan(self, remove: float) -> Plan:
        return plan(self.original, self.structure(remove), self.influence if self.options.importance else None)

    def factor_count(self, remove: float) -> int:
        """How many numbers the factors of the delta model have."""
        found = self.plan(remove)
        shapes = {name: self.original.get_submodule(name).weight.shape for name in found.ranks}
        return sum(rank * sum(shapes[name]) for name, rank in found.ranks.items())

    def aligned(self, found: Plan, **parts: bool) -> Any:
        """The original with layers that are written so that they resemble their anchors; what it computes stays."""
        teacher = copy.deepcopy(self.original)
        align(teacher, found, **parts)  # scales are powers of two: nothing is rounded
        return teacher

    # Building

    def taught(self, remove: float) -> tuple[Any, Plan, dict[str, torch.Tensor] | None]:
        """Teacher, structure and second moments of a delta model; the same for every seed."""
        if remove not in self._taught:
            found, initial = self.plan(remove), self.options.initial
            teacher = self.aligned(found) if initial == "full" else self.original
            moments = None if initial == "plain" else second_moments(teacher, self.calibration, found.anchors)
            self._taught[remove] = teacher, found, moments
        return self._taught[remove]

    def build(self, run: Run) -> tuple[Any, Any, Plan | None]:
        """The model to be trained, its teacher, and how its deltas lie."""
        if run.method == "delta":
            teacher, found, moments = self.taught(run.remove)
            return delta_model(teacher, found, moments=moments), teacher, found
        if run.method in ("svd", "asvd"):
            first, last = self.options.keep
            inner = range(first, len(blocks(self.original)) - last)
            names = [name for layer in inner for name in linears(self.original, layer, self.options.parts)]
            moments = second_moments(self.original, self.calibration, names) if run.method == "asvd" else None
            return svd_model(self.original, run.remove, names=names, moments=moments), self.original, None
        if run.method == "control":
            return twin(self.original), self.original, None
        shrink = drop_layers if run.method == "drop" else merge_layers
        return shrink(self.original, self.influence, run.remove), self.original, None

    # One run

    def perform(self, run: Run, seconds: float | None) -> dict[str, Any] | None:
        """Build, measure, train, measure; the record of it. None if time was too short: another call goes on."""
        begin = time.perf_counter()
        torch.manual_seed(run.seed)
        student, teacher, found = self.build(run)
        size = parameters(student)
        initial = self.measured(student)
        trainable = sum(weight.numel() for weight in student.parameters() if weight.requires_grad)
        training = self.training(run)
        if not trainable:
            rank = lora_rank(student, self.options.trainable or self.factor_count(run.remove or self.options.remove[0]))
            training = replace(training, lora=rank)
        say(f"  built in {time.perf_counter() - begin:.0f} s: perplexity {initial.perplexity:.2f}")
        folder = self.out / "runs" / identity(run, self.settings)
        kept = self.options.checkpoint_every is not None
        if seconds is not None:
            seconds = max(1.0, seconds - (time.perf_counter() - begin) - AFTERWARDS)
        with progress(run.title) as told:
            history = train(
                student,
                teacher,
                found,
                self.text,
                training,
                directory=folder,
                device=self.device,
                resume=True,
                progress=told,
                seconds=seconds if kept else None,
            )
        if history.interrupted:
            return None
        student.eval().requires_grad_(False)
        trained = self.measured(student)
        say(f"  trained at {history.log[-1]['tokens_per_second']:,.0f} tokens/s: perplexity {trained.perplexity:.2f}")
        stored, sizes = self.stored(run, student, found), checkpoint_sizes(folder)
        step, state, frozen = (size / 1e6 for size in sizes.values())
        say(f"  a checkpoint has {step:.1f} MB; once, {state:.1f} MB to resume and {frozen:.1f} MB that are frozen")
        record = {
            "run": asdict(run),
            "settings": self.settings,
            "parameters": size,
            "removed": 1 - size / parameters(self.original),
            "trainable": trainable or (training.lora or 0) * lora_numbers(student),
            "plain_bytes": 2 * size,
            "original": self.original_scores,
            "initial": scores(initial),
            "trained": scores(trained),
            **stored,
            "checkpoint": sizes,
            "train_seconds": sum(seconds_of(history.log)),
            "seconds": time.perf_counter() - begin,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU",
            "dtype": self.options.dtype,
            "torch": torch.__version__,
        }
        for served in folder.iterdir():  # checkpoints; the log stays
            if served.is_dir():
                shutil.rmtree(served)
        return record

    def stored(self, run: Run, student: Any, found: Plan | None) -> dict[str, Any]:
        """What the trained model takes on disk as an archive, how good it is when it is read back, fused, and how far
        its logits are from the trained model's: fused, dense, and unpacked to a plain checkpoint."""
        archive = self.out / "archives" / identity(run, self.settings)
        archive.parent.mkdir(exist_ok=True)
        save(student, found, archive, source=self.subject.directory, dtype=torch.bfloat16, overwrite=True)
        loaded = deltafmt.torch.load_model(archive, mode="fused", device=self.device, dtype=self.dtype)
        packed = scores(self.measured(loaded))
        result: dict[str, Any] = {
            "stored_bytes": stored_bytes(archive),
            "packed": packed,
            "resident_bytes": resident_bytes(loaded),
        }
        expected = self.logits(student)
        off = {"fused": distance_of(self.logits(loaded), expected)}
        del loaded
        dense = deltafmt.torch.load_model(archive, mode="full", device=self.device, dtype=self.dtype)
        off["full"] = distance_of(self.logits(dense), expected)
        del dense
        plain = archive.with_name(f"{archive.name}-unpacked")
        deltafmt.unpack(archive, plain, overwrite=True)
        unpacked: Any = AutoModelForCausalLM.from_pretrained(plain, dtype=self.dtype)
        off["unpacked"] = distance_of(self.logits(unpacked.to(self.device).eval()), expected)
        shutil.rmtree(plain)
        if not self.options.keep_archives:
            shutil.rmtree(archive)
        told = ", ".join(f"{way} {largest:.2g}" for way, largest in off.items())
        say(f"  packed to {result['stored_bytes'] / 1e6:.1f} MB; its logits are off by at most: {told}")
        return result | {"logits_off": off}

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        """What a model says of the beginning of the held-out text: `[windows, length, vocabulary]`."""
        length = self.options.length
        windows = max(1, min(_COMPARED, len(self.held_out)) // length)
        ids = self.held_out[: windows * length].view(windows, -1).to(self.device)
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    def training(self, run: Run) -> Training:
        given = {name: value for name, value in self.settings.items() if name in Training.__dataclass_fields__}
        if (document := self.subject.document) is not None:
            given |= {"document": document, "length": document - 1}  # the window's last token is only a target
        return Training(tokens=run.tokens, seed=run.seed, checkpoint_every=self.options.checkpoint_every, **given)

    @property
    def settings(self) -> dict[str, Any]:
        """What the results depend on beside the run."""
        names: tuple[str, ...] = (
            "batch",
            "length",
            "accumulate",
            "rate",
            "distil",
            "cross_entropy",
            "temperature",
            "replace_until",
        )
        names += ("replace_from", "norms", "lora", "compiled")
        # The layout decides how much drop and merge train, too.
        names += ("layout", "parts", "keep", "dtype", "trainable", "evaluate", "calibrate")
        return {name: getattr(self.options, name) for name in names}


def distance_of(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference."""
    return float((logits.float() - expected.float()).abs().max())


def scores(evaluation: Evaluation) -> dict[str, Any]:
    return asdict(evaluation) | {"tokens_per_second": evaluation.tokens_per_second}


def identity(run: Run, settings: dict[str, Any]) -> str:
    """A name for the files of a run."""
    key = sha256(json.dumps([asdict(run), settings], sort_keys=True).encode()).hexdigest()[:8]
    return f"{run.model}-{run.method}-{run.remove:g}-{run.seed}-{key}"


def checkpoint_sizes(folder: Path) -> dict[str, int]:
    """Bytes of a training's last checkpoint, of what it takes to resume it, and of what all checkpoints refer to."""
    step = checkpoints(folder)[-1]
    found = {"step": step, "state": state_of(step), "frozen": folder / "frozen"}
    return {f"{name}_bytes": stored_bytes(path) for name, path in found.items()}


def seconds_of(log: list[dict[str, float]]) -> Iterator[float]:
    """How long the steps between lines of a log took."""
    before = 0.0
    for line in log:
        yield (line["tokens"] - before) / line["tokens_per_second"]
        before = line["tokens"]


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar in a terminal; elsewhere a line for each tenth."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress, TimeRemainingColumn

        with Progress(*Progress.get_default_columns()[:-1], TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(title)
            yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
        return
    told = 0

    def tell(done: int, total: int, what: str) -> None:
        nonlocal told
        if 10 * done // total > told:
            told = 10 * done // total
            say(f"  {done:,} of {total:,} tokens: {what}")

    yield tell


def append(file: Path, record: dict[str, Any]) -> None:
    """One more line, at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as sink:
        sink.write(json.dumps(record) + "\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
