"""What a host offers: a model to lease, folders, a display, and its own text-to-image.

`Host` is all of it; a function takes the part it needs. What is written out here holds for a host that nobody else uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import HostError, translated
from lib_lora_train.events import Event, Report
from lib_lora_train.host import placement
from lib_lora_train.model.family import Hints
from lib_lora_train.model.sampler import SampleRequest
from lib_lora_train.model.sd.tokens import Tokenizer
from lib_lora_train.settings.allowed_paths import AllowedPaths
from lib_lora_train.tagging.captioner import CaptionerSource


def never() -> bool:
    """The `ShouldStop` of those who wait as long as it takes."""
    return False


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Which model a host holds. `family` is the name of one of `FAMILIES`, "" where it is none of them; hashes are "" where
    the host has not computed them. `legacy_hash` is the sha256 of 64 KiB at 1 MiB, 8 digits. `refusal` is why it cannot be
    trained, one sentence; "" where that is not known before it is tried."""

    name: str
    title: str
    family: str
    sha256: str = ""
    legacy_hash: str = ""
    vae_name: str = ""
    refusal: str = ""


@dataclasses.dataclass(eq=False)
class LeasedModel:
    """The host's model while it is leased: tensors by reference under checkpoint names, and what shapes cannot tell. What is
    written out here holds for a host that nobody else uses.

    `clip_skip` is what the host generates with; `device` is where to compute. The tensors are where the host keeps them, which
    may be elsewhere: `reload_parts` brings those that are computed with.
    """

    tensors: Mapping[str, torch.Tensor]
    hints: Hints
    checkpoint: Checkpoint
    device: torch.device
    tokenizers: Sequence[Tokenizer] | None = None
    clip_skip: int = 1
    comma_padding_backtrack: int = 20

    def others_waiting(self) -> bool:
        """Whether somebody else waits for the model."""
        return False

    def yield_model(self, report: Report) -> Mapping[str, torch.Tensor] | None:
        """Release the model to those who wait, and lease it again: the same weights, perhaps elsewhere in memory. None
        where the `stop()` of the lease ended the wait; the model is not leased then.

        The caller holds none of its tensors meanwhile, and has nothing of its own on the device. Each part is where the host
        keeps it, and afterwards where it was last offloaded or reloaded to. If the host holds another model then, this waits
        for the leased one to come back and reports so.
        Raises HostError where the model is gone for good or its weights are not what they were.
        """
        return self.tensors

    def offload_parts(self, parts: Collection[str]) -> Mapping[str, torch.Tensor]:
        """Move these parts of the model ("unet", "vae", "text") to the CPU until they are reloaded or the lease ends, in
        place: the same tensor objects are elsewhere afterwards; on the CPU nothing moves.

        Returns all leased tensors as they are now, to be used in place of the former ones: the memory is free once nobody
        holds what was there. The host moves the parts back itself; where there is no room it says so, and tries again
        after the lease and before the next one.
        Raises TrainingError where there is no room to move to; nothing has moved then.
        """
        with translated("moving parts of the model off the device"):
            placement.move(placement.tensors_of(self.tensors, parts), placement.CPU)
        return self.tensors

    def reload_parts(self, parts: Collection[str]) -> Mapping[str, torch.Tensor]:
        """Move these parts to the lease's device, in place, until they are offloaded or the lease ends.

        Returns all leased tensors as they are now, as `offload_parts`. Raises TrainingError where the device has no room;
        nothing has moved then.
        """
        with translated("moving parts of the model back to the device"):
            placement.move(placement.tensors_of(self.tensors, parts), self.device)
        return self.tensors


@dataclasses.dataclass(frozen=True)
class Outline:
    """What is loaded, as far as planning needs it: shapes (tensors on the meta device) and where it would be trained."""

    tensors: Mapping[str, torch.Tensor]
    hints: Hints
    device: torch.device


@dataclasses.dataclass(frozen=True)
class RenderRequest(SampleRequest):
    """What the host generates: image k of `count` has the seed `seed` + k. `sampler` is the host's name of it; `checkpoint`
    names another model than the one it holds, which it holds afterwards as before."""

    sampler: str = "Euler"
    count: int = 1
    checkpoint: str = ""


def same_title(first: str, second: str) -> bool:
    """Whether two titles name one checkpoint: a WebUI adds " [hash]" to it once that is known."""
    return first.partition(" [")[0] == second.partition(" [")[0]


class Paths(Protocol):
    """The folders of a host.

    lora_folder      where finished LoRAs go unless the user names a folder
    runs_folder      where each run keeps its folder of settings and events
    presets_folder   where the user's presets are
    datasets_folder  where the dataset studio keeps the datasets it owns
    models_folder    where models of all kinds are, each kind in a folder of its own; only read, for detectors that are there
    taggers_folder   where each tagger has a folder of its own
    allowed          the folders a run may touch; None where only this machine's user reaches the host
    """

    lora_folder: Path
    runs_folder: Path
    presets_folder: Path
    datasets_folder: Path
    models_folder: Path
    taggers_folder: Path
    allowed: AllowedPaths | None


class ModelSource(Protocol):
    """A model that can be leased."""

    def checkpoint(self) -> Checkpoint | None:
        """What is loaded now, None if nothing is; never loads, never waits."""

    def outline(self) -> Outline | None:
        """The shapes of what is loaded now, None if nothing is or it cannot be trained; never loads, never waits."""

    def lease(self, *, stop: ShouldStop = never) -> AbstractContextManager[LeasedModel]:
        """The model inside the block, without active LoRAs and locked against everybody else; released in any case.

        Raises HostError if there is none, ModelError if it is of a kind that cannot be trained, Interrupted where `stop()`
        ended the wait for it.
        """

    def select(self, title: str) -> str:
        """Hold the model of this title (`Checkpoint.title`) from now on, and return the title of the one that was held, "" for
        none; waits for other work of the host. Not to be called while the caller leases the model. Raises HostError where
        there is none or it cannot be loaded; the one before is held then."""
        loaded = self.checkpoint()
        if loaded is None or loaded.title != title:
            raise HostError(f"The checkpoint {title} is not here", remedy="start the program with it")
        return title

    def waiting(self) -> bool:
        """Whether a lease waits for other work of the host."""
        return False

    def idle(self) -> bool:
        """Whether nobody computes with the model at this moment; never waits."""
        return True

    def shares_model(self) -> bool:
        """Whether who asks for the model while it is leased gets it between two steps, instead of an error."""
        return False


class Display(Protocol):
    """What a host shows of a job, and its stop button."""

    def report(self, event: Event) -> None:
        """See an event of the running job, to keep the host's own progress display true."""

    def interrupted(self) -> bool:
        """Whether the user pressed the host's own stop button."""
        return False

    def refresh_loras(self) -> None:
        """Make a new or overwritten LoRA file known to the host."""


class Renderer(Protocol):
    """A host's own models besides the training: text-to-image, and captioners."""

    def render(self, request: RenderRequest, *, stop: ShouldStop = never) -> list[Image.Image]:
        """The images that a user of the host gets for this request, RGB, LoRAs in its prompt included; not saved anywhere.

        Not to be called while the caller leases the model. Raises HostError (no model, an unknown sampler, a model that is
        leased), TrainingError where the memory ran out, and Interrupted where `stop()` or the host's own stop button ended it.
        """

    def captioners(self) -> Sequence[CaptionerSource]:
        """What the host itself captions images with, whether it is installed or not; nothing is loaded."""
        return ()

    def tokenizer_folder(self) -> Path | None:
        """Where the host keeps CLIP's vocabulary (`tokenizer_from_folder`), None for open_clip's own."""
        return None


class Host(ModelSource, Paths, Display, Renderer, Protocol):
    """A place that holds a model: the WebUI, or a checkpoint file."""
