"""The same in every WebUI, driven through a real browser: it trains, the LoRA works, and nothing else changed.

Runs in whichever WebUI WEBUI_ROOT names. The tests of one module share its one process, and the first of them meets it as it
is before any model was loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.browser import expect, needs_browser, opened_page, sync_api
from tests.ui.test_languages import bracketed, untranslated
from tests.webui.installation import installed
from tests.webui.running import LOADS_LATER, REPOSITORY, WebUI, fill, running, until
from tests.webui.test_page import Tab
from tests.webui.test_queue import QUEUE, add_from_page, chosen, ended, press, trained_on
from tests.webui.test_training import assert_unchanged

pytestmark = needs_browser
PATIENCE_S = 300
"""A model of the published size makes a step in seconds."""
PATIENCE_MS = PATIENCE_S * 1000
STEPS = 3
MANY = 100_000
PROMPT = "a photo of a cat"


@pytest.fixture(scope="module")
def webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """A WebUI with two checkpoints, neither of which is loaded where the WebUI can wait with that."""
    data = tmp_path_factory.mktemp("host")
    fill(data)
    installed().write_checkpoint(data / "models" / "Stable-diffusion", "other")
    yield from running(data, *({LOADS_LATER} & installed().switches))
    shutil.rmtree(data / "models")


@pytest.fixture
def tab(webui: WebUI, browser: object) -> Iterator[Tab]:
    with opened_page(browser, patience_ms=PATIENCE_MS) as page:
        session = Tab(webui, page)
        session.open()
        yield session
        webui.stop_training()


@pytest.fixture(scope="module")
def before(webui: WebUI) -> dict[str, Any]:
    """The image of a fixed seed and every tensor of the model, before anything but the first test."""
    return {"picture": webui.sample(PROMPT), "model": webui.get("/probe/model")}


def trained(tab: Tab, dataset: Path, name: str, *, steps: int = STEPS) -> Path:
    """The file that a run from the page leaves."""
    press_train(tab, dataset, name, steps=steps)
    ready(tab, name)
    return tab.webui.loras / f"{name}.safetensors"


def press_train(tab: Tab, dataset: Path, name: str, *, steps: int) -> None:
    """Fill the fields and press the button, again where what the page puts back came only after them: on a busy machine it may
    be late."""
    for _ in range(3):
        tab.fill(name, dataset, steps=steps)
        tab.part("start").click()
        with contextlib.suppress(AssertionError):
            until(lambda: tab.webui.get("/lora-train/v1/status")["name"] == name, what=f"{name} begins", seconds=15)
            return
    pytest.fail(f"{name} did not begin: {tab.part('answer').inner_text()}")


def ready(tab: Tab, name: str) -> None:
    """Wait until the page says that the LoRA is made; fails at once where it says that it is not."""
    until(lambda: re.search(rf"{name} is (ready|saved)", tab.part("live").inner_text()) or tab.part("answer").inner_text(),
          what=f"{name} is made", seconds=PATIENCE_S)
    assert tab.part("answer").inner_text() == ""


def long_run() -> int:
    """Steps that take longer than two images."""
    return 20 if installed().knows_models_by_size else 80


def started(tab: Tab, dataset: Path, name: str, *, steps: int = MANY) -> None:
    """A run from the page, in its midst."""
    press_train(tab, dataset, name, steps=steps)

    def learning() -> bool:
        status = tab.webui.get("/lora-train/v1/status")
        return status["name"] == name and status["running"] and bool(status["step"])

    until(learning, what="the first step is made", seconds=PATIENCE_S)


def assert_same_weights(webui: WebUI, before: dict[str, Any]) -> None:
    """As `assert_unchanged`, but for requires_grad, which reForge itself clears where it takes a LoRA out of a layer."""
    def weights(model: dict[str, Any]) -> dict[str, str]:
        return {name: digest.rpartition(" ")[0] for name, digest in model["digests"].items()}

    assert webui.sample(PROMPT) == before["picture"], "the picture of the same seed is another one"
    assert weights(webui.get("/probe/model")) == weights(before["model"]), "a tensor or its dtype changed"


def test_a_model_that_is_not_loaded_yet_is_loaded_for_the_training(webui: WebUI, dataset: Path, tab: Tab) -> None:
    status = webui.get("/lora-train/v1/status")
    assert not status["running"]
    expect(tab.part("model")).to_contain_text("tiny")
    assert trained(tab, dataset, "earliest").is_file()


def test_a_folder_becomes_a_lora_that_the_page_paints_with(
        webui: WebUI, before: dict[str, Any], dataset: Path, tab: Tab) -> None:
    assert trained(tab, dataset, "from_page").is_file()
    assert_unchanged(webui, before)
    tab.part("send").click()
    prompt = tab.page.locator("#txt2img_prompt textarea")
    expect(prompt).to_be_visible()
    expect(prompt).to_have_value("zzk, <lora:from_page:1>")
    tab.page.locator("#txt2img_generate").click()
    expect(tab.page.locator("#html_info_txt2img").first).to_contain_text("<lora:from_page:1>")
    expect(tab.page.locator("#txt2img_gallery img").first).to_be_visible()
    assert webui.sample(f"{PROMPT} <lora:from_page:1>") != before["picture"]
    assert_same_weights(webui, before)


def test_a_lora_that_is_merged_before_the_start_is_not_trained_on(
        webui: WebUI, before: dict[str, Any], dataset: Path, tab: Tab) -> None:
    bare = load_file(trained(tab, dataset, "bare"))
    webui.sample(f"{PROMPT} <lora:bare:1>")  # its LoRA stays merged until the next image
    assert webui.get("/probe/model") != before["model"]
    again = load_file(trained(tab, dataset, "again"))
    assert again.keys() == bare.keys() and all(again[key].equal(bare[key]) for key in bare)
    assert_same_weights(webui, before)


def test_an_overwritten_file_is_read_again(webui: WebUI, before: dict[str, Any], dataset: Path, tab: Tab) -> None:
    trained(tab, dataset, "replaced")
    old, run = webui.sample(f"{PROMPT} <lora:replaced:1>"), webui.get("/lora-train/v1/status")["run"]
    tab.fill("replaced", dataset, steps=2)
    tab.part("start").click()
    tab.part("overwrite_it").click()

    until(lambda: webui.get("/lora-train/v1/status")["run"] != run, what="the second run begins")
    until(lambda: webui.get("/lora-train/v1/status")["finished"], what="it ends", seconds=PATIENCE_S)
    assert webui.sample(f"{PROMPT} <lora:replaced:1>") not in (old, before["picture"])
    assert_same_weights(webui, before)


def test_stop_changes_nothing_and_leaves_no_file(webui: WebUI, before: dict[str, Any], dataset: Path, tab: Tab) -> None:
    tab.page.on("dialog", lambda dialog: dialog.accept())
    started(tab, dataset, "dropped")
    tab.part("stop").click()
    expect(tab.part("live")).to_contain_text("Stopped after")
    assert not list(webui.loras.glob("dropped*"))
    assert_same_weights(webui, before)


def test_an_exception_in_the_midst_changes_nothing_and_is_told(
        webui: WebUI, before: dict[str, Any], dataset: Path, tab: Tab) -> None:
    webui.post("/probe/fail", {"step": 3})
    tab.fill("broken", dataset, steps=STEPS + 2)
    tab.part("start").click()
    expect(tab.part("live")).to_contain_text("the probe broke this step")
    assert_same_weights(webui, before)


def test_a_reloaded_page_finds_the_run_and_generates_in_between(
        webui: WebUI, before: dict[str, Any], dataset: Path, tab: Tab) -> None:
    alone = load_file(trained(tab, dataset, "alone", steps=long_run()))
    started(tab, dataset, "shared", steps=long_run())
    tab.open()
    expect(tab.part("live")).to_contain_text("shared")
    expect(tab.part("start")).to_be_disabled()
    images = [webui.sample(PROMPT), webui.sample(f"{PROMPT} <lora:alone:1>")]
    assert webui.get("/lora-train/v1/status")["running"], "they were painted after the end"
    assert images[0] == before["picture"] != images[1]
    ready(tab, "shared")
    shared = load_file(webui.loras / "shared.safetensors")
    assert shared.keys() == alone.keys() and all(shared[key].equal(alone[key]) for key in alone)
    assert_same_weights(webui, before)


def test_a_checkpoint_that_is_switched_in_between_is_not_trained_on(
        webui: WebUI, before: dict[str, Any], dataset: Path, tab: Tab) -> None:
    alone = load_file(trained(tab, dataset, "single", steps=long_run()))
    started(tab, dataset, "patient", steps=long_run())
    webui.post("/sdapi/v1/options", {"sd_model_checkpoint": "other.safetensors"})
    assert webui.sample(PROMPT) != before["picture"]
    webui.post("/sdapi/v1/options", {"sd_model_checkpoint": "tiny.safetensors"})
    ready(tab, "patient")
    patient = load_file(webui.loras / "patient.safetensors")
    assert patient.keys() == alone.keys() and all(patient[key].equal(alone[key]) for key in alone)
    assert webui.sample(PROMPT) == before["picture"]


def test_a_queued_run_is_trained_on_the_checkpoint_it_was_added_on_and_the_users_is_back(
        webui: WebUI, before: dict[str, Any], dataset: Path, tab: Tab) -> None:
    webui.post(f"{QUEUE}/hold", {"held": True})
    with webui.option("sd_model_checkpoint", "other.safetensors"):
        add_from_page(tab, dataset, "elsewhere", steps=STEPS)
    add_from_page(tab, dataset, "here", steps=STEPS)
    press(tab, "Go on with the queue")
    assert ended(webui, seconds=PATIENCE_S) == {"elsewhere": "done", "here": "done"}
    found = trained_on(webui)
    assert (found["elsewhere"], found["here"]) == ("other", "tiny")
    assert chosen(webui) == "tiny.safetensors" and webui.sample(PROMPT) == before["picture"]


def test_the_tab_follows_the_webuis_localization(webui: WebUI, browser: object, dataset: Path) -> None:
    """In the language of `tests/ui/test_languages.py`, in place of the Chinese one: the WebUI and our script both translate,
    and what neither did stands outside of the brackets, what both did in two pairs."""
    (webui.data / "extensions" / "lora-train" / "localizations" / "zh_CN.json").write_text(
        json.dumps(bracketed()), encoding="utf-8")
    webui.post("/sdapi/v1/options", {"localization": "zh_CN"})
    webui.post("/probe/reload")
    webui.wait_for_start(2)
    with opened_page(browser, patience_ms=PATIENCE_MS) as page:
        tab = Tab(webui, page)
        page.goto(webui.url)
        for place, shown in (("1 Dataset", "choose"), ("2 Train", "summary"), ("3 Results", "results")):
            tab.turn("‹Train LoRA›")
            tab.turn(f"‹{place}›")
            expect(tab.part(shown)).to_contain_text("‹")
            if place == "2 Train":
                for fold in page.locator("#lora_train_settings .label-wrap").all():
                    fold.click()
                tab.box("train_data_dir").fill(str(dataset))
                tab.box("train_data_dir").blur()
                expect(tab.part("summary")).to_contain_text("4 pictures")
            assert untranslated(page) == []
            assert not re.search("‹‹[^‹›]*››", page.locator("#lora_train").inner_text())


def test_the_log_tells_of_no_error_of_ours(webui: WebUI, before: dict[str, Any]) -> None:
    traces = webui.log.split("Traceback (most recent call last)")[1:]
    ours = [trace for trace in traces if "lib_lora_train" in trace[:5000] and "the probe broke this step" not in trace[:5000]]
    assert ours == []


def test_installing_the_extension_changes_nothing_of_the_webuis_environment() -> None:
    listing = ("import importlib.metadata as m, json; "
               "print(json.dumps(sorted((d.metadata['Name'], d.version) for d in m.distributions())))")

    def environment() -> str:
        return subprocess.check_output([installed().python, "-c", listing], text=True)

    before = environment()
    subprocess.run([installed().python, str(REPOSITORY / "install.py")], cwd=installed().root, check=True, timeout=120,
                   env={**os.environ, "PYTHONPATH": str(installed().root)})  # as the WebUI runs it
    assert "torch" in before and environment() == before


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """A WebUI whose page asks for a login and whose API for another."""
    data = tmp_path_factory.mktemp("guarded")
    fill(data)
    yield from running(data, "--gradio-auth", "ann:pw-of-ann", "--api-auth", "bob:pw-of-bob",
                       *({LOADS_LATER} & installed().switches), login="bob:pw-of-bob")
    shutil.rmtree(data / "models")


def test_the_apis_password_is_asked_for(guarded: WebUI) -> None:
    assert not guarded.get("/lora-train/v1/status")["running"]
    for login in ("", "bob:guess"):
        with pytest.raises(AssertionError, match="401"):
            dataclasses.replace(guarded, login=login).get("/lora-train/v1/status")


def test_who_logs_in_at_the_page_trains_there(guarded: WebUI, browser: object, dataset: Path) -> None:
    inside = Path(shutil.copytree(dataset, guarded.data / "pictures"))
    with opened_page(browser, patience_ms=PATIENCE_MS) as page:
        page.goto(guarded.url)
        page.get_by_label(re.compile("username", re.I)).fill("ann")
        page.get_by_label(re.compile("password", re.I)).fill("pw-of-ann")
        page.get_by_role("button", name=re.compile("log ?in", re.I)).click()
        tab = Tab(guarded, page)
        until(lambda: page.get_by_text("Train LoRA", exact=True).count(), what="the page is shown", seconds=PATIENCE_S)

        def loaded() -> bool:
            with contextlib.suppress(sync_api.Error):  # what gradio 4 itself loads after the login is in the way
                page.goto(guarded.url)
                return True
            return False

        until(loaded, what="the page can be loaded", seconds=PATIENCE_S)
        tab.open()
        assert trained(tab, inside, "behind_the_door").is_file()
