"""`deltafmt.torch.load_model` on shared layers and on a real fine-tune; what it cannot fuse, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import deltafmt
import synthetic
from deltafmt.errors import UsageError, WrongBaseError
from deltafmt.operators import Lowrank, Ref, Sum
from deltafmt.torch import load_model, merge, release
from deltafmt.torch.evaluate import resident_bytes
from deltafmt.torch.fused import deltas

transformers.utils.logging.disable_progress_bar()

IDS = torch.arange(100, 140)[None]


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS)[0]
    return found


@pytest.fixture(scope="module")
def layered(minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(archive, the unpacked model): 8 blocks, of which 3 are another one plus something of rank 16."""
    root = tmp_path_factory.mktemp("layered")
    synthetic.delta_llm(minilm_dir, root / "src", blocks=8, vocabulary=512)
    deltafmt.pack(root / "src", root / "packed", method="lowrank", rank=16, share="sequential:3")
    deltafmt.unpack(root / "packed", root / "plain")
    return root / "packed", root / "plain"


def sums(packed: Path, rank: int = 16) -> dict[str, torch.Tensor]:
    """The weights that are stored as a sum, in float32, as no dtype of the model rounds them: anchor + scale b^T a, of
    the first `rank` components."""
    found = {}
    with deltafmt.open(packed, framework="pt") as archive:
        manifest = archive._archive.manifest

        def factor(node: Any) -> torch.Tensor:
            array = manifest.arrays[node.array]
            bits = np.empty(math.prod(array.shape), array.dtype.bits)
            archive._archive.array_reader(node.array)(0, bits.size, bits)
            values = bits.view(array.dtype.values).reshape(array.shape).astype(np.float64)
            return torch.from_numpy(values[:rank])

        for name, tensor in manifest.tensors.items():
            if isinstance(tensor.recipe, Sum):
                anchor, low = tensor.recipe.terms
                assert isinstance(anchor, Ref) and isinstance(low, Lowrank)
                added = low.scale * factor(low.b).T @ factor(low.a)
                found[name] = (archive.get_tensor(anchor.tensor).double() + added).float()
    return found


def test_shared_layers_take_no_more_than_what_is_stored(layered: tuple[Path, Path]) -> None:
    packed, plain_dir = layered
    with deltafmt.open(packed) as archive:
        manifest = archive._archive.manifest
        arrays = sum(
            array.dtype.nbytes(array.shape)
            for name, array in manifest.arrays.items()
            if name not in manifest.checkpoint.arrays
        )
    model, plain = load_model(packed, "fused"), load_model(packed)
    assert len(deltas(model)) >= 14
    assert resident_bytes(model) <= 1.02 * arrays
    assert resident_bytes(model) < 0.8 * resident_bytes(plain)
    owners = {layer.holder for layer in deltas(model).values()}
    assert all(isinstance(owner, nn.Linear) for owner in owners)  # no pool: the anchors are layers of the model
    assert len({name.rpartition(".")[2] for name in model.state_dict()}) == 3  # weights and factors
    dense = transformers.LlamaForCausalLM.from_pretrained(plain_dir).float()
    expected = run(dense)
    fused = run(model.float())
    dense.load_state_dict(sums(packed), strict=False)
    torch.testing.assert_close(fused, run(dense), rtol=0, atol=1e-3)  # float32 and logits up to 10: some 1e-5
    dense.load_state_dict(sums(packed, 15), strict=False)
    assert (fused - run(dense)).abs().max() > 1e-2  # so that the last component counts
    assert torch.equal(run(load_model(packed, dtype=torch.float32)), expected)
    assert torch.equal(run(load_model(packed, "lazy", dtype=torch.float32)), expected)


def test_weights_without_a_base_have_the_dtype_of_the_model(tmp_path: Path) -> None:
    """Their factors are stored as float32: a merged bf16 layer would take no bf16 input if it were float32."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=160, hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    deltafmt.pack(tmp_path / "model", tmp_path / "packed", method="lowrank", rank=4)
    for dtype in (torch.bfloat16, torch.float32):
        model = load_model(tmp_path / "packed", "fused", dtype=dtype)
        assert {layer.base for layer in deltas(model).values()} == {None}
        assert {layer.weight.dtype for layer in deltas(model).values()} == {dtype}
        before = run(model)
        assert before.dtype == dtype
        merge(model)
        assert {each.dtype for each in model.parameters()} == {dtype}
        rounding = 8 * torch.finfo(dtype).eps * float(before.abs().max())
        torch.testing.assert_close(run(model), before, rtol=0, atol=rounding)


def test_a_lazy_model_holds_a_layer_at_a_time(layered: tuple[Path, Path]) -> None:
    packed, _ = layered
    model = load_model(packed, "lazy")
    before, most = resident_bytes(model), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: most.append(resident_bytes(model)), prepend=True)
    run(model)
    assert resident_bytes(model) == before < 100_000
    largest = max(each.nbytes for each in load_model(packed).parameters())
    assert largest <= max(most) <= before + largest
    kept = load_model(packed, "lazy", keep=True)
    run(kept)
    assert all(each.device.type == "cpu" for each in kept.parameters())
    release(kept)
    assert resident_bytes(kept) == before
    assert torch.equal(run(kept), run(model))
    with pytest.raises(UsageError, match="mode='lazy'"):
        release(load_model(packed))


def test_a_real_fine_tune(minilm_dir: Path, finetune_dir: Path, tmp_path: Path) -> None:
    deltafmt.pack(finetune_dir, tmp_path / "packed", base=minilm_dir, rank=16, include=["*attention*"])
    deltafmt.unpack(tmp_path / "packed", tmp_path / "plain", base=minilm_dir)
    expected = run(transformers.AutoModel.from_pretrained(tmp_path / "plain"))
    assert torch.equal(run(load_model(tmp_path / "packed", base=minilm_dir)), expected)
    with pytest.warns(UserWarning, match=r"not as factors.*dense: embeddings\.word_embeddings, ") as said:
        model = load_model(tmp_path / "packed", "fused", base=minilm_dir)
    assert "attention" not in str(said[0].message) and "LayerNorm" not in str(said[0].message)
    assert len(deltas(model)) == 24
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
    for base in (None, finetune_dir):
        with pytest.raises(WrongBaseError), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not as factors")
            load_model(tmp_path / "packed", "fused", base=base)


class OddLinear(nn.Linear):
    """Does something else with its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_what_cannot_be_fused_is_dense_and_named(layered: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    real = modeling_llama.LlamaMLP.__init__

    def build(self: Any, config: Any) -> None:
        real(self, config)
        self.up_proj = OddLinear(config.hidden_size, config.intermediate_size, bias=False)

    packed, _ = layered
    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", build)
    with pytest.warns(UserWarning, match=r"layers\.\d\.mlp\.up_proj \(OddLinear\)"):
        model = load_model(packed, "fused", dtype=torch.float32)
    dense = load_model(packed, dtype=torch.float32)
    dense.load_state_dict({name: each for name, each in sums(packed).items() if "up_proj" not in name}, strict=False)
    torch.testing.assert_close(run(model), run(dense), rtol=0, atol=1e-3)
    assert type(model.model.layers[3].mlp.up_proj) is OddLinear


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A tiny BERT encoder."""
    config = transformers.BertConfig(
        vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_names_of_another_time_are_loaded_dense(tiny: Path, tmp_path: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in weights.items()}
    save_file(old, tiny / "model.safetensors", metadata={"format": "pt"})
    deltafmt.pack(tiny, tmp_path / "packed")
    expected = run(transformers.BertModel.from_pretrained(tiny))
    for mode in ("fused", "lazy"):
        with pytest.warns(UserWarning, match="LayerNorm"):
            model = load_model(tmp_path / "packed", mode)
        assert torch.equal(run(model), expected)


@pytest.mark.parametrize("mode", ["full", "fused", "lazy"])
def test_missing_weights_are_not_made_up(tiny: Path, tmp_path: Path, mode: Any) -> None:
    weights = load_file(tiny / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    deltafmt.pack(tiny, tmp_path / "packed")
    with pytest.raises(UsageError, match=r"lacks weights of encoder\.layer\.0\.output\.dense\.weight"):
        if mode == "full":
            load_model(tmp_path / "packed", mode)
        else:
            with pytest.warns(UserWarning, match="output"):
                load_model(tmp_path / "packed", mode)


def test_what_makes_no_sense_is_refused(tiny: Path, tmp_path: Path) -> None:
    deltafmt.pack(tiny, tmp_path / "packed")
    for options in (
        {"mode": "fast"},
        {"rank": -1},
        {"mode": "lazy", "rank": 2},
        {"mode": "lazy", "max_bytes": 2},
        {"bases": deltafmt.torch.BaseCache()},
        {"base": deltafmt.torch.BaseCache()},
        {"mode": "fused", "base": deltafmt.torch.BaseCache()},
        {"keep": True},
        {"dtype": torch.int32},
        {"device": "abacus"},
        {"rank": 2.5},
        {"rank": True},
        {"max_bytes": "1MB"},
        {"max_bytes": 1e9},
        {"jobs": "2"},
        {"mode": "fused", "bases": {}},
    ):
        with pytest.raises(UsageError):
            load_model(tmp_path / "packed", **options)


def test_a_configuration_of_no_model(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    for number, broken in enumerate(({"architectures": ["NoSuchModel"]}, {"model_type": "nothing"})):
        (tiny / "config.json").write_text(json.dumps(config | broken))
        deltafmt.pack(tiny, tmp_path / str(number))
        with pytest.raises(UsageError):
            load_model(tmp_path / str(number))


BROKEN = {
    "layers": {"num_hidden_layers": "one"},
    "activation": {"hidden_act": "nosuch"},
    "dtype": {"dtype": "foo"},
    "int": {"dtype": "int32"},
    "number": {"dtype": 5},
    "width": {"intermediate_size": 47},
    "negative": {"intermediate_size": -3},
    "heads": {"num_attention_heads": 0},
    "text": {"architectures": "BertModel"},
    "numbers": {"architectures": [5]},
    "function": {"architectures": ["AutoModel"]},
    "other": {"architectures": ["LlamaModel"]},
    "type": {"model_type": ["bert"]},
    "map": {"auto_map": 5},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_configuration_is_named(broken: str, tiny: Path, tmp_path: Path) -> None:
    file = tiny / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | BROKEN[broken]))
    deltafmt.pack(tiny, tmp_path / "packed")
    for mode in ("full", "fused", "lazy"):
        with pytest.raises(UsageError, match=r"packed.*config\.json") as caught:
            load_model(tmp_path / "packed", mode)
        assert caught.value.hint and len(str(caught.value)) < 1000
        assert ("no list of names" in caught.value.what) == (broken in ("text", "numbers"))


def test_a_broken_configuration_of_generation_is_named(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"max_new_tokens": "many"}')
    deltafmt.pack(tmp_path / "model", tmp_path / "packed.safetensors", single_file=True)
    with pytest.raises(UsageError, match=r"packed\.safetensors: generation_config\.json: transformers cannot read it"):
        load_model(tmp_path / "packed.safetensors")


def test_a_lazy_model_finds_early_that_its_base_is_not_the_one(tiny: Path, tmp_path: Path) -> None:
    """Names, dtypes and shapes are those of the base in `other`; its smallest tensor is not."""
    weights = load_file(tiny / "model.safetensors")
    for name, change in (("tuned", 1e-6), ("other", 1e-3)):
        shutil.copytree(tiny, tmp_path / name)
        moved = {name: tensor + change for name, tensor in weights.items()}
        save_file(moved, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    deltafmt.pack(tmp_path / "tuned", tmp_path / "packed", base=tiny)
    for base, told in ((None, "needs the base"), (tmp_path / "other", "is not its base")):
        with pytest.raises(WrongBaseError, match=told):
            load_model(tmp_path / "packed", "lazy", base=base)
        with pytest.raises(WrongBaseError, match=told):
            deltafmt.torch.load_state_dict(tmp_path / "packed", base=base, lazy=True)
    with deltafmt.torch.load_state_dict(tmp_path / "packed", base=tiny, lazy=True) as lazy:
        assert len(lazy) == len(weights)


def test_a_configuration_of_another_shape(tiny: Path, tmp_path: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"vocab_size": 170}))
    deltafmt.pack(tiny, tmp_path / "packed")
    for mode in ("fused", "lazy"):
        with pytest.raises(UsageError, match="does not fit the model"):
            load_model(tmp_path / "packed", mode)
