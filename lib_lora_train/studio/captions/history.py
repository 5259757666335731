"""The steps that can be undone and redone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_STEPS = 200
MOST_CHARACTERS = 64 << 20  # of all texts kept; the oldest steps go first, the newest always stays


@dataclass(frozen=True)
class Step:
    """One change: captions before and after, or images that were removed; both are the store's own objects."""

    label: str
    texts: Mapping[Any, tuple[str | None, str | None]] = field(default_factory=dict)
    removed: frozenset[Any] = frozenset()
    before_undo: Callable[[], None] | None = None
    before_redo: Callable[[], None] | None = None

    @property
    def size(self) -> int:
        """Characters it keeps in memory."""
        return sum(len(before or "") + len(after or "") for before, after in self.texts.values())


class History:
    """Two stacks of steps."""

    def __init__(self) -> None:
        self.done: deque[Step] = deque()
        self.undone: list[Step] = []
        self._size = 0

    def push(self, step: Step) -> None:
        """A new step; what had been undone can no longer be redone."""
        self.undone.clear()
        self._keep(step)

    def undone_last(self) -> None:
        """The newest step was undone."""
        step = self.done.pop()
        self._size -= step.size
        self.undone.append(step)

    def redone_last(self) -> None:
        """The step undone last was redone."""
        self._keep(self.undone.pop())

    def _keep(self, step: Step) -> None:
        self.done.append(step)
        self._size += step.size
        while len(self.done) > 1 and (len(self.done) > MOST_STEPS or self._size > MOST_CHARACTERS):
            self._size -= self.done.popleft().size
