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
from lib_lora_train.records import from_plain

log = logging.getLogger(__name__)
Outcome = Literal["done", "stopped", "failed"]
Verdict = Literal["", "healthy", "ruined"]


@dataclasses.dataclass(frozen=True)
class Planned:
    """What is going to happen, sent once, before the first step. `resumed_at` steps were made before the run was
    interrupted; `memory` says how much it will take, and by what means; `seconds` estimates all of its steps."""

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
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """`done` of `total` units of work that is no training step; `checkpoint` is the title of one it waits for, mostly none."""

    kind: ClassVar[str] = "stage"
    name: str
    done: int
    total: int
    checkpoint: str = ""


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimiser step, `step` counting from 1 to `total`.

    `loss` is the mean over the step's micro-batches after all weighting, `average_loss` the mean over the last epoch's
    worth of steps. `learning_rate` is the UNet's, `text_encoder_lr` 0 where no text encoder is trained. `seconds_left`
    is None until the speed is known. `skipped` marks a step that was not applied, since its gradients or its loss were not
    finite (None in JSON); `skipped_steps` counts those of the run. `gradient_norm` is that before clipping, of all weights.
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
    gradient_norm: float = math.nan


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
class HeldOut:
    """The pictures that the LoRA is measured on and not trained on, by `held_out.name_of`; `derived` where there were too few:
    then they are mirrored crops of pictures that are trained. Sent once, after `Planned`."""

    kind: ClassVar[str] = "held_out"
    pictures: tuple[str, ...]
    derived: bool


@dataclasses.dataclass(frozen=True)
class Measured:
    """Losses on fixed noise after a step, without SNR weights: each a mean over pictures for the low, middle and high third of
    the timesteps, with the LoRA on `training` and `held_out` pictures, and without it (the base model) on the same.
    `held_out` is () where there are none. `strength` is ‖ΔW‖ / ‖W‖ by component ("unet", "te"), the median over layers.
    `path` is the save that was measured, "" for none."""

    kind: ClassVar[str] = "measured"
    step: int
    epoch: int
    training: tuple[float, ...]
    unadapted_training: tuple[float, ...]
    held_out: tuple[float, ...]
    unadapted_held_out: tuple[float, ...]
    strength: dict[str, float]
    path: str = ""


@dataclasses.dataclass(frozen=True)
class ImageLosses:
    """The mean loss on fixed noise of training pictures (by their path in the dataset's folder, with slashes), with the LoRA
    and of the base model: of each, or of some spread over a large set."""

    kind: ClassVar[str] = "image_losses"
    step: int
    images: tuple[str, ...]
    losses: tuple[float, ...]
    unadapted: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A picture was sampled after a step (0: by the base model). `index` counts the prompts from 0; `file` is in the run's
    folder, with slashes."""

    kind: ClassVar[str] = "sampled"
    step: int
    epoch: int
    index: int
    prompt: str
    seed: int
    file: str


Finding = Literal["learning", "too slow", "plateau", "no effect", "diverging", "overfitting", "ruined", "words", "rate"]


@dataclasses.dataclass(frozen=True)
class Diagnosed:
    """How the training goes, judged after a step: `message` is a sentence with the remedy; `setting` names the one to change to
    `value`, both "" for none. "words" is a set whose captions, trigger word or pictures are the matter, "rate" a learning rate
    that was found."""

    kind: ClassVar[str] = "diagnosed"
    step: int
    finding: Finding
    message: str
    setting: str = ""
    value: str = ""


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


Event = Planned | Stage | Step | Saved | Warned | HeldOut | Measured | ImageLosses | Sampled | Diagnosed | Finished
Report = Callable[[Event], None]

_KINDS: dict[str, type] = {cls.kind: cls for cls in (
    Planned, Stage, Step, Saved, Warned, HeldOut, Measured, ImageLosses, Sampled, Diagnosed, Finished)}


def to_dict(event: Event) -> dict[str, Any]:
    """The event as plain data, its kind under "event". JSON has no NaN: such a number is None."""
    return {"event": event.kind, **{name: _finite(value) for name, value in dataclasses.asdict(event).items()}}


def from_dict(data: dict[str, Any]) -> Event:
    """The event that `to_dict` wrote. Fields added by a later version are left out. Raises KeyError on an unknown kind, and
    TypeError where a field is missing or its value is of another type."""
    return from_plain(_KINDS[data["event"]], data)


def _finite(value: Any) -> Any:
    """`value` with None for each number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (tuple, list)):
        return [_finite(entry) for entry in value]
    return {key: _finite(entry) for key, entry in value.items()} if isinstance(value, dict) else value


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
