"""How a run of the command line ends: signals, errors in words, and JSON."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import click

from .errors import AccessError, DeltafmtError, UsageError, printable


class StoppedError(DeltafmtError):
    """A signal ended the work."""

    def __init__(self, number: int) -> None:
        name = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        super().__init__(f"{name}; nothing was left behind")


class Stopped(BaseException):
    """Raised by a signal, so that every `with` block cleans up."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP raise `Stopped`, once: nothing may cut the cleaning up short."""
    previous: dict[int, Any] = {}

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in previous:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

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


def explained(error: Exception) -> DeltafmtError:
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


def tell(error: DeltafmtError, code: int, *, as_json: bool) -> None:
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
        click.echo(json_text({"error": entry}))
    line = str(error).removesuffix(f". {error.hint}") if error.hint else str(error)
    click.echo(f"deltafmt: {printable(line if isinstance(error, StoppedError) else f'error: {line}')}", err=True)
    if error.hint:
        click.echo(f"deltafmt: hint: {printable(error.hint)}", err=True)


def json_text(report: dict[str, Any]) -> str:
    """A report as one JSON object, strictly: what is no number there is null."""
    return json.dumps(_finite(report), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """The same, with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
