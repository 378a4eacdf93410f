"""The bulk converter, as a user runs it: many fine-tunes of one base there and back, stopped and started again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import convert_folder
from hostile import Tensor, f32, manifest, names_in, tree, write_checkpoint


def run(*arguments: object, code: int = 0) -> Any:
    done = CliRunner().invoke(convert_folder.main, [*map(str, arguments), "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout) if code < 2 else done.stderr


def states(report: Any) -> dict[str, str]:
    return {model["name"]: model["state"] for model in report["models"]}


def changed(tensor: Tensor, place: int) -> Tensor:
    data = bytearray(tensor.data)
    data[4 * place] ^= 1
    return tensor._replace(data=bytes(data))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    base = {"w": f32(64, 64), "v": f32(64, seed=1)}
    write_checkpoint(tmp_path / "base", base)
    for place in range(3):
        tuned = {"w": changed(base["w"], place), "v": base["v"]}
        write_checkpoint(tmp_path / f"models/tuned-{place}", tuned, {"config.json": b"%d" % place})
    (tmp_path / "models/notes").mkdir()
    return tmp_path / "models"


def test_there_and_back(models: Path, tmp_path: Path) -> None:
    report = run("pack", models, tmp_path / "archives", "--base", tmp_path / "base")
    assert sorted(path.name for path in (tmp_path / "archives").iterdir()) == ["base", "tuned-0", "tuned-1", "tuned-2"]
    assert report["total"]["stored_bytes"] == sum(len(content) for content in tree(tmp_path / "archives").values())
    run("unpack", tmp_path / "archives", tmp_path / "restored")
    for place in range(3):
        assert tree(tmp_path / f"restored/tuned-{place}") == tree(models / f"tuned-{place}")


def test_what_is_whole_is_not_made_again(models: Path, tmp_path: Path) -> None:
    run("pack", models, tmp_path / "archives", "--base", tmp_path / "base")
    manifest = tmp_path / "archives/tuned-0/deltafmt.json"
    made = manifest.stat().st_mtime_ns
    write_checkpoint(models / "tuned-9", {"w": f32(64, 64, seed=9), "v": f32(64, seed=1)})
    run("pack", models, tmp_path / "archives", "--base", tmp_path / "base")
    assert manifest.stat().st_mtime_ns == made
    assert (tmp_path / "archives/tuned-9/deltafmt.json").exists()


def test_one_bad_model_does_not_stop_the_others(models: Path, tmp_path: Path) -> None:
    (models / "tuned-1/model.safetensors").write_bytes(b"\x10")
    run("pack", models, tmp_path / "archives", "--base", tmp_path / "base", code=1)
    assert sorted(path.name for path in (tmp_path / "archives").iterdir()) == ["base", "tuned-0", "tuned-2"]


def test_unpack_leaves_what_is_no_result_of_it(models: Path, tmp_path: Path) -> None:
    archives, restored = tmp_path / "archives", tmp_path / "restored"
    run("pack", models, archives, "--base", tmp_path / "base")
    run("unpack", archives, restored)
    (restored / "tuned-0/config.json").write_bytes(b"mine")
    (restored / "tuned-1/NOTES.md").write_bytes(b"mine")
    before = tree(restored)
    again = run("unpack", archives, restored, code=1)
    assert states(again) == {"tuned-0": "failed", "tuned-1": "failed", "tuned-2": "already there"}
    assert "--overwrite" in again["models"][0]["error"]
    assert tree(restored) == before
    run("unpack", archives, restored, "--overwrite")
    assert tree(restored) == {name: data for name, data in tree(models).items() if name.startswith("tuned")}


def test_pack_leaves_what_is_no_result_of_it(models: Path, tmp_path: Path) -> None:
    archives, base = tmp_path / "archives", ("--base", tmp_path / "base")
    run("pack", models, archives, *base)
    shutil.rmtree(archives / "tuned-0")
    shutil.copytree(archives / "tuned-1", archives / "tuned-0")
    shutil.rmtree(archives / "tuned-2")
    (archives / "tuned-2").mkdir()
    (archives / "tuned-2/mine").write_bytes(b"mine")
    before = tree(archives)
    again = run("pack", models, archives, *base, code=1)
    kept = {"base": "already there", "tuned-1": "already there"}
    assert states(again) == kept | {"tuned-0": "failed", "tuned-2": "failed"}
    assert tree(archives) == before
    # As `deltafmt pack` does: an archive is replaced, what may be anything is not.
    again = run("pack", models, archives, *base, "--overwrite", code=1)
    assert states(again) == kept | {"tuned-0": "packed", "tuned-2": "failed"}
    assert (archives / "tuned-2/mine").exists()
    run("unpack", archives, tmp_path / "restored")
    assert tree(tmp_path / "restored/tuned-0") == tree(models / "tuned-0")


def test_a_base_that_is_another_is_not_packed_against(models: Path, tmp_path: Path) -> None:
    archives = tmp_path / "archives"
    run("pack", models, archives, "--base", tmp_path / "base")
    before = tree(archives)
    again = run("pack", models, archives, "--base", models / "tuned-1", code=1)
    assert states(again) == {"base": "failed"}
    assert tree(archives) == before


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """Two fine-tunes that differ everywhere from their base, by rank 24: losing some of it pays."""
    base = f32(64, 64)
    write_checkpoint(tmp_path / "base", {"w": base})
    for place in range(2):
        write_checkpoint(tmp_path / f"models/tuned-{place}", {"w": moved(base, place)})
    return tmp_path / "models"


def moved(tensor: Tensor, seed: int) -> Tensor:
    draw = np.random.default_rng(100 + seed).standard_normal
    values = np.frombuffer(tensor.data, "<f4").reshape(64, 64) + 0.01 * draw((64, 24)) @ draw((24, 64))
    return tensor._replace(data=values.astype("<f4").tobytes())


@pytest.mark.parametrize(
    ("options", "others"),
    [
        (["--rank", "4"], ["--rank", "16"]),
        (["--rank", "4", "--method", "lowrank"], ["--max-error", "0.9"]),
        (["--max-error", "0.03"], ["--method", "lossless"]),
        (["--method", "lowrank"], ["--rank", "4"]),
    ],
)
def test_a_lossy_archive_is_there_for_the_same_options_only(
    dense: Path, tmp_path: Path, options: list[str], others: list[str]
) -> None:
    arguments = ("pack", dense, tmp_path / "archives", "--base", tmp_path / "base")
    run(*arguments, *options)
    made = tree(tmp_path / "archives")
    assert "rel_error" in manifest(tmp_path / "archives/tuned-0")["tensors"]["w"]
    assert set(states(run(*arguments, *options)).values()) == {"already there"}
    refused = {"base": "already there", "tuned-0": "failed", "tuned-1": "failed"}
    assert states(run(*arguments, *others, code=1)) == refused
    assert tree(tmp_path / "archives") == made
    packed = {"base": "already there", "tuned-0": "packed", "tuned-1": "packed"}
    assert states(run(*arguments, *others, "--overwrite")) == packed
    assert set(states(run(*arguments, *others)).values()) == {"already there"}


def test_a_lossy_archive_is_there_for_the_same_checkpoint_only(dense: Path, tmp_path: Path) -> None:
    archives, restored = tmp_path / "archives", tmp_path / "restored"
    arguments = ("pack", dense, archives, "--base", tmp_path / "base", "--rank", "4")
    run(*arguments)
    (dense / "tuned-0/config.json").write_bytes(b"{ }")
    weights = dense / "tuned-1/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    refused = {"base": "already there", "tuned-0": "failed", "tuned-1": "failed"}
    assert states(run(*arguments, code=1)) == refused
    run(*arguments, "--overwrite")
    run("unpack", archives, restored)
    assert states(run("unpack", archives, restored)) == {"tuned-0": "already there", "tuned-1": "already there"}
    (archives / "tuned-0").rename(archives / "aside")
    (archives / "tuned-1").rename(archives / "tuned-0")
    (archives / "aside").rename(archives / "tuned-1")
    assert states(run(*arguments, code=1)) == refused
    shutil.rmtree(archives / "tuned-0")
    (archives / ".made-of/tuned-1").unlink()  # as a kill right after packing leaves it
    assert states(run(*arguments, code=1)) == refused | {"tuned-0": "packed"}


def test_a_lossy_archive_that_is_damaged_is_not_there(dense: Path, tmp_path: Path) -> None:
    arguments = ("pack", dense, tmp_path / "archives", "--base", tmp_path / "base", "--rank", "4")
    run(*arguments)
    (shard,) = (tmp_path / "archives/tuned-0").glob("*.safetensors")
    *content, last = shard.read_bytes()
    shard.write_bytes(bytes([*content, last ^ 1]))
    left = {"base": "already there", "tuned-1": "already there"}
    assert states(run(*arguments, code=1)) == left | {"tuned-0": "failed"}
    assert states(run(*arguments, "--overwrite")) == left | {"tuned-0": "packed"}


def test_a_lossy_archive_is_there_for_the_same_base_only(dense: Path, tmp_path: Path) -> None:
    """One that takes nothing from its base too: another base is another request."""
    write_checkpoint(tmp_path / "unlike", {"w": f32(64, 64, seed=7)})
    arguments = ("pack", dense, tmp_path / "archives", "--max-error", "1e-6")
    run(*arguments, "--base", tmp_path / "unlike")
    assert manifest(tmp_path / "archives/tuned-0")["bases"] == {}
    replaced = run(*arguments, "--base", tmp_path / "base", "--overwrite")
    assert set(states(replaced).values()) == {"packed"}


def test_what_a_killed_run_left_is_no_model(models: Path, tmp_path: Path) -> None:
    archives, left = tmp_path / "archives", ".tuned-2.deltafmt-0123456789ab"
    shutil.copytree(models / "tuned-2", models / left)
    run("pack", models, archives, "--base", tmp_path / "base")
    assert names_in(archives) == ["base", "tuned-0", "tuned-1", "tuned-2"]
    shutil.copytree(archives / "tuned-2", archives / left)
    run("unpack", archives, tmp_path / "restored")
    assert names_in(tmp_path / "restored") == ["tuned-0", "tuned-1", "tuned-2"]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("pack models models --base base", "overlaps"),
        ("pack models models/tuned-1/archives --base base", "overlaps"),
        ("pack models base/archives --base base", "overlaps"),
        ("pack models archives --base base --max-error 7", "--max-error"),
        ("pack models archives --base base --max-error nan", "--max-error"),
        ("pack models archives --base base --rank 8 --method lossless", "contradicts"),
        ("pack models archives --base base --rank 8 --max-error 0.1", "exclude each other"),
        ("pack models/notes archives --base base", "no checkpoint"),
        ("unpack models archives", "no archive"),
        ("unpack packed packed", "overlaps"),
        ("unpack packed packed/tuned-1", "overlaps"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    models: Path, tmp_path: Path, command: str, told: str
) -> None:
    (tmp_path / "packed/tuned-1").mkdir(parents=True)
    (tmp_path / "packed/tuned-1/deltafmt.json").write_bytes(b"{}")
    before = sorted(tmp_path.rglob("*"))
    verb, *arguments = command.split()
    paths = ("models", "base", "archives", "packed")
    said = run(verb, *(tmp_path / each if each.startswith(paths) else each for each in arguments), code=2)
    assert told in said
    assert sorted(tmp_path.rglob("*")) == before


def test_archives_may_lie_among_the_checkpoints(models: Path, tmp_path: Path) -> None:
    for _ in range(2):
        report = run("pack", models, models / "archives", "--base", tmp_path / "base")
        assert [*states(report)] == ["base", "tuned-0", "tuned-1", "tuned-2"]
