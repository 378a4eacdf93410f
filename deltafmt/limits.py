"""Every cap a reader enforces before it allocates memory (spec/limits.md), and numbers that a caller may pass."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, SupportsIndex

from .errors import MalformedError, UsageError

GiB = 1 << 30

# Fixed by the specification: not to be raised.
NAME_BYTES = 1024
COMPONENT_BYTES = 255
RECIPE_DEPTH = 32
RECIPE_NODES = 4096
JSON_DEPTH = 64
CHUNK_BYTES = 64 << 20
MAX_INTEGER = (1 << 63) - 1
SUM_TERMS = 64


@dataclass(frozen=True)
class Limits:
    """Caps a user may raise: `Limits(tensor_bytes=1 << 40)`, or `--limit tensor_bytes=1TiB` on the command line."""

    manifest_bytes: int = 256 << 20
    header_bytes: int = 100_000_000
    tensors: int = 1_000_000
    shards: int = 100_000
    sidecars: int = 100_000
    dimensions: int = 16
    tensor_bytes: int = 128 * GiB
    total_bytes: int = 16 << 40
    rank: int = 65_536

    def check(self, name: str, found: int, where: str) -> None:
        """Raise `MalformedError` (reason `limit`) if `found` exceeds the limit `name`."""
        limit: int = getattr(self, name)
        if found > limit:
            raise MalformedError(
                f"more than the limit {name} allows",
                where=where,
                expected=f"at most {limit}",
                found=found,
                hint=f"If you trust the file, raise the limit: --limit {name}={found}",
                reason="limit",
            )

    def raised(self, **changes: int) -> Limits:
        """A copy with some limits changed. Raises `UsageError` for a name that is no limit."""
        known = {field.name for field in fields(self)}
        for name in changes:
            if name not in known:
                raise UsageError(f"no limit is named {name!r}", hint=f"Limits: {', '.join(sorted(known))}")
        return replace(self, **changes)


DEFAULT_LIMITS = Limits()


def check_count(name: str, value: SupportsIndex | None, at_least: int, at_most: int | None = None) -> None:
    """Raise `UsageError` if an argument of this name is no whole number, or less or more than it may be. None is no
    number to be checked."""
    if value is None:
        return
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < at_least or (at_most is not None and number > at_most):
        wanted = f"of {at_least} or more" if at_most is None else f"from {at_least} to {at_most}"
        raise UsageError(f"{name} is no whole number {wanted}", found=_shown(value), hint="Pass an int")


def is_finite(value: object) -> bool:
    """Whether this is a number, and one that can be reckoned with."""
    return type(value) is not bool and isinstance(value, Real) and math.isfinite(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
