"""What reports are printed with: numbers in words, tables, and how they get to stdout."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Column, Table

_PIPE_WIDTH = 4096
_PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}  # names are shown as they are


def size(nbytes: int) -> str:
    """Bytes to three digits, in powers of 1000: `999 B`, `45.3 kB`, `1.25 GB`."""
    amount, unit = float(nbytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 999.5 or unit == "TB":
            break
        amount /= 1000
    return f"{nbytes} B" if unit == "B" else f"{amount:.{2 if amount < 9.995 else 1 if amount < 99.95 else 0}f} {unit}"


def count(number: int, noun: str) -> str:
    """`1 tensor`, `2,000 tensors`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def new_facts(rows: Iterable[tuple[str, str]]) -> Table:
    """A line for each name and what there is to tell of it, if there is anything."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in rows:
        if fact:
            table.add_row(name, fact)
    return table


def new_table(*columns: Column) -> Table:
    """Without rows yet."""
    return Table(
        *columns, box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False, caption_justify="left"
    )


def number(header: str) -> Column:
    """A column of numbers."""
    return Column(header, justify="right", no_wrap=True)


def legend() -> Column:
    """A column that says in words what the row is."""
    return Column("", style="dim")


def put(parts: Iterable[RenderableType], *, for_people: bool = True) -> None:
    """Print parts to stdout, as its terminal takes them if there is one.

    What is not ``for_people`` is to be pasted elsewhere: the same everywhere, and without empty lines.
    """
    if for_people and sys.stdout.isatty():
        _print(Console(**_PLAIN), parts)
        return
    text = io.StringIO()  # no terminal: nothing is wrapped, coloured, or padded to its width
    _print(Console(**_PLAIN, file=text, width=_PIPE_WIDTH, color_system=None), parts)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    sys.stdout.writelines(f"{line}\n" for line in lines if line or for_people)  # rich puts an empty edge around it
    sys.stdout.flush()


def _print(console: Console, parts: Iterable[RenderableType]) -> None:
    for place, part in enumerate(parts):
        if place:
            console.print()
        console.print(part)
