"""Small networks that classify the style and the content of an image; fitted at each start on real images.

All images, real and generated, pass through the same VAE, so that its blur has no influence. The networks are seeded: the same
images give the same scorers on the same machine.

- `StyleScorer`: Noto or Twemoji? The sum of two scores: the *palette* (a logistic regression over the colours of the ink;
  Twemoji has a small, fixed palette of flat colours) and the *texture* (a network that sees patches of 15 of 64 pixels, never
  the whole shape). It is not fitted on the held-out words. It knows no third style, and it also classifies images that show
  nothing: read its share together with the prompt following.
- `WordScorer`: which of the words? A network with near features for the same word in both styles. It is fitted on both styles'
  images of all words, since there are no others, so its accuracy on them shows only that the fit worked; `across_styles`
  measures how well it recognises a drawing that it was not fitted on. It cannot tell a good drawing from one that is only
  nearer to its word than to the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tools.bench.real_images import HELD_OUT, NOTO, OTHER, STYLE, STYLES, TWEMOJI, RealImages

REQUIRED = 0.95
"""Least accuracy on real held-out images; below it the style shares mean nothing."""
# Both chosen by cross-validation among the words the scorer learns from (several weights did equally well).
_COLOURS, _TEXTURE_WEIGHT = 16, 0.5
_INK = 0.93
Palette = tuple[torch.Tensor, torch.Tensor]
"""The weights of colours [4096] and a bias []."""


class StyleScorer:
    """Classifies Twemoji and Noto. Make it with `fit`; `accuracy` is its share of right answers on real held-out words."""

    def __init__(self, palette: Palette, texture: _Texture, scales: tuple[float, float]) -> None:
        self._palette, self._texture, self._scales = palette, texture, scales
        self.accuracy: dict[str, float] = {}

    @classmethod
    def fit(cls, images: dict[str, torch.Tensor], real: RealImages, *, steps: int, seed: int) -> StyleScorer:
        """Fit on the words of "style" and "other" and measure on those of "held_out".

        `images` are the real ones of each style as the VAE shows them, [N, 3, 128, 128], in the order of `real`.
        """
        learnt, held_out = real.indices(STYLE, OTHER), real.indices(HELD_OUT)
        small = {style: at_64(images[style]) for style in STYLES}
        pairs = small[NOTO][learnt], small[TWEMOJI][learnt]
        scorer = cls(_fit_palette(*pairs), _fit_texture(*pairs, steps=steps, seed=seed), (1.0, 1.0))
        # In units of each score's mean size on what it was fitted on.
        palette, texture = (1 / max(float(score.abs().mean()), 1e-9) for score in scorer._scores(torch.cat(pairs)))
        scorer._scales = (palette, _TEXTURE_WEIGHT * texture)
        for name, index in (("both", None), ("palette", 0), ("texture", 1)):
            right = [(scorer._score(small[style][held_out], index) > 0) == (style == TWEMOJI) for style in STYLES]
            scorer.accuracy[name] = float(torch.cat(right).float().mean())
        return scorer

    def twemoji(self, pixels: torch.Tensor, *, by: str = "both") -> torch.Tensor:
        """bool [N]: whether each image [N, 3, 128, 128] is in Twemoji's style, by "both" scores, or one of them."""
        return self._score(at_64(pixels), {"both": None, "palette": 0, "texture": 1}[by]) > 0

    @property
    def counts(self) -> bool:
        """Whether its accuracy reaches `REQUIRED`."""
        return self.accuracy["both"] >= REQUIRED

    def _score(self, small: torch.Tensor, index: int | None) -> torch.Tensor:
        scores = [scale * score for scale, score in zip(self._scales, self._scores(small), strict=True)]
        return scores[0] + scores[1] if index is None else scores[index]

    @torch.no_grad()
    def _scores(self, small: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        texture = self._texture(small) + self._texture(small.flip(3))
        weight, bias = self._palette
        return _colours(small) @ weight + bias, texture


class WordScorer:
    """Classifies what an image shows, in either style. Make it with `fit`."""

    def __init__(self, network: _Words) -> None:
        self._network = network

    @classmethod
    def fit(cls, images: torch.Tensor, labels: torch.Tensor, *, steps: int, seed: int) -> WordScorer:
        """Fit on `images` [N, 3, 128, 128] of the words `labels` [N], numbered from 0."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _Words(int(labels.max()) + 1)
        small, generator = _on_white(at_64(images)), torch.Generator().manual_seed(seed)

        def loss() -> torch.Tensor:
            rows = torch.randint(len(small), (96,), generator=generator)
            varied = augmented(small[rows], generator, scale=(0.9, 1.2), shift=0.2, turn=0.15, colour=0.2, grey=0.2, noise=0.02)
            return F.cross_entropy(network(varied), labels[rows], label_smoothing=0.05)

        fit_network(network, loss, steps=steps, rate=6e-3)
        return cls(network)

    @torch.no_grad()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, 64] of length 1; near for images of the same thing."""
        return self._network.features(_on_white(at_64(pixels)))

    @torch.no_grad()
    def word(self, pixels: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        """int64 [N]: the most likely word of each image, as a position in `among` (the words' numbers)."""
        return self._network(_on_white(at_64(pixels)))[:, among].argmax(dim=1)

    def accuracy(self, pixels: torch.Tensor, words: torch.Tensor) -> float:
        """The share of `pixels` [n] that it takes for their own word among `words` [n], varied as it has not seen them."""
        shown = augmented(_on_white(at_64(pixels)), torch.Generator().manual_seed(1 << 40), scale=(0.95, 1.1), shift=0.1,
                        turn=0.1, colour=0.1, grey=0.0, noise=0.02)
        with torch.no_grad():
            found = self._network(shown)[:, words].argmax(dim=1)
        return float((found == torch.arange(len(words))).float().mean())


def across_styles(images: dict[str, torch.Tensor], real: RealImages, *, steps: int, seed: int) -> float:
    """How often a word scorer knows the held-out words in Twemoji's style that it was shown in Noto's style only.

    A scorer of its own is fitted for this, on all images but those. Chance is one in the number of held-out words.
    """
    held_out = real.indices(HELD_OUT)
    everything = torch.cat([images[style] for style in STYLES])
    labels = torch.arange(len(real.words)).repeat(len(STYLES))
    shown = torch.ones(len(labels), dtype=torch.bool)
    shown[STYLES.index(TWEMOJI) * len(real.words) + held_out] = False
    scorer = WordScorer.fit(everything[shown], labels[shown], steps=steps, seed=seed)
    found = scorer.word(images[TWEMOJI][held_out], held_out)
    return float((found == torch.arange(len(held_out))).float().mean())


class _Texture(nn.Module):
    """One score for each image [N, 3, 64, 64]: the mean over the ink of the scores of all patches of 15 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_layer(3, 24, 2), *conv_layer(24, 48, 2), *conv_layer(48, 64, 1), nn.Dropout2d(0.2))
        self.out = nn.Conv2d(64, 1, 1)

    def patches(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The score of each patch [N, h, w] and its weight [N, h, w]; weights sum to 1 in each image."""
        said = self.out(self.body(2 * x - 1))[:, 0]
        ink = F.adaptive_avg_pool2d(_inked(x).float()[:, None], said.shape[1:])[:, 0]
        return said, ink / (ink.sum(dim=(1, 2), keepdim=True) + 1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        said, weight = self.patches(x)
        return (said * weight).sum(dim=(1, 2))


class _Words(nn.Module):
    """Features [N, 64] of an image [N, 3, 64, 64], and from their directions one score a word."""

    def __init__(self, words: int) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        self.body = nn.Sequential(*(part for sizes in itertools.pairwise(widths) for part in conv_layer(*sizes, 2)))
        self.out = nn.Linear(128, 64)
        self.words = nn.Parameter(torch.randn(words, 64))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.out(self.body(2 * x - 1).mean(dim=(2, 3))), dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 16 * self.features(x) @ F.normalize(self.words, dim=1).T


def conv_layer(inside: int, outside: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]


def fit_network(network: nn.Module, loss: Callable[[], torch.Tensor], *, steps: int, rate: float) -> None:
    """AdamW with a rate that rises and falls once; leaves the network in evaluation mode."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    network.train()
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            schedule.step()
    network.eval()


def _fit_texture(noto: torch.Tensor, twemoji: torch.Tensor, *, steps: int, seed: int) -> _Texture:
    """Each batch has the same words in both styles, so that the content does not help."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Texture()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((32,), 0.05), torch.full((32,), 0.95)])

    def loss() -> torch.Tensor:
        rows = torch.randint(len(noto), (32,), generator=generator)
        varied = augmented(torch.cat([noto[rows], twemoji[rows]]), generator, scale=(0.97, 1.06), shift=0.1, turn=0.05,
                         colour=0.02, grey=0.0, noise=0.01)
        said, weight = network.patches(varied)
        whole = F.binary_cross_entropy_with_logits((said * weight).sum(dim=(1, 2)), labels)
        each = F.binary_cross_entropy_with_logits(said, labels[:, None, None].expand_as(said), reduction="none")
        return 0.5 * whole + 0.5 * (each * weight).sum(dim=(1, 2)).mean()

    # Dropout draws from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fit_network(network, loss, steps=steps, rate=8e-3)
    return network


def _fit_palette(noto: torch.Tensor, twemoji: torch.Tensor) -> Palette:
    """Logistic regression over the colours of ink; convex, so it needs no random start."""
    x = _colours(torch.cat([noto, twemoji]))
    y = torch.cat([torch.zeros(len(noto)), torch.ones(len(twemoji))])
    mean, deviation = x.mean(dim=0), x.std(dim=0) + 1e-3
    x = (x - mean) / deviation
    weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(x @ weight + bias, y) + 0.03 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    weight = weight.detach() / deviation
    return weight, bias.detach() - weight @ mean


def _colours(small: torch.Tensor) -> torch.Tensor:
    """[N, 4096]: the root of the share of ink near each of 16×16×16 colours; a colour counts for the eight around it."""
    ink = _inked(small).flatten(1).float()
    level = small.clamp(0, 1) * (_COLOURS - 1)
    low = level.floor().clamp(max=_COLOURS - 2)
    above, low = (level - low).flatten(2), low.long().flatten(2)
    shares = torch.zeros(len(small), _COLOURS ** 3)
    for corner in itertools.product((0, 1), repeat=3):
        near, index = ink, torch.zeros_like(low[:, 0])
        for channel, up in enumerate(corner):
            near = near * (above[:, channel] if up else 1 - above[:, channel])
            index = index * _COLOURS + low[:, channel] + up
        shares.scatter_add_(1, index, near)
    return (shares / (ink.sum(dim=1, keepdim=True) + 1)).sqrt()


def _inked(x: torch.Tensor) -> torch.Tensor:
    """bool [N, h, w]: the ink, all that is not white paper."""
    return x.amin(dim=1) < _INK


def at_64(pixels: torch.Tensor) -> torch.Tensor:
    """The scorers' input: 64 pixels, about the size at which the images were drawn."""
    return F.avg_pool2d(pixels, pixels.shape[-1] // 64)


def augmented(x: torch.Tensor, generator: torch.Generator, *, scale: tuple[float, float], shift: float, turn: float,
            colour: float, grey: float, noise: float) -> torch.Tensor:
    """Random augmentation: each image moved, resized, mirrored, rotated, tinted, blurred and with noise.

    scale of what is seen (above 1 the thing looks smaller), shift in halves of the side, turn in radians, colour and noise
    in brightness, grey the share that loses its colours.
    """
    count = len(x)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator)

    size, angle = scale[0] + (scale[1] - scale[0]) * drawn(), (2 * drawn() - 1) * turn
    mirror = (drawn() < 0.5).float() * 2 - 1
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0], transform[:, 0, 1] = size * mirror * angle.cos(), -size * angle.sin()
    transform[:, 1, 0], transform[:, 1, 1] = size * mirror * angle.sin(), size * angle.cos()
    transform[:, :, 2] = (2 * drawn(2) - 1) * shift / 2
    grid = F.affine_grid(transform, [*x.shape], align_corners=False)
    x = 1 - F.grid_sample(1 - x, grid, align_corners=False)  # beyond the border the paper goes on
    ink = (x < 0.99).float()
    x = 1 - (1 - x) * (1 + (2 * drawn(1, 1, 1) - 1) * colour) + (drawn(3, 1, 1) - 0.5) * colour * ink
    blurred, strength = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1), drawn(1, 1, 1) / 2
    x = (1 - strength) * x + strength * blurred
    pale = (drawn(1, 1, 1) < grey).float()
    x = (1 - pale) * x + pale * x.mean(dim=1, keepdim=True)
    return x + 2 * noise * drawn(1, 1, 1) * torch.randn(x.shape, generator=generator)


def _on_white(x: torch.Tensor) -> torch.Tensor:
    """What differs from the ground, on white: images on white stay as they are, white lines on blue become dark ones."""
    rim = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], dim=2)
    return 1 - (x - rim.median(dim=2).values[:, :, None, None]).abs()
