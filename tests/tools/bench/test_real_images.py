"""The benchmark's images: complete, prepared as the model's are, and no held-out word among what is trained on."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lib_lora_train import demo
from tools.bench.real_images import (
    FOLDER,
    HELD_OUT,
    NOTO,
    OTHER,
    STYLE,
    STYLES,
    TEST,
    TWEMOJI,
    RealImages,
    drawings,
    load,
    read_dataset,
    to_image,
)
from tools.bench.styled_images import sticker


@pytest.fixture(scope="module")
def real() -> RealImages:
    return load()


def test_every_word_is_there_once_in_both_styles(real):
    assert [len(real.words_of(split)) for split in (STYLE, HELD_OUT, TEST, OTHER)] == [24, 64, 32, 136]
    assert len(set(real.words)) == 256
    assert all(real.pixels[style].shape == (256, 3, 128, 128) for style in STYLES)


def test_no_tile_is_empty_and_no_held_out_image_is_the_same_in_both_styles(real):
    assert all((real.pixels[style].amin(dim=(1, 2, 3)) < 0.9).all() for style in STYLES)
    difference = real.pixels_of(NOTO, HELD_OUT) - real.pixels_of(TWEMOJI, HELD_OUT)
    assert (difference.abs().mean(dim=(1, 2, 3)) > 0.01).all()


@pytest.mark.parametrize("index", [0, 17, 255])
def test_a_tile_lies_in_the_middle_of_white_paper_and_is_enlarged_smoothly(real, index):
    paper = Image.new("RGBA", (72, 72), "white")
    left, top = index % 16 * 64, index // 16 * 64
    with Image.open(FOLDER / "twemoji.png") as sheet:
        paper.alpha_composite(sheet.convert("RGBA").crop((left, top, left + 64, top + 64)), (4, 4))
    expected = np.asarray(paper.convert("RGB").resize((128, 128), Image.Resampling.BICUBIC)).astype(float) / 255
    found = real.pixels[TWEMOJI][index].permute(1, 2, 0).numpy()
    # Pillow rounds and clips to bytes after each direction, so at sharp edges it swings over a little less.
    assert np.abs(found - expected).mean() < 0.5 / 255 and np.abs(found - expected).max() < 6 / 255
    assert (real.pixels[TWEMOJI][index][:, :4] == 1).all()  # paper


def test_the_style_dataset_is_the_sheets_training_split_and_nothing_else(real):
    files, captions, pixels = read_dataset(demo.STYLE)
    assert sorted(captions) == sorted(real.words_of(STYLE))
    order = [real.words_of(STYLE).index(caption) for caption in captions]
    drawn = [image for image, split in zip(drawings(NOTO), real.splits, strict=True) if split == STYLE]
    assert all((np.asarray(to_image(found)) == sticker(drawn[index])).all() for found, index in zip(pixels, order, strict=True))
    assert not set(captions) & set(real.words_of(HELD_OUT))
    assert len(files) == 24


def test_an_image_written_and_read_again_is_the_same(real, tmp_path):
    to_image(real.pixels[NOTO][5]).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("cheese\n", encoding="utf-8")
    _, captions, pixels = read_dataset(tmp_path)
    assert captions == ["cheese"] and (pixels[0] - real.pixels[NOTO][5]).abs().max() < 0.5 / 255 + 1e-6
