"""Weights that are read when a layer runs, and let go when it has run."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from ..pipeline import Pool
from ..reader import Archive
from .tensors import Cast, read_tensor


class LazyWeights:
    """Reads the parameters of each module before its `forward`, and drops them after it unless `keep`.

    Meanwhile they are on the meta device. A module that looks at the weight of another one without calling it finds it
    there, and fails. Thread-safe.
    """

    def __init__(self, archive: Archive, cast: Cast, jobs: int | None, keep: bool) -> None:
        self._archive, self._cast, self._keep = archive, cast, keep
        self._pool = Pool(jobs)
        self._lock = threading.RLock()
        self._running: dict[nn.Module, int] = {}

    def attach(self, module: nn.Module, tensors: dict[str, str]) -> None:
        """Have this module's parameters read from the archive: name of a parameter -> name of a tensor."""

        def fill(module: nn.Module, _inputs: Any) -> None:
            with self._lock:
                self._running[module] = self._running.get(module, 0) + 1
                for name, tensor in tensors.items():
                    if getattr(module, name).device.type == "meta":
                        weight = read_tensor(self._archive, tensor, self._cast, self._pool)
                        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))

        def drop(module: nn.Module, _inputs: Any, _output: Any) -> None:
            with self._lock:
                self._running[module] -= 1
                if self._running[module] == 0 and not self._keep:
                    for name in tensors:
                        empty = torch.empty_like(getattr(module, name), device="meta")
                        module.register_parameter(name, nn.Parameter(empty, requires_grad=False))

        module.register_forward_pre_hook(fill)
        module.register_forward_hook(drop, always_call=True)

    def close(self) -> None:
        self._pool.close()
        self._archive.close()
