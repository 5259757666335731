"""Results computed ahead of the caller in a few threads: in order, bounded in bytes, and ended when the block is left.

Threads and not processes: Pillow, zlib, hashlib and file reads release Python's lock, and worker processes would import
everything once more on Windows. Not an executor of concurrent.futures: its threads are no daemons, so a WebUI that is closed
would wait for them. The function must not touch the model.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_BYTES = 512 << 20  # of what is being computed or waits for the caller
MOST_THREADS = 8


def reading_threads() -> int:
    """How many threads decode images: one for each core that this process may use, at most 8."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, allowed))


class Prefetch(Generic[Item, Result]):
    """`function(item)` for each of `items`, in their order; to be iterated over inside a `with` block.

    An exception of the function is raised where its result would have come. Leaving the block ends the threads and waits for
    the items they are computing; waiting results are dropped. With `threads` 0 each item is computed when the caller asks.

    Bounds: at most `most` items are begun and not yet returned, together at most `most_bytes`: `cost(item)` during the
    computation, `kept(result)` while the result waits. An item above all bounds is computed by itself. More items are begun
    when the caller asks for a result.
    """

    def __init__(self, items: Iterable[Item], function: Callable[[Item], Result], *, threads: int, most: int,
                 cost: Callable[[Item], int], kept: Callable[[Result], int], most_bytes: int = MOST_BYTES) -> None:
        self._function, self._kept, self._most, self._most_bytes = function, kept, most, most_bytes
        self._items = ((item, cost(item)) for item in items)
        self._next: tuple[Item, int] | None = None  # the first item that is not begun, and its cost
        self._begun: deque[tuple[Future[Result], int]] = deque()  # results in order, and what each costs until it is there
        self._jobs: queue.SimpleQueue[tuple[Future[Result], Item] | None] = queue.SimpleQueue()
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=f"lora-train-prefetch-{n}", daemon=True)
                         for n in range(threads)]

    def __enter__(self) -> Prefetch[Item, Result]:
        for thread in self._threads:
            thread.start()
        if self._threads:
            self._begin()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, and wait until they have ended. Afterwards nothing more is returned."""
        self._closed = True
        for future, _ in self._begun:
            future.cancel()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._begun.clear()

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if self._closed:
            raise StopIteration
        if not self._threads:
            return self._function(next(self._items)[0])
        if not self._begun:
            self._begin()
        if not self._begun:
            raise StopIteration
        try:
            result = self._begun[0][0].result()
        finally:
            self._begun.popleft()
        self._begin()
        return result

    def _begin(self) -> None:
        """Give the threads as many more items as the bounds allow."""
        held = sum(self._held(future, cost) for future, cost in self._begun)
        while len(self._begun) < self._most and (begin := self._next or next(self._items, None)):
            item, cost = self._next = begin
            if self._begun and held + cost > self._most_bytes:
                return
            self._next, future = None, Future()
            self._begun.append((future, cost))
            self._jobs.put((future, item))
            held += cost

    def _held(self, future: Future[Result], cost: int) -> int:
        if not future.done():
            return cost
        return 0 if future.exception() else self._kept(future.result())

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, item = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._function(item))
                except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's
                    future.set_exception(error)
            del job, future, item  # no result is kept here until the next item comes
