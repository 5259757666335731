"""The WebUI's model while it is lent: made ready for training, given to others in between, and found again.

Giving it to others takes down everything that was set up for the training: the progress display, the place of its parts
(under --medvram, or set aside), the queue's lock. What others leave behind (merged LoRAs, another checkpoint) is met when
it comes back.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from types import TracebackType

import torch
from modules import sd_models, shared
from torch import Tensor, nn

from lib_lora_train.errors import HostError, Interrupted, translated
from lib_lora_train.events import Report, Stage, Warned
from lib_lora_train.host import placement
from lib_lora_train.host.a1111 import loras, model
from lib_lora_train.host.a1111.progress import ProgressDisplay
from lib_lora_train.host.a1111.queue import Turn
from lib_lora_train.host.port import LeasedModel
from lib_lora_train.model.family import detect

log = logging.getLogger(__name__)

_LOOK_AGAIN = 0.25
"""Seconds between two looks at which model the WebUI holds, while it holds another one."""


class Lease:
    """One loan of the loaded model, from the first turn in the queue to the last.

    witness     of the model as it is lent now; None while others have it
    holder      the thread that borrowed
    """

    def __init__(self, turn: Turn, strays: placement.Strays) -> None:
        """`strays` are those of all loans."""
        self.turn, self.display, self._strays = turn, ProgressDisplay(), strays
        self.version_check: model.VersionCheck | None = None
        self.holder = threading.get_ident()
        self._setup = contextlib.ExitStack()
        self._tensors: Mapping[str, Tensor] = {}
        self._homes: Mapping[Tensor, torch.device] = {}
        self._aside: frozenset[str] = frozenset()
        self._device: torch.device | None = None
        self._checksum: model.Checksum | None = None
        self._identity: model.Identity | None = None

    @contextlib.contextmanager
    def lent(self) -> Iterator[LeasedModel]:
        """Wait in the queue, and lend until the block is left. Raises HostError, ModelError and Interrupted."""
        with contextlib.ExitStack() as at_the_end:
            at_the_end.callback(self.turn.leave)
            at_the_end.callback(self._take_down)
            at_the_end.push(_emptied)
            with self.display.queued():
                self.turn.take()
            self._setup.enter_context(self.display.running())
            # May load the model, or wait for the thread that loads it at the start.
            sd_model = shared.sd_model
            if sd_model is None:
                raise HostError("No model is loaded", remedy="choose a checkpoint at the top of the page")
            model.refuse_kind(sd_model)
            device = self._set_up(sd_model)
            hints = model.hints(sd_model)
            detect(self._tensors, hints)
            self._identity = model.Identity.of(sd_model)
            yield LeasedModel(
                self._tensors, hints, model.describe(sd_model), device, model.tokenizers(sd_model),
                clip_skip=int(shared.opts.CLIP_stop_at_last_layers),
                comma_padding_backtrack=int(shared.opts.comma_padding_backtrack))

    def yield_model(self, *, report: Report, stop: Callable[[], bool]) -> Mapping[str, Tensor] | None:
        """See `Host.yield_model`."""
        if self._checksum is None:
            self._checksum = model.Checksum(self._tensors)
        self._take_down()
        if self._strays:
            report(Warned(str(_astray())))
        try:
            with self.display.queued():
                self.turn.pass_on(stop=stop)
            while not self._came_back():
                self._search(report=report, stop=stop)
        except Interrupted:
            return None
        return self._tensors

    def offload_parts(self, parts: Collection[str]) -> Mapping[str, Tensor]:
        """See `Host.offload_parts`."""
        assert self.version_check is not None, "nothing is lent"
        new = frozenset(parts) - self._aside
        self._put_aside(new)
        self._aside |= new
        return self._tensors

    def reload_parts(self, parts: Collection[str]) -> Mapping[str, Tensor]:
        """See `Host.reload_parts`. What set them aside leaves alone what it does not find where it put it."""
        assert self.version_check is not None and self._device is not None, "nothing is lent"
        with translated("moving parts of the model back to the device"):
            placement.move(placement.tensors_of(self._tensors, self._aside & frozenset(parts)), self._device)
        self._aside -= frozenset(parts)
        return self._tensors

    def _put_aside(self, parts: Collection[str]) -> None:
        """Off the device until `_take_down`."""
        homes = {tensor: self._homes[tensor] for tensor in placement.tensors_of(self._tensors, parts)}
        with translated("moving parts of the model off the device"):
            self._setup.enter_context(placement.aside(homes, self._strays))

    def _set_up(self, sd_model: nn.Module) -> torch.device:
        """Bare of LoRAs, on the device, watched. With the lock held; `_take_down` is its opposite."""
        if not self._strays.try_again():
            raise _astray()
        loras.take_out(sd_model)
        with translated("moving the model to the device"):
            device, homes = self._setup.enter_context(model.placed(sd_model))
        self._tensors, self._device = model.collect(sd_model), device
        self._homes = {tensor: homes[name] for name, tensor in self._tensors.items()}
        self.version_check = model.VersionCheck(sd_model, self._tensors)
        return device

    def _take_down(self) -> None:
        lent, self.version_check = self.version_check is not None, None
        setup, self._setup = self._setup, contextlib.ExitStack()
        setup.close()
        # Parts that the WebUI keeps elsewhere have left the device by now; at the end of the loan all that is ours, too.
        if self.turn.holding() and not self._strays.try_again() and lent:
            log.warning("%s", _astray())

    def _came_back(self) -> bool:
        """Whether the WebUI holds the lent model, which is then lent again. With the lock held."""
        assert self._identity is not None and self._checksum is not None
        self._setup.enter_context(self.display.running())
        sd_model = sd_models.model_data.sd_model
        if sd_model is not None and self._identity.only_left_behind(sd_model):
            with translated("loading the checkpoint that is trained on again"):
                sd_model = sd_models.reload_model_weights()
        if sd_model is None:
            raise HostError("The WebUI's model was unloaded while others used it",
                            remedy="choose the checkpoint again at the top of the page and resume the run")
        if not self._identity.fits(sd_model):
            return False
        self._set_up(sd_model)
        if not self._checksum.holds(self._tensors):
            raise model.changed()
        self._put_aside(self._aside)
        return True

    def _search(self, *, report: Report, stop: Callable[[], bool]) -> None:
        """Leave the WebUI alone until it seems to hold the lent model again, then wait in the queue for it."""
        assert self._identity is not None
        self._take_down()
        self.turn.leave()
        report(Stage(f"Waiting until {self._identity.text} is chosen again", 0, 0))
        while not self._identity.may_be_back():
            if stop() or self.turn.given_up():
                raise Interrupted("The run was stopped while the WebUI held another model")
            time.sleep(_LOOK_AGAIN)
        with self.display.queued():
            self.turn.take(stop=stop)


def _astray() -> HostError:
    """What to say of a model that did not find its place again."""
    return HostError(
        "Part of the WebUI's model is not on the card, and pictures cannot be painted",
        why="there was no room for it when it was to come back",
        remedy="free some of the card's memory, then press 'Load SD checkpoint to VRAM from RAM' in Settings, Actions")


def _emptied(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
    """The model comes home before an error's tensors are forgotten, and needs their room."""
    if error is not None:
        placement.emptied(error)
