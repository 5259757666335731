"""Where the subject is: faces, drawings on plain ground, what stands out; nowhere in particular where nothing does."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lib_lora_train import demo
from lib_lora_train.studio.cropping import subject as subject_module
from lib_lora_train.studio.cropping.subject import drawn_box, face_box, salient_box, subject_box

DRAWINGS = sorted((Path(demo.__file__).parent / "style").glob("*.png"))


def textured(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A ground that is even at large and rough at small scale."""
    values = np.random.default_rng(seed).normal(120, 12, (size[1], size[0], 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(("place", "radius"), [((100, 100), 40), ((500, 80), 40), ((320, 300), 60), ((560, 320), 50)])
@pytest.mark.parametrize("colour", ["white", (220, 40, 40), "black"])
def test_a_thing_on_a_rough_ground_is_found(place: tuple[int, int], radius: int, colour: object):
    image = textured((640, 400))
    ImageDraw.Draw(image).ellipse((place[0] - radius, place[1] - radius, place[0] + radius, place[1] + radius), fill=colour)
    left, top, right, bottom = salient_box(image)
    assert abs((left + right) / 2 - place[0]) < 64 and abs((top + bottom) / 2 - place[1]) < 64


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda path: path.stem)
def test_a_drawing_on_white_is_found_to_the_pixel(path: Path):
    with Image.open(path) as file:
        drawing = file.convert("RGB")
    differs = np.abs(np.asarray(drawing, dtype=int) - 255).max(axis=-1) > 24
    rows, columns = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
    expected = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    image = Image.new("RGB", (500, 300), "white")
    image.paste(drawing, (350, 20))
    found = drawn_box(image)
    assert np.abs(np.subtract(found, np.add(expected, (350, 20, 350, 20)))).max() <= 4


def test_a_cut_on_the_subject_loses_far_less_of_it_than_one_on_the_centre():
    rng, lost = np.random.default_rng(5), {"centre": [], "subject": []}
    for path in DRAWINGS:
        size, side = [((900, 450), 270), ((450, 900), 270)][len(lost["centre"]) % 2]
        ground = rng.integers(60, 200, (12, 12, 3), dtype=np.uint8)
        image = Image.fromarray(ground).resize(size, Image.Resampling.BICUBIC)
        along = 0 if size[0] > size[1] else 1
        place = [90, 90]
        place[along] = int(rng.integers(0, 900 - side))
        with Image.open(path) as file:
            image.paste(file.convert("RGB").resize((side, side)), tuple(place))
        left, top, right, bottom = salient_box(image)
        for name, middle in (("centre", 450), ("subject", (left + right) / 2 if along == 0 else (top + bottom) / 2)):
            start = min(max(middle - 225, 0), 450)
            lost[name].append(1 - max(0, min(place[along] + side, start + 450) - max(place[along], start)) / side)
    assert np.mean(lost["centre"]) > 0.15 and np.mean(lost["subject"]) < 0.02


def test_where_nothing_stands_out_it_is_the_whole_image():
    for image in (Image.new("RGB", (300, 200), "grey"), Image.new("RGB", (1, 1)), Image.new("RGB", (3000, 2))):
        assert subject_box(image) == (0, 0, *image.size)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 900), (900, 5), (64, 64), (333, 99)])
def test_a_box_lies_in_its_image_and_holds_something(size: tuple[int, int]):
    for seed in range(3):
        left, top, right, bottom = subject_box(textured(size, seed))
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_a_mask_says_what_the_subject_is():
    mask = Image.new("L", (100, 80))
    mask.paste(255, (60, 10, 90, 40))
    assert subject_box(textured((100, 80)), mask=mask) == (60, 10, 90, 40)
    whole = subject_box(textured((100, 80)))
    assert subject_box(textured((100, 80)), mask=Image.new("L", (100, 80), 255)) == whole  # it leaves nothing out


def test_a_face_is_found_where_it_is():
    pytest.importorskip("cv2")
    data = pytest.importorskip("skimage.data")
    face = Image.fromarray(data.astronaut())  # her face is at about (225, 115)
    for place, side in (((0, 0), 512), ((1200, 100), 512), ((300, 150), 500)):
        image = textured((1800, 700))
        image.paste(face.resize((side, side)), place)
        left, top, right, bottom = face_box(image)
        at = (place[0] + 225 * side / 512, place[1] + 115 * side / 512)
        assert left < at[0] < right and top < at[1] < bottom and right - left < side / 2
        assert subject_box(image) == (left, top, right, bottom)


def test_drawings_are_no_faces():
    pytest.importorskip("cv2")
    for path in DRAWINGS[::3]:
        with Image.open(path) as file:
            assert face_box(file.convert("RGB").resize((300, 300))) is None, path.name


def test_photographs_without_people_have_no_faces():
    pytest.importorskip("cv2")
    data = pytest.importorskip("skimage.data")
    for image in (data.coffee(), data.cell(), data.brick()):
        assert face_box(Image.fromarray(image).convert("RGB")) is None


def test_without_opencv_the_subject_is_found_all_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    image = Image.new("RGB", (400, 200), "white")
    image.paste("black", (300, 50, 360, 150))
    assert face_box(image) is None and subject_box(image) == pytest.approx((300, 50, 360, 150), abs=3)


def test_a_damaged_face_model_is_passed_over(tmp_path: Path):
    pytest.importorskip("cv2")
    data = pytest.importorskip("skimage.data")
    for name in subject_module.YUNET_FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no model")
    face = Image.fromarray(data.astronaut())
    assert face_box(face, models_folder=tmp_path) == face_box(face)


def test_the_hosts_face_model_is_asked_first_and_its_boxes_are_scaled_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "opencv").mkdir()
    (tmp_path / subject_module.YUNET_FILES[0]).write_bytes(b"a model")
    asked = []

    class Detector:  # the shape of what OpenCV's gives: a row of x, y, width, height, ten landmarks, a score for each face
        def detect(self, pixels: np.ndarray) -> tuple[int, np.ndarray]:
            asked.append(pixels)
            return 1, np.array([[100, 50, 40, 40, *[0] * 10, 0.95]], dtype=np.float32)

    def create(path: str, config: str, size: tuple[int, int], *_: object) -> Detector:
        asked.append((path, size))
        return Detector()

    detectors = SimpleNamespace(error=RuntimeError, FaceDetectorYN=SimpleNamespace(create=create))  # a stand-in for OpenCV
    monkeypatch.setitem(sys.modules, "cv2", detectors)
    image = Image.new("RGB", (1600, 800), (255, 0, 0))
    box = face_box(image, models_folder=tmp_path)
    assert asked[0] == (str(tmp_path / subject_module.YUNET_FILES[0]), (800, 400))
    assert asked[1].shape == (400, 800, 3) and tuple(asked[1][0, 0]) == (0, 0, 255)  # blue, green, red
    # Twice as large; half a face to each side, six tenths above, a whole one below.
    assert box == (160, 52, 320, 260)
