"""The judges and the real pictures, made ready once; and the figures they give for any pictures of the held-out words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lib_lora_train.errors import translated
from lib_lora_train.inputs.latent_files import tensor_fingerprint
from tools.bench import measures
from tools.bench.real_images import HANDS, HELD_OUT, NOTO, TWEMOJI, RealPictures
from tools.bench.sampler import Adapters, Painter
from tools.bench.scorers import HandJudge, WordJudge, across_hands

SEED = 7
"""Of the judges; the training's own is a setting."""
BANDS = 5


@dataclasses.dataclass(frozen=True)
class Effort:
    """What time is spent on.

    texture, words   steps the judges are fitted for
    across           whether the judge of words is also tried on a hand it has not seen
    every, others    every n-th of the held-out words is asked for, every n-th of the "other" words is looked at
    sampler_steps    for each painted picture
    paintings        of each scene of the subject
    """

    texture: int = 300
    words: int = 400
    across: bool = True
    every: int = 1
    others: int = 1
    sampler_steps: int = 15
    paintings: int = 2


THOROUGH = Effort()
QUICK = Effort(texture=100, words=150, across=False, every=8, others=3, sampler_steps=10, paintings=1)


@dataclasses.dataclass(frozen=True)
class JudgeFigures:
    """How far the judges can be trusted, as shares of right answers on real pictures as the VAE shows them.

    hand, hand_palette, hand_texture  Noto or Twemoji, on the held-out words, which it never saw: by both opinions, by each
    hand_counts                       whether `hand` reaches 95 %; otherwise no style share means anything
    word_noto, word_twemoji           which of the held-out words, on pictures it was fitted on, varied anew
    word_across                       the same in Twemoji's hand where it knew Noto's only; None if not measured
    """

    hand: float
    hand_palette: float
    hand_texture: float
    hand_counts: bool
    word_noto: float
    word_twemoji: float
    word_across: float | None


@dataclasses.dataclass(frozen=True)
class Row:
    """One picture for each held-out word, all from one source.

    style, palette, texture   share that the judge of hands calls Twemoji: by both opinions, and by each
    word                      share that shows its word, says the judge of words
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
    """How near pictures come to the training pictures: RMS difference of pixels (0 to 1) to the nearest one, mean and
    least, and the share of pictures that are nearer to one than any real held-out Twemoji is."""

    name: str
    mean: float
    least: float
    suspicious: float


@dataclasses.dataclass(frozen=True)
class Band:
    """The held-out loss in a band of timesteps, without and with the LoRA at weight 1."""

    timesteps: str
    base: float
    lora: float


class Yardstick:
    """Fits the judges on real pictures as the painter's VAE shows them.

    real, shown   the real pictures, as they are and as the VAE shows them {hand: [N, 3, 128, 128]}
    effort        what time is spent on
    word          the judge of words
    figures       how far the judges can be trusted
    places        where the words that are asked for stand in `real`
    words         these words
    """

    def __init__(self, painter: Painter, real: RealPictures, *, effort: Effort = THOROUGH, kept: Path | None = None) -> None:
        """`kept` is a folder where the VAE's pictures are kept for the next time; they take longer than the judges."""
        self.real, self.effort = real.thinned(effort.others), effort
        real = self.real
        self.shown = shown_by_vae(painter, real, kept=kept)
        self._hand = HandJudge.fit(self.shown, real, steps=effort.texture, seed=SEED)
        labels = torch.arange(len(real.words)).repeat(len(HANDS))
        self.word = WordJudge.fit(torch.cat([self.shown[hand] for hand in HANDS]), labels, steps=effort.words, seed=SEED)
        self._among = real.places(HELD_OUT)
        asked = {hand: self.shown[hand][self._among] for hand in HANDS}
        self.figures = JudgeFigures(
            hand=self._hand.accuracy["both"], hand_palette=self._hand.accuracy["palette"],
            hand_texture=self._hand.accuracy["texture"], hand_counts=self._hand.counts,
            word_noto=self.word.accuracy(asked[NOTO], self._among),
            word_twemoji=self.word.accuracy(asked[TWEMOJI], self._among),
            word_across=across_hands(self.shown, real, steps=effort.words, seed=SEED) if effort.across else None)
        self.places = self._among[::effort.every]
        self.words = [real.words[place] for place in self.places]
        self._targets = real.pixels[TWEMOJI][self.places]
        self._target_features = self.word.features(self.shown[TWEMOJI][self.places])

    def row(self, name: str, pixels: torch.Tensor) -> Row:
        """The figures of `pixels` [n, 3, 128, 128], one for each of `words`."""
        features = self.word.features(pixels)
        return Row(
            name, style=mean(self._hand.twemoji(pixels)), palette=mean(self._hand.twemoji(pixels, by="palette")),
            texture=mean(self._hand.twemoji(pixels, by="texture")),
            word=mean(self._among[self.word.word(pixels, self._among)] == self.places),
            psnr=mean(measures.psnr(pixels, self._targets)), ssim=mean(measures.ssim(pixels, self._targets)),
            feature=mean(measures.feature_distance(features, self._target_features)))

    def style_share(self, pixels: torch.Tensor) -> float:
        """The share of `pixels` [n, 3, 128, 128], of whatever words, that is taken for Twemoji."""
        return mean(self._hand.twemoji(pixels))

    def memorised(self, groups: Mapping[str, torch.Tensor], *, training: torch.Tensor) -> list[Memorised]:
        """How near groups of pictures come to the pictures `training` (as the VAE shows them); the first row is that of
        the real held-out Twemoji, which are nobody's copies."""
        real = measures.nearest_distance(self.shown[TWEMOJI][self.places], training)
        found = {"real held-out Twemoji": real,
                 **{name: measures.nearest_distance(pixels, training) for name, pixels in groups.items()}}
        return [Memorised(name, mean(distances), float(distances.min()), mean(distances < real.min()))
                for name, distances in found.items()]


def shown_by_vae(painter: Painter, real: RealPictures, *, kept: Path | None) -> dict[str, torch.Tensor]:
    """`real.pixels` as the painter's VAE shows them, rounded to bytes; read from `kept`, where they were made before for
    the same VAE and the same pictures, else made and written there."""
    name = tensor_fingerprint({**painter.vae_tensors, **real.pixels})[:16]
    file = kept / f"real-{name}.safetensors" if kept else None
    if file is None or not file.is_file():
        found = {hand: (painter.through_vae(real.pixels[hand]) * 255).round().to(torch.uint8).contiguous() for hand in HANDS}
        if file is not None:
            with translated("keeping the real pictures"):
                part = file.with_suffix(".part")
                save_file(found, part)
                part.replace(file)
    else:
        found = load_file(file)
    return {hand: pixels.float() / 255 for hand, pixels in found.items()}


def loss_bands(painter: Painter, pixels: torch.Tensor, captions: Sequence[str], lora: Adapters) -> list[Band]:
    """The loss on held-out pictures in five bands of timesteps, without and with `lora`, on the same noise."""
    base, adapted = (painter.held_out_loss(pixels, captions, adapters) for adapters in ({}, lora))
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
