"""What counts as the same image, and what as a blurred one."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from lib_lora_train.dataset.images import is_image_name, read_image
from lib_lora_train.dataset.likeness import BLURRED, NEAR, is_blurred, near_duplicates, sharpness, thumbnail
from lib_lora_train.demo import SUBJECT
from lib_lora_train.errors import Interrupted
from tools.bench import real_images

PATHS = [path for path in sorted(SUBJECT.iterdir()) if is_image_name(path)]
EMOJI = real_images.load()
WORDS = sorted(EMOJI.words_of(real_images.STYLE))
DRAWINGS = [*(real_images.to_image(EMOJI.pixels[real_images.TWEMOJI][EMOJI.words.index(word)]) for word in WORDS),
            *(read_image(path) for path in PATHS)]
Change = Callable[[Image.Image], Image.Image]


def compressed(image: Image.Image, quality: int) -> Image.Image:
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=quality)
    return Image.open(encoded).convert("RGB")


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)


CHANGES: dict[str, Change] = {
    "half as large": lambda image: scaled(image, 0.5),
    "twice as large": lambda image: scaled(image, 2),
    "a little narrower": lambda image: image.resize((image.width - 3, image.height)),
    "JPEG of quality 60": lambda image: compressed(image, 60),
    "a tenth brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "a tenth darker": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
    "more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.15),
    "smaller, brighter and compressed": lambda image: compressed(
        ImageEnhance.Brightness(scaled(image, 0.7)).enhance(1.05), 75)}


def texture(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Coloured blotches over several scales, as a photograph has them."""
    random = np.random.default_rng(seed)
    layers = [np.asarray(Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(size, 3), dtype=float)
              for side in (3, 6, 24)]
    return Image.fromarray(np.clip(layers[0] * 0.5 + layers[1] * 0.35 + layers[2] * 0.15, 0, 255).astype(np.uint8))


def likeness(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of the pixels of two thumbnails; of images with a contrast below 4 levels it is less."""
    one, two = (thumbnail.astype(float).ravel() - thumbnail.mean() for thumbnail in (first, second))
    return one @ two / (max(np.linalg.norm(one), 4 * one.size ** 0.5) * max(np.linalg.norm(two), 4 * two.size ** 0.5))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_an_image_saved_another_way_is_near_itself(change: Change) -> None:
    images = [*DRAWINGS, *(texture(seed) for seed in range(10))]
    for image in images:
        assert likeness(thumbnail(image), thumbnail(change(image))) >= NEAR


def test_copies_are_found_among_images_of_the_same_kind_and_nothing_else_is() -> None:
    images = [*DRAWINGS, *(change(DRAWINGS[place]) for place, change in enumerate(CHANGES.values()))]
    groups = near_duplicates([thumbnail(image) for image in images])
    assert groups == [(place, len(DRAWINGS) + place) for place in range(len(CHANGES))]


def test_an_image_turned_by_exif_is_near_the_one_that_was_turned_by_hand(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: show it turned clockwise
    texture(1).save(tmp_path / "camera.jpg", exif=exif)
    texture(1).transpose(Image.Transpose.ROTATE_270).save(tmp_path / "hand.png")
    camera, hand = (thumbnail(read_image(tmp_path / name)) for name in ("camera.jpg", "hand.png"))
    assert near_duplicates([camera, hand, thumbnail(texture(1))]) == [(0, 1)]


def heart(colour: str, background: str) -> Image.Image:
    image = Image.new("RGB", (64, 64), background)
    ImageDraw.Draw(image).polygon([(32, 58), (6, 24), (20, 8), (32, 20), (44, 8), (58, 24)], fill=colour)
    return image


@pytest.mark.parametrize(("first", "second"), [
    (heart("red", "white"), heart("blue", "white")), (heart("black", "white"), heart("silver", "white")),
    (heart("black", "white"), heart("white", "black")), (Image.new("RGB", (9, 9), "white"), Image.new("RGB", (9, 9), "black")),
    (texture(3), texture(3).transpose(Image.Transpose.FLIP_TOP_BOTTOM)),
], ids=["other colour", "other darkness", "inverted", "blank", "upside down"])
def test_what_differs_in_colour_or_light_or_is_upside_down_is_another_image(first: Image.Image, second: Image.Image) -> None:
    assert near_duplicates([thumbnail(first), thumbnail(second)]) == []


def test_blank_images_of_one_colour_are_the_same() -> None:
    blank = [Image.new("RGB", size, "white") for size in ((8, 8), (200, 90), (1, 1))]
    assert near_duplicates([thumbnail(image) for image in [*blank, texture(0)]]) == [(0, 1, 2)]


def in_pairs(thumbnails: list[np.ndarray]) -> list[tuple[int, ...]]:
    """Every pair compared by itself; the groups are what can be reached from each other."""
    groups = [{place} for place in range(len(thumbnails))]
    for first in range(len(thumbnails)):
        for second in range(first):
            difference = thumbnails[first].astype(float) - thumbnails[second]
            if likeness(thumbnails[first], thumbnails[second]) >= NEAR and np.sqrt((difference ** 2).mean()) <= 40:
                merged = groups[first] | groups[second]
                for member in merged:
                    groups[member] = merged
    return sorted({tuple(sorted(group)) for group in groups if len(group) > 1})


@pytest.mark.parametrize("edges", [
    (15, 15, 15, 15), (20, 20, 20, 20), (20, 0, 0, 0), (0, 10, 20, 0), (0, 0, 0, 20), (12, 20, 17, 10)])
def test_an_image_cut_by_ten_to_twenty_pixels_is_found_and_no_other_is(edges: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = edges
    images = [*(image.resize((160, 160), Image.Resampling.LANCZOS) for image in DRAWINGS), *(
        texture(seed, (320, 240)) for seed in range(10))]
    cut = [image.crop((left, top, image.width - right, image.height - bottom)) for image in images[::3]]
    assert near_duplicates([thumbnail(image) for image in [*images, *cut]]) == [
        (3 * place, len(images) + place) for place in range(len(cut))]


def test_mirrored_images_are_found_and_no_other_is() -> None:
    images = [texture(seed) for seed in range(20)]
    mirrored = [compressed(ImageOps.mirror(image), 80) for image in images[:5]]
    groups = near_duplicates([thumbnail(image) for image in [*images, *mirrored]])
    assert groups == [(place, 20 + place) for place in range(5)]


@pytest.mark.parametrize("near", [8, 24])
def test_the_two_views_of_a_stereo_pair_are_found(near: int) -> None:
    """Eyes some way apart: what is near moves sideways by `near` pixels of 400, what is far stays."""
    pairs = []
    for seed in range(6):
        scene = texture(seed, (400, 300))
        things = [(drawing.resize((90, 90)), (60 + 110 * place, 130)) for place, drawing in enumerate(DRAWINGS[seed:seed + 3])]
        for shift in (0, near):
            view = scene.copy()
            for thing, (x, y) in things:
                view.paste(thing, (x - shift, y))
            pairs.append(view)
    assert near_duplicates([thumbnail(view) for view in pairs]) == [(2 * place, 2 * place + 1) for place in range(6)]


@pytest.mark.parametrize("noise", [2, 4, 15])
def test_the_search_finds_what_comparing_every_pair_finds_and_only_what_has_one_origin(noise: float) -> None:
    random = np.random.default_rng(int(noise))
    originals = [thumbnail(texture(seed % 40)).astype(float) for seed in range(120)]
    thumbnails = [np.clip(one + random.normal(0, noise, one.shape), 0, 255).astype(np.uint8) for one in originals]
    expected = in_pairs(thumbnails)
    found = near_duplicates(thumbnails)
    assert all(any(set(group) <= set(other) for other in found) for group in expected)
    assert all(len({place % 40 for place in group}) == 1 for group in found)
    assert noise == 15 or expected  # the example is worth something


def test_a_hundred_copies_among_three_thousand_images_are_found() -> None:
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (3_000, 4, 4, 3), dtype=np.uint8)
    images = coarse.repeat(4, axis=1).repeat(4, axis=2)
    copies = np.clip(images[:100].astype(int) + random.integers(-4, 5, images[:100].shape), 0, 255).astype(np.uint8)
    groups = near_duplicates([*images, *copies])
    assert groups == [(place, 3_000 + place) for place in range(100)]


def test_one_image_a_thousand_times_is_one_group() -> None:
    assert near_duplicates([thumbnail(texture(5))] * 1000) == [tuple(range(1000))]


def test_the_search_for_duplicates_can_be_stopped() -> None:
    with pytest.raises(Interrupted):
        near_duplicates([thumbnail(texture(seed)) for seed in range(3)], should_stop=lambda: True)


def edge(width: float, contrast: float = 200.0, size: int = 128) -> Image.Image:
    """A vertical edge smoothed by a Gaussian of that σ, in pixels; 0 is hard."""
    place = np.arange(size) - size / 2 + 0.5
    profile = np.array([0.5 * (1 + math.erf(x / (width * math.sqrt(2)))) if width else float(x > 0) for x in place])
    return Image.fromarray(np.tile(20 + contrast * profile, (size, 1)).round().astype(np.uint8)).convert("RGB")


def test_a_hard_edge_measures_two_and_a_smoothed_one_what_the_calculus_says() -> None:
    assert sharpness(edge(0), pixels=128 * 128) == pytest.approx(2.0, rel=1e-3)
    for width in (1.5, 2.0):  # ∫g'² / ∫g² of a Gaussian g is 1/(2σ²); differences of whole pixels lower it a little
        assert sharpness(edge(width), pixels=128 * 128) == pytest.approx(1 / (2 * width ** 2), rel=0.15)


def test_sharpness_does_not_depend_on_contrast_or_on_how_much_there_is_to_see() -> None:
    assert sharpness(edge(1, contrast=100), pixels=128 * 128) == pytest.approx(sharpness(edge(1), pixels=128 * 128), rel=0.1)
    few, many = Image.new("RGB", (256, 256), "white"), Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(few).ellipse((100, 100, 130, 130), outline="black", width=3)
    for place in range(0, 250, 40):
        ImageDraw.Draw(many).ellipse((place, place, place + 30, place + 30), outline="black", width=3)
    assert sharpness(few, pixels=256 * 256) == pytest.approx(sharpness(many, pixels=256 * 256), rel=0.1)


@pytest.mark.parametrize("image", DRAWINGS, ids=[*WORDS, *(path.name for path in PATHS)])
def test_drawings_are_not_blurred_until_they_are(image: Image.Image) -> None:
    values = [sharpness(image.filter(ImageFilter.GaussianBlur(radius)), pixels=256 * 256) for radius in (0, 1, 2, 4)]
    assert values == sorted(values, reverse=True)
    assert values[0] > BLURRED > values[-2]


def crowd() -> Image.Image:
    """16 drawings on 512×512."""
    image = Image.new("RGB", (512, 512))
    for place in range(16):
        image.paste(DRAWINGS[-1 - place % 12].resize((128, 128)), (place % 4 * 128, place // 4 * 128))
    return image


def test_a_sharp_subject_before_a_soft_background_is_sharp() -> None:
    background = crowd().filter(ImageFilter.GaussianBlur(6))
    assert sharpness(background, pixels=512 * 512) < BLURRED
    background.paste(DRAWINGS[-1].resize((180, 180)), (160, 160))
    assert sharpness(background, pixels=512 * 512) > BLURRED


def test_a_large_image_is_judged_at_the_size_it_is_trained_at() -> None:
    soft = crowd().filter(ImageFilter.GaussianBlur(3))
    assert sharpness(soft, pixels=512 * 512) < BLURRED < sharpness(soft, pixels=64 * 64)


def test_an_image_much_softer_than_the_others_is_worth_a_look() -> None:
    assert not is_blurred(0.6, median=0.7)
    assert is_blurred(0.6, median=2.5)
    assert not is_blurred(1.0, median=9.0)


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (5, 5), (40, 9)])
def test_the_smallest_images_are_measured_too(size: tuple[int, int]) -> None:
    assert sharpness(Image.new("RGB", size, "red"), pixels=512 * 512) == 0.0
    assert thumbnail(Image.new("RGB", size, "red")).shape == (16, 16, 3)
