"""What a run's results are compared with is what the run held out and what it trained, in folders of kohya's too."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lib_lora_train import events
from lib_lora_train.dataset.held_out import name_of
from lib_lora_train.results.references import references_of
from lib_lora_train.run.planning import plan_dataset
from tests.results.written_run import Run


@pytest.mark.parametrize("inner", ["", "10_cat"])
@pytest.mark.parametrize("number", [14, 3])
def test_references_are_the_images_that_the_run_held_out(tmp_path: Path, inner: str, number: int) -> None:
    data = tmp_path / "set"
    (data / inner).mkdir(parents=True)
    for index in range(number):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(data / inner / f"{index}.png")
    run = Run(tmp_path, values={"train_data_dir": str(data)})
    plan = plan_dataset(run.settings, family="")
    run.tell(events.HeldOut(tuple(name_of(image.example.path, data) for image in plan.held_out), plan.held_out_derived))
    found = references_of(run.folder, run.settings, allowed=None)
    assert [(image.example.path, image.crop) for image in found.held_out] == [
        (image.example.path, image.crop) for image in plan.held_out]
    assert [example.path for example in found.training] == [example.path for example in plan.dataset.examples]
    assert found.derived == (number == 3)
