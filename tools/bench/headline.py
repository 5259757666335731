"""The headline of a LoRA: the share of images of words that it was not trained on in which style *and* word are right."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from tools.bench.image_metrics import nearest_distance
from tools.bench.joint_scorer import TRIGGER, JointScorer
from tools.bench.real_images import STYLE
from tools.bench.sampler import Sampler
from tools.bench.sheet import save_sheet
from tools.bench.styled_images import write_dataset
from tools.bench.training import Say


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


Sample = Callable[[Sequence[str], float], torch.Tensor]
"""One image for each prompt at a guidance scale, [N, 3, 128, 128]; the seed is its position."""
Trainer = Callable[[Path, str, int], Sample]
"""Trains on a dataset's folder, under a name, with a seed; returns what samples with what was learnt."""


def measure_headlines(sampler: Sampler, scorer: JointScorer, trainers: Mapping[str, Trainer], *, styles: Sequence[str],
                      output: Path, say: Say) -> list[HeadlineRow]:
    """For each of the graded `styles`: real images (the ceiling), the model alone (the floor) and what each of `trainers`, by
    name, makes of it, at each guidance scale.

    Runs differ in their seed alone. A sheet of each style at the last guidance scale is written to `output`/STYLE.png: model,
    the first run of each, real images.
    """
    return [row for style in styles for row in _of_style(sampler, scorer, style, trainers, output=output, say=say)]


def _of_style(sampler: Sampler, scorer: JointScorer, style: str, trainers: Mapping[str, Trainer], *, output: Path, say: Say
              ) -> list[HeadlineRow]:
    extent, images = scorer.extent, scorer.images
    data = write_dataset(images, style, output / "data" / style)
    learnt = [word for word, split in zip(images.words, images.splits, strict=True) if split == STYLE]
    training = sampler.through_vae(images.of(style, learnt)[1])
    trained: dict[str, list[Sample]] = {}
    for number, (what, train) in enumerate(trainers.items()):
        say(f"{style}: {what}, {extent.runs} runs")
        trained[what] = [train(data, f"bench-{style}-{number}-{run}", 42 + run) for run in range(extent.runs)]
    found, real = images.of(style, scorer.words)
    shown = sampler.through_vae(real)
    nearest = nearest_distance(shown, training).min()
    rows = [HeadlineRow(style, "real, after the VAE", *_figures(torch.stack([*scorer.right(style, shown, found)]).float(), 1))]
    words = [word for word in scorer.words for _ in range(extent.seeds)]
    prompts = [f"{TRIGGER}, {word}" for word in words]

    def right(pixels: torch.Tensor) -> torch.Tensor:
        return torch.stack([*scorer.right(style, pixels, words)]).float()

    def copies(pixels: torch.Tensor) -> float:
        return float((nearest_distance(pixels, training) < nearest).float().mean())

    for scale in extent.scales:
        say(f"{style}: sampling {len(prompts)} images {1 + extent.runs * len(trained)} times at CFG {scale:g}")
        alone = sampler.sample(prompts, cfg_scale=scale)
        floor = right(alone)
        rows.append(HeadlineRow(style, f"model alone, CFG {scale:g}", *_figures(floor, extent.seeds), copies=copies(alone)))
        firsts = [alone]
        for what, runs in trained.items():
            painted = [sample(prompts, scale) for sample in runs]
            rights = torch.stack([right(pixels) for pixels in painted])
            both = rights.prod(1).mean(0)
            rows.append(HeadlineRow(
                style, f"{what}, CFG {scale:g}", *rights.mean((0, 2)).tolist(), *over_words(both, extent.seeds),
                *over_words(both - floor.prod(0), extent.seeds), copies(torch.cat(painted))))
            firsts.append(painted[0])
        save_sheet(output / f"{style}.png", [*(pixels[::extent.seeds] for pixels in firsts), shown])
    return rows


def _figures(right: torch.Tensor, seeds: int) -> tuple[float, float, float, float]:
    """Style, word, both and its error, of [2, N] rights."""
    return (*right.mean(1).tolist(), *over_words(right.prod(0), seeds))


def over_words(values: torch.Tensor, seeds: int) -> tuple[float, float]:
    """Mean and standard error of values [words * seeds]: images of one word are no independent trials."""
    words = values.unflatten(0, (-1, seeds)).mean(1)
    return float(words.mean()), float(words.std()) / math.sqrt(len(words)) if len(words) > 1 else math.nan
