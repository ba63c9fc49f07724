"""Threads around the model: one side reads the next images, the other scores and writes the last answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

MAX_WAITING = 4  # results that wait for `run_in_background`; each may hold the masks of an image on the device

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_in_background(function: Callable[[Item], None], items: Iterable[Item]) -> None:
    """Calls `function` with each item, in order and in one thread, while the next item is made.

    Items made before an error, on either side, are still processed; then the error is raised.
    """
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[None]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > MAX_WAITING:
                waiting.popleft().result()  # raises what the function raised
        for future in waiting:
            future.result()


def prefetch(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map` whose next results are made in `workers` threads meanwhile; with 0 workers a plain `map`."""
    if workers < 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > workers:
                yield pending.popleft().result()
        for future in pending:
            yield future.result()
