"""The words check, asked of models of which is known what they understand."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence

import pytest
import torch
from PIL import Image

from lib_lora_train.dataset.images import read_image
from lib_lora_train.demo import STYLE, SUBJECT
from lib_lora_train.evaluation.words_check import MADE_UP, MOST_PASSES, WELL_KNOWN, check_words, different, questions, texts_of
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.model.sd.schedule import NoiseSchedule
from lib_lora_train.model.sd.text import Conditioning

SHAPE = (4, 8, 8)
CAPTIONS = tuple(f"caption {number}" for number in range(6))
DEVICE = torch.device("cpu")


def image_of(word: str) -> torch.Tensor:
    """The one image [4, 8, 8] that a word means; nothing for the empty text, and hardly anything for made-up words."""
    generator = torch.Generator().manual_seed(sum(word.encode()) * 31 + len(word))
    return torch.randn(SHAPE, generator=generator) * (0.0 if not word else 0.05 if word in MADE_UP else 1.0)


class Condition:
    """Each text is the image it means."""

    def prepare(self, captions: Sequence[str]) -> Mapping[str, torch.Tensor]:
        return {"context": torch.stack([image_of(caption) for caption in captions])}

    def encode(self, batch: Batch) -> Conditioning:
        return Conditioning(context=batch["context"], pooled=None)


class Model:
    """Predicts the noise of the image that the text means: what a perfect model of such words would say."""

    architecture = types.SimpleNamespace(latent_scale=1.0)
    device = DEVICE
    schedule = NoiseSchedule.build(prediction_type="epsilon", zero_terminal_snr=False, alphas_cumprod=None)

    def unet(self, x_t, t, context, y, *, adapters, checkpointed):
        alpha = self.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x_t - alpha.sqrt() * context) / (1 - alpha).sqrt()


def batches(captions: Sequence[str], images: Sequence[str] = CAPTIONS) -> list[Batch]:
    """Images of what the words mean, with captions."""
    return [Batch({"mean": image_of(image)[None], "std": torch.zeros(1, *SHAPE), "loss_weight": torch.ones(1),
                   "sizes": torch.zeros(1, 6)}, (caption,)) for image, caption in zip(images, captions, strict=True)]


def check(captions: Sequence[str], trigger_word: str = "", images: Sequence[str] = CAPTIONS):
    return check_words(Model(), questions(batches(captions, images), steps=1000), Condition(), trigger_word=trigger_word,
                       dtype=torch.float32)


def test_right_captions_fit_and_gain_by_one_and_those_of_other_images_by_none():
    right, wrong = check(CAPTIONS), check((*CAPTIONS[2:], *CAPTIONS[:2]))
    assert (right.fit, right.gain) == (pytest.approx(1, abs=0.01), pytest.approx(1, abs=0.01))
    assert wrong.fit == pytest.approx(0, abs=0.2) and wrong.gain == pytest.approx(-1, abs=0.2)
    assert right.meaning == pytest.approx(1, abs=0.2) and wrong.meaning == pytest.approx(1, abs=0.2)


def test_captions_that_mean_nothing_have_no_meaning():
    assert check((MADE_UP * 3)[:6]).meaning == pytest.approx(0, abs=0.3)


@pytest.mark.parametrize("word, meaning", [("penguin", 1), (MADE_UP[0], 0), (WELL_KNOWN[0], 1)])
def test_a_trigger_word_means_as_much_as_the_model_knows_of_it(word, meaning):
    found = check([""] * 6, word)
    assert found.fit is None and found.trigger_meaning == pytest.approx(meaning, abs=0.2)
    assert meaning == 0 or found.trigger_gain == pytest.approx(-1, abs=0.3)


def test_a_trigger_word_that_is_what_the_images_show_gains():
    assert check(CAPTIONS, "penguin", images=["penguin"] * 6).trigger_gain == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("captions", [[], ["a"], ["a"] * 6, [""] * 6])
def test_few_or_equal_captions_are_asked_about_what_they_can_be(captions):
    found = check(captions, "zzk", images=CAPTIONS[:len(captions)])
    assert found.fit is None and (found.trigger_gain is None) == (not captions)


def test_it_costs_a_hundredth_of_a_run_of_1500_steps_and_all_texts_are_told_before():
    seen = []
    model, condition, asked = Model(), Condition(), questions(batches(CAPTIONS), steps=1000)
    passes, model.unet = [], lambda x, *rest, real=model.unet, **more: (passes.append(len(x)), real(x, *rest, **more))[1]
    condition.prepare = lambda captions, real=condition.prepare: (seen.extend(captions), real(captions))[1]
    check_words(model, asked, condition, trigger_word="zzk", dtype=torch.float32)
    # Forward and backward of a step are three passes.
    assert sum(passes) == MOST_PASSES <= 0.01 * 3 * 1500
    assert set(seen) <= set(texts_of(asked, trigger_word="zzk"))


def latents(images: Sequence[Image.Image]) -> list[torch.Tensor]:
    """As a VAE's: smaller, and linear in the pixels."""
    return [torch.tensor(list(image.resize((16, 16)).getdata())).float().view(16, 16, 3).permute(2, 0, 1) / 127 - 1
            for image in images]


@pytest.mark.parametrize("folder", [STYLE, SUBJECT])
def test_the_images_of_the_demo_are_all_different_and_copies_of_one_are_one(folder):
    images = [read_image(path) for path in sorted(folder.glob("*.png"))]
    assert different(latents(images)) == len(images)
    brighter = [images[0].point(lambda level, by=by: int(level * by)) for by in (1, 0.97, 0.94)]
    assert different(latents([*images, *brighter])) == len(images) and different(latents(brighter)) == 1
