"""The verdict in words, on curves whose meaning is beyond doubt."""

from __future__ import annotations

import dataclasses
import math

import pytest

from lib_lora_train.evaluation.diagnosis import Gains, RunSummary, diagnose
from lib_lora_train.evaluation.words_check import WordsCheck
from lib_lora_train.events import Diagnosed, Measured, Saved
from lib_lora_train.settings import DECLARATIONS, parse
from lib_lora_train.settings.risks import risks

RUN = RunSummary(length="max_train_epochs", unet_rate="learning_rate", unet_lr=1e-4, text_encoder_lr=0.0, rank=16,
                 alpha=8.0, trigger_word="zzk", images=30, different=30, captioned=30, held_out=True)
UNADAPTED = (0.2, 0.1, 0.02)


def curve(training, held_out, *, strength=0.03, te=None, run=RUN, until=1.0, ended=True, **more) -> Diagnosed | None:
    """The verdict on gains over the model without the LoRA, at even steps of a run of ten epochs, up to a share of it."""
    gains = [Gains.of(Measured(0, 1, UNADAPTED, UNADAPTED, UNADAPTED, UNADAPTED, {}), spent=0.0)]
    for number, (own, held) in enumerate(zip(training, held_out, strict=True), start=1):
        spent = number / len(training) * until
        components = {"unet": strength * number / len(training), **({} if te is None else {"te": te})}
        gains.append(Gains.of(Measured(
            round(1000 * spent), max(1, round(10 * spent)), tuple(loss * (1 - own) for loss in UNADAPTED), UNADAPTED,
            tuple(loss * (1 - held) for loss in UNADAPTED), UNADAPTED, components), spent=spent))
    return diagnose(gains, run=run, ended=ended, **more)


def test_a_gain_that_comes_and_stays_is_learning():
    found = curve([0.1, 0.2, 0.25, 0.28, 0.3], [0.08, 0.12, 0.15, 0.16, 0.17])
    assert found.finding == "learning" and "17 %" in found.message and found.setting == ""


@pytest.mark.parametrize("size", [0.03, 0.1, 0.3])
def test_the_same_shape_has_the_same_finding_at_each_height(size):
    rising = [size * (1 - math.exp(-3 * i / 8)) for i in range(1, 9)]
    falling = [size * x for x in (0.4, 0.8, 1.0, 0.95, 0.8, 0.6, 0.4, 0.2)]
    assert curve(rising, rising).finding == "learning"
    assert curve(rising, falling).finding == "overfitting"


@pytest.mark.parametrize("best", [1, 2, 3, 4, 5])
def test_overfitting_names_the_epoch_of_the_best_held_out_loss_and_the_save_that_was_made_then(best):
    held_out = [0.2 - 0.03 * abs(epoch - best) for epoch in range(1, 9)]
    run = dataclasses.replace(RUN, length="max_train_steps")
    saves = [Saved(f"/loras/zzk-{125 * number:06}.safetensors", 125 * number, number, False) for number in range(1, 8)]
    found = curve([0.1 * i ** 0.5 for i in range(1, 9)], held_out, run=run, saves=saves)
    assert (found.finding, found.setting, found.value) == ("overfitting", "max_train_steps", str(125 * best))
    assert f"zzk-{125 * best:06}" in found.message


def test_the_more_is_lost_again_the_surer_it_is_overfitting():
    found = [curve([0.1, 0.2, 0.25, 0.28, 0.3], [0.08, 0.15, 0.15, 0.15 - loss / 2, 0.15 - loss]).finding
             for loss in (0.0, 0.005, 0.03, 0.06, 0.2)]
    assert found == sorted(found) and found[0] == "learning" and found[-1] == "overfitting"


@pytest.mark.parametrize("own", [-0.02, -0.5, -10.0])
def test_worse_than_without_it_on_its_own_pictures_is_diverging(own):
    found = curve([0.05, own], [0.04, own], strength=2.0)
    assert (found.finding, found.setting) == ("diverging", "learning_rate") and float(found.value) < RUN.unet_lr


def test_a_gain_that_is_lost_again_is_diverging():
    assert curve([0.2, 0.3, 0.25, 0.1], [0.15, 0.2, 0.15, 0.05]).finding == "diverging"


@pytest.mark.parametrize("factor", [10, 30, 100])
def test_too_low_a_rate_is_to_be_raised_towards_what_a_usual_lora_has(factor):
    found = curve([0.002 * i for i in range(1, 9)], [0.001 * i for i in range(1, 9)], strength=0.03 / factor)
    assert found.finding in ("too slow", "no effect") and found.setting == "learning_rate"
    assert factor / 3 <= float(found.value) / RUN.unet_lr <= factor


@pytest.mark.parametrize("length, steps, expected", [("max_train_steps", 3, 150), ("max_train_epochs", 3, 50)])
def test_a_run_of_a_few_steps_is_to_be_longer_and_not_hotter(length, steps, expected):
    run = dataclasses.replace(RUN, length=length)
    short = Gains.of(Measured(steps, 1, UNADAPTED, UNADAPTED, UNADAPTED, UNADAPTED, {"unet": 0.02 / 50}), spent=1.0)
    found = diagnose([short], run=run, ended=True)
    assert (found.finding, found.setting, int(found.value)) == ("no effect", length, expected)
    assert diagnose([short], run=dataclasses.replace(run, unet_lr=1e-6), ended=True).setting == "learning_rate"


def test_where_the_optimizer_finds_the_rate_no_other_one_is_advised():
    run = dataclasses.replace(RUN, unet_lr=1e-4, finds_rate=True)
    hot = curve([0.05, -0.5], [0.04, -0.5], strength=2.0, run=run)
    assert (hot.finding, hot.setting) == ("diverging", "") and "AdamW" in hot.message
    slow = curve([0.002 * i for i in range(1, 9)], [0.001 * i for i in range(1, 9)], strength=0.003, run=run)
    assert slow.setting == "max_train_epochs"


@pytest.mark.parametrize("rate", [1e-6, 1e-5, 1e-4, 1e-3, 4e-3, 0.1])
def test_no_rate_is_advised_that_the_plan_would_call_ruinous(rate):
    run = dataclasses.replace(RUN, unet_lr=rate)
    found = curve([1e-5] * 4, [1e-5] * 4, strength=1e-5, run=run)
    assert found.setting == ("learning_rate" if rate < 4e-3 else "max_train_epochs")
    if found.setting == "learning_rate":
        assert rate < float(found.value) and not list(risks(parse({"learning_rate": found.value}), steps=1000, images=30))


def test_a_tiny_alpha_is_named_in_place_of_the_rate():
    found = curve([1e-5] * 4, [1e-5] * 4, strength=1e-5, run=dataclasses.replace(RUN, alpha=0.01))
    assert (found.finding, found.setting) == ("no effect", "network_alpha") and 1 <= float(found.value) <= RUN.rank


def test_what_still_grows_as_fast_as_at_the_beginning_needs_a_longer_run():
    found = curve([0.03 * i for i in range(1, 9)], [0.02 * i for i in range(1, 9)])
    assert (found.finding, found.setting, found.value) == ("too slow", "max_train_epochs", "20")


def test_a_text_encoder_that_is_too_hot_is_named():
    run = dataclasses.replace(RUN, text_encoder_lr=1e-2)
    for training, held_out in (([0.2, 0.3], [0.1, 0.2]), ([0.2, 0.2, 0.3], [0.1, -0.1, -0.2]), ([-0.1, -0.2], [-0.1, -0.3])):
        found = curve(training, held_out, te=3.0, run=run)
        assert (found.finding, found.setting) == ("diverging", "text_encoder_lr") and float(found.value) < 1e-2


@pytest.mark.parametrize("run, words, setting", [
    ({"images": 3, "different": 3}, WordsCheck(), ""),
    ({"images": 20, "different": 1}, WordsCheck(), ""),
    ({"captioned": 0, "trigger_word": ""}, WordsCheck(), "trigger_word"),
    ({}, WordsCheck(fit=0.0, gain=-1.0, meaning=0.9), ""),
    ({}, WordsCheck(fit=0.9, gain=0.9, meaning=0.9, trigger_gain=-1.0, trigger_meaning=1.0), "trigger_word")])
def test_pictures_and_words_are_the_matter_before_the_first_step(run, words, setting):
    found = curve([], [], run=dataclasses.replace(RUN, **run), words=words, ended=False)
    assert (found.finding, found.setting) == ("words", setting)


@pytest.mark.parametrize("words", [
    WordsCheck(), WordsCheck(fit=0.9, gain=0.9, meaning=1.0, trigger_gain=-0.9, trigger_meaning=0.1),
    WordsCheck(fit=0.0, gain=-1.0, meaning=0.1), WordsCheck(fit=0.4, gain=-0.4, meaning=0.9),
    WordsCheck(fit=0.9, gain=0.9, meaning=1.0, trigger_gain=0.8, trigger_meaning=1.0)])
def test_right_captions_words_nobody_knows_and_a_class_word_are_no_matter(words):
    assert curve([], [], words=words) is None


def test_nothing_is_said_of_the_first_tenth():
    for training in ([0.3], [-5.0], [1e-6]):
        assert curve(training, training, until=0.09, ended=False) is None


@pytest.mark.parametrize("losses", [(math.nan, 0.1, 0.1), (0.1, math.inf, 0.1)])
def test_losses_that_are_no_numbers_are_ruined(losses):
    gains = Gains.of(Measured(10, 1, losses, UNADAPTED, UNADAPTED, UNADAPTED, {"unet": math.nan}), spent=0.01)
    assert diagnose([gains], run=RUN).finding == "ruined"


def test_what_is_ruined_for_the_saved_file_is_ruined_here():
    found = curve([0.1, 0.2], [0.1, 0.2], verdict=("ruined", "because"))
    assert found.finding == "ruined" and "because" in found.message


@pytest.mark.parametrize("training, held_out", [([0.1, 0.2], [0.1, 0.1]), ([-1, -2], [-1, -2]), ([0.1, 0.2], [0.1, -0.3])])
def test_a_setting_that_is_named_is_one_and_takes_the_value(training, held_out):
    found = curve(training, held_out)
    if found.setting:
        declaration = DECLARATIONS[found.setting]
        assert declaration.minimum <= float(found.value) <= declaration.maximum
