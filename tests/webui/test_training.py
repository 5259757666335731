"""A folder of images becomes a LoRA inside the WebUI, and the WebUI is afterwards what it was before."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tests.webui.running import WebUI, until

PROMPT = "a photo of a cat"
MANY = 100_000


@pytest.fixture(scope="module")
def before(webui: WebUI) -> dict[str, Any]:
    """The image of a fixed seed and every tensor of the model, before anything was trained in this module."""
    return {"picture": webui.sample(PROMPT), "model": webui.get("/probe/model")}


@pytest.fixture(scope="module")
def trained(webui: WebUI, dataset: Path, before: dict[str, Any]) -> str:
    """The name of a LoRA with a strong effect on UNet and text encoder, saved in fp32."""
    finished = train(webui, dataset, "first")
    assert finished["outcome"] == "done", finished
    assert Path(finished["path"]) == webui.loras / "first.safetensors"
    return "first"


def start(webui: WebUI, dataset: Path, name: str, **settings: object) -> None:
    webui.post("/lora-train/v1/start", {"settings": {
        "output_name": name, "train_data_dir": str(dataset), "resolution": "64", "max_train_steps": 8, "network_dim": 4,
        "network_alpha": 4, "learning_rate": 2e-3, "network_train_unet_only": False, "text_encoder_lr": 2e-3,
        "save_precision": "float", **settings}})


def status(webui: WebUI) -> dict[str, Any]:
    return webui.get("/lora-train/v1/status")


def ended(webui: WebUI) -> dict[str, Any]:
    return until(lambda: status(webui)["finished"], what="the training ends", seconds=120)


def train(webui: WebUI, dataset: Path, name: str, **settings: object) -> dict[str, Any]:
    start(webui, dataset, name, **settings)
    return ended(webui)


def learning(webui: WebUI, *, steps: int = 2) -> None:
    """Wait until some steps are made."""
    until(lambda: (status(webui)["step"] or {"step": 0})["step"] >= steps, what="steps are made")


def assert_unchanged(webui: WebUI, before: dict[str, Any]) -> None:
    assert webui.sample(PROMPT) == before["picture"], "the picture of the same seed is another one"
    assert webui.get("/probe/model") == before["model"], "a tensor, its dtype or its requires_grad changed"


def test_training_leaves_the_picture_and_every_tensor_as_they_were(
        webui: WebUI, before: dict[str, Any], trained: str) -> None:
    assert_unchanged(webui, before)
    assert before["model"]["gradients"] == []


def test_the_file_is_used_without_a_restart(webui: WebUI, before: dict[str, Any], trained: str) -> None:
    assert webui.sample(f"{PROMPT} <lora:{trained}:1>") != before["picture"]
    assert webui.sample(PROMPT) == before["picture"]


def test_every_key_of_the_file_finds_its_layer(webui: WebUI, trained: str) -> None:
    with safe_open(webui.loras / f"{trained}.safetensors", "pt") as file:
        layers = {key.partition(".")[0] for key in file.keys()}
    assert len(layers) == 192 + 18  # the UNet of SD1; three layers of the text encoder, six each
    found = webui.get(f"/probe/lora?name={trained}")
    assert found["complaints"] == [] and len(found["modules"]) == len(layers)


def test_weight_zero_equals_no_lora_byte_for_byte(webui: WebUI, before: dict[str, Any], trained: str) -> None:
    assert webui.sample(f"{PROMPT} <lora:{trained}:0>") == before["picture"]


@pytest.mark.parametrize("multiplier", [1.0, 0.5, -1.0])
def test_our_prediction_with_the_lora_equals_the_webuis_with_the_file(
        webui: WebUI, trained: str, multiplier: float) -> None:
    found = webui.post("/probe/parity", {"name": trained, "prompt": "a photo of zzk", "multiplier": multiplier})
    assert found["effect"] > 0.02 and found["text_effect"] > 0.02, "the LoRA changes too little to compare anything"
    assert found["difference"] <= 1e-3 and found["text"] <= 1e-3, found


def test_a_lora_in_half_precision_is_used_as_well(webui: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    assert train(webui, dataset, "half", save_precision="fp16")["outcome"] == "done"
    found = webui.post("/probe/parity", {"name": "half", "prompt": "a photo of zzk"})
    assert found["difference"] <= 1e-3 < found["effect"], found


def test_a_lora_that_is_active_is_not_trained_on(
        webui: WebUI, dataset: Path, before: dict[str, Any], trained: str) -> None:
    with_lora = webui.sample(f"{PROMPT} <lora:{trained}:1>")
    assert webui.get(f"/probe/lora?name={trained}")["merged"] > 0
    train(webui, dataset, "again")  # the settings and the seed of `trained`, which was made on the bare model
    first, again = (load_file(webui.loras / f"{name}.safetensors") for name in (trained, "again"))
    assert first.keys() == again.keys() and all(first[key].equal(again[key]) for key in first)
    assert webui.sample(f"{PROMPT} <lora:{trained}:1>") == with_lora
    assert_unchanged(webui, before)


def test_stopping_changes_nothing_and_leaves_no_file(webui: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    start(webui, dataset, "stopped", max_train_steps=MANY)
    learning(webui)
    webui.post("/lora-train/v1/stop", {"save": False})
    assert ended(webui)["outcome"] == "stopped"
    assert not list(webui.loras.glob("stopped*"))
    assert_unchanged(webui, before)


def test_stop_and_save_keeps_what_was_learnt(webui: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    start(webui, dataset, "kept", max_train_steps=MANY)
    learning(webui)
    webui.post("/lora-train/v1/stop", {"save": True})
    finished = ended(webui)
    assert finished["outcome"] == "stopped" and Path(finished["path"]) == webui.loras / "kept.safetensors"
    assert webui.sample(f"{PROMPT} <lora:kept:1>") != before["picture"]
    assert_unchanged(webui, before)


def test_a_training_that_waits_for_a_generation_can_be_stopped_at_once(webui: WebUI, dataset: Path) -> None:
    painting = threading.Thread(target=lambda: webui.sample(steps=150, width=256, height=256))
    painting.start()
    until(lambda: webui.get("/sdapi/v1/progress?skip_current_image=true")["state"]["job_count"] > 0, what="it paints")
    start(webui, dataset, "waiting")
    until(lambda: status(webui)["waiting"], what="the training waits")
    webui.post("/lora-train/v1/stop", {"save": False})
    finished = ended(webui)
    assert painting.is_alive()
    assert finished["outcome"] == "stopped" and "waited for other work" in finished["message"]
    webui.post("/sdapi/v1/interrupt")
    painting.join(60)
    assert train(webui, dataset, "not_waiting")["outcome"] == "done"


def test_the_webuis_own_interrupt_ends_it_within_a_step_and_not_what_comes_next(
        webui: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    start(webui, dataset, "interrupted", max_train_steps=MANY)
    learning(webui)
    webui.post("/sdapi/v1/interrupt")
    at = status(webui)["step"]["step"]
    finished = ended(webui)
    assert finished["outcome"] == "stopped" and finished["steps"] <= at + 2
    assert (webui.loras / "interrupted.safetensors").is_file()
    assert_unchanged(webui, before)


def test_an_exception_in_the_loop_changes_nothing_and_is_told(
        webui: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    webui.post("/probe/fail", {"step": 3})
    finished = train(webui, dataset, "broken")
    assert finished["outcome"] == "failed" and "the probe broke this step" in finished["message"]
    assert "the probe broke this step" in webui.log
    assert [path.name for path in webui.loras.glob("broken*.safetensors")] == ["broken-step00000002.safetensors"]
    assert_unchanged(webui, before)
    assert train(webui, dataset, "mended")["outcome"] == "done"


def test_a_model_that_is_changed_meanwhile_ends_the_training(
        webui: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    start(webui, dataset, "changed", max_train_steps=MANY)
    learning(webui)
    webui.post("/probe/change_weights")
    finished = ended(webui)
    assert finished["outcome"] == "failed" and "was changed while it was trained on" in finished["message"]


def test_an_overwritten_lora_is_used_with_its_new_weights(webui: WebUI, dataset: Path, trained: str) -> None:
    train(webui, dataset, "replaced")
    old = webui.sample(f"{PROMPT} <lora:replaced:1>")
    assert webui.get("/probe/state")["conditions"], "the WebUI keeps the condition of the last prompt"
    train(webui, dataset, "replaced", overwrite=True, seed=7)
    new = webui.sample(f"{PROMPT} <lora:replaced:1>")
    assert new != old
    # A file that the WebUI has never seen is read from the disk.
    shutil.move(webui.loras / "replaced.safetensors", webui.loras / "never-seen.safetensors")
    assert webui.sample(f"{PROMPT} <lora:never-seen:1>") == new
    (webui.loras / "never-seen.safetensors").unlink()
    webui.post("/sdapi/v1/refresh-loras")


def test_a_file_replaced_by_somebody_else_is_used_after_a_refresh(webui: WebUI, dataset: Path, trained: str) -> None:
    train(webui, dataset, "swapped", seed=8)
    mine = webui.sample(f"{PROMPT} <lora:swapped:1>")
    # Older than what is loaded, so the time of the file says nothing.
    shutil.copy2(webui.loras / f"{trained}.safetensors", webui.loras / "swapped.safetensors")
    webui.post("/probe/refresh")
    swapped = webui.sample(f"{PROMPT} <lora:swapped:1>")
    (webui.loras / "swapped.safetensors").unlink()
    webui.post("/sdapi/v1/refresh-loras")
    assert mine != swapped == webui.sample(f"{PROMPT} <lora:{trained}:1>")


def test_a_name_that_exists_is_refused_before_anything_starts(webui: WebUI, dataset: Path, trained: str) -> None:
    with pytest.raises(AssertionError, match="There is a LoRA called 'first' already"):
        start(webui, dataset, trained)
    assert not status(webui)["running"]


def test_it_waits_in_the_webuis_queue_and_is_listed_there(webui: WebUI, dataset: Path) -> None:
    webui.post("/probe/hold")
    try:
        start(webui, dataset, "queued")
        tasks = until(lambda: webui.get("/internal/pending-tasks")["tasks"], what="the job is listed as waiting")
        assert [task for task in tasks if task.startswith("task(lora-train-")] == tasks
        assert status(webui)["step"] is None
    finally:
        webui.post("/probe/release")
    assert ended(webui)["outcome"] == "done"
    assert webui.get("/internal/pending-tasks")["tasks"] == []


def test_a_picture_waits_for_a_training_that_lets_nobody_through_and_is_painted_without_it(
        webui: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    start(webui, dataset, "busy", max_train_steps=20, yield_to_generations=False)
    learning(webui, steps=1)
    generated: list[str] = []
    generation = threading.Thread(target=lambda: generated.append(webui.sample(PROMPT)))
    generation.start()
    assert ended(webui)["outcome"] == "done"
    generation.join(60)
    assert generated == [before["picture"]]


def test_the_webuis_progress_display_tells_the_truth(webui: WebUI, dataset: Path) -> None:
    start(webui, dataset, "shown", max_train_steps=MANY)
    learning(webui)
    shown = webui.get("/sdapi/v1/progress?skip_current_image=true")
    task, step = shown["state"]["job"], status(webui)["step"]["step"]
    assert task.startswith("task(lora-train-") and shown["state"]["job_count"] == MANY
    assert 2 <= shown["state"]["job_no"] <= step and shown["textinfo"].startswith("Training: step ")
    bar = webui.post("/internal/progress", {"id_task": task})
    assert bar["active"] and not bar["queued"] and 0 < bar["progress"] < 0.01
    webui.post("/lora-train/v1/stop", {"save": False})
    ended(webui)
    bar = webui.post("/internal/progress", {"id_task": task})
    assert bar["completed"] and not bar["active"]
    assert webui.get("/sdapi/v1/progress?skip_current_image=true")["state"]["job_count"] == 0


def test_what_cannot_be_trained_on_is_refused_in_a_sentence_and_the_queue_goes_on(webui: WebUI) -> None:
    refused = webui.get("/probe/refusals")
    assert "--lowvram" in refused["lowvram"] and "--medvram" in refused["lowvram"]
    assert "No model is loaded" in refused["no model"]
    assert "Stable Diffusion 3" in refused["sd3"] and "SSD-1B" in refused["ssd"]
    assert "instruct-pix2pix" in refused["edit"] and "inpainting" in refused["inpainting"]
    assert "quantised" in refused["fp8"]
    assert webui.sample(PROMPT)
