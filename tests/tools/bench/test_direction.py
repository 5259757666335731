"""A short training in the style of blueprints, and what the sampled images show, as `bench quality` asks it: style and word are
right in words that nobody trained on, and were not without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lib_lora_train.demo.embedded import CHECKPOINT
from lib_lora_train.host.standalone import StandaloneHost
from tools.bench.joint_scorer import PAINTED, TRIGGER
from tools.bench.real_images import HELD_OUT, NOTO, OTHER, STYLE, STYLES, drawings, load
from tools.bench.sampler import Sampler
from tools.bench.style_scorer import StyleClassifier, StyleEffort
from tools.bench.styled_images import BLUEPRINT, StyledImages, blueprint, write_dataset
from tools.bench.training import settings_of, train_lora
from tools.bench.word_scorer import WordEffort, WordScorer, views

STEPS = 80
SETTINGS = {"learning_rate": 2e-3, "network_dim": 16, "network_alpha": 16.0}  # much is learnt soon, if not for good


def test_in_blueprint_style_and_word_are_right_where_they_were_not_without_it(tmp_path: Path) -> None:
    real = load()
    words, other = real.words_of(HELD_OUT)[::6], real.indices(OTHER)
    asked = [real.words.index(word) for word in words]
    blue = torch.from_numpy(np.stack([blueprint(image) for image in drawings(NOTO)])).permute(0, 3, 1, 2) / 255
    host = StandaloneHost(CHECKPOINT, lora_folder=tmp_path / "loras", runs_folder=tmp_path / "runs")
    sampler = Sampler(host, steps=10)
    style = StyleClassifier.fit(
        {BLUEPRINT: blue[other], **{name: real.pixels[name][other] for name in STYLES},
         PAINTED: sampler.sample([f"{TRIGGER}, {word}" for word in real.words_of(STYLE)[::2]])},
        StyleEffort(steps=100, fits=1), seed=0)
    drawn = [blue[asked], *(real.pixels[name][asked] for name in STYLES)]
    word = WordScorer.fit([(views(sampler.through_vae(each), 1, seed=0), torch.arange(len(words))) for each in drawn],
                          WordEffort(steps=200, fits=1), seed=0)

    def both_right(pixels: torch.Tensor) -> float:
        return float((style.is_in(BLUEPRINT, pixels) & (word.word(pixels) == torch.arange(len(words)))).float().mean())

    data = write_dataset(StyledImages(real.words, real.splits, {BLUEPRINT: (torch.arange(len(blue)), blue)}), BLUEPRINT,
                         tmp_path / "blueprint")
    file = train_lora(host, settings=settings_of(SETTINGS), data=data, trigger_word=TRIGGER, name="blue", steps=STEPS,
                      wanted=(STEPS,), say=lambda text: None)[STEPS]
    prompts = [f"{TRIGGER}, {word}" for word in words]
    assert both_right(blue[asked]) > 0.9 and both_right(sampler.sample(prompts)) < 0.1
    assert both_right(sampler.sample(prompts, sampler.lora(file, weight=1.0))) > 0.25
