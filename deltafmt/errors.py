"""Every error deltafmt raises on purpose.

    DeltafmtError
    ├── AccessError           exit 1   reading or writing failed
    ├── UsageError            exit 2   the request cannot be carried out as asked
    │   ├── DestinationError           DST exists, or lies inside SRC
    │   ├── MissingExtraError          an optional dependency is not installed
    │   └── RefusedError               it would make no sense; the message has the numbers
    ├── MalformedError        exit 3   not a deltafmt archive, or one that breaks the specification
    ├── UnsupportedError      exit 4   a version, feature, operator, encoding or dtype this reader does not know
    ├── IntegrityError        exit 5   bytes that are missing, short or changed
    └── WrongBaseError        exit 6   the base is missing, or is another model

Errors that an archive can cause carry a `reason`: a code of `spec/reasons.md`.
"""

from __future__ import annotations

from typing import Any, ClassVar


class DeltafmtError(Exception):
    """Base of all deltafmt errors.

    Args:
        what: what was found, in a sentence without a full stop.
        where: the archive, file, tensor or JSON pointer it was found in.
        expected, found: the two values that differ, if any.
        hint: the next step for the user; by default, that of the class.
        reason: a code of `spec/reasons.md`, for errors that a file can cause.
    """

    exit_code: ClassVar[int] = 1
    next_step: ClassVar[str] = ""

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        expected: object = None,
        found: object = None,
        hint: str = "",
        reason: str = "",
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.hint = hint or self.next_step
        self.reason = reason

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        pair = [f"{name} {value}" for name, value in (("expected", self.expected), ("found", self.found)) if value]
        if pair:
            text += f" ({', '.join(pair)})"
        return printable(f"{text}. {self.hint}" if self.hint else text)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.what, self.__dict__.copy()))


def printable(text: str) -> str:
    """One line for a terminal, whatever names a file holds: what commands it and lone surrogates are escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _rebuild(kind: type[DeltafmtError], what: str, state: dict[str, Any]) -> DeltafmtError:
    error = kind(what)
    error.__dict__.update(state)
    return error


class AccessError(DeltafmtError):
    exit_code = 1
    next_step = "Check the path, its permissions and the device behind it"


class UsageError(DeltafmtError):
    exit_code = 2
    next_step = "Change what was asked for: --help, or help() in Python, says what is possible"


class DestinationError(UsageError):
    next_step = "Choose another destination"


class MissingExtraError(UsageError):
    """Raised when a command needs an extra: the message names `pip install 'deltafmt[extra]'`."""

    def __init__(self, what: str, extra: str = "", **fields: Any) -> None:
        super().__init__(what, hint=f"Install it with: pip install 'deltafmt[{extra}]'", **fields)


class RefusedError(UsageError):
    pass


class MalformedError(DeltafmtError):
    exit_code = 3
    next_step = "The file is damaged or was written wrongly: get it again, or tell whoever wrote it"


class UnsupportedError(DeltafmtError):
    exit_code = 4
    next_step = "A newer deltafmt may know it: pip install --upgrade deltafmt"


class IntegrityError(DeltafmtError):
    exit_code = 5
    next_step = "Get the file again from where it came from"


class WrongBaseError(DeltafmtError):
    exit_code = 6
    next_step = "Pass the base that the archive was packed against: --base (base= in Python)"
