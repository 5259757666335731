"""The host's model for work that is no training: borrowed once, given to others between two pieces, given back in any case."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch

from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import Interrupted
from lib_lora_train.events import Stage
from lib_lora_train.host.port import Host, LeasedModel
from lib_lora_train.model import frozen
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.settings import Settings
from lib_lora_train.training.precision import compute_dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Lease:
    """The model while it is lent. `work` names what is done with it ("Checking captions"), for the host's display.

    `dtype` is what to compute in; `checkpoint` is what the host calls the model.
    """

    model: FrozenModel
    work: str
    dtype: torch.dtype
    clip_skip: int
    checkpoint: str
    _host: Host
    _stop: Callable[[], bool]

    def check(self) -> None:
        """Raises Interrupted where somebody asked to stop; often enough called, a stop takes no longer than one step."""
        if self._stop():
            raise Interrupted(f"{self.work} was stopped")

    def between(self, done: int, total: int) -> None:
        """Between two pieces of work: show how far it is, and let those have the model who wait for it.

        Who calls this holds no tensor of the model. Raises Interrupted where the wait for it was ended.
        """
        self.check()
        self._host.report(Stage(self.work, done, total))
        if done >= total or not self._host.others_waiting():
            return
        self.model.release()
        tensors = self._host.yield_model(report=self._host.report, stop=self._stop)
        if tensors is None:
            raise Interrupted(f"{self.work} was stopped while other work used the model")
        self.model.take(tensors)


@contextlib.contextmanager
def leased(host: Host, *, work: str, settings: Settings, should_stop: ShouldStop | None) -> Iterator[Lease]:
    """Borrow the host's model until the block is left. `settings` say what the user knows better than the host: clip skip,
    v-prediction, zero terminal SNR.

    It stops where `should_stop()` says so or the host's own stop button is pressed.
    Raises HostError and ModelError as `host.borrow`.
    """
    def stop() -> bool:
        return bool(should_stop and should_stop()) or host.interrupted()

    with host.lease() as borrowed:
        model = frozen_model(borrowed, settings)
        yield Lease(model, work, compute_dtype(settings.memory.mixed_precision, model.device, weights=model.dtype),
                   settings.captions.clip_skip or borrowed.clip_skip, borrowed.checkpoint.name, host, stop)


def frozen_model(borrowed: LeasedModel, settings: Settings) -> FrozenModel:
    """The borrowed model, with what the user says about it above what the host says. Raises ModelError."""
    said = {"auto": None, "on": True, "off": False}
    v_prediction, zero_terminal_snr = said[settings.loss.v_parameterization], said[settings.loss.zero_terminal_snr]
    hints = borrowed.hints
    if v_prediction is not None:
        hints = dataclasses.replace(hints, prediction_type="v_prediction" if v_prediction else "epsilon")
    if zero_terminal_snr is not None:
        hints = dataclasses.replace(hints, zero_terminal_snr=zero_terminal_snr)
    return frozen.build(borrowed.tensors, hints=hints, tokenizers=borrowed.tokenizers,
                        comma_padding_backtrack=borrowed.comma_padding_backtrack)
