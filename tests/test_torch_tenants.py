"""Several fine-tunes of one base in one process: merged LoRAs stored exactly, `swap`, one batch for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import deltafmt
import merges
from deltafmt.errors import UsageError, WrongBaseError
from deltafmt.operators import Lowrank, Patch, Stored
from deltafmt.torch import BaseCache, MultiTenant, load_model, swap
from deltafmt.torch.fused import DeltaLinear, Factors, deltas
from deltafmt.torch.tenants import PerTenant

transformers.utils.logging.disable_progress_bar()

IDS = torch.tensor([[3, 14, 15, 92, 65], [35, 89, 79, 32, 38], [46, 26, 43, 38, 32], [7, 9, 50, 28, 8]])


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bf16."""
    torch.manual_seed(2)
    root = tmp_path_factory.mktemp("base") / "base"
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def merged(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(archive, the original): a LoRA merged into it, packed without loss as integer factors and a residual."""
    root = tmp_path_factory.mktemp("merged")
    tuned = merges.merged_lora(base, root / "tuned", rank=4, ulps=4)
    deltafmt.pack(tuned, root / "packed", base=base)
    return root / "packed", tuned


@pytest.fixture(scope="module")
def loras(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three fine-tunes of it, packed with rank 4, 6 and 4: one of them has vectors of its own."""
    root = tmp_path_factory.mktemp("loras")
    packed = []
    for number, rank in enumerate((4, 6, 4)):
        tuned = merges.merged_lora(base, root / f"tuned{number}", rank=rank, ulps=4, seed=number)
        if number == 2:
            model = transformers.LlamaForCausalLM.from_pretrained(tuned)
            with torch.no_grad():
                model.model.norm.weight += 0.25
            model.save_pretrained(tuned)
        deltafmt.pack(tuned, root / f"packed{number}", base=base, method="lowrank", rank=rank)
        packed.append(root / f"packed{number}")
    return packed


def test_all_components_are_the_exact_weights(base: Path, merged: tuple[Path, Path]) -> None:
    """In mode `full`: the patch belongs to what is not cut, and goes with what is."""
    packed, original = merged
    exact = transformers.LlamaForCausalLM.from_pretrained(original).state_dict()
    with deltafmt.open(packed, base) as archive:
        ranks = {
            archive._archive.manifest.arrays[node.a.array].shape[0]
            for tensor in archive._archive.manifest.tensors.values()
            for node in tensor.recipe.walk()
            if isinstance(node, Lowrank) and isinstance(node.a, Stored)
        }
    for rank in (max(ranks), max(ranks) + 1, 1000):
        loaded = load_model(packed, base=base, rank=rank)
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in exact.items()), rank
        assert all(each.requires_grad for each in loaded.parameters())
    less = load_model(packed, base=base, rank=max(ranks) - 1).state_dict()
    assert any(not torch.equal(less[name], tensor) for name, tensor in exact.items())


def test_integer_factors_stay_integers_and_give_nearly_the_exact_weights(merged: tuple[Path, Path], base: Path) -> None:
    packed, tuned = merged
    with deltafmt.open(packed, base) as archive:
        recipes = [tensor.recipe for tensor in archive._archive.manifest.tensors.values()]
    exact = [recipe for recipe in recipes if isinstance(recipe, Patch)]
    assert sum(isinstance(node, Lowrank) for recipe in exact for node in recipe.walk()) >= 8
    model = load_model(packed, "fused", base=base)
    plain = transformers.LlamaForCausalLM.from_pretrained(tuned)
    assert len(deltas(model)) >= 8
    for name, layer in deltas(model).items():
        assert not layer.factors.lora_a.is_floating_point() and not layer.factors.lora_a.requires_grad
        weight = plain.get_submodule(name).weight
        steps = weight.view(torch.int16).int() - layer.weight.view(torch.int16).int()
        assert ((steps.abs() <= 1) | (weight.abs() < 1e-3)).all()
    expected = logits(plain.float())
    torch.testing.assert_close(logits(model.float()), expected, rtol=0, atol=5e-3)
    assert torch.equal(logits(load_model(packed, base=base, dtype=torch.float32)), expected)
    layer = next(iter(deltas(model).values()))
    before = layer.weight
    layer.factors.to_floats()
    assert layer.factors.lora_a.requires_grad
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=1e-6)


def test_large_integers_do_not_overflow_float16() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-32767, 32767, (4, 64), generator=generator, dtype=torch.int16) for _ in range(2))
    layer = DeltaLinear(Factors(a, b, 2.0**-33))
    x = torch.randn(3, 64, generator=generator)
    expected = (x.double() @ a.double().T) @ b.double() * 2.0**-33
    torch.testing.assert_close(layer(x.half()).double(), expected, rtol=0, atol=0.02)


def test_swap_makes_it_the_other_model(merged: tuple[Path, Path], loras: list[Path], base: Path) -> None:
    cache = BaseCache()
    model = load_model(loras[0], "fused", base=base, bases=cache)
    before, inner, layer = cache.weights(), model.model, model.model.layers[0].mlp.up_proj
    for other in (loras[2], merged[0], loras[1], loras[0]):
        swap(model, other, base=base)
        torch.testing.assert_close(logits(model), logits(load_model(other, "fused", base=base)), rtol=0, atol=0)
        assert model.model is inner and model.model.layers[0].mlp.up_proj is layer
    after = cache.weights()
    assert before.keys() <= after.keys() and all(after[digest] is weight for digest, weight in before.items())


def test_swap_needs_no_base_for_what_is_there(loras: list[Path], base: Path, tmp_path: Path) -> None:
    deltafmt.pack(merges.fine_tuned(base, tmp_path / "tuned"), tmp_path / "patched", base=base)
    model = load_model(loras[0], "fused", base=base)
    swap(model, loras[1])
    torch.testing.assert_close(logits(model), logits(load_model(loras[1], "fused", base=base)), rtol=0, atol=0)
    with pytest.raises(WrongBaseError):
        swap(model, tmp_path / "patched")  # corrects the base bit by bit, so it reads it
    torch.testing.assert_close(logits(model), logits(load_model(loras[1], "fused", base=base)), rtol=0, atol=0)


def test_swap_of_a_model_that_was_cast(loras: list[Path], base: Path) -> None:
    model = load_model(loras[0], "fused", base=base).float()
    swap(model, loras[1], base=base)
    wide = load_model(loras[1], "fused", base=base, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(wide), rtol=0, atol=0)


def test_swap_of_a_model_that_is_not_fused(loras: list[Path], base: Path) -> None:
    with pytest.raises(UsageError, match="fused"):
        swap(load_model(loras[0], base=base), loras[1], base=base)


def test_each_row_goes_through_its_own_model(loras: list[Path], base: Path) -> None:
    cache = BaseCache()
    models = [load_model(path, "fused", base=base, bases=cache, dtype=torch.float32) for path in loras]
    alone = [logits(model) for model in models]
    together = MultiTenant(models)
    for rows in ([0, 1, 2, 1], [2, 2, 0, 0], [1, 1, 1, 1]):
        with torch.no_grad():
            found = together(IDS, rows=rows).logits
        expected = torch.stack([alone[number][row] for row, number in enumerate(rows)])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert [name for name, each in together.named_modules() if isinstance(each, PerTenant)] == ["model.model.norm"]
    assert all(torch.equal(logits(model), before) for model, before in zip(models, alone, strict=True))
    shared = {each.data_ptr() for each in cache.weights().values()}
    assert shared <= {each.data_ptr() for each in together.parameters()}
    with together.rows([2, 0]) as model:
        texts = model.generate(IDS[:2], max_new_tokens=4, do_sample=False, pad_token_id=0)
    for row, number in enumerate([2, 0]):
        alone_text = models[number].generate(IDS[row : row + 1], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(texts[row], alone_text[0])


def test_rows_that_do_not_fit(loras: list[Path], base: Path) -> None:
    together = MultiTenant([load_model(loras[0], "fused", base=base)] * 2)
    with pytest.raises(UsageError, match="numbers of models"):
        together(IDS, rows=[0, 1, 2, 0])
    with pytest.raises(UsageError, match="another size"):
        together(IDS, rows=[0, 1])
    with pytest.raises(UsageError, match="no rows"):
        together.model(IDS)
    with pytest.raises(UsageError, match="one architecture"):
        MultiTenant([])
