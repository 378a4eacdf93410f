"""transformers loads archives: the same model as from the checkpoint that was packed, by the same calls."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
import transformers
from safetensors.torch import load_file

import deltafmt
import deltafmt.hf
from command_line import object_in
from deltafmt.cli import main
from deltafmt.errors import DeltafmtError, IntegrityError, MissingExtraError, UsageError, WrongBaseError
from deltafmt.safetensors_file import SafetensorsFile

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
KINDS = ["AutoModelForCausalLM", "LlamaForCausalLM"]
TOKENS = torch.tensor([[1, 5, 9, 2, 7]])


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Any:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, archive) of a small Llama that has its own ideas about generation."""
    root = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(root / "plain")
    deltafmt.pack(root / "plain", root / "packed")
    return root / "plain", root / "packed"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, archive) of a small GPT-2: a tied head, `Conv1D`."""
    root = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(root / "plain")
    deltafmt.pack(root / "plain", root / "packed")
    return root / "plain", root / "packed"


@pytest.fixture(scope="module")
def encoder(minilm_dir: Path, finetune_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(checkpoint, archive against the base, base) of the real fine-tuned BERT encoder."""
    packed = tmp_path_factory.mktemp("encoder") / "packed"
    deltafmt.pack(finetune_dir, packed, base=minilm_dir)
    return finetune_dir, packed, minilm_dir


def assert_same(loaded: Any, expected: Any) -> None:
    """The same class and, bit for bit, the same weights and buffers."""
    assert type(loaded) is type(expected)
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].cpu(), tensor), name
    assert not loaded.training


@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModel"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_loads_as_from_its_checkpoint(family: str, auto: str, request: pytest.FixtureRequest) -> None:
    plain, packed = request.getfixturevalue(family)
    loaded = getattr(transformers, auto).from_pretrained(packed)
    assert_same(loaded, getattr(transformers, auto).from_pretrained(plain))
    assert loaded.name_or_path == loaded.config._name_or_path == str(packed)
    if family == "gpt2" and auto == "AutoModelForCausalLM":
        assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_an_encoder_loads_against_its_base(encoder: tuple[Path, Path, Path]) -> None:
    plain, packed, base = encoder
    loaded = transformers.AutoModel.from_pretrained(packed, base=base)
    assert_same(loaded, transformers.AutoModel.from_pretrained(plain))


def test_a_classifier_gets_a_new_head(llama: tuple[Path, Path]) -> None:
    plain, packed = llama
    kind = transformers.AutoModelForSequenceClassification
    loaded, info = kind.from_pretrained(packed, num_labels=3, output_loading_info=True)
    expected, expected_info = kind.from_pretrained(plain, num_labels=3, output_loading_info=True)
    assert info == expected_info
    assert set(info["missing_keys"]) == {"score.weight"}
    assert loaded.score.out_features == 3
    assert_same(loaded.model, expected.model)


def test_a_trained_classifier_is_loaded_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=4
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "plain")
    deltafmt.pack(tmp_path / "plain", tmp_path / "packed")
    kind = transformers.AutoModelForSequenceClassification
    loaded, info = kind.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(info.values())
    assert_same(loaded, kind.from_pretrained(tmp_path / "plain"))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"dtype": torch.float16},
        {"device_map": "auto"},
        {"mode": "full"},
        {"device_map": {"": "cpu"}, "dtype": torch.bfloat16},
        {"attn_implementation": "eager", "use_cache": False},
    ],
    ids=str,
)
def test_options_mean_what_they_always_do(options: dict[str, Any], llama: tuple[Path, Path]) -> None:
    plain, packed = llama
    kind = transformers.AutoModelForCausalLM
    loaded = kind.from_pretrained(packed, **options)
    expected = kind.from_pretrained(plain, **{name: value for name, value in options.items() if name != "mode"})
    assert_same(loaded, expected)
    assert loaded.config.use_cache == expected.config.use_cache
    assert loaded.config._attn_implementation == expected.config._attn_implementation


def test_the_dtype_is_that_of_the_weights_where_the_config_names_none(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama[0], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    deltafmt.pack(tmp_path / "plain", tmp_path / "packed")
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), model)


def test_parts_of_it_can_stay_on_disk(llama: tuple[Path, Path], tmp_path: Path) -> None:
    plain, packed = llama
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    places["model.rotary_emb"] = "cpu"
    kind = transformers.AutoModelForCausalLM
    loaded = kind.from_pretrained(packed, device_map=places, offload_folder=tmp_path / "offloaded")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, kind.from_pretrained(plain)(TOKENS).logits)


def test_it_generates_and_compiles(llama: tuple[Path, Path]) -> None:
    plain, packed = llama
    kind = transformers.AutoModelForCausalLM
    loaded, expected = kind.from_pretrained(packed), kind.from_pretrained(plain)
    assert loaded.generation_config.to_dict() == expected.generation_config.to_dict()
    said = loaded.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), do_sample=False)
    assert torch.equal(said, expected.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), do_sample=False))
    assert said.shape[1] == TOKENS.shape[1] + 3
    with torch.no_grad():
        compiled = torch.compile(loaded, backend="eager", fullgraph=True)
        assert torch.equal(compiled(TOKENS, use_cache=False).logits, expected(TOKENS, use_cache=False).logits)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_saved_is_a_plain_checkpoint(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    plain, packed = request.getfixturevalue(family)
    transformers.AutoModelForCausalLM.from_pretrained(packed).save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (plain / name).read_bytes(), name


def test_a_lossy_archive_loads_what_unpack_gives(llama: tuple[Path, Path], tmp_path: Path) -> None:
    plain, _ = llama
    deltafmt.pack(plain, tmp_path / "packed", method="lowrank", rank=4)
    deltafmt.unpack(tmp_path / "packed", tmp_path / "unpacked")
    kind = transformers.AutoModelForCausalLM
    loaded, expected = (kind.from_pretrained(tmp_path / name).state_dict() for name in ("packed", "unpacked"))
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-5, atol=1e-7)


def test_from_the_cache_of_the_hub(llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plain, packed = llama
    commit = "c0ffee" + "0" * 34
    repo = tmp_path / "models--org--packed"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    (repo / "snapshots" / commit).symlink_to(packed, target_is_directory=True)
    kind = transformers.AutoModelForCausalLM
    loaded = kind.from_pretrained("org/packed", cache_dir=tmp_path)
    assert_same(loaded, kind.from_pretrained(plain))
    assert loaded.name_or_path == "org/packed"
    with pytest.raises(OSError, match="cached files"):
        kind.from_pretrained("org/other", cache_dir=tmp_path)


# Other ways to hold the weights


@pytest.mark.parametrize("mode", ["fused", "lazy"])
def test_a_mode_of_load_model(mode: str, llama: tuple[Path, Path], tmp_path: Path) -> None:
    deltafmt.pack(llama[0], tmp_path / "packed", method="lowrank", rank=4)
    kind = transformers.AutoModelForCausalLM
    expected = kind.from_pretrained(tmp_path / "packed", dtype="float64")
    loaded = kind.from_pretrained(tmp_path / "packed", mode=mode, dtype="float64", device_map="cpu")
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, expected(TOKENS).logits, rtol=1e-4, atol=1e-6)
    if mode == "fused":
        assert type(loaded.model.layers[0].mlp.up_proj) is deltafmt.torch.fused.DeltaLinear
        less = kind.from_pretrained(tmp_path / "packed", mode=mode, rank=1)
        assert less.model.layers[0].mlp.up_proj.factors.rank == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["full", "fused", "lazy"])
def test_attention_is_computed_as_asked(mode: str, kind: str, llama: tuple[Path, Path]) -> None:
    loads = getattr(transformers, kind).from_pretrained
    for attention in ("eager", "sdpa"):
        loaded = loads(llama[1], mode=mode, rank=None if mode == "lazy" else 3, attn_implementation=attention)
        assert loaded.config._attn_implementation == attention
        assert loaded.model.config._attn_implementation == attention
        with torch.no_grad():
            expected = loads(llama[0], attn_implementation=attention)(TOKENS).logits
            assert torch.equal(loaded(TOKENS).logits, expected)


@pytest.mark.parametrize("device_map", ["auto", {"model": "cpu", "lm_head": "cpu"}, {"": torch.device("cpu")}], ids=str)
def test_a_device_map_of_one_device(device_map: Any, llama: tuple[Path, Path]) -> None:
    if device_map == "auto" and torch.accelerator.is_available():
        pytest.skip("there may be several")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(llama[1], mode="fused", device_map=device_map)
    assert_same(loaded, transformers.AutoModelForCausalLM.from_pretrained(llama[0]))


def test_an_anchor_layer_is_read_once(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltafmt.pack(llama[0], tmp_path / "packed", method="lowrank", rank=4, share="1:0", force=True)
    read: list[int] = []
    work = SafetensorsFile.read_into

    def noted(file: SafetensorsFile, offset: int, out: Any) -> None:
        read.append(out.nbytes)
        work(file, offset, out)

    monkeypatch.setattr(SafetensorsFile, "read_into", noted)
    deltafmt.torch.load_state_dict(tmp_path / "packed")
    needed = sum(read)
    read.clear()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert sum(read) == needed
    monkeypatch.setattr("deltafmt.torch.tensors._KEPT_BYTES", 0)
    read.clear()
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), loaded)
    assert sum(read) > 1.2 * needed


@pytest.mark.parametrize(
    ("auto", "options", "said"),
    [
        ("AutoModel", {}, "for the class that config.json names"),
        ("AutoModelForCausalLM", {"device_map": {"model": "cpu", "lm_head": "disk"}}, "device_map="),
        ("AutoModelForCausalLM", {"use_cache": False}, "changes to the configuration"),
        ("AutoModelForCausalLM", {"output_loading_info": True}, "output_loading_info"),
    ],
)
def test_what_a_mode_does_not_go_with(auto: str, options: dict[str, Any], said: str, llama: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=said):
        getattr(transformers, auto).from_pretrained(llama[1], mode="fused", **options)


# What goes wrong is said


def test_a_base_that_is_missing_or_another(encoder: tuple[Path, Path, Path], llama: tuple[Path, Path]) -> None:
    plain, packed, _ = encoder
    with pytest.raises(WrongBaseError, match="base"):
        transformers.AutoModel.from_pretrained(packed)
    with pytest.raises(WrongBaseError, match="is not its base"):
        transformers.AutoModel.from_pretrained(packed, base=plain)
    with pytest.raises(DeltafmtError):
        transformers.AutoModel.from_pretrained(packed, base=llama[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [None, "fused", "lazy"])
def test_devices_that_there_are_not(mode: str | None, kind: str, llama: tuple[Path, Path]) -> None:
    absent = f"cuda:{torch.cuda.device_count()}"
    for device_map in (absent, {"": absent}, {"model": "cpu", "lm_head": absent}, "foo", -1):
        with pytest.raises(UsageError, match="cannot be used"):
            getattr(transformers, kind).from_pretrained(llama[1], device_map=device_map, mode=mode)


def test_memory_that_there_is_not(llama: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    work = np.empty

    def empty(shape: Any, *given: Any, **more: Any) -> Any:
        large = isinstance(shape, tuple) and np.prod(shape) >= 64 * 32
        return work(1 << 60 if large else shape, *given, **more)

    monkeypatch.setattr(np, "empty", empty)
    for dtype, needed in ((None, 4), ("bfloat16", 2)):
        with pytest.raises(UsageError, match="no room in memory") as caught:
            transformers.AutoModelForCausalLM.from_pretrained(llama[1], dtype=dtype)
        count = sum(each.numel() for each in load_file(llama[0] / "model.safetensors").values())
        assert caught.value.expected == f"{needed * count} bytes"


def test_damage_is_found_while_loading_what_is_damaged(llama: tuple[Path, Path], tmp_path: Path) -> None:
    plain, _ = llama
    deltafmt.pack(plain, tmp_path / "packed")
    shard = next((tmp_path / "packed").glob("deltafmt-*.safetensors"))
    with safetensors.safe_open(shard, "pt") as arrays:
        stored = arrays.get_tensor("lm_head.weight").numpy().tobytes()
    data = shard.read_bytes()
    place = data.index(stored) + len(stored) // 2
    shard.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(IntegrityError, match="checksum"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    headless = transformers.AutoModel.from_pretrained(tmp_path / "packed")  # does not read it
    assert_same(headless, transformers.AutoModel.from_pretrained(plain))


def test_an_archive_without_a_config(llama: tuple[Path, Path], tmp_path: Path) -> None:
    plain, _ = llama
    deltafmt.pack(plain / "model.safetensors", tmp_path / "packed")
    with pytest.raises(UsageError, match=r"no config\.json"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "packed")
    config = transformers.LlamaConfig(**LLAMA)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "packed", config=config)
    assert_same(loaded, transformers.LlamaForCausalLM.from_pretrained(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_is_told_what_loads_it(kind: str, llama: tuple[Path, Path], tmp_path: Path) -> None:
    deltafmt.pack(llama[0], tmp_path / "packed.safetensors", single_file=True)
    for options in ({}, {"mode": "fused"}):
        with pytest.raises(UsageError, match=r"is a single file.*load_model"):
            getattr(transformers, kind).from_pretrained(tmp_path / "packed.safetensors", **options)


def test_a_single_file_is_never_taken_for_plain_weights(llama: tuple[Path, Path], tmp_path: Path) -> None:
    """Beside a config.json transformers looks for weights by name; in our file it would find none, and make them up."""
    from transformers.modeling_utils import SAFE_WEIGHTS_NAME, _add_variant

    deltafmt.pack(llama[0], tmp_path / "packed.safetensors", single_file=True)
    (tmp_path / "config.json").write_bytes((llama[0] / "config.json").read_bytes())
    for variant in (None, "fp16", "v1.5"):
        with pytest.raises(UsageError, match="load an archive wrongly"):
            deltafmt.pack(llama[0], tmp_path / _add_variant(SAFE_WEIGHTS_NAME, variant), single_file=True)
        with pytest.raises(OSError, match="no file named model"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path, variant=variant)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_archives_are_not_for_plain_checkpoints(kind: str, llama: tuple[Path, Path]) -> None:
    for option, value in {"base": llama[0], "mode": "fused", "rank": 2, "max_bytes": 10}.items():
        with pytest.raises(UsageError, match=f"'{option}' is for archives, and this is a plain checkpoint"):
            getattr(transformers, kind).from_pretrained(llama[0], **{option: value})
    with pytest.raises(TypeError, match="nonsense"):
        getattr(transformers, kind).from_pretrained(llama[0], nonsense=1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_that_does_not_say_what_it_is(kind: str, llama: tuple[Path, Path], tmp_path: Path) -> None:
    deltafmt.pack(llama[0] / "model.safetensors", tmp_path / "packed")
    for options in ({}, {"mode": "fused"}, {"mode": "fused", "config": transformers.LlamaConfig(**LLAMA)}):
        with pytest.raises(UsageError, match=r"no config\.json"):
            getattr(transformers, kind).from_pretrained(tmp_path / "packed", **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [None, "full", "fused", "lazy"])
def test_dtypes_that_there_are_not(mode: str | None, kind: str, llama: tuple[Path, Path]) -> None:
    for dtype in ("foo", "int32", "load", torch.int8, 5):
        with pytest.raises(UsageError, match="no floating-point dtype"):
            getattr(transformers, kind).from_pretrained(llama[1], dtype=dtype, mode=mode)


@pytest.mark.parametrize(
    "broken",
    [{"num_hidden_layers": "two"}, {"hidden_act": "nosuch"}, {"dtype": "foo"}, {"intermediate_size": 47}],
    ids=str,
)
def test_a_broken_configuration_is_named(broken: dict[str, Any], llama: tuple[Path, Path], tmp_path: Path) -> None:
    plain, _ = llama
    (tmp_path / "plain").mkdir()
    config = json.loads((plain / "config.json").read_text()) | broken
    (tmp_path / "plain/config.json").write_text(json.dumps(config))
    (tmp_path / "plain/model.safetensors").write_bytes((plain / "model.safetensors").read_bytes())
    deltafmt.pack(tmp_path / "plain", tmp_path / "packed")
    for kind in KINDS:
        for mode in (None, "fused"):
            with pytest.raises(UsageError, match=r"packed.*config\.json") as caught:
                getattr(transformers, kind).from_pretrained(tmp_path / "packed", mode=mode)
            assert caught.value.hint


def test_what_is_not_the_archives_fault_is_as_transformers_says_it(llama: tuple[Path, Path]) -> None:
    for kind in KINDS:
        with pytest.raises(ValueError, match="attn_implementation"):
            getattr(transformers, kind).from_pretrained(llama[1], attn_implementation="nosuch")
        with pytest.raises(TypeError, match="nonsense"):
            getattr(transformers, kind).from_pretrained(llama[1], nonsense=1)


def test_what_is_no_archive_loads_as_before(llama: tuple[Path, Path], tmp_path: Path) -> None:
    plain, _ = llama
    (tmp_path / "config.json").write_bytes((plain / "config.json").read_bytes())
    with pytest.raises(OSError, match=r"model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = transformers.AutoModelForCausalLM.from_pretrained(plain).state_dict()
    config = transformers.LlamaConfig(**LLAMA)
    loaded = transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights)
    assert torch.equal(loaded.lm_head.weight, weights["lm_head.weight"])


def test_importing_twice_wraps_once() -> None:
    before = transformers.PreTrainedModel.from_pretrained.__func__
    deltafmt.hf.register()
    assert transformers.PreTrainedModel.from_pretrained.__func__ is before


def test_transformers_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patching:
        patching.setattr(transformers, "__version__", "4.57.1")
        with pytest.raises(MissingExtraError, match=r"5\.0 or newer, and this is 4\.57\.1"):
            deltafmt.hf.register()
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails
    monkeypatch.delitem(sys.modules, "deltafmt.hf")
    with pytest.raises(MissingExtraError, match=r"deltafmt\[hf\]"):
        importlib.import_module("deltafmt.hf")


# Where nobody imports deltafmt.hf


_WITHOUT_THE_PLUGIN = """
import sys, torch, transformers
packed, mapped, unpacked, plain, saved = sys.argv[1:]
kind = transformers.AutoModelForCausalLM

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deltafmt":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())  # deltafmt is not installed
for path, trust in (packed, False), (packed, True), (mapped, False), (mapped, True):
    try:
        kind.from_pretrained(path, trust_remote_code=trust)
    except (OSError, ImportError) as error:
        print(error)
del sys.meta_path[0]  # now it is, and imported by the model's own module
for path in (mapped, unpacked):
    loaded = kind.from_pretrained(path, trust_remote_code=True)
    assert type(loaded) is transformers.LlamaForCausalLM
    for name, tensor in kind.from_pretrained(plain).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
assert "deltafmt.hf" in sys.modules
loaded.save_pretrained(saved)
"""


def test_without_the_plugin_an_error_and_no_model_or_the_auto_map(llama: tuple[Path, Path], tmp_path: Path) -> None:
    plain, packed = llama
    mapped, unpacked, saved = (tmp_path / name for name in ("mapped", "unpacked", "saved"))
    deltafmt.pack(plain, mapped)
    deltafmt.hf.write_auto_map(mapped)
    deltafmt.unpack(mapped, unpacked)
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_THE_PLUGIN, *map(str, (packed, mapped, unpacked, plain, saved))],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no file named model.safetensors") == 3
    assert done.stdout.count("pip install deltafmt") == 1
    assert (saved / "config.json").read_bytes() == (plain / "config.json").read_bytes()
    assert not (saved / deltafmt.hf.STUB).exists()


def test_an_auto_map_is_part_of_the_archive(llama: tuple[Path, Path], tmp_path: Path) -> None:
    plain, _ = llama
    packed = tmp_path / "packed"
    deltafmt.pack(plain, packed)
    (packed / "notes.txt").write_text("not of the archive")
    deltafmt.hf.write_auto_map(packed)
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    deltafmt.hf.write_auto_map(packed)
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before
    assert {"notes.txt", "modeling_deltafmt.py"} < before.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    deltafmt.verify(packed)
    config = json.loads(before["config.json"])
    assert config.pop("auto_map")["AutoModelForCausalLM"] == "modeling_deltafmt.AutoModelForCausalLM"
    assert config == json.loads((plain / "config.json").read_text())
    report = deltafmt.verify(packed, against=plain)
    assert set(report.differences) == {"config.json", "modeling_deltafmt.py"}


def test_an_auto_map_is_refused_where_it_would_not_help(llama: tuple[Path, Path], tmp_path: Path) -> None:
    plain, _ = llama
    deltafmt.pack(plain / "model.safetensors", tmp_path / "bare")
    with pytest.raises(UsageError, match=r"no config\.json"):
        deltafmt.hf.write_auto_map(tmp_path / "bare")
    for name, change in {
        "own": {"auto_map": {"AutoModel": "code.Model"}},
        "odd": {"model_type": "no such model"},
    }.items():
        (tmp_path / name).mkdir()
        config = json.loads((plain / "config.json").read_text()) | change
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes())
        deltafmt.pack(tmp_path / name, tmp_path / f"{name}-packed")
        with pytest.raises(UsageError, match=r"code of its own|does not know"):
            deltafmt.hf.write_auto_map(tmp_path / f"{name}-packed")
        deltafmt.verify(tmp_path / f"{name}-packed")


def test_an_auto_map_is_counted(llama: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(llama[0]), str(tmp_path / "packed"), "--auto-map", "--json"]) == 0
    report = object_in(capsys.readouterr().out)
    assert report["stored_bytes"] == sum(path.stat().st_size for path in (tmp_path / "packed").iterdir())
    assert report["stored_bytes"] == sum(report["roles"].values())
    assert report["ratio"] == report["stored_bytes"] / report["logical_bytes"]


def test_an_auto_map_where_we_are(llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deltafmt.pack(llama[0], tmp_path / "packed")
    monkeypatch.chdir(tmp_path / "packed")
    deltafmt.hf.write_auto_map(".")
    deltafmt.verify(".")
