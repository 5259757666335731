"""The tab inside the WebUI, in a real browser: what a user does from the folder to the image."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.browser import expect, needs_browser, opened_page
from tests.webui.running import WebUI, until

pytestmark = needs_browser
PATIENCE_MS = 60_000
MANY = 100_000


class Tab:
    """The tab "Train LoRA" of a WebUI in a browser's page."""

    def __init__(self, webui: WebUI, page: object) -> None:
        self.webui, self.page = webui, page

    def open(self) -> None:
        """Load the page anew and go to the tab."""
        self.page.goto(self.webui.url)
        for name in ("Train LoRA", "2 Train"):
            self.turn(name)
        # The summary says something as soon as gradio listens to the page.
        expect(self.part("summary")).to_contain_text(re.compile(r"\w"))
        # What the page remembers is put back with that text, which the first plan replaces.
        expect(self.part("summary")).not_to_contain_text("Looking at the pictures")

    def turn(self, name: str) -> None:
        """Go to one of the WebUI's tabs, or to one of the pages in ours."""
        # The role of a tab's button is "button" in gradio 3 and "tab" in gradio 4.
        self.page.get_by_role("button", name=name, exact=True).or_(
            self.page.get_by_role("tab", name=name, exact=True)).click()

    def part(self, name: str):
        return self.page.locator(f"#lora_train_{name}").first

    def box(self, name: str):
        return self.page.locator(f"#lora_train_{name}").locator("input, textarea").first

    def fill(self, name: str, dataset: Path, *, steps: int) -> None:
        """What a first LoRA needs, at a size for these tests."""
        wanted = {"output_name": name, "trigger_word": "zzk", "max_train_steps": str(steps), "resolution": "64",
                  "network_dim": "4", "network_alpha": "4", "learning_rate": "0.002", "train_data_dir": str(dataset)}

        def filled() -> bool:
            """On a busy machine what the page puts back may come late, and over what was typed."""
            for box, text in wanted.items():
                if self.box(box).input_value() != text:
                    self.box(box).fill(text)
                    self.box(box).blur()
            return f"= {steps:,} steps" in self.part("summary").inner_text() and all(
                self.box(box).input_value() == text for box, text in wanted.items())

        until(filled, what="the fields are filled and planned with", seconds=PATIENCE_MS / 1000)

    def at_step(self, step: int) -> None:
        """Wait until the bar shows that step or a later one."""
        bar = self.part("live").locator(".progress")

        def shown() -> bool:
            found = re.match(r"(\d+)/", bar.inner_text())
            return found is not None and int(found[1]) >= step

        until(shown, what=f"the bar shows step {step}")


@pytest.fixture
def tab(webui: WebUI, browser: object) -> Iterator[Tab]:
    with opened_page(browser, patience_ms=PATIENCE_MS) as page:
        session = Tab(webui, page)
        session.open()
        yield session
        webui.stop_training()


def test_the_tab_trains_and_the_lora_is_painted_with_a_moment_later(webui: WebUI, dataset: Path, tab: Tab) -> None:
    before = webui.sample(), webui.get("/probe/model")
    expect(tab.part("model")).to_contain_text("base: tiny")
    tab.fill("from_page", dataset, steps=12)
    tab.part("start").click()
    expect(tab.part("live")).to_contain_text(re.compile("from_page is (ready|saved)"))
    assert (webui.sample(), webui.get("/probe/model")) == before

    tab.part("send").click()
    prompt = tab.page.locator("#txt2img_prompt textarea")
    expect(prompt).to_be_visible()
    expect(prompt).to_have_value("zzk, <lora:from_page:1>")
    for side in ("width", "height"):
        expect(tab.page.locator(f"#txt2img_{side} input[type=number]")).to_have_value("64")
    tab.page.locator("#txt2img_generate").click()
    generated = tab.page.locator("#html_info_txt2img").first
    expect(generated).to_contain_text("zzk, <lora:from_page:1>")
    with safe_open(webui.loras / "from_page.safetensors", "pt") as file:
        model_hash = file.metadata()["sshs_model_hash"]
    expect(generated).to_contain_text(f"from_page: {model_hash[:12]}")
    expect(tab.page.locator("#txt2img_gallery img").first).to_be_visible()


def test_a_reloaded_page_finds_the_running_job_and_can_stop_and_save_it(webui: WebUI, dataset: Path, tab: Tab) -> None:
    tab.fill("reloaded", dataset, steps=MANY)
    tab.part("start").click()
    tab.at_step(2)
    run = webui.get("/lora-train/v1/status")["run"]
    tab.open()
    expect(tab.part("live")).to_contain_text("reloaded")
    tab.at_step(3)
    assert webui.get("/lora-train/v1/status")["run"] == run
    expect(tab.part("start")).to_be_disabled()
    assert tab.box("output_name").input_value() == "reloaded"
    tab.part("stop_save").click()
    expect(tab.part("live")).to_contain_text("saved")
    expect(tab.part("start")).to_be_enabled()
    assert (webui.loras / "reloaded.safetensors").is_file()


def test_another_browser_sees_the_job_too(webui: WebUI, dataset: Path, tab: Tab, browser) -> None:
    tab.fill("watched", dataset, steps=MANY)
    tab.part("start").click()
    tab.at_step(1)
    other = browser.new_context()
    watcher = Tab(webui, other.new_page())
    watcher.open()
    expect(watcher.part("live")).to_contain_text("watched")
    watcher.at_step(2)
    other.close()


def test_stop_ends_it_after_asking_and_changes_nothing(webui: WebUI, dataset: Path, tab: Tab) -> None:
    before = webui.sample(), webui.get("/probe/model")
    tab.fill("dropped", dataset, steps=MANY)
    tab.part("start").click()
    tab.at_step(2)
    asked: list[str] = []
    tab.page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.accept()))
    tab.part("stop").click()
    expect(tab.part("live")).to_contain_text("Stopped after")
    assert asked and not list(webui.loras.glob("dropped*"))
    assert (webui.sample(), webui.get("/probe/model")) == before


def test_a_refusal_is_read_beside_the_button_and_starts_nothing(webui: WebUI, tab: Tab, tmp_path: Path) -> None:
    tab.box("output_name").fill("nothing")
    tab.box("train_data_dir").fill(str(tmp_path / "missing"))
    tab.part("start").click()
    expect(tab.part("answer")).to_contain_text("does not exist")
    assert not webui.get("/lora-train/v1/status")["running"]
