"""`deltafmt.deltallm`: training deltas, resuming, and what is saved of the result."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import pydoc_data.topics
import shutil
import signal
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

import deltafmt
from deltafmt.deltallm import state
from deltafmt.deltallm.initialise import delta_model
from deltafmt.deltallm.objective import Objective, _pure_slice_loss, _slice_loss
from deltafmt.deltallm.replacement import Replacement
from deltafmt.deltallm.save import save
from deltafmt.deltallm.structure import Plan, Structure, plan
from deltafmt.deltallm.train import Training, train
from deltafmt.errors import IntegrityError, UnsupportedError, UsageError
from deltafmt.sources import open_source
from deltafmt.torch import load_model
from deltafmt.torch.fused import deltas

transformers.utils.logging.disable_progress_bar()

TEXT = torch.tensor(
    list("\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)).encode())
)
IDS = TEXT[None, 1000:1040]
SHORT = Training(tokens=512, batch=2, length=32, rate=2e-3, log_every=4)


pytestmark = pytest.mark.usefixtures("one_thread")


def llama(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        **settings,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=6, n_head=4, n_positions=64, vocab_size=256)
    return transformers.GPT2LMHeadModel(config).eval()


def pair(model: Any, **settings: Any) -> tuple[Any, Any, Plan]:
    """A teacher, a student with factors of rank 8, and the plan."""
    teacher = copy.deepcopy(model)
    structure = plan(teacher, Structure(**({"rank": 8} | settings)))
    return teacher, delta_model(teacher, structure), structure


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS, use_cache=False).logits.float()
    return found


def factors(model: Any) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if "factors" in name}


# The objective


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("teacher", [True, False])
def test_the_loss_is_that_of_torch(temperature: float, teacher: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltafmt.deltallm.objective._SLICE", {"cpu": 17 * 5})  # slices of different sizes
    torch.manual_seed(1)
    hidden, head, theirs, their_head = (torch.randn(*shape) for shape in ((23, 6), (17, 6), (23, 5), (17, 5)))
    targets = torch.randint(17, (23,))
    grown = [each.clone().requires_grad_() for each in (hidden, head)]
    objective = Objective(0.7, 0.4, temperature)
    loss, parts = objective(grown[0], grown[1], targets, theirs if teacher else None, their_head if teacher else None)
    torch.autograd.backward(3 * loss)

    wanted = [each.clone().requires_grad_() for each in (hidden, head)]
    z, q = wanted[0] @ wanted[1].T, theirs @ their_head.T
    expected = 0.7 * F.cross_entropy(z, targets)
    if teacher:
        of_teacher = F.softmax(q / temperature, -1)
        kl = F.kl_div(F.log_softmax(z / temperature, -1), of_teacher, reduction="batchmean") * temperature**2
        expected = expected + 0.4 * kl
        torch.testing.assert_close(parts[1], kl.detach())
    torch.autograd.backward(3 * expected)
    torch.testing.assert_close(loss, expected)
    for ours, other in zip(grown, wanted, strict=True):
        torch.testing.assert_close(ours.grad, other.grad)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_what_is_compiled_is_the_same(temperature: float) -> None:
    torch.manual_seed(1)
    z, q, targets = torch.randn(9, 17), torch.randn(9, 17), torch.randint(17, (9,))
    for teacher in (q, None):
        expected = _slice_loss(z, teacher, targets, 0.7, 0.4, temperature)
        torch.testing.assert_close(_pure_slice_loss(z, teacher, targets, 0.7, 0.4, temperature), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change", [lambda logits: 2 * torch.tanh(logits / 2) + 1, lambda logits: 0.9 * logits], ids=["cap", "scale"]
)
def test_a_model_with_other_logits_is_refused(dtype: torch.dtype, change: Any) -> None:
    model = llama(dtype)
    model.lm_head.register_forward_hook(lambda module, inputs, output: change(output))
    with pytest.raises(UnsupportedError, match="computes its logits in another way"):
        train(model, None, None, TEXT, SHORT)


# Replacement


def test_later_blocks_are_replaced_first() -> None:
    teacher, student, structure = pair(llama(), parts="both")
    replacement = Replacement(teacher, student, structure, begin=0.2, until=0.5)
    groups = range(4)  # an attention and an MLP in each of two blocks
    for progress in (0.0, 0.1, 0.2, 0.3, 0.4):
        chances = [replacement.probability(group, progress) for group in groups]
        assert chances == sorted(chances)
    assert [replacement.probability(group, 0.0) for group in groups] == [0.2] * 4
    assert [replacement.probability(group, 0.5) for group in groups] == [1.0] * 4
    assert replacement.probability(3, 0.25) == 1.0  # the last one is done when the first one begins
    assert replacement.probability(0, 0.25) == 0.2


def test_draws_depend_on_seed_and_step_and_use_the_teachers_modules() -> None:
    teacher, student, structure = pair(llama())
    whole = deltas(student)

    def seen(seed: int) -> list[set[str]]:
        replacement = Replacement(teacher, student, structure, begin=0.3, seed=seed)
        found = []
        for step in range(40):
            fraction = replacement.draw(step, 100)
            present = set(deltas(student))
            assert 0 < len(present) == fraction * len(whole)
            for name in structure.anchors:
                module = student.get_submodule(name)
                assert module is (whole[name] if name in present else teacher.get_submodule(name))
            found.append(present)
        replacement.finish()
        return found

    first = seen(0)
    assert first == seen(0) != seen(1)
    assert {len(present) for present in first} == {3, 6}  # whole MLPs
    assert deltas(student) == whole


# Training


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", 0),
        ("batch", 1.5),
        ("length", "32"),
        ("checkpoint_every", 0),
        ("document", 0),
        ("lora", -1),
        ("lora", True),
        ("betas", (2, 3)),
        ("betas", (0.9,)),
        ("betas", 0.9),
        ("distil", -1.0),
        ("cross_entropy", math.nan),
        ("cross_entropy", "1"),
        ("weight_decay", -0.1),
        ("clip", -1.0),
        ("rate", 0.0),
        ("rate", math.inf),
        ("temperature", -1.0),
        ("warmup", 1.5),
        ("replace_from", -0.5),
        ("seed", 0.5),
    ],
)
def test_a_number_that_makes_no_sense_is_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} "):
        replace(SHORT, **{name: value})


def test_no_loss_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="without cross_entropy and distil"):
        replace(SHORT, cross_entropy=0, distil=0.0)


def test_a_model_learns_its_text() -> None:
    history = train(llama(), None, None, TEXT, Training(tokens=10_000, batch=8, length=32, rate=3e-3))
    assert history.log[-1]["cross_entropy"] < 3.6 < 4.5 < history.log[0]["cross_entropy"]


def test_training_brings_the_student_to_the_teacher(tmp_path: Path) -> None:
    teacher, student, structure = pair(llama(initializer_range=0.1))
    before, expected = logits(student), logits(teacher)
    frozen = {name: each.clone() for name, each in student.named_parameters() if not each.requires_grad}
    training = Training(tokens=16_000, batch=8, length=32, rate=3e-3, cross_entropy=0.01, temperature=2.0)
    history = train(student, teacher, structure, TEXT, training, directory=tmp_path / "run")

    def kl(found: torch.Tensor) -> float:
        return float(F.kl_div(found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="sum"))

    assert kl(logits(student)) < 0.7 * kl(before)
    assert torch.equal(logits(teacher), expected)
    for name, each in student.named_parameters():
        assert name not in frozen or torch.equal(each, frozen[name])
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines == history.log
    assert lines[0]["replaced"] < 1 == lines[-1]["replaced"]
    assert lines[-1]["step"] == history.steps == training.steps
    assert lines[-1]["tokens"] == history.tokens >= 16_000
    for line in lines:
        assert line["loss"] == pytest.approx(0.01 * line["cross_entropy"] + line["kl"])


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as at a terminal: whoever runs in the background may have none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("options", [{}, {"norms": True, "lora": 2}])
def test_a_training_that_was_interrupted_ends_the_same(
    options: dict[str, Any], tmp_path: Path, interruptible: None
) -> None:
    training = Training(**(vars(SHORT) | options | {"accumulate": 2, "tokens": 2048, "checkpoint_every": 5}))
    training = replace(training, replace_until=1.0)  # draws matter to the end
    assert training.steps == 16
    teacher, student, structure = pair(llama())
    train(student, teacher, structure, TEXT, training)
    expected = {name: each.detach().clone() for name, each in student.state_dict().items()}

    def part(**settings: Any) -> tuple[Any, Any]:
        teacher, student, structure = pair(llama())
        history = train(student, teacher, structure, TEXT, training, directory=tmp_path / "run", **settings)
        return student, history

    def stop(done: int, total: int, what: str) -> None:
        if done == training.step_tokens * 8:
            os.kill(os.getpid(), signal.SIGINT)

    _, history = part(progress=stop)
    assert history.interrupted
    assert 8 < history.steps < training.steps
    with pytest.raises(UsageError, match="a training is here already"):
        part()
    _, history = part(resume=True, seconds=0.0)
    assert history.interrupted
    student, history = part(resume=True)
    assert not history.interrupted
    found = student.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [line["step"] for line in history.log][-1] == training.steps
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["frozen", "log.jsonl", "state-00000016", "step-00000015", "step-00000016"]
    again, history = part(resume=True)  # nothing is left to do
    assert all(torch.equal(again.state_dict()[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("where", "last"), [("save", 2), ("_remove", 1)])
def test_a_checkpoint_that_is_cut_short_loses_nothing(
    where: str, last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is there and its model is not yet; or both are, and what was before is not removed yet."""
    training = replace(SHORT, checkpoint_every=3)
    teacher, student, structure = pair(llama())
    train(student, teacher, structure, TEXT, training)
    expected = factors(student)

    known, calls = getattr(state, where), 0

    def kill(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KilledError
        return known(*arguments, **settings)

    teacher, student, structure = pair(llama())
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(state, where, kill)
        train(student, teacher, structure, TEXT, training, directory=tmp_path)
    assert len(list(tmp_path.glob("state-*"))) == 2
    teacher, student, structure = pair(llama())
    history = train(student, teacher, structure, TEXT, training, directory=tmp_path, resume=True)
    assert not history.interrupted
    found = factors(student)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["frozen", "log.jsonl", "state-00000008", "step-00000006", "step-00000008"]


def test_a_checkpoint_without_its_state_is_not_resumed(tmp_path: Path) -> None:
    teacher, student, structure = pair(llama())
    train(student, teacher, structure, TEXT, SHORT, directory=tmp_path)
    facts = tmp_path / "state-00000008/training.json"
    facts.write_text(facts.read_text().replace("8", "7", 1))
    with pytest.raises(IntegrityError, match="not as it was written"):
        train(student, teacher, structure, TEXT, SHORT, directory=tmp_path, resume=True)
    shutil.rmtree(facts.parent)
    with pytest.raises(IntegrityError, match="'state-00000008' is not there"):
        train(student, teacher, structure, TEXT, SHORT, directory=tmp_path, resume=True)


def test_a_checkpoint_with_the_state_of_another_is_not_resumed(tmp_path: Path) -> None:
    teacher, student, structure = pair(llama())
    train(student, teacher, structure, TEXT, replace(SHORT, checkpoint_every=3), directory=tmp_path)
    shutil.rmtree(tmp_path / "step-00000008")
    shutil.copytree(tmp_path / "step-00000006", tmp_path / "step-00000008")
    teacher, student, structure = pair(llama())
    with pytest.raises(IntegrityError, match="its factors are not those that 'state-00000008' belongs to"):
        train(student, teacher, structure, TEXT, SHORT, directory=tmp_path, resume=True)


def test_what_a_killed_call_was_writing_is_removed(tmp_path: Path) -> None:
    teacher, student, structure = pair(llama())
    train(student, teacher, structure, TEXT, SHORT, directory=tmp_path)
    expected = sorted(path.name for path in tmp_path.iterdir())
    for name in (
        ".state-00000008.deltafmt-0123456789ab",
        ".frozen.deltafmt-0123456789ab",
        ".scratch-x",
        "state-00000009",
    ):
        (tmp_path / name).mkdir()
    teacher, student, structure = pair(llama())
    train(student, teacher, structure, TEXT, SHORT, directory=tmp_path, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


def test_batches_that_are_accumulated_are_one_batch() -> None:
    found, last = [], []
    for accumulate, batch in ((1, 4), (2, 2)):
        teacher, student, structure = pair(llama())
        before = torch.cat([each.flatten() for each in factors(student).values()])
        training = replace(SHORT, accumulate=accumulate, batch=batch)
        last.append(train(student, teacher, structure, TEXT, training).log[-1])
        found.append(torch.cat([each.flatten() for each in factors(student).values()]) - before)
    assert (found[0] - found[1]).norm() < 1e-3 * found[0].norm()
    for part in ("loss", "gradient"):  # the size of a gradient does not matter to Adam
        assert last[0][part] == pytest.approx(last[1][part], rel=1e-3)


def test_another_training_is_not_resumed(tmp_path: Path) -> None:
    teacher, student, structure = pair(llama())
    train(student, teacher, structure, TEXT, SHORT, directory=tmp_path)
    for training, text in ((replace(SHORT, rate=1e-3), TEXT), (SHORT, TEXT[:-1])):
        with pytest.raises(UsageError, match="the training to resume is another"):
            train(student, teacher, structure, text, training, directory=tmp_path, resume=True)


@pytest.mark.parametrize("layer", [2, 3], ids=["anchor", "replaced"])
def test_a_training_of_another_model_is_not_resumed(tmp_path: Path, layer: int) -> None:
    """Of blocks 2 and 3 the one is student's and teacher's; the other's weights are the teacher's alone."""
    teacher, student, structure = pair(llama())
    train(student, teacher, structure, TEXT, SHORT, directory=tmp_path)
    other = llama()
    with torch.no_grad():
        other.model.layers[layer].mlp.up_proj.weight[0, 0] += 1e-3
    teacher, student, structure = pair(other)
    with pytest.raises(UsageError, match="the training to resume is another: its frozen part differs"):
        train(student, teacher, structure, TEXT, SHORT, directory=tmp_path, resume=True)


def test_a_training_is_resumed_that_is_logged_and_saved_otherwise(tmp_path: Path) -> None:
    teacher, student, structure = pair(llama())
    train(student, teacher, structure, TEXT, SHORT, directory=tmp_path, seconds=0.0)
    expected = factors(student)
    teacher, student, structure = pair(llama())
    training = replace(SHORT, checkpoint_every=3, log_every=1)
    history = train(student, teacher, structure, TEXT, training, directory=tmp_path, resume=True, seconds=0.0)
    assert history.steps == 2
    assert any(not torch.equal(each, expected[name]) for name, each in factors(student).items())


class KilledError(Exception):
    """What ends a training without a word."""


@pytest.mark.parametrize("resume", [False, True])
def test_nothing_is_left_of_a_training_without_a_checkpoint(tmp_path: Path, resume: bool) -> None:
    def kill(*_: Any) -> None:
        raise KilledError

    other = llama()
    with torch.no_grad():
        other.model.embed_tokens.weight += 1
    teacher, student, structure = pair(other)
    with pytest.raises(KilledError):
        train(student, teacher, structure, TEXT, SHORT, directory=tmp_path, progress=kill)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frozen", "log.jsonl"]
    teacher, student, structure = pair(llama())
    history = train(student, teacher, structure, TEXT, SHORT, directory=tmp_path, resume=resume)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == history.log
    with deltafmt.open(tmp_path / f"step-{SHORT.steps:08d}", base=tmp_path / "frozen") as archive:
        tensors = archive._archive.manifest.tensors
    assert tensors["model.embed_tokens.weight"].recipe.op == "ref"


def test_a_checkpoint_that_is_half_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = replace(SHORT, checkpoint_every=2)
    remove = shutil.rmtree

    def interrupted(path: Path, **options: Any) -> None:
        if "step-00000002" in str(path) and (path / "deltafmt.json").exists():
            (path / "deltafmt.json").unlink()
            raise KilledError
        remove(path, **options)

    teacher, student, structure = pair(llama())
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(shutil, "rmtree", interrupted)
        train(student, teacher, structure, TEXT, training, directory=tmp_path)
    assert all((each / "deltafmt.json").exists() for each in tmp_path.glob("step-*"))
    teacher, student, structure = pair(llama())
    train(student, teacher, structure, TEXT, training, directory=tmp_path, resume=True)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["frozen", "log.jsonl", "state-00000008", "step-00000006", "step-00000008"]


def test_a_checkpoint_is_small_and_is_the_model(tmp_path: Path) -> None:
    teacher, student, structure = pair(llama())
    train(student, teacher, structure, TEXT, SHORT, directory=tmp_path)
    step = tmp_path / f"step-{SHORT.steps:08d}"
    with deltafmt.open(step, base=tmp_path / "frozen") as archive:
        manifest = archive._archive.manifest
        stored = {name for name in manifest.arrays if "#header" not in name}
    assert stored == {f"{name}.weight#{role}" for name in structure.anchors for role in ("lora_a", "lora_b")}
    assert {path.suffix for path in step.iterdir()} == {".json", ".safetensors"}
    with deltafmt.open(tmp_path / "state-00000008") as archive:
        numbers = {name: math.prod(archive.get_slice(name).get_shape()) for name in archive.keys()}  # noqa: SIM118
    moments = {name: count for name, count in numbers.items() if name.startswith("exp_avg")}
    assert sum(moments.values()) == 2 * sum(each.numel() for each in factors(student).values())
    # Beside the moments: how many steps each factor has seen, and the order of each layer's components.
    assert sum(numbers.values()) - sum(moments.values()) == sum(2 + rank for rank in structure.ranks.values())
    model = load_model(step, "fused", base=tmp_path / "frozen")
    torch.testing.assert_close(logits(model), logits(student), rtol=0, atol=1e-5)


def test_a_checkpoint_packed_again_stands_by_itself(tmp_path: Path) -> None:
    teacher, student, structure = pair(llama())
    history = train(student, teacher, structure, TEXT, SHORT, directory=tmp_path / "run")
    step = tmp_path / f"run/step-{history.steps:08}"
    report = deltafmt.pack(step, tmp_path / "packed", base=tmp_path / "run/frozen")
    assert report.bases_needed == ()
    model = load_model(tmp_path / "packed", "fused")
    assert sorted(deltas(model)) == sorted(structure.anchors)
    torch.testing.assert_close(logits(model), logits(student), rtol=0, atol=1e-5)
    assert set(deltafmt.unpack(tmp_path / "packed", tmp_path / "plain").files) == {"config.json", "model.safetensors"}
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(logits(plain), logits(student), rtol=0, atol=1e-4)


def test_bf16_and_baselines_train(tmp_path: Path) -> None:
    teacher, student, structure = pair(llama(torch.bfloat16))
    before = factors(student)
    train(student, teacher, structure, TEXT, Training(**(vars(SHORT) | {"norms": True})))
    assert all(each.dtype == torch.float32 for each in factors(student).values())
    assert any(not torch.equal(each, before[name]) for name, each in factors(student).items())
    assert student.model.norm.weight.dtype == torch.bfloat16
    assert not torch.equal(student.model.norm.weight, teacher.model.norm.weight)

    plain = llama(torch.bfloat16).requires_grad_(False)
    with pytest.raises(UsageError, match="nothing of the student can be trained"):
        train(plain, teacher, None, TEXT, SHORT)
    expected = {name: each.detach().clone() for name, each in plain.named_parameters()}
    train(plain, teacher, None, TEXT, Training(**(vars(SHORT) | {"lora": 4})))
    changed = [name for name, each in plain.named_parameters() if not torch.equal(each, expected[name])]
    assert len(changed) == 8 * 7
    assert not deltas(plain)


def run_compiled(compiled: bool) -> torch.Tensor:
    teacher, student, structure = pair(llama())
    train(student, teacher, structure, TEXT, Training(**(vars(SHORT) | {"compiled": compiled})))
    return torch.cat([each.flatten() for each in factors(student).values()])


def test_what_cannot_be_compiled_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler here\nat all")

    expected = run_compiled(False)
    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    with pytest.warns(UserWarning, match="could not be compiled: no compiler here$"):
        assert torch.equal(run_compiled(True), expected)


@pytest.mark.slow
def test_compiled_training_is_the_same_but_for_rounding() -> None:
    _, student, _ = pair(llama())
    before = torch.cat([each.flatten() for each in factors(student).values()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler warns of itself
        warnings.filterwarnings("error", message="the training could not be compiled")
        found, expected = run_compiled(True), run_compiled(False)
    assert (found - expected).norm() < 0.05 * (expected - before).norm()


# Saving


@pytest.mark.parametrize(
    ("make", "factor_dtype"),
    list(
        itertools.product(
            (
                lambda: llama(tie_word_embeddings=True),
                lambda: llama(torch.bfloat16),
                gpt2,
            ),
            (None, torch.bfloat16),
        )
    ),
    ids=[f"{name}-{kind}" for name in ("tied", "bf16", "gpt2") for kind in ("float32", "bfloat16")],
)
def test_what_is_saved_is_the_student(make: Any, factor_dtype: torch.dtype | None, tmp_path: Path) -> None:
    original = make()
    original.save_pretrained(tmp_path / "source")
    (tmp_path / "source/tokenizer.json").write_text("{}")
    teacher, student, structure = pair(original, parts="both")
    with torch.no_grad():
        for each in student.parameters():
            if each.requires_grad:  # as if trained
                each += 0.01 * torch.randn_like(each)
    report = save(student, structure, tmp_path / "packed", source=tmp_path / "source", dtype=factor_dtype)

    checked = deltafmt.verify(tmp_path / "packed")
    assert not checked.unchecked
    methods = [each.method for each in report.tensors.values()]
    assert methods.count("lowrank") == len(structure.anchors)
    assert sum(each.stat().st_size for each in (tmp_path / "packed").iterdir()) == report.stored_bytes
    narrow = teacher.dtype == torch.bfloat16 or factor_dtype == torch.bfloat16
    assert report.max_rel_error < (2**-8 if narrow else 1e-6)

    tolerance = 0.05 if narrow else 1e-5
    expected = logits(student)
    fused = load_model(tmp_path / "packed", "fused")
    assert deltas(fused).keys() == structure.anchors.keys()
    for name, layer in deltas(fused).items():
        sizes = layer.factors.lora_a.float().norm(dim=1) * layer.factors.lora_b.float().norm(dim=1)
        assert (sizes.diff() <= 1e-2 * sizes[:-1]).all(), name
    torch.testing.assert_close(logits(fused), expected, rtol=0, atol=tolerance)
    full = load_model(tmp_path / "packed")
    torch.testing.assert_close(logits(full), expected, rtol=0, atol=tolerance)
    deltafmt.unpack(tmp_path / "packed", tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(plain), logits(full))
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert names == {path.name for path in (tmp_path / "source").iterdir()}
    # Everything but the deltas is as it was, under the same names.
    with deltafmt.open(tmp_path / "packed") as ours, open_source(tmp_path / "source") as theirs:
        assert ours._archive.tensors == theirs.tensors
        approximate = {name for name, tensor in ours._archive.manifest.tensors.items() if not tensor.exact}
    assert approximate == {f"{name}.weight" for name in structure.anchors}


def test_a_loaded_checkpoint_in_float32_is_saved_as_it_was(tmp_path: Path) -> None:
    llama(torch.bfloat16).save_pretrained(tmp_path / "source")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32).eval()
    _, student, structure = pair(loaded)
    save(student, structure, tmp_path / "packed", source=tmp_path / "source", base=tmp_path / "source")
    with deltafmt.open(tmp_path / "packed", base=tmp_path / "source") as archive:
        tensors = archive._archive.manifest.tensors
        assert {tensor.dtype.name for tensor in tensors.values()} == {"BF16"}
        assert sum(tensor.recipe.op == "ref" for tensor in tensors.values()) == len(tensors) - len(structure.anchors)
    with pytest.raises(UsageError, match="lossy archive cannot be a base"):
        save(student, structure, tmp_path / "again", base=tmp_path / "packed")


def test_a_model_with_fewer_layers_is_saved_with_its_own_configuration(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "source")
    model = llama()
    del model.model.layers[3]
    model.config.num_hidden_layers = 7
    save(model, None, tmp_path / "packed", source=tmp_path / "source")
    assert torch.equal(logits(load_model(tmp_path / "packed")), logits(model))


def test_a_merged_student_is_no_delta_model(tmp_path: Path) -> None:
    teacher, _, structure = pair(llama())
    with pytest.raises(UsageError, match="no delta module"):
        save(teacher, structure, tmp_path / "packed")
