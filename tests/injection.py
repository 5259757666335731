"""Faults, and the places between the stages of a run where they are thrown. Needs nothing but the package and torch, so
that a running WebUI can load it, too."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Place:
    """A function of the trainer ("module:owner.name") that fails `before` or `after` doing its work, at its n-th `call`.

    `learnt`: whether steps were made that are worth keeping. `harmless`: the run goes on and says so in a warning. `retried`:
    it does so where the memory is full, and makes the step in a way that needs less.
    """

    name: str
    target: str
    when: str = "before"
    call: int = 1
    learnt: bool = False
    harmless: bool = False
    retried: bool = False

    def survives(self, fault: str) -> bool:
        """Whether the run goes on after the fault of this name in `FAULTS`, which it only warns of."""
        return self.harmless and fault != "an unexpected error" or self.retried and fault.endswith("memory is full")


P = "lib_lora_train"
PLACES = (
    Place("at the beginning", f"{P}.run.job:check_sizes"),
    Place("before the lease", "HOST:lease"),
    Place("after the lease begins", f"{P}.run.job:frozen_model"),
    Place("after building the model", f"{P}.run.job:frozen_model", "after"),
    Place("before building the network", f"{P}.run.job:build_network"),
    Place("after building the network", f"{P}.run.job:build_network", "after"),
    Place("before encoding pictures", f"{P}.model.sd.vae:VAE.encode"),
    Place("after encoding pictures", f"{P}.run.job:latents_of", "after"),
    Place("before encoding captions", f"{P}.model.sd.text:TextConditioner.encode_ids"),
    Place("after encoding captions", f"{P}.run.memory:condition_of", "after"),
    Place("before the first step", f"{P}.training.loop:draw"),
    Place("in the first step", f"{P}.training.train_step:denoising_loss", "after", retried=True),
    Place("in the middle of a later step", f"{P}.training.train_step:denoising_loss", "after", 2, learnt=True, retried=True),
    # One step is made on trial, before the run.
    Place("before the optimiser", f"{P}.training.optimizers:RunOptimizer.step", "before", 3, learnt=True),
    Place("after the optimiser", f"{P}.training.optimizers:RunOptimizer.step", "after", 3, learnt=True),
    Place("in a report of a step", f"{P}.training.progress:Step", "before", 2, learnt=True),
    Place("before an intermediate save", f"{P}.adapters.file:save", learnt=True, harmless=True),
    Place("in the rename of an intermediate save", f"{P}.storage.atomic:replace", "before", 3, learnt=True, harmless=True),
    Place("in writing the resume point", f"{P}.training.checkpoint:write", learnt=True, harmless=True),
    Place("before saving the result", f"{P}.adapters.file:save", "before", 2, learnt=True),
    Place("after saving the result", f"{P}.adapters.file:save", "after", 2, learnt=True),
    Place("in refreshing the list of LoRAs", "HOST:refresh_loras", learnt=True),
    Place("after the lease ends", "HOST:lease", "after", learnt=True),
)

FAULTS: dict[str, Callable[[], BaseException]] = {
    "an unexpected error": lambda: RuntimeError("injected"),
    "the GPU's memory is full": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory (injected)"),
    "the memory is full": lambda: MemoryError("injected"),
    "the disk is full": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "access is denied": lambda: PermissionError(errno.EACCES, "Permission denied"),
    "Ctrl+C": lambda: KeyboardInterrupt("injected"),
}


def on_shapes_alone(*arguments: Any) -> bool:
    """Whether a call with these is one of a dry run on torch's meta device, which computes nothing.

    The estimate of a step runs it on shapes alone: such calls are not counted, so that a fault comes where it is due whichever
    runs there were.
    """
    return any(getattr(argument, "device", None) == torch.device("meta") for argument in arguments)


def inject(place: Place, fault: Callable[[], BaseException], host: Any) -> Callable[[], None]:
    """Let `place` fail so, once; returns what puts everything back. Calls on shapes alone neither fail nor count."""
    module, _, path = place.target.partition(":")
    owner: Any = type(host) if module == "HOST" else importlib.import_module(module)
    *inner, name = path.split(".")
    owner = functools.reduce(getattr, inner, owner)
    original, calls = getattr(owner, name), [0]

    def due(*arguments: Any) -> bool:
        if on_shapes_alone(*arguments):
            return False
        calls[0] += 1
        return calls[0] == place.call

    @functools.wraps(original, updated=())
    def failing(*args: Any, **kwargs: Any) -> Any:
        fails = due(*args, *kwargs.values())
        if fails and place.when == "before":
            raise fault()
        result = original(*args, **kwargs)
        if fails:
            raise fault()
        return result

    @contextlib.contextmanager
    def failing_block(*args: Any, **kwargs: Any) -> Iterator[Any]:
        fails = due()
        if fails and place.when == "before":
            raise fault()
        with original(*args, **kwargs) as value:
            yield value
        if fails:
            raise fault()

    setattr(owner, name, failing_block if name == "lease" else failing)
    return lambda: setattr(owner, name, original)
