"""What a host does that holds its model for itself: nobody else waits for it, uses it or interrupts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

import torch
from PIL import Image
from torch import Tensor

from lib_lora_train.errors import HostError, translated
from lib_lora_train.events import Report
from lib_lora_train.host import placement
from lib_lora_train.host.lease import lease_for
from lib_lora_train.host.port import Display, ModelSource, Renderer, RenderRequest
from lib_lora_train.model.sampler import to_image
from lib_lora_train.settings import Settings


class ExclusiveHost(ModelSource, Display, Renderer):
    """The part of `host.port.Host` that is the same for every such host, but for `checkpoint`, `outline` and `lease`."""

    _tensors: Mapping[str, Tensor] | None = None
    """The leased ones, None before the first lease."""
    _device: torch.device
    """Where they are leased."""

    def render(self, request: RenderRequest, *, stop: Callable[[], bool] = lambda: False) -> list[Image.Image]:
        """By our own sampler, which knows no LoRA in a prompt."""
        if request.sampler != "Euler":
            raise HostError(f"There is no sampler {request.sampler!r} here", remedy="use Euler")
        if "<lora:" in request.prompt:
            raise HostError("A LoRA in a prompt is not possible here", remedy="use it in the WebUI")
        with lease_for(self, "Rendering", settings=Settings(), should_stop=stop) as lease, translated("rendering"):
            return [to_image(lease.model, lease.sample(dataclasses.replace(request, seed=request.seed + index)))
                    for index in range(request.count)]

    def yield_model(self, *, report: Report, stop: Callable[[], bool]) -> Mapping[str, Tensor] | None:
        """Nobody uses the model meanwhile, so it stays leased as it is."""
        return self._tensors

    def offload_parts(self, parts: Collection[str]) -> Mapping[str, Tensor]:
        """Move these parts to the CPU until the next lease."""
        return self._move(parts, placement.CPU, "off the device")

    def reload_parts(self, parts: Collection[str]) -> Mapping[str, Tensor]:
        """Move these parts to where they are leased."""
        return self._move(parts, self._device, "back to the device")

    def _move(self, parts: Collection[str], device: torch.device, where: str) -> Mapping[str, Tensor]:
        assert self._tensors is not None, "nothing is leased"
        with translated(f"moving parts of the model {where}"):
            placement.move(placement.tensors_of(self._tensors, parts), device)
        return self._tensors
