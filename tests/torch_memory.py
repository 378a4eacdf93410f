"""How much memory models of torch hold."""

from __future__ import annotations

from torch import nn


def resident(*models: nn.Module) -> int:
    """Bytes of the memory that models hold, each storage once; on the meta device there is none."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
