"""The pictures that the UNet learns from, made anew for each batch: a word in one of many styles, treated, on some ground."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import torch
from captions import caption
from images import (
    ASKED,
    FRAME,
    GATE,
    GROUNDS,
    HUES,
    SIDE,
    SMALL_FRAME,
    TREATMENTS,
    colours,
    enlarged,
    on_paper,
    turned_hue,
)
from PIL import Image, ImageOps
from torch import Tensor

from tools import styles

Encode = Callable[[Tensor], Tensor]
"""Pixels [B, 3, 128, 128] in [-1, 1] to the UNet's latents [B, 4, 16, 16]."""
WEIGHT_OF_ASKED, WEIGHT_OF_NOTO = 2.0, 4.0
"""How often the demo's and the benchmark's words are drawn, another word being 1; Noto's pictures, another style's being 1."""
TREATED, TREATED_TWICE, GROUNDED, TURNED, MIRRORED, SMALL, MOVED, MOST_MOVED = 0.4, 0.1, 0.3, 0.12, 0.12, 0.08, 0.2, 4


class TrainingImages:
    """Words in every style that the model learns from, without what the gate holds back."""

    def __init__(self, packages: Path, encode: Encode, *, every_word: bool, gate_words: Collection[str]) -> None:
        """`packages`: where npm's packages are, or are put. `every_word`: all shared ones, or only those that the demo, the
        benchmark and the gate ask for."""
        shared, drawn = styles.shared(packages, always=ASKED)
        self._emoji = [one for one in shared if every_word or one.label in ASKED or one.label in gate_words]
        self._encode = encode
        self._by_word = [[(style, drawn[style][one.label]) for style in drawn if one.label in drawn[style]
                          and not (style == styles.NOTO.name and one.label in GATE)]
                         for one in self._emoji]
        self._weights = [WEIGHT_OF_ASKED if one.label in ASKED else 1.0 for one in self._emoji]

    def __len__(self) -> int:
        return sum(len(of) for of in self._by_word)

    def batch(self, size: int, draw: random.Random, *, side: int = SIDE) -> tuple[Tensor, list[str]]:
        """Latents [size, 4, side / 8, side / 8] and their captions."""
        made = [self._image(index, draw) for index in draw.choices(range(len(self._emoji)), self._weights, k=size)]
        pixels = enlarged(torch.from_numpy(np.stack([pixels for pixels, _ in made])), side)
        return self._encode(pixels), [said for _, said in made]

    def _image(self, index: int, draw: random.Random) -> tuple[np.ndarray, str]:
        """uint8 [72, 72, 3] and a caption."""
        emoji, by = self._emoji[index], self._by_word[index]
        style, pixels = draw.choices(by, [WEIGHT_OF_NOTO if name == styles.NOTO.name else 1.0 for name, _ in by])[0]
        image, turned_to = _turned(Image.fromarray(pixels), draw) if draw.random() < TURNED else (Image.fromarray(pixels), "")
        count = (draw.random() < TREATED) + (draw.random() < TREATED_TWICE)
        treatments = draw.sample(TREATMENTS, count)
        for treatment in treatments:
            image = treatment(image)
        if draw.random() < MIRRORED:
            image = ImageOps.mirror(image)
        ground = draw.choice(list(GROUNDS)) if draw.random() < GROUNDED else ""
        small = draw.random() < SMALL
        most = MOST_MOVED if draw.random() < MOVED else 0
        paper = on_paper(image, SMALL_FRAME if small else FRAME, ground=GROUNDS.get(ground, "white"),
                         offset=(draw.randint(-most, most), draw.randint(-most, most)))
        if small:
            paper = np.asarray(Image.fromarray(paper).resize((FRAME, FRAME), Image.Resampling.BICUBIC))
        return paper, caption(emoji, image, style=style, treatments=[one.__name__ for one in treatments], turned_to=turned_to,
                              size="small" if small else "", ground=ground, draw=draw)


def _turned(image: Image.Image, draw: random.Random) -> tuple[Image.Image, str]:
    """In another hue than the one that covers most of it, and which; as it is where no hue does."""
    covering = [colour for colour in colours(image) if colour in HUES]
    if not covering:
        return image, ""
    target = draw.choice([colour for colour in HUES if colour != covering[0]])
    return turned_hue(image, source=covering[0], target=target), target
