"""Where the time goes: the shortest of several calls, and a run's time stage by stage, watched from outside so that what is
measured is what users run."""

from __future__ import annotations

import contextlib
import dataclasses
import pkgutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

REST = "everything else"


def shortest(function: Callable[[], object], times: int = 1, *, before: Callable[[], object] = lambda: None,
             after: Callable[[], object] = lambda: None) -> float:
    """Seconds of the fastest of `times` calls; `before` and `after` each call is not timed."""
    found = []
    for _ in range(times):
        before()
        begin = time.perf_counter()
        function()
        found.append(time.perf_counter() - begin)
        after()
    return min(found)


@dataclasses.dataclass(frozen=True)
class Spent:
    """Seconds: on the clock, and of the CPU (all threads together)."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.wall + other.wall, self.cpu + other.cpu)


@dataclasses.dataclass(frozen=True)
class WatchedFunction:
    """A function of the trainer ("package.module:owner.name") and the stage that its time belongs to."""

    stage: str
    target: str

    def find(self) -> tuple[object, str]:
        """(the module or class, the name in it)."""
        owner, _, name = self.target.replace(":", ".").rpartition(".")
        return pkgutil.resolve_name(owner), name


class Stopwatch:
    """Each moment counts for one stage: that of the innermost watched function; what no function is watched for is `REST`.

    One thread is watched, from `follow` on: what others do meanwhile shows in the CPU's seconds only.
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
    def watching(self, functions: Sequence[WatchedFunction]) -> Iterator[None]:
        """Watch these functions within the block; they are replaced meanwhile, and restored on exit and on an error."""
        with contextlib.ExitStack() as restored:
            for watched in functions:
                owner, name = watched.find()
                timed = self.stage(watched.stage)(getattr(owner, name))
                is_static = isinstance(vars(owner)[name], staticmethod)
                restored.enter_context(mock.patch.object(owner, name, staticmethod(timed) if is_static else timed))
            yield

    def _charge(self) -> None:
        now = self._now()
        stage = self._stages[-1]
        self._spent[stage] = self._spent.get(stage, Spent()) + Spent(now.wall - self._last.wall, now.cpu - self._last.cpu)
        self._last = now

    @staticmethod
    def _now() -> Spent:
        return Spent(time.perf_counter(), time.process_time())
