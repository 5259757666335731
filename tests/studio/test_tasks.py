"""One task at a time: how it is watched, stopped, and how it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from lib_lora_train.errors import DatasetError, HostError, Interrupted
from lib_lora_train.studio import tasks as tasks_module
from lib_lora_train.studio.tasks import Task, Tasks


class Begun:
    """Work that goes on until it is let go."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()

    def __call__(self, task: Task) -> str:
        task.progress(1, 2)
        self.began.set()
        assert self.go_on.wait(60)
        return "two pictures were looked at."


def ended(work: Callable[[Task], str]):
    tasks = Tasks()
    tasks.start("Looking", work)
    assert tasks.wait(60)
    return tasks.status()


def test_before_the_first_there_is_nothing():
    tasks = Tasks()
    assert tasks.status() is None and not tasks.running() and not tasks.stop() and tasks.wait(0) and tasks.name() == ""


def test_a_task_is_watched_while_it_works_and_a_second_one_is_refused():
    tasks, work = Tasks(), Begun()
    number = tasks.start("Looking", work)
    assert work.began.wait(60)
    status = tasks.status()
    assert (status.id, status.name, status.done, status.total, status.running, status.outcome) == (
        number, "Looking", 1, 2, True, "running")
    with pytest.raises(HostError, match="Looking"):
        tasks.start("Other", lambda task: "")
    work.go_on.set()
    assert tasks.wait(60)
    assert (tasks.status().outcome, tasks.status().message) == ("done", "two pictures were looked at.")
    assert tasks.start("Other", lambda task: "") == number + 1 and tasks.wait(60)


def test_the_time_left_follows_the_share_of_the_work_that_is_done(monkeypatch: pytest.MonkeyPatch):
    seconds, seen = iter((100.0, 110.0, 130.0)), []
    monkeypatch.setattr(tasks_module.time, "monotonic", lambda: next(seconds))
    task = Task("Painting", should_stop=lambda: False)
    for done, share in ((1, 0.0), (2, 0.1), (3, None)):
        task.progress(done, 4, share=share)
        seen.append(task.seconds_left)
    # A tenth in 10 s: nine more; then three quarters in 30 s, and a quarter is left.
    assert seen == [None, pytest.approx(90), pytest.approx(10)]


def test_a_stop_is_seen():
    tasks = Tasks()

    def work(task: Task) -> str:
        while not task.should_stop():
            pass
        raise Interrupted("It was stopped while waiting")
    tasks.start("Waiting", work)
    assert tasks.stop() and tasks.wait(60)
    assert (tasks.status().outcome, tasks.status().message) == ("stopped", "It was stopped while waiting.")


def test_the_hosts_own_stop_button_counts():
    tasks, pressed = Tasks(), [True]
    tasks.start("Painting", lambda task: f"{task.should_stop()}", interrupted=lambda: pressed[0])
    assert tasks.wait(60)
    assert tasks.status().message == "True" and tasks.status().outcome == "stopped"


def test_what_the_work_raises_is_one_sentence(caplog: pytest.LogCaptureFixture):
    def bad_image(task: Task) -> str:
        raise DatasetError("The picture is damaged")

    def full_disk(task: Task) -> str:
        raise OSError(28, "No space left on device")

    def defect(task: Task) -> str:
        raise ZeroDivisionError("oops")
    assert (ended(bad_image).outcome, ended(bad_image).message) == ("failed", "The picture is damaged.")
    assert "No space left" in ended(full_disk).message and "The disk refused" in ended(full_disk).message
    assert "Traceback" not in caplog.text
    status = ended(defect)
    assert status.outcome == "failed" and not status.running and "ZeroDivisionError" in status.message
    assert "Traceback" in caplog.text


def test_problems_are_counted_beyond_what_is_kept():
    def work(task: Task) -> str:
        for number in range(1000):
            task.problem(f"{number}.png", "is broken.")
        task.add_result({"a": 1})
        task.add_result({"b": 2})
        return ""
    status = ended(work)
    assert status.problems[0] == ("0.png", "is broken.") and len(status.problems) + status.more_problems == 1000
    assert status.result == {"a": 1, "b": 2}


def test_what_follows_the_end_happens_however_it_ends():
    tasks, seen = Tasks(), []

    def work(task: Task) -> str:
        raise DatasetError("No")
    tasks.start("Looking", work, ended=lambda: seen.append(tasks.running()))
    assert tasks.wait(60)
    assert seen == [True] and not tasks.running()  # before anybody can begin the next
