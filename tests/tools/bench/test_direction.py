"""Short trainings, from the dataset to the file: what the file has learnt.

In Twemoji's style the model's loss is asked, in seconds: images that were trained on are easier to denoise than before, and of
words that nobody trained on Twemoji's images gain more than Noto's. In blueprint's the sampled images are asked, as `bench
quality` asks them: style and word are right in words that it was not trained on, and were not without it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lib_lora_train.demo import BLUEPRINT as BLUEPRINTS
from lib_lora_train.demo import STYLE
from lib_lora_train.demo.embedded import CHECKPOINT
from lib_lora_train.host.standalone import StandaloneHost
from tools.bench.joint_scorer import TRIGGER
from tools.bench.real_images import HELD_OUT, NOTO, OTHER, STYLES, TWEMOJI, drawings, load, read_dataset
from tools.bench.real_images import STYLE as STYLE_WORDS
from tools.bench.sampler import Sampler
from tools.bench.style_scorer import StyleClassifier, StyleEffort
from tools.bench.styled_images import BLUEPRINT, blueprint
from tools.bench.training import settings_of, train_lora
from tools.bench.word_scorer import WordEffort, WordScorer, views

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


def test_in_blueprint_style_and_word_are_right_where_they_were_not_without_it(tmp_path):
    real, drawn = load(), drawings(NOTO)
    words = real.words_of(HELD_OUT)[::4]
    other, asked = real.indices(OTHER).tolist(), [real.words.index(word) for word in words]
    blue = torch.from_numpy(np.stack([blueprint(image) for image in drawn])).permute(0, 3, 1, 2) / 255
    host = StandaloneHost(CHECKPOINT, lora_folder=tmp_path / "loras", runs_folder=tmp_path / "runs")
    sampler, prompts = Sampler(host, steps=10), [f"{TRIGGER}, {word}" for word in words]
    alone = sampler.sample(prompts)
    style = StyleClassifier.fit(
        {BLUEPRINT: blue[other], **{name: real.pixels[name][other] for name in STYLES},
         "the model's own": sampler.sample([f"{TRIGGER}, {word}" for word in real.words_of(STYLE_WORDS)])},
        StyleEffort(steps=120, fits=1), seed=0)
    shown = torch.cat([blue[asked], *(real.pixels[name][asked] for name in STYLES)])
    word = WordScorer.fit(views(shown, 1, seed=0), torch.arange(len(words)).repeat(3), WordEffort(steps=200, fits=1), seed=0)
    file = train_lora(host, settings=settings_of({"learning_rate": 2e-3, "network_dim": 16, "network_alpha": 16.0}),
                      data=BLUEPRINTS, trigger_word=TRIGGER, name="blue", steps=64, wanted=(64,), say=lambda text: None)[64]
    painted = sampler.sample(prompts, sampler.lora(file, weight=1.0))

    def both(pixels: torch.Tensor) -> float:
        return float((style.is_in(BLUEPRINT, pixels) & (word.word(pixels) == torch.arange(len(words)))).float().mean())

    assert both(blue[asked]) > 0.9
    assert both(alone) < 0.1 and both(painted) > 0.5
