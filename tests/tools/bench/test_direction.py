"""A short training in Twemoji's style, from the dataset to the file: what the file has learnt.

`bench quality` asks this of sampled images, this test asks the model's loss, in seconds: images that were trained on are easier
to denoise than before, and of words that nobody trained on Twemoji's images gain more than Noto's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lib_lora_train.demo import STYLE
from lib_lora_train.demo.embedded import CHECKPOINT
from lib_lora_train.host.standalone import StandaloneHost
from tools.bench.joint_scorer import TRIGGER
from tools.bench.real_images import HELD_OUT, NOTO, TWEMOJI, load, read_dataset
from tools.bench.sampler import Sampler
from tools.bench.training import settings_of, train_lora

STEPS, RATE = 8, 3e-3  # much is learnt soon, if not for good
TIMESTEPS = (150, 650)

Losses = Callable[[torch.Tensor, list[str]], tuple[dict[int, float], dict[int, float]]]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """The loss on some images by timestep, without what was learnt and with it."""
    folder = tmp_path_factory.mktemp("direction")
    host = StandaloneHost(CHECKPOINT, lora_folder=folder / "loras", runs_folder=folder / "runs")
    file = train_lora(host, settings=settings_of({"learning_rate": RATE, "train_batch_size": 2}), data=STYLE,
                      trigger_word=TRIGGER, name="direction", steps=STEPS, wanted=(STEPS,), say=lambda text: None)[STEPS]
    sampler = Sampler(host)
    lora = sampler.lora(file, weight=1.0)

    def losses(pixels, words):
        prompts = [f"{TRIGGER}, {word}" for word in words]
        return (sampler.held_out_loss(pixels, prompts, timesteps=TIMESTEPS),
                sampler.held_out_loss(pixels, prompts, lora, timesteps=TIMESTEPS))
    return losses


def test_the_loss_on_what_it_was_shown_falls_at_every_timestep(losses):
    _, captions, pixels = read_dataset(STYLE)
    before, after = losses(pixels[::12], captions[::12])
    assert len(captions) == 24 and all(after[t] < before[t] for t in before)


def test_on_words_nobody_trained_on_twemojis_images_gain_more_than_notos(losses):
    real = load()

    def gained(style: str) -> dict[int, float]:
        before, after = losses(real.pixels_of(style, HELD_OUT)[::21], real.words_of(HELD_OUT)[::21])
        return {t: before[t] - after[t] for t in before}

    twemoji, noto = gained(TWEMOJI), gained(NOTO)
    assert all(twemoji[t] > noto[t] for t in TIMESTEPS)
