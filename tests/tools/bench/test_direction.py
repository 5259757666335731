"""The direction of everything else: a short training in Twemoji's hand, the whole road, and what the file it leaves has learnt.

What `bench quality` asks painted pictures, this asks the model itself, in seconds: is the picture now easier to denoise than
it was? So must be those it was shown, and for words that nobody trained on Twemoji's more so than Noto's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lib_lora_train.demo import STYLE
from lib_lora_train.demo.embedded import CHECKPOINT
from lib_lora_train.host.standalone import StandaloneHost
from tools.bench.real_images import HELD_OUT, NOTO, TWEMOJI, load, read_dataset
from tools.bench.sampler import Painter
from tools.bench.style import TRIGGER
from tools.bench.training import settings_of, train_lora

STEPS, RATE = 60, 1e-3  # much is learnt soon, if not for good
EVERY = 8

Losses = Callable[..., tuple[dict[int, float], dict[int, float]]]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """The loss on some pictures by timestep, without what was learnt and with it."""
    folder = tmp_path_factory.mktemp("direction")
    host = StandaloneHost(CHECKPOINT, lora_folder=folder / "loras", runs_folder=folder / "runs")
    file = train_lora(host, settings=settings_of({"learning_rate": RATE}), data=STYLE, trigger_word=TRIGGER, name="direction",
                      steps=STEPS, wanted=(STEPS,), say=lambda text: None)[STEPS]
    painter = Painter(host)
    lora = painter.lora(file, weight=1.0)

    def losses(pixels, words):
        prompts = [f"{TRIGGER}, {word}" for word in words]
        return painter.held_out_loss(pixels, prompts), painter.held_out_loss(pixels, prompts, lora)
    return losses


def test_the_loss_on_what_it_was_shown_falls_at_every_timestep(losses):
    _, captions, pixels = read_dataset(STYLE)
    before, after = losses(pixels, captions)
    assert len(captions) == 24 and all(after[t] < before[t] for t in before)


def test_for_most_words_nobody_trained_on_the_lora_prefers_twemojis_picture_to_notos(losses):
    real = load()

    def gained(hand: str, place: int) -> float:
        before, after = losses(real.pixels[hand][place:place + 1], [real.words[place]])
        return sum(before.values()) - sum(after.values())

    prefers = [gained(TWEMOJI, place) > gained(NOTO, place) for place in real.places(HELD_OUT)[::EVERY].tolist()]
    assert sum(prefers) >= 0.75 * len(prefers)
