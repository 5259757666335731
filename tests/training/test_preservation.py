"""Masked loss and preservation at the loss: weights of elements, and what the LoRA is held to."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import logsigmoid

from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.events import Step
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.inputs.text import TextCache
from lib_lora_train.memory.step_config import StepConfig
from lib_lora_train.training.condition import CachedText, TrainedText
from lib_lora_train.training.loss import LossConfig, denoising_loss, prediction_and_target, zero_prediction_loss
from lib_lora_train.training.noise import draw
from lib_lora_train.training.precision import LossScaler
from lib_lora_train.training.preservation import Preservation, class_caption, with_reference
from lib_lora_train.training.train_step import TrainStep
from tests.training import small_run

DOP = Preservation(kind="dop", weight=0.5, trigger_words=("zzk",), class_word="cat")


DEEP = "sd1 of four levels"  # with two, what is learnt of one half of an image changes more of the other


class Case:
    """A small model with a LoRA that changes it, and a complete batch of two images."""

    def __init__(self, *, text: bool = False, family: str = "sd1") -> None:
        self.model = small_run.model(family)
        targets = find_targets(self.model.components, family=self.model.architecture.family, text_encoder=text)
        self.network = AdapterNetwork.build(targets, rank=2, alpha=2, seed=0)
        for layer in self.network.layers.values():
            layer.up.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        self.adapters = self.network.adapters()
        self.condition = CachedText(TextCache(self.model.text)) if not text else TrainedText(
            self.model.text, clip_skip=1, adapters=self.adapters, checkpointing=False, dtype=torch.float32)
        one = dataclasses.replace(small_run.batch(3, rows=2), captions=("zzk, red", "a zzk"))
        draws = draw(one["mean"].shape, seed=0, step=1, micro=0, timesteps=1000)
        self.batch = one.extended({**draws, "weight": one["loss_weight"] / 2, **self.condition.prepare(one.captions)})

    def prediction(self, batch, *, adapted: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """By the multiplier, as the rest of the project leaves the LoRA out."""
        self.network.set_multiplier(float(adapted))
        try:
            return prediction_and_target(self.model, batch, conditioning=self.condition.encode(batch),
                                         adapters=self.adapters["unet"], dtype=torch.float32)
        finally:
            self.network.set_multiplier(1.0)

    def step(self, config: LossConfig) -> TrainStep:
        weights = self.network.flatten(1e-3, 1e-3)
        return TrainStep(self.model, weights=weights, adapters=self.adapters["unet"], condition=self.condition,
                         scaler=LossScaler(torch.device("cpu"), enabled=False), loss=config, config=StepConfig(microbatch=2),
                         report=lambda event: None)


def per_image(loss: torch.Tensor) -> torch.Tensor:
    return loss.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("text", [False, True], ids=["unet", "text encoder"])
def test_the_reference_is_the_model_without_the_lora(text):
    case = Case(text=text)
    reference = with_reference(case.model, case.batch, condition=case.condition, dtype=torch.float32)["reference"]
    with torch.no_grad():
        base, adapted = (case.prediction(case.batch, adapted=chosen)[0] for chosen in (False, True))
    torch.testing.assert_close(reference, base)
    assert (adapted - base).abs().max() > 1e-3 and not reference.requires_grad


def test_the_gradient_outside_the_mask_is_the_chosen_share_and_towards_the_base_model_where_that_is_asked_for():
    case = Case()
    mask = torch.ones(2, 1, 8, 8)
    mask[..., 4:] = 0.05
    prediction, target = (tensor.detach() for tensor in case.prediction(case.batch, adapted=True))

    def gradient(**more) -> torch.Tensor:
        """Of the loss in the prediction, by a UNet that is the prediction."""
        leaf = prediction.clone().requires_grad_()
        model = dataclasses.replace(case.model, unet=lambda *arguments, **options: leaf)
        denoising_loss(model, case.batch.extended(more), conditioning=case.condition.encode(case.batch), adapters={},
                       config=LossConfig(torch.float32)).backward()
        return leaf.grad
    plain = gradient()
    torch.testing.assert_close(gradient(mask=mask), plain * mask)
    reference, prior = torch.randn_like(prediction), torch.zeros(2, 1, 8, 8)
    prior[..., 4:] = 0.5
    towards = plain * (prediction - reference) / (prediction - target)
    torch.testing.assert_close(gradient(mask=mask, prior=prior, reference=reference), plain * mask + towards * prior,
                               rtol=1e-4, atol=1e-7)


def test_direct_consistency_is_the_papers_loss():
    """-log σ(-β(‖ε_θ - ε‖² - ‖ε_φ - ε‖²)), the base model asked with the class word (arXiv 2402.12004, eq. 8)."""
    case, beta = Case(), 20.0
    dco = dataclasses.replace(DOP, kind="dco")
    batch, = dco.inputs(case.batch, case.condition)
    assert torch.equal(batch["context"], case.batch["context"])
    config = LossConfig(torch.float32, dco_beta=beta)
    loss = case.step(config).forward(batch)
    asked = case.batch.extended(case.condition.prepare(("cat, red", "a cat")))
    with torch.no_grad():
        (own, target), (base, _) = case.prediction(case.batch, adapted=True), case.prediction(asked, adapted=False)
    difference = per_image((own - target) ** 2) - per_image((base - target) ** 2)
    assert difference.abs().max() > 1e-4
    torch.testing.assert_close(loss, (-logsigmoid(-beta * difference) * case.batch["weight"]).sum(), rtol=1e-4, atol=1e-6)
    nothing = -logsigmoid(-beta * per_image(target ** 2)) * case.batch["weight"]
    torch.testing.assert_close(zero_prediction_loss(case.model, batch, config), nothing.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind, captions", [("dop", ("cat, red", "a cat")), ("blank", ("", ""))])
def test_output_preservation_adds_the_distance_to_the_base_model_with_the_other_caption(kind, captions):
    case, config = Case(), LossConfig(torch.float32)
    parts = dataclasses.replace(DOP, kind=kind).inputs(case.batch, case.condition)
    own, kept = (case.step(config).forward(part) for part in parts)
    torch.testing.assert_close(own, case.step(config).forward(case.batch))
    asked = case.batch.extended(case.condition.prepare(captions))
    with torch.no_grad():
        (now, _), (base, _) = case.prediction(asked, adapted=True), case.prediction(asked, adapted=False)
    expected = (per_image((now - base) ** 2) * case.batch["weight"] * 0.5).sum()
    assert expected > 1e-5
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-7)


def test_nothing_is_preserved_by_default():
    case = Case()
    assert Preservation().inputs(case.batch, case.condition) == [case.batch]


@pytest.mark.parametrize("caption, trigger, expected", [
    ("zzk, red", "zzk", "cat, red"), ("a photo of ZZK, zzk's hat", "zzk", "a photo of cat, cat's hat"), ("", "zzk", ""),
    ("jazzzk", "zzk", "jazzzk"), ("sks, armour, red", "sks, armour", "cat, red"), ("z.k and zak", "z.k", "cat and zak")])
def test_the_class_word_takes_the_place_of_the_trigger_word_and_of_nothing_else(caption, trigger, expected):
    assert class_caption(caption, trigger_word=trigger, class_word="cat") == expected


@pytest.mark.parametrize("preservation, beta", [(DOP, 0.0), (dataclasses.replace(DOP, kind="dco"), 1000.0)], ids=["dop", "dco"])
def test_a_preserved_run_is_the_same_in_parts(preservation, beta, monkeypatch):
    """Microbatches of batches of other sizes."""
    made = small_run.TrainConfig

    def config(loss, **values):
        return made(**values, loss=dataclasses.replace(loss, dco_beta=beta), preservation=preservation)
    monkeypatch.setattr(small_run, "TrainConfig", config)
    batches = [small_run.batch(i, rows=rows, caption="zzk") for i, rows in enumerate((2, 1, 2, 1))]
    whole, parts = (small_run.run("sd1", batches, microbatch=most) for most in (64, 1))
    small_run.assert_equal(whole, parts)
    monkeypatch.setattr(small_run, "TrainConfig", made)
    plain = small_run.run("sd1", batches)
    assert all(isinstance(event, Step) for event in plain.seen) and not torch.equal(plain.learnt(), whole.learnt())


def halves(network: AdapterNetwork, batch: Batch) -> torch.Tensor:
    """The loss of the left and the right half on noise that no run has seen, [2]."""
    case, losses = Case(family=DEEP), []
    with torch.no_grad():
        for t in (100, 350, 600, 850):
            draws = draw(batch["mean"].shape, seed=99, step=t, micro=0, timesteps=1000)
            inputs = batch.extended({**draws, "timesteps": torch.tensor([t]), **case.condition.prepare(batch.captions)})
            prediction, target = prediction_and_target(case.model, inputs, conditioning=case.condition.encode(inputs),
                                                       adapters=network.adapters()["unet"], dtype=torch.float32)
            losses.append(torch.stack([half.mean() for half in (prediction - target).square().chunk(2, dim=-1)]))
    return torch.stack(losses).mean(dim=0)


def test_a_short_run_with_a_mask_learns_the_masked_half():
    """The image's halves are as different as can be. Without a mask both are learnt alike."""
    mean = torch.full((1, 4, 8, 8), 6.0)
    mean[..., 4:] = -6
    image = small_run.batch(1).extended({"mean": mean, "std": torch.full_like(mean, 0.01)})
    left = torch.ones(1, 1, 8, 8)
    left[..., 4:] = 0

    def learnt(batch: Batch) -> list[float]:
        run = small_run.run(DEEP, [batch] * 24, learning_rate=2e-2)
        after = halves(run.network, batch)
        run.network.set_multiplier(0.0)
        return (halves(run.network, batch) - after).tolist()
    inside, outside = learnt(image.extended({"mask": left}))
    assert inside > 0.3 and outside < 0.4 * inside
    whole = learnt(image)
    assert min(whole) > 0.6 * max(whole) > 0.18
