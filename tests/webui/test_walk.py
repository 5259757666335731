"""From a folder of images to the recommended save in a prompt, in the real WebUI and a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from tests.browser import expect, needs_browser, opened_page
from tests.webui.running import WebUI, until
from tests.webui.test_page import Tab

pytestmark = needs_browser
PATIENCE_MS = 60_000
NAME = "walked"


@pytest.fixture
def tab(webui: WebUI, browser: object) -> Iterator[Tab]:
    with opened_page(browser, patience_ms=PATIENCE_MS) as page:
        session = Tab(webui, page)
        session.open()
        yield session
        webui.post("/lora-train/v1/results/stop")
        webui.stop_training()


def test_a_run_is_watched_its_recommended_save_taken_and_generated_with(webui: WebUI, dataset: Path, tab: Tab) -> None:
    page, before = tab.page, (webui.sample(), webui.get("/probe/model"))

    # Train, and see it learn: the curve against the base model, and a strip for each prompt.
    tab.fill(NAME, dataset, steps=12)
    tab.part("fold_save").locator(".label-wrap").first.click()
    tab.box("save_every_n_steps").fill("6")
    tab.box("save_every_n_steps").blur()
    tab.part("start").click()
    expect(tab.part("stop")).to_be_enabled()
    expect(tab.part("start")).to_be_enabled()
    line = re.compile("^M[^L]+L")
    expect(page.locator("#lora_train_drawn path.held-out").first).to_have_attribute("d", line)
    tiles = page.locator("#lora_train_drawn .lora-train-tile img")
    expect(tiles).to_have_count(2)  # of the one caption that all images have: by the base model, and at the end
    expect(tiles.last).to_have_js_property("naturalWidth", 64)

    # The results: the saves, the grid, the recommended one, which is taken.
    page.get_by_role("button", name="3 Results", exact=True).click()
    expect(page.locator(".ltr-save")).to_have_count(2)
    # Small, so that it takes seconds: as the page's button starts it, and shown by the page.
    run = webui.get("/lora-train/v1/status")["run"]
    webui.post("/lora-train/v1/results/grid", {"run": run, "weights": [0.5, 1], "steps": 2})
    until(lambda: not webui.get("/lora-train/v1/results/task")["task"]["running"], what="the grid is painted and judged",
          seconds=120)
    # Anew, so that what is recommended by a part of the scores is not taken.
    tab.page.reload()
    page.get_by_role("button", name="Train LoRA", exact=True).click()
    page.get_by_role("button", name="3 Results", exact=True).click()
    expect(page.locator(".ltr-row .ltr-numbers").first).to_contain_text("likeness")
    recommended = webui.get("/lora-train/v1/results")["recommended"]
    page.locator("#lora_train_take").click()
    expect(page.locator(".ltr-notice")).to_contain_text(f"{NAME}.preview.png")

    # Its card is the WebUI's own, with preview and trigger word.
    card = json.loads((webui.loras / f"{NAME}.json").read_text(encoding="utf-8"))
    assert card["activation text"].split(", ")[0] == "zzk" and card["preferred weight"] == recommended["weight"]
    assert Image.open(webui.loras / f"{NAME}.preview.png").size == (64, 64)
    with safe_open(webui.loras / f"{NAME}.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.sai_model_spec"] == "1.0.1" and metadata["modelspec.trigger_phrase"] == "zzk"
    shown = page.locator(f"#txt2img_lora_cards .card[data-name='{NAME}']")
    expect(shown.locator("img.preview")).to_have_attribute("src", re.compile(re.escape(f"{NAME}.preview.png")))
    assert (webui.sample(), webui.get("/probe/model")) == before

    # Generate with it.
    page.locator("#lora_train_send_best").click()
    prompt = page.locator("#txt2img_prompt textarea")
    expect(prompt).to_have_value(re.compile(rf"zzk.*<lora:{NAME}:[\d.]+>"))
    page.locator("#txt2img_generate").click()
    generated = page.locator("#html_info_txt2img").first
    expect(generated).to_contain_text(f"{NAME}: {metadata['sshs_model_hash'][:12]}")
    expect(page.locator("#txt2img_gallery img").first).to_be_visible()
