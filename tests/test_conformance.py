"""The specification is complete: a reader written from it alone agrees with every vector, and the vectors cover it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import conformance_reader

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "spec"
VECTORS = SPEC / "vectors"
VALID = sorted(path.parent for path in (VECTORS / "valid").glob("*/case.json"))
INVALID = sorted(path.parent for path in (VECTORS / "invalid").glob("*/case.json"))
SCHEMA = jsonschema.Draft202012Validator(json.loads((SPEC / "manifest.schema.json").read_text("utf-8")))

# What JSON Schema cannot say although the reason is one of those it covers: see the schema's own description.
BEYOND_SCHEMA = {
    "base-digest-of-others",
    "groups-bounds-descending",
    "groups-bounds-fraction",
    "manifest-spaced",
    "name-clash-directory",
    "name-clash-original",
    "name-component-too-long",
    "name-of-originals-equal",
    "name-of-shards-equal",
    "name-of-tensor-too-long",
    "panels-columns-float",
    "panels-rows-float",
    "shape-fraction",
    "shard-index-out-of-range",
    "shard-size-fraction",
    "single-file-array-named-like-a-sidecar",
    "single-file-two-shards",
}


def content(case: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((case / "case.json").read_text("utf-8"))
    return loaded


def manifest(case: Path) -> Any:
    """The manifest of a case; {} of a single file that holds none."""
    if (case / "archive").exists():
        return json.loads((case / "archive" / "deltafmt.json").read_text("utf-8"))
    raw = (case / "archive.safetensors").read_bytes()
    try:
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        return json.loads(header["__metadata__"]["deltafmt.json"])
    except (ValueError, KeyError):
        return {}


def imports(paths: list[Path]) -> set[str]:
    """The top-level modules that files import."""
    pattern = re.compile(r"^\s*(?:import|from)\s+(\w+)", re.MULTILINE)
    return {name for path in paths for name in pattern.findall(path.read_text("utf-8"))}


def reason_table() -> dict[str, int]:
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", (SPEC / "reasons.md").read_text("utf-8"), re.MULTILINE)
    return {code: int(step) for step, codes in rows for code in re.findall("`([a-z-]+)`", codes)}


@pytest.mark.parametrize("case", VALID + INVALID, ids=lambda case: f"{case.parent.name}/{case.name}")
def test_the_independent_reader_agrees(case: Path) -> None:
    assert conformance_reader.check_vector(case) is None


def test_the_independent_reader_is_independent() -> None:
    tools = ROOT / "tools"
    reader = [tools / "conformance_reader.py", *(tools / "conformance").glob("*.py")]
    generator = [tools / "make_vectors.py", *(tools / "vectors").glob("*.py")]
    assert imports(reader) <= {"conformance", "numpy", "zstandard"} | sys.stdlib_module_names
    assert imports(generator) <= {"vectors", "xxhash"} | sys.stdlib_module_names


def test_the_vectors_are_what_the_generator_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "tools" / "make_vectors.py", tmp_path], check=True, capture_output=True)

    def files(root: Path) -> dict[str, bytes]:
        parts = [path for kind in ("valid", "invalid") for path in (root / kind).rglob("*") if path.is_file()]
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in parts}

    made, committed = files(tmp_path), files(VECTORS)
    assert sorted(made) == sorted(committed)
    assert [name for name in made if made[name] != committed[name]] == []


def test_every_reason_has_an_invalid_vector_with_its_step() -> None:
    table = reason_table()
    found = {(case["reason"], case["step"]) for case in map(content, INVALID)}
    assert found == set(table.items())
    assert len(table) == 28


def test_every_dtype_filter_coder_and_operator_has_a_valid_vector() -> None:
    manifests = [manifest(case) for case in VALID]
    arrays = [array for m in manifests for array in m["arrays"].values()]
    dtypes = set(SCHEMA.schema["$defs"]["dtype"]["enum"])
    readme = (SPEC / "README.md").read_text("utf-8").split("## Dtypes")[1]
    assert dtypes == set(re.findall(r"`([A-Z]+\d*(?:_E\dM\d(?:FNUZ)?)?)`", readme))
    assert {array["dtype"] for array in arrays} == dtypes
    encodings = {(array["encoding"]["filter"], array["encoding"]["coder"]) for array in arrays}
    filters = {("none", "zstd"), ("planes", "zstd"), ("float-planes", "zstd"), ("segments", "zstd")}
    assert encodings == {("none", "none")} | filters
    segmented = {array["dtype"] for array in arrays if array["encoding"]["filter"] == "segments"}
    assert segmented == {f"{sign}{size}" for sign in "UI" for size in (8, 16, 32, 64)}
    text = json.dumps([m["tensors"] for m in manifests])
    operators = {"stored", "ref", "sum", "lowrank", "scaled", "rows", "panels", "decayed", "patch"}
    assert set(re.findall(r'"op": "([^"]*)"', text)) == operators
    assert set(re.findall(r'"by": "([^"]*)"', text)) == {"exponent", "margin"}
    patched = {t["dtype"] for m in manifests for t in m["tensors"].values() if t["recipe"]["op"] == "patch"}
    assert patched == dtypes


@pytest.mark.parametrize("case", VALID, ids=lambda case: case.name)
def test_valid_manifests_satisfy_the_schema(case: Path) -> None:
    SCHEMA.validate(manifest(case))
    if (case / "base" / "deltafmt.json").exists():
        SCHEMA.validate(json.loads((case / "base" / "deltafmt.json").read_text("utf-8")))


def test_the_schema_itself_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA.schema)


def test_the_schema_refuses_what_it_can() -> None:
    covered = {"schema", "version", "feature", "dtype", "operator", "encoding", "name", "shape"}
    accepted = {case.name for case in INVALID if content(case)["reason"] in covered and SCHEMA.is_valid(manifest(case))}
    assert accepted == BEYOND_SCHEMA


def test_the_readers_command_line(tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, ROOT / "tools" / "conformance_reader.py", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )

    shown = run(VECTORS / "valid" / "base-ref" / "archive", "--base", f"base={VECTORS / 'valid' / 'base-ref' / 'base'}")
    assert shown.returncode == 0
    expected = content(VECTORS / "valid" / "base-ref")["tensors"]
    assert {line.split()[0] for line in shown.stdout.splitlines()} == {
        f"sha256:{t['sha256']}" for t in expected.values()
    }
    refused = run(VECTORS / "invalid" / "shard-missing" / "archive")
    assert refused.returncode == 1
    assert refused.stderr.startswith("shard-missing: ")
    assert run("--vectors", tmp_path).returncode == 1, "no case is no success"
