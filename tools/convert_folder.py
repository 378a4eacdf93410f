"""Convert a folder of checkpoints to a folder of archives against one base, and back.

    python tools/convert_folder.py pack   MODELS ARCHIVES --base BASE
    python tools/convert_folder.py unpack ARCHIVES MODELS

`pack` stores the base once, as the archive `base`, and each sub-directory of MODELS that holds a checkpoint as a small
archive of the same name against it. `unpack` gives every checkpoint back, the base among them if asked for. Both can be
stopped at any time and started again: what is there and passes `deltafmt verify` is not made again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import deltafmt

BASE = "base"
MANIFEST = "deltafmt.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


@dataclass(frozen=True)
class Converted:
    """One model of the folder."""

    name: str
    state: str
    """`packed`, `unpacked`, `already there` or `failed`."""
    logical_bytes: int = 0
    stored_bytes: int = 0
    error: str | None = None
    """Why it failed, if it did."""


def checkpoints(folder: Path) -> list[Path]:
    """The sub-directories of `folder` that hold weight files, by name."""
    return [
        path for path in sorted(folder.iterdir()) if path.is_dir() and any(any(path.glob(kind)) for kind in WEIGHTS)
    ]


def archives(folder: Path) -> list[Path]:
    """The sub-directories of `folder` that are archives, by name."""
    return [path.parent for path in sorted(folder.glob(f"*/{MANIFEST}"))]


def pack_folder(source: Path, target: Path, base: Path, options: dict[str, Any]) -> Iterator[Converted]:
    """Pack `base` and every checkpoint of `source` into `target`; `options` go to `deltafmt.pack`."""
    models = [path for path in checkpoints(source) if path.resolve() != base.resolve()]
    if any(path.name == BASE for path in models):
        raise click.ClickException(f"{source / BASE} would take the name of the base archive; rename it")
    target.mkdir(parents=True, exist_ok=True)
    stored_base = target / BASE
    # Lossy options are for the fine-tunes: the base itself stays exact, or nothing could refer to it.
    first = _attempt(BASE, partial(_pack_one, base, stored_base, None, {"jobs": options["jobs"]}))
    yield first
    if first.error:
        return
    for model in models:
        yield _attempt(model.name, partial(_pack_one, model, target / model.name, stored_base, options))


def _pack_one(model: Path, archive: Path, base: Path | None, options: dict[str, Any]) -> Converted:
    lossless = options.get("method") != "lowrank"
    if is_whole(archive, base, against=model if lossless else None):
        there = deltafmt.inspect(archive)
        return Converted(archive.name, "already there", there.logical_bytes, there.stored_bytes)
    packed = deltafmt.pack(model, archive, base=base, overwrite=archive.exists(), **options)
    return Converted(archive.name, "packed", packed.logical_bytes, packed.stored_bytes)


def unpack_folder(source: Path, target: Path, with_base: bool, jobs: int | None) -> Iterator[Converted]:
    """Unpack every archive of `source` into `target`."""
    target.mkdir(parents=True, exist_ok=True)
    stored_base = source / BASE
    for archive in archives(source):
        if archive.name == BASE and not with_base:
            continue
        base = stored_base if archive.name != BASE and stored_base.is_dir() else None
        yield _attempt(archive.name, partial(_unpack_one, archive, target / archive.name, base, jobs))


def _unpack_one(archive: Path, model: Path, base: Path | None, jobs: int | None) -> Converted:
    report = deltafmt.inspect(archive)
    sizes = report.logical_bytes, report.stored_bytes
    if model.is_dir() and is_whole(archive, base, against=model):
        return Converted(archive.name, "already there", *sizes)
    deltafmt.unpack(archive, model, base=base, jobs=jobs, overwrite=model.exists())
    return Converted(archive.name, "unpacked", *sizes)


def is_whole(archive: Path, base: Path | None, against: Path | None) -> bool:
    """Whether `archive` is there and passes `verify`; with `against`, also whether it gives that very checkpoint."""
    if not (archive / MANIFEST).exists():
        return False
    try:
        found = deltafmt.verify(archive, base=base, against=against)
    except (deltafmt.DeltafmtError, OSError):
        return False
    return against is None or bool(found.equal)


def _attempt(name: str, convert: Callable[[], Converted]) -> Converted:
    """One model that cannot be converted does not keep the others from it."""
    try:
        return convert()
    except (deltafmt.DeltafmtError, OSError) as error:
        return Converted(name, "failed", error=str(error))


# --- Command line ---------------------------------------------------------------------------------------------------

FOLDER = click.Path(path_type=Path, file_okay=False)
EXISTING = click.Path(path_type=Path, file_okay=False, exists=True)


def show(results: Iterator[Converted], as_json: bool) -> int:
    """Convert, tell how far it is on stderr, print the table or JSON. Returns the exit code."""
    done: list[Converted] = []
    progress = Console(stderr=True)
    stopped = False
    try:
        for result in results:
            done.append(result)
            why = f": {result.error}" if result.error else ""
            progress.print(f"{result.name}: {result.state}{why}", highlight=False, markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        stopped = True
        progress.print("Stopped. What is finished stays; run the same command again to go on.")
    logical, stored = sum(one.logical_bytes for one in done), sum(one.stored_bytes for one in done)
    if as_json:
        total = {"logical_bytes": logical, "stored_bytes": stored, "ratio": stored / logical if logical else None}
        click.echo(json.dumps({"models": [asdict(one) for one in done], "total": total, "stopped": stopped}, indent=2))
    else:
        Console().print(savings([*done, Converted("total", "", logical, stored)]))
    return 130 if stopped else int(any(one.error for one in done))


def savings(rows: list[Converted]) -> Table:
    """The table of savings; the last row is the total."""
    table = Table()
    table.add_column("model")
    for head in ("original MB", "archive MB", "saved"):
        table.add_column(head, justify="right")
    table.add_column("")
    for row in rows:
        if row is rows[-1]:
            table.add_section()
        saved = f"{1 - row.stored_bytes / row.logical_bytes:.1%}" if row.logical_bytes else ""
        table.add_row(row.name, f"{row.logical_bytes / 1e6:.1f}", f"{row.stored_bytes / 1e6:.1f}", saved, row.state)
    return table


@click.group(help=__doc__)
def main() -> None:
    """The two commands below."""


@main.command()
@click.argument("source", type=EXISTING)
@click.argument("target", type=FOLDER)
@click.option("--base", type=EXISTING, required=True, help="The checkpoint that the others were trained from.")
@click.option("--method", type=click.Choice(["auto", "lossless", "lowrank"]), default="auto", show_default=True)
@click.option("--rank", type=click.IntRange(min=1), help="Rank of the factors (lossy).")
@click.option("--max-error", type=float, help="Largest relative error of a tensor (lossy).")
@click.option("--jobs", type=click.IntRange(min=1), help="Threads.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
def pack(
    source: Path,
    target: Path,
    base: Path,
    method: str,
    rank: int | None,
    max_error: float | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Store every checkpoint in SOURCE as a small archive in TARGET, and the base once."""
    options = {"method": method, "rank": rank, "max_error": max_error, "jobs": jobs}
    sys.exit(show(pack_folder(source, target, base, options), as_json))


@main.command()
@click.argument("source", type=EXISTING)
@click.argument("target", type=FOLDER)
@click.option("--with-base", is_flag=True, help="Unpack the base too.")
@click.option("--jobs", type=click.IntRange(min=1), help="Threads.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
def unpack(source: Path, target: Path, with_base: bool, jobs: int | None, as_json: bool) -> None:
    """Give every checkpoint in SOURCE back in TARGET."""
    sys.exit(show(unpack_folder(source, target, with_base, jobs), as_json))


if __name__ == "__main__":
    main()
