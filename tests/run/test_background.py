"""One background job at a time: its number, its stop, its ending."""

from __future__ import annotations

import threading

import pytest

from lib_lora_train.errors import DatasetError, HostError, Interrupted
from lib_lora_train.run.background import Failure, TaskRunner


def start(runner: TaskRunner, job) -> int:
    return runner.start(job, name="The job", doing="the job ran", busy="A job is running already")


def test_jobs_are_numbered_and_a_second_one_is_refused_until_the_first_has_ended():
    runner, go_on = TaskRunner("test"), threading.Event()
    assert not runner.running and runner.ending is None and runner.wait(0) and not runner.stop()
    assert start(runner, lambda: go_on.wait(60)) == 1 and runner.running and runner.ending is None
    with pytest.raises(HostError, match="running already"):
        start(runner, lambda: None)
    go_on.set()
    assert runner.wait(60) and not runner.running and runner.ending is True
    assert start(runner, lambda: "second") == 2 and runner.wait(60) and runner.ending == "second"


def test_a_job_sees_the_kind_of_stop_and_the_next_one_begins_without_it():
    runner, seen, asked = TaskRunner("test"), [], threading.Event()

    def job() -> None:
        assert asked.wait(60)
        seen.append(runner.stopping)
    start(runner, job)
    assert runner.stop("save")
    asked.set()
    assert runner.wait(60) and seen == ["save"]
    start(runner, job)
    assert runner.wait(60) and seen == ["save", ""]


@pytest.mark.parametrize(("error", "outcome", "words"), [
    (Interrupted("It was stopped"), "stopped", "It was stopped."), (DatasetError("No image"), "failed", "No image."),
    (OSError(28, "No space left"), "failed", "The disk refused while the job ran"),
    (ZeroDivisionError("oops"), "failed", "The job ended unexpectedly: ZeroDivisionError: oops")])
def test_what_a_job_raises_is_one_sentence_and_only_a_defect_is_logged(error: Exception, outcome: str, words: str,
                                                                      caplog: pytest.LogCaptureFixture):
    def job() -> None:
        raise error
    runner, told = TaskRunner("test"), []
    runner.start(job, name="The job", doing="the job ran", busy="", ended=told.append)
    assert runner.wait(60)
    ending = runner.ending
    assert told == [ending] and isinstance(ending, Failure) and ending.outcome == outcome and words in ending.message
    assert bool(ending.trace) == (outcome == "failed") and ("Traceback" in caplog.text) == isinstance(error, ZeroDivisionError)


def test_a_thread_that_is_ended_from_outside_leaves_an_ending():
    def job() -> None:
        raise SystemExit
    runner = TaskRunner("test")
    start(runner, job)
    assert runner.wait(60) and not runner.running
    assert isinstance(runner.ending, Failure) and runner.ending.outcome == "failed"


def test_a_thread_that_cannot_be_started_leaves_room_for_the_next(monkeypatch: pytest.MonkeyPatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")
    runner = TaskRunner("test")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(threading.Thread, "start", refuse)
        start(runner, lambda: None)
    assert not runner.running and runner.wait(0)
    start(runner, lambda: "next")
    assert runner.wait(60) and runner.ending == "next"
