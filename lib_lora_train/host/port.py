"""What a host offers to a job, and nothing more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from lib_lora_train.events import Event, Report
from lib_lora_train.model.family import Hints
from lib_lora_train.model.tokens import Tokenizer
from lib_lora_train.settings.allowed_paths import AllowedPaths
from lib_lora_train.tagging.captioner import CaptionerSource


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Which model a host holds. `family` is "sd1", "sd2" or "sdxl", "" where it is none of them; hashes are "" where
    the host has not computed them. `legacy_hash` is the sha256 of 64 KiB at 1 MiB, 8 digits."""

    name: str
    title: str
    family: str
    sha256: str = ""
    legacy_hash: str = ""
    vae_name: str = ""


@dataclasses.dataclass(frozen=True)
class LeasedModel:
    """The host's model while it is lent: tensors by reference under checkpoint names, and what shapes cannot tell.

    `clip_skip` is what the host paints with; `device` is where to compute, and where the tensors lie.
    """

    tensors: Mapping[str, torch.Tensor]
    hints: Hints
    checkpoint: Checkpoint
    device: torch.device
    tokenizers: Sequence[Tokenizer] | None = None
    clip_skip: int = 1
    comma_padding_backtrack: int = 20


@dataclasses.dataclass(frozen=True)
class Outline:
    """What is loaded, as far as planning needs it: shapes (tensors on the meta device) and where it would be trained."""

    tensors: Mapping[str, torch.Tensor]
    hints: Hints
    device: torch.device


class Host(Protocol):
    """A place that holds a model: the WebUI, or a checkpoint file."""

    @property
    def lora_folder(self) -> Path:
        """Where finished LoRAs go unless the user names a folder."""

    @property
    def runs_folder(self) -> Path:
        """Where each run keeps its folder of settings and events."""

    @property
    def datasets_folder(self) -> Path:
        """Where the dataset studio keeps the datasets it owns."""

    @property
    def allowed(self) -> AllowedPaths | None:
        """The folders a run may touch; None where only this machine's user reaches the host."""

    @property
    def models_folder(self) -> Path:
        """Where models of all kinds are, each kind in a folder of its own; only read, for detectors that are there."""

    @property
    def taggers_folder(self) -> Path:
        """Where each tagger has a folder of its own."""

    def captioners(self) -> Sequence[CaptionerSource]:
        """What the host itself captions pictures with, there or not; nothing is loaded."""

    def checkpoint(self) -> Checkpoint | None:
        """What is loaded now, None if nothing is; never loads, never waits."""

    def outline(self) -> Outline | None:
        """The shapes of what is loaded now, None if nothing is or it is no model of ours; never loads, never waits."""

    def lease(self) -> AbstractContextManager[LeasedModel]:
        """Lend the model, clean of active LoRAs and locked against everybody else, and take it back in any case.

        Raises HostError if there is none, ModelError if it is of a kind that cannot be trained.
        """

    def others_waiting(self) -> bool:
        """Whether somebody waits for the model that is lent."""

    def yield_model(self, *, report: Report, stop: Callable[[], bool]) -> Mapping[str, torch.Tensor] | None:
        """Give the model back to the host for those who wait, and lend it again: the same weights, perhaps elsewhere in
        memory. None where `stop()` or `stop_waiting` ended the wait; the model is not lent then.

        To be called between two pieces of work, by the borrower, who holds none of the tensors meanwhile and whose own
        copies of them have left the device. What he trains may stay there: up to 18 bytes a weight. If the host
        holds another model afterwards, it waits for this one to come back and reports so.
        Raises HostError where the model is gone for good or its weights are not what they were.
        """

    def offload_parts(self, parts: Collection[str]) -> Mapping[str, torch.Tensor]:
        """Move these parts of the lent model ("unet", "vae", "text") off its device until they are brought back or the
        loan ends, in place: an object that was lent lies elsewhere afterwards. They are set aside again after each
        `yield_model`; on the CPU nothing moves.

        Returns all of the lent tensors as they lie now. To be called by the borrower, who takes them in the place of those
        he holds: the memory is free once nobody holds what lay there. The host puts them back itself; where there is
        no room it says so, and tries again after the loan and before the next one.
        Raises TrainingError where there is no room to move to; nothing has moved then.
        """

    def reload_parts(self, parts: Collection[str]) -> Mapping[str, torch.Tensor]:
        """Move those of these parts that are set aside to the loan's device again, in place; they stay there.

        Returns all of the lent tensors as they lie now, and wants to be called, as `offload_parts`. Raises TrainingError where
        the device has no room; nothing has moved then.
        """

    def waiting(self) -> bool:
        """Whether `borrow` or `yield_model` waits for other work of the host."""

    def stop_waiting(self) -> None:
        """End such a wait with Interrupted; without effect where nobody waits."""

    def interrupted(self) -> bool:
        """Whether the user pressed the host's own stop button."""

    def report(self, event: Event) -> None:
        """See an event of the running job, to keep the host's own progress display true."""

    def refresh_loras(self) -> None:
        """Make a new or overwritten LoRA file known to the host."""
