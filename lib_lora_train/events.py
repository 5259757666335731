"""What a run tells the world: a stream of frozen events.

The tab, the command line, the API, the log in the run's folder and the tests all read these and
nothing else. An event is a value: it holds plain numbers and strings, never a tensor or a path
object, so it can be written as one line of JSON and read back (`to_dict`, `from_dict`).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from lib_lora_train.errors import LoraTrainError

log = logging.getLogger(__name__)
Outcome = Literal["done", "stopped", "failed"]
Verdict = Literal["", "healthy", "ruined"]


@dataclasses.dataclass(frozen=True)
class Planned:
    """What is going to happen, sent once, before the first step. `resumed_at` steps were made before the run was
    interrupted; `memory` says how much it will take, and by what means."""

    kind: ClassVar[str] = "planned"
    pictures: int
    buckets: int
    batches_per_epoch: int
    epochs: int
    steps: int
    summary: str
    resolution: str
    checkpoint: str
    seed: int
    resumed_at: int = 0
    memory: str = ""


@dataclasses.dataclass(frozen=True)
class Stage:
    """`done` of `total` units of a piece of work that is not a training step ("Encoding pictures")."""

    kind: ClassVar[str] = "stage"
    name: str
    done: int
    total: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimiser step, `step` counting from 1 to `total`.

    `loss` is the mean over the step's micro-batches after all weighting, `average_loss` the mean over the last epoch's
    worth of steps. `learning_rate` is the UNet's, `text_encoder_lr` 0 where no text encoder is trained. `seconds_left`
    is None until the speed is known. `skipped` marks a step that was not applied, since its gradients or its loss were not
    finite (None in JSON); `skipped_steps` counts those of the run.
    """

    kind: ClassVar[str] = "step"
    step: int
    total: int
    epoch: int
    epochs: int
    loss: float
    average_loss: float
    learning_rate: float
    text_encoder_lr: float
    steps_per_second: float | None
    seconds_left: float | None
    skipped: bool = False
    skipped_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Saved:
    """A LoRA file was written whole. `final` marks the run's result."""

    kind: ClassVar[str] = "saved"
    path: str
    step: int
    epoch: int
    final: bool


@dataclasses.dataclass(frozen=True)
class Warned:
    """Something the user should know that does not stop the run."""

    kind: ClassVar[str] = "warning"
    message: str


@dataclasses.dataclass(frozen=True)
class Finished:
    """The last event of every run. `path` is the result, "" where there is none; `verdict` what it is worth, "" where nobody
    looked."""

    kind: ClassVar[str] = "finished"
    outcome: Outcome
    message: str
    path: str
    steps: int
    verdict: Verdict = ""


Event = Planned | Stage | Step | Saved | Warned | Finished
Report = Callable[[Event], None]

_KINDS: dict[str, type] = {cls.kind: cls for cls in (Planned, Stage, Step, Saved, Warned, Finished)}


def to_dict(event: Event) -> dict[str, Any]:
    """The event as plain data, its kind under "event". JSON has no NaN: such a number is None."""
    return {"event": event.kind, **{name: None if isinstance(value, float) and not math.isfinite(value) else value
                                    for name, value in dataclasses.asdict(event).items()}}


def from_dict(data: dict[str, Any]) -> Event:
    """The event that `to_dict` wrote. Fields added by a later version are left out; raises KeyError on an unknown kind."""
    cls = _KINDS[data["event"]]
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    return cls(**{name: math.nan if value is None and types[name] == "float" else value
                  for name, value in data.items() if name in types})


def shielded(report: Report) -> Report:
    """`report`, for work that must not end because what shows it failed: of its errors only the package's own are raised, the
    first of the others is logged."""
    failed = False

    def shield(event: Event) -> None:
        nonlocal failed
        try:
            report(event)
        except LoraTrainError:
            raise
        except Exception:
            if not failed:
                log.exception("What shows the work failed; the work goes on")
            failed = True
    return shield
