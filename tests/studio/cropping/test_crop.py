"""Shaping: what is cut, what comes of it, and that it can always be done again or undone."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, PngImagePlugin

from lib_lora_train.dataset.augment import scale_and_crop
from lib_lora_train.dataset.buckets import TrainingSizes, buckets_for
from lib_lora_train.dataset.images import read_image, read_size
from lib_lora_train.errors import DatasetError, Interrupted, SettingError
from lib_lora_train.settings import parse
from lib_lora_train.studio.cropping import crop as shape_module
from lib_lora_train.studio.cropping.crop import (
    Shape,
    apply_shape,
    crop_to_box,
    flip,
    preview_shape,
    split,
    unshape,
)
from lib_lora_train.studio.cropping.crop_plan import Box, find_subject, plan_shape, render
from lib_lora_train.studio.importing.owned import OwnedDataset
from lib_lora_train.studio.requests import validated

SIZES = [(1000, 1500), (1500, 1000), (512, 512), (513, 511), (3000, 400), (400, 3000), (640, 480), (1023, 769)]


def smooth(size: tuple[int, int]) -> Image.Image:
    """Red grows to the right, green downwards: a place is told by its colour."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([across, down, np.full_like(across, 90)], axis=-1).astype(np.uint8))


def place(image: Image.Image, at: tuple[float, float]) -> tuple[float, float]:
    """Which place (as shares) of a `smooth` image is seen at a share of this one."""
    red, green, _ = image.getpixel((round(at[0] * (image.width - 1)), round(at[1] * (image.height - 1))))
    return red / 255, green / 255


def planned(image: Image.Image, shape: Shape) -> Box:
    return plan_shape(image.size, shape, subject=find_subject(image, shape))


def preview(image: Image.Image, shape: Shape) -> Image.Image:
    return render(image, planned(image, shape), flip=shape.flip)


@pytest.fixture
def dataset(tmp_path: Path) -> OwnedDataset:
    made = OwnedDataset.create(tmp_path, "d")
    smooth((1200, 800)).save(made.images_folder / "wide.png")
    smooth((600, 900)).save(made.images_folder / "high.jpg", quality=95)
    smooth((200, 150)).save(made.images_folder / "small.webp", lossless=True)
    made.masks_folder.mkdir()
    mask = Image.new("L", (1200, 800))
    mask.paste(255, (600, 0, 1200, 800))
    mask.save(made.mask_path("wide.png"))
    return made


def contents(dataset: OwnedDataset) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for folder in (dataset.images_folder, dataset.masks_folder)
            for path in folder.iterdir()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("mode", "side"), [("buckets", 512), ("buckets", 768), ("square", 256)])
def test_a_centred_shape_is_what_training_would_cut_itself(size: tuple[int, int], mode: str, side: int):
    image = smooth(size)
    settings = parse({"resolution": str(side), "enable_bucket": mode == "buckets"})
    placement = buckets_for(settings.dataset, sizes=TrainingSizes()).assign(*size)
    made = preview(image, Shape(mode, side, enlarge=True))
    assert made.size == placement.bucket
    assert np.array_equal(made, scale_and_crop(image, placement))
    # Training then finds an image of its own size: nothing more is cut.
    assert buckets_for(settings.dataset, sizes=TrainingSizes()).assign(*made.size).bucket == made.size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("focus", ["centre", "subject", (0.0, 0.0), (1.0, 1.0), (0.3, 0.8)])
@pytest.mark.parametrize("mode", ["buckets", "square", "keep"])
def test_a_cut_is_as_large_as_the_image_allows_and_keeps_proportions(size: tuple[int, int], focus: object, mode: str):
    image = smooth(size)
    for side, enlarge in itertools.product((256, 1024), (False, True)):
        box = planned(image, Shape(mode, side, focus=focus, enlarge=enlarge))
        left, top, right, bottom = box.edges
        width, height = right - left, bottom - top
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        assert width > size[0] - 2 or height > size[1] - 2  # one side is whole
        assert (width / height) / (box.size[0] / box.size[1]) == pytest.approx(1, abs=0.02)
        assert enlarge or box.enlarged <= 1.01
        assert mode != "keep" or box.lost(size) == 0


@pytest.mark.parametrize("size", SIZES)
def test_small_images_are_cut_to_whole_pixels_and_not_touched_otherwise(size: tuple[int, int]):
    image = smooth(size)
    box = planned(image, Shape("square", 4096, focus=(0.9, 0.9)))
    side = min(size)
    left, top, right, bottom = box.edges
    assert box.size == (side, side) and (right - left, bottom - top) == (side, side)
    made = preview(image, Shape("square", 4096, focus=(0.9, 0.9)))
    assert np.array_equal(made, image.crop(tuple(map(int, box.edges))))


def test_the_focus_comes_to_the_middle_as_far_as_the_image_goes():
    for point, expected in ((0.5, 0.5), (0.3, 0.3), (0.0, 1 / 6), (1.0, 5 / 6)):
        seen = place(preview(smooth((1536, 512)), Shape("square", 512, focus=(point, 0.5))), (0.5, 0.5))
        assert seen == pytest.approx((expected, 0.5), abs=0.01)


def test_a_subject_at_the_side_is_not_cut_off():
    image = Image.new("RGB", (1500, 500), "white")
    ImageDraw.Draw(image).ellipse((1100, 100, 1400, 400), fill="red")
    red = np.asarray(preview(image, Shape("square", 496, focus="subject")))[:, :, 1] < 128
    assert red.sum() == pytest.approx(np.pi * (150 * 496 / 500) ** 2, rel=0.02)
    assert not (np.asarray(preview(image, Shape("square", 496)))[:, :, 1] < 128).any()


def test_a_side_of_1024_has_the_buckets_of_sdxl():
    assert plan_shape((4000, 1000), Shape(side=1024)).size == (2048, 512)  # which go to 2048


@pytest.mark.parametrize("values", [
    {"mode": "circle"}, {"side": 0}, {"side": 500.5}, {"side": "512"}, {"side": 100}, {"side": 1 << 20}, {"side": True},
    {"focus": "face"}, {"focus": [0.5]}, {"focus": [2, 0]}, {"focus": ["a", "b"]}, {"focus": None},
    {"focus": [float("nan"), 0]}, {"flip": "yes"}, {"enlarge": 1}, {"unknown": 1}, {"mode": None}])
def test_what_is_no_shape_is_a_sentence(values: dict[str, object]):
    with pytest.raises(SettingError):
        validated(Shape, values)


def test_a_shape_is_the_same_after_json():
    for shape in (Shape(), Shape("square", 768, focus=(0.25, 1), flip=True, enlarge=True), Shape("keep", focus="subject")):
        assert validated(Shape, dataclasses.asdict(shape)) == shape
    assert validated(Shape, {"focus": [0, 1]}) == Shape(focus=(0.0, 1.0))


def test_images_and_masks_get_the_shape_and_come_back_byte_for_byte(dataset: OwnedDataset):
    before, names = contents(dataset), [path.name for path in dataset.images]
    shaped = apply_shape(dataset, names, Shape("square", 256))
    assert shaped.done == tuple(names) and shaped.skipped == ()
    assert shaped.notes == ("1 picture is smaller than asked for (up to 1.7 times), and not enlarged.",)
    assert [read_size(path) for path in dataset.images] == [(256, 256), (150, 150), (256, 256)]
    with Image.open(dataset.mask_path("wide.png")) as mask:
        assert mask.mode == "L" and mask.size == (256, 256)
        assert mask.getpixel((100, 9)) == 0 and mask.getpixel((156, 9)) == 255
    assert unshape(dataset, names).done == tuple(names)
    assert contents(dataset) == before and not any("shaped" in note for note in dataset.notes().values())
    assert not [path for path in dataset.unshaped_folder.rglob("*") if path.is_file()]


def test_shaping_again_begins_with_the_image_as_it_was_imported(dataset: OwnedDataset):
    original = read_image(dataset.image("wide.png"))
    apply_shape(dataset, ["wide.png"], Shape("square", 64))
    apply_shape(dataset, ["wide.png"], Shape("square", 512))
    assert np.array_equal(read_image(dataset.image("wide.png")), preview(original, Shape("square", 512)))


def test_what_is_previewed_is_what_is_written(dataset: OwnedDataset):
    crop_to_box(dataset, "wide.png", (300, 100, 1100, 700))
    flip(dataset, "wide.png")
    for shape in (Shape(), Shape("square", 128, focus=(1, 0), flip=True), Shape("keep", 64), Shape("square", focus="subject")):
        seen = preview_shape(dataset, "wide.png", shape)
        apply_shape(dataset, ["wide.png"], shape)
        assert np.array_equal(seen, read_image(dataset.image("wide.png")))


def test_a_crop_by_hand_is_of_the_image_as_it_is_seen(dataset: OwnedDataset):
    crop_to_box(dataset, "wide.png", (300, 200, 900, 600))
    assert read_size(dataset.image("wide.png")) == (600, 400)
    first = read_image(dataset.image("wide.png"))
    assert place(first, (0, 0)) == pytest.approx((0.25, 0.25), abs=0.01)
    assert place(first, (1, 1)) == pytest.approx((0.75, 0.75), abs=0.01)
    flip(dataset, "wide.png")
    crop_to_box(dataset, "wide.png", (0, 0, 300, 400))  # the left half of the mirrored one: the right half
    second = read_image(dataset.image("wide.png"))
    assert second.size == (300, 400)
    assert place(second, (0, 0)) == pytest.approx((0.75, 0.25), abs=0.01)
    assert place(second, (1, 1)) == pytest.approx((0.5, 0.75), abs=0.01)
    apply_shape(dataset, ["wide.png"], Shape("keep", 64))
    third = read_image(dataset.image("wide.png"))
    assert place(third, (0, 0)) == pytest.approx((0.75, 0.25), abs=0.02)  # cut by hand stays cut
    with Image.open(dataset.mask_path("wide.png")) as mask:
        assert mask.size == third.size and np.asarray(mask)[:, :-1].min() == 255  # cut in the white half


def test_a_crop_of_a_shaped_image_has_the_detail_of_the_unshaped_one(dataset: OwnedDataset):
    apply_shape(dataset, ["wide.png"], Shape("keep", 240))
    width, height = read_size(dataset.image("wide.png"))
    crop_to_box(dataset, "wide.png", (0, 0, width / 2, height / 2))
    assert read_size(dataset.image("wide.png")) == (294, 196)  # the same area: half the sides, seen twice as closely


@pytest.mark.parametrize("box", [(0, 0, 5, 5), (900, 0, 100, 500), (1300, 900, 2000, 2000), (0, 0, 1), ("a", 0, 9, 9),
                                 (float("nan"), 0, 500, 500), (0, 0, 1e300, 5), None])
def test_a_box_that_holds_nothing_is_a_sentence(dataset: OwnedDataset, box: object):
    before = contents(dataset)
    with pytest.raises(DatasetError):
        crop_to_box(dataset, "wide.png", box if box is not None else ())
    assert contents(dataset) == before


def test_a_box_beyond_the_edge_ends_at_the_edge(dataset: OwnedDataset):
    crop_to_box(dataset, "wide.png", (-50, -50, 5000, 400))
    assert read_size(dataset.image("wide.png")) == (1200, 400)


def test_mirrored_twice_is_the_very_file_it_was(dataset: OwnedDataset):
    before = contents(dataset)
    for name in ("wide.png", "high.jpg"):
        assert flip(dataset, name) == name
    mirrored = read_image(dataset.image("wide.png"))
    assert place(mirrored, (0, 0)) == pytest.approx((1, 0), abs=0.01)
    assert read_image(dataset.mask_path("wide.png")).getpixel((100, 100)) == (255, 255, 255)
    for name in ("wide.png", "high.jpg"):
        flip(dataset, name)
    assert contents(dataset) == before


def test_a_mirrored_copy_stands_beside_the_image(dataset: OwnedDataset):
    (dataset.images_folder / "wide.txt").write_text("a tag", encoding="utf-8")
    before = contents(dataset)
    assert flip(dataset, "wide.png", copy=True) == "wide_flipped.png"
    assert flip(dataset, "wide.png", copy=True) == "wide_flipped_2.png"
    assert before.items() <= contents(dataset).items()
    assert np.array_equal(read_image(dataset.image("wide_flipped.png")),
                          read_image(dataset.image("wide.png")).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert (dataset.images_folder / "wide_flipped.txt").read_text("utf-8") == "a tag"
    assert read_image(dataset.mask_path("wide_flipped.png")).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("tile", "overlap", "count"), [(512, 0.25, 6), (800, 0.0, 2), (600, 0.0, 4), (400, 0.5, 15)])
def test_tiles_cover_all_of_a_large_image_and_overlap(dataset: OwnedDataset, tile: int, overlap: float, count: int):
    (dataset.images_folder / "wide.txt").write_text("a tag", encoding="utf-8")
    original = np.asarray(read_image(dataset.image("wide.png")))
    names = split(dataset, "wide.png", tile=tile, overlap=overlap)
    assert len(names) == count and names[0] == "wide_1.png"
    covered = np.zeros(original.shape[:2], dtype=int)
    for name in names:
        left, top = (int(v) for v in dataset.notes()[name]["source"].split(" at ")[1].split(", "))
        part = np.asarray(read_image(dataset.image(name)))
        assert np.array_equal(part, original[top:top + part.shape[0], left:left + part.shape[1]])
        covered[top:top + part.shape[0], left:left + part.shape[1]] += 1
        assert (dataset.images_folder / name).with_suffix(".txt").read_text("utf-8") == "a tag"
        assert read_size(dataset.mask_path(name)) == part.shape[1::-1]
    assert covered.min() == 1
    if overlap:  # neighbours share at least that part of a tile
        assert (covered[0] > 1).sum() >= tile * overlap
    assert not (dataset.images_folder / "wide.png").exists()
    assert dataset.restore(["wide.png"]) == ("wide.png",)


def test_what_cannot_be_split_is_a_sentence(dataset: OwnedDataset):
    before = contents(dataset)
    for name, tile, overlap in (("small.webp", 512, 0.2), ("wide.png", 4, 0.2), ("wide.png", 512, 1.0), ("wide.png", 16, 0.9),
                                ("gone.png", 512, 0.1)):
        with pytest.raises((DatasetError, SettingError)):
            split(dataset, name, tile=tile, overlap=overlap)
    assert contents(dataset) == before


def test_a_prompt_inside_an_image_survives_shaping(dataset: OwnedDataset):
    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", "eine Katze, 猫")
    smooth((400, 300)).save(dataset.images_folder / "p.png", pnginfo=text)
    apply_shape(dataset, ["p.png"], Shape("square", 64))
    with Image.open(dataset.image("p.png")) as made:
        assert made.info["parameters"] == "eine Katze, 猫"


def test_a_broken_image_does_not_stop_the_others(dataset: OwnedDataset):
    broken = dataset.images_folder / "a.png"
    broken.write_bytes(dataset.image("wide.png").read_bytes()[:500])
    odd = dataset.images_folder / "odd.gif"
    smooth((300, 200)).convert("P").save(odd)
    shaped = apply_shape(dataset, ["a.png", "gone.png", "odd.gif", "wide.png", "wide.png"], Shape("square", 64))
    assert shaped.done == ("wide.png",) and [name for name, _ in shaped.skipped] == ["a.png", "gone.png", "odd.gif"]
    assert broken.stat().st_size == 500 and not dataset.unshaped_path("a.png").exists()


def test_stopping_leaves_every_image_whole(dataset: OwnedDataset):
    names, done = [path.name for path in dataset.images], []
    with pytest.raises(Interrupted):
        apply_shape(dataset, names, Shape("square", 64), on_progress=lambda n, _: done.append(n),
                    should_stop=lambda: len(done) == 1)
    assert [read_size(path)[0] for path in dataset.images].count(64) == 1
    assert [("shaped" in dataset.notes().get(name, {})) for name in names] == [True, False, False]


def test_a_kill_at_any_write_leaves_images_that_can_be_brought_back(dataset: OwnedDataset, monkeypatch: pytest.MonkeyPatch):
    before, write = contents(dataset), shape_module.write_atomic
    for allowed in range(3):
        count = 0

        def killed(path: Path, data: bytes, *, one_of_many: bool, allowed: int = allowed) -> None:
            nonlocal count
            if count == allowed:
                raise KeyboardInterrupt
            count += 1
            write(path, data, one_of_many=one_of_many)

        monkeypatch.setattr(shape_module, "write_atomic", killed)
        monkeypatch.setattr(dataset, "write_notes", lambda changes: None)  # it did not come so far
        if allowed < 2:  # the mask and the image
            with pytest.raises(KeyboardInterrupt):
                apply_shape(dataset, ["wide.png"], Shape("square", 64))
        else:
            apply_shape(dataset, ["wide.png"], Shape("square", 64))
        monkeypatch.undo()
        if allowed == 2:  # shaped, but nobody noted it: a place on it cannot be told on the unshaped one
            with pytest.raises(DatasetError, match="shape it again"):
                crop_to_box(dataset, "wide.png", (0, 0, 64, 32))
        unshape(dataset, ["wide.png"])
        assert contents(dataset) == before
