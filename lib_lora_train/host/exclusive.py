"""What a host says that holds its model for itself: nobody else waits for it, takes it or interrupts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from lib_lora_train.errors import translated
from lib_lora_train.events import Event, Report
from lib_lora_train.host import placement
from lib_lora_train.tagging.captioner import CaptionerSource


class Undisturbed:
    """The part of `host.port.Host` that needs others. `_tensors` are the lent ones, None before the first loan."""

    _tensors: Mapping[str, Tensor] | None = None
    _device: torch.device
    """Where they are lent."""

    def captioners(self) -> Sequence[CaptionerSource]:
        """There are none but ours here."""
        return ()

    def others_waiting(self) -> bool:
        """There is no other work here."""
        return False

    def yield_model(self, *, report: Report, stop: Callable[[], bool]) -> Mapping[str, Tensor] | None:
        """Nobody takes the model meanwhile, so it is lent on as it is."""
        return self._tensors

    def offload_parts(self, parts: Collection[str]) -> Mapping[str, Tensor]:
        """Move these parts to the CPU until they are lent again."""
        assert self._tensors is not None, "nothing is lent"
        with translated("moving parts of the model off the device"):
            placement.move(placement.tensors_of(self._tensors, parts), placement.CPU)
        return self._tensors

    def reload_parts(self, parts: Collection[str]) -> Mapping[str, Tensor]:
        """Move these parts to where they are lent."""
        assert self._tensors is not None, "nothing is lent"
        with translated("moving parts of the model back to the device"):
            placement.move(placement.tensors_of(self._tensors, parts), self._device)
        return self._tensors

    def waiting(self) -> bool:
        """There is no other work here."""
        return False

    def stop_waiting(self) -> None:
        """Nobody waits here."""

    def interrupted(self) -> bool:
        """Nobody else can interrupt here."""
        return False

    def report(self, event: Event) -> None:
        """There is no other progress display to keep true."""

    def refresh_loras(self) -> None:
        """There is no list of LoRAs to refresh."""
