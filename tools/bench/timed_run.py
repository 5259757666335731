"""One ordinary training run (`run_job`), its steps timed from outside: what is measured is what users run."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch

from lib_lora_train import events
from lib_lora_train.errors import TrainingError
from lib_lora_train.host.port import Host
from lib_lora_train.memory.plan import CONTEXT, GIGABYTE
from tools.bench.training import run_training


@dataclasses.dataclass(frozen=True)
class GpuMemory:
    """Bytes of the GPU's memory that torch had given out, and had taken from the driver, at most: in the whole run, and in
    the steps alone, from the first one's loss on. `outside` is what was taken besides, before the run began: CUDA's own, and
    other programs' where there are any."""

    run_allocated: int
    run_reserved: int
    steps_allocated: int
    steps_reserved: int
    outside: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one run took.

    wall, cpu    seconds a step, a figure for each stretch of steps after the warm-up
    losses       of all steps
    notes        what the run warned of
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    losses: tuple[float, ...]
    notes: tuple[str, ...]
    gpu: GpuMemory | None = None

    @property
    def seconds(self) -> float:
        """The median of `wall`."""
        return statistics.median(self.wall)

    @property
    def cpu_seconds(self) -> float:
        """The median of `cpu`."""
        return statistics.median(self.cpu)


def measure_run(host: Host, *, settings: Mapping[str, object], data: Path, steps: int, warm_up: int,
                device: torch.device, stretch: int = 1, each: Callable[[int], None] = lambda done: None) -> Measured:
    """Train for `warm_up` and then for `steps` steps; the file goes to the host's folder under the name "measured".

    Time is taken down every `stretch` steps; on CUDA the device is waited for there, so a stretch of one step would change
    what is measured. `each` is called when a step's loss is told, with the number of steps done. Raises what `run_job` raises.
    """
    if device.type == "cuda":
        gc.collect()  # what an earlier run has left would count as this one's
        _empty_cache(device)
    watch = _Watch(device, total=warm_up + steps, stretch=stretch, each=each)
    run_training({**settings, "train_data_dir": str(data), "max_train_steps": warm_up + steps, "output_name": "measured",
                  "overwrite": True, "save_state": False}, host, report=watch.report, stop=watch.stop)
    wall, cpu = watch.stretches(warm_up)
    return Measured(wall, cpu, tuple(watch.losses), tuple(watch.notes), watch.gpu())


@contextlib.contextmanager
def limited_gpu(device: torch.device, gigabytes: float) -> Iterator[None]:
    """As if the GPU had so many GB: torch gets what CUDA itself leaves of them (`memory.plan.CONTEXT`), and no byte more."""
    own = device.index if device.index is not None else torch.cuda.current_device()
    there = torch.cuda.get_device_properties(own).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (gigabytes * GIGABYTE - CONTEXT) / there), own)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, own)


def gpu_memory_used(device: torch.device) -> int:
    """Bytes of a GPU's memory that are in use, by all programs together."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _empty_cache(device: torch.device) -> None:
    """Give the driver what torch holds and does not use, and count the peaks from here."""
    with torch.cuda.device(device):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@dataclasses.dataclass(frozen=True)
class _Timestamp:
    calls: int
    wall: float
    cpu: float


class _Watch:
    """Hears the run's events and is asked before each step whether to stop: that is when time is taken down."""

    def __init__(self, device: torch.device, *, total: int, stretch: int, each: Callable[[int], None]) -> None:
        self._each = each
        self._device, self._total, self._stretch, self._calls = device, total, stretch, 0
        self._timestamps: list[_Timestamp] = []
        self._end: _Timestamp | None = None
        self._peaks: list[tuple[int, int]] = []
        self._outside = gpu_memory_used(device) - torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
        self.losses: list[float] = []
        self.notes: list[str] = []

    def stop(self) -> Literal["", "stop", "save"]:
        """Asked before each step, and before images and captions are encoded; those calls are told apart at the end."""
        self._calls += 1
        if self._calls % self._stretch == 0:
            self._timestamps.append(self._now())
        return ""

    def report(self, event: events.Event) -> None:
        """An event of the run."""
        if isinstance(event, events.Warned):
            self.notes.append(event.message)
        elif isinstance(event, events.Step):
            if not self.losses:
                self._read_peak()  # all but the steps is behind: what it has left would count as theirs
            self.losses.append(event.loss)
            self._each(event.step)
            if event.step == self._total:
                self._end = self._now()
                self._read_peak()

    def stretches(self, warm_up: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Seconds a step by the clock and by the CPU, for each stretch that begins after the warm-up."""
        if self._end is None:
            raise TrainingError("The measured run ended before its last step")
        # The last question came before the last step, the one before that a step earlier, and so on.
        done = {timestamp: self._total - 1 - (self._end.calls - timestamp.calls) for timestamp in self._timestamps}
        timestamps = [*(timestamp for timestamp in self._timestamps if warm_up <= done[timestamp] < self._total), self._end]
        done[self._end] = self._total
        pairs = [(a, b, done[b] - done[a]) for a, b in zip(timestamps, timestamps[1:], strict=False)]
        if not pairs:
            raise TrainingError("The measured run was too short", remedy="measure more steps")
        return (tuple((b.wall - a.wall) / steps for a, b, steps in pairs),
                tuple((b.cpu - a.cpu) / steps for a, b, steps in pairs))

    def gpu(self) -> GpuMemory | None:
        """The GPU's memory, None without a GPU."""
        if self._device.type != "cuda" or len(self._peaks) < 2:
            return None
        run, steps = tuple(map(max, zip(*self._peaks, strict=True))), self._peaks[-1]
        return GpuMemory(*run, *steps, self._outside)

    def _now(self) -> _Timestamp:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # only a measurement waits here
        return _Timestamp(self._calls, time.perf_counter(), time.process_time())

    def _read_peak(self) -> None:
        if self._device.type == "cuda":
            self._peaks.append((torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)))
            _empty_cache(self._device)
