"""Style and word of an image, by scorers that are gated on what they never saw."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tools.bench.real_images import HELD_OUT, STYLE, TEST
from tools.bench.sampler import Sampler
from tools.bench.style_scorer import StyleClassifier, StyleEffort, StyleGate
from tools.bench.styled_images import GRADED, StyledImages
from tools.bench.word_scorer import WordEffort, WordScorer, views

TRIGGER = "zorp"
LEAST_KNOWN = 0.90
"""Gate: of the words in a style that the word scorer never saw."""
PAINTED_AT = (1.0, 2.0, 4.0)
"""Guidance scales at which the model paints what is no style's."""
OWN_AT, LEAST_OWN = 3.0, 0.95
"""Gate of the model: at this guidance scale it paints so many of the words right by itself."""
PAINTED = "the model's own"
SEED = 7


@dataclasses.dataclass(frozen=True)
class Extent:
    """How much is measured: the efforts of the scorers' fits; how many real images of each style are also learnt from as good
    copies might be painted; whether the test's words are asked for in place of the held-out ones; every n-th of them; images of
    each; trainings, which differ in their seed; guidance scales; the sampler's steps."""

    style: StyleEffort = StyleEffort()
    word: WordEffort = WordEffort()
    repainted: int = 32
    test: bool = False
    every: int = 1
    seeds: int = 4
    runs: int = 3
    scales: tuple[float, ...] = (1.3, 2.0)
    sampler_steps: int = 15


THOROUGH = Extent()
QUICK = Extent(StyleEffort(steps=250, fits=1), WordEffort(variants=1, steps=300, fits=1), repainted=4, every=8,
               seeds=1, runs=1, scales=(2.0,), sampler_steps=10)


@dataclasses.dataclass(frozen=True)
class WordGate:
    """How many held-out words a scorer knows in a style of which it saw nothing."""

    style: str
    known: float

    @property
    def passed(self) -> bool:
        """Whether it knows things and not drawings."""
        return self.known >= LEAST_KNOWN


class JointScorer:
    """Fitted on all styles' real images and the model's own paintings.

    gates    {style: (its style scorer's gate, the word scorer's)}
    own      how many words the model paints right by itself, without the trigger word
    words    the held-out words that images are asked for
    """

    def __init__(self, sampler: Sampler, images: StyledImages, extent: Extent) -> None:
        self.images, self.extent = images, extent
        split = dict(zip(images.words, images.splits, strict=True))
        self._known = [word for word in images.words if split[word] in (HELD_OUT, TEST)]
        self.words = [word for word in self._known if (split[word] == TEST) == extent.test][::extent.every]
        learnt = [word for word in images.words if word not in self._known]
        shown = {style: images.of(style, learnt)[1] for style in images.images}
        repainted = {style: _repainted(sampler, pixels, extent.repainted) for style, pixels in shown.items()}
        shown |= {style: torch.cat([shown[style], more]) for style, more in images.more.items()}
        shown = {style: torch.cat([pixels, repainted[style]]) for style, pixels in shown.items()}
        asked = [word for word in learnt if split[word] == STYLE][::extent.every]
        painted = torch.cat([_sampled(sampler, asked, scale) for scale in PAINTED_AT])
        self._style = StyleClassifier.fit({**shown, PAINTED: painted}, extent.style, seed=SEED)
        self._views = {style: self._views_of(style) for style in images.images}
        self._word = self._word_scorer(list(images.images))
        self.gates = dict(zip(GRADED, zip(self._style_gates(sampler), self._word_gates(), strict=True), strict=True))
        self.own = self._share_known(self._word, self.words, sampler.sample(self.words, cfg_scale=OWN_AT))

    def right(self, style: str, pixels: torch.Tensor, words: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """bool [N] each, for images [N, 3, 128, 128] that were asked for `words` (held-out ones): style, word."""
        return self._style.is_in(style, pixels), self._named(self._word, words, pixels)

    def word_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, D] of length 1, near for images [N, 3, h, w] of the same thing."""
        return self._word.features(pixels)

    def _word_scorer(self, styles: Sequence[str]) -> WordScorer:
        return WordScorer.fit([self._views[style] for style in styles], self.extent.word, seed=SEED)

    def _views_of(self, style: str) -> tuple[torch.Tensor, torch.Tensor]:
        """How the words are drawn, and their numbers."""
        words, pixels = self.images.of(style, self._known)
        return views(pixels, self.extent.word.variants, seed=SEED), torch.tensor([self._known.index(word) for word in words])

    def _word_gates(self) -> list[WordGate]:
        """By one scorer that saw none of the graded styles."""
        others = self._word_scorer([style for style in self.images.images if style not in GRADED])
        return [WordGate(style, self._share_known(others, *self.images.of(style, self.words))) for style in GRADED]

    def _named(self, scorer: WordScorer, words: Sequence[str], pixels: torch.Tensor) -> torch.Tensor:
        return scorer.word(pixels) == torch.tensor([self._known.index(word) for word in words])

    def _share_known(self, scorer: WordScorer, words: Sequence[str], pixels: torch.Tensor) -> float:
        return float(self._named(scorer, words, pixels).float().mean())

    def _style_gates(self, sampler: Sampler) -> list[StyleGate]:
        painted = {f"{scale:g}": _sampled(sampler, self.words, scale) for scale in PAINTED_AT}
        return [StyleGate(
            style, {name: self._share(style, pixels) for name, pixels in varied(sampler, self.images.of(style, self.words)[1])},
            {scale: self._share(style, pixels) for scale, pixels in painted.items()}) for style in GRADED]

    def _share(self, style: str, pixels: torch.Tensor) -> float:
        return float(self._style.is_in(style, pixels).float().mean())


def varied(sampler: Sampler, pixels: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Real images as a good copy of them might be painted: through the VAE, at other contrasts, with noise, blurred."""
    soft = F.avg_pool2d(F.pad(pixels, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    latents = sampler.latents(pixels)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(SEED)).to(latents)
    return [("as it is", pixels), ("blurred", soft), ("VAE", sampler.shown(latents)),
            *((f"VAE, × {contrast}", sampler.shown(contrast * latents)) for contrast in (0.7, 1.3)),
            ("VAE, noise 0.1", sampler.shown(latents + 0.1 * latents.std() * noise))]


def _repainted(sampler: Sampler, pixels: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` of the images, evenly chosen, through the VAE twice: at contrasts from 0.65 to 1.35, with noise."""
    latents = sampler.latents(pixels[::-(-len(pixels) // count)])
    generator, painted = torch.Generator().manual_seed(SEED), []
    for _ in range(2):
        contrast, strength = torch.rand(2, len(latents), 1, 1, 1, generator=generator)
        noise = 0.1 * strength * torch.randn(latents.shape, generator=generator)
        painted.append(sampler.shown((0.65 + 0.7 * contrast).to(latents) * latents + latents.std() * noise.to(latents)))
    return torch.cat(painted)


def _sampled(sampler: Sampler, words: Sequence[str], scale: float) -> torch.Tensor:
    return sampler.sample([f"{TRIGGER}, {word}" for word in words], cfg_scale=scale)
