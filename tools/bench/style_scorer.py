"""Which of the styles that LoRAs are trained on an image is in, or none of them: small networks, averaged, that see patches.

They are fitted on real images of all styles and on the model's own paintings, with contrast, saturation, blur and noise varied,
so that none of these tells a style. Real images of held-out words and paintings of held-out words gate each style: where a
gate fails, its shares count for nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from tools.bench.scorers import at_64, augmented, conv_layer, fit_network

EACH, LEAST_RIGHT, MOST_PAINTED = 16, 0.95, 0.10
"""Images of a style in a batch; the gates: of real held-out images, however varied, and of the model's own paintings, at any
guidance scale."""


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
    """Tells `styles` from each other and from everything else. Make it with `fit`."""

    def __init__(self, styles: tuple[str, ...], networks: list[nn.Module]) -> None:
        self.styles, self._networks = styles, networks

    @classmethod
    def fit(cls, styles: Mapping[str, torch.Tensor], others: Sequence[torch.Tensor], *, steps: int, fits: int, seed: int
            ) -> StyleClassifier:
        """Images [n, 3, h, h] of 64 or 128 pixels, of the styles by name, and of several that are none of them."""
        known, none = [at_64(pixels) for pixels in styles.values()], [at_64(pixels) for pixels in others]
        return cls(tuple(styles), [_fitted(known, none, steps=steps, seed=seed + number) for number in range(fits)])

    @torch.no_grad()
    def is_in(self, style: str, pixels: torch.Tensor) -> torch.Tensor:
        """bool [N]: whether it is the likeliest for each of the images [N, 3, 128, 128]."""
        x = at_64(pixels)
        shares = torch.stack([(network(x) + network(x.flip(3))).div(2).softmax(1) for network in self._networks]).mean(0)
        return shares.argmax(1) == self.styles.index(style)


class _Patches(nn.Module):
    """One score a style: the mean over the image of the scores of patches of 19 of 64 pixels."""

    def __init__(self, styles: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_layer(3, 32, 2), *conv_layer(32, 64, 2), *conv_layer(64, 96, 1), nn.Dropout2d(0.1))
        self.out = nn.Linear(2 * 96, styles)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.body(2 * x - 1)
        return self.out(torch.cat([found.mean(dim=(2, 3)), found.amax(dim=(2, 3))], 1))


def _fitted(known: list[torch.Tensor], none: list[torch.Tensor], *, steps: int, seed: int) -> nn.Module:
    """Each batch has EACH images of each style, and twice as many of what is none, evenly from all sources."""
    generator = torch.Generator().manual_seed(seed)
    counts = [EACH] * len(known) + [-(-2 * EACH // len(none))] * len(none)
    labels = torch.repeat_interleave(torch.arange(len(counts)).clamp(max=len(known)), torch.tensor(counts))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Patches(len(known) + 1)

        def loss() -> torch.Tensor:
            rows = [pixels[torch.randint(len(pixels), (count,), generator=generator)]
                    for pixels, count in zip((*known, *none), counts, strict=True)]
            seen = augmented(torch.cat(rows), generator, scale=(0.95, 1.1), shift=0.1, turn=0.05, colour=0.02, grey=0.0,
                             noise=0.03)
            return F.cross_entropy(network(_weathered(seen, generator)), labels, label_smoothing=0.05)

        fit_network(network, loss, steps=steps, rate=6e-3)
    return network


def _weathered(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What no style is told by: contrast from 0.65 to 1.4, saturation from 0.8 to 1.25, half of them blurred."""
    def drawn(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=generator)

    middle = x.mean(dim=(2, 3), keepdim=True)
    x = middle + (x - middle) * drawn(0.65, 1.4)
    pale = x.mean(dim=1, keepdim=True)
    x = pale + (x - pale) * drawn(0.8, 1.25)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    strength = drawn(-1.0, 1.0).clamp(min=0)
    return ((1 - strength) * x + strength * soft).clamp(0, 1)
