"""What the settings of loss, noise, masks and preservation make of a run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from lib_lora_train import events
from lib_lora_train.api.service import plan
from lib_lora_train.errors import SettingError
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.run import job, resume
from lib_lora_train.run.planning import plan_dataset
from lib_lora_train.settings import parse
from lib_lora_train.training.loop import TrainConfig
from lib_lora_train.training.loss import LossConfig, loss_function
from lib_lora_train.training.noise import NoiseConfig
from lib_lora_train.training.preservation import Preservation
from tests.jobs import run_settings
from tests.run.test_job import settings


class _AtTheLoopError(Exception):
    """Raised where the training would begin."""


def config_of(images, host, monkeypatch, **changes) -> tuple[FrozenModel, TrainConfig, Batch]:
    """What a run of these settings trains with, its first batch last."""
    seen = []

    def train(model, *, config, epoch_batches, **rest):
        seen.append((model, config, next(iter(epoch_batches(1, 0)))))
        raise _AtTheLoopError
    monkeypatch.setattr(job, "train", train)
    with pytest.raises(_AtTheLoopError):
        run_settings(settings(images, **changes), host, report=lambda event: None, stop=lambda: "")
    return seen[0]


def test_each_setting_of_loss_and_noise_reaches_the_training(images, host, monkeypatch):
    noise = {"noise_offset": 0.05, "noise_offset_random_strength": True, "adaptive_noise_scale": 0.01,
             "multires_noise_iterations": 6, "multires_noise_discount": 0.2, "ip_noise_gamma": 0.1,
             "ip_noise_gamma_random_strength": True, "min_timestep": 100, "max_timestep": 900,
             "timestep_distribution": "sigmoid"}
    loss = {"min_snr_gamma": 3.0, "debiased_estimation_loss": True, "v_pred_like_loss": 0.5}
    huber = {"loss_type": "huber", "huber_schedule": "exponential", "huber_c": 0.2, "huber_scale": 2.0}
    model, config, _ = config_of(images, host, monkeypatch, **noise, **loss, **huber)
    assert {field.name for field in dataclasses.fields(NoiseConfig)} == noise.keys()
    assert config.noise == NoiseConfig(**noise)
    assert dataclasses.replace(config.loss, function=None) == LossConfig(torch.float32, function=None, **loss)
    prediction, target, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0, 999])
    expected = loss_function(parse(huber).loss, model.schedule)(prediction, target, t)
    assert torch.equal(config.loss.function(prediction, target, t), expected)


@pytest.mark.parametrize("changes", [
    {"scale_v_pred_loss_like_noise_pred": True}, {"v_pred_like_loss": 0.5, "v_parameterization": "on"}])
def test_a_loss_for_another_kind_of_model_is_refused_by_name(images, host, changes):
    with pytest.raises(SettingError, match=next(iter(changes))):
        run_settings(settings(images, **changes), host, report=lambda event: None, stop=lambda: "")


@pytest.mark.parametrize("changes, expected, beta", [
    ({"preservation": "dop", "preservation_class": "cat", "preservation_weight": 0.5}, ("dop", 0.5, "zzk", "cat"), 0.0),
    ({"preservation": "blank"}, ("blank", 1.0, "zzk", ""), 0.0),
    ({"preservation": "dco", "preservation_class": "cat", "dco_beta": 100}, ("dco", 1.0, "zzk", "cat"), 100.0),
    ({"dco_beta": 100}, ("none", 1.0, "zzk", ""), 0.0)])
def test_each_setting_of_preservation_reaches_the_training(images, host, monkeypatch, changes, expected, beta):
    _, config, _ = config_of(images, host, monkeypatch, **changes)
    kind, weight, trigger, word = expected
    assert config.preservation == Preservation(kind=kind, weight=weight, trigger_words=(trigger,), class_word=word)
    assert config.loss.dco_beta == beta


def paint_masks(folder, images) -> None:
    """The left half of each picture white, the fourth without a mask."""
    folder.mkdir()
    for number in range(3):
        with Image.open(images / f"{number}.png") as image:
            mask = Image.new("L", image.size, 0)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        mask.save(folder / f"{number}.png")


def test_masks_are_counted_in_the_plan_and_reach_the_batches_with_their_weights(images, host, monkeypatch, tmp_path):
    paint_masks(images / "masks", images)
    chosen = {"masked_loss": True, "unmasked_weight": 0.25, "masked_prior_preservation_weight": 2.0, "train_batch_size": 3}
    said = plan({"train_data_dir": str(images), "output_name": "zzk", "memory_budget": 4, **chosen}, host=host)
    assert "3 of 4 pictures with a mask" in said["summary"] and "50%" in said["summary"]
    assert "what the base model predicts itself" in said["estimate"]
    _, _, batch = config_of(images, host, monkeypatch, **chosen)
    assert sorted(batch["mask"].unique().tolist()) == [0.25, 1.0] and sorted(batch["prior"].unique().tolist()) == [0.0, 2.0]
    (images / "masks").rename(tmp_path / "elsewhere")
    _, _, again = config_of(images, host, monkeypatch, conditioning_data_dir=str(tmp_path / "elsewhere"), **chosen)
    assert torch.equal(again["mask"], batch["mask"])


@pytest.mark.parametrize("name", ["masked_loss", "alpha_mask"])
def test_masked_loss_without_any_mask_is_told_before_the_start(images, host, name):
    said = plan({"train_data_dir": str(images), "output_name": "zzk", name: True}, host=host)
    assert [warning for warning in said["warnings"] if f"({name}) has no effect" in warning]


def test_a_run_that_goes_on_is_told_of_another_mask(images):
    paint_masks(images / "masks", images)

    def fingerprint(**changes) -> str:
        found = plan_dataset(settings(images, **changes), family="sd1")
        return resume.dataset_fingerprint(found.dataset, found.placements, found.masks)
    first, plain = fingerprint(masked_loss=True), fingerprint()
    Image.new("L", (64, 64), 255).save(images / "masks" / "0.png")
    assert fingerprint() == plain != first != fingerprint(masked_loss=True)


def test_a_run_with_masks_and_preservation_goes_to_its_end(images, host):
    """Its verdict is that of the picture alone: the loss beside the base model's is another one."""
    paint_masks(images / "masks", images)
    told = []
    finished = run_settings(settings(images, masked_loss=True, masked_prior_preservation_weight=0.5, preservation="dco",
                                     preservation_class="cat", loss_type="huber", network_train_unet_only=False,
                                     max_train_epochs=1), host, report=told.append, stop=lambda: "")
    assert finished.verdict == "healthy"
    planned, = (event for event in told if isinstance(event, events.Planned))
    assert "3 of 4 pictures with a mask" in planned.summary
