"""`deltafmt.torch.load_model`: tiny models of several architectures, dense, fused and lazy."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import json
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import deltafmt
import merges
from deltafmt.errors import IntegrityError, UsageError
from deltafmt.operators import Ref
from deltafmt.torch import BaseCache, MultiTenant, load_model, load_state_dict, merge, swap
from deltafmt.torch.evaluate import resident_bytes
from deltafmt.torch.fused import deltas
from deltafmt.torch.tensors import room_for

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
    own = resident_bytes(models[0]) - cache.nbytes
    assert resident_bytes(*models) <= cache.nbytes + 5 * own
    assert own < cache.nbytes / 2
    del models, bases
    gc.collect()
    assert cache.nbytes == 0


def test_copies_casts_and_state_dicts_know_each_weight_once(kind: str, lowrank: tuple[Path, Path, Any]) -> None:
    packed, base, plain = lowrank
    model = load_model(packed, "fused", base=base)
    size = resident_bytes(model)
    again = copy.deepcopy(model)
    assert resident_bytes(again) == size and resident_bytes(model, again) > size
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("kind", ["llama"], indirect=True)
def test_inductor_compiles_one_graph(lowrank: tuple[Path, Path, Any]) -> None:
    """What `torch.compile` does if nothing else is asked for; C++ for the CPU."""
    packed, base, _ = lowrank
    model = load_model(packed, "fused", base=base)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=0, atol=1e-5)


def test_as_many_components_as_fit(kind: str, lowrank: tuple[Path, Path, Any]) -> None:
    packed, base, _ = lowrank
    none, one = (resident_bytes(load_model(packed, "fused", base=base, rank=rank)) for rank in (0, 1))
    component = one - none
    model = load_model(packed, "fused", base=base, max_bytes=none + 3 * component + component // 2)
    assert {layer.factors.rank for layer in deltas(model).values()} == {3}
    assert resident_bytes(model) == none + 3 * component
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


@pytest.mark.parametrize("method", ["lowrank", "auto"])
def test_rank_holds_for_every_weight_of_a_dense_model(method: Any, tmp_path: Path) -> None:
    """Also where names are those of another time, of which no layer could be fused, and in every mode."""
    torch.manual_seed(4)
    base = saved(bert(), tmp_path / "base", torch.bfloat16)
    old = {
        name.replace("Norm.weight", "Norm.gamma"): each for name, each in load_file(base / "model.safetensors").items()
    }
    save_file(old, base / "model.safetensors", metadata={"format": "pt"})
    tuned = merges.merged_lora(base, tmp_path / "tuned", rank=3, ulps=40)
    options: dict[str, Any] = {"rank": 3} if method == "lowrank" else {}
    deltafmt.pack(tuned, tmp_path / "packed", base=base, method=method, **options)
    before, after = (load_file(each / "model.safetensors") for each in (base, tuned))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 13
    whole = state(load_model(tmp_path / "packed", base=base))
    for mode in ("full", "fused"):
        for rank in (0, 1, 3):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*loaded dense")
                found = state(load_model(tmp_path / "packed", mode, base=base, rank=rank))
            for name in before:
                name_now = name.replace("gamma", "weight")
                if name not in changed or rank == 3:
                    assert torch.equal(found[name_now], whole[name_now]), (mode, rank, name)
                    continue
                delta = after[name].double() - before[name].double()
                u, s, v = torch.linalg.svd(delta)
                expected = before[name].double() + (u[:, :rank] * s[:rank]) @ v[:rank]
                off = torch.linalg.norm(found[name_now].double() - expected) / torch.linalg.norm(delta)
                assert off <= (0.05 if rank else 0), (mode, rank, name)  # sums are rounded to bfloat16


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


def test_a_dense_model_of_a_prefix_shares_no_parameters(tmp_path: Path) -> None:
    torch.manual_seed(5)
    base = saved(llama(), tmp_path / "base")
    tuned = merges.merged_lora(base, tmp_path / "tuned", rank=3, ulps=1e5)
    weights = load_file(tuned / "model.safetensors")
    one, other = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (1, 2))
    weights[other] = weights[one].clone()
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    deltafmt.pack(tuned, tmp_path / "packed", base=base)
    with deltafmt.open(tmp_path / "packed", base) as archive:
        assert archive._archive.manifest.tensors[other].recipe == Ref(one)  # stored once
    dense = load_model(tmp_path / "packed", base=base, rank=1)
    first, second = (dense.get_parameter(name) for name in (one, other))
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    assert torch.linalg.matrix_rank(first.detach() - weight_of(base, one), tol=1e-3) == 1
    dense.save_pretrained(tmp_path / "saved")
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
    size = resident_bytes(load_model(archive, "full", base=base))
    with pytest.raises(UsageError, match="max_bytes"):
        load_model(archive, "full", base=base, rank=2, max_bytes=size // 2)


# Half precision


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("mode", ["full", "fused", "lazy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_a_model_keeps_in_float32_stays_so(mode: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """T5 does with `wo`, if the rest is float16."""
    torch.manual_seed(6)
    base = saved(t5(), tmp_path / "base")
    tuned = merges.merged_lora(base, tmp_path / "tuned", rank=4, ulps=1e5)
    deltafmt.pack(tuned, tmp_path / "packed", base=base, method="lowrank", rank=4)
    deltafmt.unpack(tmp_path / "packed", tmp_path / "plain", base=base)
    plain = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "plain", dtype=dtype)
    wide = {name for name, each in plain.named_parameters() if each.dtype == torch.float32}
    assert len(wide) == (2 if dtype == torch.float16 else 0)
    model = load_model(tmp_path / "packed", mode, base=base, dtype=dtype)
    with torch.no_grad():
        found, expected = (each(input_ids=IDS, decoder_input_ids=IDS).logits for each in (model, plain))
    if mode == "fused":
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
        assert len(deltas(model)) > 6
        for name, layer in deltas(model).items():
            assert layer.base is not None
            assert layer.base.dtype == plain.get_submodule(name).weight.dtype
        return
    assert torch.equal(found, expected)
    for name, parameter in plain.named_parameters():
        assert model.get_parameter(name).dtype == parameter.dtype
        assert mode == "lazy" or torch.equal(model.get_parameter(name), parameter)


# Swapping


def test_swap_takes_over_the_name_and_the_settings_of_generation(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    for name, tokens in (("one", 3), ("other", 5)):
        tuned = merges.merged_lora(base, tmp_path / f"{name}-model", rank=4, ulps=1e5, seed=tokens)
        (tuned / "generation_config.json").write_text(json.dumps({"max_new_tokens": tokens}))
        deltafmt.pack(tuned, tmp_path / name, base=base, method="lowrank", rank=4)
    model = load_model(tmp_path / "one", "fused", base=base)
    swap(model, tmp_path / "other")
    assert model.generation_config.max_new_tokens == 5
    assert model.name_or_path == model.config._name_or_path == str(tmp_path / "other")
    assert model.generate(IDS[:1], do_sample=False, pad_token_id=0, eos_token_id=None).shape[1] == IDS.shape[1] + 5


# Lazy models


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A tiny CLIP, packed: the model itself has a parameter, beside those of its modules."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 128, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    deltafmt.pack(saved(transformers.CLIPModel(config), tmp_path / "clip"), tmp_path / "packed")
    return tmp_path / "packed"


def test_a_lazy_model_is_collected_and_its_archive_closed(clip: Path) -> None:
    model = load_model(clip, "lazy")
    assert "logit_scale" in model._parameters
    with torch.no_grad():
        model(input_ids=IDS, pixel_values=torch.zeros(2, 3, 16, 16))
    gone = weakref.ref(model)
    opened = weakref.ref(opened_by(model))
    del model
    gc.collect()
    assert gone() is None and opened() is None


def opened_by(model: nn.Module) -> Any:
    """The archive that the hooks of a lazy model read."""
    hook: Any = inspect.unwrap(next(iter(model._forward_pre_hooks.values())))
    return next(each.cell_contents for each in hook.__closure__ if type(each.cell_contents).__name__ == "LazyWeights")


def test_a_lazy_model_is_cast_and_compiled(tmp_path: Path) -> None:
    model = llama().eval()
    deltafmt.pack(saved(model, tmp_path / "model"), tmp_path / "packed")
    lazy = load_model(tmp_path / "packed", "lazy")
    with torch.no_grad():
        compiled: Any = torch.compile(lazy, backend="eager")
        assert torch.equal(compiled(IDS).logits, logits(model))
        assert {each.device.type for each in lazy.parameters()} == {"meta"}
    for dtype in (torch.bfloat16, torch.float64):
        lazy = load_model(tmp_path / "packed", "lazy", keep=True).to(dtype)
        found, expected = logits(lazy), logits(copy.deepcopy(model).to(dtype))
        assert found.dtype == dtype and torch.equal(found, expected)
        assert {each.dtype for each in lazy.parameters()} == {dtype}


def test_copies_and_parts_of_a_lazy_model_outlive_it(tmp_path: Path) -> None:
    model = llama()
    deltafmt.pack(saved(model, tmp_path / "model"), tmp_path / "packed")
    expected = logits(model.eval())
    lazy = load_model(tmp_path / "packed", "lazy")
    again, part = copy.deepcopy(lazy), lazy.model
    del lazy
    gc.collect()
    assert torch.equal(logits(again), expected)
    with torch.no_grad():
        assert torch.equal(part(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


# What is not as it should be


@pytest.mark.parametrize("single_file", [False, True])
def test_a_damaged_configuration_is_not_used(single_file: bool, tmp_path: Path) -> None:
    packed = tmp_path / "packed.safetensors"
    deltafmt.pack(saved(llama(), tmp_path / "model"), packed, single_file=single_file)
    file = packed if single_file else packed / "config.json"
    data = file.read_bytes()
    assert data.count(b'"rms_norm_eps": 1e-06') == 1
    file.write_bytes(data.replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-01'))
    for mode in ("full", "fused", "lazy"):
        with pytest.raises(IntegrityError, match=r"config\.json.*digest") as caught:
            load_model(packed, mode)
        assert caught.value.reason == "digest"


def test_devices_that_cannot_be_used(tmp_path: Path) -> None:
    deltafmt.pack(saved(llama(), tmp_path / "model"), tmp_path / "packed")
    absent: list[Any] = ["foo", "meta", f"cuda:{torch.cuda.device_count()}", [1], 10**6]
    for device in absent:
        for load in (load_model, load_state_dict):
            with pytest.raises(UsageError, match="cannot be used"):
                load(tmp_path / "packed", device=device)


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "fails",
    [out_of_memory, lambda: torch.empty(1 << 60), lambda: np.empty(1 << 60, np.uint8), lambda: bytearray(1 << 60)],
    ids=["device", "torch", "numpy", "python"],
)
def test_a_device_without_room_is_told_with_numbers(fails: Callable[[], object]) -> None:
    for device, where in ((torch.device("cpu"), "on the device 'cpu'"), (None, "in memory")):
        with pytest.raises(UsageError, match=f"no room {where}") as caught, room_for(1234, device, "Take less"):
            fails()
        assert "1234" in str(caught.value.expected) and caught.value.hint == "Take less"
    with pytest.raises(RuntimeError, match="another"), room_for(1234, None, "Take less"):
        raise RuntimeError("another error")


@pytest.mark.parametrize("mode", ["full", "fused", None])
def test_memory_that_there_is_not(mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deltafmt.pack(saved(llama(), tmp_path / "model"), tmp_path / "packed")
    work = torch.empty

    def empty(shape: Any, *given: Any, **more: Any) -> Any:
        ours = shape == (128, 64) and "device" not in more  # not the skeleton's
        return work(1 << 60 if ours else shape, *given, **more)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(UsageError, match="no room in memory"):
        if mode is None:
            load_state_dict(tmp_path / "packed")
        else:
            load_model(tmp_path / "packed", mode)
