"""What each part of DeltaLLM's initialisation brings, without training."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import deltafmt
from deltafmt.deltallm import Plan, Structure, delta_model, plan, second_moments
from deltafmt.methods.sharing import Parts
from deltallm_runs import Experiment, say


def ablation(experiment: Experiment, remove: float) -> Iterator[dict[str, Any]]:
    """For several layouts; a row for each part that is added."""
    asked = experiment.structure(remove)
    of_layers: tuple[Parts, ...] = ("mlp", "both")
    for parts, layout in itertools.product(of_layers, ("alternating", "sequential:2")):
        for title, row in _initialised(experiment, replace(asked, parts=parts, layout=layout)):
            yield {"remove": remove, "layout": layout, "parts": parts, "initialisation": title, **row}


def _initialised(experiment: Experiment, structure: Structure) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        fixed = plan(experiment.original, structure)
    except deltafmt.UsageError as error:
        say(f"  left out: {error}")
        return
    measured = plan(experiment.original, structure, experiment.influence)
    none = {"channels": False, "heads": False, "scales": False}
    whole = dict.fromkeys(none, True)
    steps: list[tuple[str, Plan, bool, dict[str, bool]]] = [
        ("SVD of the difference", fixed, False, none),
        ("weighted by inputs", fixed, True, none),
        ("+ channels", fixed, True, none | {"channels": True}),
        ("+ heads", fixed, True, none | {"channels": True, "heads": True}),
        ("+ scales", fixed, True, whole),
        ("+ layers by influence", measured, True, whole),
    ]
    for title, found, weighted, parts in steps:
        begin = time.perf_counter()
        teacher = experiment.aligned(found, **parts) if any(parts.values()) else experiment.original
        seconds = time.perf_counter() - begin
        moments = second_moments(teacher, experiment.calibration, found.anchors) if weighted else None
        student = delta_model(teacher, found, moments=moments)
        result = experiment.measured(student)
        row = {
            "perplexity": result.perplexity,
            "agreement": result.agreement,
            "KL": result.kl,
            "difference / weight": _distance(teacher, found),
            "error / weight": _distance(teacher, found, student),
            "align s": seconds,
        }
        yield title, row


def _distance(model: Any, found: Plan, student: Any = None) -> float:
    """Frobenius norm of the delta weights' differences from their anchors, relative to the weights; or, with a student,
    from what it makes of them."""
    difference = whole = 0.0
    for name, anchor in found.anchors.items():
        weight = model.get_submodule(name).weight.detach().float()
        other = student.get_submodule(name).merged_weight() if student else model.get_submodule(anchor).weight
        other = other.detach().float()
        difference += float((weight - other).square().sum())
        whole += float(weight.square().sum())
    return math.sqrt(difference / whole)
