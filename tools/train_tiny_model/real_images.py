"""The benchmark's real images, the same words in both styles, as two sheets of 64-pixel tiles and a list of words; and the
demo's style dataset, twenty-four of them in Twemoji's style, with captions, as the model samples: 128 pixels on white paper.

    python tools/train_tiny_model/real_images.py --packages FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from images import HELD_OUT, STYLE, enlarged, gather, on_paper, open_rgba
from PIL import Image

OTHERS, TILE, COLUMNS = 168, 64, 16
PACKAGE = Path(__file__).resolve().parents[2] / "lib_lora_train"
TARGET, STYLE_TARGET = PACKAGE.parent / "tools" / "bench" / "pictures", PACKAGE / "demo" / "style"


def main() -> None:
    """Write noto.png, twemoji.png and words.json, and the style dataset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="where the npm packages are unpacked")
    packages = parser.parse_args().packages
    emoji = {one.label: one for one in gather(packages)}
    others = [label for label in emoji if label not in HELD_OUT and label not in STYLE]
    # Evenly spread over Unicode's order, which is by subject.
    others = [others[index * len(others) // OTHERS] for index in range(OTHERS)]
    words = [{"word": word, "split": split} for split, labels in (("style", STYLE), ("held_out", HELD_OUT), ("other", others))
             for word in labels]
    TARGET.mkdir(parents=True, exist_ok=True)
    for style in ("noto", "twemoji"):
        rows = -(-len(words) // COLUMNS)
        sheet = Image.new("RGBA", (COLUMNS * TILE, rows * TILE))
        for index, entry in enumerate(words):
            image = open_rgba(packages / style / emoji[entry["word"]].image)
            sheet.paste(image, (index % COLUMNS * TILE, index // COLUMNS * TILE))
        sheet.save(TARGET / f"{style}.png", optimize=True)
    text = ",\n ".join(json.dumps(entry, ensure_ascii=False) for entry in words)
    (TARGET / "words.json").write_text(f"[{text}]\n", encoding="utf-8")
    STYLE_TARGET.mkdir(exist_ok=True)
    for word in STYLE:
        paper = torch.from_numpy(on_paper(open_rgba(packages / "twemoji" / emoji[word].image)).copy())
        pixels = (enlarged(paper[None])[0].permute(1, 2, 0).numpy() + 1) * 127.5
        name = word.replace(" ", "-")
        Image.fromarray(pixels.round().astype(np.uint8)).save(STYLE_TARGET / f"{name}.png", optimize=True)
        (STYLE_TARGET / f"{name}.txt").write_text(f"{word}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
