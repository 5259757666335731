"""The WebUI's own switches for small GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.webui.running import WebUI, fill, running
from tests.webui.test_training import PROMPT, ended, learning, start, train


@pytest.fixture(scope="module", params=["--medvram", "--lowvram"])
def webui(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """A WebUI with the switch. On the CPU its parts do not move, but everything that would move them runs."""
    data = tmp_path_factory.mktemp("small")
    fill(data)
    yield from running(data, request.param)


def test_medvram_trains_and_paints_in_turns_and_lowvram_is_refused_with_the_reason(webui: WebUI, dataset: Path) -> None:
    image, model = webui.sample(PROMPT), webui.get("/probe/model")
    surroundings = webui.get("/probe/surroundings")
    assert surroundings["lowvram"], "the WebUI does not split its model"
    if "--lowvram" in webui.process.args:
        finished = train(webui, dataset, "refused")
        assert finished["outcome"] == "failed" and "--medvram" in finished["message"]
    else:
        assert train(webui, dataset, "alone", max_train_steps=40)["outcome"] == "done"
        assert webui.get("/probe/surroundings") == surroundings
        start(webui, dataset, "shared", max_train_steps=40)
        learning(webui, steps=1)
        webui.sample(f"{PROMPT} <lora:alone:1>")
        assert webui.sample(PROMPT) == image
        assert ended(webui)["outcome"] == "done"
        alone, shared = (load_file(webui.loras / f"{name}.safetensors") for name in ("alone", "shared"))
        assert alone.keys() == shared.keys() and all(alone[key].equal(shared[key]) for key in alone)
    assert webui.sample(PROMPT) == image and webui.get("/probe/model") == model
