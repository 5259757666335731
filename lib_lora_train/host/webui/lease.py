"""The WebUI's model while it is leased: made ready for training, given to others in between, and taken up again.

Each part stays where the WebUI keeps it, under --medvram on the CPU, until the training asks for it. While others have the
model, everything that was set up for the training is undone: the progress display, the place of its parts, the queue's lock.
What others leave behind (merged LoRAs, another checkpoint) is dealt with when it comes back.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from modules import shared
from torch import Tensor

from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import HostError, Interrupted, translated
from lib_lora_train.events import Report, Stage, Warned
from lib_lora_train.host import placement
from lib_lora_train.host.port import LeasedModel, never
from lib_lora_train.host.webui import loras, model_access
from lib_lora_train.host.webui.model_access import Identity, ModelAccess, VersionCheck
from lib_lora_train.host.webui.progress import ProgressDisplay
from lib_lora_train.host.webui.queue import QueueLock
from lib_lora_train.model.family import detect
from lib_lora_train.model.sd.hints_file import with_words_of_file
from lib_lora_train.model.sd.tokens import FunctionTokenizer, Tokenizer

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
"""Between two looks at which model the WebUI holds, while it holds another one."""


class WebUILease(LeasedModel):
    """One lease of the loaded model, from the first wait in the queue to the last release. What a `LeasedModel` tells of the
    model is known once it is leased.

    version_check   of the model as it is leased now; None while others have it
    thread          that leased it
    """

    def __init__(self, access: ModelAccess, queue: QueueLock, misplaced: placement.MisplacedTensors, *,
                 stop: ShouldStop = never) -> None:
        """`misplaced` are those of all leases; `stop()` ends each wait for the model."""
        self._access, self.queue, self.display, self._misplaced, self._stop = access, queue, ProgressDisplay(), misplaced, stop
        self.version_check: VersionCheck | None = None
        self.thread = threading.get_ident()
        self._setup = contextlib.ExitStack()
        self._originals: Mapping[Tensor, torch.device] = {}
        self._places: dict[str, torch.device] = {}  # of the parts that are not just where the WebUI keeps them
        self._checksums: Mapping[str, object] = {}
        self._identity: Identity | None = None
        self._tokenizers: Sequence[Tokenizer] = ()

    @contextlib.contextmanager
    def leased(self) -> Iterator[None]:
        """Wait in the queue, and lease until the block is left. Raises HostError, ModelError and Interrupted."""
        with contextlib.ExitStack() as at_the_end:
            at_the_end.callback(self.queue.release)
            at_the_end.callback(self._restore)
            # An error's tensors are freed before the model comes back and needs their room.
            at_the_end.push(lambda kind, error, trace: error and placement.clear_frames(error))
            with self.display.queued():
                self.queue.acquire(stop=self._stop)
            self._setup.enter_context(self.display.running())
            self._begin()
            yield

    def _begin(self) -> None:
        """Lease what the WebUI is set to. With the lock held."""
        sd_model = self._access.load()
        if sd_model is None:
            raise HostError("No model is loaded", remedy="choose a checkpoint at the top of the page")
        self._access.refuse_kind(sd_model)
        self._set_up(sd_model)
        super().__init__(
            self.tensors, with_words_of_file(self._access.hints(sd_model), model_access.file_of(sd_model)),
            self._access.describe(sd_model), self.device, self._lasting_tokenizers() or None,
            clip_skip=int(shared.opts.CLIP_stop_at_last_layers),
            comma_padding_backtrack=int(shared.opts.comma_padding_backtrack))
        detect(self.tensors, self.hints)
        self._identity = self._access.identity(sd_model)

    def _lasting_tokenizers(self) -> list[Tokenizer]:
        """The WebUI's, asked of the model as it is leased at that moment: one that was loaded again has others."""
        return [FunctionTokenizer(lambda text, index=index: self._tokenizers[index].encode(text), start=first.start,
                                  end=first.end, comma=first.comma) for index, first in enumerate(self._tokenizers)]

    def others_waiting(self) -> bool:
        """Whether a generation, a change of checkpoint or other work waits in the WebUI's queue."""
        return self.queue.others_waiting()

    def yield_model(self, report: Report) -> Mapping[str, Tensor] | None:
        """Let through what waits, in the queue's order, then lease the model again, without what was merged meanwhile.

        If another checkpoint or VAE was chosen, it waits until the leased one is chosen again.
        """
        self._checksums = self._checksums or model_access.checksums(self.tensors)
        self._restore()
        # The WebUI may want their memory for another model.
        self.tensors, self._originals, self._tokenizers = {}, {}, ()
        if self._misplaced:
            report(Warned(str(_misplaced_error())))
        try:
            with self.display.queued():
                self.queue.yield_to_others(stop=self._stop)
            while not self._resume():
                self._wait_for_model(report)
        except Interrupted:
            return None
        return self.tensors

    def offload_parts(self, parts: Collection[str]) -> Mapping[str, Tensor]:
        """Generations that are let through find all of the model in its place."""
        with translated("moving parts of the model off the device"):
            self._put(parts, placement.CPU)
        return self.tensors

    def reload_parts(self, parts: Collection[str]) -> Mapping[str, Tensor]:
        """See `LeasedModel`. Generations that are let through find all of the model in its place."""
        with translated("moving parts of the model to the device"):
            self._put(parts, self.device)
        return self.tensors

    def _put(self, parts: Collection[str], device: torch.device) -> None:
        """On `device` until `_restore`, which leaves alone what was placed elsewhere after that."""
        new = [part for part in parts if self._places.get(part) != device]
        originals = {tensor: self._originals[tensor] for tensor in placement.tensors_of(self.tensors, new)}
        self._setup.enter_context(placement.moved(originals, device, self._misplaced))
        self._places.update(dict.fromkeys(new, device))

    def _set_up(self, sd_model: Any) -> None:
        """Without LoRAs, watched for changes. With the lock held; `_restore` undoes it."""
        if not self._misplaced.retry():
            raise _misplaced_error()
        loras.unmerge(self._access, sd_model)
        self._access.unload(sd_model)
        self.device, self.tensors = model_access.device(), self._access.collect(sd_model)
        self._originals = {tensor: placement.device_of(tensor) for tensor in self.tensors.values()}
        self._tokenizers = self._access.tokenizers(sd_model)
        self.version_check = VersionCheck(self._access, sd_model, self.tensors)

    def _restore(self) -> None:
        leased, self.version_check = self.version_check is not None, None
        setup, self._setup = self._setup, contextlib.ExitStack()
        try:
            setup.close()
        finally:
            # Parts that the WebUI keeps elsewhere have left the device by now; at the end of the lease all that is ours, too.
            if self.queue.holding() and not self._misplaced.retry() and leased:
                log.warning("%s", _misplaced_error())
            placement.free_unused()

    def _resume(self) -> bool:
        """Whether the WebUI holds the leased model, which is then leased again. With the lock held."""
        assert self._identity is not None
        self._setup.enter_context(self.display.running())
        sd_model = self._access.restored(self._identity)
        if sd_model is None:
            return False
        self._set_up(sd_model)
        if model_access.checksums(self.tensors) != self._checksums:
            raise model_access.model_changed()
        places, self._places = self._places, {}
        for device in (placement.CPU, self.device):  # what is on the CPU makes room
            with translated("moving parts of the model to where they were"):
                self._put([part for part, place in places.items() if place == device], device)
        return True

    def _wait_for_model(self, report: Report) -> None:
        """Leave the WebUI alone until it seems to hold the leased model again, then wait in the queue for it."""
        assert self._identity is not None
        self._restore()
        self.queue.release()
        report(Stage(f"Waiting until {self._identity} is chosen again", 0, 0, self.checkpoint.title))
        while not self._access.may_be_back(self._identity):
            if self._stop():
                raise Interrupted("The run was stopped while the WebUI held another model")
            time.sleep(_POLL_SECONDS)
        with self.display.queued():
            self.queue.acquire(stop=self._stop)


def _misplaced_error() -> HostError:
    """The error for a model with parts that are not where the WebUI had them."""
    return HostError(
        "Part of the WebUI's model is not on the GPU, and pictures cannot be painted",
        why="there was no room for it when it was to come back",
        remedy="free some of the GPU's memory, then press 'Load SD checkpoint to VRAM from RAM' in Settings, Actions")
