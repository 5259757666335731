"""A real WebUI for the tests: filled with this extension and a small checkpoint, started, asked, stopped."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.webui.installation import installed

REPOSITORY = Path(__file__).parents[2]
EXTENSION_PARTS = ("lib_lora_train", "scripts", "javascript", "localizations", "install.py", "style.css",
                   "style_results.css")
START_SECONDS = 600
LOADS_LATER = "--skip-load-model-at-start"


@dataclasses.dataclass(frozen=True)
class WebUI:
    """A running WebUI: its address, its data folder and its process."""

    url: str
    data: Path
    process: subprocess.Popen[bytes]
    login: str = ""
    """user:password of its API, "" for none."""

    @property
    def loras(self) -> Path:
        return self.data / "models" / "Lora"

    @property
    def log(self) -> str:
        return (self.data / "webui.log").read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        return self._call(urllib.request.Request(self.url + path))

    def post(self, path: str, body: dict[str, object] | None = None) -> Any:
        return self._call(urllib.request.Request(
            self.url + path, json.dumps(body or {}).encode(), {"Content-Type": "application/json"}))

    def wait_for_start(self, times: int = 1) -> None:
        """Wait until it has started, or started again; read off its log: asked too early, while it still adds routes,
        this WebUI ends with an error."""
        def started() -> bool:
            assert self.process.poll() is None, f"the WebUI ended\n{self.log[-3000:]}"
            loads = LOADS_LATER not in self.process.args
            return self.log.count("Startup time:") >= times and (not loads or self.get("/probe/state")["loaded"])

        until(started, what="the WebUI starts", seconds=START_SECONDS)

    def _call(self, request: urllib.request.Request) -> Any:
        if self.login:
            request.add_header("Authorization", f"Basic {base64.b64encode(self.login.encode()).decode()}")
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{request.full_url}: {error.code} {error.read().decode()[:2000]}") from error

    def stop_training(self) -> None:
        """End the run under way, if there is one, without saving."""
        if self.get("/lora-train/v1/status")["running"]:
            self.post("/lora-train/v1/stop", {"save": False})
            until(lambda: not self.get("/lora-train/v1/status")["running"], what="the training ends")

    @contextlib.contextmanager
    def option(self, name: str, value: object) -> Iterator[None]:
        """One of the WebUI's settings, as it was again afterwards."""
        original = self.get("/sdapi/v1/options")[name]
        self.post("/sdapi/v1/options", {name: value})
        try:
            yield
        finally:
            self.post("/sdapi/v1/options", {name: original})

    def sample(self, prompt: str = "a photo of a cat", **settings: object) -> str:
        """txt2img by the WebUI's API with a fixed seed: the PNG as base64, its text left out by the WebUI's setting."""
        body = {"prompt": prompt, "negative_prompt": "red", "seed": 3, "steps": 4, "width": 64, "height": 64,
                "cfg_scale": 3, "sampler_name": "Euler", "scheduler": "Automatic", **settings}
        return self.post("/sdapi/v1/txt2img", body)["images"][0]


def until(condition: Callable[[], Any], *, what: str, seconds: float = 60) -> Any:
    """Ask until `condition` is true; its value. Fails, saying `what` did not happen, when time is out."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)


def fill(data: Path) -> None:
    """Settings, checkpoint, this extension and the probe, in a new data folder."""
    extension = data / "extensions" / "lora-train"
    extension.mkdir(parents=True)
    for part in EXTENSION_PARTS:
        source = REPOSITORY / part
        if source.is_dir():
            shutil.copytree(source, extension / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, extension / part)
    (data / "tmp").mkdir()  # Forge Neo writes the images for its page there, and makes it only where it installs
    shutil.copytree(Path(__file__).parent / "probe", data / "extensions" / "probe")
    for name in ("injection.py", "pretended_card.py"):
        shutil.copy(Path(__file__).parents[1] / name, data / "extensions" / "probe")
    (data / "config.json").write_text(json.dumps({
        # "Approx NN" would download a model; images with their settings inside would differ by the time they took.
        "samples_save": False, "grid_save": False, "show_progress_type": "Approx cheap", "enable_pnginfo": False,
        "sd_model_checkpoint": "tiny.safetensors",
        # Without this, Forge Neo takes the settings for an older version's and waits at its console.
        "VERSION_UID": "PY313"}))
    (data / "ui-config.json").write_text(json.dumps({
        "txt2img/Width/value": 64, "txt2img/Height/value": 64,
        "customscript/sampler.py/txt2img/Sampling steps/value": 2}))
    installed().write_checkpoint(data / "models" / "Stable-diffusion", "tiny")


def running(data: Path, *flags: str, login: str = "") -> Iterator[WebUI]:
    """The WebUI of WEBUI_ROOT on that data folder, from when it answers until the generator is closed."""
    installation = installed()
    root = installation.root
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False",
        # A small model gains nothing from threads, and they wait for each other on a machine that is busy.
        "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
        # The WebUI's own ldm, where it has one, even where a package of that name is installed.
        "PYTHONPATH": str(root / "repositories" / "stable-diffusion-stability-ai")}
    with open(data / "webui.log", "wb") as log:
        process = subprocess.Popen(
            [installation.python, "launch.py", *installation.flags(data), "--port", str(port), *flags],
            cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    webui = WebUI(f"http://127.0.0.1:{port}", data, process, login)
    try:
        webui.wait_for_start()
        yield webui
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
