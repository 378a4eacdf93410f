"""Ordered work on a pool of threads, with a bound on the bytes in flight; room in memory that threads share."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

IN_FLIGHT_BYTES = 192 << 20
_RUN_BYTES, _RUN_ITEMS = 1 << 16, 32  # smaller runs cost more to hand to a thread than to work on
_WAITING = 64  # items for each thread at most, however small


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
        self._is_over = False

    def submit(self, work: Callable[[], _Result]) -> Future[_Result]:
        return self._pool.submit(work)

    def ordered(
        self,
        items: Iterable[_Item],
        work: Callable[[_Item], _Result],
        nbytes: Callable[[_Item], int],
        limit: int = IN_FLIGHT_BYTES,
    ) -> Iterator[tuple[_Item, _Result]]:
        """Do `work` on every item in parallel; yield items and results in order.

        Items are handed over in runs of 64 KiB or 32 items, each run to one thread. No run is begun while those begun
        and not yet asked past weigh more than `limit` bytes with it, unless none is. What `work` raises is raised when
        it is its item's turn, after the results of the items before it.
        """
        waiting: deque[tuple[list[_Item], int, Future[_Outcome[_Result]]]] = deque()
        weight = count = 0
        for run, size in _runs(items, nbytes):
            while waiting and (weight + size > limit or count > _WAITING * self.jobs):
                first, first_size, future = waiting.popleft()
                yield from _results(first, future.result())
                weight, count = weight - first_size, count - len(first)
            waiting.append((run, size, self._pool.submit(self._outcome, run, work)))
            weight, count = weight + size, count + len(run)
        while waiting:
            first, _, future = waiting.popleft()
            yield from _results(first, future.result())

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _outcome(self, run: list[_Item], work: Callable[[_Item], _Result]) -> _Outcome[_Result]:
        results: list[_Result] = []
        try:
            for item in run:
                if self._is_over:
                    raise CancelledError
                results.append(work(item))
        except BaseException as error:
            return _Outcome(results, error)
        return _Outcome(results, None)


def _runs(items: Iterable[_Item], nbytes: Callable[[_Item], int]) -> Iterator[tuple[list[_Item], int]]:
    """Items in runs of `_RUN_BYTES`, or a little more, or `_RUN_ITEMS` (the last may have less); what each weighs."""
    run: list[_Item] = []
    weight = 0
    for item in items:
        run.append(item)
        weight += nbytes(item)
        if weight >= _RUN_BYTES or len(run) == _RUN_ITEMS:
            yield run, weight
            run, weight = [], 0
    if run:
        yield run, weight


@dataclass(frozen=True)
class _Outcome(Generic[_Result]):
    """What `work` returned for each item of a run, up to the first for which it raised something, and that."""

    results: list[_Result]
    error: BaseException | None


def _results(run: list[_Item], outcome: _Outcome[_Result]) -> Iterator[tuple[_Item, _Result]]:
    yield from zip(run, outcome.results, strict=outcome.error is None)
    if outcome.error is not None:
        raise outcome.error


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
