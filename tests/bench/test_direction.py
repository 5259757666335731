"""The direction of everything else: a short training in Twemoji's hand makes the model paint in it."""

from __future__ import annotations

import pytest

from lib_lora_train.bench.painter import Painter
from lib_lora_train.bench.quality import STYLE
from lib_lora_train.bench.real_pictures import load
from lib_lora_train.bench.style import TRIGGER
from lib_lora_train.bench.training import settings_of, train_lora
from lib_lora_train.bench.yardstick import Effort, Yardstick
from lib_lora_train.demo.embedded import CHECKPOINT
from lib_lora_train.host.standalone import StandaloneHost

# Twelve words, judges fitted in haste on a third of the pictures, a rate at which little is learnt soon.
HASTE = Effort(texture=40, words=2, across=False, every=5, others=6, sampler_steps=10)
CHANGES = {"learning_rate": 1e-3, "train_batch_size": 2, "lr_scheduler": "constant"}
STEPS = 120


@pytest.mark.skipif(not CHECKPOINT.is_file(), reason="the model that paints emoji (demo/model/emoji.safetensors) is not there")
def test_far_more_pictures_are_in_twemojis_hand_with_the_lora_than_without(tmp_path):
    host = StandaloneHost(CHECKPOINT, lora_folder=tmp_path / "loras", runs_folder=tmp_path / "runs")
    painter = Painter(host, steps=HASTE.sampler_steps)
    yardstick = Yardstick(painter, load(), effort=HASTE)
    assert yardstick.figures.hand > 0.85
    lora = train_lora(host, settings=settings_of(CHANGES), data=STYLE, trigger_word=TRIGGER, name="direction", steps=STEPS,
                      wanted=(STEPS,), say=lambda text: None)[STEPS]
    prompts = [f"{TRIGGER}, {word}" for word in yardstick.words]
    base = yardstick.row("base", painter.paint(prompts))
    learnt = yardstick.row("LoRA", painter.paint(prompts, painter.lora(lora, weight=1.0)))
    assert learnt.style >= base.style + 0.4
    assert learnt.feature < base.feature + 0.1  # and what it shows is still the word
