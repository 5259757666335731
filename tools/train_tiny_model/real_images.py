"""The benchmark's real images, the words of its words.json in both styles, as sheets of 64-pixel tiles; and the demo's style
dataset, 24 of them as stickers, with captions.

    python tools/train_tiny_model/real_images.py --packages FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from images import STYLE  # noqa: E402

from tools import styles  # noqa: E402
from tools.bench.styled_images import sticker  # noqa: E402

TILE, COLUMNS = styles.SIDE, 16
TARGET, DEMO = ROOT / "tools" / "bench" / "pictures", ROOT / "lib_lora_train" / "demo" / "style"


def main() -> None:
    """Write noto.png, twemoji.png, and the style dataset."""
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
    noto = styles.drawings(packages, styles.NOTO, every)
    DEMO.mkdir(exist_ok=True)
    for word in STYLE:
        name = word.replace(" ", "-")
        Image.fromarray(sticker(Image.fromarray(noto[word]))).save(DEMO / f"{name}.png", optimize=True)
        (DEMO / f"{name}.txt").write_text(f"{word}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
