"""The host's model for a task that is no training: leased once, yielded to others between two items, released in any case."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from lib_lora_train.adapters.stack import Stack
from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import Interrupted, SettingError
from lib_lora_train.events import Report, Stage, shielded
from lib_lora_train.host import placement
from lib_lora_train.host.port import Display, LeasedModel, ModelSource
from lib_lora_train.model import frozen
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.sampler import SampleRequest, sample_batch
from lib_lora_train.settings import Settings
from lib_lora_train.training.precision import compute_dtype


class LeaseHost(ModelSource, Display, Protocol):
    """The parts of a host that a task on its model needs."""


@dataclasses.dataclass(frozen=True, eq=False)
class ModelLease:
    """The leased model, for one task. `task` is its name ("Checking captions"), for the host's display.

    `dtype` is what to compute in; `checkpoint` is what the host calls the model.
    """

    model: FrozenModel
    task: str
    dtype: torch.dtype
    clip_skip: int
    checkpoint: str
    _leased: LeasedModel
    _report: Report
    _stop: ShouldStop

    def check_stop(self) -> None:
        """Raises Interrupted where somebody asked to stop; called at each step, a stop takes no longer than one step."""
        if self._stop():
            raise Interrupted(f"{self.task} was stopped")

    def before_item(self, done: int, total: int) -> None:
        """Before each item: show the progress, and yield the model to those who wait for it.

        The caller holds no tensor of the model. Raises Interrupted where the wait for it was ended.
        """
        self.check_stop()
        self._report(Stage(self.task, done, total))
        if done < total and not yield_to_others(self._leased, self.model, report=self._report):
            raise Interrupted(f"{self.task} was stopped while other work used the model")

    def sample(self, request: SampleRequest, *, adapters: Stack | None = None) -> torch.Tensor:
        """Latents [1,4,h,w] in the VAE's own scale, with `adapters` on the model. Raises SettingError for a size that the model
        does not have, and Interrupted."""
        architecture = self.model.architecture
        multiple = architecture.vae.factor * 2 ** architecture.unet.halvings
        width, height = request.width, request.height
        if min(width, height) < multiple or width % multiple or height % multiple:
            raise SettingError(f"Pictures of {width}×{height} pixels do not fit this model",
                               why=f"its sizes are multiples of {multiple}")
        return sample_batch(self.model, [request], clip_skip=self.clip_skip, dtype=self.dtype,
                            adapters=adapters, on_step=lambda *_: self.check_stop())


@contextlib.contextmanager
def lease_for(host: LeaseHost, task: str, *, settings: Settings, should_stop: ShouldStop | None) -> Iterator[ModelLease]:
    """Lease the host's model until the block is left. `settings` say what the user knows better than the host: clip skip,
    v-prediction, zero terminal SNR.

    It stops where `should_stop()` says so or the host's own stop button is pressed.
    Raises as `ModelSource.lease`.
    """
    def stop() -> bool:
        return bool(should_stop and should_stop()) or host.interrupted()

    with host.lease(stop=stop) as leased:
        leased.reload_parts(placement.PARTS)
        model = frozen_model(leased, settings)
        yield ModelLease(model, task, compute_dtype(settings.memory.mixed_precision, model.device, weights=model.dtype),
                         settings.captions.clip_skip or leased.clip_skip, leased.checkpoint.name, leased, shielded(host.report),
                         stop)


def yield_to_others(leased: LeasedModel, model: FrozenModel, *, report: Report,
                    offload: Callable[[], Callable[[], None]] = lambda: lambda: None) -> bool:
    """Let those use the leased model who wait for it, if any; whether `model` can be computed on afterwards. False where the
    wait for it was ended.

    `offload` takes what else the caller has on the device off it; what it returns brings that back, once the model is there.
    """
    if not leased.others_waiting():
        return True
    reload = offload()
    model.release()
    tensors = leased.yield_model(report)
    if tensors is None:
        return False
    model.rebind(tensors)
    reload()
    return True


def frozen_model(leased: LeasedModel, settings: Settings) -> FrozenModel:
    """The leased model, with what the user says about it above what the host says; each of its parts is still where the host
    keeps it. Raises ModelError."""
    said = {"auto": None, "on": True, "off": False}
    v_prediction, zero_terminal_snr = said[settings.loss.v_parameterization], said[settings.loss.zero_terminal_snr]
    hints = leased.hints
    if v_prediction is not None:
        hints = dataclasses.replace(hints, prediction_type="v_prediction" if v_prediction else "epsilon")
    if zero_terminal_snr is not None:
        hints = dataclasses.replace(hints, zero_terminal_snr=zero_terminal_snr)
    return frozen.build(leased.tensors, device=leased.device, hints=hints, tokenizers=leased.tokenizers,
                        comma_padding_backtrack=leased.comma_padding_backtrack)
