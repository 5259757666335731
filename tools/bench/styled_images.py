"""The benchmark's 256 words in every style there is: the demo model's own, those that it was never shown, and two drawn here;
from npm packages, fetched once.

Four of them, in order of difficulty, are what LoRAs are trained on: *blueprint* and *sticker*, drawn by a script over Noto's
pictures, so that the thing stays as the model knows it, and *openmoji* and *twemoji*, whose things look different as well.
"""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter

from lib_lora_train.errors import DatasetError
from tools import styles
from tools.bench.real_images import PAPER, STYLE, RealImages, enlarged, to_image

BLUEPRINT, STICKER = "blueprint", "sticker"
GRADED = (BLUEPRINT, STICKER, styles.OPENMOJI.name, styles.TWEMOJI.name)
MORE = 200
_BLUE, _PASTEL, _BORDER, _SHADOW = "#1d4f9f", "#cfe6dc", 9, (3, 4)


@dataclasses.dataclass(frozen=True, eq=False)
class StyledImages:
    """All words with their split, and in each style the images of those that exist in it.

    images    {style: (rows [n] into `words`, pixels [n, 3, 128, 128] in [0, 1])}
    more      {style: images [n, 3, 128, 128] of other words, at most MORE}, to learn the style from
    """

    words: tuple[str, ...]
    splits: tuple[str, ...]
    images: dict[str, tuple[torch.Tensor, torch.Tensor]]
    more: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def of(self, style: str, words: Sequence[str]) -> tuple[list[str], torch.Tensor]:
        """Those of `words` that exist in the style, and their pixels [n, 3, 128, 128], in the same order."""
        rows, pixels = self.images[style]
        position = {self.words[row]: index for index, row in enumerate(rows.tolist())}
        found = [word for word in words if word in position]
        return found, pixels[[position[word] for word in found]]


def load(real: RealImages, packages: Path) -> StyledImages:
    """The words of `real` in all styles; npm's packages are put into the folder `packages`.

    Raises DatasetError where they cannot be fetched or drawn.
    """
    try:
        every = styles.words(packages)
        drawn = {style.name: styles.drawings(packages, style, every) for style in (*styles.SEEN, *styles.UNSEEN)}
    except (OSError, subprocess.CalledProcessError, ImportError) as error:
        raise DatasetError("The pictures to measure with are not to be had", why=str(error),
                           remedy="install npm, connect to the internet, and pip install resvg-py") from error
    papers = {name: {word: _on_white(Image.fromarray(of[word])) for word in real.words if word in of}
              for name, of in drawn.items()}
    noto = drawn[styles.NOTO.name]
    for name, draw in ((BLUEPRINT, blueprint), (STICKER, sticker)):
        papers[name] = {word: draw(Image.fromarray(noto[word])) for word in real.words}
    row = {word: index for index, word in enumerate(real.words)}
    others = {name: [image for word, image in of.items() if word not in row] for name, of in drawn.items()}
    more = {name: np.stack([_on_white(Image.fromarray(image)) for image in of[::-(-len(of) // MORE)]])
            for name, of in others.items() if of}
    return StyledImages(real.words, real.splits, {
        name: (torch.tensor([row[word] for word in of]), enlarged(torch.from_numpy(np.stack(list(of.values())))))
        for name, of in papers.items()}, {
        name: enlarged(torch.from_numpy(of)) for name, of in more.items()})


def write_dataset(images: StyledImages, style: str, folder: Path) -> Path:
    """The training words in one style, with captions, as files in `folder`, which it returns."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [word for word, split in zip(images.words, images.splits, strict=True) if split == STYLE]
    for word, pixels in zip(*images.of(style, words), strict=True):
        name = word.replace(" ", "-")
        to_image(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{word}\n", encoding="utf-8")
    return folder


def blueprint(image: Image.Image) -> np.ndarray:
    """White lines on blue, where colours or outline change: uint8 [128, 128, 3] from an RGBA image."""
    large = _padded(image)
    flat = Image.alpha_composite(Image.new("RGBA", large.size, "#808080"), large).convert("RGB")
    flat = flat.filter(ImageFilter.MedianFilter(5)).filter(ImageFilter.GaussianBlur(0.8))
    line = Image.new("L", large.size)
    for band in (*flat.split(), large.getchannel("A")):
        edge = ImageChops.subtract(band.filter(ImageFilter.MaxFilter(3)), band.filter(ImageFilter.MinFilter(3)))
        line = ImageChops.lighter(line, edge)
    line = line.point(lambda value: max(0, min(255, (value - 24) * 4)))
    paper = Image.new("RGB", large.size, _BLUE)
    paper.paste(Image.new("RGB", large.size, "white"), mask=line)
    return np.asarray(paper)


def sticker(image: Image.Image) -> np.ndarray:
    """With a thick white border and a shadow on a pastel ground: uint8 [128, 128, 3] from an RGBA image."""
    large = _padded(image, inner=96)
    border = large.getchannel("A").filter(ImageFilter.MaxFilter(_BORDER)).filter(ImageFilter.GaussianBlur(0.7))
    shadow = ImageChops.offset(border.filter(ImageFilter.GaussianBlur(2)), *_SHADOW).point(lambda value: value * 2 // 5)
    paper = Image.new("RGBA", large.size, _PASTEL)
    paper.paste("black", mask=shadow)
    paper.paste("white", mask=border)
    return np.asarray(Image.alpha_composite(paper, large).convert("RGB"))


def _padded(image: Image.Image, *, inner: int = 114) -> Image.Image:
    """[128, 128] RGBA, transparent around the image, which becomes `inner` pixels wide."""
    large = Image.new("RGBA", (128, 128))
    large.paste(image.resize((inner, inner), Image.Resampling.BICUBIC), ((128 - inner) // 2,) * 2)
    return large


def _on_white(image: Image.Image) -> np.ndarray:
    paper = Image.new("RGBA", (PAPER, PAPER), "white")
    paper.alpha_composite(image, ((PAPER - image.width) // 2,) * 2)
    return np.asarray(paper.convert("RGB"))
