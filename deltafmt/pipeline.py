"""Ordered work on a pool of threads, with a bound on the bytes in flight; room in memory that threads share."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

IN_FLIGHT_BYTES = 192 << 20
_TOGETHER = 1 << 16  # bytes: to hand less than that over to a thread takes longer than what it does with it


def default_jobs() -> int:
    """Threads to use if the user does not say: one per processor that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """Threads for work that somebody waits for; started when there first is more than one thing to do."""

    def __init__(self, jobs: int | None = None) -> None:
        self._jobs = jobs or default_jobs()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def each(self, items: Iterable[_Item], work: Callable[[_Item], object]) -> None:
        """Do `work` on every item, in parallel, and wait. Raises what the first of them raised."""
        every = list(items)
        if self._jobs == 1 or len(every) < 2:
            for item in every:
                work(item)
            return
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._jobs, thread_name_prefix="deltafmt-read")
            futures = [self._pool.submit(work, item) for item in every]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def close(self) -> None:
        """End the threads. The pool can be used again: it starts others."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()


class Pipeline:
    """A pool of `jobs` threads. On an error or Ctrl-C what has not begun is dropped, what runs is waited for."""

    def __init__(self, jobs: int | None = None) -> None:
        self.jobs = jobs or default_jobs()
        self._pool = ThreadPoolExecutor(self.jobs, thread_name_prefix="deltafmt")

    def submit(self, work: Callable[[], _Result]) -> Future[_Result]:
        return self._pool.submit(work)

    def ordered(
        self,
        items: Iterable[_Item],
        work: Callable[[_Item], _Result],
        nbytes: Callable[[_Item], int],
        limit: int = IN_FLIGHT_BYTES,
    ) -> Iterator[tuple[_Item, _Result]]:
        """Do `work` on every item in parallel, on small ones together; yield items and results in order.

        No item is begun while those begun and not yet asked past weigh more than `limit` bytes with it, except one
        alone.
        """
        waiting: deque[tuple[list[_Item], int, Future[tuple[list[_Result], BaseException | None]]]] = deque()
        weight = 0
        for several, size in _together(items, nbytes):
            while waiting and (weight + size > limit or len(waiting) > 64 * self.jobs):
                first, first_size, future = waiting.popleft()
                yield from _finished(first, future)
                weight -= first_size
            waiting.append((several, size, self._pool.submit(_each, several, work)))
            weight += size
        while waiting:
            first, _, future = waiting.popleft()
            yield from _finished(first, future)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _together(items: Iterable[_Item], nbytes: Callable[[_Item], int]) -> Iterator[tuple[list[_Item], int]]:
    """Items one after the other as they are handed over, and what they weigh."""
    several: list[_Item] = []
    weight = 0
    for item in items:
        several.append(item)
        weight += nbytes(item)
        if weight >= _TOGETHER:
            yield several, weight
            several, weight = [], 0
    if several:
        yield several, weight


def _each(items: list[_Item], work: Callable[[_Item], _Result]) -> tuple[list[_Result], BaseException | None]:
    """What `work` returns for each item, up to the first for which it raises something, and that."""
    found: list[_Result] = []
    try:
        for item in items:
            found.append(work(item))  # noqa: PERF401 (what was found before an error counts)
    except BaseException as error:
        return found, error
    return found, None


def _finished(
    items: list[_Item], future: Future[tuple[list[_Result], BaseException | None]]
) -> Iterator[tuple[_Item, _Result]]:
    found, error = future.result()
    yield from zip(items, found, strict=error is None)
    if error is not None:
        raise error


class Room:
    """For how many elements at once there is memory: who wants more waits for others to leave, or is alone."""

    def __init__(self, elements: int) -> None:
        self._elements = self._free = elements
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, elements: int) -> Iterator[None]:
        """Wait for room for so many elements, or for all there is; keep it until the `with` block ends."""
        taken = min(elements, self._elements)
        with self._changed:
            self._changed.wait_for(lambda: taken <= self._free)
            self._free -= taken
        try:
            yield
        finally:
            with self._changed:
                self._free += taken
                self._changed.notify_all()
