"""What a user may write on the command line: the types of values, and the options that commands have in common."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any, TypeVar

import click

from .limits import DEFAULT_LIMITS, Limits
from .methods.sharing import parse_layout
from .names import BASE_ID
from .outcome import json_text
from .report import EvalReport, Progress, Report, silent
from .sources import Bases

_Function = TypeVar("_Function", bound=Callable[..., Any])

_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?) ?(B|(?:[KMGT]i?)B)?", re.IGNORECASE | re.ASCII)
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(text: str) -> int:
    """Bytes, at least one, of `500MB`, `2GiB`, `1.5GB` or `4096`. A bare `500M` is refused: it may mean either."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise click.BadParameter(
            f"{text!r} is not a size. Write bytes, or a number with kB, MB, GB, TB (powers of 1000) "
            "or KiB, MiB, GiB, TiB (powers of 1024): 500MB, 2GiB, 1.5GB"
        )
    prefix = (found[2] or "").upper().removesuffix("B")
    unit = _BINARY[prefix[0]] if prefix.endswith("I") else _DECIMAL[prefix]
    nbytes = int(Decimal(found[1]) * unit)
    if nbytes < 1:
        raise click.BadParameter(f"{text!r} is less than one byte")
    return nbytes


def model(text: str) -> str:
    """A path or Hub id. An empty one, which a script's unset variable leaves, would be the current directory."""
    if not text:
        raise click.BadParameter("it is empty")
    return text


def layout(text: str) -> str:
    """Which layers share an anchor layer: the text itself, once it is known to make sense."""
    try:
        parse_layout(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return text


def limit(text: str) -> tuple[str, int]:
    """`NAME=VALUE`: the name of a limit and what it is to be; sizes may have units."""
    name, equals, value = text.partition("=")
    known = [field.name for field in fields(Limits)]
    if not equals or name not in known:
        raise click.BadParameter(f"{text!r} is not NAME=VALUE with NAME one of {', '.join(known)}")
    return name, size(value)


class Number(click.FloatRange):
    """A finite number in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number. Neither `nan` nor `inf` is one."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


@dataclass
class Settings:
    """What is common to all commands."""

    limits: Limits = DEFAULT_LIMITS
    quiet: bool = False
    verbose: bool = False
    json: bool = False

    def progress(self, verb: str, *, in_bytes: bool = True) -> AbstractContextManager[Progress]:
        """A progress bar on a terminal; else a line per tensor if the user wants to hear it, and silence if not."""
        terminal = sys.stderr.isatty()
        if self.quiet or not (terminal or self.verbose):
            return nullcontext(silent)
        from .progress import progress_bar, progress_lines

        return progress_bar(verb, log=self.verbose, in_bytes=in_bytes) if terminal else nullcontext(progress_lines())

    def show(self, report: Report | EvalReport, **options: Any) -> None:
        """Print a report: one JSON object, or tables."""
        if self.json:
            click.echo(json_text(report.as_dict()))
        elif not self.quiet:
            from . import scores, tables

            if isinstance(report, EvalReport):
                scores.show(report, **options)
            else:
                tables.show(report, **options)


def _flag(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            setattr(ctx.ensure_object(Settings), name, True)

    return remember


def _change_limits(ctx: click.Context, param: click.Parameter, value: Sequence[tuple[str, int]]) -> None:
    settings = ctx.ensure_object(Settings)
    settings.limits = settings.limits.raised(**dict(value))


LIMIT = click.option(
    "--limit",
    type=limit,
    metavar="NAME=VALUE",
    multiple=True,
    expose_value=False,
    callback=_change_limits,
    help="Change a cap on what a file may hold, e.g. tensor_bytes=1TiB. Repeatable.",
)
QUIET = click.option(
    "-q", "--quiet", is_flag=True, expose_value=False, callback=_flag("quiet"), help="Print errors only (and --json)."
)
VERBOSE = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_flag("verbose"),
    help="Name each tensor as it is worked on; show the traceback of an error.",
)
_JSON = click.option(
    "--json",
    is_flag=True,
    expose_value=False,
    callback=_flag("json"),
    help="Print one JSON object to stdout, and nothing else; errors too.",
)
JOBS = click.option(
    "--jobs", type=click.IntRange(min=1), metavar="N", show_default="one per processor", help="Threads."
)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace DST if it holds a checkpoint or an archive.")


def bases(told: str, option: str = "--base") -> Callable[[_Function], _Function]:
    """The option --base of what reads an archive: of one base, or of each."""
    return click.option(
        option,
        type=model,
        metavar="BASE",
        multiple=True,
        callback=_collected_bases,
        help=f"{told} Repeatable, in any order; ID=BASE says which it is.",
    )


def _collected_bases(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> Bases:
    """The bases as they were given; by id, if they have ids. What exists is a path, whatever it looks like."""
    named: dict[str, str] = {}
    for value in values:
        name, equals, base = value.partition("=")
        if not equals or not BASE_ID.fullmatch(name) or os.path.exists(value):
            continue
        if name in named:
            raise click.BadParameter(f"two bases have the id {name!r}")
        named[name] = model(base)
    if named and len(named) < len(values):
        raise click.BadParameter("some have an id and others have none. Write ID=BASE for all of them, or for none")
    return named or list(values)


def common(function: _Function) -> _Function:
    """The options that every command has, at the end of its help."""
    return _JSON(LIMIT(QUIET(VERBOSE(function))))
