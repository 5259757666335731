"""How far it is from a run to its loss, and from the Train button to it: the calls are few enough to be read."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from lib_lora_train.run import background
from lib_lora_train.run.runner import Runner
from lib_lora_train.training.loss import LOSSES
from lib_lora_train.ui.handlers import Handlers, OpenPage
from tests.jobs import run_settings

PACKAGE = str(Path(background.__file__).parents[1])
Frames = list[tuple[str, str]]


def our_frames() -> Frames:
    """(file, function) of each call of the package that is under way, outermost first."""
    return [(frame.filename.removeprefix(PACKAGE), frame.name) for frame in traceback.extract_stack()
            if frame.filename.startswith(PACKAGE)]


@pytest.fixture
def at_the_loss(monkeypatch: pytest.MonkeyPatch) -> list[Frames]:
    """The calls that are under way whenever the loss function is called."""
    found: list[Frames] = []
    original = LOSSES["l2"]

    def seen(*arguments):
        found.append(our_frames())
        return original(*arguments)
    monkeypatch.setitem(LOSSES, "l2", seen)
    return found


def of_a_step(found: list[Frames]) -> Frames:
    """The first calls that are those of a training step: before it, the model's loss is looked at once."""
    return next(frames for frames in found if ("/training/loop.py", "train") in frames)


def show(frames: Frames) -> None:
    """Print the traceback, for whoever wants to read the road (pytest -s)."""
    for depth, (file, name) in enumerate(frames):
        print(f"{depth:2} {file}: {name}")  # noqa: T201


def test_from_run_job_to_the_loss_function_it_is_five_calls(images, host, at_the_loss):
    from tests.run.test_job import settings
    run_settings(settings(images), host, report=lambda event: None, stop=lambda: "")
    frames = of_a_step(at_the_loss)
    road = frames[[name for _, name in frames].index("run_job"):]
    show(road)
    # The last call, that of the loss function itself, is not among our frames: it is this test's.
    assert len(road) <= 5, road


def test_from_the_buttons_handler_to_the_loss_function_it_is_ten_calls(images, host, at_the_loss, monkeypatch):
    from lib_lora_train.settings import DECLARATIONS, flat
    from tests.run.test_job import settings
    started: list[Frames] = []
    thread = background.threading.Thread

    def starting(*arguments, **options):
        started.append(our_frames())
        return thread(*arguments, **options)
    monkeypatch.setattr(background.threading, "Thread", starting)
    runner, values = Runner(), flat(settings(images))
    handlers = Handlers(runner, host, tuple(DECLARATIONS), values, "token")
    handlers.start("token", OpenPage(), *(values[name] for name in DECLARATIONS))
    assert runner.wait(120)
    road = started[0] + of_a_step(at_the_loss)
    show(road)
    # The handler itself is not counted, and the loss function is this test's.
    assert len(road) <= 10, road
