"""An adapter as PEFT keeps it, in the form that PEFT, vLLM, SGLang and llama.cpp all read alike.

One rank for all modules, the scale folded into B, `lora_alpha` equal to the rank, and no option that any of them lacks.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint import TensorInfo
from ..dtypes import Dtype, round_to
from ..durable import Staging
from ..layout import make_header
from .factors import Factors, Float32
from .modules import Kind

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


@dataclass(frozen=True)
class Adapter:
    """What is added to the module `path`: `factors` are those of its weight as the checkpoint holds it."""

    path: str
    kind: Kind
    factors: Factors

    @property
    def lora_a(self) -> Float32:
        """[r, in]; of an embedding [r, rows]."""
        return self.factors.a if self.kind is Kind.LINEAR else self.factors.b

    @property
    def lora_b(self) -> Float32:
        """[out, r]; of an embedding [dim, r]."""
        return (self.factors.b if self.kind is Kind.LINEAR else self.factors.a).T


def write_peft(
    area: Staging,
    adapters: Sequence[Adapter],
    rank: int,
    dtype: Dtype,
    *,
    modules: Collection[str],
    architecture: str,
    base: tuple[str | None, str | None],
) -> None:
    """Write an adapter directory.

    Args:
        modules: the paths of all modules that have a matrix, adapted or not.
        base: where the base model can be found, and its revision.
    """
    arrays: dict[str, Float32] = {}
    for adapter in adapters:
        form = ("lora_embedding_{}", "lora_{}.weight")[adapter.kind is not Kind.EMBEDDING]
        for letter, array in (("A", adapter.lora_a), ("B", adapter.lora_b)):
            arrays[f"base_model.model.{adapter.path}.{form.format(letter)}"] = array
    header = make_header({name: TensorInfo(dtype, array.shape) for name, array in arrays.items()}, {"format": "pt"})
    weights = area.create(WEIGHTS)
    weights.append(len(header).to_bytes(8, "little") + header)
    for array in arrays.values():
        weights.append(round_to(array, dtype).tobytes())
    weights.finish()
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": next((task for end, task in _TASKS.items() if architecture.endswith(end)), None),
        "base_model_name_or_path": base[0],
        "revision": base[1],
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": _targets([adapter.path for adapter in adapters], modules),
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(adapter.kind is Kind.CONV1D for adapter in adapters),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    area.write(CONFIG, [_json(config)])


def _targets(adapted: Sequence[str], modules: Collection[str]) -> list[str]:
    """Last names of modules where all of that name are adapted, else whole paths: PEFT matches either at a dot."""
    others = {path.rpartition(".")[2] for path in set(modules) - set(adapted)}
    lasts = {path: path.rpartition(".")[2] for path in adapted}
    return sorted({path if last in others else last for path, last in lasts.items()})


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
