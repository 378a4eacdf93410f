"""What the verbs report, as people see it: tables on stdout."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import singledispatch

from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from .names import escaped
from .printing import count, legend, new_facts, new_table, number, put, size
from .report import ExportReport, InspectReport, PackReport, Report, TensorReport, UnpackReport, VerifyReport

_LISTED = 10  # of a long list

_METHODS = {
    "raw": "as it was",
    "compressed": "compressed",
    "ref": "taken from another tensor",
    "base-ref": "taken from the base",
    "patch": "compressed difference to the base",
    "patch-layer": "compressed difference to another layer",
    "patch-lowrank": "exact low-rank factors, and what they miss",
    "patch-scaled": "the base's rows, scaled, and what that misses",
    "patch-decayed": "the base after weight decay, and what that misses",
    "patch-mixture": "a mixture of the bases, and what that misses",
    "lowrank": "low-rank factors",
}
_ROLES = {
    "base": "weights stored whole",
    "factors": "low-rank factors, scales, steps",
    "residual": "differences to a prediction",
    "layout": "headers of the original files",
    "sidecar": "other files, as they were",
    "manifest": "deltafmt.json",
    "overhead": "shard headers, padding",
}


def show(report: Report, *, tensors: bool = False) -> None:
    """Print a report to stdout; with ``tensors``, of an `InspectReport`, every tensor."""
    put(_tensor_list(report) if tensors and isinstance(report, InspectReport) else _parts(report))


@singledispatch
def _parts(report: Report) -> Iterator[RenderableType]:
    raise TypeError(f"no tables for {type(report).__name__}")


@_parts.register
def _(report: PackReport) -> Iterator[RenderableType]:
    facts = [
        ("input", f"{size(report.logical_bytes)}  {escaped(report.source)}"),
        ("archive", f"{size(report.stored_bytes)}  {escaped(report.destination)}"),
        ("ratio", _ratio_in_words(report)),
        ("values", _fidelity(report)),
        *(("base", f"{escaped(base)}{_needed(base, report)}") for base in report.bases),
        ("time", _time(report.logical_bytes, report.seconds)),
    ]
    yield new_facts(facts)
    yield from _method_table(report.tensors)
    yield _role_table(report.roles)
    yield from _worst(report.tensors)
    for name, found in report.non_finite.items():
        yield Text(f"{escaped(name)} stays lossless: {count(found, 'value')} not finite", style="yellow")
    for note in report.notes:
        yield Text(f"Note: {note}.", style="yellow")
    if report.dry_run:
        yield Text("Dry run: nothing was written.", style="bold yellow")


@_parts.register
def _(report: UnpackReport) -> Iterator[RenderableType]:
    yield new_facts(
        [
            ("archive", f"{size(report.stored_bytes)}  {escaped(report.source)}"),
            ("output", f"{size(report.written_bytes)}  {escaped(report.destination)}"),
            ("files", _listed(report.files)),
            ("values", _fidelity(report, checked=True)),
            ("time", _time(report.logical_bytes, report.seconds)),
        ]
    )


@_parts.register
def _(report: InspectReport) -> Iterator[RenderableType]:
    shards = count(report.shards, "shard")
    facts = [
        ("archive", f"{size(report.stored_bytes)}  {escaped(report.source)}"),
        ("holds", f"{size(report.logical_bytes)}  {count(len(report.tensors), 'tensor')}"),
        ("ratio", _ratio_in_words(report)),
        ("values", _fidelity(report)),
        ("ranks", _ranks(report.ranks)),
        ("format", f"deltafmt {report.version}, {shards}{_producer(report)}"),
    ]
    for name, base in report.bases.items():
        revision = f"@{base['revision']}" if base["revision"] else ""
        known = f"{base['repo']}{revision}" if base["repo"] else f"BASE, {count(base['tensors'], 'tensor')}"
        facts += [("base", f"{escaped(known)} (pass --base and its place)"), ("", f"{name}: {base['digest']}")]
    yield new_facts([*facts, ("files", _listed(report.files))])
    yield _role_table(report.roles)
    yield from _method_table(report.tensors)
    yield from _rank_table(report.ranks)
    yield from _sharing_table(report)
    yield from _worst(report.tensors)


@_parts.register
def _(report: VerifyReport) -> Iterator[RenderableType]:
    tensors = count(len(report.tensors), "tensor")
    rebuilt = f"{tensors} rebuilt, {_fidelity(report, checked=True)}"
    table = Table.grid(
        Column(no_wrap=True), Column(style="cyan", no_wrap=True), Column(overflow="fold"), padding=(0, 2)
    )
    ok = Text("OK", style="bold green")
    table.add_row(
        ok, "archive", f"{escaped(report.source)}: every stored byte is as it was ({size(report.stored_bytes)})"
    )
    if report.unchecked:
        rebuilt = f"{len(report.tensors) - len(report.unchecked):,} of {rebuilt}"
    if len(report.unchecked) < len(report.tensors):
        table.add_row(ok, "tensors", rebuilt)
    if report.unchecked:
        without = "the base" if len(report.bases_missing) == 1 else "the bases"
        missing = f"{count(len(report.unchecked), 'tensor')} could not be rebuilt without {without}: pass"
        named = " ".join(f"--base {escaped(repo or 'BASE')}" for repo in report.bases_missing.values())
        table.add_row(Text("NOT CHECKED", style="bold yellow"), "base", f"{missing} {named}")
    if report.against is not None:
        against = escaped(report.against)
        if report.equal:
            table.add_row(ok, "against", f"{against}: every tensor and file is the same, bit for bit")
        elif report.as_stated:
            told = f"{count(len(report.differences), 'tensor')} off by the error that the archive states"
            table.add_row(ok, "against", f"{against}: {told}, all else is the same")
        else:
            told = count(len(report.differences), "difference")
            table.add_row(Text("DIFFERENT", style="bold red"), "against", f"{against}: {told}")
    yield table
    if report.differences:
        yield _difference_table(report)


@_parts.register
def _(report: ExportReport) -> Iterator[RenderableType]:
    adapted = [tensor for tensor in report.tensors.values() if tensor.method != "left-out"]
    taken = sum(tensor.method == "factors" for tensor in adapted)
    yield new_facts(
        [
            ("archive", escaped(report.source)),
            ("adapter", f"{size(report.stored_bytes)}  {escaped(report.destination)} ({report.format})"),
            ("base", escaped(report.base or "")),
            (
                "rank",
                f"{report.rank}, {count(len(adapted), 'module')}: {taken} as stored, {len(adapted) - taken} fitted",
            ),
            ("lost", f"{report.loss:.3g} of the change, at most {report.max_rel_error:.3g} of a tensor's"),
            ("left out", count(len(report.left_out), "changed tensor") if report.left_out else ""),
            ("time", f"{report.seconds:.1f} s"),
        ]
    )
    if report.tensors:
        table = new_table(number("lost"), number("rank"), _name("what loses most"), legend())
        worst = sorted(report.tensors.items(), key=lambda item: -(item[1].rel_error or 0.0))
        for name, tensor in worst[:_LISTED]:
            left_out = report.left_out.get(name, "")
            table.add_row(f"{tensor.rel_error:.3g}", _or_blank(tensor.rank), escaped(name), left_out)
        yield table


# Their parts


def _needed(base: str, report: PackReport) -> str:
    if report.method == "repack":
        return "  (what was taken from it is stored: reading the archive does not take it)"
    return "" if base in report.bases_needed else "  (nothing of it was of use: reading the archive does not take it)"


def _name(header: str = "tensor") -> Column:
    return Column(header, overflow="fold", style="cyan")


def _method_table(tensors: dict[str, TensorReport]) -> Iterator[Table]:
    if not tensors:
        return
    groups: dict[str, list[TensorReport]] = defaultdict(list)
    for tensor in tensors.values():
        groups[tensor.method].append(tensor)
    table = new_table(
        Column("method", style="cyan"),
        number("tensors"),
        number("input"),
        number("stored"),
        number("ratio"),
        legend(),
    )
    for method, group in sorted(groups.items(), key=lambda item: -sum(tensor.logical_bytes for tensor in item[1])):
        table.add_row(method, *_totals(group), _METHODS.get(method, ""))
    if len(groups) > 1:
        table.add_section()
        table.add_row("all", *_totals(list(tensors.values())), "", style="bold")
    yield table


def _totals(group: Sequence[TensorReport]) -> tuple[str, str, str, str]:
    logical, stored = sum(tensor.logical_bytes for tensor in group), sum(tensor.stored_bytes for tensor in group)
    return f"{len(group):,}", size(logical), size(stored), _ratio(stored, logical)


def _role_table(roles: dict[str, int]) -> Table:
    total = sum(roles.values())
    table = new_table(Column("role", style="cyan"), number("stored"), number("share"), legend())
    for role, nbytes in sorted(roles.items(), key=lambda item: -item[1]):
        if nbytes:
            share = f"{100 * nbytes / total:.1f} %"
            table.add_row(role, size(nbytes), share, _ROLES.get(role, ""))
    return table


def _rank_table(ranks: dict[str, int]) -> Iterator[Table]:
    if not ranks:
        return
    table = new_table(number("rank"), number("tensors"))
    found = Counter(ranks.values()).most_common()
    for rank, tensors in sorted(found[:_LISTED]):
        table.add_row(str(rank), f"{tensors:,}")
    if len(found) > _LISTED:
        table.caption = f"and {len(found) - _LISTED} more"
    yield table


def _sharing_table(report: InspectReport) -> Iterator[RenderableType]:
    within = {name: to for name, to in report.sharing.items() if to in report.tensors}
    if not within:
        return
    table = new_table(_name(), Column("shares with", overflow="fold"), Column("by", style="dim"))
    for name, to in list(within.items())[:_LISTED]:
        table.add_row(escaped(name), escaped(to), report.tensors[name].method)
    if len(within) > _LISTED:
        table.caption = f"and {len(within) - _LISTED:,} more: --tensors lists them"
    yield table


def _worst(tensors: dict[str, TensorReport]) -> Iterator[Table]:
    """The lossy tensors with the largest errors."""
    lossy = sorted((item for item in tensors.items() if item[1].rel_error), key=lambda item: -(item[1].rel_error or 0))
    if not lossy:
        return
    table = new_table(_name("largest errors"), number("rank"), number("error"), number("ratio"))
    for name, tensor in lossy[:_LISTED]:
        ratio = _ratio(tensor.stored_bytes, tensor.logical_bytes)
        table.add_row(escaped(name), _or_blank(tensor.rank), _error(tensor.rel_error), ratio)
    if len(lossy) > _LISTED:
        table.caption = f"and {len(lossy) - _LISTED:,} more with smaller errors"
    yield table


def _difference_table(report: VerifyReport) -> Table:
    def badness(item: tuple[str, str]) -> float:
        """Another shape or file comes before any error, and an error that is no number as well."""
        tensor = report.tensors.get(item[0])
        error = tensor.rel_error if tensor is not None and "relative error" in item[1] else None
        return -error if error is not None and error == error else float("-inf")

    table = new_table(_name("tensor or file"), Column("difference", overflow="fold"))
    for name, difference in sorted(report.differences.items(), key=badness)[:_LISTED]:
        table.add_row(escaped(name), difference)
    if len(report.differences) > _LISTED:
        table.caption = f"and {len(report.differences) - _LISTED:,} more: --json lists all"
    return table


def _tensor_list(report: InspectReport) -> Iterator[Table]:
    lossy = any(tensor.rank is not None or tensor.rel_error for tensor in report.tensors.values())
    numbers = [number("input"), number("stored"), number("ratio")]
    columns = [_name(), Column("dtype"), Column("shape", no_wrap=True), Column("method"), *numbers]
    columns += [number("rank"), number("error")] if lossy else []
    columns += [Column("refers to", overflow="fold", style="dim")] if report.sharing else []
    table = new_table(*columns)
    for name, tensor in report.tensors.items():
        row = [escaped(name), tensor.dtype, " x ".join(map(str, tensor.shape)) or "scalar", tensor.method]
        row += _totals([tensor])[1:]
        row += [_or_blank(tensor.rank), _error(tensor.rel_error)] if lossy else []
        row += [escaped(report.sharing.get(name, ""))] if report.sharing else []
        table.add_row(*row)
    yield table


def _ratio(stored: int, logical: int) -> str:
    return f"{stored / logical:.3f}" if logical else ""


def _ratio_in_words(report: Report) -> str:
    percent = 100 * (1 - report.ratio)
    return f"{report.ratio:.3f}  {abs(percent):.1f} % {'saved' if percent >= 0 else 'larger than the input'}"


def _fidelity(report: Report, *, checked: bool = False) -> str:
    if report.exact:
        return f"exact: every tensor {'is' if checked else 'comes back'} equal to the original, bit for bit"
    if report.max_rel_error == 0:
        return "no error was measured, but not every tensor is the original bit for bit"
    return f"approximate: relative error at most {report.max_rel_error:.3g}"


def _time(nbytes: int, seconds: float) -> str:
    speed = f", {size(round(nbytes / seconds))}/s" if seconds > 0 else ""
    return f"{seconds:.1f} s{speed}" if seconds < 120 else f"{seconds / 60:.1f} min{speed}"


def _ranks(ranks: dict[str, int]) -> str:
    if not ranks:
        return ""
    found = sorted(ranks.values())
    return f"{found[0]} to {found[-1]}, median {statistics.median_low(found)}  {count(len(found), 'tensor')}"


def _producer(report: InspectReport) -> str:
    producer = report.annotations.get("producer")
    return f", written by {escaped(producer)}" if isinstance(producer, str) else ""


def _listed(names: Sequence[str]) -> str:
    shown = f"{len(names):,}: " + ", ".join(escaped(name) for name in names[:_LISTED])
    return shown + (f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else "")


def _or_blank(number: int | None) -> str:
    return "" if number is None else str(number)


def _error(error: float | None) -> str:
    return "" if error is None else "0" if error == 0 else f"{error:.2e}"
