"""Values that are known to fail are told with the number, and those that people train with are not."""

from __future__ import annotations

import pytest

from lib_lora_train.settings import parse
from lib_lora_train.settings.presets import presets
from lib_lora_train.settings.risks import risks

RUN = {"steps": 1000, "images": 20}


@pytest.mark.parametrize("changes, run, number", [
    ({"learning_rate": 5}, RUN, "(learning_rate) = 5 "),
    ({"unet_lr": 0.01}, RUN, "(unet_lr) = 0.01 "),
    ({"learning_rate": 1e-8}, RUN, "(learning_rate) = 1e-08 "),
    ({"network_train_unet_only": False, "text_encoder_lr": 0.5}, RUN, "(text_encoder_lr) = 0.5 "),
    ({"network_dim": 16, "network_alpha": 128}, RUN, "8 times"),
    ({"lr_warmup_steps": 1000}, RUN, "1000 steps"),
    ({"train_batch_size": 8}, {"steps": 1000, "images": 5}, "5 pictures"),
    ({"train_batch_size": 4}, {"steps": 1000, "images": 5, "processes": 2}, "batch of 8"),
    ({}, {**RUN, "epoch": 5}, "100 LoRAs"),
    ({"save_every_n_steps": 10}, {**RUN, "epoch": 100}, "100 LoRAs"),
])
def test_a_value_that_is_known_to_fail_is_told_with_its_number_and_what_is_usual(changes, run, number):
    told, = risks(parse(changes), **run)
    assert number in told and "is usual" in told


@pytest.mark.parametrize("changes", [
    # From kohya's guide, and what people publish: rates of 1e-5 to 1e-3, alpha from 1 to the rank, or twice that.
    {}, *({"learning_rate": rate} for rate in (1e-5, 1e-4, 5e-4, 1e-3)), {"network_dim": 128, "network_alpha": 1},
    {"network_dim": 32, "network_alpha": 32}, {"network_dim": 8, "network_alpha": 16}, {"lr_warmup_steps": 100},
    {"train_batch_size": 20}, {"network_alpha": 4096, "network_weights": "a.safetensors"},
    {"network_alpha": 4096, "network_module": "OFT"},
    {"text_encoder_lr": 5}, *(dict(preset.values) for preset in presets())])
def test_values_that_people_train_with_are_not(changes):
    assert list(risks(parse(changes), **RUN)) == []
