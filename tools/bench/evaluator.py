"""The fitted scorers with the real images, and the figures that they give for images of the held-out words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from lib_lora_train.errors import translated
from lib_lora_train.model.fingerprint import tensor_fingerprint
from lib_lora_train.storage.atomic import write_atomic
from tools.bench import image_metrics
from tools.bench.real_images import HELD_OUT, NOTO, STYLES, TWEMOJI, RealImages
from tools.bench.sampler import Adapters, Sampler
from tools.bench.scorers import StyleScorer, WordScorer, across_styles

SEED = 7
"""Of the scorers; the training's own is a setting."""
BANDS = 5


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much work a measurement does.

    texture, words   steps the scorers are fitted for
    across           whether the word scorer is also tested on a style that it was not fitted on
    every, others    every n-th of the held-out words is sampled, every n-th of the "other" words is used for fitting
    sampler_steps    for each generated image
    samples          of each scene of the subject
    """

    texture: int = 300
    words: int = 400
    across: bool = True
    every: int = 1
    others: int = 1
    sampler_steps: int = 15
    samples: int = 2


THOROUGH = Effort()
QUICK = Effort(texture=100, words=150, across=False, every=8, others=3, sampler_steps=10, samples=1)


@dataclasses.dataclass(frozen=True)
class ScorerFigures:
    """The scorers' accuracy, as shares of right answers on real images after the VAE.

    style, style_palette, style_texture  Noto or Twemoji, on the held-out words: by the sum of both scores, by each alone
    style_counts                         whether `style` reaches 95 %; otherwise no style share means anything
    word_noto, word_twemoji              which of the held-out words, on augmented images of the scorer's own training set
    word_across                          the same in Twemoji's style, fitted on Noto's only; None if not measured
    """

    style: float
    style_palette: float
    style_texture: float
    style_counts: bool
    word_noto: float
    word_twemoji: float
    word_across: float | None


@dataclasses.dataclass(frozen=True)
class Row:
    """One image for each held-out word, all from one source.

    style, palette, texture   share that the style scorer calls Twemoji: by the sum of both scores, and by each
    word                      share that shows its word, says the word scorer
    psnr, ssim, feature       to the real Twemoji of the same word: dB, 1 is equal, 0 is equal; means
    """

    name: str
    style: float
    palette: float
    texture: float
    word: float
    psnr: float
    ssim: float
    feature: float


@dataclasses.dataclass(frozen=True)
class Memorised:
    """How near images come to the training images: RMS difference of pixels (0 to 1) to the nearest one, mean and
    least, and the share of images that are nearer to one than any real held-out Twemoji is."""

    name: str
    mean: float
    least: float
    suspicious: float


@dataclasses.dataclass(frozen=True)
class Band:
    """The held-out loss in a band of timesteps, without and with the LoRA at weight 1."""

    timesteps: str
    base_model: float
    lora: float


class Evaluator:
    """Fits the scorers on real images as the sampler's VAE shows them.

    real, shown   the real images, as they are and after the VAE {style: [N, 3, 128, 128]}
    effort        how much work a measurement does
    word          the word scorer
    figures       the scorers' accuracy
    indices       positions of the sampled words in `real`
    words         these words
    """

    def __init__(self, sampler: Sampler, real: RealImages, *, effort: Effort = THOROUGH, kept: Path | None = None) -> None:
        """`kept` is a folder that caches the images after the VAE, which take longer than fitting the scorers."""
        self.real, self.effort = real.thinned(effort.others), effort
        real = self.real
        self.shown = shown_by_vae(sampler, real, kept=kept)
        self._style_scorer = StyleScorer.fit(self.shown, real, steps=effort.texture, seed=SEED)
        labels = torch.arange(len(real.words)).repeat(len(STYLES))
        self.word = WordScorer.fit(torch.cat([self.shown[style] for style in STYLES]), labels, steps=effort.words, seed=SEED)
        self._among = real.indices(HELD_OUT)
        held_out = {style: self.shown[style][self._among] for style in STYLES}
        self.figures = ScorerFigures(
            style=self._style_scorer.accuracy["both"], style_palette=self._style_scorer.accuracy["palette"],
            style_texture=self._style_scorer.accuracy["texture"], style_counts=self._style_scorer.counts,
            word_noto=self.word.accuracy(held_out[NOTO], self._among),
            word_twemoji=self.word.accuracy(held_out[TWEMOJI], self._among),
            word_across=across_styles(self.shown, real, steps=effort.words, seed=SEED) if effort.across else None)
        self.indices = self._among[::effort.every]
        self.words = [real.words[index] for index in self.indices]
        self._targets = real.pixels[TWEMOJI][self.indices]
        self._target_features = self.word.features(self.shown[TWEMOJI][self.indices])

    def row(self, name: str, pixels: torch.Tensor) -> Row:
        """The figures of `pixels` [n, 3, 128, 128], one for each of `words`."""
        features = self.word.features(pixels)
        return Row(
            name, style=self.style_share(pixels), palette=mean(self._style_scorer.twemoji(pixels, by="palette")),
            texture=mean(self._style_scorer.twemoji(pixels, by="texture")),
            word=mean(self._among[self.word.word(pixels, self._among)] == self.indices),
            psnr=mean(image_metrics.psnr(pixels, self._targets)), ssim=mean(image_metrics.ssim(pixels, self._targets)),
            feature=mean(image_metrics.feature_distance(features, self._target_features)))

    def style_share(self, pixels: torch.Tensor) -> float:
        """The share of `pixels` [n, 3, 128, 128], of whatever words, that is taken for Twemoji."""
        return mean(self._style_scorer.twemoji(pixels))

    def memorised(self, groups: Mapping[str, torch.Tensor], *, training: torch.Tensor) -> list[Memorised]:
        """How near groups of images come to the images `training` (as the VAE shows them); the first row is that of
        the real held-out Twemoji, which are nobody's copies."""
        real = image_metrics.nearest_distance(self.shown[TWEMOJI][self.indices], training)
        found = {"real held-out Twemoji": real,
                 **{name: image_metrics.nearest_distance(pixels, training) for name, pixels in groups.items()}}
        return [Memorised(name, mean(distances), float(distances.min()), mean(distances < real.min()))
                for name, distances in found.items()]


def shown_by_vae(sampler: Sampler, real: RealImages, *, kept: Path | None) -> dict[str, torch.Tensor]:
    """`real.pixels` as the sampler's VAE shows them, rounded to bytes; read from `kept`, where they were made before for
    the same VAE and the same images, else made and written there."""
    name = tensor_fingerprint({**sampler.vae_tensors, **real.pixels})[:16]
    file = kept / f"real-{name}.safetensors" if kept else None
    if file is None or not file.is_file():
        found = {style: (sampler.through_vae(real.pixels[style]) * 255).round().to(torch.uint8).contiguous()
                 for style in STYLES}
        if file is not None:
            with translated("keeping the real pictures"):
                write_atomic(file, save(found))
    else:
        found = load_file(file)
    return {style: pixels.float() / 255 for style, pixels in found.items()}


def loss_bands(sampler: Sampler, pixels: torch.Tensor, captions: Sequence[str], lora: Adapters) -> list[Band]:
    """The loss on held-out images in five bands of timesteps, without and with `lora`, on the same noise."""
    base, adapted = (sampler.held_out_loss(pixels, captions, adapters) for adapters in ({}, lora))
    width = 1000 // BANDS
    bands = []
    for start in range(0, 1000, width):
        inside = [t for t in base if start <= t < start + width]
        bands.append(Band(f"{start}-{start + width - 1}", *(sum(loss[t] for t in inside) / len(inside)
                                                            for loss in (base, adapted))))
    return bands


def mean(values: torch.Tensor) -> float:
    """The mean of numbers or, for bools, the share that is true."""
    return float(values.float().mean())
