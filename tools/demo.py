"""The main job on real weights: pack a fine-tune against its base, look inside, verify, unpack, and compare every byte.

Base: all-MiniLM-L6-v2. Fine-tune: a real model that somebody trained further from it. Both come as Python packages.
Whether what comes out equals what went in is judged here, by hashing files: the tool's own word is not taken for it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import fixtures
import synthetic

ROOT = Path(__file__).resolve().parent.parent


class StepFailed(Exception):  # noqa: N818
    """A command of the demo did not exit with 0."""


@dataclass(frozen=True)
class Outcome:
    """One model that went through pack, verify and unpack."""

    title: str
    input_bytes: int
    archive_bytes: int
    files: int
    different: list[str]
    seconds: float


def deltafmt(console: Console, *arguments: str, show: bool = True) -> str:
    """Run `deltafmt ARGUMENTS` in a process of its own, its output shown or else returned. Raises `StepFailed`."""
    if show:
        console.print(f"\n[bold]$ deltafmt {' '.join(arguments)}[/bold]", soft_wrap=True, highlight=False)
    done = subprocess.run(
        [sys.executable, "-m", "deltafmt", *arguments], stdout=None if show else subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise StepFailed(f"`deltafmt {' '.join(arguments)}` exited with {done.returncode}")
    return done.stdout or ""


def files_of(directory: Path) -> dict[str, Path]:
    """Every file below `directory` by its relative name."""
    return {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}


def bytes_of(directory: Path) -> int:
    """Bytes of every file below `directory`."""
    return sum(path.stat().st_size for path in files_of(directory).values())


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def differences(original: Path, copy: Path) -> list[str]:
    """Names of the files that are in one directory only, or not the same bytes in both."""
    ours, theirs = files_of(original), files_of(copy)
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or sha256(ours[name]) != sha256(theirs[name])
    )


def round_trip(console: Console, title: str, model: Path, work: Path, base: Path | None, show: bool) -> Outcome:
    """Pack `model` (against `base`), verify, unpack and compare."""
    name = title.replace(" ", "-").replace(",", "")
    archive, restored = work / f"{name}-packed", work / f"{name}-unpacked"
    against_base = ["--base", shown(base)] if base else []
    quiet = [] if show else ["--json"]
    begin = time.perf_counter()
    deltafmt(console, "pack", shown(model), shown(archive), *against_base, *quiet, show=show)
    if show:
        deltafmt(console, "inspect", shown(archive))
    report = deltafmt(console, "verify", shown(archive), *against_base, "--against", shown(model), *quiet, show=show)
    if not show and not json.loads(report)["equal"]:
        raise StepFailed(f"verify does not call {title} equal")
    deltafmt(console, "unpack", shown(archive), shown(restored), *against_base, *quiet, show=show)
    seconds = time.perf_counter() - begin
    different = differences(model, restored)
    outcome = Outcome(title, bytes_of(model), bytes_of(archive), len(files_of(model)), different, seconds)
    shutil.rmtree(restored)
    return outcome


def shown(path: Path) -> str:
    """A path as one would type it here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def summary(outcomes: list[Outcome]) -> Table:
    """The table at the end."""
    table = Table(title="Packed, unpacked, and each file's SHA-256 compared with the original's")
    table.add_column("model", no_wrap=True)
    for head in ("input MB", "packed MB", "ratio", "seconds"):
        table.add_column(head, justify="right")
    table.add_column("unpacked")
    for outcome in outcomes:
        table.add_row(
            outcome.title,
            f"{outcome.input_bytes / 1e6:.1f}",
            f"{outcome.archive_bytes / 1e6:.1f}",
            f"{outcome.archive_bytes / outcome.input_bytes:.1%}",
            f"{outcome.seconds:.1f}",
            f"[red]DIFFERENT: {', '.join(outcome.different)}[/red]"
            if outcome.different
            else f"[green]{outcome.files} files identical[/green]",
        )
    return table


def main() -> int:
    """Run the demo. Returns the exit code: 0 if every file came back as it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "demo", help="where archives go (emptied first)")
    work: Path = parser.parse_args().work
    console = Console()
    console.print(
        "Fetching the weights of a real model and of a real fine-tune of it (170 MB, the first time only) ..."
    )
    base, tuned = fixtures.minilm(), fixtures.finetune()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)

    try:
        outcomes = [round_trip(console, "fine-tune, fp32", tuned, work, base, show=True)]
        console.print(
            "\nThe same for the base by itself, and for both rounded to bf16, as most models are published ..."
        )
        outcomes.append(round_trip(console, "base alone, fp32", base, work, None, show=False))
        base16 = synthetic.cast_checkpoint(base, work / "base-bf16", "BF16")
        tuned16 = synthetic.cast_checkpoint(tuned, work / "fine-tune-bf16", "BF16")
        outcomes.append(round_trip(console, "fine-tune, bf16", tuned16, work, base16, show=False))
        outcomes.append(round_trip(console, "base alone, bf16", base16, work, None, show=False))
    except StepFailed as failure:
        console.print(f"[red]{failure}[/red]")
        return 1

    console.print()
    console.print(summary(outcomes))
    console.print(f"The archives are in {shown(work)}.", highlight=False)
    return 1 if any(outcome.different for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
