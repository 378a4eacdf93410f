"""What the DeltaLLM experiment is made on: a model, text to train on, and text that it never sees.

- `smollm2`: SmolLM2-135M-Instruct, dequantised from a GGUF file to bf16, and the speeches;
- `mgm`: a small GPT-2. Its vocabulary is microbes, and no text of those comes with it: what it draws from itself at
  temperature 1 stands for it, so that the original is the best there can be. Its sentences end early: their first
  tokens are taken, of those that have so many;
- `tiny`: a Llama of 0.4 M parameters, trained for a minute on the bytes of the speeches: to see everything work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fixtures
import speeches
import train_lora

NAMES = ("smollm2", "mgm", "tiny")

_DRAWN = {"train": 8192, "held_out": 512}
"""Sequences that are drawn."""
_LENGTH = 24
_AT_ONCE = 512


@dataclass(frozen=True)
class Subject:
    """A Hugging Face directory, and tokens to train on and to be measured on: integers `[n]`.

    `document`: how many tokens each document has, if all have as many.
    """

    directory: Path
    train: torch.Tensor
    held_out: torch.Tensor
    document: int | None = None


def subject(name: str) -> Subject:
    """One of `NAMES`, made or fetched if it is not in the fixture cache yet."""
    if name == "smollm2":
        directory = train_lora.base(name, "bfloat16")
        return Subject(directory, *_both(lambda split: speeches.tokens(directory, split)))
    if name == "mgm":
        directory = train_lora.base(name, "float32")
        return Subject(directory, *_both(lambda split: _drawn(directory, split)), document=_LENGTH)
    if name == "tiny":
        return Subject(_tiny(), *_both(lambda split: speeches.tokens(None, split)))
    raise ValueError(f"unknown model {name!r}")


def from_files(directory: Path, train: Path, held_out: Path) -> Subject:
    """A model and two `.npy` files of tokens, for machines without network."""
    return Subject(directory, _tensor(np.load(train)), _tensor(np.load(held_out)))


def _both(of: Callable[[speeches.Split], Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return _tensor(of("train")), _tensor(of("held_out"))


def _tensor(tokens: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(tokens).astype(np.int64))


def _drawn(directory: Path, split: speeches.Split) -> speeches.Tokens:
    """Sequences that a model draws from itself, one after the other; kept in the fixture cache. `[n * _LENGTH]`"""
    file = fixtures.cache_directory() / "tokens" / f"drawn-{split}-{_LENGTH}-{directory.name}.npy"
    if not file.is_file():
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        torch.manual_seed(speeches.SPLITS.index(split))
        rows: list[Any] = []
        while len(rows) < _DRAWN[split]:
            begin = torch.full((_AT_ONCE, 1), model.config.bos_token_id)
            drawn = model.generate(
                begin,
                attention_mask=torch.ones_like(begin),
                do_sample=True,
                top_k=0,
                max_length=_LENGTH,
                pad_token_id=model.config.pad_token_id,
            )
            rows += [row.numpy().astype(np.uint16) for row in drawn if model.config.eos_token_id not in row]
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(".part.npy")
        np.save(scratch, np.concatenate(rows[: _DRAWN[split]]))
        scratch.replace(file)
    found: speeches.Tokens = np.load(file)
    return found


def _tiny() -> Path:
    """A small Llama that has learned a little about the bytes of the speeches."""

    def make(target: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
        ids = _tensor(speeches.tokens(None, "train"))
        steps, batch, length = 400, 16, 128
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
        for begins in torch.randint(len(ids) - length, (steps, batch)):
            windows = torch.stack([ids[begin : begin + length] for begin in begins.tolist()])
            model(input_ids=windows, labels=windows).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        model.save_pretrained(target)

    return train_lora.cached("tiny", {"recipe": 1}, make)
