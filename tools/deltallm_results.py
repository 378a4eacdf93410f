"""What `tools/deltallm.py` has measured, as tables and as a picture."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from xml.sax.saxutils import escape

from measure import Cell

Record: TypeAlias = dict[str, Any]
Curve: TypeAlias = list[tuple[float, float, float]]
"""Points: x, y, and how far y spreads to either side."""

_COLOURS = ("#1f6fb4", "#d9541e", "#2a9d55", "#8e4fb0", "#b08a1e", "#555555", "#c2397a", "#1aa3a3")


def read(file: Path) -> list[Record]:
    """The records of a file of JSON lines. A line that a killed process left half written is not one."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def table(records: Sequence[Record]) -> list[dict[str, Cell]]:
    """A row for each method, size and number of tokens: means over seeds, and how far the perplexity spreads."""
    rows: list[dict[str, Cell]] = []
    varied = _varied(records)
    for group in _grouped(records):
        first, original = group[0], group[0]["original"]
        trained, initial = ([record[when] for record in group] for when in ("trained", "initial"))
        rows.append(
            {
                "method": label(first, varied),
                "removed": f"{_mean(group, 'removed'):.1%}",
                "parameters": round(_mean(group, "parameters")),
                "trained on": first["run"]["tokens"],
                "trainable": round(_mean(group, "trainable")),
                "seeds": len(group),
                "perplexity at first": _mean(initial, "perplexity"),
                "after training": _spread([scores["perplexity"] for scores in trained]),
                "beside original": f"{_mean(trained, 'perplexity') / original['perplexity']:.3f}",
                "accuracy kept": f"{_mean(trained, 'accuracy') / original['accuracy']:.1%}",
                "agreement": f"{_mean(trained, 'agreement'):.1%}",
                "KL": _mean(trained, "kl"),
                "MB in 16 bits": _mean(group, "plain_bytes") / 1e6,
                "MB stored": _mean(group, "stored_bytes") / 1e6,
                "MB resident": _mean(group, "resident_bytes") / 1e6,
                "tokens/s": round(_mean([record["packed"] for record in group], "tokens_per_second")),
                "packed, fused": _mean([record["packed"] for record in group], "perplexity"),
                "train s": round(_mean(group, "train_seconds")),
            }
        )
    return rows


def originals(records: Sequence[Record]) -> list[dict[str, Cell]]:
    """A row for each original model."""
    rows: dict[str, dict[str, Cell]] = {}
    for record in records:
        original = record["original"]
        rows[record["run"]["model"]] = {
            "model": record["run"]["model"],
            "parameters": original["parameters"],
            "perplexity": original["perplexity"],
            "accuracy": f"{original['accuracy']:.1%}",
            "MB in 16 bits": original["plain_bytes"] / 1e6,
            "MB stored": original["stored_bytes"] / 1e6,
            "tokens/s": round(original["tokens_per_second"]),
            "device": record["device"],
        }
    return list(rows.values())


def label(record: Record, varied: Sequence[str] = ()) -> str:
    """The method, its structure if it has one, and settings that other records have otherwise."""
    run = record["run"]
    facts = [run["structure"]] if run["structure"] else []
    facts += [f"{name} {record['settings'].get(name)}" for name in varied]
    return f"{run['method']} ({', '.join(facts)})" if facts else str(run["method"])


def quality_picture(records: Sequence[Record]) -> str:
    """Perplexity over size, one curve per method and number of tokens, as SVG; the whole model's is a dashed line."""
    curves: dict[str, Curve] = defaultdict(list)
    several = len({record["run"]["tokens"] for record in records}) > 1
    varied = _varied(records)
    for group in _grouped(records):
        tokens = group[0]["run"]["tokens"]
        name = label(group[0], varied) + (f", {tokens / 1e6:g} M tokens" if several else "")
        values = [record["trained"]["perplexity"] for record in group]
        spread = (max(values) - min(values)) / 2
        curves[name].append((100 * (1 - _mean(group, "removed")), statistics.mean(values), spread))
    original = records[0]["original"]["perplexity"]
    return chart(curves, "parameters, % of the original's", "perplexity on held-out text", level=original)


def loss_picture(logs: Mapping[str, Sequence[Record]], key: str = "loss") -> str:
    """The loss over the tokens of each run, as SVG."""
    curves: dict[str, Curve] = {}
    for name, lines in logs.items():
        points = [(line["tokens"] / 1e6, line[key], 0.0) for line in lines if line.get(key) is not None]
        if points:
            curves[name] = points
    return chart(curves, "million tokens", key, marks=False)


def chart(
    curves: Mapping[str, Curve], x_title: str, y_title: str, *, level: float | None = None, marks: bool = True
) -> str:
    """Curves as an SVG document; y is logarithmic."""
    width, height, left, top, right, bottom = 900, 520, 70, 20, 270, 50
    points = [point for curve in curves.values() for point in curve if math.isfinite(point[1]) and point[1] > 0]
    xs = [x for x, _, _ in points] or [0.0]
    ys = [y for _, y, _ in points] + ([level] if level else []) or [1.0]
    x_low, x_high = _widened(min(xs), max(xs))
    y_low, y_high = (math.log(value) for value in (min(ys) / 1.06, max(ys) * 1.06))

    def x_at(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def y_at(y: float) -> float:
        return height - bottom - (math.log(y) - y_low) / (y_high - y_low) * (height - top - bottom)

    end = width - right
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{left} {top}V{height - bottom}H{end}" stroke="black" fill="none"/>',
        f'<text x="{(left + end) / 2}" y="{height - 12}" text-anchor="middle">{escape(x_title)}</text>',
        f'<text transform="translate(16 {(top + height - bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_title)}</text>",
    ]
    for step in range(6):
        x, y = x_low + (x_high - x_low) * step / 5, math.exp(y_low + (y_high - y_low) * step / 5)
        lines.append(f'<text x="{x_at(x):.1f}" y="{height - bottom + 18}" text-anchor="middle">{x:.3g}</text>')
        lines.append(f'<text x="{left - 8}" y="{y_at(y) + 4:.1f}" text-anchor="end">{y:.3g}</text>')
        lines.append(f'<path d="M{left} {y_at(y):.1f}H{end}" stroke="#dddddd"/>')
    if level:
        lines.append(f'<path d="M{left} {y_at(level):.1f}H{end}" stroke="black" stroke-dasharray="5 4"/>')
        lines.append(f'<text x="{end + 12}" y="{y_at(level) + 4:.1f}">original</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        shown = sorted((x, y, spread) for x, y, spread in curve if math.isfinite(y) and y > 0)
        path = "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y, _ in shown)
        if shown:
            lines.append(f'<path d="M{path}" stroke="{colour}" stroke-width="1.8" fill="none"/>')
        for x, y, spread in shown if marks else []:
            low, high = y_at(max(y - spread, y / 2)), y_at(y + spread)
            lines.append(f'<circle cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3.5" fill="{colour}"/>')
            lines.append(f'<path d="M{x_at(x):.1f} {low:.1f}V{high:.1f}" stroke="{colour}" stroke-width="1.5"/>')
        row = top + 40 + 18 * number
        lines.append(f'<path d="M{end + 12} {row - 4}h18" stroke="{colour}" stroke-width="2.5"/>')
        lines.append(f'<text x="{end + 36}" y="{row}">{escape(name)}</text>')
    return "\n".join([*lines, "</svg>\n"])


def _varied(records: Sequence[Record]) -> list[str]:
    """The settings that not all records have in common."""
    names = dict.fromkeys(name for record in records for name in record["settings"])
    return [name for name in names if len({repr(record["settings"].get(name)) for record in records}) > 1]


def _grouped(records: Sequence[Record]) -> list[list[Record]]:
    """Records that differ by their seed only; of a seed that was run twice, the last."""
    groups: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in records:
        rest = {name: value for name, value in record["run"].items() if name != "seed"}
        groups[json.dumps([rest, record["settings"]], sort_keys=True)][record["run"]["seed"]] = record
    return sorted((list(group.values()) for group in groups.values()), key=lambda group: _order(group[0]["run"]))


def _order(run: Record) -> tuple[Any, ...]:
    return run["model"], run["remove"], run["tokens"], run["method"], run["structure"]


def _mean(records: Sequence[Record], key: str) -> float:
    return statistics.fmean(record[key] for record in records)


def _spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _widened(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.05 or 1.0
    return low - room, high + room
