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

_CHARACTER, _LINE = 8, 18
"""Of a picture's text, pixels: how wide a character is at most on average, and from line to line."""

_COLOURS = ("#1f6fb4", "#d9541e", "#2a9d55", "#8e4fb0", "#b08a1e", "#555555", "#c2397a", "#1aa3a3")


def read(file: Path) -> list[Record]:
    """The records of a file of JSON lines. A line that a killed process left half written is not one."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def summary(records: Sequence[Record]) -> list[Record]:
    """What was measured of each method, size, number of tokens and settings: mean and spread (standard deviation) over
    the seeds; None where nothing was measured, or for one seed."""
    return [
        {
            "label": name,
            **{key: value for key, value in group[0]["run"].items() if key != "seed"},
            "seeds": [record["run"]["seed"] for record in group],
            "settings": group[0]["settings"],
            "measured": _over_seeds([_measured(record) for record in group]),
        }
        for name, group in grouped(records)
    ]


def quality_table(rows: Sequence[Record]) -> list[dict[str, Cell]]:
    """Of a `summary`: how good models are, before training and after."""
    return [
        {
            "method": row["label"],
            "removed %": _text(row, "removed", 1, 100),
            "perplexity at first": _text(row, "perplexity_before", 1),
            "perplexity after": _text(row, "perplexity_after", 2),
            "accuracy kept %": _text(row, "accuracy_kept_after", 1, 100),
            "agreement % at first": _text(row, "agreement_before", 1, 100),
            "agreement % after": _text(row, "agreement_after", 1, 100),
            "KL at first": _text(row, "kl_before", 3),
            "KL after": _text(row, "kl_after", 3),
        }
        for row in rows
    ]


def size_table(rows: Sequence[Record]) -> list[dict[str, Cell]]:
    """Of a `summary`: how large the models are, packed and in memory, and how fast."""
    return [
        {
            "method": row["label"],
            "removed %": _text(row, "removed", 1, 100),
            "seeds": str(len(row["seeds"])),
            "parameters M": _text(row, "parameters", 2, 1e-6),
            "trained M": _text(row, "trainable", 2, 1e-6),
            "MB stored": _text(row, "stored_bytes", 1, 1e-6),
            "MB resident": _text(row, "resident_bytes", 1, 1e-6),
            "tokens/s": _text(row, "tokens_per_second", 0),
            "train s": _text(row, "train_seconds", 0),
        }
        for row in rows
    ]


def archive_table(rows: Sequence[Record]) -> list[dict[str, Cell]]:
    """Of a `summary`: sizes of a training's checkpoints, and how far the logits of what was packed are at most from the
    trained model's."""
    return [
        {
            "method": row["label"],
            "removed %": _text(row, "removed", 1, 100),
            "MB a step": _text(row, "step_bytes", 1, 1e-6),
            "MB to resume": _text(row, "state_bytes", 1, 1e-6),
            "MB frozen": _text(row, "frozen_bytes", 1, 1e-6),
            "logits off fused": _text(row, "logits_off_fused", 4),
            "off full": _text(row, "logits_off_full", 4),
            "off unpacked": _text(row, "logits_off_unpacked", 4),
        }
        for row in rows
        if row["measured"]["step_bytes"]["mean"] is not None
    ]


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


def grouped(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Records that differ by their seed only (of a seed that was run twice, the last), by a name that tells them from
    the others but for how much is removed: the method, its structure if it has one, and what others have otherwise."""
    groups: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in records:
        rest = {name: value for name, value in record["run"].items() if name != "seed"}
        groups[json.dumps([rest, record["settings"]], sort_keys=True)][record["run"]["seed"]] = record
    found = sorted((list(group.values()) for group in groups.values()), key=lambda group: _order(group[0]["run"]))
    several = [name for name in ("model", "tokens") if len({record["run"][name] for record in records}) > 1]
    varied = _varied(records)
    return [(_label(group[0], several, varied), group) for group in found]


def _label(record: Record, several: Sequence[str], varied: Sequence[str]) -> str:
    run, settings = record["run"], record["settings"]
    facts = [str(run["model"])] if "model" in several else []
    facts += [run["structure"]] if run["structure"] else []
    facts += [f"{run['tokens'] / 1e6:g} M tokens"] if "tokens" in several else []
    told = ("layout", "parts") if run["structure"] else ()  # by the structure
    facts += [f"{name} {settings[name]}" for name in varied if name in settings and name not in told]
    return f"{run['method']} ({', '.join(facts)})" if facts else str(run["method"])


def quality_picture(records: Sequence[Record]) -> str:
    """Perplexity over size, one curve per method and number of tokens, as SVG; the whole model's is a dashed line."""
    curves: dict[str, Curve] = defaultdict(list)
    for name, group in grouped(records):
        values = [record["trained"]["perplexity"] for record in group]
        removed = statistics.fmean(record["removed"] for record in group)
        spread = (max(values) - min(values)) / 2
        curves[name].append((100 * (1 - removed), statistics.fmean(values), spread))
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
    left, top, bottom = 70, 20, 50
    right = 60 + _CHARACTER * max([len(name) for name in curves], default=0)
    width = left + 560 + right
    height = max(520, top + 40 + _LINE * len(curves))
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
        lines.append(f'<text x="{end - 4}" y="{y_at(level) - 5:.1f}" text-anchor="end">original</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        dashes = f' stroke-dasharray="{8 - 2 * again} 3"' if (again := min(3, number // len(_COLOURS))) else ""
        shown = sorted((x, y, spread) for x, y, spread in curve if math.isfinite(y) and y > 0)
        path = "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y, _ in shown)
        if shown:
            lines.append(f'<path d="M{path}" stroke="{colour}" stroke-width="1.8" fill="none"{dashes}/>')
        for x, y, spread in shown if marks else []:
            low, high = y_at(max(y - spread, y / 2)), y_at(y + spread)
            lines.append(f'<circle cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3.5" fill="{colour}"/>')
            lines.append(f'<path d="M{x_at(x):.1f} {low:.1f}V{high:.1f}" stroke="{colour}" stroke-width="1.5"/>')
        row = top + 20 + _LINE * number
        lines.append(f'<path d="M{end + 12} {row - 4}h18" stroke="{colour}" stroke-width="2.5"{dashes}/>')
        lines.append(f'<text x="{end + 36}" y="{row}">{escape(name)}</text>')
    return "\n".join([*lines, "</svg>\n"])


def _varied(records: Sequence[Record]) -> list[str]:
    """The settings that not all records have in common."""
    names = dict.fromkeys(name for record in records for name in record["settings"])
    return [name for name in names if len({repr(record["settings"].get(name)) for record in records}) > 1]


def _order(run: Record) -> tuple[Any, ...]:
    return run["model"], run["remove"], run["tokens"], run["method"], run["structure"]


def _measured(record: Record) -> dict[str, float | None]:
    """One run's results by name. What records of older versions have not is None."""
    original, checkpoint, off = record["original"], record.get("checkpoint", {}), record.get("logits_off", {})
    found = {name: record.get(name) for name in ("removed", "parameters", "trainable", "plain_bytes", "stored_bytes")}
    found |= {name: record.get(name) for name in ("resident_bytes", "train_seconds")}
    found |= {name: checkpoint.get(name) for name in ("step_bytes", "state_bytes", "frozen_bytes")}
    found |= {f"logits_off_{way}": off.get(way) for way in ("fused", "full", "unpacked")}
    for when, scores in (("before", record["initial"]), ("after", record["trained"]), ("packed", record["packed"])):
        found |= {f"{name}_{when}": scores[name] for name in ("perplexity", "accuracy", "agreement", "kl")}
        found[f"accuracy_kept_{when}"] = scores["accuracy"] / original["accuracy"] if original["accuracy"] else None
    return found | {"tokens_per_second": record["packed"]["tokens_per_second"]}


def _over_seeds(found: Sequence[dict[str, float | None]]) -> dict[str, dict[str, float | None]]:
    result: dict[str, dict[str, float | None]] = {}
    for name in found[0]:
        values = [value for each in found if (value := each[name]) is not None]
        result[name] = {
            "mean": statistics.fmean(values) if values else None,
            "spread": statistics.stdev(values) if len(values) > 1 else None,
        }
    return result


def _text(row: Record, name: str, digits: int, factor: float = 1.0) -> str:
    """Mean and spread, times a factor, with so many digits after the point."""
    mean, spread = row["measured"][name]["mean"], row["measured"][name]["spread"]
    if mean is None:
        return ""
    text = f"{mean * factor:,.{digits}f}"
    return text if not spread else f"{text} ± {spread * factor:,.{digits}f}"


def _widened(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.05 or 1.0
    return low - room, high + room
