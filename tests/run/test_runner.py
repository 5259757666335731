"""One job at a time, watched and stopped from elsewhere, and remembered on disk."""

from __future__ import annotations

import json
import sys
import threading

import pytest

from lib_lora_train import events
from lib_lora_train.api import service
from lib_lora_train.errors import HostError, OutputError, TrainingError, UserError
from lib_lora_train.run import runner
from lib_lora_train.run.record import past_runs, read_events
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import flat, parse
from lib_lora_train.storage.lock import is_locked
from tests.fake_host import FakeHost, interrupted_run
from tests.jobs import plan_of

SETTINGS = parse({"output_name": "zzk", "trigger_word": "zzk"})


def step(number: int, total: int = 100, loss: float = 0.5) -> events.Step:
    return events.Step(number, total, 1, 1, loss, loss, 1e-4, 0.0, 2.0, 10.0)


@pytest.fixture
def fake(tmp_path):
    return FakeHost(tmp_path)


def started(monkeypatch, fake, job) -> Runner:
    monkeypatch.setattr(runner, "run_job", job)
    one = Runner()
    one.start(plan_of(SETTINGS), fake)
    return one


def test_a_second_start_is_refused_while_the_first_runs(monkeypatch, fake):
    go = threading.Event()

    def job(settings, host, *, report, stop, sample_now, save_now, paused, folder=None):
        assert go.wait(30)
        return events.Finished("done", "ready", "zzk.safetensors", 1)
    one = started(monkeypatch, fake, job)
    with pytest.raises(HostError, match="already"):
        one.start(plan_of(SETTINGS), fake)
    go.set()
    assert one.wait(30) and one.status().finished.outcome == "done"
    one.start(plan_of(SETTINGS), fake)
    assert one.wait(30)


def test_a_run_is_over_only_when_the_next_one_may_start(monkeypatch, fake):
    """Its last word goes into the record and to the host's display before: these take their time."""
    seen, one = [], Runner()

    def report(event: events.Event) -> None:
        status = one.status()
        seen.append((event.kind, one.running(), status.running, status.finished))
        with pytest.raises(HostError, match="already"):
            one.start(plan_of(SETTINGS), fake)
    fake.report = report
    monkeypatch.setattr(runner, "run_job", lambda plan, host, **_: events.Finished("done", "ready", "", 1))
    one.start(plan_of(SETTINGS), fake)
    while one.running() or one.status().running:
        pass
    assert one.status().finished.outcome == "done" and seen == [("finished", True, True, None)]
    one.start(plan_of(SETTINGS), fake)  # without a wait for the thread
    assert one.wait(30) and len(seen) == 2


def test_a_job_that_waits_for_its_host_is_shown_as_such_and_need_not_wait_on(monkeypatch, fake):
    def job(settings, host, *, report, stop, sample_now, save_now, paused, folder=None):
        while not stop():
            pass
        return events.Finished("stopped", "given up", "", 0)
    fake.busy = True
    one = started(monkeypatch, fake, job)
    assert service.status(runner=one, host=fake)["waiting"] is True
    one.stop(save=True)
    assert one.wait(30) and service.status(runner=one, host=fake)["waiting"] is False


def test_stopping_reaches_the_job_with_its_kind(monkeypatch, fake):
    reached = threading.Event()

    def job(settings, host, *, report, stop, sample_now, save_now, paused, folder=None):
        reached.set()
        while not stop():
            pass
        return events.Finished("stopped", stop(), "", 0)
    one = started(monkeypatch, fake, job)
    assert reached.wait(30) and one.stop(save=True)
    assert one.wait(30) and one.status().finished.message == "save"
    assert not one.stop(save=False)


@pytest.mark.parametrize("error, words", [
    (TrainingError("The loss is no number", remedy="lower it"), "The loss is no number; lower it."),
    (ZeroDivisionError("oops"), "ZeroDivisionError: oops")])
def test_however_a_job_fails_the_watcher_hears_of_it(monkeypatch, fake, error, words):
    def job(settings, host, *, report, stop, sample_now, save_now, paused, folder=None):
        report(step(3))
        raise error
    one = started(monkeypatch, fake, job)
    assert one.wait(30)
    finished = one.status().finished
    assert (finished.outcome, finished.steps) == ("failed", 3) and words in finished.message


def test_the_curve_stays_short_and_covers_the_whole_run(monkeypatch, fake):
    def job(settings, host, *, report, stop, sample_now, save_now, paused, folder=None):
        for number in range(1, 5001):
            report(step(number, 5000, loss=number))
        return events.Finished("done", "ready", "", 5000)
    one = started(monkeypatch, fake, job)
    assert one.wait(60)
    status = one.status()
    numbers = [point[0] for point in status.points]
    assert len(numbers) <= 1000 and numbers[0] == 1 and numbers[-1] > 4980
    assert all(number % status.every == 0 for number in numbers[1:]) and all(loss == n for n, loss, _ in status.points)
    assert one.status(after=4000).points == tuple(p for p in status.points if p[0] > 4000)


def test_a_run_is_a_folder_that_can_be_read_back(monkeypatch, fake):
    def job(settings, host, *, report, stop, sample_now, save_now, paused, folder=None):
        report(events.Warned("one caption is empty"))
        report(step(1))
        report(events.Saved("a/zzk.safetensors", 1, 1, True))
        return events.Finished("done", "ready", "a/zzk.safetensors", 1)
    one = started(monkeypatch, fake, job)
    assert one.wait(30)
    past, = past_runs(fake.runs_folder)
    assert (past.name, past.outcome, past.path, past.steps) == ("zzk", "done", "a/zzk.safetensors", 1)
    assert [e.kind for e in read_events(fake.runs_folder / past.id)] == ["warning", "step", "saved", "finished"]


def test_a_run_that_was_cut_off_and_a_torn_line_are_read_as_far_as_they_go(monkeypatch, fake):
    one = started(monkeypatch, fake, lambda plan, host, **_: events.Finished("done", "ready", "", 1))
    assert one.wait(30)
    folder, = fake.runs_folder.iterdir()
    (folder / "events.jsonl").write_text('{"event": "warning", "message": "a"}\n{"event": "st', encoding="utf-8")
    past = past_runs(fake.runs_folder)[0]
    assert (past.outcome, past.resume_step) == ("interrupted", None) and "before the first step" in past.message


def test_a_name_that_cannot_be_a_file_starts_nothing(fake):
    with pytest.raises(OutputError):
        Runner().start(plan_of(parse({"output_name": "a/b"})), fake)
    assert not fake.runs_folder.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only there a file's name may be bytes that are no text")
def test_a_picture_whose_name_is_no_text_is_trained_and_told(images, host):
    folder = images / "2_\udce9t\udce9"  # what Python makes of Latin-1 names
    folder.mkdir()
    (images / "0.png").rename(folder / "\udc93\udcfa.png")
    one = Runner()
    service.start({"train_data_dir": str(images), "resolution": "64", "min_bucket_reso": 64, "output_name": "zzk",
                   "max_train_steps": 1, "network_train_unet_only": False, "sample_images": False, "validation": False},
                  runner=one, host=host)
    assert one.wait(60) and one.status().finished.outcome == "done"
    json.dumps(service.status(runner=one, host=host), ensure_ascii=False).encode()
    assert past_runs(host.runs_folder)[0].outcome == "done"
    (folder / "\udc93\udcfa.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        service.plan({"train_data_dir": str(images)}, host=host)
    str(caught.value).encode()


def test_a_record_that_cannot_be_written_is_told_once_and_costs_nothing(monkeypatch, fake, caplog):
    (fake.runs_folder.parent / fake.runs_folder.name).write_text("a file where the folder should be", encoding="utf-8")

    def job(settings, host, *, report, stop, sample_now, save_now, paused, folder=None):
        report(step(1))
        return events.Finished("done", "ready", "", 1)
    one = started(monkeypatch, fake, job)
    assert one.wait(30) and one.status().finished.outcome == "done"
    assert [record.message for record in caplog.records if "incomplete" in record.message] == [caplog.records[0].message]


def test_a_run_whose_thread_cannot_be_started_leaves_its_folder_free(monkeypatch, fake):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(threading.Thread, "start", refuse)
        started(monkeypatch, fake, lambda *_, **__: None)
    folder, = fake.runs_folder.iterdir()
    assert not is_locked(folder)


def test_the_curve_of_a_resumed_run_begins_where_the_run_began(monkeypatch, fake, tmp_path):
    chosen = parse({"output_name": "zzk", "train_data_dir": str(tmp_path)})
    run = interrupted_run(fake, chosen, step=10)

    def job(settings, host, *, report, stop, sample_now, save_now, paused, folder=None):
        assert folder == fake.runs_folder / run
        report(events.Planned(3, 1, 10, 10, 100, "3 pictures", "64x64", "dreamshaper_8", 42, resumed_at=10))
        report(step(11))
        return events.Finished("stopped", "enough", "", 11)
    monkeypatch.setattr(runner, "run_job", job)
    one = Runner()
    one.start(plan_of(parse({**flat(chosen), "resume": run})), fake)
    assert one.wait(30) and [point[0] for point in one.status().points] == list(range(1, 12))
