"""Packed models in torch: state dicts, and Hugging Face models that are dense, fused or lazy. Needs `deltafmt[torch]`;
`load_model` needs `deltafmt[hf]`."""

from __future__ import annotations

import importlib.util

from ..errors import MissingExtraError

if importlib.util.find_spec("torch") is None:
    raise MissingExtraError("deltafmt.torch needs torch", extra="torch")

from .bases import BaseCache
from .fused import merge, trainable
from .lazy import release
from .model import load_model, swap
from .state_dict import LazyStateDict, LazyTensor, load_state_dict
from .tenants import MultiTenant

__all__ = [
    "BaseCache",
    "LazyStateDict",
    "LazyTensor",
    "MultiTenant",
    "load_model",
    "load_state_dict",
    "merge",
    "release",
    "swap",
    "trainable",
]
