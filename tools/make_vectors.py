"""Writes the conformance vectors below spec/vectors/valid and spec/vectors/invalid: the same bytes on every run.

    python tools/make_vectors.py [DIRECTORY]      default: spec/vectors

The cases are drawn up in vectors/valid_*.py and vectors/invalid_*.py with the writer in vectors/draft.py, which shares
no code with the package or with conformance_reader.py. What is expected comes from the original data, never from
decoding an archive.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

# Importing a module of cases registers them.
from vectors import (  # noqa: F401
    invalid_content,
    invalid_decayed,
    invalid_exact,
    invalid_files,
    invalid_groups,
    invalid_manifest,
    invalid_names,
    invalid_panels,
    invalid_recipes,
    invalid_segments,
    invalid_single_file,
    spoil,
    valid,
    valid_decayed,
    valid_exact,
    valid_groups,
    valid_layout,
    valid_panels,
    valid_recipes,
    valid_segments,
    valid_single_file,
)
from vectors.draft import Draft, safetensors
from vectors.values import Json, sha256


def expectation(draft: Draft) -> Json:
    tensors: Json = {}
    for name, t in draft.tensors.items():
        tensors[name] = {"dtype": t.dtype, "shape": t.shape, "sha256": sha256(t.data)}
        if name in draft.bounded:
            bounded = draft.bounded[name]
            tensors[name] |= {"low": bounded.low.data.hex(), "high": bounded.high.data.hex()}
    return {"tensors": tensors, "files": {name: sha256(data) for name, data in draft.original_files().items()}}


def write(case: Path, draft: Draft, content: Json) -> None:
    files = {"" if draft.single_file else "archive": draft.seal(), "base": draft.base}
    files |= {f"base-{key}": {"model.safetensors": safetensors(base)} for key, base in draft.other_bases.items()}
    for directory, members in files.items():
        for name, data in members.items():
            (case / directory / name).parent.mkdir(parents=True, exist_ok=True)
            (case / directory / name).write_bytes(data)
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    (case / "case.json").write_text(text, encoding="utf-8", newline="\n")


def make_vectors(directory: Path) -> int:
    """Write all cases below a directory, in place of those that are there; returns how many."""
    for kind in ("valid", "invalid"):
        shutil.rmtree(directory / kind, ignore_errors=True)
    for name, (description, make) in valid.CASES.items():
        draft = make()
        write(directory / "valid" / name, draft, {"description": description} | expectation(draft))
    for name, case in spoil.CASES.items():
        content = {"description": case.description, "reason": case.reason, "step": spoil.STEPS[case.reason]}
        write(directory / "invalid" / name, case.make(), content)
    return len(valid.CASES) + len(spoil.CASES)


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "spec" / "vectors"
    print(make_vectors(place), "cases in", place)
