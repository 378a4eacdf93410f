"""`deltafmt eval`: what it measures, what it prints, what it refuses."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

import deltafmt
from command_line import Run, object_in
from deltafmt import evaluation

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = [f"w{number}" for number in range(64)]
IDS = np.arange(150) * 37 % 61 + 2
TEXT = " ".join(WORDS[number] for number in IDS)
LENGTH = 32


def new_llama(seed: int = 0, **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    positions = {"num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(**{**sizes, **positions, "vocab_size": len(WORDS), "initializer_range": 0.1, **options})
    return LlamaForCausalLM(config).eval()


def save_tokenizer(folder: Path, words: list[str] = WORDS) -> None:
    """A word is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token=words[0]).save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, `original`, and what it is packed into; `tuned`, and `delta`, which needs `original`; the text."""
    root = tmp_path_factory.mktemp("eval")
    model = new_llama()
    model.save_pretrained(root / "original")
    save_tokenizer(root / "original")
    deltafmt.pack(root / "original", root / "exact")
    deltafmt.pack(root / "original", root / "one.safetensors", single_file=True)
    deltafmt.pack(root / "original", root / "lossy", method="lowrank", rank=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.001
    model.save_pretrained(root / "tuned")
    save_tokenizer(root / "tuned")
    deltafmt.pack(root / "tuned", root / "delta", base=root / "original")
    (root / "text.txt").write_text(TEXT)
    np.save(root / "ids.npy", IDS.astype(np.uint16))
    return root


@pytest.fixture
def measure(made: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in the folder of these models; exit code, stdout, stderr."""
    monkeypatch.chdir(made)

    def command(*arguments: str) -> tuple[int, str, str]:
        length = [] if "--length" in arguments else ["--length", str(LENGTH)]
        text = [] if "--text" in arguments else ["--text", "ids.npy"]
        return run("eval", *arguments, *text, *length)

    return command


def windows() -> torch.Tensor:
    return torch.from_numpy(IDS[: len(IDS) // LENGTH * LENGTH].reshape(-1, LENGTH))


def report(measure: Run, *arguments: str) -> dict[str, Any]:
    code, out, err = measure(*arguments, "--json")
    assert (code, err) == (0, "")
    return object_in(out)


# What is measured


@pytest.mark.parametrize("source", ["original", "exact", "one.safetensors"])
@pytest.mark.parametrize("text", ["text.txt", "ids.npy"])
def test_perplexity_is_that_of_the_loss_of_transformers(source: str, text: str, measure: Run) -> None:
    with torch.no_grad():
        loss = new_llama()(input_ids=windows(), labels=windows()).loss.item()
    found = report(measure, source, "--text", text)
    assert found["model"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["tokens"] == windows().shape[0] * (LENGTH - 1)
    assert found["against"] is found["model"]["kl"] is found["model"]["agreement"] is None


def test_an_exact_archive_agrees_with_what_was_packed(measure: Run) -> None:
    found = report(measure, "exact", "--against", "original")
    assert found["model"]["agreement"] == 1
    assert found["model"]["kl"] == pytest.approx(0, abs=1e-9)
    for same in ("perplexity", "accuracy", "parameters", "resident_bytes"):
        assert found["model"][same] == found["against"][same]


def test_a_lossy_archive_is_measured_as_its_unpacked_weights_are(measure: Run, made: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    full = report(measure, "lossy", "--against", "original")
    deltafmt.unpack(made / "lossy", tmp_path / "unpacked")
    ids = windows()
    with torch.no_grad():
        lossy = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")(input_ids=ids).logits[:, :-1]
        original = new_llama()(input_ids=ids).logits[:, :-1]
    p, q = F.log_softmax(lossy.double(), -1), F.log_softmax(original.double(), -1)
    assert full["model"]["kl"] == pytest.approx((q.exp() * (q - p)).sum(-1).mean().item(), rel=1e-4)
    assert full["model"]["kl"] > 0.01
    assert full["model"]["agreement"] == (p.argmax(-1) == q.argmax(-1)).double().mean().item() < 1
    assert full["model"]["accuracy"] == (p.argmax(-1) == ids[:, 1:]).double().mean().item()


def test_fused_and_lazy_are_the_same_model_in_less_memory(measure: Run) -> None:
    full, fused, lazy = (report(measure, "lossy", "--mode", mode)["model"] for mode in ("full", "fused", "lazy"))
    for other in (fused, lazy):
        assert other["perplexity"] == pytest.approx(full["perplexity"], rel=1e-4)
        assert other["stored_bytes"] == full["stored_bytes"]
    assert fused["parameters"] < full["parameters"] == lazy["parameters"]
    assert lazy["resident_bytes"] < fused["resident_bytes"] < full["resident_bytes"]
    assert [each["mode"] for each in (full, fused, lazy)] == ["full", "fused", "lazy"]


def test_sizes_are_those_of_the_files_and_the_weights(measure: Run, made: Path) -> None:
    found = report(measure, "exact", "--against", "original")
    numbers = sum(parameter.numel() for parameter in new_llama().parameters())
    assert found["model"]["parameters"] == numbers
    assert 4 * numbers <= found["model"]["resident_bytes"] < 4 * numbers + 1000
    for row, folder in (("model", "exact"), ("against", "original")):
        assert found[row]["stored_bytes"] == sum(file.stat().st_size for file in (made / folder).iterdir())
        assert found[row]["tokens_per_second"] > 0
        assert found[row]["dtype"] == "float32"
    assert report(measure, "exact", "--dtype", "bfloat16")["model"]["resident_bytes"] < 3 * numbers


def test_bases_are_found_on_both_sides(measure: Run) -> None:
    same = report(measure, "delta", "--base", "original", "--against", "delta", "--against-base", "original")
    assert same["model"]["agreement"] == 1
    assert same["model"]["bases"] == same["against"]["bases"] == ["original"]
    plain = report(measure, "tuned")
    assert plain["model"]["perplexity"] == same["model"]["perplexity"]


def test_the_first_tokens_of_stdin(measure: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    found = report(measure, "exact", "--text", "-", "--tokens", "70", "--batch", "1")
    assert (found["tokens"], found["batch"]) == (2 * (LENGTH - 1), 1)


def test_windows_are_as_long_as_the_model_allows(run: Run, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    assert object_in(run("eval", "exact", "--text", "ids.npy", "--json")[1])["length"] == 64


# What is printed


def test_json_has_these_fields(measure: Run) -> None:
    found = report(measure, "lossy", "--against", "original", "--quiet")
    rows = ["model", "mode", "dtype", "bases", "perplexity", "accuracy", "agreement", "kl"]
    rows += ["parameters", "stored_bytes", "resident_bytes", "tokens_per_second"]
    assert list(found) == ["text", "tokens", "length", "batch", "device", "model", "against", "seconds"]
    assert list(found["model"]) == list(found["against"]) == rows
    assert (found["model"]["model"], found["against"]["model"]) == ("lossy", "original")
    assert (found["text"], found["length"], found["batch"], found["device"]) == ("ids.npy", LENGTH, 8, "cpu")


def test_a_table_for_people(measure: Run) -> None:
    code, out, err = measure("exact", "--against", "original")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "124 tokens predicted" in lines["text"]
    assert "100.00 %" in lines["agreement"]
    assert lines["perplexity"].split()[1] == lines["perplexity"].split()[2]
    alone = measure("exact")[1]
    assert "agreement" not in alone
    assert "perplexity" in alone


def test_a_table_in_markdown(measure: Run) -> None:
    code, out, err = measure("exact", "--against", "original", "--markdown")
    assert (code, err) == (0, "")
    header, rule, own, reference = ([cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines())
    assert header[:5] == ["model", "perplexity", "accuracy", "agreement", "KL"]
    assert all(set(cell) <= set("-:") for cell in rule)
    assert (own[0], own[3], reference[0], reference[3]) == ("exact", "100.00 %", "original", "")
    assert own[1] == reference[1]


def test_each_model_is_named_when_asked(measure: Run) -> None:
    assert measure("exact", "--against", "original", "--verbose")[2] == "deltafmt: exact\ndeltafmt: original\n"


def test_progress_counts_the_tokens_of_both_models(made: Path) -> None:
    told: list[tuple[int, int, str]] = []
    options: dict[str, Any] = {"length": LENGTH, "batch": 3, "progress": lambda *each: told.append(each)}
    evaluation.measure(made / "exact", made / "ids.npy", against=made / "original", **options)
    each = LENGTH - 1
    assert [(done, total) for done, total, _ in told] == [(each * done, each * 8) for done in (3, 4, 7, 8)]
    assert [name for *_, name in told] == [str(made / "exact")] * 2 + [str(made / "original")] * 2


# What is refused


def refusal(measure: Run, *arguments: str) -> str:
    code, out, err = measure(*arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    return err


def save_ids(folder: Path, *ids: int) -> str:
    np.save(folder / "other.npy", np.array(ids, np.int64))
    return str(folder / "other.npy")


def test_a_model_that_is_not_causal(measure: Run, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

    for kind in (BertForMaskedLM, BertLMHeadModel):
        config = BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64
        )
        folder = tmp_path / kind.__name__
        kind(config).save_pretrained(folder)
        assert f"found {kind.__name__}" in refusal(measure, str(folder))
    deltafmt.pack(tmp_path / "BertForMaskedLM", tmp_path / "packed")
    assert "no causal language model" in refusal(measure, str(tmp_path / "packed"))


def test_a_model_without_tokenizer_takes_token_ids(measure: Run, tmp_path: Path) -> None:
    new_llama().save_pretrained(tmp_path / "bare")
    deltafmt.pack(tmp_path / "bare", tmp_path / "packed")
    for source in ("bare", "packed"):
        assert "--text ids.npy" in refusal(measure, str(tmp_path / source), "--text", "text.txt")
        assert measure(str(tmp_path / source))[0] == 0


def test_another_tokenizer_or_vocabulary_is_not_compared(measure: Run, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "original", tmp_path / "turned")
    save_tokenizer(tmp_path / "turned", WORDS[::-1])
    against = ("--against", str(tmp_path / "turned"))
    assert "other tokens than exact" in refusal(measure, "exact", "--text", "text.txt", *against)
    new_llama(vocab_size=80).save_pretrained(tmp_path / "larger")
    assert "expected 64, found 80" in refusal(measure, "exact", "--against", str(tmp_path / "larger"))


def test_text_that_does_not_fit_the_model(measure: Run, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(WORDS[5])
    assert "two tokens or more" in refusal(measure, "exact", "--text", str(tmp_path / "short.txt"))
    assert "expected 0 to 63, found 64" in refusal(measure, "exact", "--text", save_ids(tmp_path, 3, 64))
    assert "found -1" in refusal(measure, "exact", "--text", save_ids(tmp_path, -1, 3))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    assert "byte 3" in refusal(measure, "exact", "--text", str(tmp_path / "latin.txt"))
    (tmp_path / "text.npy").write_text(TEXT)
    assert "numpy.save" in refusal(measure, "exact", "--text", str(tmp_path / "text.npy"))
    (tmp_path / "empty.npy").write_bytes(b"")
    assert "numpy.save" in refusal(measure, "exact", "--text", str(tmp_path / "empty.npy"))
    np.savez(tmp_path / "several.npz", ids=np.arange(9))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    assert "several in one" in refusal(measure, "exact", "--text", str(tmp_path / "several.npy"))
    np.save(tmp_path / "float.npy", np.ones(9))
    assert "float64 [9]" in refusal(measure, "exact", "--text", str(tmp_path / "float.npy"))


def test_windows_longer_than_the_positions(measure: Run) -> None:
    assert "at most 64" in refusal(measure, "exact", "--length", "65")


def test_what_is_not_for_checkpoints(measure: Run) -> None:
    assert "mode 'fused' is for archives" in refusal(measure, "original", "--mode", "fused")
    assert "a base is for archives" in refusal(measure, "original", "--base", "exact")
    assert "--against MODEL" in refusal(measure, "exact", "--against-base", "original")
    assert "directory" in refusal(measure, "original/model.safetensors")
    assert "'nonsense' cannot be used" in refusal(measure, "exact", "--device", "nonsense")


def test_a_checkpoint_that_lacks_weights(measure: Run, made: Path, tmp_path: Path) -> None:
    """They would be random."""
    shutil.copytree(made / "original", tmp_path / "deeper")
    config = json.loads((tmp_path / "deeper/config.json").read_text())
    (tmp_path / "deeper/config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert "lacks weights" in refusal(measure, str(tmp_path / "deeper"))


def test_exit_codes_of_other_errors(measure: Run, made: Path, tmp_path: Path) -> None:
    assert measure("exact", "--text", "nowhere.txt")[0] == 1
    assert measure("./nowhere")[0] == 1
    assert measure("delta")[0] == 6
    assert measure("delta", "--base", "tuned")[0] == 6
    shutil.copytree(made / "exact", tmp_path / "damaged")
    text = (tmp_path / "damaged/tokenizer.json").read_text()
    (tmp_path / "damaged/tokenizer.json").write_text(text.replace("w1", "v1", 1))
    assert measure(str(tmp_path / "damaged"))[0] == 5
    error = object_in(measure("exact", "--length", "65", "--json")[1])["error"]
    assert (error["class"], error["exit_code"]) == ("UsageError", 2)


def test_without_the_extra(made: Path) -> None:
    program = (
        "import sys; sys.modules['transformers'] = None; from deltafmt.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["eval", str(made / "exact"), "--text", str(made / "ids.npy")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'deltafmt[hf]'" in done.stderr
