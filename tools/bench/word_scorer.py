"""Which word an image shows, whatever style it is drawn in.

Linear layers, averaged, on what a network sees that was trained on photographs (`features.contents`), fitted on real drawings
of the words in many styles. Each drawing is varied: turned, resized, in other hues, in greys, with lines around it, or as
nothing but lines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.bench.augmentation import augmented, without_rim
from tools.bench.features import contents

WIDTH, BATCH, RATE, WEIGHT_DECAY, DROPPED = 256, 256, 2e-3, 0.05, 0.3
GROUND = 0.1
"""What differs by less from the ground is ground: a painted one is uneven."""
SHARPNESS = 16.0
"""Cosines are multiplied by it before the softmax."""
_LINES, _LINED, _OTHER_HUES = 0.25, 0.5, 0.7
"""Cumulated shares of variants."""


@dataclasses.dataclass(frozen=True)
class WordEffort:
    """Variants of each real drawing, and steps of each of `fits` fits."""

    variants: int = 8
    steps: int = 1500
    fits: int = 3


def views(pixels: Tensor, variants: int, *, seed: int) -> Tensor:
    """[2 + variants, N, 1280] of what the images [N, 3, h, w] in [0, 1] show: as they are, mirrored, and varied."""
    generator = torch.Generator().manual_seed(seed)
    plain = on_white(pixels)
    return torch.cat([_both_ways(pixels), *(contents(_varied(plain, generator))[None] for _ in range(variants))])


class WordScorer:
    """Make it with `fit`.

    Features are counted from the mean of images in one style that show many words: what all of them share, lines, softness
    or an uneven ground, tells no word.
    """

    def __init__(self, networks: list[_Words], mean: Tensor) -> None:
        self._networks, self._mean = networks, mean

    @classmethod
    def fit(cls, styles: Sequence[tuple[Tensor, Tensor]], effort: WordEffort, *, seed: int) -> WordScorer:
        """Fit on each style's `views` [V, N, 1280] and the words they show, numbered from 0, [N]."""
        seen = torch.cat([(views - views.mean(1, keepdim=True)).flatten(0, 1) for views, _ in styles])
        labels = torch.cat([words.repeat(len(views)) for views, words in styles])
        mean = torch.cat([views.flatten(0, 1) for views, _ in styles]).mean(0)
        return cls([_fitted(seen, labels, steps=effort.steps, seed=seed + number) for number in range(effort.fits)], mean)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """[N, D] of length 1 for images [N, 3, h, w]; near for images of the same thing."""
        seen = _both_ways(pixels) - self._mean
        return F.normalize(torch.cat([network.features(seen).sum(0) for network in self._networks], 1), dim=1)

    @torch.no_grad()
    def word(self, pixels: Tensor) -> Tensor:
        """int64 [N]: the number of the most likely word of each image. The images are in one style, and of many words."""
        seen = _both_ways(pixels)
        seen = seen - seen.mean(1, keepdim=True)
        return torch.stack([network(seen).sum(0) for network in self._networks]).sum(0).argmax(dim=1)


class _Words(nn.Module):
    """One score a word: the cosine between its direction and what a linear layer makes of the features."""

    def __init__(self, seen: Tensor, words: int) -> None:
        super().__init__()
        self._deviation = seen.std(0) + 1e-3
        self._dropout, self._layer = nn.Dropout(DROPPED), nn.Linear(seen.shape[1], WIDTH)
        self._words = nn.Parameter(torch.randn(words, WIDTH))

    @property
    def directions(self) -> Tensor:
        return F.normalize(self._words, dim=1)

    def features(self, seen: Tensor) -> Tensor:
        return F.normalize(self._layer(self._dropout(seen / self._deviation)), dim=-1)

    def forward(self, seen: Tensor) -> Tensor:
        return SHARPNESS * self.features(seen) @ self.directions.T


def _fitted(seen: Tensor, labels: Tensor, *, steps: int, seed: int) -> _Words:
    """AdamW with a rate that rises and falls once."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = _Words(seen, int(labels.max()) + 1)
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        for _ in range(steps):
            rows = torch.randint(len(seen), (BATCH,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(network(seen[rows]), labels[rows], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def _both_ways(pixels: Tensor) -> Tensor:
    """[2, N, 1280]: of the images and of their mirror images."""
    plain = on_white(pixels)
    return torch.stack([contents(plain), contents(plain.flip(3))])


def on_white(pixels: Tensor) -> Tensor:
    """What differs from the ground, on white and `without_rim`: images on white stay nearly as they are, white lines on blue
    become dark ones."""
    pixels = without_rim(pixels)
    rim = torch.cat([pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1]], dim=2)
    away = (pixels - rim.median(dim=2).values[:, :, None, None]).abs()
    return 1 - (away - GROUND).clamp(min=0) / (1 - GROUND)


def _varied(plain: Tensor, generator: torch.Generator) -> Tensor:
    """As somebody else might draw it; then moved, turned, tinted, blurred."""
    chance, bold = torch.rand(2, len(plain), 1, 1, 1, generator=generator)
    edges = F.max_pool2d(plain, 3, 1, 1) + F.max_pool2d(-plain, 3, 1, 1)
    thin = 1 - (4 * (edges.amax(1, keepdim=True) - 0.08)).clamp(0, 1)
    lines = torch.where(bold < 0.5, thin, -F.max_pool2d(-thin, 3, 1, 1)).expand(-1, 3, -1, -1)
    orders = torch.stack([torch.randperm(3, generator=generator) for _ in plain])
    x = torch.where(chance < _OTHER_HUES, plain.gather(1, orders[:, :, None, None].expand_as(plain)), plain)
    x = torch.where(chance < _LINED, torch.minimum(plain, lines), x)
    x = torch.where(chance < _LINES, lines, x)
    return augmented(x, generator, scale=(0.9, 1.3), shift=0.15, turn=0.2, colour=0.3, grey=0.25, noise=0.03)
