"""Strict JSON: what a stranger's file may say, and one way to say it (spec/manifest.md)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

from .errors import MalformedError
from .limits import JSON_DEPTH, MAX_INTEGER
from .native import keys_rise

_MAX_DIGITS = 19
_DIGITS_AND_ENDS = bytes(0x30 if c in b"0123456789" else 0x2C if c in b",}] \t\r\n" else 0x78 for c in range(256))
_LONG_INTEGER = b"0" * (_MAX_DIGITS + 1) + b","
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def parse(data: bytes, where: str) -> Any:
    """Parse one JSON value.

    Refuses duplicate keys, NaN and infinities, numbers outside a double, integers of more than 19 digits, lone
    surrogates, a byte order mark, and nesting too deep to parse (`check_depth` holds free-form content to 64). Raises
    `MalformedError` (reason `json`), never `RecursionError`.
    """

    def refuse(what: str) -> NoReturn:
        raise MalformedError(
            what, where=where, hint="The file is damaged or was not written by deltafmt", reason="json"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    refuse(f"duplicate key {key!a}")
                seen.add(key)
        return result

    def real(text: str) -> float:
        value = float(text) if len(text) <= 400 else math.inf
        if not math.isfinite(value):
            refuse(f"the number {text[:40]} is outside the range of a double")
        return value

    try:
        text = data.decode("utf-8")
        if text.startswith("\ufeff"):
            refuse("a byte order mark")
        value = json.loads(
            text,
            object_pairs_hook=None if keys_rise(data) else unique,
            parse_int=_integer(refuse) if _LONG_INTEGER in data.translate(_DIGITS_AND_ENDS) else None,
            parse_float=real,
            parse_constant=lambda name: refuse(f"{name} is not a JSON number"),
        )
    except UnicodeDecodeError as error:
        refuse(f"not UTF-8 at byte {error.start}")
    except RecursionError:
        refuse(f"nested deeper than {JSON_DEPTH}")
    except json.JSONDecodeError as error:
        refuse(f"not JSON: {error.msg} at character {error.pos}")
    if b"\\u" in data:  # the only way a lone surrogate gets through UTF-8
        _check_surrogates(value, refuse)
    return value


def _integer(refuse: Callable[[str], NoReturn]) -> Callable[[str], int]:
    """Reads integers of bounded length. Costs a call for each, so it is used only where a long one may be."""

    def integer(text: str) -> int:
        if len(text.lstrip("-")) > _MAX_DIGITS:
            refuse(f"an integer of {len(text)} digits")
        return int(text)

    return integer


def check_depth(value: Any, where: str, deepest: int = JSON_DEPTH) -> None:
    """Refuse free-form content nested deeper than `deepest`. Raises `MalformedError` (reason `json`)."""
    level = [value]
    for _ in range(deepest + 1):
        containers = [item for item in level if isinstance(item, (dict, list))]
        if not containers:
            return
        level = [inner for outer in containers for inner in (outer.values() if isinstance(outer, dict) else outer)]
    raise MalformedError(f"nested deeper than {JSON_DEPTH}", where=where, reason="json")


def _check_surrogates(value: Any, refuse: Any) -> None:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += item.keys()
            pending += item.values()
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str) and _SURROGATE.search(item):
            refuse(f"a lone surrogate in {item!a}")


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
