"""Convert a folder of checkpoints to a folder of archives against one base, and back.

    python tools/convert_folder.py pack   MODELS ARCHIVES --base BASE
    python tools/convert_folder.py unpack ARCHIVES MODELS

`pack` stores the base once, as the archive `base`, and each sub-directory of MODELS that holds a checkpoint as a small
archive of the same name against it. `unpack` gives every checkpoint back, the base among them if asked for.

Both can be stopped at any time and started again: what is there already, as it would be made, is not made again. That
is what `deltafmt verify` finds equal, archive and checkpoint. A lossy archive equals no checkpoint: from which one, and
with which options, it was made is known by a digest in TARGET/.made-of. Whatever else is in the way is left as it is
and that model fails, unless --overwrite is given.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import deltafmt
from deltafmt.arguments import Number
from deltafmt.names import MANIFEST
from deltafmt.sources import open_source

BASE = "base"
MADE_OF = ".made-of"
"""The folder in TARGET with a file for each lossy archive: a digest of what it was made of, and of itself."""
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
    """The sub-directories of `folder` that hold weight files, by name; hidden ones are what a killed run left."""
    return [
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and path.is_dir() and any(any(path.glob(kind)) for kind in WEIGHTS)
    ]


def archives(folder: Path) -> list[Path]:
    """The sub-directories of `folder` that are archives, by name; not hidden ones either."""
    return [path.parent for path in sorted(folder.glob(f"*/{MANIFEST}")) if not path.parent.name.startswith(".")]


def check_apart(target: Path, source: Path, inputs: Sequence[Path]) -> None:
    """Refuse, before anything is written, a target that is the source, or that is or lies in a model that is read."""
    place = target.resolve()
    if place == source.resolve() or any(each.resolve() in (place, *place.parents) for each in inputs):
        raise click.UsageError(f"'{target}' overlaps with what is read; choose a folder beside it")


def pack_folder(
    source: Path, target: Path, base: Path, options: dict[str, Any], jobs: int | None, overwrite: bool
) -> Iterator[Converted]:
    """Pack `base` and every checkpoint of `source` into `target`; `options` are the lossy ones of `deltafmt.pack`."""
    models = [path for path in checkpoints(source) if path.resolve() != base.resolve()]
    if not models:
        raise click.UsageError(f"there is no checkpoint in '{source}' beside the base")
    if any(path.name == BASE for path in models):
        raise click.UsageError(f"'{source / BASE}' would take the name of the base archive; rename it")
    check_apart(target, source, [base, *models])
    target.mkdir(parents=True, exist_ok=True)
    stored_base = target / BASE
    # Lossy options are for the fine-tunes: the base itself stays exact, or nothing could refer to it.
    first = _attempt(BASE, partial(_pack_one, base, stored_base, None, {}, jobs, overwrite))
    yield first
    if first.error:
        return
    for model in models:
        convert = partial(_pack_one, model, target / model.name, stored_base, options, jobs, overwrite)
        yield _attempt(model.name, convert)


def _pack_one(
    model: Path, archive: Path, base: Path | None, options: dict[str, Any], jobs: int | None, overwrite: bool
) -> Converted:
    request = requested(model, base, options) if base and options else None
    note = archive.parent / MADE_OF / archive.name
    if request is None:
        there = is_whole(archive, base, against=model)
    else:
        there = note.is_file() and note.read_bytes() == made_of(request, archive) and is_whole(archive, base)
    if there:
        found = deltafmt.inspect(archive)
        return Converted(archive.name, "already there", found.logical_bytes, found.stored_bytes)
    _check_free(archive, overwrite)
    packed = deltafmt.pack(model, archive, base=base, jobs=jobs, overwrite=overwrite, **options)
    if request is not None:  # killed before this is written, the archive is refused next time, not mistaken
        note.parent.mkdir(exist_ok=True)
        note.write_bytes(made_of(request, archive))
    return Converted(archive.name, "packed", packed.logical_bytes, packed.stored_bytes)


def requested(model: Path, base: Path, options: dict[str, Any]) -> bytes:
    """All that a lossy archive follows from, as bytes: the options, the stored base, and what is read of the model."""
    with open_source(model, base=[base]) as checkpoint:
        tensors = [
            (name, info.dtype.name, info.shape, checkpoint.digest(name)) for name, info in checkpoint.tensors.items()
        ]
        layout = [(file.name, file.header) for file in checkpoint.files], checkpoint.index
        sidecars = [(name, part.digest()) for name, part in checkpoint.sidecars.items()]
    return repr((sorted(options.items()), _manifest(base), tensors, layout, sidecars)).encode()


def made_of(request: bytes, archive: Path) -> bytes:
    """The content of an archive's file in `MADE_OF`: it fits this request and this archive only."""
    return hashlib.sha256(request + _manifest(archive)).hexdigest().encode()


def _manifest(archive: Path) -> bytes:
    """Of an archive, which has the digests of everything in it; empty where there is none."""
    path = archive / MANIFEST
    return path.read_bytes() if path.is_file() else b""


def unpack_folder(
    source: Path, target: Path, with_base: bool, jobs: int | None, overwrite: bool
) -> Iterator[Converted]:
    """Unpack every archive of `source` into `target`."""
    chosen = [archive for archive in archives(source) if with_base or archive.name != BASE]
    if not chosen:
        raise click.UsageError(f"there is no archive in '{source}' beside the base")
    stored_base = source / BASE
    check_apart(target, source, [stored_base, *chosen])
    target.mkdir(parents=True, exist_ok=True)
    for archive in chosen:
        base = stored_base if archive.name != BASE and stored_base.is_dir() else None
        yield _attempt(archive.name, partial(_unpack_one, archive, target / archive.name, base, jobs, overwrite))


def _unpack_one(archive: Path, model: Path, base: Path | None, jobs: int | None, overwrite: bool) -> Converted:
    report = deltafmt.inspect(archive)
    sizes = report.logical_bytes, report.stored_bytes
    if model.is_dir() and is_whole(archive, base, against=model):
        return Converted(archive.name, "already there", *sizes)
    if model.exists():
        deltafmt.verify(archive, base=base)  # if this is at fault, the destination is not
    _check_free(model, overwrite)
    deltafmt.unpack(archive, model, base=base, jobs=jobs, overwrite=overwrite)
    return Converted(archive.name, "unpacked", *sizes)


def _check_free(destination: Path, overwrite: bool) -> None:
    if os.path.lexists(destination) and not overwrite:
        raise deltafmt.DestinationError(
            "the destination exists and is not what would be made",
            where=str(destination),
            hint="Choose another folder, or pass --overwrite",
        )


def is_whole(archive: Path, base: Path | None, against: Path | None = None) -> bool:
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
OVERWRITE = click.option(
    "--overwrite", is_flag=True, help="Replace a checkpoint or an archive in TARGET that is not what would be made."
)


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
@click.option(
    "--max-error", type=Number(0, 1, min_open=True, max_open=True), help="Largest relative error of a tensor (lossy)."
)
@click.option("--jobs", type=click.IntRange(min=1), help="Threads.")
@OVERWRITE
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
def pack(
    source: Path,
    target: Path,
    base: Path,
    method: str,
    rank: int | None,
    max_error: float | None,
    jobs: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Store every checkpoint in SOURCE as a small archive in TARGET, and the base once."""
    if rank is not None and max_error is not None:
        raise click.UsageError("--rank and --max-error exclude each other")
    lossy = method == "lowrank" or rank is not None or max_error is not None
    if method == "lossless" and lossy:
        raise click.UsageError("a lossy option contradicts the method lossless")
    options = {"method": "lowrank", "rank": rank, "max_error": max_error} if lossy else {}
    sys.exit(show(pack_folder(source, target, base, options, jobs, overwrite), as_json))


@main.command()
@click.argument("source", type=EXISTING)
@click.argument("target", type=FOLDER)
@click.option("--with-base", is_flag=True, help="Unpack the base too.")
@click.option("--jobs", type=click.IntRange(min=1), help="Threads.")
@OVERWRITE
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
def unpack(source: Path, target: Path, with_base: bool, jobs: int | None, overwrite: bool, as_json: bool) -> None:
    """Give every checkpoint in SOURCE back in TARGET."""
    sys.exit(show(unpack_folder(source, target, with_base, jobs, overwrite), as_json))


if __name__ == "__main__":
    main()
