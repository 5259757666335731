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
    events.Finished("done", "ready", "a/zzk.safetensors", 300),
]


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
def test_an_event_cannot_be_changed(event):
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.kind2 = 1


def test_fields_of_a_later_version_are_passed_over():
    data = {**events.to_dict(ALL[4]), "colour": "red"}
    assert events.from_dict(data) == ALL[4]
