"""The steps that can be undone and redone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

MOST_STEPS = 200
MOST_CHARACTERS = 64 << 20  # of all texts kept; the oldest steps go first, the newest always stays


@dataclass(frozen=True)
class Step:
    """One change: captions before and after, or images that were removed; both are the store's own objects."""

    label: str
    texts: Mapping[Any, tuple[str | None, str | None]] = field(default_factory=dict)
    removed: frozenset[Any] = frozenset()
    move: Callable[[bool], None] = lambda back: None  # called before the images come back (True) or go once more (False)

    @cached_property
    def size(self) -> int:
        """Characters it keeps in memory."""
        return sum(len(before or "") + len(after or "") for before, after in self.texts.values())


class History:
    """Two stacks of steps."""

    def __init__(self) -> None:
        self.done: list[Step] = []
        self.undone: list[Step] = []

    def push(self, step: Step) -> None:
        """A new step; what had been undone can no longer be redone."""
        self.undone.clear()
        self.done.append(step)
        while len(self.done) > 1 and (len(self.done) > MOST_STEPS or sum(step.size for step in self.done) > MOST_CHARACTERS):
            del self.done[0]
