"""Several fine-tunes of one base in one process: merged LoRAs stored exactly, `swap`, one batch for all of them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import deltafmt
import merges
from deltafmt.errors import UnsupportedError, UsageError, WrongBaseError
from deltafmt.manifest import BaseTensor
from deltafmt.manifest_parser import parse_manifest
from deltafmt.operators import Lowrank, Patch, Ref, Stored
from deltafmt.torch import BaseCache, MultiTenant, load_model, merge, swap, trainable
from deltafmt.torch.fused import DeltaEmbedding, DeltaLinear, Factors, deltas
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
        steps = weight.view(torch.int16).int() - layer.merged_weight().view(torch.int16).int()
        assert ((steps.abs() <= 1) | (weight.abs() < 1e-3)).all()
    expected = logits(plain.float())
    torch.testing.assert_close(logits(model.float()), expected, rtol=0, atol=5e-3)
    assert torch.equal(logits(load_model(packed, base=base, dtype=torch.float32)), expected)
    layer = next(iter(deltas(model).values()))
    before = layer.merged_weight()
    trainable(model)
    assert layer.factors.lora_a.requires_grad
    torch.testing.assert_close(layer.merged_weight(), before, rtol=0, atol=1e-6)


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
    assert {id(weight) for weight in before} <= {id(weight) for weight in cache.weights()}


def test_swap_needs_no_base_for_what_is_there(loras: list[Path], base: Path, tmp_path: Path) -> None:
    deltafmt.pack(merges.fine_tuned(base, tmp_path / "tuned"), tmp_path / "patched", base=base)
    model = load_model(loras[0], "fused", base=base)
    swap(model, loras[1])
    torch.testing.assert_close(logits(model), logits(load_model(loras[1], "fused", base=base)), rtol=0, atol=0)
    with pytest.raises(WrongBaseError), pytest.warns(UserWarning, match="not as factors"):
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
    shared = {each.data_ptr() for each in cache.weights()}
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


def test_training_a_merged_model_leaves_the_others_alone(loras: list[Path], base: Path) -> None:
    cache = BaseCache()
    one, other = (load_model(path, "fused", base=base, bases=cache, dtype=torch.float32) for path in loras[:2])
    tenants = MultiTenant([one, other])
    before, together = logits(other), tenants(IDS, rows=[0, 1, 0, 1]).logits
    merge(one)
    assert {each.data_ptr() for each in one.parameters()}.isdisjoint(each.data_ptr() for each in cache.weights())
    with pytest.raises(UsageError, match="fused"):
        swap(one, loras[1], base=base)
    untrained = logits(one)
    optimizer = torch.optim.SGD(one.parameters(), lr=1.0)
    one(IDS).logits.logsumexp(-1).sum().backward()
    assert all(each.grad is not None for each in one.parameters())
    optimizer.step()
    assert not torch.equal(logits(one), untrained)
    assert torch.equal(logits(other), before)
    assert torch.equal(tenants(IDS, rows=[0, 1, 0, 1]).logits, together)
    again = load_model(loras[1], "fused", base=base, bases=cache, dtype=torch.float32)
    assert torch.equal(logits(again), before)


def test_weights_that_happen_to_be_alike_are_trained_apart(tmp_path: Path) -> None:
    """All biases of a new BERT are zeros, all weights of its norms ones; only what the model ties is one parameter."""
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    plain = transformers.BertForMaskedLM(config)
    plain.save_pretrained(tmp_path / "base")
    tuned = merges.merged_lora(tmp_path / "base", tmp_path / "tuned", rank=3, ulps=1e5)
    deltafmt.pack(tuned, tmp_path / "packed", base=tmp_path / "base", method="lowrank", rank=3)
    for written in ("each as one tensor of the base", "each as that of its name"):
        if "name" in written:
            refer_by_name(tmp_path / "packed")
        model = load_model(tmp_path / "packed", "fused", base=tmp_path / "base")
        merge(model)
        assert len({each.data_ptr() for each in model.parameters()}) == len(list(plain.parameters())), written
        assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


def refer_by_name(archive: Path) -> None:
    """Make each tensor that is one of the base that of the same name, as another writer may do."""
    file = archive / "deltafmt.json"
    manifest = parse_manifest(file.read_bytes(), str(file))
    same = {name: tensor for name, tensor in manifest.tensors.items() if isinstance(tensor.recipe, Ref)}
    tensors = {name: tensor._replace(recipe=Ref(name, "base")) for name, tensor in same.items()}
    known = manifest.bases["base"]
    own = {name: BaseTensor(each.dtype, each.shape, str(each.digest)) for name, each in tensors.items()}
    bases = {"base": replace(known, tensors={**known.tensors, **own})}
    file.write_bytes(replace(manifest, tensors={**manifest.tensors, **tensors}, bases=bases).to_bytes())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_integers_are_scaled_before_they_are_narrow(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-(10**6), 10**6, (4, 64), generator=generator, dtype=torch.int32) for _ in range(2))
    layers: list[Any] = [DeltaLinear(Factors(a, b, 2.0**-41)), DeltaEmbedding(Factors(a, b, 2.0**-41))]
    weight = b.double().T @ a.double() * 2.0**-41
    step = 3 * torch.finfo(dtype).eps * (b.double().abs().T @ a.double().abs()).max() * 2.0**-41
    x = torch.eye(64, dtype=dtype)
    assert (layers[0](x).T.double() - weight).abs().max() <= step
    found, _ = layers[0].factors.pair(dtype)
    assert found.isfinite().all() and found.dtype == dtype
    with default_dtype(dtype):
        assert (layers[1](torch.arange(64)).double() - weight).abs().max() <= step


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_integer_factors_can_be_made_trainable(merged: tuple[Path, Path], base: Path) -> None:
    model = load_model(merged[0], "fused", base=base, dtype=torch.float32)
    before = logits(model)
    assert not any(each.requires_grad for each in model.parameters())
    trainable(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    model(IDS).logits.logsumexp(-1).sum().backward()
    for name, each in model.named_parameters():
        assert (each.grad is not None) == name.endswith(("lora_a", "lora_b")), name


def test_a_weight_that_is_looked_at_is_not_built(merged: tuple[Path, Path], base: Path) -> None:
    model = load_model(merged[0], "fused", base=base)
    for name, layer in deltas(model).items():
        outline = layer.weight
        assert isinstance(outline, torch.Tensor)
        with pytest.raises(RuntimeError):
            outline.untyped_storage().data_ptr()  # no memory
        built = layer.merged_weight()
        assert (outline.shape, outline.dtype, outline.device) == (built.shape, built.dtype, built.device), name
        for use in (lambda w: w @ w, lambda w: w.t(), lambda w: w.to(torch.float64), lambda w: w[0], torch.clone):
            with pytest.raises(UsageError, match="merged_weight"):
                use(outline)
        assert "bfloat16" in repr(outline)

    def cast(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = layer(x.to(layer.weight.dtype))
        return y

    x = torch.ones(2, layer.weight.shape[1])
    assert torch.equal(torch.compile(cast, fullgraph=True, backend="eager")(x), cast(x))


def test_a_cache_counts_every_copy(loras: list[Path], base: Path) -> None:
    cache = BaseCache()
    dtypes = (torch.bfloat16, torch.float32)
    models = [load_model(loras[0], "fused", base=base, bases=cache, dtype=dtype) for dtype in dtypes]
    frozen = [each for model in models for each in model.parameters() if not each.requires_grad]
    different = {(each.dtype, each.float().numpy().tobytes()): each.nbytes for each in frozen}
    assert cache.nbytes == sum(different.values())
    assert {each.dtype for each in cache.weights()} == {torch.bfloat16, torch.float32}


def test_threads_choose_rows_for_themselves(loras: list[Path], base: Path) -> None:
    cache = BaseCache()
    models = [load_model(path, "fused", base=base, bases=cache, dtype=torch.float32) for path in loras[:2]]
    together = MultiTenant(models)
    alone = [logits(model) for model in models]
    entered, left = threading.Event(), threading.Event()
    result: list[torch.Tensor] = []

    def second() -> None:
        with together.rows([1] * 4) as model:
            entered.set()
            assert left.wait(30)
            result.append(logits(model))

    thread = threading.Thread(target=second)
    with together.rows([0] * 4) as model:
        thread.start()
        assert entered.wait(30)
        torch.testing.assert_close(logits(model), alone[0], rtol=0, atol=1e-5)
        with together.rows([1] * 4):
            torch.testing.assert_close(logits(model), alone[1], rtol=0, atol=1e-5)
        torch.testing.assert_close(logits(model), alone[0], rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="no rows"):
        logits(together.model)
    left.set()
    thread.join()
    torch.testing.assert_close(result[0], alone[1], rtol=0, atol=1e-5)
    with copy.deepcopy(together).rows([1] * 4) as model:
        torch.testing.assert_close(logits(model), alone[1], rtol=0, atol=1e-5)


def test_a_swap_of_one_of_the_models_changes_no_batch(loras: list[Path], merged: tuple[Path, Path], base: Path) -> None:
    cache = BaseCache()
    models = [load_model(path, "fused", base=base, bases=cache, dtype=torch.float32) for path in (loras[2], loras[1])]
    together = MultiTenant(models)
    rows = [0, 1, 0, 1]
    with torch.no_grad():
        before = together(IDS, rows=rows).logits
        for number, other in enumerate((loras[0], merged[0])):
            swap(models[number], other, base=base)
            assert torch.equal(together(IDS, rows=rows).logits, before)
    with pytest.raises(UsageError, match="fused"):
        swap(together.model, loras[0], base=base)


def test_running_means_are_those_of_each_model(tmp_path: Path) -> None:
    """Weights are the same in both: only buffers differ."""
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = transformers.ResNetModel(config)
    cache = BaseCache()
    models = []
    model.save_pretrained(tmp_path / "base")
    for number in range(2):
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.5 * number
        model.save_pretrained(tmp_path / f"tuned{number}")
        deltafmt.pack(tmp_path / f"tuned{number}", tmp_path / f"packed{number}", base=tmp_path / "base")
        models.append(load_model(tmp_path / f"packed{number}", "fused", base=tmp_path / "base", bases=cache))
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UsageError, match="does not run with the example") as caught:
        MultiTenant(models)
    assert caught.value.hint is not None and "example=" in caught.value.hint
    with torch.no_grad():
        alone = [model(pixels).pooler_output for model in models]
        assert (alone[0] - alone[1]).abs().max() > 1e-2
        together = MultiTenant(models, {"pixel_values": pixels[:2]})
        found = together(pixels, rows=[0, 1, 1, 0]).pooler_output
        expected = torch.stack([alone[number][row] for row, number in enumerate([0, 1, 1, 0])])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        # Running statistics are nobody else's: not other norms' of the same model, and not the other model's.
        running = [each for model in models for each in model.buffers()]
        assert len({each.data_ptr() for each in running}) == len(running)
        models[0].train()(pixels)
        torch.testing.assert_close(models[1](pixels).pooler_output, alone[1], rtol=0, atol=0)
        assert torch.equal(together(pixels, rows=[0, 1, 1, 0]).pooler_output, found)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two LoRAs of a T5, the second with relative positions of its own too: fused models of one base, three in all."""
    torch.manual_seed(4)
    root = tmp_path_factory.mktemp("t5")
    config = transformers.T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(root / "base")
    cache = BaseCache()
    models = []
    for number in range(3):
        tuned = merges.merged_lora(root / "base", root / f"tuned{number}", rank=3, ulps=1e5, seed=number)
        if number == 2:
            model = transformers.T5ForConditionalGeneration.from_pretrained(tuned)
            with torch.no_grad():
                model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight += 1
            model.save_pretrained(tuned)
        deltafmt.pack(tuned, root / f"packed{number}", base=root / "base", method="lowrank", rank=3)
        models.append(load_model(root / f"packed{number}", "fused", base=root / "base", bases=cache))
    return models


def test_a_model_that_looks_at_weights(t5: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 reads `wo.weight.dtype` in each block, and where its relative positions are."""
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}
    with torch.no_grad():
        alone = [model(**inputs).logits for model in t5]
        assert (alone[0] - alone[1]).abs().max() > 1e-3
        found = MultiTenant(t5[:2])(**inputs, rows=[1, 0, 0, 1]).logits
        monkeypatch.setattr(DeltaLinear, "merged_weight", None)  # whoever calls it fails
        assert torch.equal(t5[0](**inputs).logits, alone[0])
    expected = torch.stack([alone[number][row] for row, number in enumerate([1, 0, 0, 1])])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_layer_that_does_not_see_the_rows_is_refused(t5: list[Any]) -> None:
    """Relative positions are `[queries, keys]`: if there were as many queries as rows, they would pass for rows."""
    with pytest.raises(UnsupportedError, match=r"relative_attention_bias.*first axis"):
        MultiTenant([t5[0], t5[2]])
