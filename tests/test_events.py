"""Events: plain values that survive JSON."""

import dataclasses
import json
import math

import pytest

from lib_lora_train import events

ALL = [
    events.Planned(12, 2, 30, 10, 300, "12 pictures", "512×512", "dreamy", 42),
    events.Stage("Encoding pictures", 3, 12),
    events.Step(5, 300, 1, 10, 0.1, 0.2, 1e-4, 0.0, None, None),
    events.Saved("a/zzk.safetensors", 300, 10, True),
    events.Warned("a caption is empty"),
    events.HeldOut(("1.png", "7.png"), False),
    events.Measured(100, 4, (0.2, 0.1, 0.05), (0.3, 0.2, 0.1), (), (), {"unet": 0.02, "te": 0.01}, "a/zzk-000004.safetensors"),
    events.ImageLosses(300, ("1.png",), (0.1,), (0.2,)),
    events.Sampled(0, 1, 2, "zzk, a cat", 42, "samples/step-00000000-prompt-3.png"),
    events.Diagnosed(100, "too slow", "The LoRA learns too slowly: raise the learning rate to 3e-4.", "learning_rate", "3e-4"),
    events.Finished("done", "ready", "a/zzk.safetensors", 300),
]

WARNED = ALL[4]


@pytest.mark.parametrize("event", ALL, ids=lambda e: e.kind)
def test_an_event_comes_back_from_json_as_it_was(event):
    assert events.from_dict(json.loads(json.dumps(events.to_dict(event)))) == event


def test_a_loss_that_is_no_number_is_null_in_json_and_comes_back_as_none_of_them():
    event = dataclasses.replace(ALL[2], loss=math.nan, average_loss=math.inf)
    data = json.loads(json.dumps(events.to_dict(event), allow_nan=False))
    assert data["loss"] is data["average_loss"] is None
    read = events.from_dict(data)
    assert math.isnan(read.loss) and math.isnan(read.average_loss) and read.seconds_left is None


@pytest.mark.parametrize("event", ALL, ids=lambda e: e.kind)
def test_a_value_of_another_type_is_refused(event):
    for name, value in events.to_dict(event).items():
        for other in ({"a": [1]}, [{}], True, 7 if isinstance(value, str) else "7"):
            if name != "event" and not (other is True and isinstance(value, bool)):
                with pytest.raises(TypeError):
                    events.from_dict({**events.to_dict(event), name: other})


def test_numbers_of_a_table_that_are_none_come_back_as_none():
    event = dataclasses.replace(ALL[6], strength={"unet": math.nan, "te": 0.5})
    read = events.from_dict(json.loads(json.dumps(events.to_dict(event), allow_nan=False)))
    assert math.isnan(read.strength["unet"]) and read.strength["te"] == 0.5


@pytest.mark.parametrize("event", ALL, ids=lambda e: e.kind)
def test_an_event_cannot_be_changed(event):
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.kind2 = 1


def test_fields_of_a_later_version_are_passed_over():
    data = {**events.to_dict(WARNED), "colour": "red"}
    assert events.from_dict(data) == WARNED
