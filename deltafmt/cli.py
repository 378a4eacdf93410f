"""The command line: arguments, progress and exit codes. The work is in the four verbs, what they show is in `tables`.

Data goes to stdout, everything else to stderr. Exit codes: 0 ok, 1 I/O, 2 usage, 3 malformed, 4 unsupported,
5 integrity, 6 wrong base (`errors`), and 128 + the number of a signal that ended the work.
"""

from __future__ import annotations

import io
import json
import math
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from decimal import Decimal
from types import FrameType
from typing import Any, NoReturn, TypeVar

import click

from .errors import AccessError, DeltafmtError, IntegrityError, UsageError
from .inspect import inspect
from .limits import DEFAULT_LIMITS, Limits
from .methods.sharing import Parts, parse_layout
from .pack import METHODS, pack
from .report import Progress, Report, silent
from .unpack import unpack
from .verify import verify
from .version import __version__

_Function = TypeVar("_Function", bound=Callable[..., Any])

_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?) ?(B|(?:[KMGT]i?)B)?", re.IGNORECASE | re.ASCII)
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


# What a user may write


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

    def progress(self, verb: str) -> AbstractContextManager[Progress]:
        """A progress bar on a terminal; else a line per tensor if the user wants to hear it, and silence if not."""
        if not self.quiet and sys.stderr.isatty():
            from .tables import progress_bar

            return progress_bar(verb, log=self.verbose)
        return nullcontext(_log() if self.verbose and not self.quiet else silent)

    def show(self, report: Report, **options: Any) -> None:
        """Print a report: one JSON object, or tables."""
        if self.json:
            click.echo(_as_json(report.as_dict()))
        elif not self.quiet:
            from .tables import show

            show(report, **options)


def _log() -> Progress:
    """Progress as lines on stderr, one for each thing that is worked on."""
    last = ""

    def tell(done: int, total: int, what: str) -> None:
        nonlocal last
        if what and what != last:
            click.echo(f"deltafmt: {_printable(what)}", err=True)
            last = what

    return tell


def _flag(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            setattr(ctx.ensure_object(Settings), name, True)

    return remember


def _change_limits(ctx: click.Context, param: click.Parameter, value: Sequence[tuple[str, int]]) -> None:
    settings = ctx.ensure_object(Settings)
    settings.limits = settings.limits.raised(**dict(value))


_LIMIT = click.option(
    "--limit",
    type=limit,
    metavar="NAME=VALUE",
    multiple=True,
    expose_value=False,
    callback=_change_limits,
    help="Change a cap on what a file may hold, e.g. tensor_bytes=1TiB. Repeatable.",
)
_QUIET = click.option(
    "-q", "--quiet", is_flag=True, expose_value=False, callback=_flag("quiet"), help="Print errors only (and --json)."
)
_VERBOSE = click.option(
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
_JOBS = click.option(
    "--jobs", type=click.IntRange(min=1), metavar="N", show_default="one per processor", help="Threads."
)
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace DST if it holds a checkpoint or an archive.")


def _common(function: _Function) -> _Function:
    """The options that every command has, at the end of its help."""
    return _JSON(_LIMIT(_QUIET(_VERBOSE(function))))


# The commands


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
    epilog="""\b
    Examples:
      deltafmt pack finetune/ packed/ --base base/     a fine-tune as its difference to a base, bit for bit
      deltafmt verify packed/ --base base/             check every byte
      deltafmt unpack packed/ restored/ --base base/   the same files as before
      deltafmt pack --help                             the lossy options, with examples
    """,
)
@click.version_option(__version__, prog_name="deltafmt", message="%(prog)s %(version)s")
@_LIMIT
@_QUIET
@_VERBOSE
@click.pass_context
def program(ctx: click.Context) -> None:
    """Store shared model weights once, and only what differs for the rest.

    deltafmt packs a Hugging Face checkpoint into an archive: a directory with the weights compressed, identical tensors
    stored once, and those of a fine-tune as their difference to a base model. Unless a lossy option is given, every
    file comes back byte for byte.

    A model is named by a directory (safetensors, sharded or not; .bin and .pt need the extra 'torch'), a weight file,
    an archive, or a Hub id such as org/name or org/name@revision (needs the extra 'hub').

    \b
    Exit codes: 0 ok, 1 input or output failed, 2 usage, 3 malformed archive, 4 unsupported,
    5 damaged or different data, 6 wrong base.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(UsageError.exit_code)


@program.command("pack", short_help="Pack a checkpoint into an archive.")
@click.argument("src")
@click.argument("dst")
@click.option("--base", metavar="BASE", help="The model that SRC was made from; only the difference is stored.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="auto",
    help="auto is lowrank if a lossy option is given, and lossless if not.",
)
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Lossy: keep N components of each tensor.")
@click.option(
    "--energy",
    type=Number(0, 1, min_open=True),
    metavar="F",
    help="Lossy: keep this share of each difference's squared norm, e.g. 0.99.",
)
@click.option(
    "--max-error",
    type=Number(0, 1, min_open=True, max_open=True),
    metavar="F",
    help="Lossy: keep as few components as leave each tensor's relative error at most F, e.g. 0.01.",
)
@click.option(
    "--target-size",
    type=size,
    metavar="SIZE",
    help="Lossy: bytes of the whole archive, spent where they lower the error most. SIZE is 500MB, 2GiB, 1.5GB.",
)
@click.option(
    "--share",
    type=layout,
    metavar="LAYOUT",
    help="Lossy: layers of SRC share the weights of an anchor layer; see above.",
)
@click.option(
    "--share-parts", type=click.Choice(["mlp", "attention", "both"]), default="both", help="What layers share."
)
@click.option(
    "--include", metavar="GLOB", multiple=True, help="Only tensors of these names may lose anything. Repeatable."
)
@click.option("--exclude", metavar="GLOB", multiple=True, help="Tensors of these names stay lossless. Repeatable.")
@click.option("--force", is_flag=True, help="Share layers even if they are not alike.")
@_JOBS
@_OVERWRITE
@click.option("--dry-run", is_flag=True, help="Do all the work and report the sizes, but write nothing.")
@_common
@click.pass_obj
def pack_command(settings: Settings, /, src: str, dst: str, share_parts: Parts, **options: Any) -> None:
    """Pack the checkpoint SRC into an archive, the new directory DST.

    Lossless by default: each tensor is stored as a reference to an identical one, as a patch to the same tensor of the
    base, compressed, or as it is, whichever is smallest. DST appears once all of it is written, or not at all.

    \b
    Lossy packing keeps low-rank factors of
      the difference to a base    --base BASE with --rank, --energy, --max-error or --target-size
      layers to an anchor layer   --share LAYOUT, for models whose layers were trained to be alike
      the weights themselves      neither; where it pays
    and what does not pay stays lossless. The error of each tensor is measured and stored.

    \b
    LAYOUT is one of
      sequential:K   one anchor layer, then K layers that share it, and so on
      alternating    every other layer shares the one before it (sequential:1)
      5:4,6:4        layers 5 and 6 share layer 4
    The first two and the last two layers are left as they are, unless named.

    \b
    Examples:
      deltafmt pack model/ packed/
      deltafmt pack finetune/ packed/ --base org/base-model
      deltafmt pack finetune/ packed/ --base base/ --rank 64 --exclude '*embed*'
      deltafmt pack finetune/ packed/ --base base/ --target-size 1.5GB
      deltafmt pack model/ packed/ --share sequential:2 --share-parts mlp --max-error 0.02 --dry-run
    """
    with settings.progress("packing") as progress:
        report = pack(src, dst, share_parts=share_parts, progress=progress, limits=settings.limits, **options)
    settings.show(report)


@program.command("unpack", short_help="Unpack an archive into a plain checkpoint.")
@click.argument("src")
@click.argument("dst")
@click.option("--base", metavar="BASE", help="The base that SRC was packed against, if it was.")
@click.option("--dtype", metavar="T", help="Cast float tensors to bfloat16, float16, float32 or float64.")
@click.option(
    "--max-shard-size",
    type=size,
    metavar="SIZE",
    help="Write new weight files of at most this size. SIZE is 500MB, 2GiB, 1.5GB.",
)
@_JOBS
@_OVERWRITE
@_common
@click.pass_obj
def unpack_command(settings: Settings, /, src: str, dst: str, **options: Any) -> None:
    """Unpack the archive SRC into a plain Hugging Face checkpoint, the new directory DST.

    Tensor names, dtypes, weight files and all other files are those of the checkpoint that was packed; of a lossless
    archive they are the same byte for byte. Every tensor is checked before DST appears.

    \b
    Examples:
      deltafmt unpack packed/ restored/
      deltafmt unpack packed/ restored/ --base org/base-model
      deltafmt unpack packed/ restored/ --dtype float16 --max-shard-size 2GB
    """
    with settings.progress("unpacking") as progress:
        report = unpack(src, dst, progress=progress, limits=settings.limits, **options)
    settings.show(report)


@program.command("inspect", short_help="Show what is inside an archive.")
@click.argument("src")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@_common
@click.pass_obj
def inspect_command(settings: Settings, /, src: str, tensors: bool) -> None:
    """Show what is inside the archive SRC: sizes, ranks, what shares with what, the base it needs, the files.

    Neither the base nor any tensor is read.

    \b
    Examples:
      deltafmt inspect packed/
      deltafmt inspect packed/ --tensors
      deltafmt inspect packed/ --json | jq .roles
    """
    settings.quiet = False  # what it prints is all that it does
    settings.show(inspect(src, limits=settings.limits), tensors=tensors)


@program.command("verify", short_help="Check an archive, or compare it with a checkpoint.")
@click.argument("src")
@click.option("--base", metavar="BASE", help="The base that SRC was packed against. Without it, the rest is checked.")
@click.option("--against", metavar="CHECKPOINT", help="Compare with this model, tensor by tensor and file by file.")
@_common
@click.pass_context
def verify_command(ctx: click.Context, src: str, base: str | None, against: str | None) -> None:
    """Check every byte of the archive SRC and rebuild every tensor.

    With --against, prove that the archive is equal to a checkpoint, or say what differs (exit code 5). A lossy archive
    passes if each tensor differs by the error that the archive states, and all other tensors and files are equal.

    \b
    Examples:
      deltafmt verify packed/
      deltafmt verify packed/ --base base/
      deltafmt verify packed/ --base base/ --against finetune/
    """
    settings = ctx.ensure_object(Settings)
    with settings.progress("verifying") as progress:
        report = verify(src, base=base, against=against, progress=progress, limits=settings.limits)
    bases = () if report.base_checked else inspect(src, limits=settings.limits).bases.values()
    settings.show(report, base_name=next((entry["repo"] for entry in bases), None) or "BASE")
    if report.as_stated is False:
        ctx.exit(IntegrityError.exit_code)


# Running, and what may go wrong


class StoppedError(DeltafmtError):
    """A signal ended the work."""


class _Stopped(BaseException):
    """Raised by a signal, so that every `with` block cleans up."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP raise `_Stopped`, once: nothing may cut the cleaning up short."""
    previous: dict[int, Any] = {}

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in previous:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(number)

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                previous[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, action in previous.items():
            signal.signal(number, action)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code.

    Args:
        arguments: without the program's name; `sys.argv` if None.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    settings = Settings()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know fewer characters than a tensor's name
    try:
        with _stoppable():
            code: int | None = program.main(arguments, prog_name="deltafmt", standalone_mode=False, obj=settings)
        return code or 0
    except SystemExit as done:  # a reader of our output has gone
        return done.code if isinstance(done.code, int) else 1
    except _Stopped as stopped:
        name = "interrupted" if stopped.number == signal.SIGINT else f"stopped by {signal.Signals(stopped.number).name}"
        error: DeltafmtError = StoppedError(f"{name}; nothing was left behind")
        code = 128 + stopped.number
    except Exception as problem:
        error = _explained(problem)
        code = error.exit_code
        if settings.verbose:
            traceback.print_exc()
    with suppress(OSError):
        _tell(error, code, as_json=settings.json or "--json" in arguments)
    return code


def _explained(error: Exception) -> DeltafmtError:
    """Whatever was raised, as an error of ours."""
    if isinstance(error, DeltafmtError):
        return error
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "deltafmt"
        return UsageError(error.format_message().rstrip(".").replace("\n", " "), hint=f"See: {path} --help")
    if isinstance(error, OSError):
        return AccessError(error.strerror or str(error), where=str(error.filename or ""))
    if isinstance(error, MemoryError):
        return AccessError("not enough memory", hint="Fewer threads need less: pack and unpack take --jobs 1")
    return DeltafmtError(
        f"unexpected {type(error).__name__}: {error}",
        hint="This is a bug in deltafmt. Please report it, with what --verbose adds",
    )


def _tell(error: DeltafmtError, code: int, *, as_json: bool) -> None:
    """Print an error: one line to stderr and one with the hint; with --json also an object to stdout."""
    if as_json:
        entry = {
            "class": type(error).__name__,
            "reason": error.reason or None,
            "message": error.what,
            "where": error.where or None,
            "expected": error.expected,
            "found": error.found,
            "hint": error.hint or None,
            "exit_code": code,
        }
        click.echo(_as_json({"error": entry}))
    line = str(error).removesuffix(f". {error.hint}") if error.hint else str(error)
    click.echo(f"deltafmt: {_printable(line if isinstance(error, StoppedError) else f'error: {line}')}", err=True)
    if error.hint:
        click.echo(f"deltafmt: hint: {_printable(error.hint)}", err=True)


def _printable(text: str) -> str:
    """The text on one line, without characters that command a terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _as_json(report: dict[str, Any]) -> str:
    return json.dumps(_finite(report), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """The same, with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
