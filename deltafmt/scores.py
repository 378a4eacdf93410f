"""What `eval` measured, as people see it: tables on stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich import box
from rich.table import Column, Table

from .names import escaped
from .printing import count, legend, new_facts, new_table, number, put, size
from .report import EvalReport, Score

_SCORES: tuple[tuple[str, Callable[[Score], str], str], ...] = (
    ("perplexity", lambda score: f"{score.perplexity:,.3f}", "lower is better, 1 is perfect"),
    ("accuracy", lambda score: _percent(score.accuracy), "the likeliest next token is the right one"),
    ("agreement", lambda score: _percent(score.agreement), "the likeliest next token is that of --against"),
    ("KL", lambda score: "" if score.kl is None else f"{score.kl:.3g}", "nats per token away from --against"),
    ("parameters", lambda score: f"{score.parameters:,}", "numbers it computes with"),
    ("stored", lambda score: size(score.stored_bytes), "all files, without bases"),
    ("resident", lambda score: size(score.resident_bytes), "weights in memory"),
    ("tokens/s", lambda score: f"{score.tokens_per_second:,.0f}", "through the model, on this machine"),
)
"""What is shown of a model: name, text, and what it means."""


def show(report: EvalReport, *, markdown: bool = False) -> None:
    """Print a report to stdout; with ``markdown``, one table with a row per model, to be pasted elsewhere."""
    put([_markdown(report)] if markdown else _tables(report), for_people=not markdown)


def _tables(report: EvalReport) -> Iterator[Table]:
    named = _named(report)
    facts = [("text", f"{escaped(report.text)}: {count(report.tokens, 'token')} predicted")]
    facts += [("windows", f"{report.length} tokens, {report.batch} at once, on {report.device}")]
    for role, score in named:
        facts += [(role, f"{escaped(score.model)}  ({score.mode}, {score.dtype})")]
        facts += [("base", escaped(base)) for base in score.bases]
    yield new_facts([*facts, ("time", f"{report.seconds:.1f} s")])
    table = new_table(Column("", style="cyan"), *(number(role) for role, _ in named), legend())
    for name, text, told in _SCORES:
        if any(cells := [text(score) for _, score in named]):
            table.add_row(name, *cells, told)
    yield table


def _markdown(report: EvalReport) -> Table:
    scores = [score for _, score in _named(report)]
    shown = [(name, text) for name, text, _ in _SCORES if any(text(score) for score in scores)]
    table = Table("model", *(number(name) for name, _ in shown), box=box.MARKDOWN)
    for score in scores:
        name = escaped(score.model).replace("|", r"\|")  # a bare pipe would end the cell
        table.add_row(name, *(text(score) for _, text in shown))
    return table


def _named(report: EvalReport) -> list[tuple[str, Score]]:
    """The models that were measured, by their roles."""
    return [("model", report.model), *([("against", report.against)] if report.against else [])]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"
