"""Sharing between layers: layouts, the names of many architectures, and the judgement on real and synthetic layers."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from deltafmt.methods.sharing import (
    Explicit,
    Likeness,
    Parts,
    Sequential,
    ShareMap,
    likeness,
    parse_layout,
    sample_pairs,
    share_map,
    sharing_makes_sense,
)

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def llama(layers: int) -> Tensors:
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (100, 8)), "model.norm.weight": ("BF16", (8,))}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{block}.self_attn.{name}.weight"] = ("BF16", (8, 8))
            tensors[f"{block}.self_attn.{name}.bias"] = ("BF16", (8,))
        for name, shape in (("gate_proj", (16, 8)), ("up_proj", (16, 8)), ("down_proj", (8, 16))):
            tensors[f"{block}.mlp.{name}.weight"] = ("BF16", shape)
        tensors[f"{block}.input_layernorm.weight"] = ("BF16", (8,))
    return tensors


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("sequential:3", Sequential(3)),
        (" alternating ", Sequential(1)),
        ("5:4,6:4,9:8", Explicit({5: 4, 6: 4, 9: 8})),
        (" 5 : 4 , 2:1", Explicit({5: 4, 2: 1})),
    ],
)
def test_layouts(text: str, layout: object) -> None:
    assert parse_layout(text) == layout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "neither"),
        ("sequential", "neither"),
        ("sequential:-1", "neither"),
        ("sequential:0", "at least 1"),
        ("Alternating", "neither"),
        ("5:4,", "neither"),
        ("5-4", "neither"),
        ("5:4,5:3", "layer 5 twice"),
        ("5:4,6:5", "layers 5 are both"),
        ("5:5", "layers 5 are both"),
    ],
)
def test_bad_layouts_say_why(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layout(text)


def test_sequential_layers() -> None:
    shared = share_map(llama(12), Sequential(3))
    # 2 .. 9 take part: 2 and 6 are anchors
    assert shared.layers == {3: 2, 4: 2, 5: 2, 7: 6, 8: 6, 9: 6}
    assert shared.problems == ()
    assert shared.anchors["model.layers.4.mlp.up_proj.weight"] == "model.layers.2.mlp.up_proj.weight"
    assert len(shared.anchors) == 6 * 3


def test_alternating_layers_and_the_kept_ends() -> None:
    assert share_map(llama(9), Sequential(1)).layers == {3: 2, 5: 4}
    assert share_map(llama(9), Sequential(1), keep_first=0, keep_last=1).layers == {1: 0, 3: 2, 5: 4, 7: 6}


def test_an_explicit_map_overrides_the_kept_ends() -> None:
    shared = share_map(llama(4), Explicit({0: 1, 3: 1}))
    assert shared.layers == {0: 1, 3: 1}
    assert shared.anchors["model.layers.0.mlp.down_proj.weight"] == "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(("parts", "count"), [("mlp", 3), ("attention", 4), ("both", 7)])
def test_parts(parts: Parts, count: int) -> None:
    shared = share_map(llama(6), Sequential(1), parts=parts)
    assert len(shared.anchors) == count
    assert not any("norm" in name or "bias" in name or "embed" in name for name in shared.anchors)


@pytest.mark.parametrize(
    ("suffix", "part"),
    [
        ("attention.self.query.weight", "attention"),  # BERT
        ("attention.output.dense.weight", "attention"),
        ("intermediate.dense.weight", "mlp"),
        ("output.dense.weight", "mlp"),
        ("attn.c_attn.weight", "attention"),  # GPT-2
        ("attn.c_proj.weight", "attention"),
        ("mlp.c_fc.weight", "mlp"),
        ("mlp.c_proj.weight", "mlp"),
        ("self_attn.qkv_proj.weight", "attention"),  # Phi-3
        ("mlp.gate_up_proj.weight", "mlp"),
        ("self_attn.out_proj.weight", "attention"),  # OPT
        ("fc1.weight", "mlp"),
        ("attention.wq.weight", "attention"),  # Llama as published by Meta
        ("feed_forward.w2.weight", "mlp"),
        ("attention.query_key_value.weight", "attention"),  # GPT-NeoX
        ("mlp.dense_h_to_4h.weight", "mlp"),
        ("layer.0.SelfAttention.q.weight", "attention"),  # T5
        ("layer.1.DenseReluDense.wo.weight", "mlp"),
        ("attention.q_lin.weight", "attention"),  # DistilBERT
        ("ffn.lin1.weight", "mlp"),
        ("block_sparse_moe.experts.3.w1.weight", "mlp"),  # Mixtral
        ("mlp.shared_expert.up_proj.weight", "mlp"),  # Qwen MoE
        ("feed_forward.key.weight", "mlp"),  # RWKV
        ("attention.key.weight", "attention"),
        ("mlp.router.weight", None),
        ("mlp.shared_expert_gate.weight", None),
        ("self_attn.q_norm.weight", None),
        ("attention.output.LayerNorm.weight", None),
        ("something.else.weight", None),
    ],
)
def test_what_belongs_to_attention_and_what_to_mlp(suffix: str, part: str | None) -> None:
    tensors: Tensors = {f"h.{layer}.{suffix}": ("F16", (4, 4)) for layer in range(2)}
    for parts in ("attention", "mlp"):
        shared = share_map(tensors, Explicit({1: 0}), parts=parts)
        assert bool(shared.anchors) == (part == parts)


def test_a_gate_is_a_router_only_beside_experts() -> None:
    gates: Tensors = {f"layers.{layer}.mlp.gate.weight": ("F16", (4, 4)) for layer in range(2)}
    assert len(share_map(gates, Explicit({1: 0})).anchors) == 1
    experts: Tensors = {f"layers.{layer}.mlp.experts.0.up_proj.weight": ("F16", (4, 4)) for layer in range(2)}
    assert list(share_map(gates | experts, Explicit({1: 0})).anchors) == ["layers.1.mlp.experts.0.up_proj.weight"]


@pytest.mark.parametrize(
    "prefix", ["h", "transformer.h", "0.auto_model.encoder.layer", "model.decoder.layers", "blocks"]
)
def test_blocks_are_found_behind_any_prefix(prefix: str) -> None:
    tensors: Tensors = {f"{prefix}.{layer}.mlp.fc1.weight": ("F32", (4, 4)) for layer in range(3)}
    assert share_map(tensors, Explicit({2: 0})).anchors == {f"{prefix}.2.mlp.fc1.weight": f"{prefix}.0.mlp.fc1.weight"}


def test_layers_are_counted_before_experts() -> None:
    tensors: Tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}.w1.weight": ("F32", (4, 4))
        for layer in range(3)
        for expert in range(2)
    }
    assert share_map(tensors, Explicit({2: 1})).anchors == {
        f"model.layers.2.mlp.experts.{expert}.w1.weight": f"model.layers.1.mlp.experts.{expert}.w1.weight"
        for expert in range(2)
    }


def test_experts_of_a_single_layer_are_not_taken_for_layers() -> None:
    tensors = llama(6)
    for expert in range(4):
        tensors[f"model.layers.3.mlp.experts.{expert}.up_proj.weight"] = ("BF16", (16, 8))
    shared = share_map(tensors, Explicit({3: 2}))
    assert len(shared.anchors) == 3
    assert not any("experts" in name for name in shared.anchors)


def test_two_stacks_share_each_within_itself() -> None:
    tensors: Tensors = {
        f"{stack}.block.{layer}.mlp.wi.weight": ("F32", (4, 4))
        for stack in ("encoder", "decoder")
        for layer in range(2)
    }
    shared = share_map(tensors, Sequential(1), keep_first=0, keep_last=0)
    assert shared.anchors == {
        f"{stack}.block.1.mlp.wi.weight": f"{stack}.block.0.mlp.wi.weight" for stack in ("encoder", "decoder")
    }


def test_only_equal_shape_dtype_and_two_dimensions_share() -> None:
    tensors = llama(6)
    tensors["model.layers.3.mlp.up_proj.weight"] = ("BF16", (24, 8))
    tensors["model.layers.3.mlp.down_proj.weight"] = ("F32", (8, 16))
    for layer in range(6):
        tensors[f"model.layers.{layer}.mlp.conv.weight"] = ("BF16", (8, 8, 3))
    assert list(share_map(tensors, Sequential(1)).anchors) == ["model.layers.3.mlp.gate_proj.weight"]


def test_problems_name_what_exists() -> None:
    unknown = share_map(llama(6), Explicit({9: 8, 3: 2}))
    assert unknown.anchors == {}
    assert unknown.problems == ("the layout names layers 8, 9; the model has layers 0-5",)
    short = share_map(llama(4), Sequential(1))
    assert "it has 4 blocks, of which the first 2 and the last 2 stay untouched" in short.problems[0]
    assert "no transformer blocks" in share_map({"weight": ("F32", (3, 3))}, Sequential(1)).problems[0]
    norms: Tensors = {f"layers.{layer}.norm.weight": ("F32", (4, 4)) for layer in range(4)}
    assert "no mlp weight" in share_map(norms, Explicit({1: 0})).problems[0]


def test_meaningless_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="parts"):
        share_map(llama(6), Sequential(1), parts="norms")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep_first"):
        share_map(llama(6), Sequential(1), keep_first=-1)


def gaussian(out: int, in_: int, seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((out, in_), dtype=np.float32)


def test_likeness_against_a_full_svd() -> None:
    anchor = gaussian(60, 80, 1)
    weight = (0.5 * anchor + gaussian(60, 80, 2)).astype(np.float32)
    found = likeness(weight, anchor, 10)
    w, x = weight.astype(np.float64), anchor.astype(np.float64)
    norm = np.linalg.norm(w)
    assert found.cosine == pytest.approx(float((w * x).sum()) / (norm * np.linalg.norm(x)), abs=1e-6)
    rest = np.linalg.svd(w - x, compute_uv=False)[10:]
    plain = np.linalg.svd(w, compute_uv=False)[10:]
    assert found.delta_error == pytest.approx(np.sqrt((rest**2).sum()) / norm, rel=1e-4)
    assert found.plain_error == pytest.approx(np.sqrt((plain**2).sum()) / norm, rel=1e-4)


def test_likeness_of_equal_and_of_zero_weights() -> None:
    weight, zero = gaussian(20, 30, 1), np.zeros((20, 30), np.float32)
    same = likeness(weight, weight, 4)
    assert same.cosine == pytest.approx(1)
    assert same.delta_error == 0
    assert likeness(weight, zero, 4).delta_error == pytest.approx(likeness(weight, zero, 4).plain_error)
    assert likeness(zero, zero, 4) == Likeness(4, 0.0, 0.0, 0.0)
    assert likeness(zero, weight, 4).delta_error == float("inf")
    with pytest.raises(ValueError, match="shape"):
        likeness(weight, gaussian(30, 20, 1), 4)


def test_pairs_are_sampled_evenly() -> None:
    shared = ShareMap({f"d{n}": f"a{n}" for n in range(30)}, {})
    sample = sample_pairs(shared, 3)
    assert [name for name, _ in sample] == ["d5", "d15", "d25"]
    assert len(sample_pairs(shared, 100)) == 30
    assert sample_pairs(ShareMap({}, {}), 3) == []


def test_unrelated_real_layers_are_refused_with_the_numbers(minilm_dir: Path) -> None:
    weights = load_file(minilm_dir / "model.safetensors")
    tensors: Tensors = {name: (str(array.dtype), array.shape) for name, array in weights.items()}
    shared = share_map(tensors, parse_layout("alternating"), keep_first=0, keep_last=0, parts="both")
    assert shared.layers == {1: 0, 3: 2, 5: 4}
    assert len(shared.anchors) == 3 * 6
    sample = [
        likeness(weights[name].astype(np.float32), weights[anchor].astype(np.float32), 38)
        for name, anchor in sample_pairs(shared)
    ]
    verdict = sharing_makes_sense(sample)
    assert not verdict.sensible
    assert "not alike: cosine 0.0" in verdict.reasons[0]
    assert "does not help: at rank 38, relative error 1." in verdict.reasons[1]


def test_layers_made_from_an_anchor_are_accepted(minilm_dir: Path) -> None:
    weights = load_file(minilm_dir / "model.safetensors")
    anchor = weights["encoder.layer.2.intermediate.dense.weight"].astype(np.float32)
    out, in_ = anchor.shape
    delta = gaussian(out, 16, 1) @ gaussian(16, in_, 2)
    delta *= 0.5 * np.linalg.norm(anchor) / np.linalg.norm(delta)
    weight = (anchor + delta).astype(ml_dtypes.bfloat16).astype(np.float32)
    sample = [likeness(weight, anchor, 16)]
    assert sample[0].delta_error < 0.004  # the rounding of bf16
    assert sharing_makes_sense(sample).sensible


@pytest.mark.parametrize(
    ("delta_error", "plain_error", "sensible"),
    [
        (0.01, 0.7, True),
        (0.4, 0.7, True),
        (0.65, 0.7, False),
        (0.6, 0.9, False),
        (0.001, 0.0005, False),
        (1.1, 0.7, False),
    ],
)
def test_the_verdict(delta_error: float, plain_error: float, sensible: bool) -> None:
    verdict = sharing_makes_sense([Likeness(8, 0.6, delta_error, plain_error)] * 3)
    assert verdict.sensible == sensible
    assert f"{delta_error:.3g}" in verdict.reasons[0]
    assert f"{plain_error:.3g}" in verdict.reasons[0]


def test_one_odd_pair_does_not_decide() -> None:
    good, odd = Likeness(8, 0.9, 0.01, 0.7), Likeness(8, 0.0, 1.1, 0.7)
    assert sharing_makes_sense([good, good, odd]).sensible
    assert not sharing_makes_sense([good, odd, odd]).sensible
    with pytest.raises(ValueError, match="empty"):
        sharing_makes_sense([])
