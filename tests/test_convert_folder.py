"""The bulk converter, as a user runs it: many fine-tunes of one base there and back, stopped and started again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hostile import Tensor, f32, tree, write_checkpoint

TOOL = Path(__file__).parent.parent / "tools" / "convert_folder.py"


def run(*arguments: object, code: int = 0) -> Any:
    done = subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


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
