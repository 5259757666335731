"""Trackers: what other programs are told of a run, each in a thread of its own behind a bounded queue.

A tracker that is slow, fails or hangs costs what it was not told, and one warning; never the training. The names of scalars are
those of kohya's scripts where they have them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from lib_lora_train import events
from lib_lora_train.errors import LoraTrainError
from lib_lora_train.events import Report, Warned
from lib_lora_train.run.diagnostics import Private
from lib_lora_train.run.planning import RunPlan
from lib_lora_train.run.shareable import shareable
from lib_lora_train.run.tracker_checks import TITLES
from lib_lora_train.run.tracker_kinds import TensorBoard, TrackerStart, WeightsAndBiases
from lib_lora_train.settings import flat

log = logging.getLogger(__name__)
_KINDS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
_MOST_WAITING = 2000  # entries of a tracker that does not keep up
_CLOSE_SECONDS = 15.0
_BANDS = ("low", "middle", "high")


@dataclasses.dataclass(frozen=True)
class TrackerEntry:
    """What a tracker is told after a step, each by its tag; an image is a file and its prompt."""

    step: int
    scalars: Mapping[str, float] = dataclasses.field(default_factory=dict)
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    images: Mapping[str, tuple[Path, str]] = dataclasses.field(default_factory=dict)


class Tracker(Protocol):
    """Another program that follows a run; all of it is called in one thread of its own, and may raise anything."""

    def begin(self) -> None:
        """Begin a run there."""

    def write(self, entry: TrackerEntry) -> None:
        """Tell it one entry."""

    def end(self) -> None:
        """End the run there."""


class BackgroundTracker:
    """A tracker behind a queue of at most `most` entries; what is sent while that is full is dropped."""

    def __init__(self, title: str, tracker: Tracker, *, most: int = _MOST_WAITING) -> None:
        self._title, self._tracker, self._problem, self._dropping, self._failed = title, tracker, "", False, False
        self._entries: queue.Queue[TrackerEntry | None] = queue.Queue(most)
        self._thread = threading.Thread(target=self._follow, name="lora-train-tracker", daemon=True)
        self._thread.start()

    def send(self, entry: TrackerEntry) -> None:
        """Have it told, without waiting."""
        if self._failed:
            return
        try:
            self._entries.put_nowait(entry)
        except queue.Full:
            if not self._dropping:
                self._problem = f"{self._title} does not keep up: from step {entry.step} on it misses some of what is sent."
            self._dropping = True

    def problem(self) -> str:
        """A sentence about it that was not told yet, "" for none."""
        told, self._problem = self._problem, ""
        return told

    def close(self, seconds: float) -> None:
        """Have it end, and wait for that at most so long."""
        ending = False
        while not ending:
            try:
                self._entries.put_nowait(None)
                ending = True
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._entries.get_nowait()  # the oldest, for the end to have its place
        self._thread.join(seconds)
        if self._thread.is_alive() and not self._failed:
            self._failed = True
            self._problem = (f"{self._title} is not done {seconds:g} s after the run. It goes on by itself, and what is left "
                             "when the program ends is lost.")

    def _follow(self) -> None:
        try:
            self._tracker.begin()
            while (entry := self._entries.get()) is not None:
                self._tracker.write(entry)
            self._tracker.end()
        except Exception as error:
            log.warning("%s failed", self._title, exc_info=error)
            self._failed = True
            why = " ".join(str(error).split())[:300] or type(error).__name__
            self._problem = f"{self._title} is told no more, and the training goes on: {why}."


class Tracking:
    """A run's report, followed by trackers."""

    def __init__(self, report: Report, trackers: Sequence[BackgroundTracker], *, folder: Path | None, private: Private) -> None:
        """`ending` is how the run ended, as far as it is known."""
        self._report, self._trackers, self._folder, self._private, self._step = report, trackers, folder, private, 0
        self.ending = "interrupted"

    def report(self, event: events.Event) -> None:
        """Tell who watches, then the trackers, and then what they have to say."""
        self._report(event)
        entry = entry_of(event, folder=self._folder)
        if entry is not None:
            self._step = max(self._step, entry.step)
            self._send(entry)
        self._tell()

    def end(self, *, seconds: float) -> None:
        """Tell how the run ended, and have the trackers end, for which each has so long."""
        self._send(TrackerEntry(self._step, texts={"outcome": self.ending}))
        for tracker in self._trackers:
            tracker.close(seconds)
        self._tell()

    def _send(self, entry: TrackerEntry) -> None:
        told = dataclasses.replace(entry, texts={tag: self._private.replaced(text) for tag, text in entry.texts.items()})
        for tracker in self._trackers:
            tracker.send(told)

    def _tell(self) -> None:
        for problem in filter(None, [tracker.problem() for tracker in self._trackers]):
            self._report(Warned(problem))


@contextlib.contextmanager
def tracking(plan: RunPlan, *, folder: Path | None, report: Report, first: bool = True) -> Iterator[Tracking]:
    """What a run is to report to inside the block, so that the trackers of its settings follow; in the `first` process only."""
    chosen = plan.settings.tracking
    start = TrackerStart.of(plan, folder=folder, settings=shareable(flat(plan.settings)))
    trackers = [BackgroundTracker(TITLES[name], _KINDS[name](start)) for name in chosen.chosen if first]
    private = Private.of(flat(plan.settings), host=None, run=folder)
    following, seconds = Tracking(report, trackers, folder=folder, private=private), _CLOSE_SECONDS
    try:
        yield following
    except Exception as error:
        following.ending = str(error) if isinstance(error, LoraTrainError) else type(error).__name__
        raise
    except BaseException:  # Ctrl+C for the second time ends at once
        seconds = 0.0
        raise
    finally:
        following.end(seconds=seconds)


def entry_of(event: events.Event, *, folder: Path | None) -> TrackerEntry | None:
    """What trackers are told of an event; None for nothing. `folder` is the run's, where its images are."""
    if isinstance(event, events.Step):
        scalars = {"loss/current": event.loss, "loss/average": event.average_loss, "lr/unet": event.learning_rate,
                   "norm/grad": event.gradient_norm, "skipped_steps": float(event.skipped_steps)}
        if event.text_encoder_lr:
            scalars["lr/textencoder"] = event.text_encoder_lr
        return TrackerEntry(event.step, {tag: value for tag, value in scalars.items() if math.isfinite(value)})
    if isinstance(event, events.Measured):
        losses = {"training": event.training, "training_base_model": event.unadapted_training,
                  "held_out": event.held_out, "held_out_base_model": event.unadapted_held_out}
        scalars = {f"loss/validation/{name}": sum(bands) / len(bands) for name, bands in losses.items() if bands}
        scalars |= {f"loss/validation/{name}_{band}": value for name, bands in losses.items()
                    for band, value in zip(_BANDS, bands, strict=False)}
        scalars |= {f"strength/{part}": value for part, value in event.strength.items()}
        return TrackerEntry(event.step, {tag: value for tag, value in scalars.items() if math.isfinite(value)})
    if isinstance(event, events.Diagnosed):
        return TrackerEntry(event.step, texts={"verdict": f"{event.finding}: {event.message}"})
    if isinstance(event, events.Sampled) and folder is not None:
        return TrackerEntry(event.step, images={f"sample/{event.index}": (folder / event.file, event.prompt)})
    return None
