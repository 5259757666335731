"""The benchmark's real images, the words of its words.json in both styles, as sheets of 64-pixel tiles; and the demo's style
datasets, 24 of them each, with captions, as the model samples, at 128 pixels: Twemoji on white paper, and Noto as blueprints.

    python tools/train_tiny_model/real_images.py --packages FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from images import STYLE, enlarged, on_paper  # noqa: E402

from tools import styles  # noqa: E402
from tools.bench.styled_images import blueprint  # noqa: E402

TILE, COLUMNS = styles.SIDE, 16
TARGET, DEMO = ROOT / "tools" / "bench" / "pictures", ROOT / "lib_lora_train" / "demo"


def main() -> None:
    """Write noto.png, twemoji.png, and the style datasets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="where the npm packages are unpacked")
    packages = parser.parse_args().packages
    words = [entry["word"] for entry in json.loads((TARGET / "words.json").read_text(encoding="utf-8"))]
    every = styles.words(packages)
    for style in (styles.NOTO, styles.TWEMOJI):
        drawn = styles.drawings(packages, style, every)
        rows = -(-len(words) // COLUMNS)
        sheet = Image.new("RGBA", (COLUMNS * TILE, rows * TILE))
        for index, word in enumerate(words):
            sheet.paste(Image.fromarray(drawn[word]), (index % COLUMNS * TILE, index // COLUMNS * TILE))
        sheet.save(TARGET / f"{style.name}.png", optimize=True)
    twemoji, noto = (styles.drawings(packages, style, every) for style in (styles.TWEMOJI, styles.NOTO))
    for word in STYLE:
        paper = torch.from_numpy(on_paper(Image.fromarray(twemoji[word])).copy())
        pixels = (enlarged(paper[None])[0].permute(1, 2, 0).numpy() + 1) * 127.5
        _write(DEMO / "style", word, pixels.round().astype(np.uint8))
        _write(DEMO / "blueprint", word, blueprint(Image.fromarray(noto[word])))


def _write(folder: Path, word: str, pixels: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    name = word.replace(" ", "-")
    Image.fromarray(pixels).save(folder / f"{name}.png", optimize=True)
    (folder / f"{name}.txt").write_text(f"{word}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
