"""What a run does between two steps besides saving: it stops, looks at time and memory, and lets others use the model."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.events import Report, Stage
from lib_lora_train.host import placement
from lib_lora_train.host.lease import yield_to_others
from lib_lora_train.host.port import LeasedModel
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.run.background import StopKind
from lib_lora_train.settings import named
from lib_lora_train.training.loop import Progress

_LOOK_EVERY = 0.2  # seconds, while a run is paused
Stop = Callable[[], StopKind]
"""Whether the user wants the run to end: "stop", or "save" to keep what was learnt."""


class StopCallback:
    """Ends the training before the next step once the user wants it."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def before_step(self, progress: Progress) -> bool:
        """See `Callback`."""
        return not self._stop()

    def after_step(self, progress: Progress) -> None:
        """Nothing."""


class TimeLimit:
    """Ends the training before the next step once the time is over, counted from when this is made. `stopped` says so then,
    and is "" before."""

    def __init__(self, minutes: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """0 minutes are no limit."""
        self._minutes, self._clock, self._begin = minutes, clock, clock()
        self.stopped = ""

    def before_step(self, progress: Progress) -> bool:
        """See `Callback`. One step is made in any case, so that there is something to keep."""
        if self._minutes and progress.step and self._clock() - self._begin >= 60 * self._minutes:
            self.stopped = f"its {self._minutes:g} minutes are over ({named('max_train_minutes')})"
        return not self.stopped

    def after_step(self, progress: Progress) -> None:
        """Nothing."""


class Pause:
    """Lets those use the model who wait for it: generations of the host, between two steps or two images to encode. What is
    trained is on the CPU meanwhile. And stands still between two steps while the user wants that, until a stop."""

    def __init__(self, leased: LeasedModel, model: FrozenModel, network: AdapterNetwork, *, enabled: bool,
                 report: Report, paused: Callable[[], bool], stop: Stop) -> None:
        """`enabled` lets others have the model; `paused` says whether to stand still."""
        self._paused, self._stop = paused, stop
        self._leased, self._model, self._network, self._enabled, self._report = leased, model, network, enabled, report

    def __call__(self, progress: Progress | None = None) -> bool:
        """Release the model if somebody waits for it; whether to go on afterwards. `progress` is that of the training, once it
        has begun."""
        return not self._enabled or yield_to_others(
            self._leased, self._model, report=self._report, offload=functools.partial(self._offload, progress))

    def before_step(self, progress: Progress) -> bool:
        """See `Callback`."""
        if self._paused():
            progress.flush()
            progress.release()
            self._report(Stage("Paused", 0, 0))
        while self._paused() and not self._stop():
            if not self(progress):
                return False
            time.sleep(_LOOK_EVERY)
        return not self._stop() and self(progress)

    def _offload(self, progress: Progress | None) -> Callable[[], None]:
        if progress is not None:
            progress.release()
        stored = self._network.stored() if progress is None else progress.stored()

        def move(device: torch.device) -> None:
            placement.move(stored, device)
            self._network.rebind()
        device = placement.device_of(stored[0])
        move(placement.CPU)
        return lambda: move(device)

    def after_step(self, progress: Progress) -> None:
        """Nothing."""


class MeasuredMemory:
    """Tells once, after the first step on a GPU, how much memory the run has really taken."""

    def __init__(self, device: torch.device, tell: Callable[[int], None]) -> None:
        """`tell` is called with the highest number of bytes that torch had allocated in the step."""
        self._device, self._tell = device, tell
        self._waiting = device.type == "cuda"

    def before_step(self, progress: Progress) -> bool:
        """See `Callback`."""
        if self._waiting:
            torch.cuda.reset_peak_memory_stats(self._device)
        return True

    def after_step(self, progress: Progress) -> None:
        """See `Callback`."""
        if self._waiting:
            progress.flush()
            self._waiting = False
            self._tell(torch.cuda.max_memory_allocated(self._device))
