"""The page in a real browser, on the server without a WebUI, with a job that goes as far as the test says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib_lora_train import events
from lib_lora_train.host.port import Checkpoint
from lib_lora_train.run import runner as runner_module
from lib_lora_train.settings import parse
from tests.browser import ServedPage, expect, needs_browser, opened_page
from tests.fake_host import FakeJob, images, interrupted_run

pytestmark = needs_browser
PATIENCE_MS = 90_000


class Served(ServedPage):
    """The page with a job that the test moves on."""

    def __init__(self, folder: Path, page: object, job: FakeJob) -> None:
        super().__init__(folder, page)
        self.job = job

    def open(self, query: str = "") -> None:
        self.page.goto(self.url + query)
        self.page.get_by_text("2 Train", exact=True).click()
        expect(self.line("summary")).to_contain_text(re.compile(r"\w"))

    def box(self, name: str):
        return self.page.locator(f"#lora_train_{name}").locator("input, textarea").first

    def line(self, name: str):
        # gradio 3 gives the id of an HTML component to the text in it as well.
        return self.page.locator(f"#lora_train_{name}").first

    def fill(self, name: str = "zzk", trigger: str = "zzk girl") -> None:
        folder = self.folder / "pictures"
        self.box("output_name").fill(name)
        self.box("trigger_word").fill(trigger)
        self.box("train_data_dir").fill(str(folder if folder.is_dir() else images(folder)))
        self.box("train_data_dir").blur()
        expect(self.line("summary")).to_contain_text("steps")


@pytest.fixture
def served(browser: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    job = FakeJob()
    monkeypatch.setattr(runner_module, "run_job", job)
    with opened_page(browser, patience_ms=PATIENCE_MS) as page, Served(tmp_path, page, job) as made:
        yield made


def test_a_run_is_started_watched_through_a_reload_and_stopped_with_its_result(served: Served):
    page, live = served.page, served.page.locator("#lora_train_live")
    served.open()
    expect(page.locator("#lora_train_model")).to_have_text("base: dreamshaper_8 [879db523c3] · SD1 · VAE: baked")
    expect(served.part("stop")).to_be_disabled()
    served.job.warning = "<b id=evil>one.png</b> cannot be read."
    served.fill()
    served.part("start").click()
    expect(live).to_contain_text("Encoding pictures 1/3")
    expect(served.part("start")).to_be_disabled()

    served.job.advance(40)
    expect(live).to_contain_text("40/100 · epoch 4/10 · 0:30 left")
    expect(page.locator(".lora-train-curve path.smooth")).to_have_attribute("d", re.compile("L"))
    expect(page.locator(".lora-train-warnings li").last).to_have_text(served.job.warning)
    expect(page.locator("#evil")).to_have_count(0)

    page.reload()
    expect(live).to_contain_text("40/100")
    expect(page.locator(".lora-train-curve path.raw")).to_have_attribute("d", re.compile(r"^M([^L]+L){39}[^L]+$"))
    expect(served.box("output_name")).to_have_value("zzk")
    expect(served.box("trigger_word")).to_have_value("zzk girl")
    expect(served.part("start")).to_be_disabled()

    served.part("stop_save").click()
    expect(live).to_contain_text("zzk is ready.")
    expect(live.locator("code")).to_have_text("<lora:zzk:1>")
    expect(served.part("start")).to_be_enabled()
    expect(served.part("stop_save")).to_be_disabled()
    expect(served.part("copy")).to_be_visible()
    # There is no txt2img here to send anything to.
    expect(served.part("send")).to_be_hidden()

    served.job.warning = "two.png cannot be read."
    served.fill(name="again")
    served.part("start").click()
    expect(page.locator(".lora-train-warnings li").last).to_have_text(served.job.warning)


def test_an_interrupted_run_is_offered_and_goes_on_with_its_own_settings(served: Served):
    data = images(served.folder / "pictures")
    chosen = parse({"output_name": "broken", "train_data_dir": str(data), "max_train_steps": 100, "network_dim": 3})
    run = interrupted_run(served.host, chosen, step=10)
    served.open()
    offer = served.page.locator(".lora-train-resume")
    expect(offer).to_contain_text("broken: Interrupted at step 12 of 100; it can be resumed from step 10.")
    served.part("resume_it").click()
    expect(served.part("stop")).to_be_enabled()
    expect(offer).to_be_hidden()
    assert served.runner.status().run == run
    assert (served.job.seen.save.resume, served.job.seen.network.network_dim) == (run, 3)
    served.job.advance(1)
    expect(served.page.locator("#lora_train_live")).to_contain_text("1/100")
    served.part("stop_save").click()
    expect(served.page.locator("#lora_train_live")).to_contain_text("broken is ready.")


def test_a_ruined_result_is_shown_as_a_problem_and_a_healthy_one_is_not(served: Served):
    served.open()
    for verdict, shown, css in (("ruined", "one is ruined.", re.compile("lora-train-problem")),
                                ("healthy", "two is ready.", re.compile("^lora-train-outcome$"))):
        served.job.verdict = verdict
        served.fill(name=shown.split()[0])
        served.part("start").click()
        served.job.advance(100)
        outcome = served.page.locator(".lora-train-outcome")
        expect(outcome).to_have_text(shown)
        expect(outcome).to_have_class(css)


def test_stopping_without_saving_asks_first(served: Served):
    answers = iter((False, True))
    served.page.on("dialog", lambda dialog: dialog.accept() if next(answers) else dialog.dismiss())
    served.open()
    served.fill()
    served.part("start").click()
    served.job.advance(5)
    live = served.page.locator("#lora_train_live")
    expect(live).to_contain_text("5/100")
    served.part("stop").click()
    served.job.advance(1)
    expect(live).to_contain_text("6/100")
    served.part("stop").click()
    expect(live).to_contain_text("nothing was saved")
    assert list(served.host.lora_folder.iterdir()) == []


def test_a_refusal_stands_beside_the_button_and_a_taken_name_can_be_overwritten(served: Served):
    served.open()
    served.part("start").click()
    answer = served.line("answer")
    expect(answer).to_contain_text("The LoRA has no name")
    (served.host.lora_folder / "zzk.safetensors").write_bytes(b"older")
    served.fill()
    expect(served.line("summary")).to_contain_text("Train will ask before replacing it")
    served.part("start").click()
    expect(answer).to_contain_text("There is a LoRA called 'zzk' already")
    served.job.advance(FakeJob.TOTAL)
    served.box("output_name").fill("other")
    served.box("output_name").blur()
    expect(served.part("overwrite_it")).to_be_hidden()
    expect(served.line("answer")).to_have_text("")
    served.box("output_name").fill("zzk")
    served.part("start").click()
    served.part("overwrite_it").click()
    expect(served.page.locator("#lora_train_live")).to_contain_text("zzk is ready.")
    expect(answer).to_have_text("")
    assert (served.host.lora_folder / "zzk.safetensors").read_bytes() == b"a LoRA"


def test_the_summary_follows_the_checkpoint(served: Served):
    served.open()
    served.fill()
    expect(served.line("summary")).to_contain_text("at 512×512")
    expect(served.line("model")).to_contain_text("SD1")
    served.host.checkpoint = lambda: Checkpoint("animagine", "animagine.safetensors", "sdxl")
    # The page comes back into sight.
    served.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(served.line("model")).to_contain_text("SDXL")
    expect(served.line("summary")).to_contain_text("at 1024×1024")


def test_control_and_enter_start_and_the_summary_follows_a_preset(served: Served):
    served.open()
    served.fill()
    served.page.locator("#lora_train_preset input").click()
    served.page.locator("ul.options li", has_text="Quick try").click()
    expect(served.line("summary")).to_contain_text("= 200 steps")
    expect(served.box("learning_rate")).to_have_value("0.0003")
    expect(served.box("output_name")).to_have_value("zzk")
    served.box("trigger_word").press("Control+Enter")
    expect(served.part("stop")).to_be_enabled()
    assert served.job.seen is not None and served.job.seen.optimizer.max_train_steps == 200


def test_on_a_phone_nothing_is_wider_than_the_screen(served: Served):
    served.page.set_viewport_size({"width": 390, "height": 800})
    served.open("?__theme=dark")
    served.fill()
    for fold in served.page.locator(".lora-train-fold").all():
        fold.click(position={"x": 20, "y": 15})
    served.part("start").click()
    served.job.advance(FakeJob.TOTAL)
    expect(served.page.locator("#lora_train_live")).to_contain_text("zzk is ready.")
    expect(served.page.locator(".lora-train-curve svg")).to_be_visible()
    assert served.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_what_a_run_waits_for_is_said_without_a_count(served: Served):
    served.job.stage = events.Stage("Waiting until tiny.safetensors is chosen again", 0, 0)
    served.open()
    served.fill()
    served.part("start").click()
    expect(served.page.locator("#lora_train_live .progress")).to_have_text("Waiting until tiny.safetensors is chosen again")
