"""The page in another language, one in which every translation is its English text in ‹›: what stands outside of them was
not translated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from lib_lora_train.api import languages, service
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.run.runner import Runner
from lib_lora_train.ui.standalone import make_app
from tests.browser import ServedPage, expect, needs_browser, opened_page
from tests.fake_host import FakeHost, images
from tools.localization import JOINTS, SCRIPTS, texts

pytestmark = needs_browser
PATIENCE_MS = 90_000
WORD = re.compile(r"[A-Za-z]*[a-z][A-Za-z]{2,}|[A-Za-z]{2,}[a-z]")
# Every text and attribute of the page that is in sight and not the user's own.
READ = """() => {
    const own = "[translate=no], textarea, script, style, [role=listbox]:not(.lts-grid), ul.options, .lora-train-hidden";
    const found = [], seen = (element) => element.getClientRects().length && !element.closest(own);
    for (const root of document.querySelectorAll("#lora_train, #lora_train_zoom")) {
        const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT | NodeFilter.SHOW_ELEMENT);
        for (let node = root; node; node = walker.nextNode()) {
            if (node.nodeType === Node.TEXT_NODE) {
                if (seen(node.parentElement)) found.push(node.data);
            } else if (seen(node)) {
                found.push(...["title", "placeholder", "aria-label", "alt"].map((name) => node.getAttribute(name) || ""));
            }
        }
    }
    return found;
}"""


def outside(text: str) -> str:
    """What of a text stands outside of ‹›, but for names of settings."""
    text = re.sub(r"\b\w*_\w*\b", "", text)
    while text != (shorter := re.sub("‹[^‹›]*›", "", text)):
        text = shorter
    return text


def bracketed() -> dict[str, str]:
    """The catalogue of that language."""
    return {text: text if text in JOINTS else f"‹{text}›" for text in texts()}


def untranslated(page: Any) -> list[str]:
    """What is not translated of what is in sight."""
    return [text for text in page.evaluate(READ) if WORD.search(outside(text))]


class Translated(ServedPage):
    """The page in the language of the brackets."""

    def read(self) -> list[str]:
        """What is not translated of what is in sight."""
        return untranslated(self.page)

    def turn(self, number: int) -> None:
        self.page.locator("#lora_train_pages button[role=tab], #lora_train_pages .tab-nav > button").nth(number).click()


@pytest.fixture(scope="module")
def shown(browser: object, tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Translated]:
    folder = tmp_path_factory.mktemp("languages")
    host = StandaloneHost(tiny_file, lora_folder=folder / "loras", runs_folder=folder / "runs")
    with opened_page(browser, patience_ms=PATIENCE_MS, locale="zh-CN") as page:
        page.route("**/languages/zh_CN.json", lambda route: route.fulfill(json=bracketed()))
        with Translated(folder, page, host=host) as made:
            page.goto(made.url)
            expect(made.part("choose")).to_be_visible()
            yield made


def test_the_page_dataset(shown: Translated):
    page = shown.page
    assert shown.read() == []
    folder = shown.folder / "my pictures"
    folder.mkdir()
    for number, caption in enumerate(("zzk, red", "zzk, red", "zzk, blue, smile", "zzk", "")):
        Image.radial_gradient("L").rotate(70 * number).resize((300, 200 + 40 * number)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    (folder / "broken.png").write_bytes(b"\x89PNG")
    shown.part("new_trigger").fill("zzk")
    shown.part("import_path").fill(str(folder))
    shown.part("import").click()
    expect(page.locator(".lts-summary")).to_be_visible()
    assert shown.read() == []
    for step in ("shape", "caption", "train", "add"):
        shown.part(f"step_{step}").click()
        page.evaluate("document.querySelectorAll('#lts details').forEach((part) => { part.open = true; })")
        expect(page.locator(".lts-panel")).to_have_attribute("data-panel", step)
        page.wait_for_load_state("networkidle")
        assert shown.read() == [], step
    page.locator(".lts-tile").first.click()
    expect(shown.part("caption")).to_be_visible()
    assert shown.read() == []
    for tool in ("crop", "mask"):
        shown.part(tool).click()
        expect(shown.part("stage")).to_be_visible()
        assert shown.read() == [], tool
    shown.part("gallery").press("Control+a")
    assert shown.read() == []


def test_the_page_train_with_all_its_folds_a_refusal_and_a_plan(shown: Translated):
    page = shown.page
    shown.turn(1)
    expect(shown.part("summary").first).to_contain_text("‹")
    for fold in page.locator("#lora_train_settings .label-wrap").all():
        fold.click()
    assert shown.read() == []
    box = shown.part("train_data_dir").locator("input, textarea").first
    for data in (shown.folder / "nowhere", images(shown.folder / "data", 14)):
        before = shown.part("summary").first.inner_text()
        box.fill(str(data))
        box.blur()
        expect(shown.part("summary").first).not_to_have_text(before)
        assert shown.read() == []


def test_a_run_and_the_page_results(shown: Translated):
    page = shown.page
    shown.turn(2)
    expect(shown.part("results_begin")).to_be_visible()
    assert shown.read() == []
    service.start({
        "output_name": "zzk", "trigger_word": "zzk", "train_data_dir": str(shown.folder / "data"), "resolution": "64",
        "min_bucket_reso": 64, "max_train_steps": 8, "network_dim": 2, "network_alpha": 2, "learning_rate": 0.01,
        "save_every_n_steps": 4, "validate_every_n_steps": 4, "sample_every_n_steps": 4, "sample_prompts": "zzk, a cat --s 2",
    }, runner=shown.runner, host=shown.host)
    shown.turn(1)
    expect(page.locator("#lora_train_live .lora-train-verdict")).to_contain_text("‹")
    assert shown.read() == []
    shown.turn(2)
    expect(page.locator(".ltr-save")).to_have_count(2)
    page.evaluate("document.querySelectorAll('#ltr details').forEach((part) => { part.open = true; })")
    assert shown.read() == []
    page.locator(".lora-train-plot").last.hover()
    page.locator(".ltr-mark").first.click()
    page.locator("#ltr .lora-train-tile").first.click()
    expect(shown.part("zoom")).to_be_visible()
    assert shown.read() == []


@pytest.mark.parametrize("locale", ["ja-JP", "zh-CN", "zh-TW", "en-GB"])
def test_no_text_of_a_button_is_wider_than_the_button(browser: object, tmp_path: Path, locale: str):
    wider = """() => [...document.querySelectorAll("#lora_train_run button")].filter((button) => {
        const text = document.createRange();
        text.selectNodeContents(button);
        return text.getBoundingClientRect().width > button.clientWidth;
    }).map((button) => button.textContent)"""
    with opened_page(browser, patience_ms=PATIENCE_MS, locale=locale) as page, ServedPage(tmp_path, page) as made:
        page.goto(made.url)
        page.get_by_role("button", name=re.compile("^2 ")).or_(page.get_by_role("tab", name=re.compile("^2 "))).click()
        expect(made.part("start").first).to_have_text(re.compile("Train" if locale == "en-GB" else "^[^A-Za-z]+$"))
        made.part("result_buttons").evaluate(  # as in the WebUI after a run with several saves
            "row => [row, ...row.children].forEach((part) => part.classList.remove('lora-train-hidden'))")
        expect(made.part("send").first).to_be_visible()
        assert page.evaluate(wider) == []


def test_the_webuis_setting_or_else_the_browser_chooses_the_language(browser: object, tmp_path: Path):
    script = (SCRIPTS / "lora_train_language.js").read_text(encoding="utf-8")
    chosen = """([script, localization]) => {
        window.loraTrainLanguage = undefined;
        const props = {elem_id: "settings_json", value: JSON.stringify({localization})};
        window.gradio_config = {components: localization === null ? [] : [{props}]};
        (0, eval)(script);
        return window.loraTrainLanguage.tag || "";
    }"""
    names = {"zh_CN": "zh-CN", "zh-Hans (Stable)": "zh-CN", "简体中文": "zh-CN",
             "zh_TW": "zh-TW", "zh-Hant (TestSuite)": "zh-TW",
             "zh_HK": "zh-TW", "ja_JP": "ja-JP", "日本語": "ja-JP", "None": "", "de_DE": "", "Thai": "", None: "ja-JP"}
    with opened_page(browser, patience_ms=PATIENCE_MS, locale="ja") as page, ServedPage(tmp_path, page) as made:
        page.goto(f"{made.url}lora-train/v1/page.css")
        assert {name: page.evaluate(chosen, [script, name]) for name in names} == names


def test_english_is_neither_loaded_nor_watched(browser: object, tmp_path: Path):
    asked: list[str] = []
    with opened_page(browser, patience_ms=PATIENCE_MS) as page, ServedPage(tmp_path, page) as made:
        page.on("request", lambda request: asked.append(request.url))
        page.goto(made.url)
        expect(made.part("choose")).to_be_visible()
        assert [url for url in asked if "languages" in url] == []
        assert page.evaluate("document.querySelector('#lora_train').lang") == ""


def test_a_catalogue_is_served_by_its_name_and_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "catalogues").mkdir()
    (tmp_path / "secret.json").write_text("{}", encoding="utf-8")
    (tmp_path / "catalogues" / "ja_JP.json").write_text('{"Train": "学習"}', encoding="utf-8")
    monkeypatch.setattr(languages, "CATALOGUES", tmp_path / "catalogues")
    client = TestClient(make_app(FakeHost(tmp_path), runner=Runner()), base_url="http://localhost:7860")
    assert client.get("/lora-train/v1/languages/ja_JP.json").json() == {"Train": "学習"}
    for name in ("zh_CN.json", "..%2Fsecret.json", "..%5Csecret.json"):
        assert client.get(f"/lora-train/v1/languages/{name}").status_code == 404
