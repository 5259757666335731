"""Where a run's time goes, stage by stage: functions of the trainer are watched from outside, so that what is measured is
what users run."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

REST = "everything else"


@dataclasses.dataclass(frozen=True)
class Spent:
    """Seconds: on the clock, and of the processor (all threads together)."""

    wall: float = 0.0
    processor: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.wall + other.wall, self.processor + other.processor)


@dataclasses.dataclass(frozen=True)
class Place:
    """A function of the trainer ("module:owner.name") and the stage that its time belongs to."""

    stage: str
    target: str


class Stopwatch:
    """Each moment counts for one stage: that of the innermost watched function; what no function is watched for is `REST`.

    One thread is watched, from `follow` on: what others do meanwhile shows in the processor's seconds only.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._stages = [REST]
        self._spent: dict[str, Spent] = {}
        self._last = self._now()

    def follow(self) -> None:
        """Watch the thread that calls this from now on."""
        self._thread = threading.get_ident()

    def cut(self) -> dict[str, Spent]:
        """What each stage took since the last cut, longest first."""
        self._charge()
        spent, self._spent = self._spent, {}
        return dict(sorted(spent.items(), key=lambda item: -item[1].wall))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The time inside belongs to `name`, unless a stage inside takes it."""
        if threading.get_ident() != self._thread:
            yield
            return
        self._charge()
        self._stages.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stages.pop()

    @contextlib.contextmanager
    def watching(self, places: Sequence[Place]) -> Iterator[None]:
        """Have these functions watched; as they were afterwards."""
        with contextlib.ExitStack() as afterwards:
            for place in places:
                owner, name = find(place.target)
                original, stored = getattr(owner, name), vars(owner)[name]
                timed = self.stage(place.stage)(original)
                afterwards.callback(setattr, owner, name, stored)
                setattr(owner, name, staticmethod(timed) if isinstance(stored, staticmethod) else timed)
            yield

    def _charge(self) -> None:
        now = self._now()
        stage = self._stages[-1]
        self._spent[stage] = self._spent.get(stage, Spent()) + Spent(
            now.wall - self._last.wall, now.processor - self._last.processor)
        self._last = now

    @staticmethod
    def _now() -> Spent:
        return Spent(time.perf_counter(), time.process_time())


def find(target: str) -> tuple[Any, str]:
    """(the module or class, the name in it) of "module:owner.name"."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    return owner, name
