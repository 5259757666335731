"""Results computed ahead of the caller in a few threads: in order, bounded in bytes, and ended when the block is left.

Threads and not processes: Pillow, zlib, hashlib and file reads release Python's lock, and worker processes would import
everything once more on Windows. Not concurrent.futures: its threads would keep the interpreter from ending, and it has no
bound on bytes. The function must not touch the model.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_BYTES = 512 << 20  # of what is being computed or waits for the caller
MOST_THREADS = 8
_PATIENCE = 1.0  # seconds; on Windows Ctrl+C is not noticed before a wait ends


def reading_threads() -> int:
    """How many threads decode images: one for each core that this process may use, at most 8."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, allowed))


class Prefetch(Generic[Item, Result]):
    """`function(item)` for each of `items`, in their order; to be iterated over inside a `with` block.

    An exception of the function (or of `items`) is raised where its result would have come. Leaving the block ends the
    threads and waits for the items they are computing; waiting results are dropped. With no threads (0, or where the system
    gives none) each item is computed when the caller asks for it.

    Bounds: at most `most` items are begun and not yet returned, together at most `most_bytes`: `cost(item)` during the
    computation, `kept(result)` while the result waits. An item above all bounds is computed by itself. `cost` is called with
    the lock held: it must not read the disk.
    """

    def __init__(self, items: Iterable[Item], function: Callable[[Item], Result], *, threads: int, most: int,
                 cost: Callable[[Item], int], kept: Callable[[Result], int], most_bytes: int = MOST_BYTES) -> None:
        self._items, self._function, self._cost, self._kept = iter(items), function, cost, kept
        self._most, self._most_bytes = most, most_bytes
        self._lock = threading.Condition()  # notified when something was begun, finished, returned or closed
        self._next: tuple[Item, int] | None = None  # the first item that is not begun, and its cost
        self._done: dict[int, tuple[Result | None, BaseException | None, int]] = {}
        self._begun = self._returned = self._bytes = 0
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
        """End the threads, and wait until they have ended. Afterwards nothing more is returned."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
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
            return self._function(next(self._items))
        with self._lock:
            while self._returned not in self._done:
                if self._closed or (self._exhausted and self._returned == self._begun):
                    raise StopIteration
                self._lock.wait(_PATIENCE)
            result, error, size = self._done.pop(self._returned)
            self._returned += 1
            self._bytes -= size
            self._lock.notify_all()
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def _run(self) -> None:
        while (begun := self._begin()) is not None:
            number, item, cost = begun
            result, error, size = None, None, 0
            try:
                result = self._function(item)
                size = self._kept(result)
            except BaseException as caught:  # noqa: BLE001 - whatever it is, it is the caller's
                error = caught
            del begun, item
            with self._lock:
                self._bytes += size - cost
                self._done[number] = result, error, size
                self._lock.notify_all()
            del result, error

    def _begin(self) -> tuple[int, Item, int] | None:
        """(number, item, cost) of the next item, once the bounds allow it; None where there is nothing more to do."""
        with self._lock:
            while not self._closed:
                self._peek()
                if self._next is None:
                    return None
                item, cost = self._next
                fits = self._bytes == 0 or self._bytes + cost <= self._most_bytes
                if fits and self._begun - self._returned < self._most:
                    self._next = None
                    self._begun += 1
                    self._bytes += cost
                    return self._begun - 1, item, cost
                self._lock.wait()
            return None

    def _peek(self) -> None:
        """Read the next item into `_next`, unless there are no more. With the lock held."""
        if self._next is not None or self._exhausted:
            return
        try:
            item = next(self._items)
            self._next = item, self._cost(item)
            return
        except StopIteration:
            pass
        except BaseException as error:  # noqa: BLE001 - raised to the caller, after the results before it
            self._done[self._begun] = None, error, 0
            self._begun += 1
        self._exhausted = True
        self._lock.notify_all()
