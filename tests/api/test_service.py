"""What the page says before the start."""

from __future__ import annotations

from lib_lora_train import events
from lib_lora_train.api import service
from lib_lora_train.run.runner import Status


def test_the_plan_of_a_loaded_model_tells_time_and_memory(images, host):
    plan = service.plan({"train_data_dir": str(images), "resolution": "64", "min_bucket_reso": 64}, host=host)
    assert plan["estimate"].startswith("about ") and plan["estimate"].endswith("GB of memory")


def test_a_memory_budget_is_told_and_what_is_given_up_for_it(images, host):
    asked = {"train_data_dir": str(images), "resolution": "128", "min_bucket_reso": 64}
    roomy = service.plan({**asked, "memory_budget": 4}, host=host)
    assert "of 4.0 GB" in roomy["estimate"] and "nothing has to be given up" in roomy["estimate"]
    tight = service.plan({**asked, "memory_budget": 0.001}, host=host)
    assert "every block is computed twice" in tight["estimate"]
    assert any("more than there is" in warning for warning in tight["warnings"]) and roomy["warnings"] != tight["warnings"]


def test_a_resolution_between_two_bucket_sizes_is_planned_as_it_is_trained(images, host):
    plan = service.plan({"train_data_dir": str(images), "resolution": "100", "min_bucket_reso": 64}, host=host)
    assert plan["estimate"].startswith("about ") and plan["resolution"] == [100, 100]


class Ran:
    """A runner whose run made `step` of 100 steps that were to take 50 s in all."""

    def __init__(self, step: events.Step | None) -> None:
        planned = events.Planned(3, 1, 10, 10, 100, "", "64×64", "tiny", 42, seconds=50.0)
        self._status = Status("zzk-1", "zzk", True, "", 0.0, planned, None, step, (), (), None, (), 1)

    def status(self, *, after: int = 0) -> Status:
        return self._status

    def settings(self) -> dict[str, object]:
        return {}


def step(number: int, speed: float | None, left: float | None) -> events.Step:
    return events.Step(number, 100, 1, 10, 0.1, 0.1, 1e-4, 0.0, speed, left)


def test_the_time_left_is_the_estimate_until_steps_are_measured(host):
    for made, seconds in ((None, 50.0), (step(1, None, None), 50.0), (step(20, 0.5, 160.0), 160.0)):
        assert service.status(runner=Ran(made), host=host)["seconds_left"] == seconds


def test_an_estimate_is_corrected_by_the_steps_that_were_measured(images, host, monkeypatch):
    asked = {"train_data_dir": str(images), "resolution": "64", "min_bucket_reso": 64, "max_train_steps": 400}
    monkeypatch.setattr(service, "seconds_per_step", lambda *_, **__: 0.5)
    assert service.plan(asked, host=host)["estimate"].startswith("about 3 min")
    # Half a second a step was estimated, two were measured: 400 steps take 800 s.
    assert service.plan(asked, host=host, runner=Ran(step(20, 0.5, 160.0)))["estimate"].startswith("about 13 min")
    # The first steps, and those of another size, say little.
    larger = {**asked, "resolution": "128"}
    for chosen, made in ((asked, 3), (larger, 20)):
        assert service.plan(chosen, host=host, runner=Ran(step(made, 0.5, 160.0)))["estimate"].startswith("about 3 min")


def test_without_a_model_nothing_is_guessed(images, host):
    host.checkpoint_file = None
    plan = service.plan({"train_data_dir": str(images), "resolution": "64", "min_bucket_reso": 64}, host=host)
    assert plan["estimate"] == "" and plan["steps"] > 0
