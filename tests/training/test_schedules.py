"""Learning rate schedules against transformers, and against the formulas of papers and later versions of it."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import get_scheduler
from transformers.optimization import get_polynomial_decay_schedule_with_warmup

from lib_lora_train.run.optimizing import schedule_config
from lib_lora_train.settings import DECLARATIONS, parse
from lib_lora_train.training.schedules import ScheduleConfig, learning_rate_factor

STEPS = 40


def factors(name: str, **values) -> list[float]:
    return [learning_rate_factor(ScheduleConfig(name, steps=STEPS, **values), step) for step in range(STEPS)]


def of_transformers(scheduler: torch.optim.lr_scheduler.LRScheduler, *, rate: float = 1.0) -> list[float]:
    found = []
    for _ in range(STEPS):
        found.append(scheduler.get_last_lr()[0] / rate)
        scheduler.optimizer.step()
        scheduler.step()
    return found


def sgd(rate: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


@pytest.mark.parametrize("ours, theirs", [
    ("constant", "constant_with_warmup"), ("constant_with_warmup", "constant_with_warmup"), ("linear", "linear"),
    ("cosine", "cosine"), ("cosine_with_restarts", "cosine_with_restarts"), ("inverse_sqrt", "inverse_sqrt")])
@pytest.mark.parametrize("warmup", [0, 7])
def test_learning_rates_are_those_of_transformers(ours, theirs, warmup):
    if (theirs, warmup) == ("inverse_sqrt", 0):  # which transformers 4.30 divides by
        assert factors(ours)[39] == pytest.approx((1 + 39 / 10_000) ** -0.5)
        return
    expected = of_transformers(get_scheduler(theirs, sgd(), num_warmup_steps=warmup, num_training_steps=STEPS))
    assert factors(ours, warmup=warmup) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("power", [1, 2.5])
def test_polynomial_ends_at_the_rate_where_it_ends_in_transformers(power):
    expected = of_transformers(get_polynomial_decay_schedule_with_warmup(sgd(2e-4), 5, STEPS, power=power), rate=2e-4)
    config = schedule_config(parse({"lr_scheduler": "polynomial", "lr_scheduler_power": power, "learning_rate": 2e-4,
                                    "lr_warmup_steps": 5}), steps=STEPS)
    assert [learning_rate_factor(config, step) for step in range(STEPS)] == pytest.approx(expected, abs=1e-9)


def test_restarts_begin_again_at_the_full_rate():
    found = factors("cosine_with_restarts", cycles=4)
    assert [found[i] for i in (0, 10, 20, 30)] == [1.0] * 4
    assert found[9] < 0.05


@pytest.mark.parametrize("cycles", [1, 3])
def test_cosine_with_a_floor_is_that_of_transformers_454_with_kohyas_number_of_cycles(cycles):
    """_get_cosine_schedule_with_warmup_lr_lambda with min_lr_rate; sd-scripts hands on half of the cycles."""
    def expected(step):
        if step < 8:
            return step / 8
        progress = (step - 8) / (STEPS - 8)
        return 0.5 * (1 + math.cos(math.pi * (cycles / 2) * 2 * progress)) * (1 - 0.2) + 0.2
    assert factors("cosine_with_min_lr", warmup=8, cycles=cycles, min_lr_ratio=0.2) == pytest.approx(
        list(map(expected, range(STEPS))))


@pytest.mark.parametrize("decay", [12, 0])
def test_warm_up_stable_decay_is_that_of_transformers_454(decay):
    """_get_wsd_scheduler_lambda with warmup_type linear and decay_type cosine; without a choice a tenth decays."""
    length = decay or 4

    def expected(step):
        if step < 8:
            return step / 8 * (1 - 0.1) + 0.1
        if step < STEPS - length:
            return 1.0
        progress = (step - (STEPS - length)) / length
        return 0.5 * (1 + math.cos(math.pi * progress)) * (1 - 0.1) + 0.1
    assert factors("warmup_stable_decay", warmup=8, decay=decay, min_lr_ratio=0.1) == pytest.approx(
        list(map(expected, range(STEPS))))
    assert learning_rate_factor(ScheduleConfig("warmup_stable_decay", steps=STEPS, decay=decay, min_lr_ratio=0.1), STEPS) == 0.1


def test_rex_is_the_papers():
    """arXiv 2107.04197: η_t = η_0 · (1 - t/T) / (1/2 + 1/2 · (1 - t/T))."""
    found = factors("rex", warmup=4)
    assert found[4:] == pytest.approx([(1 - t / 36) / (0.5 + 0.5 * (1 - t / 36)) for t in range(36)])
    assert found[22] > 0.5  # it holds on to the rate for longer than a line


def test_each_setting_of_schedules_changes_what_it_belongs_to():
    changes = {"lr_scheduler_num_cycles": ("cosine_with_restarts", 3), "lr_scheduler_power": ("polynomial", 2),
               "lr_scheduler_min_lr_ratio": ("cosine_with_min_lr", 0.3), "lr_decay_steps": ("warmup_stable_decay", 0.5),
               "lr_scheduler_timescale": ("inverse_sqrt", 10), "lr_warmup_steps": ("linear", 0.25)}

    def curve(values):
        config = schedule_config(parse(values), steps=STEPS)
        return [learning_rate_factor(config, step) for step in range(STEPS)]
    for name, (schedule, value) in changes.items():
        assert curve({"lr_scheduler": schedule}) != curve({"lr_scheduler": schedule, name: value}), name
    curves = {name: tuple(curve({"lr_scheduler": name, "lr_warmup_steps": 5, "lr_scheduler_min_lr_ratio": 0.1,
                                 "lr_scheduler_num_cycles": 2, "lr_scheduler_power": 2}))
              for name in DECLARATIONS["lr_scheduler"].choices}
    same = {"constant", "constant_with_warmup", "adafactor"}
    assert len({curves[name] for name in curves if name not in same}) == len(curves) - len(same)
    assert len({curves[name] for name in same}) == 1
