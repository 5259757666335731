"""The host that AUTOMATIC1111's WebUI is: the model comes from its memory, the result goes to its LoRA folder.

    webui.py            the host: what is loaded, who may borrow it
    webui_loan.py       one loan: set up, handed over to others in between, taken back
    webui_model.py      what is lent: tensors by reference, hints, tokenizers; where they lie; whether they changed
    aside.py            parts of it moved off the device while they are not needed
    webui_loras.py      the built-in Lora extension: its merged LoRAs taken out, its list renewed
    webui_fence.py      the folders a run may touch while others reach the WebUI
    webui_captioners.py the WebUI's own BLIP and DeepDanbooru
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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from modules import call_queue, paths, sd_models, shared

from lib_lora_train.errors import HostError
from lib_lora_train.events import Event, Report, Saved, Stage, Step
from lib_lora_train.host import placement
from lib_lora_train.host.a1111 import allowed_paths, loras, model
from lib_lora_train.host.a1111 import captioners as captioners_module
from lib_lora_train.host.a1111.lease import Lease
from lib_lora_train.host.a1111.queue import Turn
from lib_lora_train.host.port import Checkpoint, LeasedModel, Outline
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings.allowed_paths import AllowedPaths
from lib_lora_train.tagging.captioner import CaptionerSource

RELOAD_PATIENCE = 60.0
"""Seconds that "Reload UI" waits for a run to save and end. A step and a save take less; if not, the run goes on and
ends by itself, which harms nothing."""


class WebUIHost:
    """Lends the WebUI's loaded model. At most one loan at a time: the WebUI's own queue sees to that."""

    def __init__(self) -> None:
        self._loan: Lease | None = None
        self._strays = placement.Strays()

    @property
    def lora_folder(self) -> Path:
        """Where the Lora extension looks (--lora-dir)."""
        return Path(shared.cmd_opts.lora_dir)

    @property
    def runs_folder(self) -> Path:
        """Beside the WebUI's other data (--data-dir)."""
        return Path(paths.data_path) / "lora_train_runs"

    @property
    def datasets_folder(self) -> Path:
        """Beside the WebUI's other data (--data-dir)."""
        return Path(paths.data_path) / "lora_train_datasets"

    @property
    def allowed(self) -> AllowedPaths | None:
        """Where others reach the WebUI: its own folders, and those its owner added."""
        return allowed_paths.allowed()

    @property
    def models_folder(self) -> Path:
        """--models-dir."""
        return Path(paths.models_path)

    @property
    def taggers_folder(self) -> Path:
        """Beside the WebUI's other models (--models-dir)."""
        return Path(paths.models_path) / "lora_train" / "taggers"

    def captioners(self) -> Sequence[CaptionerSource]:
        """BLIP and DeepDanbooru, as the buttons beside img2img's prompt use them."""
        return captioners_module.captioners()

    def checkpoint(self) -> Checkpoint | None:
        """What is loaded now. `shared.sd_model` would wait for a model that is being loaded, or load one: not asked."""
        sd_model = sd_models.model_data.sd_model
        return None if sd_model is None else model.describe(sd_model)

    def outline(self) -> Outline | None:
        """The shapes of what is loaded now; None for a model of another kind."""
        sd_model = sd_models.model_data.sd_model
        return None if sd_model is None or not model.describe(sd_model).family else model.outline(sd_model)

    @contextlib.contextmanager
    def lease(self) -> Iterator[LeasedModel]:
        """Wait in the WebUI's queue, then lend the model, without LoRAs and on the device, until the block is left.

        LoRAs that were merged are not merged again at the end: the WebUI does so itself at the next generation.
        """
        model.refuse_lowvram()
        if self._loan is not None:
            raise HostError("The model is lent already", remedy="wait for the other job to end")
        self._loan = loan = Lease(Turn(call_queue.queue_lock), self._strays)
        try:
            with loan.lent() as borrowed:
                yield borrowed
        finally:
            self._loan = None

    def others_waiting(self) -> bool:
        """Whether a generation, a change of checkpoint or other work waits in the WebUI's queue."""
        return self._loan is not None and self._loan.turn.others_waiting()

    def yield_model(self, *, report: Report, stop: Callable[[], bool]) -> Mapping[str, torch.Tensor] | None:
        """Let through what waits, in the queue's order, then take the model back, bare of what was merged meanwhile.

        If another checkpoint or VAE was chosen, it waits until the lent one is chosen again.
        """
        assert self._loan is not None, "nothing is lent"
        return self._loan.yield_model(report=report, stop=stop)

    def offload_parts(self, parts: Collection[str]) -> Mapping[str, torch.Tensor]:
        """Move these parts of the loaded model to the CPU; generations that are let through find all of it in its place."""
        assert self._loan is not None, "nothing is lent"
        return self._loan.offload_parts(parts)

    def reload_parts(self, parts: Collection[str]) -> Mapping[str, torch.Tensor]:
        """Move these parts to the WebUI's device again."""
        assert self._loan is not None, "nothing is lent"
        return self._loan.reload_parts(parts)

    def waiting(self) -> bool:
        """Whether the borrower waits in the WebUI's queue, mostly behind a generation."""
        loan = self._loan
        return loan is not None and loan.turn.waiting()

    def stop_waiting(self) -> None:
        """End that wait: `borrow` raises Interrupted, `yield_model` returns None."""
        loan = self._loan
        if loan is not None:
            loan.turn.stop_waiting()

    def interrupted(self) -> bool:
        """Whether Interrupt, Stop or Reload UI was pressed while the model was lent."""
        loan = self._loan
        return loan is not None and loan.display.interrupted()

    def report(self, event: Event) -> None:
        """Keep the WebUI's progress display and list of LoRAs true.

        Raises HostError where the lent model is no longer what it was.
        """
        loan = self._loan
        if loan is None or loan.version_check is None:
            return
        loan.display.show(event)
        if isinstance(event, Saved):
            loras.refresh()
        # A few ways of changing the model do not wait in the queue. Better to end than to train on two models.
        if isinstance(event, (Step, Stage)):
            loan.version_check.check()

    def refresh_loras(self) -> None:
        """List the LoRA folder anew, and forget everything of the old contents of an overwritten file."""
        loan = self._loan
        held = loan is not None and loan.version_check is not None and loan.holder == threading.get_ident()
        with contextlib.nullcontext() if held else call_queue.queue_lock:
            loras.refresh()


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
