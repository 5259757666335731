"""What "Reload UI" does to a training, and what the API asks of a stranger."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.webui.running import WebUI, fill, running
from tests.webui.test_training import ended, learning, start, status, train

MANY = 100_000


@pytest.fixture(scope="module")
def webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """A WebUI of its own, whose API has a password."""
    data = tmp_path_factory.mktemp("reloaded")
    fill(data)
    yield from running(data, "--api-auth", "ann:secret", login="ann:secret")


@pytest.fixture(scope="module")
def dataset(dataset: Path, webui: WebUI) -> Path:
    """The images within the WebUI's own folder: a WebUI with a login keeps to that."""
    return Path(shutil.copytree(dataset, webui.data / "pictures"))


def test_reload_ui_ends_a_training_with_what_it_learnt_and_both_go_on_afterwards(webui: WebUI, dataset: Path) -> None:
    image = webui.sample()
    start(webui, dataset, "cut", max_train_steps=MANY)
    learning(webui)
    webui.post("/probe/reload")
    webui.wait_for_start(2)
    finished = status(webui)["finished"]
    assert finished["outcome"] == "stopped" and Path(finished["path"]) == webui.loras / "cut.safetensors"
    assert webui.sample() == image
    assert webui.sample("a photo of a cat <lora:cut:1>") != image
    assert train(webui, dataset, "after")["outcome"] == "done"
    assert "Traceback" not in webui.log


def test_without_the_apis_password_nothing_can_be_asked_or_started(webui: WebUI) -> None:
    for path, body in (("status", None), ("runs", None), ("start", b"{}"), ("stop", b"{}")):
        url = f"{webui.url}/lora-train/v1/{path}"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30)
        assert refused.value.code == 401


def test_runs_are_remembered(webui: WebUI, dataset: Path) -> None:
    train(webui, dataset, "noted")
    runs = webui.get("/lora-train/v1/runs")["runs"]
    assert runs[0]["name"] == "noted" and runs[0]["outcome"] == "done"
    assert (webui.data / "lora_train_runs" / runs[0]["id"] / "settings.toml").is_file()
    assert ended(webui)["outcome"] == "done"
