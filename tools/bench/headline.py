"""The headline of a LoRA: the share of images of words that it was not trained on in which style *and* word are right."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from lib_lora_train.host.port import Host
from tools.bench.image_metrics import nearest_distance
from tools.bench.joint_scorer import TRIGGER, JointScorer
from tools.bench.real_images import STYLE
from tools.bench.sampler import WITHOUT, Sampler
from tools.bench.style import save_sheet
from tools.bench.styled_images import GRADED, write_dataset
from tools.bench.training import Say, train_lora


@dataclasses.dataclass(frozen=True)
class HeadlineRow:
    """Shares of images; errors are standard errors over words, each word's images taken together.

    style, word, both    in which it is right
    gain, gain_error     of `both` over the model without a LoRA, word by word; None where nothing was gained by anything
    copies               images nearer to a training image than any real image of another word is
    """

    style_name: str
    what: str
    style: float
    word: float
    both: float
    error: float
    gain: float | None = None
    gain_error: float | None = None
    copies: float | None = None


def measure_headlines(host: Host, sampler: Sampler, scorer: JointScorer, *, output: Path, settings: Mapping[str, object],
                      steps: int, say: Say) -> list[HeadlineRow]:
    """For each graded style: real images (the ceiling), the model alone (the floor) and LoRAs, at each guidance scale.

    Runs differ in their seed alone. A sheet of each style is written to `output`/STYLE.png: model, LoRA, real images.
    """
    return [row for style in GRADED for row in _of_style(host, sampler, scorer, style, output=output, settings=settings,
                                                         steps=steps, say=say)]


def _of_style(host: Host, sampler: Sampler, scorer: JointScorer, style: str, *, output: Path,
              settings: Mapping[str, object], steps: int, say: Say) -> list[HeadlineRow]:
    extent, images = scorer.extent, scorer.images
    data = write_dataset(images, style, output / "data" / style)
    learnt = [word for word, split in zip(images.words, images.splits, strict=True) if split == STYLE]
    training = sampler.through_vae(images.of(style, learnt)[1])
    say(f"{style}: {extent.runs} runs of {steps} steps")
    loras = [sampler.lora(train_lora(
        host, settings={**settings, "seed": 42 + run}, data=data, trigger_word=TRIGGER, name=f"bench-{style}-{run}",
        steps=steps, wanted=(steps,), say=say)[steps], weight=1.0) for run in range(extent.runs)]
    found, real = images.of(style, scorer.words)
    shown = sampler.through_vae(real)
    nearest = nearest_distance(shown, training).min()
    ceiling = torch.stack([*scorer.right(style, shown, found)]).float()
    rows = [HeadlineRow(style, "real, after the VAE", *_figures(ceiling, 1))]
    words = [word for word in scorer.words for _ in range(extent.seeds)]
    prompts = [f"{TRIGGER}, {word}" for word in words]
    for scale in extent.scales:
        say(f"{style}: sampling {len(prompts)} images {1 + len(loras)} times at CFG {scale:g}")
        painted = [sampler.sample(prompts, lora, cfg_scale=scale) for lora in (WITHOUT, *loras)]
        right = [torch.stack([*scorer.right(style, pixels, words)]).float() for pixels in painted]
        base, trained = right[0], torch.stack(right[1:]).mean(0)
        both = torch.stack([one.prod(0) for one in right])
        gain, gain_error = _over_words(both[1:].mean(0) - both[0], extent.seeds)
        mean, error = _over_words(both[1:].mean(0), extent.seeds)
        copies = [float((nearest_distance(pixels, training) < nearest).float().mean())
                  for pixels in (painted[0], torch.cat(painted[1:]))]
        rows += [HeadlineRow(style, f"model alone, CFG {scale:g}", *_figures(base, extent.seeds), copies=copies[0]),
                 HeadlineRow(style, f"LoRA, CFG {scale:g}", *trained.mean(1).tolist(), mean, error, gain, gain_error,
                             copies[1])]
    save_sheet(output / f"{style}.png", [painted[0][::extent.seeds], painted[1][::extent.seeds], shown])
    return rows


def _figures(right: torch.Tensor, seeds: int) -> tuple[float, float, float, float]:
    """Style, word, both and its error, of [2, N] rights."""
    return (*right.mean(1).tolist(), *_over_words(right.prod(0), seeds))


def _over_words(values: torch.Tensor, seeds: int) -> tuple[float, float]:
    """Mean and standard error of values [words * seeds]: images of one word are no independent trials."""
    words = values.unflatten(0, (-1, seeds)).mean(1)
    return float(words.mean()), float(words.std()) / math.sqrt(len(words)) if len(words) > 1 else math.nan
