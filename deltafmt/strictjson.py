"""Strict JSON: what a stranger's file may say, and one way to say it (spec/manifest.md)."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from .errors import MalformedError
from .limits import JSON_DEPTH, MAX_INTEGER
from .names import escaped
from .native import keys_differ

_MAX_DIGITS = 19
_DIGITS_AND_ENDS = bytes(0x30 if c in b"0123456789" else 0x2C if c in b",}] \t\r\n" else 0x78 for c in range(256))
_LONG_INTEGER = b"0" * (_MAX_DIGITS + 1) + b","
"""Translated so, text that holds an integer of too many digits holds this: a run of 20 digits that no `.` or `e`
follows. One pass in C over all of it, instead of a call of Python for each integer."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def parse(data: bytes, where: str) -> Any:
    """Parse one JSON value.

    Refuses duplicate keys, NaN and infinities, numbers outside a double, integers of more than 19 digits, lone
    surrogates, a byte order mark, and nesting too deep to parse (`check_depth` holds free-form content to 64). Raises
    `MalformedError` (reason `json`) with a JSON pointer, never `RecursionError`.
    """
    text = ""
    try:
        text = data.decode("utf-8")
        if text.startswith("\ufeff"):
            raise MalformedError("a byte order mark", where=where, reason="json")
        value = json.loads(
            text,
            object_pairs_hook=None if keys_differ(data) else _unique,
            parse_int=_integer if data[-1:].isdigit() or _LONG_INTEGER in data.translate(_DIGITS_AND_ENDS) else None,
            parse_float=_real,
            parse_constant=_forbid,
        )
        if b"\\u" in data:  # the only way a lone surrogate gets through UTF-8
            _check_surrogates(value)
        return value
    except UnicodeDecodeError as error:
        what = f"not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        what = f"not JSON: {error.msg} at character {error.pos}"
    except (_ForbiddenError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        what = f"nested deeper than {JSON_DEPTH}" if deep else str(error)
        if len(text) <= _LOOKED_AT:
            what, pointer = _first_forbidden(text, JSON_DEPTH if deep else len(text))
            where = f"{where}: {pointer}"
    raise MalformedError(what, where=where, reason="json")


class _ForbiddenError(Exception):
    """Strict JSON may not say this. Which it is and where, `_first_forbidden` finds out."""


def _forbid(text: str) -> NoReturn:
    raise _ForbiddenError(f"{text} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _ForbiddenError("a duplicate key")
    return result


def _integer(text: str) -> int:
    """Costs a call for each integer, so it is used only where a long one may be."""
    if _is_long(text):
        raise _ForbiddenError(f"an integer of more than {_MAX_DIGITS} digits")
    return int(text)


def _is_long(integer: str) -> bool:
    return len(integer.lstrip("-")) > _MAX_DIGITS


def _real(text: str) -> float:
    if not _is_finite(text):
        raise _ForbiddenError("a number outside the range of a double")
    return float(text)


def _is_finite(real: str) -> bool:
    return len(real) <= 400 and math.isfinite(float(real))


def _check_surrogates(value: Any) -> None:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += item.keys()
            pending += item.values()
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str) and _SURROGATE.search(item):
            raise _ForbiddenError("a lone surrogate")


_LOOKED_AT = 1 << 21
"""Characters: the manifest of some 5,000 tensors, and about a second. Of more is only said what is wrong."""
_TOKEN = re.compile(
    r'[ \t\n\r]*(?:("[^"\\]*"|["\[\]{},:]|true|false|null|NaN|-?Infinity)'
    r"|(-?(?:0|[1-9][0-9]*))((?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?))"
)
_read_string = json.JSONDecoder().raw_decode


def _first_forbidden(text: str, deepest: int) -> tuple[str, str]:
    """The first thing that strict JSON may not say, and the JSON pointer (RFC 6901) to it.

    Takes about a microsecond for each token, without recursion. The text is JSON as far as this has to read.
    """
    way: list[str | int] = []  # of each container that is open, the key or index that has been reached
    keys: list[set[str]] = []  # and the keys so far
    at, before, what = 0, "", ""
    while not what and (token := _TOKEN.match(text, at)):
        at, (mark, number, fraction) = token.end(), token.groups()
        if mark is None:
            if fraction and not _is_finite(number + fraction):
                what = f"the number {(number + fraction)[:40]} is outside the range of a double"
            elif not fraction and _is_long(number):
                what = f"an integer of {len(number.lstrip('-'))} digits"
        elif mark == ",":
            if isinstance(way[-1], int):
                way[-1] += 1
        elif mark[0] == '"':
            string = mark[1:-1]
            if len(mark) == 1:  # it has escapes
                string, at = _read_string(text, at - 1)
            is_key = before in ("{", ",") and isinstance(way[-1], str)
            if _SURROGATE.search(string):
                what = f"a lone surrogate in {string[:80]!a}"
            elif is_key and string in keys[-1]:
                what = f"duplicate key {string[:80]!a}"
            if is_key:
                keys[-1].add(string)
                way[-1] = string
        elif mark in ("[", "{"):
            if len(way) == deepest:
                what = f"nested deeper than {deepest}"
            else:
                way.append(0 if mark == "[" else "")
                keys.append(set())
        elif mark in ("]", "}"):
            way.pop()
            keys.pop()
        elif mark in ("NaN", "Infinity", "-Infinity"):
            what = f"{mark} is not a JSON number"
        before = mark
    return what or f"not strict JSON behind character {at}", pointer_to(*way) or "/"


def pointer_to(*steps: str | int) -> str:
    """A JSON pointer (RFC 6901), each step of it as it can be shown on a terminal."""
    return "".join("/" + escaped(str(step).replace("~", "~0").replace("/", "~1")) for step in steps)


def check_depth(value: Any, where: str, deepest: int = JSON_DEPTH) -> None:
    """Refuse free-form content nested deeper than `deepest`. Raises `MalformedError` (reason `json`)."""
    level = [value]
    for _ in range(deepest + 1):
        containers = [item for item in level if isinstance(item, (dict, list))]
        if not containers:
            return
        level = [inner for outer in containers for inner in (outer.values() if isinstance(outer, dict) else outer)]
    raise MalformedError(f"nested deeper than {JSON_DEPTH}", where=where, reason="json")


def canonical(value: Any) -> bytes:
    """Print a value in canonical form: keys sorted by code point, no white space, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")


class Fields:
    """The keys of one JSON object, taken one by one; `done` refuses whatever is left.

    Raises `MalformedError` (reason `schema`) that names the JSON pointer.
    """

    def __init__(self, value: object, pointer: str, reason: str = "schema") -> None:
        self._pointer = pointer
        self._reason = reason
        if not isinstance(value, dict):
            raise self._refused("an object", value)
        self._left: dict[str, Any] = dict(value)

    def _refused(self, expected: str, found: object, key: str = "") -> MalformedError:
        pointer = f"{self._pointer}/{key}" if key else self._pointer
        shown = (
            json.dumps(found)[:80] if isinstance(found, (str, int, float, bool, type(None))) else type(found).__name__
        )
        return MalformedError(
            "wrong content", where=pointer or "/", expected=expected, found=shown, reason=self._reason
        )

    def take(self, key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        """The value of a required key, of the given Python type (`bool` never passes as `int`)."""
        try:
            value = self._left.pop(key)
        except KeyError:
            what = f"the key {key!r} is missing"
            raise MalformedError(what, where=self._pointer or "/", reason=self._reason) from None
        if not isinstance(value, kind) or value is True or value is False:
            raise self._refused(expected, value, key)
        return value

    def has(self, key: str) -> bool:
        return key in self._left

    def text(self, key: str) -> str:
        value: str = self.take(key, str, "a string")
        return value

    def integer(self, key: str, minimum: int = 0) -> int:
        value: int = self.take(key, int, "an integer")
        if not minimum <= value <= MAX_INTEGER:
            raise self._refused(f"an integer from {minimum} to {MAX_INTEGER}", value, key)
        return value

    def number(self, key: str) -> float:
        return float(self.take(key, (int, float), "a number"))

    def object(self, key: str) -> dict[str, Any]:
        value: dict[str, Any] = self.take(key, dict, "an object")
        return value

    def array(self, key: str) -> list[Any]:
        value: list[Any] = self.take(key, list, "a list")
        return value

    def done(self) -> None:
        """Refuse keys that nobody took."""
        for key in self._left:
            raise MalformedError(f"unknown key {key!a}", where=self._pointer or "/", reason=self._reason)
