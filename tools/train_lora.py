"""Trains real LoRAs with PEFT on real models, merges them with PEFT, and keeps the checkpoints in the fixture cache.

- SmolLM2-135M (Llama, bf16): a LoRA of rank 16;
- MGM (GPT-2 with `Conv1D`, fp32): a LoRA of rank 16, a DoRA, and the concatenation of two LoRAs. Its own vocabulary is
  microbes: bytes of the text stand for them.

The text is that of Python's own documentation, as every Python carries it. A few dozen steps of AdamW each: about a
minute for everything on two idle cores, once. Run as a script, it makes everything and prints where it lies.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pydoc_data.topics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fixtures

THREADS = 1
"""So that a seed means the same on every machine."""


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained; what its checkpoints are cached by."""

    model: str
    """`smollm2` or `mgm`."""
    rank: int = 16
    dora: bool = False
    steps: int = 32
    tokens: int = 96
    """Of each step's one sequence."""
    rate: float = 3e-4
    seed: int = 0


@dataclass(frozen=True)
class Merge:
    """Adapters merged into their base in `dtype`, saved in `saved`, both as torch names them.

    Several are concatenated first, with the given weights (`add_weighted_adapter`). PEFT adds an fp32 update in place
    and so rounds once; with `safe` (its `safe_merge`) it rounds the update, then the sum.
    """

    adapters: tuple[Recipe, ...]
    weights: tuple[float, ...] = (1.0,)
    dtype: str = "bfloat16"
    saved: str = "bfloat16"
    safe: bool = False


SMOL = Recipe("smollm2")
LORA = Recipe("mgm", steps=48, tokens=128)
OTHER = Recipe("mgm", rank=8, steps=48, tokens=128, seed=1)
DORA = Recipe("mgm", dora=True, steps=12, tokens=128, seed=2)

MERGES = {
    "SmolLM2 LoRA, merged in bf16": Merge((SMOL,)),
    "SmolLM2 LoRA, merged in bf16 by safe_merge": Merge((SMOL,), safe=True),
    "MGM LoRA, merged in bf16": Merge((LORA,)),
    "MGM DoRA, merged in bf16": Merge((DORA,)),
    "MGM two LoRAs, merged in bf16": Merge((LORA, OTHER), (0.7, 0.5)),
    "MGM LoRA, merged in fp32": Merge((LORA,), dtype="float32", saved="float32"),
}


def base(model: str, dtype: str) -> Path:
    """A checkpoint of `smollm2` or `mgm` as `save_pretrained` writes it, in `dtype` (`float32` or `bfloat16`)."""

    def make(target: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if model == "mgm":
            AutoModelForCausalLM.from_pretrained(fixtures.mgm(), dtype=getattr(torch, dtype)).save_pretrained(target)
            return
        source, file = fixtures.smollm2(), "SmolLM2-135M-Instruct.Q4_1.gguf"
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=getattr(torch, dtype))
        # Dequantised as it was loaded, it may be saved; transformers refuses as long as these say otherwise.
        loaded.hf_quantizer, loaded.is_quantized = None, False
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
        loaded.save_pretrained(target)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)

    return cached(f"{model}-{dtype}", {}, make)


def adapter(recipe: Recipe) -> Path:
    """A trained adapter as PEFT saves it. It is trained in fp32 on the bf16 weights (MGM: on the fp32 weights)."""

    def make(target: Path) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(recipe.seed)
        stored = base(recipe.model, _published(recipe.model))
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=2 * recipe.rank,
            use_dora=recipe.dora,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32), config)
        _train(model, _token_ids(recipe.model, stored), recipe)
        model.save_pretrained(target)

    return cached(f"{recipe.model}-{'dora' if recipe.dora else 'lora'}", asdict(recipe), make)


def merged(merge: Merge) -> tuple[Path, Path]:
    """The base and the merged checkpoint, both as `save_pretrained` writes them."""
    model = merge.adapters[0].model
    stored = base(model, _published(model) if merge.saved != "bfloat16" else "bfloat16")

    def make(target: Path) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(stored, dtype=getattr(torch, merge.dtype))
        names = [f"adapter{number}" for number in range(len(merge.adapters))]
        peft = PeftModel.from_pretrained(loaded, adapter(merge.adapters[0]), adapter_name=names[0])
        for name, recipe in zip(names[1:], merge.adapters[1:], strict=True):
            peft.load_adapter(adapter(recipe), name)
        if len(names) > 1:
            peft.add_weighted_adapter(names, list(merge.weights), "both", combination_type="cat")
            peft.set_adapter("both")
            names = ["both"]
        whole = peft.merge_and_unload(safe_merge=merge.safe, adapter_names=names)
        whole.to(getattr(torch, merge.saved)).save_pretrained(target)

    return stored, cached(f"{model}-merged", asdict(merge), make)


def adapter_weights(merge: Merge) -> int:
    """Numbers in the merged adapters: what a merge adds to its base."""
    from safetensors.numpy import load_file

    files = (adapter(recipe) / "adapter_model.safetensors" for recipe in merge.adapters)
    return sum(int(array.size) for file in files for array in load_file(file).values())


def _published(model: str) -> str:
    return "float32" if model == "mgm" else "bfloat16"


def _token_ids(model: str, stored: Path) -> torch.Tensor:
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    if model == "mgm":
        return torch.tensor(list(text.encode()))
    from transformers import AutoTokenizer

    return torch.tensor(AutoTokenizer.from_pretrained(stored)(text)["input_ids"])


def _train(model: Any, ids: torch.Tensor, recipe: Recipe) -> None:
    """Next-token prediction on random windows of `ids` [tokens]."""
    windows = torch.randint(len(ids) - recipe.tokens, (recipe.steps,)).tolist()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=recipe.rate)
    model.train()
    for begin in windows:
        batch = ids[begin : begin + recipe.tokens][None]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def cached(name: str, settings: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """What `make` puts into a directory, made once for these settings and versions of the libraries."""
    versions = {package: importlib.metadata.version(package) for package in ("peft", "torch", "transformers")}
    key = hashlib.sha256(json.dumps([settings, versions], sort_keys=True).encode()).hexdigest()[:12]
    final = fixtures.cache_directory() / "trained" / f"{name}-{key}"
    if not final.is_dir():
        final.parent.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(THREADS)
        with tempfile.TemporaryDirectory(dir=final.parent) as scratch:
            make(Path(scratch) / "made")
            (Path(scratch) / "made").rename(final)
    return final


def main() -> None:
    """Make every merge and print where it and its base lie."""
    for title, merge in MERGES.items():
        print(f"{title:40} {' against '.join(map(str, reversed(merged(merge))))}", flush=True)


if __name__ == "__main__":
    main()
