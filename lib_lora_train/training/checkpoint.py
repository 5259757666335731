"""What a run must remember to go on as if it had never been interrupted: the training state, and its file.

There is no random state in it: order, captions, timesteps and noise are functions of (seed, epoch, position, step). What
is left are the LoRA's fp32 weights, the optimiser's moments and step counts, the loss scaler, the step, and the losses
that the shown average is made of.

The file is safetensors, its facts as JSON in the metadata: nothing in it can run a program. It is written tensor by tensor,
since for a large LoRA it takes gigabytes that a machine in use may not have twice, and it is read in the same way, never
mapped, so that on Windows no open handle keeps it from being replaced.

Not here: which settings, pictures and checkpoint the state belongs to (`resume.py` puts them among the facts), when a
state is due and what happens if it cannot be written (`saver.py`).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lib_lora_train.adapters.lora import ALPHA
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.errors import LoraFileError, TrainingError, translated
from lib_lora_train.storage.atomic import replacing
from lib_lora_train.training.optimizers import RunOptimizer
from lib_lora_train.training.precision import LossScaler

FILE_NAME = "state.safetensors"
VERSION = 1  # raise when an older file can no longer be understood
_FACTS = "lora_train_state"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
           "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 64 << 20


@dataclass(frozen=True, eq=False)
class TrainingState:
    """The state after `step` steps.

    lora        the weights under kohya's keys, fp32; alphas fp64, since they are Python numbers where they are used
    optimizer   {"3.exp_avg": tensor}: what the optimiser keeps of its n-th weight
    scaler      {"scale", "good_steps"}, 0-d each
    recent      the losses of the shown average, oldest first
    overflows   steps in a row that overflowed
    """

    step: int
    lora: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    scaler: Mapping[str, Tensor]
    recent: tuple[float, ...]
    overflows: int


def capture(step: int, *, network: AdapterNetwork, optimizer: RunOptimizer, scaler: LossScaler, recent: tuple[float, ...],
            overflows: int) -> TrainingState:
    """The state as it is now. The tensors share memory with the running ones: write them before the next step."""
    alphas = {f"{key}.{ALPHA}": torch.tensor(layer.alpha, dtype=torch.float64) for key, layer in network.layers.items()}
    lora = {**network.state_dict(), **alphas}
    kept = {f"{number}.{name}": value for number, name, value in optimizer.state()}
    return TrainingState(step, lora, kept, {"scale": scaler.scale, "good_steps": scaler.good_steps}, recent, overflows)


def restore(state: TrainingState, *, optimizer: RunOptimizer, scaler: LossScaler) -> None:
    """Put optimiser and loss scaler where they were. The network is built from `state.lora` already.

    Raises LoraFileError where the moments do not fit the weights.
    """
    kept: dict[tuple[int, str], Tensor] = {}
    for key, tensor in state.optimizer.items():
        number, _, name = key.partition(".")
        kept[int(number), name] = tensor
    shapes = optimizer.weights.shapes
    strange = any(number >= len(shapes) or tensor.shape != (() if name == "step" else shapes[number])
                  for (number, name), tensor in kept.items())
    if strange or len({float(tensor) for (_, name), tensor in kept.items() if name == "step"}) > 1:
        raise LoraFileError("The training state does not fit this run", why="other weights were trained in it",
                            remedy="start anew, or go on with the settings it was made with")
    for number, name, value in optimizer.state():
        if (number, name) in kept:  # a weight that had never had a gradient has none
            value.copy_(kept[number, name])
    scaler.restore(scale=state.scaler["scale"], good_steps=state.scaler["good_steps"])


def write(path: Path, state: TrainingState, facts: Mapping[str, Any]) -> None:
    """Write the state's file, whole or not at all; `facts` are plain data.

    Raises OSError, and TrainingError if a weight is no number; the file that is there stays.
    """
    tensors = {**{f"lora.{key}": tensor for key, tensor in state.lora.items()},
               **{f"optimizer.{key}": tensor for key, tensor in state.optimizer.items()},
               **{f"scaler.{key}": tensor for key, tensor in state.scaler.items()},
               "recent": torch.tensor(state.recent, dtype=torch.float64)}
    told = {**facts, "version": VERSION, "step": state.step, "overflows": state.overflows}
    header: dict[str, Any] = {"__metadata__": {_FACTS: json.dumps(told)}}
    end = 0
    # The widest numbers first, as safetensors has them, so that each begins at a multiple of its own size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            # One copy to the CPU at a time: a synchronisation each, at a save only.
            tensor = tensors[name].detach().cpu().contiguous()
            if name.startswith("lora.") and not bool(torch.isfinite(tensor).all()):
                raise TrainingError("The training state was not kept", why=f"{name} holds values that are not numbers",
                                    remedy="lower the learning rate")
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))


def read(path: Path) -> tuple[TrainingState, dict[str, Any]]:
    """The state and its facts. Raises LoraFileError for a file that is not there, not a state, or damaged."""
    with translated(f"reading {path}"):
        try:
            with path.open("rb") as file:
                header, facts = _header(path, file)
                tensors = {name: _tensor(path, file, entry) for name, entry in header.items()}
        except FileNotFoundError:
            raise _missing(path) from None
        parts: dict[str, dict[str, Tensor]] = {"lora": {}, "optimizer": {}, "scaler": {}}
        for name, tensor in tensors.items():
            room, dot, key = name.partition(".")
            if dot and room in parts:
                parts[room][key] = tensor
            if room == "lora" and not bool(torch.isfinite(tensor).all()):
                raise _damaged(path, f"{name} holds values that are not numbers")
        listed = "recent" in tensors and tensors["recent"].ndim == 1
        if not listed or set(parts["scaler"]) != {"scale", "good_steps"} or not parts["lora"]:
            raise _damaged(path, "a part of it is missing")
        recent = tuple(tensors["recent"].tolist())
        return TrainingState(facts["step"], **parts, recent=recent, overflows=facts["overflows"]), facts


def read_facts(path: Path) -> dict[str, Any]:
    """What the state says of itself, without its tensors. Raises as `read` does."""
    with translated(f"reading {path}"):
        try:
            with path.open("rb") as file:
                return _header(path, file)[1]
        except FileNotFoundError:
            raise _missing(path) from None


def _header(path: Path, file: BinaryIO) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """(the tensors' entries in the order they lie, the facts); the file then stands at the first tensor."""
    size = path.stat().st_size
    try:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > min(size, _LARGEST_HEADER):
            raise ValueError("too long")
        header = json.loads(file.read(length))
        facts = json.loads(header.pop("__metadata__")[_FACTS])
        ordered = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
        sound = isinstance(facts["step"], int) and isinstance(facts["overflows"], int) and isinstance(facts["version"], int)
        end = 0
        for entry in ordered.values():
            start, stop = entry["data_offsets"]
            width = torch.empty((), dtype=_DTYPES[entry["dtype"]]).element_size()
            sound = sound and start == end and stop - start == math.prod(entry["shape"]) * width
            end = stop
    except (ValueError, LookupError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise LoraFileError(f"{path} is not a training state", remedy=f"choose a run's folder or its {FILE_NAME}") from error
    if not sound or 8 + length + end != size:
        raise _damaged(path, "its length is not what it announces")
    if facts["version"] > VERSION:
        raise LoraFileError(f"{path} was written by a newer version", remedy="update the extension")
    return ordered, facts


def _tensor(path: Path, file: BinaryIO, entry: Mapping[str, Any]) -> Tensor:
    start, end = entry["data_offsets"]
    data = bytearray(end - start)
    if file.readinto(data) != len(data):
        raise _damaged(path, "it ends too soon")
    dtype = _DTYPES[entry["dtype"]]
    return torch.frombuffer(data, dtype=dtype).reshape(entry["shape"]) if data else torch.empty(entry["shape"], dtype=dtype)


def _missing(path: Path) -> LoraFileError:
    return LoraFileError(f"There is no training state at {path}", why="the run kept none, or it was removed",
                         remedy="go on from its LoRA file with network_weights, or start anew")


def _damaged(path: Path, why: str) -> LoraFileError:
    return LoraFileError(f"The training state {path} is damaged", why=why,
                         remedy="go on from the run's LoRA file with network_weights, or start anew")
