"""What the benchmarks share: timing in turns, and a report that is markdown for people and JSON for machines."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Cell = str | int | float | None


@dataclass(frozen=True)
class Timed:
    """Something to time: `run` gets the arguments that `prepare` makes anew each time; preparing is not timed."""

    run: Callable[..., object]
    prepare: Callable[[], tuple[Any, ...]] = tuple


def in_turns(timed: Mapping[str, Timed], repeats: int = 5) -> dict[str, float]:
    """Median seconds of each, run in turns (A B C A B C ...) so that a noisy machine is noisy for all of them alike.

    Each is run once before, untimed: what is measured is warm.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(repeats + 1):
        for name, subject in timed.items():
            arguments = subject.prepare()
            gc.collect()
            begin = time.perf_counter()
            subject.run(*arguments)
            elapsed = time.perf_counter() - begin
            if turn:
                seconds[name].append(elapsed)
    return {name: statistics.median(times) for name, times in seconds.items()}


@dataclass
class Report:
    """Tables, printed as they come unless they are wanted as JSON at the end."""

    as_json: bool = False
    tables: dict[str, list[dict[str, Cell]]] = field(default_factory=dict)

    def table(self, title: str, rows: Sequence[dict[str, Cell]], note: str = "") -> None:
        """Add a table; all `rows` have the same keys, which are its head."""
        self.tables[title] = list(rows)
        if not self.as_json:
            print(f"\n## {title}\n\n{markdown(rows)}" + (f"\n\n{note}" if note else ""), flush=True)

    def finish(self) -> None:
        """Print the JSON, if that is what was asked for."""
        if self.as_json:
            print(json.dumps(self.tables, indent=2))


def cells(rows: Sequence[dict[str, Cell]]) -> list[list[str]]:
    """What a table says, its head first; numbers with four significant digits."""
    head = list(rows[0])
    return [head] + [[_cell(row[key]) for key in head] for row in rows]


def markdown(rows: Sequence[dict[str, Cell]]) -> str:
    """A markdown table, columns aligned."""
    table = cells(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [" | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in table]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value
