"""SGLang serves archives. Installed beside it, deltafmt is found as a plugin: a directory that holds an archive loads.

    python -m sglang.launch_server --model-path packed/
    DELTAFMT_BASE=base/ python -m sglang.launch_server --model-path packed/

SGLang has no registry of loaders, so its default loader is hooked where it begins to read a checkpoint; what is no
archive goes on as before. The environment variable names the base, or several, separated as in `PATH`: SGLang lets no
option of a plugin through. Models on the Hub are to be downloaded first (`hf download`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from .reader import is_archive
from .torch.stream import stream

if TYPE_CHECKING:
    import torch

BASE = "DELTAFMT_BASE"
HOOKED = "sglang.srt.model_loader.loader.DefaultModelLoader._get_weights_iterator"
"""What everything goes through that reads a checkpoint: loading, secondary weights, `update_weights_from_disk`."""


@functools.cache
def register() -> None:
    """The entry point of the group `sglang.srt.plugins`. SGLang calls it in every process before it loads a model."""
    HookRegistry.register(HOOKED, around, HookType.AROUND)


def around(
    original: Callable[..., Iterator[tuple[str, torch.Tensor]]], loader: Any, source: Any, **options: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every tensor of `source.model_or_path`, whose names get the prefix `source.prefix`."""
    path = Path(source.model_or_path)
    if not is_archive(path):
        return original(loader, source, **options)
    base = [place for place in os.environ.get(BASE, "").split(os.pathsep) if place]
    return stream(path, base, source.prefix)
