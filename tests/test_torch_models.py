"""`deltafmt.torch.load_model`: tiny models of several architectures, dense, fused and lazy."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import deltafmt
import merges
from deltafmt.errors import UsageError
from deltafmt.torch import BaseCache, MultiTenant, load_model, merge, swap
from deltafmt.torch.fused import deltas

transformers.utils.logging.disable_progress_bar()

IDS = torch.tensor([[3, 14, 15, 92, 65], [35, 89, 79, 32, 38]])


def llama(tied: bool = False, **more: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **more,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=128, bos_token_id=1, eos_token_id=1, n_embd=64, n_layer=2, n_head=4)
    )


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


Make = Callable[[], Any]
KINDS: dict[str, Make] = {"llama": llama, "llama-tied": lambda: llama(tied=True), "gpt2": gpt2, "bert": bert}


def saved(model: nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    model.to(dtype).save_pretrained(path)  # type: ignore[operator]
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def resident(*models: nn.Module) -> int:
    """Bytes of the memory that models hold, each storage once."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def lowrank(kind: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """(archive, base, the unpacked model): a fine-tune of a tiny model whose delta is stored with rank 8."""
    torch.manual_seed(1)
    root = tmp_path_factory.mktemp(kind)
    base = saved(KINDS[kind](), root / "base")
    tuned = merges.merged_lora(base, root / "tuned", rank=6, ulps=1e5)
    deltafmt.pack(tuned, root / "packed", base=base, method="lowrank", rank=8)
    deltafmt.unpack(root / "packed", root / "plain", base=base)
    plain = type(KINDS[kind]()).from_pretrained(root / "plain")
    return root / "packed", base, plain


def test_every_mode_computes_what_the_unpacked_model_does(kind: str, lowrank: tuple[Path, Path, Any]) -> None:
    packed, base, plain = lowrank
    expected = logits(plain)
    for mode in ("full", "lazy"):
        model = load_model(packed, mode, base=base)
        assert type(model) is type(plain) and not model.training
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
    fused = load_model(packed, "fused", base=base)
    assert len(deltas(fused)) > 6
    torch.testing.assert_close(logits(fused), expected, rtol=0, atol=1e-5)
    base_model = type(plain).from_pretrained(base)
    assert (logits(base_model) - expected).abs().max() > 1e-4  # so the factors matter
    torch.testing.assert_close(logits(load_model(packed, "fused", base=base, rank=0)), logits(base_model))
    merge(fused)
    assert not deltas(fused)
    torch.testing.assert_close(logits(fused), expected, rtol=0, atol=1e-5)
    assert {name for name, _ in fused.named_parameters()} == {name for name, _ in plain.named_parameters()}


def test_bases_are_in_memory_once(kind: str, lowrank: tuple[Path, Path, Any]) -> None:
    packed, base, _ = lowrank
    cache = BaseCache()
    models = [load_model(packed, "fused", base=base, bases=cache) for _ in range(5)]
    bases = {id(layer.base): layer.base for layer in deltas(models[0]).values()}
    assert cache.nbytes >= sum(each.nbytes for each in bases.values() if each is not None) > 0
    assert all(
        ours.base is theirs.base
        for model in models[1:]
        for ours, theirs in zip(deltas(models[0]).values(), deltas(model).values(), strict=True)
    )
    own = resident(models[0]) - cache.nbytes
    assert resident(*models) <= cache.nbytes + 5 * own
    assert own < cache.nbytes / 2
    del models, bases
    gc.collect()
    assert cache.nbytes == 0


def test_copies_casts_and_state_dicts_know_each_weight_once(kind: str, lowrank: tuple[Path, Path, Any]) -> None:
    packed, base, plain = lowrank
    model = load_model(packed, "fused", base=base)
    size = resident(model)
    again = copy.deepcopy(model)
    assert resident(again) == size and resident(model, again) > size
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    wide = again.to(torch.float64)
    torch.testing.assert_close(logits(wide), logits(copy.deepcopy(plain).to(torch.float64)), rtol=0, atol=1e-5)
    keys = [name for name in model.state_dict() if name.rpartition(".")[2].startswith("base_")]
    assert len(keys) == len({id(layer.base) for layer in deltas(model).values()})


def test_only_factors_are_trained(kind: str, lowrank: tuple[Path, Path, Any]) -> None:
    packed, base, _ = lowrank
    model = load_model(packed, "fused", base=base)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trained and all(name.endswith((".lora_a", ".lora_b")) for name in trained)
    before = logits(model)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0)
    model(IDS).logits.logsumexp(-1).sum().backward()
    used = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
    assert used == trained
    optimizer.step()
    assert not torch.equal(logits(model), before)


def test_gradients_are_those_of_the_weight(kind: str, lowrank: tuple[Path, Path, Any]) -> None:
    """d loss / d a and d b, from the gradient G of the whole weight: `scale b G` and `scale a G^T`."""
    packed, base, plain = lowrank
    model = load_model(packed, "fused", base=base).double()
    plain = copy.deepcopy(plain).double()
    for each in (model, plain):
        each(IDS).logits.square().sum().backward()
    name, layer = next(
        (name, each) for name, each in deltas(model).items() if "embed" not in name and "wte" not in name
    )
    factors = layer.factors
    assert factors.lora_a.grad is not None and factors.lora_b.grad is not None
    gradient = plain.get_submodule(name).weight.grad
    assert torch.allclose(factors.lora_a.grad, factors.scale * factors.lora_b @ gradient, rtol=1e-3, atol=1e-9)
    assert torch.allclose(factors.lora_b.grad, factors.scale * factors.lora_a @ gradient.T, rtol=1e-3, atol=1e-9)


def test_it_is_compiled_whole_saved_and_generates(kind: str, lowrank: tuple[Path, Path, Any]) -> None:
    packed, base, plain = lowrank
    model = load_model(packed, "fused", base=base)
    if "llama" not in kind:  # takes seconds, and the layers are the same
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(logits(compiled), logits(model), rtol=0, atol=1e-6)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False)), logits(model))
    if plain.can_generate():
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(IDS, **options), plain.generate(IDS, **options))


def test_as_many_components_as_fit(kind: str, lowrank: tuple[Path, Path, Any]) -> None:
    packed, base, _ = lowrank
    none, one = (resident(load_model(packed, "fused", base=base, rank=rank)) for rank in (0, 1))
    component = one - none
    model = load_model(packed, "fused", base=base, max_bytes=none + 3 * component + component // 2)
    assert {layer.factors.rank for layer in deltas(model).values()} == {3}
    assert resident(model) == none + 3 * component
    with pytest.raises(UsageError, match="does not fit"):
        load_model(packed, "fused", base=base, max_bytes=none - 1)
    with pytest.raises(UsageError, match="does not fit"):
        load_model(packed, "full", base=base, max_bytes=1000)


@pytest.mark.parametrize("mode", ["full", "fused", "lazy"])
def test_a_single_file_is_a_model_too(mode: Any, tmp_path: Path) -> None:
    model = llama()
    model.generation_config.max_new_tokens = 7
    deltafmt.pack(saved(model, tmp_path / "model"), tmp_path / "packed.safetensors", single_file=True)
    found = load_model(tmp_path / "packed.safetensors", mode)
    assert torch.equal(logits(found), logits(model.eval()))
    assert found.generation_config.max_new_tokens == 7


def test_a_prefix_is_what_the_first_components_give(tmp_path: Path) -> None:
    torch.manual_seed(3)
    base = saved(llama(), tmp_path / "base")
    tuned = merges.merged_lora(base, tmp_path / "tuned", rank=6, ulps=1e5)
    deltafmt.pack(tuned, tmp_path / "packed", base=base, method="lowrank", rank=8)
    fused, dense = (load_model(tmp_path / "packed", mode, base=base, rank=2) for mode in ("fused", "full"))
    torch.testing.assert_close(logits(dense), logits(fused), rtol=0, atol=1e-5)
    name = "model.layers.1.mlp.up_proj"
    with deltafmt.open(base.parent / "packed", base, "pt") as archive:
        exact = archive.get_tensor(f"{name}.weight")
    delta = exact - weight_of(base, f"{name}.weight")
    found = dense.get_submodule(name).weight - weight_of(base, f"{name}.weight")
    u, s, v = torch.linalg.svd(delta)
    torch.testing.assert_close(found, (u[:, :2] * s[:2]) @ v[:2], rtol=0, atol=1e-5)
    assert all(each.requires_grad for each in dense.parameters())


def weight_of(checkpoint: Path, name: str) -> torch.Tensor:
    return load_file(checkpoint / "model.safetensors")[name]


def test_another_configuration_is_no_fine_tune(tmp_path: Path) -> None:
    """Same shapes and class: nothing but the configuration tells that the values would be wrong."""
    base = saved(llama(), tmp_path / "base")
    models = {}
    for name, eps in (("one", 1e-6), ("other", 0.5)):
        model = llama(rms_norm_eps=eps)
        model.load_state_dict(load_file(base / "model.safetensors"), strict=False)
        deltafmt.pack(saved(model, tmp_path / f"{name}-model"), tmp_path / name)
        models[name] = load_model(tmp_path / name, "fused")
    before = logits(models["one"])
    with pytest.raises(UsageError, match="configuration"):
        swap(models["one"], tmp_path / "other")
    assert torch.equal(logits(models["one"]), before)
    with pytest.raises(UsageError, match="configuration"):
        MultiTenant(list(models.values()))
    with pytest.raises(UsageError):
        MultiTenant([models["one"], load_model(tmp_path / "one")])


def test_what_could_not_be_read_back_is_not_saved(tmp_path: Path, lowrank: tuple[Path, Path, Any]) -> None:
    archive, base, _ = lowrank
    for mode in ("fused", "lazy"):
        with pytest.raises(UsageError, match="plain checkpoint"):
            load_model(archive, mode, base=base).save_pretrained(tmp_path / mode)
        assert not (tmp_path / mode).exists()
    model = load_model(archive, "fused", base=base)
    merge(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(type(model).from_pretrained(tmp_path / "merged").eval()), expected)


def test_the_dense_model_of_a_prefix_fits_too(tmp_path: Path, lowrank: tuple[Path, Path, Any]) -> None:
    archive, base, _ = lowrank
    size = resident(load_model(archive, "full", base=base))
    with pytest.raises(UsageError, match="max_bytes"):
        load_model(archive, "full", base=base, rank=2, max_bytes=size // 2)
