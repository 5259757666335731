"""Captions without a model, from files as programs write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lib_lora_train.errors import DatasetError, SettingError
from lib_lora_train.tagging.options import TagOptions
from lib_lora_train.tagging.plain import PLAIN_SOURCES

PARAMETERS = "a cat, (blue eyes:1.2) <lora:fluff:1>, 猫\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, Seed: 1"
CAPTION = "a cat, blue eyes, 猫"
IMAGE = Image.new("RGB", (8, 8), "red")


def said(source: str, path: Path, **options: object) -> str:
    (found,) = [s for s in PLAIN_SOURCES if s.name == source]
    assert found.missing() == ""
    with found.open(TagOptions(**options), torch.device("cpu")) as captioner:
        return captioner(path).text


def exif(comment: bytes) -> bytes:
    """An EXIF block with that UserComment, by Pillow."""
    block = Image.Exif()
    block[0x8769] = {0x9286: comment}
    return block.tobytes()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_the_prompt_is_read_from_every_format_in_which_the_webui_keeps_it(tmp_path: Path, suffix: str):
    path = tmp_path / f"a{suffix}"
    if suffix == ".png":
        info = PngInfo()
        info.add_text("parameters", PARAMETERS)
        IMAGE.save(path, pnginfo=info)
    else:
        # As the WebUI does (modules/images.py).
        piexif = pytest.importorskip("piexif")
        comment = pytest.importorskip("piexif.helper").UserComment.dump(PARAMETERS, encoding="unicode")
        IMAGE.save(path)
        piexif.insert(piexif.dump({"Exif": {piexif.ExifIFD.UserComment: comment}}), str(path))
    assert said("infotext", path) == CAPTION


@pytest.mark.parametrize("comment", [
    b"UNICODE\0" + PARAMETERS.encode("utf-16-be"), b"UNICODE\0" + PARAMETERS.encode("utf-16-le"),
    b"UNICODE\0" + PARAMETERS.encode("utf-16"), b"\0\0\0\0\0\0\0\0" + PARAMETERS.encode(), b"ASCII\0\0\0" + PARAMETERS.encode(),
    PARAMETERS.encode()], ids=["big", "little", "marked", "undefined", "ascii", "bare"])
def test_a_comment_is_read_however_its_program_spelt_it(tmp_path: Path, comment: bytes):
    IMAGE.save(tmp_path / "a.jpg", exif=exif(comment))
    assert said("infotext", tmp_path / "a.jpg") == CAPTION


def test_novelais_description_is_its_prompt(tmp_path: Path):
    info = PngInfo()
    for name, text in (("Software", "NovelAI"), ("Description", "a cat, {blue eyes}"), ("Comment", "{}")):
        info.add_text(name, text)
    IMAGE.save(tmp_path / "a.png", pnginfo=info)
    assert said("infotext", tmp_path / "a.png") == "a cat, {blue eyes}"


def test_an_image_without_a_prompt_is_named(tmp_path: Path):
    IMAGE.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    IMAGE.save(tmp_path / "c.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    for name in ("a.png", "b.png", "c.jpg"):
        with pytest.raises(DatasetError, match=name):
            said("infotext", tmp_path / name)


@pytest.mark.parametrize(("stem", "words"), [
    ("red_cat", "red cat"), ("00012-1234567-red cat", "red cat"), ("red_cat (2)", "red cat"), ("red-cat-0031", "red cat"),
    ("red_t-shirt", "red t-shirt"), ("1girl, smile", "1girl, smile"),
    ("3 cats", "3 cats"), ("猫_1", "猫"), ("cat2", "cat2"), ("01 red hat", "red hat"),
    ("12 - red cat", "red cat")])
def test_a_files_name_gives_its_words(tmp_path: Path, stem: str, words: str):
    assert said("filename", tmp_path / f"{stem}.png") == words


@pytest.mark.parametrize("stem", ["00012-1234567", "(1)", "___", "2024-01-31"])
def test_a_name_without_words_is_named(tmp_path: Path, stem: str):
    with pytest.raises(DatasetError, match="holds no words"):
        said("filename", tmp_path / f"{stem}.png")


@pytest.mark.parametrize(("folder", "words"), [
    ("10_sks dog", "sks dog"), ("cat_12_dog", "cat 12 dog"), ("summer2024_trip", "summer2024 trip"),
    ("3_cat_12_dog", "cat 12 dog")])
def test_of_a_folder_s_name_only_the_repeats_in_front_are_left_out(tmp_path: Path, folder: str, words: str):
    assert said("template", tmp_path / folder / "a.png", template="{folder}") == words


def test_a_template_is_filled_from_trigger_word_folder_and_name(tmp_path: Path):
    path = tmp_path / "10_zzk_girl" / "red_hat_01.png"
    assert said("template", path, trigger_word="zzk") == "zzk, zzk girl, red hat"
    assert said("template", path, template="a photo of {trigger} {name.__class__}", trigger_word="x") == (
        "a photo of x {name.__class__}")
    assert said("template", path, template="{trigger}, {name}", trigger_word="{name}") == "{name}, red hat"
    with pytest.raises(SettingError, match="number"):
        said("template", path, template="{number}")
    with pytest.raises(DatasetError, match="01.png"):
        said("template", tmp_path / "01.png", template="{trigger}, {name}")
