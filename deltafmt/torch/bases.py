"""Base weights that several models of one process share."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import nn

from .tensors import Cast

_Key = tuple[str, torch.dtype, torch.device]


class BaseCache:
    """Base weights by their content: what several fine-tunes of one base have in common is in memory once.

    Hand one to `load_model(..., mode="fused", bases=cache)` for each of them. It keeps nothing alive: with the last
    model that uses it, a weight is freed. Moving or casting one of the models (`model.to`) moves the weights that it
    shares with the others. Thread-safe.
    """

    def __init__(self) -> None:
        self._weights: weakref.WeakValueDictionary[_Key, nn.Parameter] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def known(self, digest: str, dtype: torch.dtype, cast: Cast) -> nn.Parameter | None:
        """A weight with this digest, held as `cast` makes it of `dtype`."""
        with self._lock:
            return self._fitting(_key(digest, dtype, cast))

    def add(self, digest: str, dtype: torch.dtype, cast: Cast, weight: nn.Parameter) -> nn.Parameter:
        """Hold one that was not known; gives the one to use: another thread may have been first."""
        key = _key(digest, dtype, cast)
        with self._lock:
            first = self._fitting(key)
            if first is None:
                self._weights[key] = first = weight
            return first

    def _fitting(self, key: _Key) -> nn.Parameter | None:
        """None where the weight has been moved or cast since."""
        found = self._weights.get(key)
        return found if found is not None and (found.dtype, found.device) == key[1:] else None

    def weights(self) -> list[nn.Parameter]:
        """All that are in use; one of which there are several dtypes, or on several devices, is several."""
        with self._lock:
            return list(self._weights.values())

    def __deepcopy__(self, _memo: Any) -> BaseCache:
        return self

    def __reduce__(self) -> tuple[type[BaseCache], tuple[()]]:
        return BaseCache, ()  # a model in another process has bases of its own

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in use."""
        return sum(weight.nbytes for weight in self.weights())


def _key(digest: str, dtype: torch.dtype, cast: Cast) -> _Key:
    return digest, cast.result(dtype), cast.device or torch.device("cpu")
