"""The rate finder: a short run with Prodigy's own rate, that leaves nothing but a record and a proposal."""

from __future__ import annotations

import pytest

from lib_lora_train import events
from lib_lora_train.api import service
from lib_lora_train.errors import SettingError
from lib_lora_train.run.rate_finder import find_rate, plan_finder, proposal
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import flat, parse
from tests.jobs import run_settings

pytest.importorskip("prodigyopt")


def settings(images, **changes: object):
    return parse({"train_data_dir": str(images), "output_name": "zzk", "resolution": "64", "min_bucket_reso": 64,
                  "network_dim": 4, "network_alpha": 4.0, "trigger_word": "zzk", "seed": 3, **changes})


def found(chosen, host, *, steps: int):
    seen: list[events.Event] = []
    finished = find_rate(plan_finder(chosen, host, steps=steps), host, requested=chosen, report=seen.append, stop=lambda: "")
    diagnosed, = [event for event in seen if isinstance(event, events.Diagnosed)]
    return finished, diagnosed


def test_the_rate_is_that_of_a_run_with_prodigy_and_nothing_is_saved(images, host):
    # A rate, a schedule and a LoRA+ ratio of the run's own have no part in it.
    chosen = settings(images, learning_rate=7e-5, lr_scheduler="cosine", loraplus_lr_ratio=4.0, save_every_n_epochs=1)
    finished, diagnosed = found(chosen, host, steps=12)
    assert not host.lora_folder.exists() or not list(host.lora_folder.rglob("*.safetensors"))
    steps: list[events.Step] = []
    run_settings(settings(images, optimizer_type="Prodigy", learning_rate=1.0, lr_scheduler="constant",
                          max_train_steps=12, validation=False, sample_images=False, save_every_n_epochs=0), host,
                 report=lambda event: steps.append(event) if isinstance(event, events.Step) else None, stop=lambda: "")
    expected = steps[-1].learning_rate
    assert expected > 2e-6
    assert (diagnosed.finding, diagnosed.setting) == ("rate", "learning_rate")
    assert float(diagnosed.value) == pytest.approx(expected, rel=0.05)  # two digits
    assert (finished.outcome, finished.path, finished.message) == ("done", "", diagnosed.message)


def test_lion_gets_a_third_and_a_rate_of_the_unets_own_is_the_one_to_change():
    rates = [1e-6, 3e-4, 9e-4, 9e-4, 9e-4]
    assert proposal(rates, parse({"optimizer_type": "AdamW8bit"})).value == "0.0009"
    lion = proposal(rates, parse({"optimizer_type": "Lion", "unet_lr": 1e-5}))
    assert (lion.setting, lion.value) == ("unet_lr", "0.0003")
    assert "still rising" not in lion.message
    assert "still rising" in proposal([1e-6, 1e-5, 1e-4, 1e-3], parse({})).message


def test_a_rate_that_never_rose_is_no_proposal():
    diagnosed = proposal([1e-6] * 5, parse({}))
    assert (diagnosed.finding, diagnosed.setting) == ("no effect", "")


@pytest.mark.parametrize(("optimizer", "why"), [
    ("Prodigy", "itself"), ("Adafactor", "itself"), ("SGDNesterov", "AdamW and Lion")])
def test_an_optimizer_that_needs_none_or_another_is_refused(images, host, optimizer, why):
    chosen = settings(images, optimizer_type=optimizer, learning_rate=1.0)
    with pytest.raises(SettingError, match=why):
        plan_finder(chosen, host)


def test_it_runs_as_any_run_does_and_the_fields_stay_the_users(images, host):
    runner = Runner()
    chosen = settings(images)
    service.find_learning_rate(flat(chosen), runner=runner, host=host)
    assert runner.settings() == flat(chosen)
    assert runner.stop(save=True)
    assert runner.wait(60)
    status = service.status(runner=runner, host=host)
    assert status["finished"]["outcome"] == "stopped" and not status["saved"]
