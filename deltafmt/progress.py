"""Work as people see it on stderr: a progress bar, or lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Column

from .errors import printable
from .names import escaped
from .report import Progress


@contextmanager
def progress_bar(verb: str, *, log: bool = False, in_bytes: bool = True) -> Iterator[Progress]:
    """A progress bar on stderr that vanishes when the work is done; with `log`, each tensor's name stays above it. It
    counts bytes, or whatever it is."""
    console = Console(stderr=True, markup=False, highlight=False, emoji=False)  # names are shown as they are
    counts: tuple[ProgressColumn, ...] = (
        (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    )
    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=None, table_column=Column(ratio=2, min_width=8)),
        TaskProgressColumn("{task.percentage:>3.0f}%", markup=False),
        *counts,
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[what]}", style="dim", markup=False, table_column=Column(ratio=2, no_wrap=True)),
    )
    with RichProgress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task(verb, total=None, what="")
        room = max(12, console.width // 4)
        last = ""

        def advance(done: int, total: int, what: str) -> None:
            nonlocal last
            bar.update(task, completed=done, total=total)
            if not what or what == last:
                return
            last = what
            name = escaped(what)
            # Tensors are told apart by how their names end.
            bar.update(task, what=name if len(name) <= room else f"…{name[1 - room :]}")
            if log:
                console.print(name, style="dim", soft_wrap=True)

        yield advance


def progress_lines() -> Progress:
    """Progress as lines on stderr, one for each thing that is worked on."""
    last = ""

    def tell(done: int, total: int, what: str) -> None:
        nonlocal last
        if what and what != last:
            click.echo(f"deltafmt: {printable(what)}", err=True)
            last = what

    return tell
