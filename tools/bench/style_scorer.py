"""Which style an image is in, or the model's own: small networks, averaged, that see patches.

They are fitted on real images of all styles and on the model's own paintings, with contrast, saturation, blur and noise varied,
so that none of these tells a style. Real images of held-out words and paintings of held-out words gate each style: where a
gate fails, its shares count for nothing. What a network trained on photographs sees of patches tells Twemoji worse
(docs/quality.md).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from tools.bench.augmentation import augmented, weathered, without_rim

LEAST_RIGHT, MOST_PAINTED = 0.95, 0.10
"""The gates: of real held-out images, however varied, and of the model's own paintings, at any guidance scale."""
EACH, RATE, WEIGHT_DECAY = 12, 6e-3, 0.05
"""Images of each style in a batch."""


@dataclasses.dataclass(frozen=True)
class StyleEffort:
    """Steps of each of `fits` fits."""

    steps: int = 600
    fits: int = 3


@dataclasses.dataclass(frozen=True)
class StyleGate:
    """How far a style's shares can be trusted.

    right    {variation: share of real held-out images that are taken for their style}
    wrong    {guidance scale: share of the model's own paintings that are taken for it}
    """

    style: str
    right: Mapping[str, float]
    wrong: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """Whether both limits are kept throughout."""
        return min(self.right.values()) >= LEAST_RIGHT and max(self.wrong.values()) <= MOST_PAINTED


class StyleClassifier:
    """Tells `styles` from each other. Make it with `fit`."""

    def __init__(self, styles: tuple[str, ...], networks: list[nn.Module]) -> None:
        self.styles, self._networks = styles, networks

    @classmethod
    def fit(cls, images: Mapping[str, torch.Tensor], effort: StyleEffort, *, seed: int) -> StyleClassifier:
        """Images [n, 3, h, h] in [0, 1], of 64 or 128 pixels, by style."""
        known = [_seen(pixels) for pixels in images.values()]
        return cls(tuple(images), [_fitted(known, steps=effort.steps, seed=seed + number) for number in range(effort.fits)])

    @torch.no_grad()
    def is_in(self, style: str, pixels: torch.Tensor) -> torch.Tensor:
        """bool [N]: whether it is the likeliest for each of the images [N, 3, 128, 128]."""
        x = _seen(pixels)
        shares = torch.stack([(network(x) + network(x.flip(3))).div(2).softmax(1) for network in self._networks]).mean(0)
        return shares.argmax(1) == self.styles.index(style)


def _seen(pixels: torch.Tensor) -> torch.Tensor:
    """[N, 3, 58, 58] of images of 64 or 128 pixels: at about the size at which the real images were drawn, `without_rim`."""
    return without_rim(F.avg_pool2d(pixels, pixels.shape[-1] // 64))


class _Patches(nn.Module):
    """One score a style: the mean over the image of the scores of patches of 19 pixels."""

    def __init__(self, styles: int) -> None:
        super().__init__()
        layers = [part for (inside, outside), stride in zip(itertools.pairwise((3, 32, 64, 96)), (2, 2, 1), strict=True)
                  for part in (nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU())]
        self.body = nn.Sequential(*layers, nn.Dropout2d(0.1))
        self.out = nn.Linear(2 * 96, styles)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.body(2 * x - 1)
        return self.out(torch.cat([found.mean(dim=(2, 3)), found.amax(dim=(2, 3))], 1))


def _fitted(known: list[torch.Tensor], *, steps: int, seed: int) -> nn.Module:
    """AdamW with a rate that rises and falls once; each batch has EACH images of each style."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(known)).repeat_interleave(EACH)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = _Patches(len(known))
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        for _ in range(steps):
            rows = [pixels[torch.randint(len(pixels), (EACH,), generator=generator)] for pixels in known]
            seen = augmented(torch.cat(rows), generator, scale=(0.95, 1.1), shift=0.1, turn=0.05, colour=0.02, grey=0.0,
                             noise=0.03)
            optimizer.zero_grad()
            F.cross_entropy(network(weathered(seen, generator)), labels, label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    return network.eval()
