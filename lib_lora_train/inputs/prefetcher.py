"""The next batches, prepared in threads while the model trains: latents read from disk, or images decoded and augmented.

The batches are the same whatever the number of threads: all randomness follows from a batch's position. The model is not
touched in these threads, so that others can use it between any two steps.
"""

from __future__ import annotations

from collections.abc import Iterator

from lib_lora_train.dataset.prefetch import MOST_BYTES, Prefetch, reading_threads
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.inputs.batches import Batches, PreparedBatch

_SPARE = 2  # batches ready beyond those in the making, so that one slow image does not hold up the training

_Position = tuple[int, int, tuple[int, ...]]  # epoch, position, indices


class Prefetcher:
    """Batches of epoch after epoch, some of them prepared in advance. A context manager, whose end ends the threads.

    Where all latents are in memory there is nothing to prepare, and no thread is started.
    """

    def __init__(self, batches: Batches, *, last_epoch: int, threads: int | None = None, most_bytes: int = MOST_BYTES) -> None:
        """Nothing is prepared beyond `last_epoch`. `threads`: None is `reading_threads`, 0 none. At most `most_bytes` wait
        or are in the making (one batch at least)."""
        self._batches, self._last_epoch, self._most_bytes = batches, last_epoch, most_bytes
        self._threads = reading_threads() if threads is None else threads
        self._prefetch: Prefetch[_Position, PreparedBatch] | None = None
        self._next = (0, 0)  # epoch and position of what `_prefetch` gives next

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, and wait until they have."""
        prefetch, self._prefetch = self._prefetch, None
        if prefetch is not None:
            prefetch.close()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from position `start` on. What was prepared is used where it is the next in order."""
        for position in range(start, len(self._batches)):
            if self._prefetch is None or self._next != (epoch, position):
                self.close()
                self._prefetch = self._from(epoch, position)
            prepared = next(self._prefetch)
            self._next = (epoch, position + 1) if position + 1 < len(self._batches) else (epoch + 1, 0)
            yield self._batches.finish(prepared)

    def _from(self, epoch: int, position: int) -> Prefetch[_Position, PreparedBatch]:
        worthwhile = any(self._batches.size_of(indices) for indices in self._batches.order(epoch))
        threads = self._threads if worthwhile else 0
        return Prefetch(
            self._positions(epoch, position), lambda at: self._batches.prepare(at[0], at[1], indices=at[2]),
            threads=threads, most=threads + _SPARE, cost=lambda at: self._batches.size_of(at[2]),
            kept=lambda prepared: prepared.bytes, most_bytes=self._most_bytes).__enter__()

    def _positions(self, epoch: int, position: int) -> Iterator[_Position]:
        while True:
            for at, indices in enumerate(self._batches.order(epoch)):
                if at >= position:
                    yield epoch, at, indices
            if epoch >= self._last_epoch:
                return
            epoch, position = epoch + 1, 0
