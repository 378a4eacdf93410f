"""DeltaLLM (arXiv 2501.18596): a pretrained language model turned into shared layers and low-rank deltas, trained so.

Needs `deltafmt[hf]`.
"""

from __future__ import annotations

import importlib.util

from ..errors import MissingExtraError

if any(importlib.util.find_spec(library) is None for library in ("torch", "transformers")):
    raise MissingExtraError("deltafmt.deltallm needs torch and transformers", extra="hf")

from ..torch.evaluate import Evaluation, evaluate, parameters
from .alignment import align
from .calibration import block_influence, second_moments
from .initialise import delta_model
from .save import save
from .structure import Plan, Structure, plan
from .train import Training, train

__all__ = [
    "Evaluation",
    "Plan",
    "Structure",
    "Training",
    "align",
    "block_influence",
    "delta_model",
    "evaluate",
    "parameters",
    "plan",
    "save",
    "second_moments",
    "train",
]
