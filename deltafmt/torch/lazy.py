"""Weights that are read when a layer runs, and let go when it has run."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..archive import OpenArchive
from ..reader import Archive
from .tensors import Cast


class LazyWeights:
    """Reads the parameters of each module before its `forward`, and drops them after it unless `keep`.

    Meanwhile they are on the meta device. A module that looks at the weight of another one without calling it finds it
    there, and fails. Thread-safe. The archive is closed once no module is left that reads it, nor a copy of one.
    """

    def __init__(self, archive: Archive, jobs: int | None, keep: bool) -> None:
        self._archive, self._keep = OpenArchive(archive, True, jobs), keep
        self._lock = threading.RLock()
        self._running: dict[nn.Module, int] = {}
        weakref.finalize(self, self._archive.close)

    def attach(self, module: nn.Module, tensors: Mapping[str, tuple[str, Cast]]) -> None:
        """Have this module's parameters read from the archive: name of a parameter -> name of a tensor, and as what."""

        def fill(module: nn.Module, _inputs: Any) -> None:
            with self._lock:
                self._running[module] = self._running.get(module, 0) + 1
                for name, (tensor, cast) in tensors.items():
                    if getattr(module, name).device.type == "meta":
                        weight = cast(self._archive.get_tensor(tensor))
                        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))

        def drop(module: nn.Module, _inputs: Any, _output: Any) -> None:
            with self._lock:
                calls = self._running.pop(module, 0) - 1
                if calls > 0:
                    self._running[module] = calls
                elif not self._keep:
                    for name in tensors:
                        empty = torch.empty_like(getattr(module, name), device="meta")
                        module.register_parameter(name, nn.Parameter(empty, requires_grad=False))

        module.register_forward_pre_hook(fill)
        module.register_forward_hook(drop, always_call=True)
