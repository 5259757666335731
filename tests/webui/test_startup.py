"""A training starts with what the WebUI holds already, and takes no more of its device than it needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.webui.running import WebUI, fill, running
from tests.webui.test_training import MANY, PROMPT, ended, learning, start, status, train

STEPS = 30


def test_a_second_run_opens_no_file_of_the_checkpoint_and_copies_no_weight(webui: WebUI, dataset: Path) -> None:
    cached = {"cache_latents_to_disk": True, "network_train_unet_only": True}
    assert train(webui, dataset, "cold", **cached)["outcome"] == "done"
    models = webui.data / "models" / "Stable-diffusion"
    webui.post("/probe/watch")
    # What is opened by other means than Python's is not seen, but what is not there cannot be opened.
    models.rename(webui.data / "elsewhere")
    try:
        assert train(webui, dataset, "warm", **cached)["outcome"] == "done"
    finally:
        (webui.data / "elsewhere").rename(models)
    seen = webui.get("/probe/watched")
    session = [Path(name) for name in seen["opened"]]
    assert any("warm" in path.parts[-2] for path in session), "the watch sees nothing: not even the run's own folder"
    assert any(".lora_train_cache" in path.parts for path in session), "the latents were not read from their cache"
    assert [path for path in session if models in path.parents] == []
    # What was trained on is the WebUI's memory to the last byte.
    assert seen["copied"] == [0]


@pytest.fixture(scope="module")
def small_card(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """A WebUI whose model lies on a pretended GPU, of which a run wants everything off that its steps do not need."""
    data = tmp_path_factory.mktemp("card")
    fill(data)
    for webui in running(data):
        webui.post("/probe/pretend_card")
        yield webui


@pytest.fixture(scope="module")
def before(small_card: WebUI) -> dict[str, Any]:
    found = {"picture": small_card.sample(PROMPT), "model": small_card.get("/probe/model")}
    assert _all_at_home(small_card)
    return found


def _all_at_home(webui: WebUI) -> bool:
    """Whether a generation finds all of the model on the GPU."""
    webui.get("/probe/places")
    webui.sample(PROMPT)
    painting = webui.get("/probe/places")["painting"]
    return bool(painting) and not any(painting)


def test_text_encoders_and_vae_lie_aside_while_it_learns_and_come_back(
        small_card: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    small_card.get("/probe/places")
    frozen = {"network_train_unet_only": True, "max_train_steps": STEPS}
    ended = train(small_card, dataset, "alone", **frozen)
    assert ended["outcome"] == "done", ended["message"]
    assert small_card.get("/probe/places")["training"] == [["vae", "text"]] * STEPS
    assert _all_at_home(small_card)
    assert small_card.sample(PROMPT) == before["picture"] and small_card.get("/probe/model") == before["model"]


def test_a_generation_in_between_finds_them_at_home_and_they_lie_aside_again(
        small_card: WebUI, dataset: Path, before: dict[str, Any]) -> None:
    frozen = {"network_train_unet_only": True, "max_train_steps": STEPS}
    if not (small_card.loras / "alone.safetensors").is_file():
        train(small_card, dataset, "alone", **frozen)
    small_card.get("/probe/places")
    start(small_card, dataset, "shared", **frozen)
    learning(small_card, steps=1)
    images = [small_card.sample(PROMPT), small_card.sample(f"{PROMPT} <lora:alone:1>"), small_card.sample(PROMPT)]
    assert status(small_card)["running"], "they were painted at the end"
    assert ended(small_card)["outcome"] == "done"
    places = small_card.get("/probe/places")
    assert len(places["painting"]) == 12 and not any(places["painting"])
    assert places["training"] == [["vae", "text"]] * STEPS
    assert images[0] == images[2] == before["picture"] != images[1]
    assert _all_at_home(small_card) and small_card.get("/probe/model") == before["model"]
    alone, shared = (load_file(small_card.loras / f"{name}.safetensors") for name in ("alone", "shared"))
    assert alone.keys() == shared.keys() and all(alone[key].equal(shared[key]) for key in alone)


@pytest.mark.parametrize("end", ["stop", "failure"])
def test_they_come_back_however_it_ends(small_card: WebUI, dataset: Path, before: dict[str, Any], end: str) -> None:
    if end == "failure":
        small_card.post("/probe/fail", {"step": 3})
    start(small_card, dataset, f"ended-by-{end}", network_train_unet_only=True, max_train_steps=MANY)
    if end == "stop":
        learning(small_card)
        small_card.post("/lora-train/v1/stop", {"save": False})
    assert ended(small_card)["outcome"] == ("failed" if end == "failure" else "stopped")
    assert ["vae", "text"] in small_card.get("/probe/places")["training"]
    assert _all_at_home(small_card)
    assert small_card.sample(PROMPT) == before["picture"] and small_card.get("/probe/model") == before["model"]
