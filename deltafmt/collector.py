"""Python's search for cyclic garbage, put off while many objects are made that all stay.

It is started by how many objects there are, and looks at those of the whole process: reading a manifest of 2,000
tensors would take up to twice as long, and longer where a large library is loaded.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """For moments, and where no garbage is made. Nothing is changed where the search is off already.

    The setting is the process's: whoever comes first changes it, whoever leaves last puts it back.
    """
    with _SETTING:
        if _STATE.inside == 0:
            _STATE.was_on = gc.isenabled()
            gc.disable()
        _STATE.inside += 1
    try:
        yield
    finally:
        with _SETTING:
            _STATE.inside -= 1
            if _STATE.inside == 0 and _STATE.was_on:
                gc.enable()


class _State:
    """How many are inside `put_off`, and what was set before."""

    inside = 0
    was_on = False


_SETTING = threading.Lock()
_STATE = _State()
