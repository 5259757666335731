"""Masks beside images: of their size, kept through shaping, painted on what is seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib_lora_train.errors import DatasetError
from lib_lora_train.studio.cropping.crop import (
    Shape,
    apply_shape,
    flip,
    mask_from_file,
    put_mask,
    read_mask,
    remove_mask,
    unshape,
)
from lib_lora_train.studio.importing.owned import OwnedDataset


@pytest.fixture
def dataset(tmp_path: Path) -> OwnedDataset:
    made = OwnedDataset.create(tmp_path, "d")
    Image.linear_gradient("L").resize((400, 200)).convert("RGB").save(made.images_folder / "a.png")
    return made


def left_half(size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def test_a_mask_is_kept_where_kohyas_tools_look_for_it(dataset: OwnedDataset):
    assert read_mask(dataset, "a.png") is None
    put_mask(dataset, "a.png", left_half((400, 200)))
    with Image.open(dataset.folder / "masks" / "a.png") as kept:
        assert kept.mode == "L" and np.array_equal(kept, left_half((400, 200)))
    assert np.array_equal(read_mask(dataset, "a.png"), left_half((400, 200)))
    remove_mask(dataset, "a.png")
    remove_mask(dataset, "a.png")
    assert read_mask(dataset, "a.png") is None


def test_a_mask_of_another_size_is_a_sentence(dataset: OwnedDataset):
    with pytest.raises(DatasetError, match="does not fit"):
        put_mask(dataset, "a.png", left_half((200, 400)))
    with pytest.raises(DatasetError, match="no picture"):
        put_mask(dataset, "../a.png", left_half((400, 200)))


def test_a_mask_painted_on_a_shaped_and_mirrored_image_lies_there_on_the_unshaped_one(dataset: OwnedDataset):
    apply_shape(dataset, ["a.png"], Shape("square", 96))  # the middle: 100 to 300
    flip(dataset, "a.png")
    put_mask(dataset, "a.png", left_half((96, 96)))
    assert np.array_equal(read_mask(dataset, "a.png"), left_half((96, 96)))
    unshape(dataset, ["a.png"])
    row = np.asarray(read_mask(dataset, "a.png"))[100]
    # Mirrored, its left half is 200 to 300; what was cut off is learnt, as before there was a mask.
    assert [row[x] for x in (10, 90, 110, 190, 210, 290, 310, 390)] == [255, 255, 0, 0, 255, 255, 255, 255]
    remove_mask(dataset, "a.png")
    apply_shape(dataset, ["a.png"], Shape("square", 96))
    assert read_mask(dataset, "a.png") is None


def test_a_painted_file_counts_by_what_is_opaque_or_by_what_is_bright(tmp_path: Path):
    left_half((40, 20)).convert("RGB").save(tmp_path / "bright.png")
    generated = Image.new("RGBA", (40, 20), (0, 0, 0, 255))
    generated.putalpha(left_half((40, 20)))
    generated.save(tmp_path / "opaque.png")
    for name in ("bright.png", "opaque.png"):
        assert np.array_equal(mask_from_file(tmp_path / name), left_half((40, 20)))
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(DatasetError, match="broken.png"):
        mask_from_file(tmp_path / "broken.png")
