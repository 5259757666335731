"""The dataset studio inside the WebUI, in a real browser: what a new user does from a heap of images to a training."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.browser import expect, needs_browser, opened_page
from tests.mixed_pictures import ADDED, mixed_pictures
from tests.tagging.wd_files import TAGS, write_tagger
from tests.webui.running import WebUI

pytestmark = needs_browser
PATIENCE_MS = 120_000


@pytest.fixture
def page(webui: WebUI, browser: object) -> Iterator[object]:
    """The tab "Train LoRA", just opened."""
    with opened_page(browser, patience_ms=PATIENCE_MS) as session:
        session.goto(webui.url)
        session.get_by_role("button", name="Train LoRA", exact=True).click()
        yield session
        webui.stop_training()
        webui.post("/lora-train/v1/studio/close", {"discard": True})


def part(page, name: str):
    return page.locator(f"#lora_train_{name}").first


def field(page, name: str):
    return page.locator(f"#lora_train_{name}").locator("input, textarea").first


def test_a_new_user_goes_from_thirty_mixed_pictures_to_a_training_without_leaving_the_tab(
        webui: WebUI, page, tmp_path: Path) -> None:
    write_tagger(webui.data / "models" / "lora_train" / "taggers" / "small-tagger")
    images = mixed_pictures(tmp_path / "my pictures")
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    part(page, "new_name").fill("emoji")
    part(page, "new_trigger").fill("zzkmoji")
    part(page, "upload").set_input_files(sorted(images.iterdir()))

    # What stayed out, what is wrong, and one next step.
    expect(page.locator(".lts-summary")).to_contain_text(f"{ADDED} pictures")
    for name in ("broken.png", "copy-of-the-first.png"):
        expect(page.locator(".lts-progress")).to_contain_text(name)
    page.locator(".lts-chip", has_text="nearly the same").click()
    expect(page.locator(".lts-tile")).to_have_count(1)
    page.locator(".lts-tile").first.click()
    # Selects nothing, and is not taken by the WebUI for its Interrupt.
    page.keyboard.press("Escape")
    page.locator(".lts-tile").first.click()
    page.keyboard.press("Delete")
    part(page, "step_add").filter(has_text=f"{ADDED - 1} pictures").wait_for()
    page.get_by_role("button", name="Show all", exact=True).click()
    expect(page.locator(".lts-tile")).to_have_count(ADDED - 1)

    part(page, "step_shape").click()
    page.get_by_role("button", name="Squares", exact=True).click()
    expect(page.locator(".lts-sample img").first).to_be_visible()
    part(page, "shape").click()
    expect(part(page, "step_shape")).to_contain_text("Done")
    part(page, "next").click()

    # The tagger that is there is the one that is taken.
    expect(page.locator("[data-source='wd:small-tagger']")).to_have_attribute("aria-checked", "true")
    part(page, "tag").click()
    expect(part(page, "step_caption")).to_contain_text("Done")
    part(page, "step_train").click()
    part(page, "use").click()

    expect(part(page, "start")).to_be_visible()
    folder = webui.data / "lora_train_datasets" / "emoji"
    expect(field(page, "train_data_dir")).to_have_value(str(folder))
    expect(field(page, "trigger_word")).to_have_value("zzkmoji")
    # As small and short as the model of these tests.
    for name, text in {"max_train_steps": "3", "resolution": "64", "network_dim": "4", "network_alpha": "4"}.items():
        field(page, name).fill(text)
        field(page, name).blur()
    expect(part(page, "summary")).to_contain_text(f"{ADDED - 1} pictures")
    expect(part(page, "summary")).to_contain_text("= 3 steps")
    part(page, "start").click()
    expect(part(page, "live")).to_contain_text(re.compile("emoji is (ready|saved)"))
    assert (webui.loras / "emoji.safetensors").is_file()

    # Fields keep what the last run had: where that was a disk cache, its folder lies beside the images.
    kept = [path for path in folder.glob("*_zzkmoji/*") if path.is_file() and path.suffix != ".txt"]
    assert len(kept) == ADDED - 1
    known = {name.replace("_", " ") for name, _ in TAGS} | {name for name, _ in TAGS}
    for path in kept:
        with Image.open(path) as image:
            assert image.width == image.height and image.width in (480, 512), path.name
        first, *tags = path.with_suffix(".txt").read_text(encoding="utf-8").strip().split(", ")
        assert first == "zzkmoji" and set(tags) <= known
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before


def test_pictures_just_painted_are_brought_in_by_one_press(webui: WebUI, page) -> None:
    page.get_by_role("button", name="txt2img", exact=True).first.click()
    page.locator("#txt2img_prompt textarea").fill("a photo of a cat")
    page.locator("#txt2img_generate").click()
    expect(page.locator("#txt2img_gallery img").first).to_be_visible()
    page.get_by_role("button", name="Train LoRA", exact=True).click()
    part(page, "new_name").fill("painted")
    part(page, "generations").click()
    expect(page.locator(".lts-tile")).to_have_count(1)
    expect(page.locator(".lts-summary")).to_contain_text("1 picture")
