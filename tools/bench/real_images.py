"""The same 256 words in two styles, Noto's and Twemoji's, as the model's images would show them.

Split by word, fixed: "style" is what the style LoRA is trained on; "held_out" is asked for and trained on by nobody (the model
knows Noto's images of these words and not Twemoji's); "test" likewise, but no choice is made by what is found there; "other" is
for the scorers to learn from.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from lib_lora_train.dataset.images import read_image

FOLDER = Path(__file__).parent / "pictures"
NOTO, TWEMOJI = STYLES = ("noto", "twemoji")
STYLE, HELD_OUT, TEST, OTHER = ("style", "held_out", "test", "other")
TILE, COLUMNS = 64, 16
PAPER, SIDE = 72, 128
"""The white paper a tile of 64 pixels is laid on, and what that is enlarged to: the size of the model's images."""


@dataclasses.dataclass(frozen=True, eq=False)
class RealImages:
    """All words with their split, and their images in each style, in the same order.

    pixels    {style: [N, 3, 128, 128]}, fp32 in [0, 1], on white
    """

    words: tuple[str, ...]
    splits: tuple[str, ...]
    pixels: dict[str, torch.Tensor]

    def indices(self, *splits: str) -> torch.Tensor:
        """int64 [n]: where the words of these splits stand, in the order of the list."""
        return torch.tensor([index for index, split in enumerate(self.splits) if split in splits])

    def words_of(self, split: str) -> list[str]:
        """The words of one split, in the order of `pixels_of`."""
        return [word for word, own in zip(self.words, self.splits, strict=True) if own == split]

    def pixels_of(self, style: str, split: str) -> torch.Tensor:
        """[n, 3, 128, 128] in [0, 1]: the images of one split in one style."""
        return self.pixels[style][self.indices(split)]


def load(folder: Path = FOLDER) -> RealImages:
    """The sheets noto.png and twemoji.png (tiles of 64 pixels, 16 in a row) and words.json, which lie in `folder`."""
    entries = json.loads((folder / "words.json").read_text(encoding="utf-8"))
    return RealImages(
        words=tuple(entry["word"] for entry in entries), splits=tuple(entry["split"] for entry in entries),
        pixels={style: enlarged(_on_paper(drawings(style, folder))) for style in STYLES})


def drawings(style: str, folder: Path = FOLDER) -> list[Image.Image]:
    """The words' images in one style as they were drawn: RGBA, 64 pixels."""
    count = len(json.loads((folder / "words.json").read_text(encoding="utf-8")))
    with Image.open(folder / f"{style}.png") as file:
        sheet = file.convert("RGBA")
    corners = [(index % COLUMNS * TILE, index // COLUMNS * TILE) for index in range(count)]
    return [sheet.crop((left, top, left + TILE, top + TILE)) for left, top in corners]


def enlarged(papers: torch.Tensor) -> torch.Tensor:
    """uint8 [N, h, w, 3] -> fp32 [N, 3, 128, 128] in [0, 1], bicubic."""
    pixels = papers.permute(0, 3, 1, 2).float() / 255
    return F.interpolate(pixels, size=(SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


def read_dataset(folder: Path) -> tuple[list[Path], list[str], torch.Tensor]:
    """The images of a dataset's folder by name: files, captions, pixels [N, 3, 128, 128] in [0, 1]."""
    files = sorted(folder.glob("*.png"))
    captions = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]
    images = [np.asarray(_sized(read_image(file))) for file in files]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255 if files else torch.empty(0, 3, SIDE, SIDE)
    return files, captions, pixels


def to_image(pixels: torch.Tensor) -> Image.Image:
    """[3, h, w] in [0, 1] as an RGB image."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def _on_paper(images: list[Image.Image]) -> torch.Tensor:
    """uint8 [N, 72, 72, 3]: each image in the middle of its white paper."""
    papers, margin = [], (PAPER - TILE) // 2
    for image in images:
        paper = Image.new("RGBA", (PAPER, PAPER), "white")
        paper.alpha_composite(image, (margin, margin))
        papers.append(np.asarray(paper.convert("RGB")))
    return torch.from_numpy(np.stack(papers))


def _sized(image: Image.Image) -> Image.Image:
    return image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
