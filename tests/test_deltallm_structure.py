"""From a model to a delta model: which modules, which ranks, alignment and the first factors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from deltafmt.deltallm import (
    Plan,
    Structure,
    align,
    block_influence,
    delta_model,
    parameters,
    plan,
    second_moments,
)
from deltafmt.deltallm.architecture import Family, blocks, family, linears
from deltafmt.deltallm.assignment import assign
from deltafmt.deltallm.initialise import low_rank
from deltafmt.errors import UsageError
from deltafmt.torch.fused import DeltaConv1D, DeltaLinear, deltas

LLAMA_LIKE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "pad_token_id": 0,
}


def built(kind: str, seed: int = 0, **settings: Any) -> nn.Module:
    """A random model whose norms and biases are random, too, so that nothing cancels by chance."""
    torch.manual_seed(seed)
    model: nn.Module
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=8, n_head=4, vocab_size=256, n_positions=64, **settings))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**{**LLAMA_LIKE, **settings}))
    elif kind == "phi3":
        model = Phi3ForCausalLM(Phi3Config(**{**LLAMA_LIKE, **settings}))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**{**LLAMA_LIKE, **settings}))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(head_dim=16, **{**LLAMA_LIKE, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "norm" not in name:
                parameter.mul_(4)  # so that every layer matters in the logits
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach()


def distance(model: nn.Module, chosen: Plan) -> float:
    """Mean of |W - anchor|^2 / |W|^2 over the delta modules."""
    errors = []
    for name, anchor in chosen.anchors.items():
        weight, other = (weight_of(model, each) for each in (name, anchor))
        errors.append(float(((weight - other).norm() / weight.norm()) ** 2))
    return sum(errors) / len(errors)


# Architecture


def test_blocks_and_linear_layers_of_both_families() -> None:
    llama, gpt2, phi3 = built("llama"), built("gpt2"), built("phi3")
    assert len(blocks(llama)) == len(blocks(gpt2)) == 8
    assert list(linears(llama, 3, "mlp")) == [f"model.layers.3.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")]
    assert list(linears(gpt2, 0, "both")) == [
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert [name.rpartition(".")[2] for name in linears(phi3, 1, "both")] == [
        "qkv_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
    ]
    with pytest.raises(UsageError, match=r"model\.layers"):
        family(nn.Linear(2, 2))


# Plan


def test_alternating_leaves_the_ends_alone() -> None:
    chosen = plan(built("llama"), Structure(rank=4))
    layers = {int(name.split(".")[2]): int(anchor.split(".")[2]) for name, anchor in chosen.anchors.items()}
    assert layers == {3: 2, 5: 4}
    assert len(chosen.anchors) == 6
    assert all(name.split(".")[3:] == anchor.split(".")[3:] for name, anchor in chosen.anchors.items())
    assert set(chosen.ranks.values()) == {4}


def test_layouts_and_the_number_of_delta_layers() -> None:
    model = built("gpt2")

    def layers(structure: Structure, importance: list[float] | None = None) -> dict[int, int]:
        anchors = plan(model, structure, importance).anchors
        return {int(name.split(".")[2]): int(anchor.split(".")[2]) for name, anchor in anchors.items()}

    assert layers(Structure("sequential:3", keep_first=0, keep_last=0, rank=1)) == {1: 0, 2: 0, 3: 0, 5: 4, 6: 4, 7: 4}
    assert layers(Structure("sequential:3", keep_first=0, keep_last=0, rank=1, delta_layers=2)) == {6: 4, 7: 4}
    assert layers(Structure("7:0,3:1", rank=1)) == {3: 1, 7: 0}
    assert layers(Structure("7:0,3:1", rank=1, delta_layers=1), [1, 1, 1, 0.1, 1, 1, 1, 0.2]) == {3: 1}


@pytest.mark.parametrize("following", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_by_importance_the_least_important_of_all_allowed_choices(following: int, count: int) -> None:
    importance = np.random.default_rng(count).random(8).tolist()
    chosen = plan(
        built("gpt2"),
        Structure(f"sequential:{following}", keep_first=1, keep_last=1, rank=1, delta_layers=count),
        importance,
    )
    layers = {int(name.split(".")[2]): int(anchor.split(".")[2]) for name, anchor in chosen.anchors.items()}

    def allowed(deltas: tuple[int, ...]) -> bool:
        rows = "".join("d" if layer in deltas else "." for layer in range(1, 7))
        return rows[0] == "." and "d" * (following + 1) not in rows

    choices = filter(allowed, itertools.combinations(range(1, 7), count))
    best = min(choices, key=lambda deltas: sum(importance[layer] for layer in deltas))
    assert set(layers) == set(best)
    assert all(anchor == max(layer for layer in range(delta) if layer not in best) for delta, anchor in layers.items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("parts", ["mlp", "both"])
def test_a_budget_is_met_and_hardly_exceeded(kind: str, parts: Any) -> None:
    model = built(kind)
    chosen = plan(model, Structure(remove=0.1, parts=parts))
    whole = parameters(model)
    removed = whole - parameters(delta_model(model, chosen))
    largest = max(sum(layer.weight.shape) for layer in deltas(delta_model(model, chosen)).values())
    assert 0.1 * whole <= removed < 0.1 * whole + largest


def test_parameters_count_what_is_tied_once() -> None:
    apart, tied = (built("llama", tie_word_embeddings=tie) for tie in (False, True))
    assert parameters(apart) - parameters(tied) == 256 * 64


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (Structure(), "exactly one"),
        (Structure(rank=4, remove=0.1), "exactly one"),
        (Structure(remove=0.9), "cannot be removed"),
        (Structure(remove=1.5), "fraction"),
        (Structure(rank=64), "save nothing"),
        (Structure(rank=-1), "^rank is no whole number"),
        (Structure(rank=2.5), "^rank is no whole number"),  # type: ignore[arg-type]
        (Structure(rank="8"), "^rank is no whole number"),  # type: ignore[arg-type]
        (Structure(ranks={"up_proj": 2.5}), r"^ranks\['up_proj'\] is no whole number"),  # type: ignore[dict-item]
        (Structure(ranks={"up_proj": 4, "up_prj": 9}), "^ranks names 'up_prj', and no delta module is called so"),
        (Structure(ranks=[4]), "^ranks is a mapping"),  # type: ignore[arg-type]
        (Structure(remove="0.1"), "^remove is a fraction"),  # type: ignore[arg-type]
        (Structure(rank=4, keep_last=0.5), "^keep_last is no whole number"),  # type: ignore[arg-type]
        (Structure(rank=4, delta_layers=0), "^delta_layers is no whole number"),
        (Structure(rank=4, layout=3), "^layout is a text"),  # type: ignore[arg-type]
        (Structure(rank=4, keep_first=4, keep_last=4), "no delta module"),
        (Structure(rank=4, layout="9:1"), "blocks"),
        (Structure(rank=4, layout="every other"), "every other"),
        (Structure(rank=4, delta_layers=3), "fewer delta layers"),
        (Structure(ranks={"q_proj": 4}), "no delta module"),
    ],
)
def test_what_cannot_be_is_said(structure: Structure, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(built("llama"), structure)


def test_ranks_by_name_leave_the_others_dense() -> None:
    chosen = plan(built("llama"), Structure(ranks={"up_proj": 3, "down_proj": 5}))
    assert {name.split(".")[-1]: rank for name, rank in chosen.ranks.items()} == {"up_proj": 3, "down_proj": 5}


def test_modules_of_one_name_have_ranks_of_their_own() -> None:
    """Both the attention and the MLP of a GPT-2 end in a `c_proj`. The longest name holds, and one may be whole."""
    model = built("gpt2")
    ranks = {"c_proj": 3, "mlp.c_proj": 5, "c_fc": 2, "transformer.h.3.mlp.c_fc": 7}
    chosen = plan(model, Structure(parts="both", ranks=ranks)).ranks
    block = "transformer.h.{}"
    assert chosen == {
        f"{block.format(layer)}.{name}": rank
        for layer in (3, 5)
        for name, rank in (("attn.c_proj", 3), ("mlp.c_fc", 7 if layer == 3 else 2), ("mlp.c_proj", 5))
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", None])
def test_an_importance_that_is_no_number_is_named(value: Any) -> None:
    with pytest.raises(UsageError, match=r"^the importance of block 4 is no finite number"):
        plan(built("gpt2"), Structure(rank=2), [0.5, 0.5, 0.5, 0.5, value, 0.5, 0.5, 0.5])
    assert plan(built("gpt2"), Structure(rank=2), np.full(8, 0.5)).ranks  # type: ignore[arg-type]


# Calibration


def test_second_moments_are_those_of_the_inputs(ids: torch.Tensor) -> None:
    model = built("llama")
    states: list[torch.Tensor] = []
    norm = model.get_submodule("model.layers.3.post_attention_layernorm")
    handle = norm.register_forward_hook(lambda _module, _inputs, output: states.append(output.detach()))
    logits(model, ids)
    handle.remove()
    expected = np.einsum("ti,tj->ij", *[states[0].reshape(-1, 64).numpy()] * 2) / ids.numel()
    name = "model.layers.3.mlp.up_proj"
    found = second_moments(model, [ids[:1], ids[1:]], [name])
    np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no token"):
        second_moments(model, [], [name])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_block_that_does_nothing_has_no_influence(kind: str, ids: torch.Tensor) -> None:
    model = built(kind)
    with torch.no_grad():
        for name, module in linears(model, 4, "both").items():
            if name.endswith(("o_proj", "down_proj", "c_proj")):
                for parameter in module.parameters():
                    parameter.zero_()
    influence = block_influence(model, [ids])
    assert len(influence) == 8
    assert abs(influence[4]) < 1e-6
    assert min(influence[:4] + influence[5:]) > 1e-3


# Alignment


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "qwen2", "qwen3"])
@pytest.mark.parametrize("which", ["channels", "heads", "scales", "all"])
def test_alignment_keeps_the_function_and_the_anchors(kind: str, which: str, ids: torch.Tensor) -> None:
    model = built(kind)
    chosen = plan(model, Structure("sequential:2", parts="both", remove=0.1))
    expected = logits(model, ids)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    apart = distance(model, chosen)
    align(
        model, chosen, **({} if which == "all" else {part: part == which for part in ("channels", "heads", "scales")})
    )
    assert (logits(model, ids) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert distance(model, chosen) < apart
    deltas_at = {int(name.split(".")[2]) for name in chosen.anchors}
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert {int(name.split(".")[2]) for name in changed} <= deltas_at


def test_alignment_finds_a_layer_that_was_the_anchor(ids: torch.Tensor) -> None:
    """Channels, groups, heads and scales of a copy are mixed up: after alignment it is the anchor again."""
    model = built("llama")
    with torch.no_grad():
        for name in linears(model, 2, "both"):
            weight_of(model, name.replace(".2.", ".3.")).copy_(weight_of(model, name))
        mix = torch.Generator().manual_seed(1)
        channels = torch.randperm(128, generator=mix)
        signs = torch.randint(2, (128, 1), generator=mix) * 2.0 - 1
        mlp: Any = model.get_submodule("model.layers.3.mlp")
        mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[channels])
        mlp.up_proj.weight.copy_(mlp.up_proj.weight[channels] * 2 * signs)
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, channels] / (2 * signs).t())
        heads = torch.tensor([3, 2, 0, 1])
        attention: Any = model.get_submodule("model.layers.3.self_attn")
        rows = torch.arange(64).view(4, 16)[heads].flatten()
        groups = torch.arange(32).view(2, 16).flip(0).flatten()
        attention.q_proj.weight.copy_(attention.q_proj.weight[rows])
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, rows])
        attention.k_proj.weight.copy_(attention.k_proj.weight[groups])
        attention.v_proj.weight.copy_(attention.v_proj.weight[groups])
        for norm, linear in (("input_layernorm", "qkv"), ("post_attention_layernorm", ("gate", "up"))):
            columns = torch.where(torch.rand(64, generator=mix) < 0.5, -0.5, 2.0)
            block: Any = model.get_submodule("model.layers.3")
            getattr(block, norm).weight.div_(columns)
            for leaf in linear:
                (getattr(attention, f"{leaf}_proj", None) or getattr(mlp, f"{leaf}_proj")).weight.mul_(columns)
    chosen = plan(model, Structure("3:2", parts="both", rank=2))
    assert distance(model, chosen) > 0.5
    expected = logits(model, ids)
    align(model, chosen)
    assert (logits(model, ids) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert distance(model, chosen) < 1e-6


def test_alignment_in_bfloat16_rounds_nothing(ids: torch.Tensor) -> None:
    model = built("llama").bfloat16()
    chosen = plan(model, Structure(parts="both", rank=4))
    before = {name: weight_of(model, name).clone() for name in chosen.anchors}
    align(model, chosen, channels=False, heads=False)
    scaled = 0
    for name, weight in before.items():
        now = weight_of(model, name)
        ratio = (now / weight)[weight != 0].double().abs().log2()
        assert torch.equal(ratio, ratio.round())
        scaled += int(ratio.count_nonzero())
    assert scaled


def test_a_row_in_the_table_is_all_that_another_architecture_takes(
    monkeypatch: pytest.MonkeyPatch, ids: torch.Tensor
) -> None:
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 256}
    model = OPTForCausalLM(OPTConfig(**settings, word_embed_proj_dim=64, init_std=0.1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    with pytest.raises(UsageError, match="no transformer blocks"):
        plan(model, Structure(rank=4))
    row = Family(
        name="OPT-like",
        model_types=("opt",),
        blocks="model.decoder.layers",
        qkv=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),),
        output="self_attn.out_proj",
        ins=(("fc1",),),
        down="fc2",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        gated=False,
    )
    monkeypatch.setattr("deltafmt.deltallm.architecture.FAMILIES", (row,))
    chosen = plan(model, Structure(parts="both", remove=0.1))
    expected, apart = logits(model, ids), distance(model, chosen)
    align(model, chosen)
    assert (logits(model, ids) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert distance(model, chosen) < apart
    assert set(deltas(delta_model(model, chosen))) == set(chosen.anchors)
    assert len(block_influence(model, [ids])) == 8


def test_unknown_symmetries_are_refused() -> None:
    model: Any = built("llama")
    chosen = plan(model, Structure(rank=4))
    model.config.model_type = "another"
    with pytest.raises(UsageError, match="symmetries"):
        align(model, chosen)


@pytest.mark.parametrize("size", [0, 1, 2, 4, 6])
@pytest.mark.parametrize("accuracy", [0.5, 1e-6])
def test_assignment_is_as_good_as_any(size: int, accuracy: float) -> None:
    for seed in range(10):
        gain = np.random.default_rng(seed).standard_normal((size, size))
        if seed % 2:
            gain = np.round(gain)  # ties
        columns = assign(gain, accuracy)
        orders = itertools.permutations(range(size))
        best = max(sum(gain[row, column] for row, column in enumerate(order)) for order in orders)
        assert sorted(columns) == list(range(size))
        lacking = best - gain[np.arange(size), columns].sum()
        assert lacking <= size * accuracy * (gain.std() if size else 0) + 1e-9


def test_assignment_of_what_is_alike_or_no_matrix() -> None:
    assert assign(np.ones((3, 3))).tolist() == [0, 1, 2]
    for wrong in (np.zeros((2, 3)), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="square"):
            assign(wrong)


# Initialisation


def test_low_rank_is_the_truncated_decomposition() -> None:
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    u, s, v = np.linalg.svd(matrix.numpy().astype(np.float64), full_matrices=False)
    for turned, expected in ((matrix, (u[:, :5] * s[:5]) @ v[:5]), (matrix.t(), ((u[:, :5] * s[:5]) @ v[:5]).T)):
        a, b = low_rank(turned, 5)
        np.testing.assert_allclose((b.t() @ a).numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(a.norm(dim=1).numpy() ** 2, s[:5], rtol=1e-5)
        np.testing.assert_allclose(b.norm(dim=1).numpy() ** 2, s[:5], rtol=1e-5)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_weighted_low_rank_is_the_best_for_these_inputs(shape: tuple[int, int]) -> None:
    """Against the closed form with an explicit root and its inverse, in numpy."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal(shape)
    inputs = random.standard_normal((200, shape[1])) * np.geomspace(1, 30, shape[1])
    moment = inputs.T @ inputs / 200
    root = np.linalg.cholesky(moment)
    u, s, v = np.linalg.svd(matrix @ root, full_matrices=False)
    expected = (u[:, :4] * s[:4]) @ v[:4] @ np.linalg.inv(root)
    a, b = low_rank(torch.from_numpy(matrix).float(), 4, torch.from_numpy(moment).float())
    np.testing.assert_allclose((b.t() @ a).numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_a_delta_model_shares_all_but_its_factors(kind: str, ids: torch.Tensor) -> None:
    model = built(kind)
    chosen = plan(model, Structure(parts="both", rank=3))
    made = delta_model(model, chosen)
    assert type(made) is type(model)
    layers = deltas(made)
    assert set(layers) == set(chosen.anchors)
    assert all(isinstance(layer, DeltaConv1D if kind == "gpt2" else DeltaLinear) for layer in layers.values())
    shared = dict(model.named_parameters())
    for name, parameter in made.named_parameters():
        if name.endswith(("lora_a", "lora_b")):
            assert parameter.requires_grad
            assert parameter.dtype == torch.float32
            assert parameter.shape[0] == 3
        else:
            assert parameter is shared[name]
            assert not parameter.requires_grad
    for name, anchor in chosen.anchors.items():
        assert layers[name].holder is made.get_submodule(anchor)
    # What it computes is what the dense model with these weights does.
    dense = built(kind)
    for name, layer in layers.items():
        weight_of(dense, name).copy_(layer.merged_weight().detach())
    torch.testing.assert_close(logits(made, ids), logits(dense, ids), rtol=1e-4, atol=1e-4)
    assert relative(logits(made, ids), logits(model, ids)) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_at_full_rank_nothing_is_lost(kind: str, ids: torch.Tensor) -> None:
    model = built(kind)
    anchors = plan(model, Structure(parts="both", rank=1)).anchors
    ranks = {name: min(weight_of(model, name).shape) for name in anchors}
    align(model, Plan(anchors, ranks))
    moments = second_moments(model, [ids], anchors)
    for weighting in (None, moments):
        made = delta_model(model, Plan(anchors, ranks), moments=weighting)
        torch.testing.assert_close(logits(made, ids), logits(model, ids), rtol=1e-3, atol=1e-3)


def test_a_moment_that_is_missing_is_named(ids: torch.Tensor) -> None:
    model = built("llama")
    chosen = plan(model, Structure(rank=3))
    moments = second_moments(model, [ids], chosen.anchors)
    lost = list(chosen.anchors)[1]
    del moments[lost]
    with pytest.raises(UsageError, match=f"no moment of '{lost}'"):
        delta_model(model, chosen, moments=moments)


def test_only_the_factors_get_gradients_and_descend(ids: torch.Tensor) -> None:
    made: Any = delta_model(built("llama"), plan(built("llama"), Structure(rank=3)))
    made(input_ids=ids, labels=ids).loss.backward()
    with_gradient = {name for name, parameter in made.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in made.named_parameters() if name.endswith(("lora_a", "lora_b"))}
    for layer in deltas(made).values():
        norms = layer.factors.lora_a.detach().norm(dim=1) * layer.factors.lora_b.detach().norm(dim=1)
        assert torch.equal(norms, norms.sort(descending=True).values)


def test_weighting_and_alignment_help_a_real_model(mgm_dir: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(mgm_dir).eval()
    tokens = torch.randint(8, 200, (2, 32), generator=torch.Generator().manual_seed(0))
    chosen = plan(model, Structure(rank=32))
    expected = logits(model, tokens)

    def error(weighted: bool) -> float:
        moments = second_moments(model, [tokens], chosen.anchors) if weighted else None
        return relative(logits(delta_model(model, chosen, moments=moments), tokens), expected)

    plain, weighted = error(False), error(True)
    apart = distance(model, chosen)
    align(model, chosen)
    assert relative(logits(model, tokens), expected) < 1e-5
    assert weighted < plain
    assert distance(model, chosen) < apart
    assert error(False) < plain
