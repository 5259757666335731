"""People go on painting, change the checkpoint and press every button while a training runs."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.webui.running import WebUI, fill, running, until
from tests.webui.test_training import MANY, PROMPT, assert_unchanged, ended, learning, start, status, train
from tools import tiny_checkpoint

STEPS = 60


@pytest.fixture(scope="module")
def webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """A WebUI with a second checkpoint."""
    data = tmp_path_factory.mktemp("shared")
    fill(data)
    tiny_checkpoint.write(data / "models" / "Stable-diffusion", name="other", seed=1)
    yield from running(data)


@pytest.fixture(scope="module")
def before(webui: WebUI, dataset: Path) -> dict[str, Any]:
    """The image, every tensor, and a LoRA that was trained while nobody else did anything."""
    found = {"picture": webui.sample(PROMPT), "model": webui.get("/probe/model")}
    assert train(webui, dataset, "alone", max_train_steps=STEPS)["outcome"] == "done"
    return {**found, "with LoRA": webui.sample(f"{PROMPT} <lora:alone:1>"), "option": chosen(webui)}


def chosen(webui: WebUI) -> str:
    return webui.get("/sdapi/v1/options")["sd_model_checkpoint"]


def choose(webui: WebUI, checkpoint: str) -> None:
    webui.post("/sdapi/v1/options", {"sd_model_checkpoint": checkpoint})


def assert_learnt_the_same(webui: WebUI, name: str) -> None:
    alone, shared = (load_file(webui.loras / f"{file}.safetensors") for file in ("alone", name))
    assert alone.keys() == shared.keys() and all(alone[key].equal(shared[key]) for key in alone)


def waits_for_its_model(webui: WebUI) -> None:
    stage = until(lambda: status(webui)["stage"], what="the training says what it waits for")
    assert stage["name"] == "Waiting until tiny.safetensors is chosen again"


def test_generations_are_let_through_and_neither_they_nor_the_training_notice(
        webui: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    start(webui, dataset, "shared", max_train_steps=STEPS)
    learning(webui, steps=1)
    images = [webui.sample(PROMPT), webui.sample(f"{PROMPT} <lora:alone:1>"), webui.sample(PROMPT)]
    assert status(webui)["running"], "they did not wait for the end"
    assert images == [before["picture"], before["with LoRA"], before["picture"]]
    webui.sample(f"{PROMPT} <lora:alone:1>")  # its LoRA is still merged when the training goes on
    assert ended(webui)["outcome"] == "done"
    assert_learnt_the_same(webui, "shared")
    assert_unchanged(webui, before)


def test_an_interrupt_of_a_generation_is_not_for_the_training(
        webui: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    start(webui, dataset, "undisturbed", max_train_steps=STEPS)
    learning(webui, steps=1)
    generation = threading.Thread(target=lambda: webui.sample(steps=150, width=256, height=256))
    generation.start()
    until(lambda: "txt2img" in webui.get("/sdapi/v1/progress?skip_current_image=true")["state"]["job"], what="it paints")
    assert status(webui)["waiting"]
    webui.post("/sdapi/v1/interrupt")
    generation.join(60)
    assert ended(webui)["outcome"] == "done"
    assert_learnt_the_same(webui, "undisturbed")


def test_a_training_that_lets_somebody_paint_can_be_stopped_at_once(
        webui: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    start(webui, dataset, "left", max_train_steps=MANY)
    learning(webui)
    generation = threading.Thread(target=lambda: webui.sample(steps=150, width=256, height=256))
    generation.start()
    until(lambda: status(webui)["waiting"], what="the training waits")
    webui.post("/lora-train/v1/stop", {"save": False})
    assert ended(webui)["outcome"] == "stopped" and generation.is_alive()
    webui.post("/sdapi/v1/interrupt")
    generation.join(60)
    assert_unchanged(webui, before)


def test_another_checkpoint_makes_it_wait_and_the_old_one_go_on(
        webui: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    start(webui, dataset, "patient", max_train_steps=STEPS)
    learning(webui, steps=1)
    choose(webui, "other")
    waits_for_its_model(webui)
    assert webui.sample(PROMPT) != before["picture"]  # with the other model, which the training leaves alone
    at = status(webui)["step"]["step"]
    choose(webui, before["option"])
    assert ended(webui)["outcome"] == "done" and at < STEPS
    assert_learnt_the_same(webui, "patient")
    assert_unchanged(webui, before)


def test_the_page_chooses_the_checkpoint_that_a_training_waits_for_by_one_press(
        webui: WebUI, dataset: Path, before: dict[str, Any], browser: object) -> None:
    from tests.browser import expect, opened_page  # skips where Playwright is not
    from tests.webui.test_page import PATIENCE_MS, Tab

    with opened_page(browser, patience_ms=PATIENCE_MS) as page:
        tab = Tab(webui, page)
        tab.open()
        start(webui, dataset, "chosen", max_train_steps=STEPS)
        learning(webui, steps=1)
        choose(webui, "other")
        expect(tab.part("live").locator("[role=alert]")).to_contain_text("The run stands still at step")
        tab.part("choose_model").click()
        assert ended(webui)["outcome"] == "done"
    assert_learnt_the_same(webui, "chosen")
    assert_unchanged(webui, before)


@pytest.mark.parametrize("save", [True, False])
def test_a_training_whose_model_was_exchanged_can_be_stopped(
        webui: WebUI, dataset: Path, before: dict[str, Any], save: bool) -> None:
    name = f"given-up-{save}"
    start(webui, dataset, name, max_train_steps=MANY)
    learning(webui)
    choose(webui, "other")
    waits_for_its_model(webui)
    webui.post("/lora-train/v1/stop", {"save": save})
    finished = ended(webui)
    choose(webui, before["option"])
    assert finished["outcome"] == "stopped" and finished["message"].startswith(f"Stopped after {finished['steps']} of")
    assert (webui.loras / f"{name}.safetensors").is_file() == save
    assert_unchanged(webui, before)


def test_a_call_from_outside_that_brings_its_own_checkpoint_gets_it_and_the_training_its_own_again(
        webui: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    start(webui, dataset, "outside", max_train_steps=STEPS)
    learning(webui, steps=1)
    assert webui.sample(PROMPT, override_settings={"sd_model_checkpoint": "other"}) != before["picture"]
    assert ended(webui)["outcome"] == "done"
    assert_learnt_the_same(webui, "outside")
    assert_unchanged(webui, before)


def test_unloading_and_loading_the_checkpoint_changes_nothing(
        webui: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    start(webui, dataset, "unloaded", max_train_steps=STEPS)
    learning(webui, steps=1)
    webui.post("/sdapi/v1/unload-checkpoint")
    learning(webui, steps=3)
    webui.post("/sdapi/v1/reload-checkpoint")
    assert ended(webui)["outcome"] == "done"
    assert_learnt_the_same(webui, "unloaded")
    assert_unchanged(webui, before)


def test_a_model_that_is_taken_away_ends_the_training_with_what_it_learnt(
        webui: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    start(webui, dataset, "bereft", max_train_steps=MANY)
    learning(webui)
    webui.post("/probe/discard")
    finished = ended(webui)
    webui.post("/probe/put_back")
    assert finished["outcome"] == "failed" and "The WebUI's model was unloaded" in finished["message"]
    kept, = webui.loras.glob("bereft*.safetensors")
    assert kept.name in finished["message"]
    assert_unchanged(webui, before)


def test_a_second_start_is_refused_and_the_first_goes_on(webui: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    start(webui, dataset, "only", max_train_steps=STEPS)
    learning(webui, steps=1)
    with pytest.raises(AssertionError, match="A training is running already"):
        start(webui, dataset, "second")
    assert ended(webui)["outcome"] == "done"
    assert_learnt_the_same(webui, "only")


def test_the_queue_and_the_progress_display_tell_who_waits_for_whom(
        webui: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    start(webui, dataset, "listed", max_train_steps=MANY)
    learning(webui)
    generation = threading.Thread(target=lambda: webui.sample(steps=150, width=256, height=256))
    generation.start()
    tasks = until(lambda: [task for task in webui.get("/internal/pending-tasks")["tasks"] if "lora-train" in task],
                  what="the training is listed as waiting")
    bar = webui.post("/internal/progress", {"id_task": tasks[0]})
    assert bar["queued"] and not bar["completed"]
    webui.post("/sdapi/v1/interrupt")
    generation.join(60)
    assert status(webui)["running"]
    webui.post("/lora-train/v1/stop", {"save": False})
    ended(webui)
    assert "Traceback" not in webui.log


def test_another_checkpoint_is_rendered_with_and_the_webui_holds_its_own_afterwards(
        webui: WebUI, before: dict[str, Any]) -> None:
    request = {"prompt": PROMPT, "negative_prompt": "red", "seed": 3, "steps": 4, "cfg_scale": 3}
    image, = webui.post("/probe/render", {**request, "checkpoint": "other"})["images"]
    assert webui.get("/probe/model") == before["model"]  # before a generation would load it
    theirs = webui.sample(PROMPT, override_settings={"sd_model_checkpoint": "other"})
    assert theirs != before["picture"] and pixels(image) == pixels(theirs)
    assert webui.post("/probe/render", {**request, "checkpoint": "not there"}) == {"error": "HostError"}
    assert_unchanged(webui, before)


def pixels(image: str) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB").tobytes()
