"""What the yardstick of the background is made of."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageDraw

from lib_lora_train.dataset.augment import to_tensor
from lib_lora_train.demo import SUBJECT
from tools.bench.background import leak, striped, stripes, subject_mask, write_dataset
from tools.bench.command import main
from tools.bench.subject import KEPT_BACK


def test_the_mask_is_all_that_is_not_the_white_around_the_subject():
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill="white", outline="red", width=4)
    mask = subject_mask(image)
    assert [mask.getpixel(at) for at in ((2, 2), (61, 61), (32, 17), (32, 32))] == [0, 0, 255, 255]


def test_the_frame_alone_leaks():
    one, other = torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32)
    other[:, :, 4:-4, 4:-4] = 1
    assert leak(other, one) == 0
    other[0, :, :4] = other[0, :, -4:] = other[0, :, :, :4] = other[0, :, :, -4:] = 0.5
    assert leak(other, one) == pytest.approx(0.25)


def test_stripes_are_told_from_a_tint_and_from_noise():
    without = torch.full((4, 3, 64, 64), 0.5)
    pattern = to_tensor(stripes((64, 64)))
    assert striped(without + 0.1 * pattern, without, (64, 64)) == pytest.approx(1)
    tint = torch.tensor([0.2, -0.1, 0.3]).reshape(3, 1, 1)
    assert striped(without + tint, without, (64, 64)) == pytest.approx(0, abs=1e-3)
    noise = torch.randn(without.shape, generator=torch.Generator().manual_seed(0))
    assert abs(striped(without + noise, without, (64, 64))) < 0.05
    assert striped(without + tint + 0.1 * pattern, without, (64, 64)) == pytest.approx(1, abs=1e-3)


def test_the_dataset_is_the_subject_on_stripes_with_its_masks(tmp_path):
    folder, kept_back = write_dataset(SUBJECT, tmp_path / "data")
    images, masks = sorted(path.name for path in folder.glob("*.png")), sorted(path.name for path in folder.glob("masks/*.png"))
    everything = sorted(SUBJECT.glob("*.png"))
    assert kept_back == everything[KEPT_BACK]
    assert images == masks == [path.name for path in everything if path not in kept_back]
    image, original, mask = (Image.open(path) for path in (
        folder / images[0], SUBJECT / images[0], folder / "masks" / images[0]))
    pixels, originals = image.convert("RGB").getdata(), original.convert("RGB").getdata()
    differs = [one != other for one, other in zip(pixels, originals, strict=True)]
    assert differs == [white == 0 for white in mask.getdata()]


def test_an_unknown_case_is_refused(tmp_path, capsys):
    assert main(["background", "--out", str(tmp_path), "--case", "maked"]) == 2
    assert "maked" in capsys.readouterr().err
