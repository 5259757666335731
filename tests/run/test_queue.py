"""The queue of runs: nothing is lost or run twice, whenever the program is killed; one run after another, each in its time."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lib_lora_train.errors import HostError, OutputError, SettingError
from lib_lora_train.events import Finished, Planned
from lib_lora_train.host.port import Checkpoint, ModelSource, same_title
from lib_lora_train.run import queue as queue_module
from lib_lora_train.run.queue import RunQueue
from lib_lora_train.run.queue_file import Entry
from lib_lora_train.run.record import RunRecord
from lib_lora_train.settings import Settings, parse


class Killed(BaseException):
    """The process is gone."""


class NoRunner:
    """Runs nothing; who wants something running says so."""

    busy, needs_model, writes = False, False, True

    def refuse(self, settings: Settings) -> None:
        pass

    @contextlib.contextmanager
    def other_model(self) -> Iterator[None]:
        if self.needs_model:
            raise HostError("The grid is being painted")
        yield

    def saves(self) -> bool:
        return self.writes

    def running(self) -> bool:
        return self.busy

    def settings(self) -> dict[str, object]:
        return {"output_name": "trained"}


class OneModel(ModelSource):
    """Holds one of two models, and tells which were chosen."""

    def __init__(self) -> None:
        self.title, self.chosen, self.used = "first", [], False
        self.lora_folder = Path("loras")

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.title, self.title, "sd1")

    def select(self, title: str) -> str:
        if title == "gone":
            raise HostError("The checkpoint gone is not here")
        before, self.title = self.title, title
        if before != title:
            self.chosen.append(title)
        return before

    def idle(self) -> bool:
        return not self.used


@dataclasses.dataclass
class World:
    """A queue on a folder, whose runs end at once, and how often each was begun."""

    folder: Path
    host: OneModel = dataclasses.field(default_factory=OneModel)
    runner: NoRunner = dataclasses.field(default_factory=NoRunner)
    begun: Counter[str] = dataclasses.field(default_factory=Counter)
    failing: str = ""
    now: float = 1000.0
    kill: Callable[[], None] = lambda: None

    def queue(self) -> RunQueue:
        queue = RunQueue(self.host, self.runner, self.folder, start=self.start, clock=lambda: self.now)
        queue.open()
        return queue

    def start(self, entry: Entry, folder: Path) -> None:
        self.kill()
        if entry.name == self.failing:
            raise SettingError("The folder of pictures is gone")
        record = RunRecord(folder, parse(entry.settings))
        try:
            self.begun[entry.name] += 1
            self.kill()
            record.write(Planned(3, 1, 1, 1, 3, "", "", "", 0))
            self.kill()
            record.write(Finished("done", "It is saved.", "", 3))
        finally:  # the system does so where the process is killed
            record.close()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(queue_module, "_POLL_SECONDS", 1e6)  # the tests take each look themselves
    yield World(tmp_path / "runs")


def run(name: str) -> Settings:
    return parse({"output_name": name})


def work(queue: RunQueue, times: int) -> None:
    for _ in range(times):
        queue.check()


@pytest.mark.parametrize("point", range(1, 22))
def test_whenever_it_is_killed_no_run_is_lost_and_none_is_begun_twice(
        world: World, monkeypatch: pytest.MonkeyPatch, point: int) -> None:
    """`point` counts the moments before and after each write to the disk and within each run."""
    queue, names = world.queue(), ["one", "two", "three"]
    for name in names:
        queue.add(run(name))
    moments, write = iter(range(1, 1000)), queue_module.write_atomic

    def kill() -> None:
        if next(moments) == point:
            raise Killed

    def write_or_die(*arguments: object) -> None:
        kill()
        write(*arguments)
        kill()

    world.kill = kill
    monkeypatch.setattr(queue_module, "write_atomic", write_or_die)
    with pytest.raises(Killed):
        work(queue, 4)
    queue.close()
    queue = world.queue()
    work(queue, 5)
    states = {entry.name: entry.state for entry in queue.entries()}
    assert list(states) == names
    assert world.begun == dict.fromkeys(names, 1)
    assert sorted(states.values())[:2] == ["done", "done"]
    assert set(states.values()) <= {"done", "interrupted"}
    queue.close()


def test_one_that_ended_can_wait_again(world: World) -> None:
    queue = world.queue()
    world.failing = "one"
    first = queue.add(run("one"))
    work(queue, 2)
    with pytest.raises(SettingError):
        queue.retry(first.id, resume=True)  # it has saved no state
    world.failing = ""
    queue.retry(first.id, resume=False)
    work(queue, 2)
    assert [entry.state for entry in queue.entries()] == ["done"]
    queue.close()


def test_one_that_cannot_begin_is_told_and_the_next_has_its_turn(world: World) -> None:
    queue = world.queue()
    world.failing = "one"
    for name in ("one", "two"):
        queue.add(run(name))
    work(queue, 3)
    one, two = queue.entries()
    assert (one.state, one.message) == ("failed", "The folder of pictures is gone.")
    assert two.state == "done"
    queue.close()


def test_each_trains_on_its_own_model_and_the_first_is_back_at_the_end(world: World) -> None:
    queue = world.queue()
    for name, model in (("one", "second"), ("two", "gone"), ("three", "second")):
        queue.add(run(name), checkpoint=model)
    work(queue, 5)
    assert [entry.state for entry in queue.entries()] == ["done", "failed", "done"]
    assert world.host.chosen == ["second", "first"]
    queue.close()


def test_the_model_is_not_changed_while_something_needs_it(world: World) -> None:
    queue = world.queue()
    queue.add(run("other"), checkpoint="second")
    queue.add(run("same"), checkpoint="first")
    world.runner.needs_model = True
    work(queue, 2)
    assert (list(world.begun), world.host.chosen) == (["same"], [])
    world.runner.needs_model, world.now = False, world.now + 61
    queue.check()
    assert world.begun["other"] == 1
    world.runner.needs_model = True
    queue.check()
    assert world.host.title == "second"  # the user's is back when nothing needs this one
    world.runner.needs_model = False
    queue.check()
    assert world.host.title == "first"
    queue.close()


def test_a_closed_queue_begins_nothing_until_it_is_opened_again(world: World) -> None:
    queue = world.queue()
    queue.add(run("one"))
    queue.close()
    queue.check()
    assert not world.begun
    queue.open()

    def closed_meanwhile() -> None:  # between its choice and its start, as in `Runner.start`
        queue.close()
        queue.refuse_others(Settings())

    world.kill = closed_meanwhile
    queue.check()
    world.kill = lambda: None
    queue.open()
    work(queue, 2)
    assert ([entry.state for entry in queue.entries()], world.begun) == (["done"], {"one": 1})
    queue.close()


@pytest.mark.parametrize("minutes", [-1, 1441, float("nan"), float("inf"), 10**400], ids=["-1", "1441", "nan", "inf", "10^400"])
def test_a_wait_that_cannot_be_is_refused(world: World, minutes: float) -> None:
    with pytest.raises(SettingError):
        world.queue().add(run("one"), idle_minutes=minutes)


def test_a_model_that_the_user_chose_meanwhile_stays(world: World) -> None:
    queue = world.queue()
    queue.add(run("one"), checkpoint="second [0123456789]")
    queue.check()
    assert same_title(world.host.title, "second")
    world.host.title = "third"
    work(queue, 2)
    assert world.host.title == "third"
    queue.close()


def test_nobody_else_begins_while_a_run_of_the_queue_is_about_to(world: World) -> None:
    queue, answers = world.queue(), []
    queue.add(run("one"))

    def press() -> None:
        try:
            queue.refuse_others(Settings())
        except HostError as error:
            answers.append(error)

    def from_elsewhere() -> None:
        if not answers:
            thread = threading.Thread(target=press)
            thread.start()
            thread.join()
            press()  # the queue itself may

    world.kill = from_elsewhere
    work(queue, 2)
    assert len(answers) == 1
    press()
    assert len(answers) == 1
    queue.close()


def test_a_run_to_go_on_with_that_was_killed_before_it_began_waits_again(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = world.queue()
    monkeypatch.setattr(queue_module, "step_to_resume", lambda folder: 2)
    first = queue.add(run("one"))
    work(queue, 2)
    queue.retry(first.id, resume=True)
    with pytest.raises(SettingError):
        queue.edit(first.id, run("other"))  # it has the settings it had

    def killed() -> None:
        raise Killed

    world.kill = killed
    with pytest.raises(Killed):
        queue.check()
    queue.close()
    world.kill = lambda: None
    queue = world.queue()
    again = queue.entry(first.id)
    assert ([entry.state for entry in queue.entries()], again.resumes, world.begun["one"]) == (["waiting"], True, 1)
    work(queue, 2)
    assert (queue.entries()[0].state, world.begun["one"]) == ("done", 2)
    queue.close()


def test_it_waits_for_its_time_and_until_nobody_generates(world: World) -> None:
    queue = world.queue()
    queue.add(run("at night"), not_before=world.now + 3600)
    queue.add(run("in peace"), idle_minutes=10)
    world.host.used = True
    queue.check()
    world.host.used, world.now = False, world.now + 9 * 60
    queue.check()
    assert not world.begun
    world.now += 60
    queue.check()
    assert list(world.begun) == ["in peace"]
    world.now += 3000
    queue.check()
    assert list(world.begun) == ["in peace", "at night"]
    queue.close()


def test_a_held_queue_begins_nothing_also_after_a_restart(world: World) -> None:
    queue = world.queue()
    queue.add(run("one"))
    queue.hold(True)
    queue.close()
    queue = world.queue()
    queue.check()
    assert not world.begun
    queue.hold(False)
    queue.check()
    assert world.begun["one"] == 1
    queue.close()


def test_the_order_is_the_users(world: World) -> None:
    queue = world.queue()
    ids = [queue.add(run(name)).id for name in ("one", "two", "three")]
    queue.move(ids[2], 0)
    queue.remove(ids[0])
    queue.edit(ids[1], run("renamed"))
    work(queue, 3)
    assert list(world.begun) == ["three", "renamed"]
    with pytest.raises(SettingError):
        queue.edit(ids[1], run("late"))
    queue.close()


def test_two_runs_never_write_one_file(world: World) -> None:
    queue = world.queue()
    queue.add(run("one"))
    other = queue.add(run("two"))
    with pytest.raises(OutputError):
        queue.add(run("one"))
    with pytest.raises(OutputError):
        queue.edit(other.id, run("one"))
    world.runner.busy, loras = True, world.host.lora_folder
    with pytest.raises(OutputError):
        queue.add(run("trained"))
    world.runner.writes = False  # the search for its learning rate
    queue.remove(queue.add(run("trained")).id)
    for spelt in (loras, loras.absolute(), loras / ".." / loras.name):
        with pytest.raises(OutputError):
            queue.add(parse({"output_name": "one", "output_dir": str(spelt)}))
    assert [entry.name for entry in queue.entries()] == ["one", "two"]
    queue.close()


def test_one_process_works_on_a_queue(world: World) -> None:
    queue = world.queue()
    queue.add(run("one"))
    with pytest.raises(HostError):
        world.queue()
    queue.close()


def test_a_damaged_file_is_kept_and_a_new_one_begun(world: World) -> None:
    world.folder.mkdir()
    (world.folder / "queue.json").write_text('{"entries": [{"id": 3}], "held": false}', encoding="utf-8")
    queue = world.queue()
    assert queue.entries() == ()
    queue.add(run("one"))
    assert [file.read_text(encoding="utf-8")[:12] for file in world.folder.glob("queue-damaged-*.json")] == ['{"entries": ']
    queue.close()


def test_what_was_pressed_by_hand_in_the_same_moment_goes_first(world: World) -> None:
    queue = world.queue()
    queue.add(run("one"))

    def pressed() -> None:
        world.runner.busy = True
        raise HostError("A training is running already")

    world.kill = pressed
    queue.check()
    assert [entry.state for entry in queue.entries()] == ["waiting"]
    world.kill, world.runner.busy = lambda: None, False
    world.now += 61
    queue.check()
    assert world.begun["one"] == 1
    queue.close()
