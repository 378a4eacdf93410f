"""What a user would not expect to go wrong: bases that are not needed, losses on top of losses, casts that overflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deltafmt
from deltafmt import UsageError
from hostile import f32, manifest, safetensors_bytes, write_checkpoint


def test_a_base_that_nothing_refers_to_is_not_recorded(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"other": f32(6, 4, seed=1)})
    source = write_checkpoint(tmp_path / "source", {"w": f32(6, 4)})
    deltafmt.pack(source, tmp_path / "packed", base=base)
    assert manifest(tmp_path / "packed")["bases"] == {}
    deltafmt.unpack(tmp_path / "packed", tmp_path / "out")
    deltafmt.unpack(tmp_path / "packed", tmp_path / "again", base=base)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


@pytest.mark.parametrize("options", [{"method": "lossless"}, {"rank": 1}, {"share": "1:0"}])
def test_a_lossy_archive_is_not_packed_in_another_way(tmp_path: Path, options: dict[str, Any]) -> None:
    source = write_checkpoint(tmp_path / "source", {"w": f32(64, 64)})
    deltafmt.pack(source, tmp_path / "lossy", rank=1)
    with pytest.raises(UsageError, match="lossy archive cannot be packed in another way"):
        deltafmt.pack(tmp_path / "lossy", tmp_path / "twice", **options)
    assert not (tmp_path / "twice").exists()


def test_a_lossless_archive_is_packed_again(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"w": f32(64, 64)})
    source = write_checkpoint(tmp_path / "source", {"w": f32(64, 64), "v": f32(3, seed=2)})
    deltafmt.pack(source, tmp_path / "packed", base=base)
    deltafmt.pack(tmp_path / "packed", tmp_path / "twice", base=base)
    assert manifest(tmp_path / "twice")["tensors"] == manifest(tmp_path / "packed")["tensors"]


@pytest.mark.parametrize(
    ("value", "dtype", "fits"), [(1e6, "float16", False), (65519.0, "float16", True), (3.4e38, "bfloat16", False)]
)
def test_a_cast_that_overflows_is_an_error(tmp_path: Path, value: float, dtype: str, fits: bool) -> None:
    weights = np.array([1, value, np.inf, np.nan], np.float32)
    source = write_checkpoint(tmp_path / "source", {"w": f32(4)._replace(data=weights.tobytes())})
    deltafmt.pack(source, tmp_path / "packed")
    if fits:
        deltafmt.unpack(tmp_path / "packed", tmp_path / "out", dtype=dtype)
        return
    with pytest.raises(UsageError, match="1 values of tensor 'w' are too large"):
        deltafmt.unpack(tmp_path / "packed", tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_verify_compares_headers(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", {"w": f32(6, 4)})
    deltafmt.pack(source, tmp_path / "packed")
    assert deltafmt.verify(tmp_path / "packed", against=source).equal
    (source / "model.safetensors").write_bytes(safetensors_bytes({"w": f32(6, 4)}, {"format": "other"}))
    report = deltafmt.verify(tmp_path / "packed", against=source)
    assert report.equal is False
    assert list(report.differences) == ["model.safetensors"]
