"""A lossy archive packed again: the same values, no base needed, nothing left of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deltafmt
from command_line import Run
from deltafmt import IntegrityError, WrongBaseError
from hostile import Tensor, manifest, write_checkpoint

SIDE = 160
SMALL = "scaled"  # packed without loss, as a patch in groups


def f32(values: np.ndarray[Any, Any]) -> Tensor:
    return Tensor("F32", values.shape, values.astype("<f4").tobytes())


@pytest.fixture
def lossy(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and an archive against it: a low-rank delta, a patch, a tensor of the base, one of its own, a copy."""
    random = np.random.default_rng(0)
    weight, other = random.standard_normal((2, SIDE, SIDE)).astype(np.float32)
    low = random.standard_normal((SIDE, 2)) @ random.standard_normal((2, SIDE))
    norm, own = random.standard_normal((2, SIDE)).astype(np.float32)
    base = write_checkpoint(tmp_path / "base", {"w": f32(weight), SMALL: f32(other), "norm": f32(norm)})
    tensors = {
        "w": f32(weight + low),
        "same": f32(weight),
        "again": f32(weight),
        SMALL: f32(other * (1 + 1e-4 * random.standard_normal(other.shape))),
        "norm": f32(norm),
        "own": f32(own),
    }
    source = write_checkpoint(tmp_path / "source", tensors, {"config.json": b"{}\n"})
    deltafmt.pack(source, tmp_path / "lossy", base=base, rank=2, exclude=[SMALL, "same", "again"])
    return tmp_path / "lossy", base


def values(archive: Path, base: Path | None = None) -> dict[str, bytes]:
    with deltafmt.open(archive, base=base) as opened:
        return {name: opened.get_tensor(name).tobytes() for name in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize("single_file", [False, True])
def test_it_is_the_same_without_its_base(lossy: tuple[Path, Path], tmp_path: Path, single_file: bool) -> None:
    archive, base = lossy
    again = tmp_path / ("again.safetensors" if single_file else "again")
    report = deltafmt.pack(archive, again, base=base, single_file=single_file)
    assert values(again) == values(archive, base)
    deltafmt.verify(again)
    assert report.bases_needed == () and not report.exact


def test_recipes_stay_and_what_a_base_had_is_stored_once(lossy: tuple[Path, Path], tmp_path: Path) -> None:
    archive, base = lossy
    deltafmt.pack(archive, tmp_path / "again", base=base)
    before, after = (manifest(path)["tensors"] for path in (archive, tmp_path / "again"))
    assert manifest(tmp_path / "again")["bases"] == {}
    low = after["w"]["recipe"]
    assert low["op"] == "sum" and low["terms"][1] == before["w"]["recipe"]["terms"][1]
    # The base's tensor is there as a tensor of its own: everything else refers to that.
    assert low["terms"][0] == {"op": "ref", "tensor": "again"} == after["same"]["recipe"]
    assert after["again"]["recipe"]["op"] == "stored"
    assert after[SMALL]["recipe"]["op"] == "patch" and after[SMALL]["recipe"]["prediction"]["op"] == "stored"
    assert {name: entry.get("rel_error") for name, entry in after.items()} == {
        name: entry.get("rel_error") for name, entry in before.items()
    }


def test_sidecars_come_along(lossy: tuple[Path, Path], tmp_path: Path) -> None:
    archive, base = lossy
    deltafmt.pack(archive, tmp_path / "again", base=base)
    assert (tmp_path / "again/config.json").read_bytes() == b"{}\n"


def test_damage_is_found_and_a_missing_base_too(lossy: tuple[Path, Path], tmp_path: Path) -> None:
    archive, base = lossy
    with pytest.raises(WrongBaseError):
        deltafmt.pack(archive, tmp_path / "again")
    shard = next(archive.glob("deltafmt-*"))
    content = bytearray(shard.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + 40] ^= 1  # of the first array
    shard.write_bytes(content)
    with pytest.raises(IntegrityError):
        deltafmt.pack(archive, tmp_path / "again", base=base)
    assert not (tmp_path / "again").exists()


def test_what_is_told_of_the_base_is_true(lossy: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    archive, base = lossy
    code, told, error = run("pack", str(archive), str(tmp_path / "again"), "--base", str(base))
    assert (code, error) == (0, "")
    assert "what was taken from it is stored" in told
    assert "nothing of it was of use" not in told
