"""The direction of everything else: a short training in Twemoji's hand makes the model paint in it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lib_lora_train.bench.judges import HandJudge
from lib_lora_train.bench.painter import Painter
from lib_lora_train.bench.quality import STYLE
from lib_lora_train.bench.real_pictures import HANDS, HELD_OUT, OTHER, RealPictures, load
from lib_lora_train.bench.real_pictures import STYLE as STYLE_SPLIT
from lib_lora_train.bench.style import TRIGGER
from lib_lora_train.bench.training import settings_of, train_lora
from lib_lora_train.demo.embedded import CHECKPOINT
from lib_lora_train.host.standalone import StandaloneHost

# A rate at which much is learnt soon, if not for good.
CHANGES = {"learning_rate": 1e-3, "train_batch_size": 2, "lr_scheduler": "constant"}
STEPS = 100


def few(real: RealPictures) -> RealPictures:
    """All words of the training split, eight held-out ones and a third of the others; at half the size, which the VAE shows
    in a quarter of the time and the judge sees anyway."""
    places = torch.cat([real.places(STYLE_SPLIT), real.places(HELD_OUT)[::8], real.places(OTHER)[::3]]).tolist()
    return RealPictures(tuple(real.words[place] for place in places), tuple(real.splits[place] for place in places),
                        {hand: F.avg_pool2d(pixels[places], 2) for hand, pixels in real.pixels.items()})


@pytest.mark.skipif(not CHECKPOINT.is_file(), reason="the model that paints emoji (demo/model/emoji.safetensors) is not there")
def test_far_more_pictures_are_in_twemojis_hand_with_the_lora_than_without(tmp_path):
    host = StandaloneHost(CHECKPOINT, lora_folder=tmp_path / "loras", runs_folder=tmp_path / "runs")
    painter, real = Painter(host, steps=10), few(load())
    judge = HandJudge.fit({hand: painter.through_vae(real.pixels[hand]) for hand in HANDS}, real, steps=2, seed=0)
    assert judge.accuracy["palette"] > 0.8  # of sixteen real pictures

    lora = train_lora(host, settings=settings_of(CHANGES), data=STYLE, trigger_word=TRIGGER, name="direction", steps=STEPS,
                      wanted=(STEPS,), say=lambda text: None)[STEPS]
    prompts = [f"{TRIGGER}, {word}" for word in real.words_of(HELD_OUT)]
    base, learnt = (judge.twemoji(painter.paint(prompts, adapters), by="palette").float().mean()
                    for adapters in ({}, painter.lora(lora, weight=1.0)))
    assert learnt >= base + 0.4
