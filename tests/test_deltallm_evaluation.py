"""How models are measured, and the other ways to make them smaller."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import deltallm as experiment
import deltallm_results as results
from deltafmt import UsageError
from deltafmt.deltallm.adapters import add_lora
from deltafmt.deltallm.architecture import blocks, linears
from deltafmt.deltallm.baselines import drop_layers, lora_numbers, lora_rank, merge_layers, svd_model
from deltafmt.deltallm.calibration import block_influence, second_moments
from deltafmt.deltallm.initialise import twin
from deltafmt.torch.evaluate import evaluate, parameters, resident_bytes, stored_bytes
from deltallm_runs import METHODS

IDS = torch.arange(130) * 37 % 256


pytestmark = pytest.mark.usefixtures("one_thread")


def new_llama(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    return new_llama()


@pytest.fixture(scope="module")
def gpt2(mgm_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(mgm_dir, dtype=torch.float32).eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids[None]).logits[0]
    return found


# Measuring


def test_perplexity_is_that_of_the_loss_of_transformers(llama: Any) -> None:
    """Two windows of 60, and ten tokens that fill none."""
    windows = IDS[:120].view(2, 60)
    with torch.no_grad():
        loss = llama(input_ids=windows, labels=windows).loss.item()
    for batch in (1, 2, 8):
        found = evaluate(llama, IDS, length=60, batch=batch)
        assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
        assert found.tokens == 2 * 59
        assert (found.agreement, found.kl) == (None, None)
    assert evaluate(llama, IDS[:50], length=60).tokens == 49


def test_agreement_and_divergence_are_those_of_their_definitions(llama: Any) -> None:
    other = new_llama(1)
    ids = IDS[:64]
    p, q = (torch.log_softmax(logits(model, ids)[:-1].double(), -1) for model in (llama, other))
    expected = (q.exp() * (q - p)).sum(-1).mean().item()
    found = evaluate(llama, ids, reference=other, length=64)
    assert found.kl == pytest.approx(expected, rel=1e-5)
    assert found.agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found.accuracy == (p.argmax(-1) == ids[1:]).double().mean().item()
    same = evaluate(llama, ids, reference=llama, length=64)
    assert same.agreement == 1
    assert same.kl == pytest.approx(0, abs=1e-9)


def test_many_positions_are_scored_in_slices(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(llama, IDS, reference=new_llama(1), length=130)
    monkeypatch.setattr("deltafmt.torch.evaluate._ROWS", 7)
    sliced = evaluate(llama, IDS, reference=new_llama(1), length=130)
    assert sliced.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert sliced.kl == pytest.approx(whole.kl, rel=1e-6)
    assert sliced.accuracy == whole.accuracy


def test_a_model_that_was_training_is_training_again() -> None:
    model = new_llama().train()
    evaluate(model, IDS, length=60)
    assert model.training


@pytest.mark.parametrize(("tokens", "length"), [(1, 8), (8, 1)])
def test_no_token_to_predict_is_refused(llama: Any, tokens: int, length: int) -> None:
    with pytest.raises(UsageError):
        evaluate(llama, IDS[:tokens], length=length)


def test_what_is_shared_counts_once(llama: Any, tmp_path: Path) -> None:
    tied = copy.deepcopy(llama)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    assert parameters(llama) - parameters(tied) == 256 * 64
    assert resident_bytes(llama) - resident_bytes(tied) == 4 * 256 * 64
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_bytes(bytes(70))
    (tmp_path / "other").write_bytes(bytes(7))
    assert stored_bytes(tmp_path) == 77
    assert stored_bytes(tmp_path / "other") == 7


# Dropping and merging


def test_the_least_layers_go_and_the_rest_is_what_it_was(llama: Any) -> None:
    influence = [0.9, 0.8, 0.1, 0.7, 0.6, 0.2, 0.5, 0.4]
    share = sum(weight.numel() for weight in blocks(llama)[0].parameters()) / parameters(llama)
    before = logits(llama)
    smaller: Any = drop_layers(llama, influence, 2.2 * share)
    assert parameters(smaller) == pytest.approx(parameters(llama) * (1 - 2 * share))
    assert smaller.config.num_hidden_layers == len(blocks(smaller)) == 6
    assert [block.self_attn.layer_idx for block in smaller.model.layers] == list(range(6))
    assert {id(weight) for weight in smaller.parameters()} < {id(weight) for weight in llama.parameters()}
    expected = copy.deepcopy(llama)
    expected.model.layers = nn.ModuleList(expected.model.layers[layer] for layer in (0, 1, 3, 4, 6, 7))
    with torch.no_grad():
        assert torch.equal(logits(smaller), expected(input_ids=IDS[None], use_cache=False).logits[0])
    assert torch.equal(logits(llama), before)
    assert llama.config.num_hidden_layers == 8


def test_a_model_with_fewer_layers_is_a_checkpoint_like_any_other(llama: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    smaller: Any = drop_layers(llama, [0.5] * 8, 0.2)
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(smaller))
    generated = smaller.generate(IDS[None, :4], attention_mask=torch.ones(1, 4), max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 8)


def test_merged_layers_are_the_weighted_mean(llama: Any) -> None:
    influence = [0.9, 0.8, 0.3, 0.1, 0.1, 0.7, 0.5, 0.4]
    share = sum(weight.numel() for weight in blocks(llama)[0].parameters()) / parameters(llama)
    smaller = merge_layers(llama, influence, 2 * share)
    own, layers = blocks(smaller), blocks(llama)
    assert len(own) == 6
    for name in ("mlp.up_proj.weight", "self_attn.o_proj.weight"):
        parts = [layers[layer].get_parameter(name) for layer in (2, 3, 4)]
        expected = 0.6 * parts[0] + 0.2 * parts[1] + 0.2 * parts[2]
        torch.testing.assert_close(own[2].get_parameter(name), expected)
    assert own[2].get_parameter("input_layernorm.weight") is layers[2].get_parameter("input_layernorm.weight")
    assert own[3].get_parameter("mlp.up_proj.weight") is layers[5].get_parameter("mlp.up_proj.weight")


def test_layers_that_are_alike_merge_without_loss() -> None:
    """Two equal layers, one of which did nothing else than the other would."""
    model = new_llama()
    model.model.layers[4] = copy.deepcopy(model.model.layers[3])
    smaller = merge_layers(model, [1, 1, 1, 1, 0.5, 1, 1, 1], 0.1)
    for name, parameter in blocks(smaller)[3].named_parameters():
        torch.testing.assert_close(parameter, blocks(model)[3].get_parameter(name))


@pytest.mark.parametrize("remove", [0.001, 0.99])
def test_no_layer_and_all_layers_are_refused(llama: Any, remove: float) -> None:
    with pytest.raises(UsageError):
        drop_layers(llama, [0.5] * 8, remove)


def test_a_gpt2_loses_layers_too(gpt2: Any) -> None:
    smaller: Any = drop_layers(gpt2, block_influence(gpt2, [IDS[None]]), 0.24)
    assert smaller.config.n_layer == len(blocks(smaller)) < 8
    assert evaluate(smaller, IDS, reference=gpt2, length=65).tokens == 128


# SVD without sharing


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("remove", [0.05, 0.15])
def test_factors_meet_the_budget(name: str, remove: float, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    found = svd_model(model, remove)
    gone = 1 - parameters(found) / parameters(model)
    assert remove <= gone < remove + 0.001
    trained = {name for name, weight in found.named_parameters() if weight.requires_grad}
    assert trained
    assert all("factors" in name for name in trained)
    assert torch.isfinite(logits(found)).all()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_weight_is_the_truncated_svd(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    (chosen, module), *_ = linears(model, 3, "mlp").items()
    found: Any = svd_model(model, 0.001, names=[chosen]).get_submodule(chosen)
    left, values, right = torch.linalg.svd(module.weight.detach().double())  # type: ignore[operator]
    rank = found.factors.rank
    expected = (left[:, :rank] * values[:rank]) @ right[:rank]
    torch.testing.assert_close(found.merged_weight().double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_with_moments_the_output_is_nearer(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    names = list(linears(model, 4, "mlp"))
    moments = second_moments(model, [IDS[None]], names)
    plain, weighted = svd_model(model, 0.003, names=names), svd_model(model, 0.003, names=names, moments=moments)

    @torch.no_grad()
    def error(of: nn.Module, chosen: str) -> float:
        layer: Any = of.get_submodule(chosen)
        difference: Any = layer.merged_weight() - model.get_submodule(chosen).weight
        if difference.shape[1] != len(moments[chosen]) or name == "gpt2":
            difference = difference.t()
        return float((difference @ moments[chosen] @ difference.t()).trace())

    for chosen in names:
        assert error(weighted, chosen) < error(plain, chosen)


@pytest.mark.parametrize("remove", [0.0, 0.9])
def test_nothing_and_more_than_the_layers_have_are_refused(llama: Any, remove: float) -> None:
    with pytest.raises(UsageError):
        svd_model(llama, remove)


# LoRA on what is left


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_lora_has_as_many_numbers_as_asked(name: str, request: pytest.FixtureRequest) -> None:
    model = drop_layers(request.getfixturevalue(name), [0.5] * 8, 0.2)
    rank = lora_rank(model, 100_000)
    student = twin(model)
    add_lora(student, rank, seed=0)
    numbers = sum(each.numel() for each in student.parameters() if each.requires_grad)
    assert numbers == pytest.approx(100_000, rel=0.5 / rank)
    assert numbers == rank * lora_numbers(model)
    assert lora_rank(model, 1) == 1


# The experiment


def test_the_experiment_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every method for a few steps; a second call makes nothing again."""
    import numpy as np

    new_llama().save_pretrained(tmp_path / "model")
    for name, count in (("train", 4000), ("held_out", 600)):
        np.save(tmp_path / f"{name}.npy", (np.arange(count) * 37 % 251).astype(np.uint16))
    out = tmp_path / "out"
    arguments = ["--model", "random", "--model-dir", str(tmp_path / "model"), "--out", str(out)]
    arguments += ["--tokens-file", str(tmp_path / "train.npy"), "--held-out", str(tmp_path / "held_out.npy")]
    arguments += ["--device", "cpu", "--dtype", "float32", "--tokens", "1280", "--remove", "0.12"]
    arguments += ["--batch", "4", "--length", "32", "--calibrate", "256"]
    experiment.main(arguments)
    lines = (out / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["run"]["method"] for record in records] == list(METHODS)
    for record in records:
        if record["run"]["method"] in ("drop", "merge"):  # whole layers
            assert record["removed"] == pytest.approx(0.12, abs=0.07)
        elif record["run"]["method"] == "control":
            assert record["removed"] == 0
        else:
            assert 0.12 <= record["removed"] < 0.125
        assert record["trained"]["perplexity"] < record["initial"]["perplexity"]
    assert records[0]["packed"]["perplexity"] == pytest.approx(records[0]["trained"]["perplexity"], rel=0.01)
    experiment.main(arguments)
    assert (out / "results.jsonl").read_text().splitlines() == lines
    capsys.readouterr()
    experiment.main(["--out", str(out), "--table", "--plot", str(tmp_path / "quality.svg")])
    assert "| delta (alternating mlp full) |" in capsys.readouterr().out
    ElementTree.fromstring((tmp_path / "quality.svg").read_text())


def test_a_half_written_line_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"a": 1}\n{"a": 2')
    assert results.read(tmp_path / "file") == [{"a": 1}]


def test_a_chart_is_svg_even_of_what_has_no_number() -> None:
    curves = {"a <b>": [(88.0, 40.0, 1.0), (76.0, math.inf, 0.0)], "none": [(1.0, math.nan, 0.0)]}
    ElementTree.fromstring(results.chart(curves, "x", "y", level=39.0))
    ElementTree.fromstring(results.chart({}, "x", "y"))
