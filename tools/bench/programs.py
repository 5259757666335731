"""Two trainers timed as whole programs that run in turn, A B A B …

Where a program shows its steps as tqdm does (`| 3/20 [`), the end of each step is timed when it is printed: loading, caching
and the first steps (warm-up) are not counted. Where it does not, it runs twice, for N and for 2 N steps, and the difference is
the time of N steps. CPU seconds (user and system) of the program and its children are read at the same moments; on a machine
that does other work they are more exact than the clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lib_lora_train.errors import SettingError, TrainingError, translated

PLACEHOLDERS = ("checkpoint", "data", "steps", "batch", "resolution", "rank", "precision", "output", "family")
_SHOWN = re.compile(rb"\|\s*(\d+)/(\d+) \[")
_LONGEST = 64  # bytes that such a mark may have, and be cut in two by the pipe
_POLL_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a step of one run: wall clock, CPU (None where the system does not count them), and the peak of the GPU's memory
    during the run in bytes (None without a GPU)."""

    wall: float
    cpu: float | None
    gpu_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two runs that followed each other."""

    ours: Timing
    theirs: Timing

    def ratio(self, *, cpu: bool) -> float:
        """Our time per step divided by theirs: less than 1 is faster."""
        ours, theirs = ((run.cpu if cpu else run.wall) for run in (self.ours, self.theirs))
        assert ours is not None and theirs is not None, "asked for CPU seconds where there are none"
        return ours / theirs


GpuBytes = Callable[[], int]
Command = str | Sequence[str]
"""A command line as a user writes it, or its words."""


def run_pairs(ours: Command, theirs: Command, *, values: Mapping[str, object], steps: int, pairs: int,
              say: Callable[[str], None], warm_up: int = 1, gpu_bytes: GpuBytes | None = None) -> list[Pair]:
    """Run both commands in turn `pairs` times, each for `steps` steps, of which the first `warm_up` are not timed.

    Commands may hold the PLACEHOLDERS in braces. `gpu_bytes` returns the bytes of GPU memory in use now, by all programs.
    Raises SettingError for a command with an unknown placeholder or too few steps, TrainingError for a command that fails,
    and where our own does not show its steps.
    """
    if steps < warm_up + 2:
        raise SettingError(f"--steps {steps} is too small to compare", why=f"the first {warm_up} are left out",
                           remedy=f"take at least {warm_up + 2}, or a smaller --warm-up")
    for command in (ours, theirs):
        filled(command, {**values, "steps": steps})
    made = []
    for number in range(pairs):
        timings = []
        for name, command in (("ours", ours), ("theirs", theirs)):
            timing = time_steps(command, values=values, steps=steps, warm_up=warm_up, must_show=name == "ours",
                                gpu_bytes=gpu_bytes)
            say(f"  {number + 1}/{pairs} {name:6} {timing.wall:9.4f} s a step"
                + (f", {timing.cpu:.4f} s of CPU" if timing.cpu is not None else ""))
            timings.append(timing)
        made.append(Pair(*timings))
    return made


def time_steps(command: Command, *, values: Mapping[str, object], steps: int, warm_up: int = 1, must_show: bool = False,
               gpu_bytes: GpuBytes | None = None) -> Timing:
    """One run's seconds a step after the first `warm_up`, by the steps it shows, else by the difference between N and 2 N
    steps, in which what the first ones cost drops out.

    Raises TrainingError where 2 N steps take no longer than N: start and end vary by more than the steps take. So it does
    where a program that `must_show` its steps did not.
    """
    first = _watched(filled(command, {**values, "steps": steps}), steps=steps, gpu_bytes=gpu_bytes)
    shown = sorted(step for step in first.shown if step >= warm_up)
    if len(shown) < 2 and must_show:
        raise TrainingError("This trainer's own run showed too few of its steps to be timed",
                            why="its progress bar is drawn ten times a second at most", remedy="take more --steps")
    if len(shown) >= 2:
        (wall, cpu), (last_wall, last_cpu) = first.shown[shown[0]], first.shown[shown[-1]]
        return _timing(last_wall - wall, _less(last_cpu, cpu), shown[-1] - shown[0], first.gpu_bytes)
    second = _watched(filled(command, {**values, "steps": 2 * steps}), steps=2 * steps, gpu_bytes=gpu_bytes)
    if second.wall <= first.wall:
        raise TrainingError("These steps are too short to be told from the program's start",
                            why=f"{2 * steps} of them took no longer than {steps}, and it shows none as it goes",
                            remedy="take more --steps")
    return _timing(second.wall - first.wall, _less(second.cpu, first.cpu), steps, second.gpu_bytes)


def words_of(command: str, *, windows: bool = os.name == "nt") -> list[str]:
    """The words of a command line; quotes hold words together. On Windows a backslash is a part of a path and nothing else.

    Raises SettingError for a quote that is not closed.
    """
    reader = shlex.shlex(command, posix=True, punctuation_chars=False)
    reader.whitespace_split, reader.commenters = True, ""
    if windows:
        reader.escape = ""
    try:
        return list(reader)
    except ValueError as error:
        raise SettingError("The command of --against cannot be read", why=str(error).lower(),
                           remedy="close its quotes") from error


def filled(command: Command, values: Mapping[str, object]) -> list[str]:
    """The command's words with the placeholders filled in. Raises SettingError for one that is unknown."""
    words = words_of(command) if isinstance(command, str) else command
    if not words:
        raise SettingError("--against names no command", remedy="write the outside trainer's command line")

    def fill(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise SettingError(f"{{{match[1]}}} is unknown in --against",
                               remedy=f"write {', '.join('{' + name + '}' for name in PLACEHOLDERS)}")
        return str(values[match[1]])

    return [re.sub(r"\{(\w+)\}", fill, word) for word in words]


def ratio_text(pairs: Sequence[Pair], *, cpu: bool) -> str:
    """The ratios run by run, their median and range."""
    ratios = [pair.ratio(cpu=cpu) for pair in pairs]
    return (f"ours ÷ theirs ({'CPU' if cpu else 'clock'}): {', '.join(f'{ratio:.3f}' for ratio in ratios)}; "
            f"median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")


class Shown:
    """The time when the end of each step was first shown, by the last progress bar whose length is the number of steps.

    There may be as many images or captions as steps: when the number falls, another bar has begun.
    """

    def __init__(self, steps: int, *, now: Callable[[], tuple[float, float | None]]) -> None:
        self._steps, self._now, self._rest = steps, now, b""
        self.at: dict[int, tuple[float, float | None]] = {}

    def read(self, chunk: bytes) -> None:
        """Read a chunk of the program's output."""
        self._rest, read = self._rest + chunk, 0
        for match in _SHOWN.finditer(self._rest):
            read, number = match.end(), int(match[1])
            if int(match[2]) != self._steps:
                continue
            if number < max(self.at, default=0):
                self.at = {}
            # The same step is drawn again when its loss is known; its end is the first time.
            if number and number not in self.at:
                self.at[number] = self._now()
        self._rest = self._rest[read:][-_LONGEST:]


@dataclasses.dataclass(frozen=True)
class _Watched:
    shown: dict[int, tuple[float, float | None]]
    wall: float
    cpu: float | None
    gpu_bytes: int | None


def _watched(words: Sequence[str], *, steps: int, gpu_bytes: GpuBytes | None) -> _Watched:
    """Run the program to its end; returns when each step was shown, the run's seconds, and the peak of the GPU's memory."""
    before, begin, latest = _children_seconds(), time.perf_counter(), b""
    idle = gpu_bytes() if gpu_bytes else 0
    with translated(f"starting {words[0]}"):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   start_new_session=os.name != "nt", env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    shown = Shown(steps, now=lambda: (time.perf_counter(), _session_seconds(process.pid)))
    with process, _Peak(gpu_bytes) as peak:
        try:
            while chunk := os.read(process.stdout.fileno(), 65536):
                latest = (latest + chunk)[-65536:]
                shown.read(chunk)
        except BaseException:
            _end(process)
            raise
    if process.returncode:
        raise TrainingError(f"The command {words[0]} ended with {process.returncode}",
                            why=latest[-600:].decode("utf-8", "replace").strip() or "it printed nothing",
                            remedy="see that it runs by itself")
    return _Watched(shown.at, time.perf_counter() - begin, _less(_children_seconds(), before),
                    peak.most - idle if gpu_bytes else None)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the program and its children."""
    if os.name == "nt":
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class _Peak:
    """The maximum of `now` while the block runs, sampled by a thread every `_POLL_SECONDS`."""

    def __init__(self, now: GpuBytes | None) -> None:
        self._now, self.most, self._done = now, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Peak:
        if self._now:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._now:
            self._thread.join()

    def _watch(self) -> None:
        assert self._now is not None
        while not self._done.wait(_POLL_SECONDS):
            self.most = max(self.most, self._now())


def _timing(wall: float, cpu: float | None, steps: int, gpu_bytes: int | None) -> Timing:
    return Timing(wall / steps, None if cpu is None else cpu / steps, gpu_bytes)


def _less(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else later - earlier


def _children_seconds() -> float | None:
    """CPU seconds of all children that have ended; None where the system does not count them."""
    if sys.platform == "win32":
        return None
    times = os.times()
    return times.children_user + times.children_system


def _session_seconds(leader: int) -> float | None:
    """CPU seconds so far of the processes of a session, None where there is no /proc."""
    processes = Path("/proc")
    if not (processes / "self" / "stat").is_file():
        return None
    ticks = 0
    for stat in processes.glob("[0-9]*/stat"):
        try:
            # After the name, which is in brackets and may hold anything: state, parent, group, session, …, user, system.
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[3]) == leader:
            ticks += sum(map(int, fields[11:15]))  # its own, and those of its children that have ended
    return ticks / os.sysconf("SC_CLK_TCK")
