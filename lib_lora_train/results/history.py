"""The events of a run as they count in the end: of what was done again after an interruption, the last time.

Read again only when the file has changed, as the page asks every few seconds.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from lib_lora_train import events
from lib_lora_train.run.record import read_timed_events


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """What the events of a run say.

    started   of the first event, in seconds since 1970; 0 where there is none
    saved     each file that was written, with the time of the event, in that order
    measured, sampled   in the order of the steps, each once
    """

    started: float
    planned: events.Planned | None
    saved: tuple[tuple[float, events.Saved], ...]
    measured: tuple[events.Measured, ...]
    sampled: tuple[events.Sampled, ...]
    held_out: events.HeldOut | None
    image_losses: events.ImageLosses | None
    diagnosed: events.Diagnosed | None
    finished: events.Finished | None


def read_history(folder: Path) -> RunHistory:
    """The history of the run in `folder`; an empty one where nothing can be read."""
    return _read(folder, *_state(folder))


def read_steps(folder: Path) -> tuple[events.Step, ...]:
    """The steps of the run in `folder` in order, each once."""
    return _read_steps(folder, *_state(folder))


def _state(folder: Path) -> tuple[int, int]:
    try:
        status = (folder / "events.jsonl").stat()
    except (OSError, ValueError):
        return 0, 0
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=4)
def _read(folder: Path, modified: int, size: int) -> RunHistory:
    started, resumed_at = 0.0, None
    saved: list[tuple[float, events.Saved]] = []
    last: dict[type, events.Event] = {}
    measured: dict[int, events.Measured] = {}
    sampled: dict[tuple[int, int], events.Sampled] = {}
    for time, event in read_timed_events(folder, every_step=False):
        started = started or time
        if isinstance(event, events.Planned):
            if event.resumed_at != resumed_at:  # it is also sent again when the memory was measured
                resumed_at = event.resumed_at
                measured = {step: known for step, known in measured.items() if step <= resumed_at}
                sampled = {key: known for key, known in sampled.items() if key[0] <= resumed_at}
                last.pop(events.Finished, None)
        if isinstance(event, events.Saved):
            saved += [(time, event)] if Path(event.path).name else []
        elif isinstance(event, events.Measured):
            measured[event.step] = event
        elif isinstance(event, events.Sampled):
            sampled[event.step, event.index] = event
        else:
            last[type(event)] = event
    return RunHistory(
        started, last.get(events.Planned), tuple(saved),
        *(tuple(known[key] for key in sorted(known)) for known in (measured, sampled)),
        *(last.get(kind) for kind in (events.HeldOut, events.ImageLosses, events.Diagnosed, events.Finished)))


@functools.lru_cache(maxsize=4)
def _read_steps(folder: Path, modified: int, size: int) -> tuple[events.Step, ...]:
    steps: dict[int, events.Step] = {}
    resumed_at = None
    for _, event in read_timed_events(folder):
        if isinstance(event, events.Planned) and event.resumed_at != resumed_at:
            resumed_at = event.resumed_at
            steps = {number: step for number, step in steps.items() if number <= resumed_at}
        elif isinstance(event, events.Step):
            steps[event.step] = event
    return tuple(steps[number] for number in sorted(steps))
