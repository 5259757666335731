"""The WebUI's own captioners: said to be missing where they are, never fetched; used as the WebUI uses them where they are."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.webui.captioner_files import WORD, write_bert_tokenizer, write_blip, write_deepdanbooru
from tests.webui.running import WebUI, fill, running


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """A WebUI that has never interrogated anything, and never fetched anything. The weights come later."""
    data = tmp_path_factory.mktemp("captioners")
    fill(data)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
            patch.setenv(name, str(data / "hub"))
        yield from running(data)


def encoded(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def images() -> list[str]:
    """Grey noise, dark and bright, of two shapes."""
    noise = np.random.default_rng(0)
    return [encoded(Image.fromarray(noise.integers(low, low + 100, (height, 512, 3), dtype=np.uint8)))
            for low, height in ((20, 512), (150, 300))]


def test_what_is_missing_is_said_with_its_place_and_nothing_is_fetched(bare: WebUI):
    told = bare.get("/probe/captioners")
    models = bare.data / "models"
    assert Path(told["folder"]) == models / "lora_train" / "taggers"
    expected = {"blip": ("model_base_caption_capfilt_large.pth", models / "BLIP"),
                "deepdanbooru": ("model-resnet_custom_v3.pt", models / "torch_deepdanbooru"),
                "wd:wd-vit-tagger-v3": ("model.safetensors", models / "lora_train" / "taggers" / "wd-vit-tagger-v3")}
    for name, (file, place) in expected.items():
        assert file in told["missing"][name] and str(place) in told["missing"][name]
        answer = bare.post("/probe/describe", {"name": name, "images": images()[:1]})
        assert answer == {"error": told["missing"][name]}
    assert not (models / "BLIP").exists() and not (models / "torch_deepdanbooru").exists()
    assert "Downloading" not in bare.log
    assert [told["missing"][name] for name in ("infotext", "filename", "template")] == ["", "", ""]


def test_deepdanbooru_says_what_the_webui_says_whatever_its_settings(bare: WebUI):
    tags = write_deepdanbooru(bare.data / "models", Path(os.environ["WEBUI_ROOT"]))
    assert bare.get("/probe/captioners")["missing"]["deepdanbooru"] == ""
    with bare.option("interrogate_deepbooru_score_threshold", 0.9), bare.option("interrogate_return_ranks", True):
        ours = bare.post("/probe/describe", {"name": "deepdanbooru", "images": images(), "threshold": 0.55})
    assert ours["busy"] is False  # generations are let in between two batches
    with bare.option("interrogate_deepbooru_score_threshold", 0.55), bare.option("deepbooru_sort_alpha", False), \
            bare.option("deepbooru_use_spaces", False), bare.option("interrogate_return_ranks", True):
        for image, found in zip(images(), ours["tags"], strict=True):
            said = bare.post("/sdapi/v1/interrogate", {"image": image, "model": "deepdanbooru"})["caption"]
            theirs = dict(part.strip("()").split(":") for part in said.split(", "))
            general = {name: score for name, score, kind in found if kind == "general"}
            assert theirs.keys() == general.keys() and 100 < len(general) < len(tags) - 100
            assert [general[name] for name in theirs] == pytest.approx([float(score) for score in theirs.values()], abs=6e-4)
            assert {name for name, _, kind in found if kind == "rating"} == {"safe", "questionable", "explicit"}
            assert [score for _, score, _ in found] == sorted((score for _, score, _ in found), reverse=True)
    first, second = ({name: score for name, score, _ in found} for found in ours["tags"])
    assert first != second


def test_blip_is_asked_for_a_sentence_once_all_its_parts_are_there_and_sent_away_again(bare: WebUI):
    write_blip(bare.data / "models")
    told = bare.get("/probe/captioners")
    assert "bert-base-uncased" in told["missing"]["blip"] and told["blip"] is None
    assert bare.post("/probe/describe", {"name": "blip", "images": images()}) == {"error": told["missing"]["blip"]}
    write_bert_tokenizer(bare.data / "hub")
    assert bare.get("/probe/captioners")["missing"]["blip"] == ""
    with bare.option("interrogate_clip_min_length", 8), bare.option("interrogate_clip_max_length", 10):
        said = bare.post("/probe/describe", {"name": "blip", "images": images()})
    # Ten tokens at most, of which [DEC] and "a picture of" are not part of the caption.
    assert said["texts"] == [" ".join([WORD] * 6)] * 2 and said["tags"] == [[], []] and said["busy"] is False
    after = bare.get("/probe/captioners")
    assert after["blip"] == "cpu" and after["dtype"] == told["dtype"]
    assert bare.sample() and "Downloading" not in bare.log
