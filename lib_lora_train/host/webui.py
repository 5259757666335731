"""The host that AUTOMATIC1111's WebUI is: the model comes from its memory, the result goes to its LoRA folder.

    webui.py            the host: the lock, the loan, what is loaded
    webui_model.py      what is lent: tensors by reference, hints, tokenizers; where they lie; whether they changed
    webui_loras.py      the built-in Lora extension: its merged LoRAs taken out, its list renewed
    webui_fence.py      the folders a run may touch while others reach the WebUI
    webui_queue.py      a turn in the WebUI's queue
    webui_progress.py   the WebUI's own progress display and stop buttons

Importable inside the WebUI only. Written for v1.10.1.

"Reload UI" presses the WebUI's own stop button, so a training ends within a step and keeps what it learnt, as every
other work of the WebUI does; `end_before_reload` waits for it. The runner and this host stay in `sys.modules`, so the
rebuilt page still shows how that run ended.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from modules import call_queue, paths, sd_models, shared

from lib_lora_train.errors import HostError, translated
from lib_lora_train.events import Event, Saved, Stage, Step
from lib_lora_train.fence import Fence
from lib_lora_train.host import webui_fence, webui_loras, webui_model
from lib_lora_train.host.port import Borrowed, Checkpoint, Outline
from lib_lora_train.host.webui_progress import ProgressDisplay
from lib_lora_train.host.webui_queue import Turn
from lib_lora_train.model.family import detect
from lib_lora_train.runner import Runner

RELOAD_PATIENCE = 60.0
"""Seconds that "Reload UI" waits for a run to save and end. A step and a save take less; if not, the run goes on and
ends by itself, which harms nothing."""


class WebUIHost:
    """Lends the WebUI's loaded model. At most one loan at a time: the WebUI's own queue sees to that."""

    def __init__(self) -> None:
        self._display: ProgressDisplay | None = None
        self._witness: webui_model.Witness | None = None
        self._holder: int | None = None
        self._turn: Turn | None = None

    @property
    def lora_folder(self) -> Path:
        """Where the Lora extension looks (--lora-dir)."""
        return Path(shared.cmd_opts.lora_dir)

    @property
    def runs_folder(self) -> Path:
        """Beside the WebUI's other data (--data-dir)."""
        return Path(paths.data_path) / "lora_train_runs"

    @property
    def fence(self) -> Fence | None:
        """Where others reach the WebUI: its own folders, and those its owner added."""
        return webui_fence.fence()

    def checkpoint(self) -> Checkpoint | None:
        """What is loaded now. `shared.sd_model` would wait for a model that is being loaded, or load one: not asked."""
        sd_model = sd_models.model_data.sd_model
        return None if sd_model is None else webui_model.describe(sd_model)

    def outline(self) -> Outline | None:
        """The shapes of what is loaded now; None for a model of another kind."""
        sd_model = sd_models.model_data.sd_model
        return None if sd_model is None or not webui_model.describe(sd_model).family else webui_model.outline(sd_model)

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Borrowed]:
        """Wait in the WebUI's queue, then lend the model, without LoRAs and on the device, until the block is left.

        LoRAs that were merged are not merged again at the end: the WebUI does so itself at the next generation.
        """
        webui_model.refuse_lowvram()
        display = ProgressDisplay()
        self._turn = Turn(call_queue.queue_lock)
        with display.queued(), self._turn.held(), display.running():
            # May load the model, or wait for the thread that loads it at the start.
            sd_model = shared.sd_model
            if sd_model is None:
                raise HostError("No model is loaded", remedy="choose a checkpoint at the top of the page")
            webui_model.refuse_kind(sd_model)
            webui_loras.take_out(sd_model)
            with translated("moving the model to the device"), webui_model.placed(sd_model) as device:
                tensors = webui_model.collect(sd_model)
                hints = webui_model.hints(sd_model)
                detect(tensors, hints)
                borrowed = Borrowed(
                    tensors, hints, webui_model.describe(sd_model), device, webui_model.tokenizers(sd_model),
                    clip_skip=int(shared.opts.CLIP_stop_at_last_layers),
                    comma_padding_backtrack=int(shared.opts.comma_padding_backtrack))
                self._witness = webui_model.Witness(sd_model, tensors)
                self._display, self._holder = display, threading.get_ident()
                try:
                    yield borrowed
                finally:
                    self._display = self._witness = self._holder = None

    def waiting(self) -> bool:
        """Whether a borrower waits in the WebUI's queue, mostly behind a generation."""
        return self._turn is not None and self._turn.waiting()

    def give_up(self) -> None:
        """End that wait with Interrupted."""
        if self._turn is not None:
            self._turn.give_up()

    def interrupted(self) -> bool:
        """Whether Interrupt, Stop or Reload UI was pressed since the model was lent."""
        return self._display is not None and self._display.interrupted()

    def report(self, event: Event) -> None:
        """Keep the WebUI's progress display and list of LoRAs true.

        Raises HostError where the lent model is no longer what it was.
        """
        if self._display is None:
            return
        self._display.show(event)
        if isinstance(event, Saved):
            webui_loras.refresh()
        # A few ways of changing the model do not wait in the queue. Better to end than to train on two models.
        if self._witness is not None and isinstance(event, (Step, Stage)):
            self._witness.check()

    def refresh_loras(self) -> None:
        """List the LoRA folder anew, and forget everything of the old contents of an overwritten file."""
        held = self._holder == threading.get_ident()
        with contextlib.nullcontext() if held else call_queue.queue_lock:
            webui_loras.refresh()


def end_before_reload(runner: Runner) -> None:
    """Ask a running job to keep what it learnt and end, and wait for it, so that the page is rebuilt around a quiet
    WebUI. For `on_script_unloaded`."""
    if runner.stop(save=True):
        runner.wait(RELOAD_PATIENCE)


def api_access() -> tuple[bool, str]:
    """Whether the WebUI offers its API to other programs, and its users as --api-auth has them, "" for none.

    The WebUI checks them for its own routes only.
    """
    return bool(shared.cmd_opts.api or shared.cmd_opts.nowebui), shared.cmd_opts.api_auth or ""


HOST = WebUIHost()
"""The one host. Like the runner it outlives a reload of the page: the scripts are run again, the package is not."""
