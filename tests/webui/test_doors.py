"""A real WebUI that listens and asks for a login: its tab is no side door, and its paths are fenced."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.webui.running import WebUI, fill, running, until

USER, PASSWORD = "ann", "pw-of-ann"
PREFIX = "/lora-train/v1"


@pytest.fixture(scope="module")
def listening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """A WebUI that other machines reach, with a login for its page and none for its API."""
    data = tmp_path_factory.mktemp("listening")
    fill(data)
    yield from running(data, "--listen", "--gradio-auth", f"{USER}:{PASSWORD}")


@pytest.fixture
def stranger(listening: WebUI) -> Iterator[httpx.Client]:
    """Somebody who reaches the WebUI and knows no password."""
    with httpx.Client(base_url=listening.url, trust_env=False, timeout=120) as client:
        yield client


@pytest.fixture
def ann(listening: WebUI) -> Iterator[httpx.Client]:
    """Somebody who logged in at the page and shows what the page holds, as its script does."""
    with httpx.Client(base_url=listening.url, trust_env=False, timeout=120) as client:
        client.post("/login", data={"username": USER, "password": PASSWORD}).raise_for_status()
        components = client.get("/config").json()["components"]
        token = next(c["props"]["value"] for c in components if c["props"].get("elem_id") == "lora_train_token")
        client.headers["X-Lora-Train"] = token
        yield client


def settings(folder: Path, **more: object) -> dict[str, object]:
    return {"settings": {"output_name": "fenced", "train_data_dir": str(folder), "resolution": "64", "max_train_steps": 2,
                         "network_dim": 4, **more}}


def test_without_a_login_nothing_of_ours_answers_though_the_api_is_on(listening: WebUI, stranger: httpx.Client, dataset: Path):
    # The WebUI's own API has no password here; ours asks for the page's login all the same.
    assert stranger.get("/sdapi/v1/memory").status_code == 200
    for cookies in ({}, {"access-token": "guess"}, {"access-token-unsecure": "guess"}):
        stranger.cookies = httpx.Cookies(cookies)
        for name in ("status", "runs", "settings", "report"):
            assert stranger.get(f"{PREFIX}/{name}").status_code == 401, name
        for name, body in (("start", settings(dataset)), ("plan", settings(dataset)), ("stop", {})):
            assert stranger.post(f"{PREFIX}/{name}", json=body).status_code == 401, name
        assert stranger.get("/config").status_code == 401
        assert "lora_train_token" not in stranger.get("/").text
    assert not list(listening.loras.glob("*")) and not (listening.data / "lora_train_runs").exists()


def test_who_logged_in_may_ask_and_another_site_in_the_same_browser_may_not(ann: httpx.Client):
    token = ann.headers.pop("X-Lora-Train")
    assert ann.get(f"{PREFIX}/status").status_code == 200
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "https://evil.example"}):
        assert ann.post(f"{PREFIX}/stop", json={}, headers=headers).status_code == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert ann.post(f"{PREFIX}/start", content=b'{"settings": {}}', headers={"Content-Type": kind}).status_code == 415
    assert ann.get(f"{PREFIX}/status", headers={"X-Lora-Train": token}).status_code == 200
    assert ann.get(f"{PREFIX}/status", headers={"X-Lora-Train": "guess"}).status_code == 403


def test_gradios_own_route_starts_nothing_without_the_pages_token(ann: httpx.Client, listening: WebUI, dataset: Path):
    """A form or a script of another site can make the browser of somebody who is logged in send this."""
    config = ann.get("/config").json()
    ids = {c["id"]: c["props"].get("elem_id") for c in config["components"]}
    targets = {number: [target[0] if isinstance(target, list) else target for target in dependency["targets"]]
               for number, dependency in enumerate(config["dependencies"])}
    start = next(number for number, own in targets.items() if [ids.get(target) for target in own] == ["lora_train_start"])
    inside = listening.data / "own"
    shutil.copytree(dataset, inside, dirs_exist_ok=True)
    chosen = settings(inside)["settings"]
    inputs = config["dependencies"][start]["inputs"]
    values = {c["id"]: c["props"].get("value") for c in config["components"]}

    def ask(token: str) -> str:
        data = [chosen.get(str(ids[number]).removeprefix("lora_train_"), values[number]) for number in inputs]
        data[0] = token
        answer = ann.post("/run/predict", json={"fn_index": start, "data": data, "session_hash": "x"})
        return html.unescape(json.dumps(answer.json()))

    for token in ("", "guess"):
        assert "older than the server" in ask(token)
    assert ann.get(f"{PREFIX}/status").json()["run"] == ""
    assert "older than the server" not in ask(ann.headers["X-Lora-Train"])
    until(lambda: ann.get(f"{PREFIX}/status").json()["finished"], what="the training ends")
    assert ann.get(f"{PREFIX}/status").json()["finished"]["outcome"] == "done"


def test_datasets_and_results_keep_to_the_webuis_folders(ann: httpx.Client, listening: WebUI, dataset: Path, tmp_path: Path):
    inside = listening.data / "outputs" / "mine"
    shutil.copytree(dataset, inside)
    assert ann.post(f"{PREFIX}/plan", json=settings(inside)).status_code == 200
    (listening.data / "link").symlink_to(dataset)
    for outside in (dataset, listening.data / "link", inside / ".." / ".." / ".." / dataset.name, "//server/share", "C:x"):
        refused = ann.post(f"{PREFIX}/plan", json=settings(outside))
        assert refused.status_code == 400 and "others can reach this page" in refused.json()["error"], outside
    for folder in (tmp_path, listening.data / "extensions", inside):
        refused = ann.post(f"{PREFIX}/start", json=settings(inside, output_dir=str(folder)))
        assert refused.status_code == 400 and "Output folder" in refused.json()["error"]
    assert not list(tmp_path.iterdir())


def test_who_reaches_it_cannot_widen_the_fence(ann: httpx.Client, stranger: httpx.Client, dataset: Path):
    for client in (ann, stranger):
        client.post("/sdapi/v1/options", json={"lora_train_folders": "/", "outdir_samples": "/", "outdir_save": str(dataset)})
    assert ann.get("/sdapi/v1/options").json()["lora_train_folders"] == ""
    assert ann.post(f"{PREFIX}/plan", json=settings(dataset)).status_code == 400


def test_a_webui_of_ones_own_is_not_fenced_and_shows_the_setting(webui: WebUI, dataset: Path):
    assert webui.post(f"{PREFIX}/plan", settings(dataset))["steps"] == 2
    with webui.option("lora_train_folders", str(dataset)):
        assert webui.get("/sdapi/v1/options")["lora_train_folders"] in ("", str(dataset))
    assert re.search(r'"lora_train_folders"|setting_lora_train_folders', json.dumps(webui.get("/config")))
