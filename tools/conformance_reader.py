"""A second reader of the deltafmt format, written from `spec/*.md` alone.

It shares no code with the package: it shows that the specification is complete, and is there to be read by people who
write a reader in another language. It prefers clarity to speed, reads every byte, and checks all that `verify` checks.
What reads is in six files:

    conformance/manifest.py   strict JSON, types, names, closed tables, limits (steps 2 to 4 of spec/reasons.md)
    conformance/recipes.py    operands, references, grades, the accumulation type, coverage (step 5)
    conformance/archive.py    files: shards, sidecars, bases, the original checkpoint (steps 1 and 6 to 8)
    conformance/planes.py     checksums and encodings (step 7)
    conformance/numbers.py    conversions, low-rank products
    conformance/patches.py    patch, with groups

    python tools/conformance_reader.py ARCHIVE [--base ID=DIRECTORY ...]      print tensors and their digests
    python tools/conformance_reader.py --vectors spec/vectors                 run the conformance cases
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

from conformance.archive import read_archive, restore_files
from conformance.manifest import Rejected, digest_of


def check_vector(case: Path) -> str | None:
    """Run one conformance case; what went wrong, or None."""
    archive = next(case.glob("archive*"))
    expected = json.loads((case / "case.json").read_text("utf-8"))
    bases = {"base": case / "base"} if (case / "base").is_dir() else {}
    bases |= {place.name.removeprefix("base-"): place for place in case.glob("base-*")}
    try:
        tensors = read_archive(archive, bases)
        files = restore_files(archive, bases)
    except Rejected as rejected:
        return (
            None
            if rejected.reason == expected.get("reason")
            else f"expected {expected.get('reason')}, found {rejected}"
        )
    if "reason" in expected:
        return f"expected {expected['reason']}, but it was accepted"
    found = {
        n: {"dtype": d, "shape": list(s), "sha256": hashlib.sha256(x).hexdigest()} for n, (d, s, x) in tensors.items()
    }
    wanted = {n: {key: t[key] for key in ("dtype", "shape", "sha256")} for n, t in expected["tensors"].items()}
    if found != wanted:
        return f"tensors differ: {sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))[:5]}"
    differing = {n: hashlib.sha256(x).hexdigest() for n, x in files.items()} != expected["files"]
    return "files differ" if differing else None


def main() -> int:
    parser = argparse.ArgumentParser(description="Read a deltafmt archive, from the specification alone.")
    parser.add_argument("archive", nargs="?", type=Path)
    parser.add_argument("--base", action="append", default=[], metavar="ID=DIRECTORY")
    parser.add_argument("--vectors", type=Path, metavar="DIRECTORY", help="run conformance cases instead")
    arguments = parser.parse_args()
    if arguments.vectors:
        cases = sorted(path.parent for path in arguments.vectors.glob("*/*/case.json"))
        wrong = {case: message for case in cases if (message := check_vector(case))}
        for case, message in wrong.items():
            print(f"{case.parent.name}/{case.name}: {message}")
        print(f"{len(cases)} cases, {len(wrong)} disagreements")
        return 1 if wrong or not cases else 0
    if arguments.archive is None:
        parser.error("an archive, or --vectors, is needed")
    bases = {key: Path(place) for key, _, place in (text.partition("=") for text in arguments.base)}
    try:
        for name, (dtype, shape, data) in read_archive(arguments.archive, bases).items():
            print(digest_of(data), dtype, list(shape), name)
    except Rejected as rejected:
        print(rejected, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
