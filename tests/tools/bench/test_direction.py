"""A short training in Twemoji's style, from the dataset to the file: what the file has learnt.

What `bench quality` asks generated images, this asks the model itself, in seconds: is the image now easier to denoise than
it was? So must be those it was shown, and for words that nobody trained on Twemoji's more so than Noto's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lib_lora_train.demo import STYLE
from lib_lora_train.demo.embedded import CHECKPOINT
from lib_lora_train.host.standalone import StandaloneHost
from tools.bench.real_images import HELD_OUT, NOTO, TWEMOJI, load, read_dataset
from tools.bench.sampler import Sampler
from tools.bench.style import TRIGGER
from tools.bench.training import settings_of, train_lora

STEPS, RATE = 60, 1e-3  # much is learnt soon, if not for good
EVERY = 8

Losses = Callable[..., tuple[dict[int, float], dict[int, float]]]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """The loss on some images by timestep, without what was learnt and with it."""
    folder = tmp_path_factory.mktemp("direction")
    host = StandaloneHost(CHECKPOINT, lora_folder=folder / "loras", runs_folder=folder / "runs")
    file = train_lora(host, settings=settings_of({"learning_rate": RATE}), data=STYLE, trigger_word=TRIGGER, name="direction",
                      steps=STEPS, wanted=(STEPS,), say=lambda text: None)[STEPS]
    sampler = Sampler(host)
    lora = sampler.lora(file, weight=1.0)

    def losses(pixels, words):
        prompts = [f"{TRIGGER}, {word}" for word in words]
        return sampler.held_out_loss(pixels, prompts), sampler.held_out_loss(pixels, prompts, lora)
    return losses


def test_the_loss_on_what_it_was_shown_falls_at_every_timestep(losses):
    _, captions, pixels = read_dataset(STYLE)
    before, after = losses(pixels, captions)
    assert len(captions) == 24 and all(after[t] < before[t] for t in before)


def test_for_most_words_nobody_trained_on_the_lora_prefers_twemojis_image_to_notos(losses):
    real = load()

    def gained(style: str, index: int) -> float:
        before, after = losses(real.pixels[style][index:index + 1], [real.words[index]])
        return sum(before.values()) - sum(after.values())

    prefers = [gained(TWEMOJI, index) > gained(NOTO, index) for index in real.indices(HELD_OUT)[::EVERY].tolist()]
    assert sum(prefers) >= 0.75 * len(prefers)
