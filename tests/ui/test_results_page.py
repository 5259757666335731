"""The curve and the pictures of a run, and the page "3 Results", in a real browser, with a small model that really trains."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from lib_lora_train import events
from lib_lora_train.api import results, service
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.results import start
from lib_lora_train.run import rate_finder
from lib_lora_train.studio.importing.owned import OwnedDataset
from tests.browser import ServedPage, expect, needs_browser, opened_page
from tests.fake_host import images
from tests.results.written_run import Run

pytestmark = needs_browser
PATIENCE_MS = 90_000
EVIL = "<img src=x onerror=window.evil=1>" if sys.platform != "win32" else "img"
REMEDY = events.Diagnosed(100, "too slow", f"It learns too slowly {EVIL}.", "learning_rate", "0.00123")


class ResultsPage(ServedPage):
    """The page with two runs: one that trained the small model, and an older one that was only written."""

    def open(self, number: int = 3) -> None:
        self.page.goto(self.url)
        self.page.get_by_text(("1 Dataset", "2 Train", "3 Results")[number - 1], exact=True).click()

    def train(self, data: Path) -> None:
        service.start({
            "output_name": "zzk", "trigger_word": "zzk", "train_data_dir": str(data), "resolution": "64", "min_bucket_reso": 64,
            "max_train_steps": 8, "network_dim": 2, "network_alpha": 2, "learning_rate": 0.01, "save_every_n_steps": 4,
            "validate_every_n_steps": 4, "sample_every_n_steps": 4, "sample_prompts": "zzk, a cat --s 2\na dog --s 2",
        }, runner=self.runner, host=self.host)

    def saves(self):
        return self.page.locator(".ltr-save")

    def tiles(self):
        """The pictures on the way of the page "2 Train"."""
        return self.page.locator("#lora_train_drawn .lora-train-tile")


@pytest.fixture(scope="module")
def shown(browser: object, tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ResultsPage]:
    folder = tmp_path_factory.mktemp("results")
    host = StandaloneHost(tiny_file, lora_folder=folder / "loras", runs_folder=folder / "runs")
    with opened_page(browser, patience_ms=PATIENCE_MS) as page, ResultsPage(folder, page, host=host) as made:
        made.open(3)
        # Nothing yet, and one way on.
        made.part("results_begin").click()
        expect(made.part("start")).to_be_visible()
        dataset = OwnedDataset.create(host.datasets_folder, "cats", concept="zzk")
        inner, = dataset.folder.glob("*_zzk")
        names = ("0.png", "1.png", "2.png", "3.png", f"{EVIL}.png")
        for name in names:
            Image.new("RGB", (64, 64), "red").save(inner / name)
        written = Run(folder, host, run="old-20261101-120000", values={"train_data_dir": str(dataset.folder)})
        written.save("zzk-old", 100)
        images_known = tuple(f"{inner.name}/{name}" for name in names)
        written.tell(events.ImageLosses(100, images_known, (0.5, 0.5, 0.5, 0.1, 1.0), (1.0,) * 5), REMEDY)
        written.record.close()
        made.train(images(folder / "data"))
        # Without a reload.
        expect(made.tiles()).to_have_count(6)
        expect(made.part("live")).to_contain_text("zzk is saved")
        yield made


def test_the_curve_and_the_pictures_of_a_run_are_seen_and_survive_a_reload(shown: ResultsPage):
    shown.open(2)
    expect(shown.part("live")).to_contain_text("zzk is saved")
    # The verdict is told once, on a line of its own.
    expect(shown.part("live").locator(".lora-train-verdict")).to_contain_text(re.compile(r"\w"))
    expect(shown.part("live").locator(".lora-train-outcome")).to_have_text(re.compile(r"zzk\.safetensors\.?$"))
    # Measured at the steps 0, 4 and 8; both lines pass through each.
    for line in ("held-out", "training"):
        expect(shown.page.locator(f"#lora_train_drawn path.{line}")).to_have_attribute("d", re.compile("^M[^L]+L[^L]+L[^L]+$"))
    expect(shown.tiles()).to_have_count(6)
    expect(shown.tiles().nth(0)).to_contain_text("base")
    expect(shown.tiles().nth(2).locator("img")).to_have_js_property("naturalWidth", 64)


def test_a_picture_is_seen_in_full_size_with_the_keyboard(shown: ResultsPage):
    shown.open(2)
    zoom, tiles = shown.part("zoom"), shown.tiles()
    tiles.nth(2).focus()
    shown.page.keyboard.press("Enter")
    expect(zoom).to_contain_text("step 8")
    expect(zoom).to_contain_text("zzk, a cat")
    shown.page.keyboard.press("ArrowLeft")
    expect(zoom).to_contain_text("step 4")
    shown.page.keyboard.press("ArrowDown")
    expect(zoom).to_contain_text("a dog")
    expect(zoom.locator("img")).to_have_js_property("naturalWidth", 64)
    shown.page.keyboard.press("Escape")
    expect(zoom).to_be_hidden()
    expect(tiles.nth(2)).to_be_focused()


def test_the_numbers_of_the_curve_are_told_beside_the_pointer_and_with_arrows(shown: ResultsPage):
    shown.open(2)
    plot, tip = (shown.page.locator(f"#lora_train_drawn .lora-train-{part}") for part in ("plot", "tip"))
    expect(plot.locator("circle.held-out")).to_have_count(3)
    plot.focus()
    for step in (8, 4, 0):
        plot.press("ArrowLeft")
        expect(tip).to_contain_text(re.compile(rf"step {step}(?!\d).*held-out [+−][\d.]+ %.*training [+−]"))
    plot.press("Escape")
    expect(tip).to_be_hidden()


def test_the_grid_is_painted_as_it_was_asked_for_and_judged(shown: ResultsPage):
    shown.open()
    expect(shown.saves()).to_have_count(2)
    shown.page.locator(".ltr-form summary").click()
    shown.part("grid_weights").fill("0.5 1")
    shown.part("grid_seeds").fill("8")
    shown.part("grid_prompts").fill("zzk, a cat\na dog")
    shown.part("grid_steps").fill("2")
    shown.part("paint_grid").click()
    rows = shown.page.locator(".ltr-row")
    expect(shown.page.locator(".ltr-notice")).to_contain_text("painted and judged")
    expect(rows).to_have_count(3)
    expect(rows.nth(0)).to_contain_text("Base model")
    expect(rows.nth(1).locator(".ltr-weight")).to_have_text([re.compile("^0.5"), re.compile("^1")])
    expect(rows.nth(2).locator(".ltr-cell img")).to_have_count(2)
    rows.nth(2).scroll_into_view_if_needed()
    expect(rows.nth(2).locator(".ltr-cell img").last).to_have_js_property("naturalWidth", 64)
    expect(rows.nth(2).locator(".ltr-numbers").first).to_contain_text(re.compile(r"likeness.*drift", re.DOTALL))
    # Another prompt of the same grid, in the same places.
    shown.part("grid_prompt").select_option(index=1)
    rows.nth(1).locator("button.ltr-cell").nth(1).click()
    expect(shown.part("zoom")).to_contain_text("at 1")
    expect(shown.part("zoom")).to_contain_text(re.compile("seed 8.*a dog"))
    shown.page.keyboard.press("Escape")


def test_a_save_is_taken_with_one_press_and_its_card_written(shown: ResultsPage):
    shown.open()
    first = shown.saves().first
    first.get_by_role("button", name="Take this one").click()
    expect(shown.page.locator(".ltr-notice")).to_contain_text("zzk.preview.png")
    expect(first).to_contain_text("the LoRA")
    card = json.loads((shown.host.lora_folder / "zzk.json").read_text(encoding="utf-8"))
    assert card["activation text"] == "zzk"
    with Image.open(shown.host.lora_folder / "zzk.preview.png") as preview:
        assert preview.width == 64
    shown.page.reload()
    expect(shown.saves().first).to_contain_text("the LoRA")


def test_marked_saves_are_compared_side_by_side(shown: ResultsPage):
    shown.open()
    for number in range(2):
        shown.page.locator(".ltr-mark").nth(number).check()
    shown.part("compare").click()
    expect(shown.part("zoom").locator("figure")).to_have_count(2)
    shown.page.keyboard.press("Escape")


def test_an_older_run_is_chosen_its_verdict_applied_and_its_pictures_named(shown: ResultsPage):
    shown.open()
    shown.part("results_run").select_option(index=1)
    expect(shown.page.locator("#ltr .lora-train-verdict")).to_contain_text(REMEDY.message)
    expect(shown.page.locator(".ltr-culprits li").nth(0)).to_contain_text(f"{EVIL}.png")
    expect(shown.page.locator(".ltr-culprits li")).to_have_count(1)
    shown.page.reload()
    shown.page.locator("#ltr").get_by_role("button", name="Apply").click()
    expect(shown.page.locator("#lora_train_learning_rate input").first).to_have_value("0.00123")
    # And the picture that was never learnt is one press away.
    shown.open()
    shown.page.locator(".ltr-culprit").click()
    expect(shown.page.locator(".lts-tile.lts-current")).to_have_attribute("data-id", f"{EVIL}.png")
    assert shown.page.evaluate("window.evil") is None
    assert not results.results_for(shown.host, shown.runner).tasks.running()


def test_a_verdict_is_applied_after_the_fields_are_filled_however_late_that_is(shown: ResultsPage):
    shown.open()
    shown.part("results_run").select_option(index=1)
    late = []

    def hold_the_first(route) -> None:
        if late:
            route.continue_()
        else:
            late.append(route)
            late.append(route.fetch())

    shown.page.route("**/run/predict", hold_the_first)
    shown.page.reload()
    shown.page.locator("#ltr").get_by_role("button", name="Apply").click()
    # Asked again meanwhile, the server answers without values, and then with a plan.
    expect(shown.part("summary").first).to_contain_text(re.compile(r"\w"))
    while len(late) < 2:  # its own answer is on its way
        shown.page.wait_for_timeout(50)
    route, answer = late
    route.fulfill(response=answer)
    rate = shown.page.locator("#lora_train_learning_rate input").first
    expect(rate).to_have_value("0.00123")
    assert rate.get_attribute("step") == "0.00001"
    shown.page.unroute("**/run/predict")


def test_a_learning_rate_is_found_and_applied_with_one_press(shown: ResultsPage, monkeypatch):
    pytest.importorskip("prodigyopt")
    monkeypatch.setattr(start, "plan_finder", functools.partial(rate_finder.plan_finder, steps=20))
    shown.open(2)
    expect(shown.page.locator("#lora_train_restored textarea, #lora_train_restored input")).to_have_value("restored")
    for name, value in (("output_name", "zzk"), ("train_data_dir", str(shown.folder / "data")), ("resolution", "64")):
        box = shown.page.locator(f"#lora_train_{name} input, #lora_train_{name} textarea").first
        box.fill(value)
        box.blur()
    shown.part("find_rate").click()
    verdict = shown.part("live").locator(".lora-train-verdict")
    expect(verdict).to_contain_text(re.compile("A learning rate of [0-9.e-]+ suits"))
    value = re.search(r"of ([0-9.e-]+) suits", verdict.inner_text())[1]
    verdict.get_by_role("button", name="Apply").click()
    assert float(shown.page.locator("#lora_train_learning_rate input").first.input_value()) == float(value)
    assert not list(shown.host.lora_folder.glob("*learning-rate*"))


def test_on_a_phone_the_results_are_no_wider_than_the_screen(shown: ResultsPage):
    shown.page.set_viewport_size({"width": 390, "height": 800})
    shown.open()
    expect(shown.saves().first).to_be_visible()
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 390
    shown.page.set_viewport_size({"width": 1280, "height": 900})


def test_a_save_is_exported_for_others_and_what_cannot_be_pushed_says_why(shown: ResultsPage):
    page = shown.page
    shown.open()
    shown.saves().last.get_by_role("button", name="Share").click()
    expect(shown.part("share_name")).to_be_focused()
    shown.part("share_name").fill("for others")
    shown.part("export").click()
    expect(page.locator(".ltr-notice")).to_contain_text("Ready to upload")
    made, = shown.host.runs_folder.glob("*/export/for others")
    assert {"for others.safetensors", "description.txt"} <= {path.name for path in made.iterdir()}
    shown.part("repository").fill("no such/name/x")
    shown.part("push").click()
    expect(page.locator(".ltr-notice")).to_contain_text("is no repository of the hub")
    shown.part("share_close").click()
    expect(shown.part("share")).to_be_hidden()
