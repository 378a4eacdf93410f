"""Exported adapters, put onto the base by PEFT and merged there, or read back by gguf: only what they say is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import deltafmt
import merges
from deltafmt.errors import DestinationError, RefusedError, UnsupportedError, UsageError, WrongBaseError
from deltafmt.lora_export import RANKS, ExportReport, export_lora

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

HEADS, KEY_HEADS = 4, 2


def save(folder: Path, config: Any, dtype: torch.dtype = torch.float32, auto: Any = None, seed: int = 0) -> Path:
    """A small model of random weights, as transformers saves it."""
    torch.manual_seed(seed)
    model = (auto or transformers.AutoModelForCausalLM).from_config(config)
    model.to(dtype).save_pretrained(folder)
    return folder


def llama(folder: Path, dtype: torch.dtype, **options: Any) -> Path:
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 80}
    settings |= {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "tie_word_embeddings": False}
    return save(folder, transformers.LlamaConfig(**settings | options), dtype)


def load(folder: Path, auto: Any = transformers.AutoModelForCausalLM) -> Any:
    return auto.from_pretrained(folder, dtype="auto")


def merged(base: Path, adapter: Path, auto: Any = transformers.AutoModelForCausalLM) -> Any:
    """The base with the adapter, by PEFT."""
    return peft.PeftModel.from_pretrained(load(base, auto), adapter).merge_and_unload()


def losses(base: Any, exported: Any, tuned: Any) -> dict[str, float]:
    """Of each weight that was changed, the share of the change that is missing."""
    found = {}
    others = exported.state_dict(), tuned.state_dict()
    for name, weight in base.state_dict().items():
        was, became, wanted = (each.double() for each in (weight, *(other[name] for other in others)))
        if (change := (wanted - was).norm()) > 0:
            found[name] = float((wanted - became).norm() / change)
        else:
            assert torch.equal(became, wanted), name
    return found


def agree(report: ExportReport, found: dict[str, float], slack: float) -> None:
    """Whether the loss of every tensor is what the report says."""
    assert found.keys() == report.tensors.keys()
    for name, loss in found.items():
        assert report.tensors[name].rel_error == pytest.approx(loss, abs=slack), name


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-3), (torch.bfloat16, 0.1)])
def test_a_merged_lora_comes_back(tmp_path: Path, dtype: torch.dtype, most: float) -> None:
    base = llama(tmp_path / "base", dtype)
    tuned = merges.merged_lora(base, tmp_path / "tuned", rank=4, ulps=4 if dtype == torch.bfloat16 else 5000)
    deltafmt.pack(tuned, tmp_path / "packed", base=base)

    report = export_lora(tmp_path / "packed", tmp_path / "adapter", base=base, rank=4)
    assert report.rank == 8 and not report.left_out and report.loss < most
    agree(report, losses(load(base), merged(base, tmp_path / "adapter"), load(tuned)), slack=2e-3)

    ids = torch.arange(12)[None]
    logits = [model(ids).logits.double() for model in (load(base), merged(base, tmp_path / "adapter"), load(tuned))]
    assert (logits[1] - logits[2]).norm() < 2 * most * (logits[0] - logits[2]).norm()

    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["bias"]) == (8, 8, False, "none")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert set(config["target_modules"]) == {
        *(f"{letter}_proj" for letter in "qkvo"), "gate_proj", "up_proj", "down_proj", "lm_head"
    }  # fmt: skip
    for name, array in load_file(tmp_path / "adapter/adapter_model.safetensors").items():
        assert array.shape["lora_B" in name] == 8


def test_factors_of_the_archive_are_taken_as_they_are(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", torch.float32)
    tuned = merges.fine_tuned(base, tmp_path / "tuned", deviation=0.1)
    packed = deltafmt.pack(tuned, tmp_path / "packed", base=base, rank=12, exclude=["*norm*"])
    ranks = {name for name, tensor in packed.tensors.items() if tensor.rank == 12}
    assert ranks
    deltafmt.unpack(tmp_path / "packed", tmp_path / "lossy", base=base)

    report = export_lora(tmp_path / "packed", tmp_path / "adapter", base=base)
    assert report.rank == 16 and {report.tensors[name].method for name in ranks} == {"factors"}
    found = losses(load(base), merged(base, tmp_path / "adapter"), load(tmp_path / "lossy"))
    assert all(found[name] < 1e-5 for name in ranks)
    assert set(report.left_out) == {name for name, tensor in packed.tensors.items() if "norm" in name}
    agree(report, found, slack=1e-5)


@pytest.mark.parametrize("rank", [8, 32])
def test_a_full_difference_becomes_its_best_factors(tmp_path: Path, rank: int) -> None:
    base = llama(tmp_path / "base", torch.float32)
    tuned = merges.fine_tuned(base, tmp_path / "tuned", deviation=0.1)
    deltafmt.pack(tuned, tmp_path / "packed", base=base)
    with pytest.raises(UsageError, match="rank"):
        export_lora(tmp_path / "packed", tmp_path / "adapter", base=base)

    report = export_lora(tmp_path / "packed", tmp_path / "adapter", base=base, rank=rank)
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    for name, tensor in report.tensors.items():
        if tensor.method == "svd":
            values = np.linalg.svd(after[name].astype("f8") - before[name], compute_uv=False)
            best = np.linalg.norm(values[rank:]) / np.linalg.norm(values)
            assert best - 1e-5 <= (tensor.rel_error or 0) <= 1.02 * best + 1e-5, name
    total = sum(float(np.square(after[name].astype("f8") - before[name]).sum()) for name in before)
    lost = sum(
        (tensor.rel_error or 0) ** 2 * float(np.square(after[name].astype("f8") - before[name]).sum())
        for name, tensor in report.tensors.items()
    )
    assert report.loss == pytest.approx((lost / total) ** 0.5, rel=1e-6)
    agree(report, losses(load(base), merged(base, tmp_path / "adapter"), load(tuned)), slack=1e-5)


def test_weights_of_conv1d_are_turned_round(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=80, n_positions=32)
    base = save(tmp_path / "base", config)
    tuned = merges.merged_lora(base, tmp_path / "tuned", rank=4, ulps=5000)
    deltafmt.pack(tuned, tmp_path / "packed", base=base)
    report = export_lora(tmp_path / "packed", tmp_path / "adapter", base=base, rank=4)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["fan_in_fan_out"] is True
    left = "it is the output layer as well, which would stay as it is"
    assert report.left_out == {"transformer.wte.weight": left}
    found = losses(load(base), merged(base, tmp_path / "adapter"), load(tuned))
    del found["lm_head.weight"]  # the same as wte
    agree(report, found, slack=2e-3)
    assert max(loss for name, loss in found.items() if ".c_" in name) < 2e-3


def test_names_without_the_prefix_of_the_model_get_it(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=48, n_layer=1, n_head=4, vocab_size=80, n_positions=32)
    whole = save(tmp_path / "whole", config)
    for folder, arrays in (("base", load_file(whole / "model.safetensors")), ("tuned", None)):
        (tmp_path / folder).mkdir()
        if arrays is None:
            arrays = {name: array.copy() for name, array in load_file(tmp_path / "base/model.safetensors").items()}
            arrays["h.0.mlp.c_fc.weight"] += 0.01
        else:
            arrays = {name.removeprefix("transformer."): array for name, array in arrays.items()}
        save_file(arrays, tmp_path / folder / "model.safetensors", {"format": "pt"})
        (tmp_path / folder / "config.json").write_bytes((whole / "config.json").read_bytes())
    deltafmt.pack(tmp_path / "tuned", tmp_path / "packed", base=tmp_path / "base")
    export_lora(tmp_path / "packed", tmp_path / "adapter", base=tmp_path / "base", rank=8)
    assert sorted(load_file(tmp_path / "adapter/adapter_model.safetensors")) == [
        f"base_model.model.transformer.h.0.mlp.c_fc.lora_{letter}.weight" for letter in "AB"
    ]
    found = losses(load(whole), merged(tmp_path / "base", tmp_path / "adapter"), load(tmp_path / "tuned"))
    assert found.keys() == {"transformer.h.0.mlp.c_fc.weight"} and max(found.values()) < 1e-5


def test_embeddings_that_are_no_output_layer_are_adapted(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=80
    )
    auto = transformers.AutoModel
    base = save(tmp_path / "base", config, auto=auto)
    tuned = merges.fine_tuned(base, tmp_path / "tuned", deviation=0.1)
    deltafmt.pack(tuned, tmp_path / "packed", base=base)
    report = export_lora(tmp_path / "packed", tmp_path / "adapter", base=base, rank=32)
    assert report.tensors["embeddings.word_embeddings.weight"].method == "svd"
    shapes = {name: array.shape for name, array in load_file(tmp_path / "adapter/adapter_model.safetensors").items()}
    path = "base_model.model.embeddings.word_embeddings"
    assert (shapes[f"{path}.lora_embedding_A"], shapes[f"{path}.lora_embedding_B"]) == ((32, 80), (48, 32))
    agree(report, losses(load(base, auto), merged(base, tmp_path / "adapter", auto), load(tuned, auto)), slack=1e-5)


@pytest.mark.slow
def test_a_real_fine_tune(minilm_dir: Path, finetune_dir: Path, tmp_path: Path) -> None:
    """BERT: linear layers, embeddings, norms and biases, the names of a bare model."""
    deltafmt.pack(finetune_dir, tmp_path / "packed", base=minilm_dir)
    report = export_lora(tmp_path / "packed", tmp_path / "adapter", base=minilm_dir, rank=16)
    assert {tensor.method for tensor in report.tensors.values()} == {"svd", "left-out"}
    assert all(name.endswith((".bias", "LayerNorm.weight")) for name in report.left_out)
    auto = transformers.AutoModel
    found = losses(load(minilm_dir, auto), merged(minilm_dir, tmp_path / "adapter", auto), load(finetune_dir, auto))
    agree(report, found, slack=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gguf_has_the_order_of_llama_cpp(tmp_path: Path, dtype: str) -> None:
    base = llama(tmp_path / "base", torch.float32)
    tuned = merges.merged_lora(base, tmp_path / "tuned", rank=4, ulps=5000)
    deltafmt.pack(tuned, tmp_path / "packed", base=base)
    options: dict[str, Any] = {"base": base, "rank": 8, "dtype": dtype}
    report = export_lora(tmp_path / "packed", tmp_path / "gguf", format="gguf", **options)
    assert report.files == ("adapter_model.gguf",)

    reader = gguf.GGUFReader(tmp_path / "gguf/adapter_model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama" and fields["adapter.lora.alpha"] == 8
    tensors = {
        tensor.name: np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors
    }
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    places = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    places |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj"}
    slack = {"float32": 2e-3, "float16": 3e-3, "bfloat16": 2e-2}[dtype]
    for place, module in places.items():
        change = after[name := f"model.layers.1.{module}.weight"].astype("f8") - before[name]
        if place in ("attn_q", "attn_k"):
            change = change[interleaved(HEADS if place == "attn_q" else KEY_HEADS, len(change))]
        a, b = (tensors[f"blk.1.{place}.weight.lora_{letter}"] for letter in "ab")
        assert a.shape == (8, change.shape[1]) and b.shape == (change.shape[0], 8)
        assert np.linalg.norm(b @ a - change) < slack * np.linalg.norm(change), place
    assert tensors.keys() >= {"output.weight.lora_a", "output.weight.lora_b"}


def interleaved(heads: int, rows: int) -> list[int]:
    """Llama of transformers rotates rows i and i + d/2 of a head together, llama.cpp the rows 2i and 2i + 1."""
    size = rows // heads
    return [head * size + row // 2 + (row % 2) * size // 2 for head in range(heads) for row in range(size)]


def test_gguf_of_other_architectures_is_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=48, n_layer=1, n_head=4, vocab_size=80, n_positions=32)
    base = save(tmp_path / "base", config)
    deltafmt.pack(merges.merged_lora(base, tmp_path / "tuned", rank=4, ulps=5000), tmp_path / "packed", base=base)
    with pytest.raises(UnsupportedError, match="gpt2"):
        export_lora(tmp_path / "packed", tmp_path / "adapter", base=base, format="gguf")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("number", [None, "2", 0])
@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads"])
def test_gguf_of_an_incomplete_config_is_refused(tmp_path: Path, key: str, number: Any) -> None:
    base = llama(tmp_path / "base", torch.float32)
    tuned = merges.merged_lora(base, tmp_path / "tuned", rank=4, ulps=5000)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, key: number}))
    deltafmt.pack(tuned, tmp_path / "packed", base=base)
    with pytest.raises(UnsupportedError, match=key):
        export_lora(tmp_path / "packed", tmp_path / "adapter", base=base, format="gguf")
    assert not (tmp_path / "adapter").exists()
    assert export_lora(tmp_path / "packed", tmp_path / "adapter", base=base).rank == 8


def test_a_base_that_was_of_no_use_is_no_base(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", torch.float32)
    arrays = {name: np.full_like(array, 3) for name, array in load_file(base / "model.safetensors").items()}
    (tmp_path / "other").mkdir()
    save_file(arrays, tmp_path / "other/model.safetensors")
    deltafmt.pack(tmp_path / "other", tmp_path / "packed", base=base)
    with pytest.raises(UsageError, match="nothing in the one given was of any use"):
        export_lora(tmp_path / "packed", tmp_path / "adapter", base=base, rank=8)


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", torch.float32)
    tuned = merges.fine_tuned(base, tmp_path / "tuned")
    deltafmt.pack(tuned, tmp_path / "packed", base=base)
    deltafmt.pack(tuned, tmp_path / "alone")
    deltafmt.pack(base, tmp_path / "same", base=base)
    out = tmp_path / "adapter"
    with pytest.raises(UsageError, match="no base"):
        export_lora(tmp_path / "alone", out, rank=8)
    with pytest.raises(RefusedError, match="nothing"):
        export_lora(tmp_path / "same", out, base=base)
    with pytest.raises(UsageError, match=str(RANKS[-1] + 1)):
        export_lora(tmp_path / "packed", out, base=base, rank=RANKS[-1] + 1)
    with pytest.raises(UsageError, match="onnx"):
        export_lora(tmp_path / "packed", out, base=base, rank=8, format="onnx")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="int8"):
        export_lora(tmp_path / "packed", out, base=base, rank=8, dtype="int8")
    with pytest.raises(WrongBaseError):
        export_lora(tmp_path / "packed", out, base=tuned, rank=8)
    with pytest.raises(WrongBaseError):
        export_lora(tmp_path / "packed", out, rank=8)
    worked: list[str] = []
    with pytest.raises(RefusedError, match=r"5 of 21 changed tensors .*norm"):
        export_lora(
            tmp_path / "packed", out, base=base, rank=8, strict=True, progress=lambda done, total, at: worked.append(at)
        )
    assert not worked  # known from the manifest alone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "base", "packed", "same", "tuned"]

    export_lora(tmp_path / "packed", out, base=base, rank=8)
    with pytest.raises(DestinationError):
        export_lora(tmp_path / "packed", out, base=base, rank=16)
    assert export_lora(tmp_path / "packed", out, base=base, rank=16, overwrite=True).rank == 16


def test_a_change_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", torch.float32)
    arrays = load_file(base / "model.safetensors")
    arrays["model.layers.0.mlp.up_proj.weight"][3, 5] = np.nan
    arrays["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    (tmp_path / "tuned").mkdir()
    save_file(arrays, tmp_path / "tuned/model.safetensors")
    deltafmt.pack(tmp_path / "tuned", tmp_path / "packed", base=base)
    with pytest.raises(RefusedError, match=r"1 of 2 changed tensors .*not finite"):
        export_lora(tmp_path / "packed", tmp_path / "adapter", base=base, rank=8, strict=True)
    report = export_lora(tmp_path / "packed", tmp_path / "adapter", base=base, rank=8)
    assert report.left_out == {"model.layers.0.mlp.up_proj.weight": "its change is not finite"}
    assert report.tensors["model.layers.1.mlp.up_proj.weight"].rel_error == pytest.approx(0, abs=1e-6)
