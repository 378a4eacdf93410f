"""Settings of the whole process, changed for a while."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator


class Setting:
    """Whoever comes first changes it, whoever leaves last puts it back.

    Args:
        change: changes the setting, and returns what puts it back.
    """

    def __init__(self, change: Callable[[], Callable[[], object]]) -> None:
        self._change = change
        self._restore: Callable[[], object] | None = None
        self._lock = threading.Lock()
        self._inside = 0

    @property
    def is_changed(self) -> bool:
        """Whether anybody is inside `changed`."""
        return self._inside > 0

    @contextlib.contextmanager
    def changed(self) -> Iterator[None]:
        """Within, the setting is changed; for all threads."""
        with self._lock:
            if self._inside == 0:
                self._restore = self._change()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0 and self._restore is not None:
                    self._restore()


def _stop_collecting() -> Callable[[], object]:
    restore = gc.enable if gc.isenabled() else gc.disable
    gc.disable()
    return restore


_COLLECTING = Setting(_stop_collecting)


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Put Python's search for cyclic garbage off while many objects are made that all stay.

    It is started by how many objects there are, and looks at those of the whole process: reading a manifest of 2,000
    tensors would take up to twice as long, and longer where a large library is loaded. For moments only.
    """
    with _COLLECTING.changed():
        yield
