"""A packed model tensor by tensor, as engines ask for it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..sources import Bases, PathLike
from .state_dict import load_state_dict
from .tensors import SharedPieces


def stream(path: PathLike, base: Bases | None = None, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Name (behind a prefix) and value of every tensor of an archive, in its order; each is rebuilt as its turn comes.

    Raises what `load_state_dict` does, as the first is asked for, and `IntegrityError` for damaged tensors.
    """
    with load_state_dict(path, base=base, lazy=True) as tensors:
        shared = SharedPieces(tensors._archive)
        for name in tensors:
            yield prefix + name, shared.get_slice(name)[...]
