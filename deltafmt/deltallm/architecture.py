"""Where the transformer blocks of a causal language model are, and what their linear layers and norms are called."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..errors import UsageError
from ..methods.sharing import Parts


@dataclass(frozen=True)
class Family:
    """Module names of one kind of model. A model has those of the names that it splits or fuses its weights by.

    Attributes:
        blocks: the list of blocks.
        attention, mlp: linear layers within a block, in the order of their use.
        attention_norm, mlp_norm: the norm in a block that only these linear layers read.
    """

    name: str
    blocks: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    attention_norm: str
    mlp_norm: str

    def linears(self, parts: Parts) -> tuple[str, ...]:
        """The names of the linear layers of `parts`, within a block."""
        return {"attention": self.attention, "mlp": self.mlp, "both": self.attention + self.mlp}[parts]


FAMILIES = (
    Family(
        name="Llama-like",
        blocks="model.layers",
        attention=tuple(f"self_attn.{leaf}_proj" for leaf in ("q", "k", "v", "qkv", "o")),
        mlp=tuple(f"mlp.{leaf}_proj" for leaf in ("gate", "up", "gate_up", "down")),
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
    ),
    Family(
        name="GPT-2-like",
        blocks="transformer.h",
        attention=("attn.c_attn", "attn.c_proj"),
        mlp=("mlp.c_fc", "mlp.c_proj"),
        attention_norm="ln_1",
        mlp_norm="ln_2",
    ),
)


def family(model: nn.Module) -> Family:
    """Which family's module names a model has. Raises `UsageError` for none of them."""
    for known in FAMILIES:
        if isinstance(submodule(model, known.blocks), nn.ModuleList):
            return known
    names = ", ".join(f"{known.blocks} ({known.name})" for known in FAMILIES)
    raise UsageError(f"{type(model).__name__} has no transformer blocks where they are looked for: {names}")


def blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks, first to last. Raises as `family`."""
    found = model.get_submodule(family(model).blocks)
    assert isinstance(found, nn.ModuleList)
    return found


def block_name(model: nn.Module, layer: int) -> str:
    """What the block of this number is called in the model. Raises as `family`."""
    return f"{family(model).blocks}.{layer}"


def linears(model: nn.Module, layer: int, parts: Parts) -> dict[str, nn.Module]:
    """The linear layers of one block by name in the model, fused ones (`qkv_proj`) as one. Raises as `family`."""
    prefix = block_name(model, layer)
    found = {f"{prefix}.{name}": submodule(model, f"{prefix}.{name}") for name in family(model).linears(parts)}
    return {name: module for name, module in found.items() if module is not None}


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """The module of this name, or None."""
    module: object = model
    for part in name.split("."):
        module = getattr(module, part, None) if isinstance(module, nn.Module) else None
    return module if isinstance(module, nn.Module) else None
