"""The next batches, made ready while the model trains: latents read from disk, or pictures decoded and varied.

The same batches whatever the number of threads: all randomness follows from a batch's place. The model is never touched here
ahead of time, so that it can be handed to others between any two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lib_lora_train.dataset.prefetch import MOST_BYTES, Prefetch, reading_threads
from lib_lora_train.inputs.batches import Batch, Batches, PreparedBatch
from lib_lora_train.inputs.text import CAPTIONS_AT_ONCE

_SPARE = 2  # batches ready beyond those in the making: a slow picture then holds nobody up

_Place = tuple[int, int, tuple[int, ...]]  # epoch, position, indices


class Prefetcher:
    """Batches of epoch after epoch, some of them ahead; to be used as a `with` block, whose end ends the threads.

    Where all latents are in memory there is nothing to do ahead, and no thread is started.
    """

    def __init__(self, batches: Batches, *, last_epoch: int, threads: int | None = None, most_bytes: int = MOST_BYTES,
                 encode_upcoming: Callable[[Sequence[str]], None] | None = None, captions_at_once: int = CAPTIONS_AT_ONCE) -> None:
        """Nothing is prepared beyond `last_epoch`. `threads`: None is `reading_threads`, 0 none. At most `most_bytes` wait
        or are in the making (one batch at least).

        `encode_upcoming` is told, in the thread that asks for the batches, the captions of the next few of them: about
        `captions_at_once`, always the same ones together, wherever a run begins.
        """
        self._batches, self._last_epoch, self._most_bytes = batches, last_epoch, most_bytes
        self._threads = reading_threads() if threads is None else threads
        self._encode_upcoming, self._captions_at_once = encode_upcoming, captions_at_once
        self._ahead: Prefetch[_Place, PreparedBatch] | None = None
        self._next = (0, 0)  # epoch and position of what `_ahead` gives next

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, and wait until they have."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from position `start` on. What was prepared is used where it is the next in order."""
        for position in range(start, len(self._batches)):
            self._tell(epoch, position, first=position == start)
            if self._ahead is None or self._next != (epoch, position):
                self.close()
                self._ahead = self._from(epoch, position)
            prepared = next(self._ahead)
            self._next = (epoch, position + 1) if position + 1 < len(self._batches) else (epoch + 1, 0)
            yield self._batches.finish(prepared)

    def _tell(self, epoch: int, position: int, *, first: bool) -> None:
        """Of the batches in whose row this one stands, where it is the first of them that is asked for."""
        row = max(1, self._captions_at_once // self._batches.batch_size)
        if self._encode_upcoming is not None and (first or position % row == 0):
            begin = position // row * row
            self._encode_upcoming(self._batches.captions(epoch, range(begin, min(begin + row, len(self._batches)))))

    def _from(self, epoch: int, position: int) -> Prefetch[_Place, PreparedBatch]:
        worthwhile = any(self._batches.size_of(indices) for indices in self._batches.order(epoch))
        threads = self._threads if worthwhile else 0
        return Prefetch(
            self._places(epoch, position), lambda place: self._batches.prepare(place[0], place[1], indices=place[2]),
            threads=threads, most=threads + _SPARE, cost=lambda place: self._batches.size_of(place[2]),
            kept=lambda prepared: prepared.bytes, most_bytes=self._most_bytes).__enter__()

    def _places(self, epoch: int, position: int) -> Iterator[_Place]:
        while True:
            for at, indices in enumerate(self._batches.order(epoch)):
                if at >= position:
                    yield epoch, at, indices
            if epoch >= self._last_epoch:
                return
            epoch, position = epoch + 1, 0
