"""Work done ahead of who needs it, in a few threads: in order, bounded in bytes, and over when its block is left.

Threads and not processes: Pillow, zlib, hashlib and file reads give up Python's lock while they work, and worker processes
would import everything anew on Windows. Nothing here knows pictures; the work must not touch the model.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_BYTES = 512 << 20  # of what is being worked on or waits to be taken
MOST_THREADS = 8
_PATIENCE = 1.0  # seconds; on Windows Ctrl+C is not heard before a wait ends


def reading_threads() -> int:
    """How many threads decode pictures: one a processor that this process may use, at most 8."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, allowed))


class Prefetch(Generic[Item, Result]):
    """`work(item)` for each of `items`, in their order; to be iterated over inside a `with` block.

    An exception of the work (or of `items`) is raised where its result would have come. Leaving the block ends the
    threads and waits for the pieces that they have in hand; what waits is dropped. With no threads (0, or where the
    system gives none) each piece is done when it is asked for.

    Bounds: at most `most` items are begun and not taken, together at most `most_bytes` — `cost(item)` while the work
    lasts, `kept(result)` while the result waits — except that one item may always go on alone. All threads wait while
    `cost` is asked: it must not ask the disk.
    """

    def __init__(self, items: Iterable[Item], work: Callable[[Item], Result], *, threads: int, most: int,
                 cost: Callable[[Item], int], kept: Callable[[Result], int], most_bytes: int = MOST_BYTES) -> None:
        self._items, self._work, self._cost, self._kept = iter(items), work, cost, kept
        self._most, self._most_bytes = most, most_bytes
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)  # threads wait here until they may begin
        self._ready = threading.Condition(self._lock)  # and who iterates, for the next result
        self._next: tuple[Item, int] | None = None  # the first item that is not begun, and its cost
        self._done: dict[int, tuple[Result | None, BaseException | None, int]] = {}
        self._begun = self._taken = self._bytes = 0
        self._exhausted = self._closed = False
        self._threads = [threading.Thread(target=self._run, name=f"lora-train-ahead-{n}", daemon=True) for n in range(threads)]

    def __enter__(self) -> Prefetch[Item, Result]:
        threads, self._threads = self._threads, []
        try:
            for thread in threads:
                thread.start()
                self._threads.append(thread)
        except RuntimeError:  # the system gives no more of them
            pass
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, and wait until they have. Afterwards nothing more comes."""
        with self._lock:
            self._closed = True
            self._room.notify_all()
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()
        self._done.clear()
        self._next = None

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if not self._threads:
            if self._closed:
                raise StopIteration
            return self._work(next(self._items))
        with self._lock:
            while self._taken not in self._done:
                if self._closed or (self._exhausted and self._taken == self._begun):
                    raise StopIteration
                self._ready.wait(_PATIENCE)
            result, error, size = self._done.pop(self._taken)
            self._taken += 1
            self._bytes -= size
            self._room.notify()
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def _run(self) -> None:
        while (begun := self._begin()) is not None:
            number, item, cost = begun
            result, error, size = None, None, 0
            try:
                result = self._work(item)
                size = self._kept(result)
            except BaseException as caught:  # noqa: BLE001 - whatever it is, it is the caller's
                error = caught
            del begun, item
            with self._lock:
                self._bytes += size - cost
                self._done[number] = result, error, size
                if number == self._taken:
                    self._ready.notify()
            del result, error

    def _begin(self) -> tuple[int, Item, int] | None:
        """(number, item, bytes) of the next piece, once there is room for it; None where there is no more to do."""
        with self._lock:
            while not self._closed:
                self._look()
                if self._next is None:
                    return None
                item, cost = self._next
                room = self._bytes == 0 or self._bytes + cost <= self._most_bytes
                if room and self._begun - self._taken < self._most:
                    self._next = None
                    self._begun += 1
                    self._bytes += cost
                    self._room.notify()  # one that waits looks whether there is room for one more
                    return self._begun - 1, item, cost
                self._room.wait()
            return None

    def _look(self) -> None:
        """Know the next item, unless there are no more. Under the lock."""
        if self._next is not None or self._exhausted:
            return
        try:
            item = next(self._items)
            self._next = item, self._cost(item)
        except StopIteration:
            self._exhausted = True
        except BaseException as error:  # noqa: BLE001 - the caller's, too, after what came before it
            self._exhausted = True
            self._done[self._begun] = None, error, 0
            self._begun += 1
        if self._exhausted:
            self._room.notify_all()
            self._ready.notify_all()
