"""Ordered work on threads: nothing is lost, swapped or begun too early, whatever the items weigh."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltafmt.pipeline import Pipeline

SIZES = st.lists(st.sampled_from([0, 1, 1000, 40_000, 70_000, 1 << 20]), max_size=60)


@given(SIZES, st.sampled_from([1, 100_000, 1 << 30]), st.integers(1, 3))
def test_results_come_in_order(sizes: list[int], limit: int, jobs: int) -> None:
    items = list(enumerate(sizes))
    with Pipeline(jobs) as pipeline:
        found = list(pipeline.ordered(items, lambda item: -item[0], lambda item: item[1], limit))
    assert found == [(item, -item[0]) for item in items]


@given(SIZES.filter(bool), st.data())
def test_what_was_done_before_an_error_counts(sizes: list[int], data: st.DataObject) -> None:
    broken = data.draw(st.integers(0, len(sizes) - 1))
    found: list[int] = []

    def work(item: int) -> int:
        if item == broken:
            raise ValueError(f"item {item}")
        return item

    with Pipeline(2) as pipeline, pytest.raises(ValueError, match=f"^item {broken}$"):
        found.extend(result for _, result in pipeline.ordered(range(len(sizes)), work, sizes.__getitem__))
    assert found == list(range(broken))


@pytest.mark.parametrize("size", [1 << 20, 1 << 16, 1000, 0])
def test_no_more_is_begun_than_there_is_room_for(size: int) -> None:
    """Room for three megabytes, and nobody asks for more than the first result."""
    room, jobs = 3 << 20, 4
    begun: list[int] = []
    lock = threading.Lock()

    def work(item: int) -> int:
        with lock:
            begun.append(item)
        return item

    with Pipeline(jobs) as pipeline:
        results = pipeline.ordered(range(5000), work, lambda _: size, room)
        assert next(results) == (0, 0)
        pipeline.submit(lambda: None).result()
        del results
    assert len(begun) <= min(room // max(size, 1), 64 * jobs + 32)


def test_an_error_of_who_gives_the_items_is_theirs() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("no more")

    with Pipeline(2) as pipeline, pytest.raises(KeyError, match="no more"):
        list(pipeline.ordered(items(), lambda item: item, lambda _: 1 << 20))


def test_whoever_is_interrupted_waits_for_what_runs_and_no_more() -> None:
    """The first item is handed over by itself, the others together."""
    begun: list[int] = []
    running, interrupted = threading.Event(), threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        if item == 1:
            running.set()
            interrupted.wait()

    with pytest.raises(KeyboardInterrupt), Pipeline(1) as pipeline:
        for _ in pipeline.ordered(range(20), work, lambda item: 100 if item else 1 << 20):
            running.wait()
            threading.Timer(0.1, interrupted.set).start()
            raise KeyboardInterrupt
    assert begun == [0, 1]
