"""Which module of a transformers model a tensor belongs to, and what kind of module that is: told by names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

_EMBEDDING = re.compile(r"wte|wpe|shared|embed|embed_(tokens|positions|in)|\w*embeddings?|relative_attention_bias")
_CONV1D = {"c_attn", "c_proj", "c_fc", "q_attn"}
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_OUTPUT = re.compile(r"(.*\.)?(lm_head|embed_out|output_projection|decoder)\.weight")
_TIES = re.compile(r"LMHeadModel|ForCausalLM|ForMaskedLM|ForConditionalGeneration|ForPreTraining")
_TOKENS = re.compile(r"(.*\.)?(wte|shared|embed_in|embed_tokens|word_embeddings|tokens_embed)\.weight")

_PREFIXES = {
    **{kind: kind for kind in ("albert", "bert", "deberta", "distilbert", "electra", "mpnet", "roberta")},
    **dict.fromkeys(("camembert", "xlm-roberta"), "roberta"),
    **dict.fromkeys(("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "openai-gpt"), "transformer"),
    **dict.fromkeys(("gemma", "gemma2", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3", "smollm3"), "model"),
    "deberta-v2": "deberta",
    "gpt_neox": "gpt_neox",
}
"""`base_model_prefix` by `model_type`: checkpoints of a bare model leave it out, and models with a head have it."""


class Kind(Enum):
    """How a module holds its weight: `nn.Linear` as [out, in], `Conv1D` as [in, out], `nn.Embedding` as [rows, dim]."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    EMBEDDING = "embedding"


class Modules:
    """The modules of a checkpoint.

    Args:
        config: its `config.json`; may be empty.
        tensors: the names of all its tensors.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Iterable[str]) -> None:
        names = list(tensors)
        self.model_type = str(config.get("model_type", ""))
        architectures = config.get("architectures") or [""]
        self.architecture = str(architectures[0])
        prefix = _PREFIXES.get(self.model_type, "") + "."
        has_prefix = any(name.startswith(prefix) for name in names)
        bare = self.architecture.endswith("Model") and "Head" not in self.architecture
        known = prefix != "." and bool(self.architecture)
        self._added = prefix if known and not bare and not has_prefix else ""
        self._removed = prefix if known and bare and has_prefix else ""
        self._tied = bool(_TIES.search(self.architecture)) and not any(_OUTPUT.fullmatch(name) for name in names)

    def path(self, tensor: str) -> str:
        """The module's path in the model of `architectures`, of a tensor `....weight`."""
        return self._added + tensor.removeprefix(self._removed).removesuffix(".weight")

    def kind(self, tensor: str) -> Kind:
        last = tensor.removesuffix(".weight").rpartition(".")[2]
        if _EMBEDDING.fullmatch(last):
            return Kind.EMBEDDING
        return Kind.CONV1D if self.model_type in _CONV1D_MODELS and last in _CONV1D else Kind.LINEAR

    def is_tied(self, tensor: str) -> bool:
        """Whether it is a word embedding that is the output layer as well."""
        return self._tied and _TOKENS.fullmatch(tensor) is not None
