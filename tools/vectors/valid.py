"""What the valid conformance cases share: each is a function that draws up an archive, registered under its name.

The cases are in valid_*.py.
"""

from __future__ import annotations

from collections.abc import Callable

from vectors.draft import Draft

CASES: dict[str, tuple[str, Callable[[], Draft]]] = {}


def valid(description: str) -> Callable[[Callable[[], Draft]], Callable[[], Draft]]:
    def register(case: Callable[[], Draft]) -> Callable[[], Draft]:
        CASES[case.__name__.replace("_", "-")] = description, case
        return case

    return register
