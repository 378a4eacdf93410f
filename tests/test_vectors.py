"""The package against the conformance vectors: the same bytes, the same refusals."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import deltafmt

VECTORS = Path(__file__).parents[1] / "spec" / "vectors"
VALID = sorted(path.parent for path in (VECTORS / "valid").glob("*/case.json"))
INVALID = sorted(path.parent for path in (VECTORS / "invalid").glob("*/case.json"))
FLOATS = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}

pytestmark = pytest.mark.usefixtures("way")


def content(case: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((case / "case.json").read_text("utf-8"))
    return loaded


def base_of(case: Path) -> Path | dict[str, Path] | None:
    """The base of a case, or base id -> base if there are several."""
    others = {place.name.removeprefix("base-"): place for place in case.glob("base-*")}
    base = {"base": case / "base"} if (case / "base").is_dir() else {}
    return base | others if others else base.get("base")


def archive_of(case: Path) -> Path:
    """The archive of a case: a directory or a single file."""
    return next(case.glob("archive*"))


def conforms(expected: dict[str, Any], data: bytes) -> bool:
    """Whether bytes are the ordered reference or, for a bounded tensor, in the range that any order may reach."""
    if hashlib.sha256(data).hexdigest() == expected["sha256"]:
        return True
    if "low" not in expected:
        return False
    dtype = FLOATS[expected["dtype"]]
    low, high = (np.frombuffer(bytes.fromhex(expected[end]), dtype).astype(np.float64) for end in ("low", "high"))
    value = np.frombuffer(data, dtype).astype(np.float64)
    return bool(np.all((low <= value) & (value <= high) | np.isnan(low) & np.isnan(value)))


@pytest.mark.parametrize("case", VALID, ids=lambda case: case.name)
def test_valid_vectors_are_rebuilt(case: Path) -> None:
    expected = content(case)["tensors"]
    with deltafmt.open(archive_of(case), base=base_of(case)) as archive:
        assert sorted(archive.keys()) == sorted(expected)
        wrong = [name for name, tensor in expected.items() if not conforms(tensor, archive.tensor_bytes(name))]
    assert wrong == []


@pytest.mark.parametrize("case", VALID, ids=lambda case: case.name)
def test_valid_vectors_are_unpacked_to_the_original_files(case: Path, tmp_path: Path) -> None:
    expected = content(case)
    deltafmt.unpack(archive_of(case), tmp_path / "out", base=base_of(case))
    paths = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    found = {
        path.relative_to(tmp_path / "out").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }
    bounded = any("low" in tensor for tensor in expected["tensors"].values())
    weights = {name for name in found if bounded and name.endswith(".safetensors")}  # their bytes may differ
    assert found.keys() == expected["files"].keys()
    assert [name for name in found.keys() - weights if found[name] != expected["files"][name]] == []


@pytest.mark.parametrize("case", VALID, ids=lambda case: case.name)
def test_valid_vectors_are_verified(case: Path) -> None:
    report = deltafmt.verify(archive_of(case), base=base_of(case))
    assert report.base_checked
    assert report.unchecked == ()


def do_everything(archive: Path, base: Path | dict[str, Path] | None, output: Path) -> None:
    """Open, read all tensors, verify, unpack: what a reader can find, in the order of spec/reasons.md."""
    with deltafmt.open(archive, base=base) as opened:
        for name in opened.keys():  # noqa: SIM118 (the API of safe_open, which is no mapping)
            opened.tensor_bytes(name)
    deltafmt.verify(archive, base=base)
    deltafmt.unpack(archive, output, base=base)


@pytest.mark.parametrize("case", INVALID, ids=lambda case: case.name)
def test_invalid_vectors_are_refused_for_their_reason(case: Path, tmp_path: Path) -> None:
    with pytest.raises(deltafmt.DeltafmtError) as refusal:
        do_everything(archive_of(case), base_of(case), tmp_path / "out")
    assert refusal.value.reason == content(case)["reason"], str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", [case for case in INVALID if content(case)["step"] <= 6], ids=lambda case: case.name)
def test_the_first_six_steps_are_taken_when_an_archive_is_opened(case: Path) -> None:
    with pytest.raises(deltafmt.DeltafmtError) as refusal:
        deltafmt.open(archive_of(case), base=base_of(case)).close()
    assert refusal.value.reason == content(case)["reason"], str(refusal.value)
