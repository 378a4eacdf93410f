"""Keys of JSON (keys.c)."""

from __future__ import annotations

from . import library


def keys_differ(text: bytes) -> bool:
    """Whether in `text`, if it is JSON, no object has a key twice.

    False as well where that is not told so easily: many keys that are not in rising order, white space, escapes, deep
    nesting.
    """
    return bool(library.LIBRARY is not None and library.LIBRARY.keys_differ(text, len(text)))
