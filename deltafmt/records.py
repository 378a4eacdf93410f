"""Records: JSON objects of which there are thousands in a file, all with the same keys.

They are read a column at a time, since that is several times as fast; whoever finds something wrong on the way reads
them one by one, which says what and where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain
from operator import itemgetter
from typing import Any

from .dtypes import Dtype, Shape, dtype
from .errors import MalformedError
from .strictjson import Fields


class Record:
    """Objects with a fixed set of keys, each with one Python type: `Record(name=str, size=int)`.

    Called with a value and its JSON pointer, gives the values in the order of the keys. Raises `MalformedError` (reason
    `schema`).
    """

    def __init__(self, **kinds: type) -> None:
        self._kinds = kinds
        self._types = list(kinds.values())
        self._values = itemgetter(*kinds)

    def __call__(self, value: object, pointer: str) -> tuple[Any, ...]:
        if type(value) is dict and len(value) == len(self._kinds):
            try:
                values: tuple[Any, ...] = self._values(value)
            except KeyError:
                pass
            else:
                if list(map(type, values)) == self._types:
                    return values
        fields = Fields(value, pointer)
        for key, kind in self._kinds.items():
            fields.take(key, kind, _EXPECTED[kind])
        fields.done()
        raise AssertionError("the fast path accepts what `Fields` accepts")

    def columns(self, items: Iterable[object]) -> list[tuple[Any, ...]]:
        """Of each key the values of all these objects. Raises `MalformedError`, which does not say where."""
        rows: list[Any] = list(items)
        uniform = set(map(type, rows)) == {dict} and set(map(len, rows)) == {len(self._kinds)}
        with suppress(KeyError):
            columns = list(zip(*map(self._values, rows), strict=True)) if uniform else []
            if [set(map(type, column)) for column in columns] == [{kind} for kind in self._types]:
                return columns
        raise MalformedError("records that are not alike")


_EXPECTED = {str: "a string", int: "an integer", list: "a list", dict: "an object"}


def kinds_and_shapes(
    kind_names: Sequence[str], sizes: Sequence[list[Any]], check: Callable[[list[Any], Dtype], Shape]
) -> tuple[list[Dtype], list[Shape]]:
    """Columns of dtypes and shapes, each different pair checked once. Raises what `check` and `dtypes.dtype` raise."""
    if not set(map(type, chain.from_iterable(sizes))) <= {int}:  # 1 and true are the same key of a dictionary
        raise MalformedError("a dimension that is no size")
    pairs = list(zip(kind_names, map(tuple, sizes), strict=True))
    known = {}
    for name, shape in set(pairs):
        kind = dtype(name)
        known[name, shape] = kind, check(list(shape), kind)
    kinds, shapes = zip(*map(known.__getitem__, pairs), strict=True) if pairs else ((), ())
    return list(kinds), list(shapes)
