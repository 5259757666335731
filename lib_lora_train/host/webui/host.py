"""A WebUI as the host: the model comes from its memory, the result goes to its LoRA folder.

    host.py           the host: what is loaded, its folders, its display
    lease.py          one lease: set up, yielded to others in between, released
    model_access.py   what differs between the WebUIs: where the model is; whether it changed
    a1111.py          … in AUTOMATIC1111
    backend.py        … in Forge and Forge Neo
    patched.py        … in reForge and Forge Classic
    clones.py         active LoRAs of the Forges, out of the weights
    loras.py          the built-in Lora extension: its LoRAs out of the weights, its list renewed
    render.py         the WebUI's own text-to-image
    allowed_paths.py  the folders a run may touch while others reach the WebUI
    captioners.py     the WebUI's own BLIP and DeepDanbooru
    queue.py          a place in the WebUI's queue
    progress.py       the WebUI's own progress display and stop buttons

Importable inside a WebUI only.

The host stays in `sys.modules` when "Reload UI" runs the scripts again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from modules import call_queue, launch_utils, paths, shared
from PIL import Image

from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import HostError
from lib_lora_train.events import Event, Saved, Stage, Step
from lib_lora_train.host import placement
from lib_lora_train.host.port import Checkpoint, LeasedModel, Outline, RenderRequest, never
from lib_lora_train.host.webui import allowed_paths, loras, model_access, render
from lib_lora_train.host.webui import captioners as captioners_module
from lib_lora_train.host.webui.lease import WebUILease
from lib_lora_train.host.webui.queue import QueueLock
from lib_lora_train.settings.allowed_paths import AllowedPaths
from lib_lora_train.tagging.captioner import CaptionerSource

log = logging.getLogger(__name__)


class WebUIHost:
    """Leases the WebUI's loaded model. At most one lease at a time: the WebUI's own queue sees to that."""

    def __init__(self) -> None:
        self.access = model_access.choose()
        self._lease: WebUILease | None = None
        self._misplaced = placement.MisplacedTensors()
        data, models = Path(paths.data_path), Path(paths.models_path)  # --data-dir, --models-dir
        self.runs_folder, self.datasets_folder = data / "lora_train_runs", data / "lora_train_datasets"
        self.presets_folder = data / "lora_train_presets"
        self.models_folder, self.taggers_folder = models, models / "lora_train" / "taggers"

    @property
    def lora_folder(self) -> Path:
        """Where the Lora extension looks (--lora-dir)."""
        return Path(shared.cmd_opts.lora_dir)

    @property
    def allowed(self) -> AllowedPaths | None:
        """Where others reach the WebUI: its own folders, and those its owner added."""
        return allowed_paths.allowed()

    def captioners(self) -> Sequence[CaptionerSource]:
        """BLIP and DeepDanbooru where the WebUI has them, as the buttons beside img2img's prompt use them."""
        return captioners_module.captioners(self.access)

    def tokenizer_folder(self) -> Path | None:
        """Forge's and Forge Neo's, the latter of which has no open_clip."""
        folder = Path(paths.script_path, "backend", "huggingface", "runwayml", "stable-diffusion-v1-5", "tokenizer")
        return folder if folder.is_dir() else None

    def checkpoint(self) -> Checkpoint | None:
        """What is loaded now, or what would be loaded for a lease."""
        pending, sd_model = self._pending(), self.access.current()
        if pending is not None:
            return model_access.describe_pending(pending)[0]
        return None if sd_model is None else self.access.describe(sd_model)

    def outline(self) -> Outline | None:
        pending, sd_model = self._pending(), self.access.current()
        if pending is not None:
            return model_access.describe_pending(pending)[1]
        if sd_model is None or not self.access.describe(sd_model).family:
            return None
        return model_access.outline(self.access, sd_model)

    def select(self, title: str) -> str:
        """As a user who chooses it, in the queue."""
        if self._leased_here():
            raise HostError("The model is in use", why="this job trains on it", remedy="choose it before or after")
        with QueueLock(call_queue.queue_lock).held():
            return self.access.select(title)

    def _pending(self) -> Any:
        """As `ModelAccess.pending`; a lease does not care what others choose meanwhile."""
        return None if self._lease is not None else self.access.pending()

    @contextlib.contextmanager
    def lease(self, *, stop: ShouldStop = never) -> Iterator[LeasedModel]:
        """Wait in the WebUI's queue, then lease the model, without LoRAs and on the device, until the block is left.

        LoRAs that were merged are not merged again at the end: the WebUI does so itself at the next generation.
        """
        self.access.refuse_options()
        if self._lease is not None:
            raise HostError("The model is in use", remedy="wait for the other job to end")
        if (pending := self.access.pending()) is not None:
            model_access.refuse_pending(pending)
        self._lease = lease = WebUILease(self.access, QueueLock(call_queue.queue_lock), self._misplaced, stop=stop)
        try:
            with lease.leased():
                yield lease
        finally:
            self._lease = None

    def render(self, request: RenderRequest, *, stop: ShouldStop = never) -> list[Image.Image]:
        """As a generation of the user, which waits in the queue."""
        if self._leased_here():
            raise HostError("The model is in use", why="this job trains on it", remedy="render before or after it")
        return render.render(self.access, request, stop=stop)

    def waiting(self) -> bool:
        lease = self._lease
        return lease is not None and lease.queue.waiting()

    def idle(self) -> bool:
        """Whether the queue's lock is free: each generation, switch of the model and lease holds it."""
        free: bool = call_queue.queue_lock.acquire(blocking=False)
        if free:
            call_queue.queue_lock.release()
        return free

    def shares_model(self) -> bool:
        """Yes: who waits in the queue comes between two steps of a training."""
        return True

    def interrupted(self) -> bool:
        """Whether Interrupt, Stop or Reload UI was pressed while the model was leased."""
        lease = self._lease
        return lease is not None and lease.display.interrupted()

    def report(self, event: Event) -> None:
        """Keep the WebUI's progress display and list of LoRAs true.

        Raises HostError where the leased model is no longer what it was.
        """
        lease = self._lease
        if lease is None or lease.version_check is None:
            return
        # A few ways of changing the model do not wait in the queue. Better to end than to train on two models. Before what is
        # shown, whose errors end nothing.
        if isinstance(event, (Step, Stage)):
            lease.version_check.check()
        lease.display.show(event)
        if isinstance(event, Saved):
            loras.refresh(self.access)

    def refresh_loras(self) -> None:
        """List the LoRA folder anew, and forget everything of the old contents of an overwritten file.

        The result is saved by then, so an error of the Lora extension is logged and not raised.
        """
        try:
            with contextlib.nullcontext() if self._leased_here() else call_queue.queue_lock:
                loras.refresh(self.access)
        except Exception:
            log.exception("The WebUI's list of LoRAs could not be refreshed")

    def _leased_here(self) -> bool:
        """Whether the calling thread has the model leased now, and with it the queue's lock."""
        lease = self._lease
        return lease is not None and lease.version_check is not None and lease.thread == threading.get_ident()


def api_access() -> tuple[bool, str]:
    """Whether the WebUI offers its API to other programs, and its users as --api-auth has them, "" for none.

    The WebUI checks them for its own routes only.
    """
    return bool(shared.cmd_opts.api or shared.cmd_opts.nowebui), shared.cmd_opts.api_auth or ""


# What changes how a model is held or computed; no names, no passwords.
_FLAGS = ("medvram", "medvram_sdxl", "lowvram", "no_half", "no_half_vae", "upcast_sampling", "precision", "use_cpu", "xformers",
          "opt_sdp_attention", "disable_model_loading_ram_optimization", "api", "listen", "share")
_NAMES = {"a1111": "AUTOMATIC1111", "backend": "Forge", "patched": "reForge"}


def about() -> str:
    """Which WebUI this is, for a report of a problem: "AUTOMATIC1111 v1.10.1 medvram=True"."""
    flags = {name: value for name in _FLAGS if (value := getattr(shared.cmd_opts, name, None))}
    program = _NAMES[HOST.access.__name__.rpartition(".")[2]]
    return " ".join([f"{program} {launch_utils.git_tag()}", *(f"{name}={value}" for name, value in flags.items())])


HOST = WebUIHost()
"""The one host."""
