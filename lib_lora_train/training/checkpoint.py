"""The resume state of a run: what it needs to go on as if it had never been interrupted, and its file.

It holds no random state: order, captions, timesteps and noise are functions of (seed, epoch, position, step). It holds the
LoRA's fp32 weights, all that the optimizer keeps, the loss scaler, the step, and the last losses.

The file is safetensors with JSON in its metadata, so that nothing in it can run a program. Writing holds a second copy of the
state in memory. Reading copies each tensor out of the mapped file, since on Windows a mapped file cannot be replaced.

Not here: the settings, images and checkpoint the state belongs to (`run/resume.py` adds them to the metadata), when a state
is due and what happens if it cannot be written (`run/saver.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lib_lora_train.adapters.lora import ALPHA
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.errors import LoraFileError, TrainingError, translated
from lib_lora_train.model.fingerprint import not_finite
from lib_lora_train.settings import named
from lib_lora_train.storage.atomic import replacing
from lib_lora_train.training.optimizers import RunOptimizer
from lib_lora_train.training.precision import LossScaler

FILE_NAME = "state.safetensors"
VERSION = 1  # raise when an older file can no longer be understood
_KEY = "lora_train_state"  # of the JSON in the file's metadata
_ANEW = f"go on from the run's LoRA file, {named('network_weights')}, or start anew"


@dataclass(frozen=True, eq=False)
class TrainingState:
    """The state after `step` steps.

    lora        the weights under kohya's keys, fp32; alphas fp64, since they are Python numbers where they are used
    optimizer   {"3.exp_avg": tensor}: the moments of the optimizer's n-th weight, and what it keeps of groups
    scaler      {"scale", "good_steps"}, 0-d each
    recent      the losses of the shown average, oldest first
    overflows   steps in a row that were skipped, since gradients or loss were not finite; `skipped`: all of them
    """

    step: int
    lora: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    scaler: Mapping[str, Tensor]
    recent: tuple[float, ...]
    overflows: int
    skipped: int = 0


def capture(step: int, *, network: AdapterNetwork, optimizer: RunOptimizer, scaler: LossScaler, recent: tuple[float, ...],
            overflows: int, skipped: int) -> TrainingState:
    """The present state. Its tensors share memory with those being trained: write them before the next step."""
    alphas = {f"{key}.{ALPHA}": torch.tensor(layer.alpha, dtype=torch.float64) for key, layer in network.layers.items()}
    lora = {**network.state_dict(), **alphas}
    scale = {"scale": scaler.scale, "good_steps": scaler.good_steps}
    return TrainingState(step, lora, optimizer.state(), scale, recent, overflows, skipped)


def restore(state: TrainingState, *, optimizer: RunOptimizer, scaler: LossScaler) -> None:
    """Set the optimizer's moments and the loss scaler. The network was built from `state.lora` already.

    Raises LoraFileError where the moments do not fit the weights.
    """
    optimizer.load_state(state.optimizer)
    scaler.restore(scale=state.scaler["scale"], good_steps=state.scaler["good_steps"])


def write(path: Path, state: TrainingState, metadata: Mapping[str, Any]) -> None:
    """Write the state's file atomically; `metadata` is anything JSON can hold.

    Raises OSError, and TrainingError if a weight is not a finite number; the file that is there stays.
    """
    tensors = {**{f"lora.{key}": tensor for key, tensor in state.lora.items()},
               **{f"optimizer.{key}": tensor for key, tensor in state.optimizer.items()},
               **{f"scaler.{key}": tensor for key, tensor in state.scaler.items()},
               "recent": torch.tensor(state.recent, dtype=torch.float64)}
    if bad := not_finite(state.lora):
        raise TrainingError("The training state was not kept", why=f"{bad[0]} holds values that are not numbers",
                            remedy="lower the learning rate")
    # The step counts of all weights are one tensor, and some optimizers share tables; safetensors refuses shared memory.
    first = {tensor.data_ptr(): name for name, tensor in reversed(tensors.items())}
    tensors = {name: (tensor.contiguous() if tensor.ndim and first[tensor.data_ptr()] == name else tensor.clone()).detach()
               for name, tensor in tensors.items()}
    text = json.dumps({**metadata, "version": VERSION, "step": state.step, "overflows": state.overflows,
                       "skipped": state.skipped})
    with replacing(path) as file:
        try:
            safetensors.torch.save_file(tensors, file.name, {_KEY: text})
        except (SafetensorError, UnicodeEncodeError) as error:  # a full disk; a folder whose name is not UTF-8
            raise OSError(str(error)) from error


def read(path: Path) -> tuple[TrainingState, dict[str, Any]]:
    """The state and its metadata. Raises LoraFileError for a file that is missing, no state, or damaged."""
    metadata = read_metadata(path)
    with translated(f"reading {path}"):
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        except SafetensorError as error:
            raise _damaged(path, str(error)) from error
    parts = {part: {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
             for part in ("lora.", "optimizer.", "scaler.")}
    lora, optimizer, scaler = parts.values()
    recent = tensors.get("recent", torch.empty(()))
    if recent.ndim != 1 or scaler.keys() != {"scale", "good_steps"} or not lora:
        raise _damaged(path, "a part of it is missing")
    if bad := not_finite(lora):
        raise _damaged(path, f"{bad[0]} holds values that are not numbers")
    return TrainingState(metadata["step"], lora, optimizer, scaler, tuple(recent.tolist()), metadata["overflows"],
                         metadata.get("skipped", 0)), metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """What the state's file says of itself, without its tensors. Raises LoraFileError as `read` does."""
    if not os.path.isdir(path.parent):
        raise LoraFileError(f"There is no run {path.parent}", remedy="name one that `runs --output-dir FOLDER` lists, with the "
                            "same --output-dir, or its folder")
    if not os.path.isfile(path):
        raise LoraFileError(f"There is no training state at {path}", why="the run kept none, or it was removed", remedy=_ANEW)
    with translated(f"reading {path}"):
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = json.loads((file.metadata() or {})[_KEY])
            if not all(isinstance(metadata[name], int) for name in ("version", "step", "overflows")):
                raise ValueError("no counts")
        except SafetensorError as error:
            raise _damaged(path, str(error)) from error
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise LoraFileError(f"{path} is not a training state",
                                remedy=f"choose a run's folder or its {FILE_NAME}") from error
    if metadata["version"] > VERSION:
        raise LoraFileError(f"{path} was written by a newer version", remedy="update the extension")
    return metadata


def _damaged(path: Path, why: str) -> LoraFileError:
    return LoraFileError(f"The training state {path} cannot be read", why=f"it is damaged or no state ({why})", remedy=_ANEW)
