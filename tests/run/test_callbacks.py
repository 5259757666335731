"""What a user may ask of a run that goes on, and the time after which it ends by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from lib_lora_train import events
from lib_lora_train.run import callbacks, job
from lib_lora_train.run.callbacks import Pause, TimeLimit
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import parse
from tests.fake_host import FakeHost
from tests.jobs import plan_of, run_settings
from tests.run.test_job import of, run, settings


def at(step: int) -> SimpleNamespace:
    return SimpleNamespace(step=step)


def test_the_time_is_over_after_the_minutes_but_not_before_the_first_step():
    now = [100.0]
    limit = TimeLimit(2, clock=lambda: now[0])
    now[0] = 219.9
    assert limit.before_step(at(3)) and not limit.stopped
    now[0] = 220.0
    assert limit.before_step(at(0)) and not limit.before_step(at(1)) and "max_train_minutes" in limit.stopped
    now[0] = 1e9
    unlimited = TimeLimit(0, clock=lambda: now[0])
    now[0] = 2e9
    assert unlimited.before_step(at(1))


def test_a_run_whose_time_is_over_is_kept_and_says_why_it_ended(images, host):
    finished, seen = run(settings(images, max_train_minutes=1e-6), host)
    assert finished.outcome == "stopped" and finished.steps == 1 == len(of(events.Step, seen))
    assert "max_train_minutes" in finished.message and load_file(finished.path)


def test_a_save_is_made_between_two_steps_when_it_is_asked_for_and_the_run_goes_on(images, host, monkeypatch):
    asked, original = iter([True, True]), job.run_job
    monkeypatch.setattr("tests.jobs.run_job", lambda plan, host, **given: original(
        plan, host, save_now=lambda: next(asked), **given))
    seen: list[events.Event] = []
    folder = host.runs_folder / "zzk-1"
    run_settings(settings(images, max_train_steps=3, save_every_n_steps=2, save_every_n_epochs=0), host, report=seen.append,
                 stop=lambda: "", folder=folder)
    # Asked before step 2, and before step 3, when what was learnt is saved already; before the first there is nothing to save.
    assert [(saved.step, saved.final) for saved in of(events.Saved, seen)] == [(1, False), (2, False), (3, True)]


def test_a_save_is_asked_for_while_a_run_is_under_way_and_once_for_each_time(tmp_path, monkeypatch):
    answers, one = [], Runner()

    def fake(plan, host, *, report, stop, sample_now, save_now, paused, folder):
        answers.extend([save_now(), one.save_now(), sample_now(), save_now(), save_now()])
        return events.Finished("done", "ready", "", 1)
    monkeypatch.setattr("lib_lora_train.run.runner.run_job", fake)
    assert not one.save_now()
    one.start(plan_of(parse({"output_name": "zzk"})), FakeHost(tmp_path))
    assert one.wait(30) and answers == [False, True, False, True, False] and not one.save_now()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_paused_run_stands_still_lets_others_through_and_goes_on_or_ends(monkeypatch, stopped):
    done, seen = [], []
    monkeypatch.setattr(callbacks.time, "sleep", lambda seconds: done.append("slept"))
    leased = SimpleNamespace(others_waiting=lambda: done.append("others asked"))  # nobody waits
    progress = SimpleNamespace(step=3, flush=lambda: done.append("told"), release=lambda: done.append("released"))
    pause = Pause(leased, None, None, enabled=True, report=seen.append, paused=lambda: done.count("slept") < 3,
                  stop=lambda: "stop" if stopped and "slept" in done else "")
    assert pause.before_step(progress) is not stopped
    assert done[:2] == ["told", "released"] and [stage.name for stage in seen] == ["Paused"]
    assert done.count("slept") == (1 if stopped else 3) and done.count("others asked") >= done.count("slept")
    done.clear()
    running = Pause(leased, None, None, enabled=True, report=seen.append, paused=lambda: False, stop=lambda: "")
    assert running.before_step(progress)
    assert done == ["others asked"] and len(seen) == 1


def test_a_pause_is_asked_for_while_a_run_is_under_way_and_not_of_the_next_one(tmp_path, monkeypatch):
    answers, one, host = [], Runner(), FakeHost(tmp_path)

    def fake(plan, host, *, report, stop, sample_now, save_now, paused, folder):
        answers.extend([paused(), one.pause(True), paused(), paused(), one.pause(False), paused(), one.pause(True)])
        return events.Finished("done", "ready", "", 1)
    monkeypatch.setattr("lib_lora_train.run.runner.run_job", fake)
    assert not one.pause(True)
    for name in ("zzk", "other"):
        answers.clear()
        one.start(plan_of(parse({"output_name": name})), host)
        assert one.wait(30) and answers == [False, True, True, True, True, False, True]
