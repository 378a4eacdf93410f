"""Weights that are read when a layer runs, and let go when it has run."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..archive import OpenArchive
from ..errors import UsageError
from ..reader import Archive
from .tensors import Cast

_LAZY = "_deltafmt_lazy"
"""The attribute of a module that names the parameters which are read when it runs."""


class LazyWeights:
    """Reads the parameters of each module before its `forward`, and drops them after it unless `keep`.

    Meanwhile they are on the meta device, where they take the dtype that the model is cast to. A module that looks at
    the weight of another one without calling it finds it there, and fails. Each reading takes new memory: what autograd
    kept of the last one stays as it was. Compiled code leaves off for it. Thread-safe. The archive is closed once no
    module is left that reads it, nor a copy of one.
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
                    empty = getattr(module, name)
                    if empty.device.type == "meta":
                        weight = cast(self._archive.get_tensor(tensor)).to(empty.dtype)
                        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))

        def drop(module: nn.Module, _inputs: Any, _output: Any) -> None:
            with self._lock:
                calls = self._running.pop(module, 0) - 1
                if calls > 0:
                    self._running[module] = calls
                elif not self._keep:
                    _empty(module)

        object.__setattr__(module, _LAZY, tuple(tensors))
        uncompiled: Any = torch.compiler.disable
        module.register_forward_pre_hook(uncompiled(fill))
        module.register_forward_hook(uncompiled(drop), always_call=True)


def release(model: nn.Module) -> None:
    """Let the weights go that a lazy model has read and keeps (`load_model(mode="lazy", keep=True)`): it reads them
    again when it runs next. Not while it runs.

    Raises `UsageError` for a model that was not loaded with mode `"lazy"`.
    """
    lazy = [module for module in model.modules() if _LAZY in module.__dict__]
    if not lazy:
        raise UsageError("the model was not loaded with mode='lazy'", hint="Use deltafmt.torch.load_model")
    for module in lazy:
        _empty(module)


def _empty(module: nn.Module) -> None:
    """Put its parameters on the meta device, as they are: dtype and shape."""
    for name in module.__dict__[_LAZY]:
        empty = torch.empty_like(getattr(module, name), device="meta")
        module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
