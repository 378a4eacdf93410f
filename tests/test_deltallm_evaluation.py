"""How models are measured, and the other ways to make them smaller."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
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


def new_llama(seed: int = 0, layers: int = 8, width: int = 64, intermediate: int = 128) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
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

    new_llama(layers=6, width=32, intermediate=96).save_pretrained(tmp_path / "model")
    for name, count in (("train", 2000), ("held_out", 300)):
        np.save(tmp_path / f"{name}.npy", (np.arange(count) * 37 % 251).astype(np.uint16))
    out = tmp_path / "out"
    arguments = ["--model", "random", "--model-dir", str(tmp_path / "model"), "--out", str(out)]
    arguments += ["--tokens-file", str(tmp_path / "train.npy"), "--held-out", str(tmp_path / "held_out.npy")]
    arguments += ["--device", "cpu", "--dtype", "float32", "--tokens", "320", "--remove", "0.12"]
    arguments += ["--keep", "1", "1", "--batch", "4", "--length", "16", "--calibrate", "128", "--rate", "2e-3"]
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
        off = record["logits_off"]
        assert off["full"] == off["unpacked"]  # the same weights
        assert max(off.values()) < 0.05
        assert (off["full"] > 0) == (record["run"]["method"] in ("delta", "svd", "asvd"))  # factors become bfloat16
        sizes = record["checkpoint"]
        assert sizes["step_bytes"] + sizes["frozen_bytes"] > record["stored_bytes"] / 2
        (folder,) = (out / "runs").glob(f"random-{record['run']['method']}-*")
        assert [path.name for path in folder.iterdir()] == ["log.jsonl"]
        assert results.read(folder / "log.jsonl")[-1]["step"] == 5
    assert records[0]["packed"]["perplexity"] == pytest.approx(records[0]["trained"]["perplexity"], rel=0.01)
    experiment.main(arguments)
    assert (out / "results.jsonl").read_text().splitlines() == lines
    capsys.readouterr()
    experiment.main(["--out", str(out), "--markdown", "--plot", str(tmp_path / "quality.svg")])
    assert "| delta (alternating mlp full) |" in capsys.readouterr().out
    assert texts((tmp_path / "quality.svg").read_text()) > {"delta (alternating mlp full)", "drop"}
    # A line each, and the titles of both axes.
    assert texts((tmp_path / "quality-loss.svg").read_text()) > {"delta (alternating mlp full) -12%", "drop -12%"}
    experiment.main(["--out", str(out), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [run["method"] for run in found["runs"]].count("delta") == 1
    assert found["originals"][0]["parameters"] == records[0]["original"]["parameters"]


def test_a_run_that_is_killed_leaves_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    class KilledError(Exception):
        pass

    @contextmanager
    def killing(title: str) -> Iterator[Any]:
        def tell(done: int, total: int, what: str) -> None:
            raise KilledError

        yield tell

    new_llama(layers=3, width=32).save_pretrained(tmp_path / "model")
    np.save(tmp_path / "tokens.npy", (np.arange(300) * 37 % 251).astype(np.uint16))
    arguments = ["--model", "random", "--model-dir", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    arguments += ["--tokens-file", str(tmp_path / "tokens.npy"), "--held-out", str(tmp_path / "tokens.npy")]
    arguments += ["--device", "cpu", "--dtype", "float32", "--tokens", "704", "--methods", "control"]
    arguments += ["--batch", "4", "--length", "16", "--trainable", "1000"]
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr("deltallm_runs.progress", killing)
        experiment.main(arguments)
    (log,) = (tmp_path / "out/runs").glob("*/log.jsonl")
    assert [line["step"] for line in results.read(log)] == [10]
    assert not (tmp_path / "out/results.jsonl").exists()
    experiment.main(arguments)
    assert [line["step"] for line in results.read(log)] == [10, 11]
    assert len(results.read(tmp_path / "out/results.jsonl")) == 1


def texts(svg: str) -> set[str]:
    """What is written in a picture, all of which lies within it, if a character is 7 pixels wide."""
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    written = [each for each in root.iter() if each.tag.endswith("text")]
    for each in written:
        if "transform" not in each.attrib and each.attrib.get("text-anchor", "start") == "start":
            assert float(each.attrib["x"]) + 7 * len(each.text or "") <= width
            assert float(each.attrib["y"]) <= height
    return {each.text or "" for each in written}


def run_record(seed: int = 0, tokens: int = 1000, rate: float = 1e-3, **trained: float) -> dict[str, Any]:
    """What a run of MGM gave."""
    scores = {"perplexity": 58.9, "accuracy": 0.1374, "agreement": 0.5687, "kl": 0.1642, "tokens_per_second": 3740.0}
    return {
        "run": {
            "model": "mgm",
            "method": "delta",
            "remove": 0.12,
            "seed": seed,
            "tokens": tokens,
            "structure": "sequential:2 both full",
        },
        "settings": {"batch": 32, "rate": rate, "layout": "sequential:2", "parts": "both"},
        "removed": 0.12,
        "parameters": 7_853_824,
        "trainable": 2_074_624,
        "plain_bytes": 15_707_648,
        "stored_bytes": 22_082_195,
        "resident_bytes": 27_300_000,
        "train_seconds": 87.0,
        "device": "CPU",
        "original": scores
        | {"accuracy": 0.16, "parameters": 8_924_928, "plain_bytes": 17_849_856, "stored_bytes": 29_773_108},
        "initial": scores,
        "trained": scores | trained,
        "packed": scores,
    }


def test_tables_say_mean_and_spread_and_what_was_before() -> None:
    """Of records as earlier versions wrote them, too, which say nothing of checkpoints."""
    records = [
        run_record(0, perplexity=57.0, accuracy=0.144, agreement=0.60, kl=0.14),
        run_record(1, perplexity=58.0, accuracy=0.136, agreement=0.60, kl=0.15),
    ]
    summary = results.summary(records)
    (row,) = summary
    assert row["seeds"] == [0, 1]
    assert row["measured"]["perplexity_after"] == {"mean": 57.5, "spread": pytest.approx(math.sqrt(0.5))}
    assert row["measured"]["step_bytes"] == {"mean": None, "spread": None}
    assert results.quality_table(summary) == [
        {
            "method": "delta (sequential:2 both full)",
            "removed %": "12.0",
            "perplexity at first": "58.9",
            "perplexity after": "57.50 ± 0.71",
            "accuracy kept %": "87.5 ± 3.5",
            "agreement % at first": "56.9",
            "agreement % after": "60.0",
            "KL at first": "0.164",
            "KL after": "0.145 ± 0.007",
        }
    ]
    size = results.size_table(summary)[0]
    assert [size[name] for name in ("MB stored", "MB resident", "tokens/s", "train s")] == [
        "22.1",
        "27.3",
        "3,740",
        "87",
    ]
    assert results.archive_table(summary) == []


def test_a_table_fits_into_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [run_record(seed, tokens, kl=0.1 + seed / 8) for seed in (0, 1) for tokens in (100_000, 200_000)]
    for record in records:
        record["checkpoint"] = {"step_bytes": 6_900_000, "state_bytes": 13_700_000, "frozen_bytes": 19_300_000}
        record["logits_off"] = {"fused": 0.0123, "full": 0.0124, "unpacked": 0.0124}
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr("deltafmt.printing._PIPE_WIDTH", 80)
    experiment.main(["--out", str(tmp_path), "--table"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    for cell in ("85.9", "0.164", "0.163", "±0.088", "22.1", "6.9", "13.7", "19.3", "0.0124", "3,740"):
        assert cell in printed


def test_runs_of_other_tokens_and_settings_have_lines_of_their_own() -> None:
    records = [run_record(0, tokens, rate) for tokens in (100_000, 200_000) for rate in (1e-3, 1e-4)]
    names = [name for name, _ in results.grouped(records)]
    assert sorted(names) == [
        f"delta (sequential:2 both full, {tokens} M tokens, rate {rate})"
        for tokens in ("0.1", "0.2")
        for rate in ("0.0001", "0.001")
    ]
    assert texts(results.quality_picture(records)) > set(names)
    many = {f"{name}, {again}": [{"tokens": 1e6, "loss": 4.0}] for name in names for again in range(10)}
    assert texts(results.loss_picture(many)) > set(many)


def test_a_half_written_line_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"a": 1}\n{"a": 2')
    assert results.read(tmp_path / "file") == [{"a": 1}]


def test_a_chart_is_svg_even_of_what_has_no_number() -> None:
    curves = {"a <b>": [(88.0, 40.0, 1.0), (76.0, math.inf, 0.0)], "none": [(1.0, math.nan, 0.0)]}
    ElementTree.fromstring(results.chart(curves, "x", "y", level=39.0))
    ElementTree.fromstring(results.chart({}, "x", "y"))
