"""The page in a real browser, on the server without a WebUI, with a job that goes as far as the test says."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib_lora_train import events
from lib_lora_train.api.queue import queue_for
from lib_lora_train.host.port import Checkpoint
from lib_lora_train.run import queue as queue_module
from lib_lora_train.run import runner as runner_module
from lib_lora_train.settings import parse
from tests.browser import ServedPage, expect, needs_browser, opened_page
from tests.fake_host import FakeJob, images, interrupted_run

pytestmark = needs_browser
PATIENCE_MS = 90_000
NOTIFICATIONS = """
    window.shown = [];
    window.Notification = class {
        static permission = "default";
        static async requestPermission() { return Notification.permission = window.answer || "denied"; }
        constructor(title, options) { window.shown.push(title + " | " + options.body); }
    };
    Object.defineProperty(document, "hidden", {get: () => Boolean(window.away)});
"""
"""Keeps what is shown in window.shown; leave is given once window.answer is "granted", and window.away hides the page."""


class Served(ServedPage):
    """The page with a job that the test moves on."""

    def __init__(self, folder: Path, page: object, job: FakeJob) -> None:
        super().__init__(folder, page)
        self.job = job

    def open(self, query: str = "") -> None:
        self.page.goto(self.url + query)
        self.page.get_by_text("2 Train", exact=True).click()
        expect(self.line("summary")).to_contain_text(re.compile(r"\w"))
        expect(self.box("restored")).to_have_value("restored")

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
    expect(served.part("sample")).to_be_enabled()

    served.part("stop_save").click()
    expect(live).to_contain_text("zzk is ready.")
    expect(live.locator("code")).to_have_text("<lora:zzk:1>")
    expect(served.part("start")).to_be_enabled()
    expect(served.part("stop_save")).to_be_disabled()
    expect(served.part("sample")).to_be_disabled()
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


def test_runs_wait_in_the_queue_are_changed_and_ordered_and_train_one_after_another(
        served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(queue_module, "_POLL_SECONDS", 0.05)
    entries = served.page.locator("#lora_train_queue li")
    served.page.add_init_script(f"{NOTIFICATIONS}; window.answer = 'granted'")
    served.open()
    served.part("notify").check()
    try:
        for name in ("one", "two", "three"):
            served.fill(name=name)
            served.part("queue_add").dblclick()
            expect(entries.filter(has_text=name)).to_have_count(1)
            expect(served.line("answer")).to_have_text("")
            expect(served.part("queue_add")).to_be_focused()
        expect(entries.nth(0)).to_contain_text("is being trained")
        served.part("queue_add").click()  # the same name once more
        expect(served.line("answer")).to_contain_text("choose another name")

        entries.filter(has_text="three").get_by_title("Earlier").press("Enter")
        expect(entries.nth(1)).to_contain_text("three")
        expect(entries.nth(1).get_by_role("button").first).to_be_focused()
        entries.filter(has_text="two").get_by_text("Edit").click()
        expect(served.box("output_name")).to_have_value("two")
        served.fill(name="second")
        served.part("queue").get_by_text("Keep the changes").click()
        expect(entries.nth(2)).to_contain_text("second")

        served.job.advance(100)
        expect(entries.nth(0)).to_contain_text("done")
        expect(entries.nth(1)).to_contain_text("is being trained")
        assert served.job.seen.save.output_name == "three"
        served.page.on("dialog", lambda dialog: dialog.accept())
        served.part("stop").click()
        expect(entries.nth(1)).to_contain_text("stopped")
        expect(entries.nth(2)).to_contain_text("is being trained")
        served.job.advance(1)
        expect(served.page.locator("#lora_train_live")).to_contain_text("1/100")  # of a run that was not seen no end is told
        served.job.advance(99)
        expect(entries.nth(2)).to_contain_text("done")
        entries.nth(1).get_by_text("Start anew").click()
        served.job.advance(100)
        expect(entries.nth(1)).to_contain_text("done")
        for begin in ("one: done |", "three: stopped |", "second: done |", "The queue has ended | 2 done, 1 not",
                      "The queue has ended | 3 done, 0 not"):
            served.page.wait_for_function("(begin) => window.shown.some((text) => text.startsWith(begin))", arg=begin)
        told = served.page.evaluate("window.shown")
        served.fill(name="four")
        later = datetime.datetime.now() + datetime.timedelta(hours=12)
        served.part("queue").locator("input[type=time]").fill(f"{later:%H:%M}")
        served.part("queue_add").click()
        expect(entries.nth(3)).to_contain_text("waits")
        entries.nth(3).get_by_title("Take it out").press("Enter")
        expect(entries).to_have_count(3)
        expect(entries.nth(2).get_by_title("Take it out")).to_be_focused()
        assert [text for text in served.page.evaluate("window.shown") if "queue" in text] == [t for t in told if "queue" in t]
        served.part("queue").get_by_text("Clear ended").click()
        expect(entries).to_have_count(0)
    finally:
        queue_for(served.host, served.runner).close()


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
    served.box("output_name").blur()
    # The plan of the name before is behind: its answer would take the refusal away.
    expect(served.line("summary")).to_contain_text("Train will ask before replacing it")
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


def test_the_queue_follows_the_buttons_where_no_run_is_shown(served: Served):
    served.open()
    apart = """() => document.querySelector(".lora-train-queue-bar").getBoundingClientRect().top
        - document.querySelector("#lora_train_before").getBoundingClientRect().bottom"""
    assert served.page.evaluate(apart) < 50
    served.fill()
    served.part("start").click()
    served.job.advance(FakeJob.TOTAL)
    expect(served.page.locator("#lora_train_live")).to_contain_text("zzk is ready.")
    expect(served.page.locator(".lora-train-curve svg")).to_be_visible()
    assert served.page.evaluate(apart) > 300


def test_on_a_phone_nothing_is_wider_than_the_screen(served: Served):
    served.page.set_viewport_size({"width": 390, "height": 800})
    served.open("?__theme=dark")
    served.fill()
    for drawn in served.page.locator("#lora_train_queue input").all():  # what the browser draws in a field is dark as well
        assert drawn.evaluate("input => getComputedStyle(input).colorScheme") == "dark"
    for fold in served.page.locator(".lora-train-fold").all():
        fold.click(position={"x": 20, "y": 15})
    served.part("start").click()
    served.job.advance(FakeJob.TOTAL)
    expect(served.page.locator("#lora_train_live")).to_contain_text("zzk is ready.")
    expect(served.page.locator(".lora-train-curve svg")).to_be_visible()
    assert served.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_run_that_waits_for_its_checkpoint_is_an_alert_with_the_step_reached_and_a_button(served: Served):
    waiting = events.Stage("Waiting until tiny.safetensors is chosen again", 0, 0, "tiny.safetensors [abc]")
    served.open()
    # As the WebUI has it, in its javascript/ui.js.
    served.page.evaluate("window.selectCheckpoint = (name) => { window.chosen = name; }")
    served.fill()
    served.part("start").click()
    served.job.advance(40)
    live = served.page.locator("#lora_train_live")
    expect(live).to_contain_text("40/100")
    alert = live.locator("[role=alert]")
    expect(alert).to_be_hidden()
    served.job.report(waiting)
    expect(alert).to_contain_text("Waiting until tiny.safetensors is chosen again. The run stands still at step 40/100.")
    served.part("choose_model").click()
    assert served.page.evaluate("window.chosen") == "tiny.safetensors [abc]"
    served.job.advance(1)
    expect(alert).to_be_hidden()


HOST = """() => {
    const add = (id, tag) => {
        const place = document.createElement("div");
        place.id = id;
        if (tag) place.append(Object.assign(document.createElement(tag), {type: "number"}));
        document.body.append(place);
        return place;
    };
    const box = document.createElement("textarea");
    add("txt2img_prompt").append(box);
    add("txt2img_width", "input");
    add("txt2img_height", "input");
    window.refreshed = 0;
    add("txt2img_lora_extra_refresh_internal").addEventListener("click", () => { window.refreshed += 1; });
}"""
"""The parts of txt2img that are used, by the WebUI's names."""


def test_each_saved_epoch_can_be_sent_to_txt2img_with_the_size_it_was_trained_at(served: Served):
    page = served.page
    served.open()
    page.evaluate(HOST)
    served.fill()
    served.part("start").click()
    served.job.advance(40)
    expect(page.locator("#lora_train_live")).to_contain_text("40/100")
    served.job.report(events.Saved("/loras/zzk-000004.safetensors", 40, 4, False))
    served.job.advance(60)
    which = served.part("which")
    expect(which.locator("option")).to_have_text(["zzk", "zzk-000004 · epoch 4 · step 40"])
    prompt, sides = page.locator("#txt2img_prompt textarea"), [page.locator(f"#txt2img_{s} input") for s in ("width", "height")]
    prompt.fill("a photo, <lora:other:1>,")
    for index, lora in ((1, "<lora:zzk-000004:1>"), (0, "<lora:zzk:1>")):
        which.select_option(index=index)
        served.part("send").click()
        expect(prompt).to_have_value(f"a photo, <lora:other:1>, zzk girl, {lora}")
    assert [side.input_value() for side in sides] == ["512", "768"]


@pytest.mark.parametrize(("trigger", "before", "after"), [
    ("miku (vocaloid)", "", r"miku \(vocaloid\), <lora:zzk:1>"),
    ("zzk", "<lora:zzk:0.7>", "<lora:zzk:0.7>, zzk"),
    ("cat", "a category, <lora:zzk-000004:0.6>, Sun", "a category, <lora:zzk:0.6>, Sun, cat"),
    ("猫 (x", r"猫 \(X, dog", r"猫 \(X, dog, <lora:zzk:1>")])
def test_txt2img_gets_the_trigger_word_literally_and_keeps_the_weight_that_was_set(
        served: Served, trigger: str, before: str, after: str):
    page = served.page
    served.open()
    page.evaluate(HOST)
    served.fill(trigger=trigger)
    served.part("start").click()
    served.job.advance(40)
    expect(page.locator("#lora_train_live")).to_contain_text("40/100")
    served.job.report(events.Saved("/loras/zzk-000004.safetensors", 40, 4, False))
    served.job.advance(60)
    expect(served.part("which").locator("option")).to_have_count(2)
    prompt = page.locator("#txt2img_prompt textarea")
    prompt.fill(before)
    for _ in range(2):
        served.part("send").click()
        expect(prompt).to_have_value(after)


def test_the_webuis_cards_are_not_refreshed_while_no_model_is_loaded(served: Served):
    page, model = served.page, served.host.checkpoint()
    served.open()
    page.evaluate(HOST)
    served.fill()
    served.part("start").click()
    served.job.advance(1)
    live = page.locator("#lora_train_live")
    expect(live).to_contain_text("1/100")
    served.host.checkpoint = lambda: None
    served.job.advance(99)
    expect(live).to_contain_text("zzk is ready.")
    assert page.evaluate("window.refreshed") == 0
    served.host.checkpoint = lambda: model
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_function("window.refreshed === 1")


def test_settings_are_suggested_for_a_purpose_and_put_into_the_fields(served: Served):
    served.open()
    served.fill()
    listed = served.page.locator("#lora_train_suggestions li")
    served.part("suggest").click()
    served.page.locator("#lora_train_suggestions").get_by_role("button", name="Style").click()
    expect(listed.filter(has_text=re.compile("^Flip"))).to_contain_text("A style is the same in a mirror")
    alpha = listed.filter(has_text=re.compile("^Alpha"))
    alpha.get_by_role("button", name="Apply").click()
    expect(alpha.get_by_role("button")).to_have_count(0)
    expect(served.box("network_alpha")).to_have_value("4")  # three pictures
    served.page.locator("#lora_train_suggestions").get_by_role("button", name="Apply all").click()
    expect(served.box("network_dim")).to_have_value("8")
    expect(served.page.locator("#lora_train_flip_aug input")).to_be_checked()
    expect(served.page.locator("#lora_train_suggestions").get_by_role("button", name="Apply")).to_have_count(0)


def test_the_preset_in_force_survives_a_reload_and_picking_it_applies_it(served: Served):
    shown = served.page.locator("#lora_train_preset input")

    def pick(name: str) -> None:
        shown.click()
        served.page.locator(f"ul.options li[data-value='{name}']").click()
    served.open()
    served.fill()
    pick("Style")
    expect(served.box("network_dim")).to_have_value("32")
    expect(served.box("max_train_steps")).to_have_value("")  # its 0
    served.box("network_dim").fill("77")
    served.box("network_dim").blur()
    expect(shown).to_have_value("Style, changed")
    served.page.reload()
    expect(shown).to_have_value("Style, changed")
    expect(served.box("network_dim")).to_have_value("77")
    pick("Style")
    expect(served.box("network_dim")).to_have_value("32")
    expect(shown).to_have_value("Style")
    served.box("network_dim").fill("55")
    pick("Style")
    expect(served.box("network_dim")).to_have_value("32")


def test_on_a_phone_train_and_the_curve_come_before_the_folded_settings(served: Served):
    served.page.set_viewport_size({"width": 390, "height": 800})
    served.open()
    served.fill()
    served.part("start").click()
    served.job.advance(40)
    expect(served.page.locator(".lora-train-curve svg")).to_be_visible()
    # All at one moment: the curve is drawn anew with each status.
    top = served.page.evaluate("(places) => places.map((one) => document.querySelector(one).getBoundingClientRect().top)", [
        "#lora_train_network_dim", "#lora_train_start", ".lora-train-curve svg", ".lora-train-fold"])
    assert top == sorted(top)


def test_a_dropped_file_fills_the_fields_and_is_told_and_a_preset_of_ones_own_is_saved_and_deleted(served: Served):
    served.open()
    page = served.page
    page.evaluate("""(text) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([text], "<b>old</b>.json"));
        for (const name of ["dragover", "drop"]) document.querySelector("#lora_train_page_train").dispatchEvent(
            new DragEvent(name, {dataTransfer: transfer, bubbles: true, cancelable: true}));
    }""", '{"LoRA_type": "Standard", "epoch": 7, "network_dim": "24", "nonsense": "<img src=x>"}')
    expect(served.box("network_dim")).to_have_value("24")
    expect(served.box("max_train_epochs")).to_have_value("7")
    told = page.locator(".lora-train-files-list")
    expect(told).to_contain_text("<b>old</b>.json · kohya_ss")
    expect(told.locator(".lora-train-files-refused")).to_contain_text("nonsense = <img src=x>")
    expect(told.locator(".lora-train-files-changed")).to_contain_text("read as max_train_epochs = 7")
    expect(served.box("preset")).to_have_value("Default, changed")

    answers = ["Mine", True]
    page.on("dialog", lambda dialog: dialog.accept(*(a for a in [answers.pop(0)] if a is not True)))
    page.get_by_role("button", name="Save preset").click()
    expect(served.box("preset")).to_have_value("Mine")
    with page.expect_download() as download:
        page.get_by_role("button", name="Share").click()
    assert "network_dim = 24" in Path(download.value.path()).read_text(encoding="utf-8")
    page.get_by_role("button", name="Delete").click()
    expect(served.box("preset")).to_have_value("Default, changed")
    expect(served.box("network_dim")).to_have_value("24")


def test_a_notice_of_the_end_comes_also_in_the_background_and_a_browser_that_refuses_says_so(served: Served):
    page = served.page
    page.add_init_script(NOTIFICATIONS)
    served.open()
    box = page.locator("#lora_train_notify")
    box.click()
    expect(page.locator(".lora-train-notice-said")).to_contain_text("does not allow notifications")
    expect(box).not_to_be_checked()
    page.evaluate("Object.defineProperty(window, 'isSecureContext', {value: false, configurable: true})")
    box.click()
    expect(page.locator(".lora-train-notice-said")).to_contain_text("localhost or with https")
    page.evaluate("Object.defineProperty(window, 'isSecureContext', {value: true}); window.answer = 'granted'")
    box.check()
    expect(page.locator(".lora-train-notice-said")).to_be_empty()

    asked: list[str] = []
    page.route("**/queue/webhook", lambda route: (asked.append(route.request.method),
                                                  route.fulfill(json={"webhook": "chat.example", "problem": ""})))
    page.on("dialog", lambda dialog: dialog.accept() if dialog.type == "prompt" else dialog.dismiss())
    with page.expect_event("dialog", lambda dialog: dialog.type == "confirm"):
        served.part("webhook").click()  # to look, and OK
    served.fill()
    served.part("start").click()
    served.job.advance(3)
    expect(page.locator("#lora_train_live")).to_contain_text("3/100")
    page.evaluate("window.away = true")
    served.job.advance(97)
    page.wait_for_function("window.shown.length > 0")
    assert page.evaluate("window.shown") == ["zzk: done | zzk is ready."]
    assert asked == ["GET"]
