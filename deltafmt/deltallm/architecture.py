"""Where the transformer blocks of a causal language model are, and what their linear layers and norms are called.

`FAMILIES` is all that the rest knows of architectures.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import nn

from ..errors import UsageError
from ..methods.sharing import Parts


@dataclass(frozen=True)
class Family:
    """Module names of one kind of model.

    Attributes:
        model_types: `config.model_type` of those whose blocks compute what `alignment` takes for granted.
        blocks: the list of blocks.
        qkv: within a block, the linear layers of queries, keys and values: three, or one that holds all of them, one
            after the other. Several such tuples, if models differ: each model has one of them.
        output: the linear layer after the attention.
        ins: those before the MLP's activation, in the same way: gate and up, or both in one; or just one, if it is not
            `gated`.
        down: the one after it.
        attention_norm, mlp_norm: the norm in a block that only these linear layers read.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    qkv: tuple[tuple[str, ...], ...]
    output: str
    ins: tuple[tuple[str, ...], ...]
    down: str
    attention_norm: str
    mlp_norm: str
    gated: bool = True

    @property
    def attention(self) -> tuple[str, ...]:
        """The linear layers of the attention, whichever a model has of them, in the order of their use."""
        return (*itertools.chain(*self.qkv), self.output)

    @property
    def mlp(self) -> tuple[str, ...]:
        """Those of the MLP."""
        return (*itertools.chain(*self.ins), self.down)

    def linears(self, parts: Parts) -> tuple[str, ...]:
        """The names of the linear layers of `parts`, within a block."""
        return {"attention": self.attention, "mlp": self.mlp, "both": self.attention + self.mlp}[parts]


FAMILIES = (
    Family(
        name="Llama-like",
        model_types=("llama", "mistral", "phi3", "qwen2", "qwen3"),
        blocks="model.layers",
        qkv=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.qkv_proj",)),
        output="self_attn.o_proj",
        ins=(("mlp.gate_proj", "mlp.up_proj"), ("mlp.gate_up_proj",)),
        down="mlp.down_proj",
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
    ),
    Family(
        name="GPT-2-like",
        model_types=("gpt2",),
        blocks="transformer.h",
        qkv=(("attn.c_attn",),),
        output="attn.c_proj",
        ins=(("mlp.c_fc",),),
        down="mlp.c_proj",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        gated=False,
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
