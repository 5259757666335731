"""The queue in a real WebUI: each run on its own checkpoint, the user's one back at the end, and what a kill leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.webui.running import WebUI, fill, running, until
from tools import tiny_checkpoint

QUEUE = "/lora-train/v1/queue"


def add(webui: WebUI, dataset: Path, name: str, **settings: object) -> str:
    return webui.post(f"{QUEUE}/add", {"settings": {
        "output_name": name, "train_data_dir": str(dataset), "resolution": "64", "max_train_steps": 3, "network_dim": 2,
        "sample_images": False, "save_state": True, **settings}})["id"]


def entries(webui: WebUI) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in webui.get(QUEUE)["entries"]}


def ended(webui: WebUI) -> dict[str, str]:
    """How each ended, once none waits."""
    def states() -> dict[str, str]:
        found = {name: entry["state"] for name, entry in entries(webui).items()}
        return {} if {"waiting", "running"} & set(found.values()) else found
    return until(states, what="the queue is empty", seconds=240)


def chosen(webui: WebUI) -> str:
    return webui.get("/sdapi/v1/options")["sd_model_checkpoint"].split(" ")[0]


def test_each_trains_on_its_checkpoint_and_one_that_fails_stops_nobody(tmp_path: Path, dataset: Path) -> None:
    """Also after the WebUI is killed in the middle of a run: that one is offered to be resumed, the others go on."""
    data = tmp_path / "data"
    fill(data)
    tiny_checkpoint.write(data / "models" / "Stable-diffusion", name="second", seed=1)
    lost = shutil.copytree(dataset, tmp_path / "lost")
    server = running(data)
    webui = next(server)
    webui.post(f"{QUEUE}/hold", {"held": True})
    add(webui, dataset, "one")
    add(webui, lost, "two")
    with webui.option("sd_model_checkpoint", "second.safetensors"):
        add(webui, dataset, "three")
    add(webui, dataset, "long", max_train_steps=100_000, save_every_n_steps=2)
    add(webui, dataset, "last")
    shutil.rmtree(lost)
    assert chosen(webui) == "tiny.safetensors"
    webui.post(f"{QUEUE}/hold", {"held": False})
    until(lambda: entries(webui)["long"]["state"] == "running" and (
        webui.get("/lora-train/v1/status")["step"] or {"step": 0})["step"] > 4, what="the long one trains", seconds=240)
    states = {name: entry["state"] for name, entry in entries(webui).items()}
    assert states == {"one": "done", "two": "failed", "three": "done", "long": "running", "last": "waiting"}
    assert "lost" in entries(webui)["two"]["message"]
    models = {run["name"]: (data / "lora_train_runs" / run["id"] / "events.jsonl").read_text(encoding="utf-8")
              for run in webui.get("/lora-train/v1/runs")["runs"]}
    assert '"checkpoint": "tiny"' in models["one"] and '"checkpoint": "second"' in models["three"]
    assert chosen(webui) == "tiny.safetensors"
    webui.process.kill()
    with pytest.raises(StopIteration):
        next(server)

    server = running(data)
    webui = next(server)
    assert ended(webui) == {"one": "done", "two": "failed", "three": "done", "long": "interrupted", "last": "done"}
    interrupted = entries(webui)["long"]
    assert interrupted["resumable"]
    webui.post(f"{QUEUE}/retry", {"id": interrupted["id"], "resume": True})
    now = until(lambda: (found := webui.get("/lora-train/v1/status"))["run"] == interrupted["run"] and found["step"] and found,
                what="it goes on", seconds=120)
    assert now["planned"]["resumed_at"] >= 2
    webui.post("/lora-train/v1/stop", {"save": True})
    assert ended(webui)["long"] == "stopped"
    server.close()
