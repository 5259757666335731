"""What any torch optimizer needs to go on, as a flat mapping of tensors that a file can hold.

Of each weight: the tensors and numbers in the optimizer's `state`, under the weight's number. Of each group: the tensors in
it, and the numbers that changed since it was built, so that its options stay those of the settings. Python's numbers become
0-d tensors that nothing else in an optimizer is: bool, int64 and float64; a tuple of whole numbers becomes int64, 1-d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lib_lora_train.adapters.flat import FlatGroup, FlatWeights
from lib_lora_train.errors import LoraFileError, TrainingError

_OPTIONS = ("params", "name", "lr")
_OF_FLAT = "state/"  # before the names of what is kept of a flat parameter and has another shape


def state_of(optimizer: torch.optim.Optimizer, weights: FlatWeights, *, built: Sequence[Mapping[str, Any]],
             flat: bool) -> dict[str, Tensor]:
    """{"3.exp_avg", "unet.k": tensor}; tensors share memory with those in use. `built` are the groups as they were made, `flat`
    whether the optimizer has one parameter a group. Raises TrainingError for anything but tensors and numbers."""
    found: dict[str, Tensor] = {}
    for group, options, first in zip(weights.groups, optimizer.param_groups, built, strict=True):
        for name, value in options.items():
            if name not in _OPTIONS and (isinstance(value, Tensor) or name not in first or value != first[name]):
                found |= _encoded(f"{group.name}.{name}", value)
        if flat:
            for name, value in _encoded_all(optimizer.state.get(group.parameter, {})).items():
                found |= _cut(group, name, value)
        else:
            for number, weight, _ in group.members:
                found |= {f"{number}.{name}": value
                          for name, value in _encoded_all(optimizer.state.get(weight, {})).items()}
    return found


def _cut(group: FlatGroup, name: str, value: Tensor) -> dict[str, Tensor]:
    """What is kept of a flat parameter, weight by weight where that is possible: so it was kept before there were flat ones."""
    if value.ndim == 0:
        return {f"{number}.{name}": value for number, _, _ in group.members}
    if value.shape == group.parameter.shape:
        return {f"{number}.{name}": part for number, part in group.cut(value)}
    return {f"{group.name}.{_OF_FLAT}{name}": value}


def _encoded_all(state: Mapping[str, object]) -> dict[str, Tensor]:
    return {key: tensor for name, value in state.items() for key, tensor in _encoded(name, value).items()}


def _encoded(name: str, value: object) -> dict[str, Tensor]:
    """{name: tensor}; {} for None."""
    if value is None or isinstance(value, Tensor):
        return {} if value is None else {name: value}
    if isinstance(value, (bool, int, float)) or isinstance(value, tuple) and all(type(entry) is int for entry in value):
        return {name: torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)}
    raise TrainingError("The optimizer's state cannot be kept", why=f"{name} is a {type(value).__name__}")


def _decoded(tensor: Tensor) -> Any:
    if tensor.dtype == torch.int64:
        return tuple(tensor.tolist()) if tensor.ndim else int(tensor)
    return tensor.item() if not tensor.ndim and tensor.dtype in (torch.bool, torch.float64) else tensor


def load(kept: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, weights: FlatWeights, *, flat: bool) -> None:
    """Set what `state_of` has kept. Raises LoraFileError where it does not fit, before anything is changed."""
    of_weights: dict[int, dict[str, Tensor]] = {}
    of_groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in kept.items():
        owner, _, name = key.rpartition(".")  # a group's name may hold one
        (of_weights.setdefault(int(owner), {}) if owner.isdecimal() else of_groups.setdefault(owner, {}))[name] = tensor
    groups = {group.name: options for group, options in zip(weights.groups, optimizer.param_groups, strict=True)}
    if any(number >= len(weights.shapes) for number in of_weights) or of_groups.keys() - groups.keys():
        raise strange()
    new: list[tuple[nn.Parameter, dict[str, Tensor]]] = []
    for group in weights.groups:
        if flat:
            joined = _flattened(group, of_weights)
            others = {name.removeprefix(_OF_FLAT): tensor for name, tensor in of_groups.get(group.name, {}).items()
                      if name.startswith(_OF_FLAT)}
            new.append((group.parameter, joined | others))
        else:
            new.extend((weight, of_weights.get(number, {})) for number, weight, _ in group.members)
    for parameter, values in new:
        current = optimizer.state.get(parameter, {})
        if any(isinstance(current.get(name), Tensor) and current[name].shape != value.shape for name, value in values.items()):
            raise strange()
    for parameter, values in new:
        for name, value in values.items():
            _set(optimizer.state[parameter], name, value, like=parameter, stays=not _on_device(optimizer))
    for group_name, values in of_groups.items():
        for name, value in values.items():
            if not name.startswith(_OF_FLAT):
                _set(groups[group_name], name, value, like=weights.values)


def _set(where: dict[str, Any], name: str, value: Tensor, *, like: Tensor, stays: bool = False) -> None:
    current = where.get(name)
    if isinstance(current, Tensor):
        current.copy_(value)
        return
    decoded = _decoded(value)
    # Step counts lie on the CPU unless the kernels want them: as torch.optim.Optimizer.load_state_dict has it.
    where[name] = decoded if not isinstance(decoded, Tensor) or name == "step" and stays else decoded.to(like.device, copy=True)


def _on_device(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("capturable") or optimizer.defaults.get("fused"))


def _flattened(group: FlatGroup, of_weights: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What was kept of a group's weights as that of its flat parameter; zero for a weight of which nothing was kept."""
    joined: dict[str, Tensor] = {}
    for number, weight, start in group.members:
        for name, value in of_weights.get(number, {}).items():
            if not value.ndim:
                if not torch.equal(joined.setdefault(name, value), value):
                    raise strange()
                continue
            if value.shape != weight.shape:
                raise strange()
            flat = joined.setdefault(name, torch.zeros(len(group.parameter), dtype=value.dtype))
            if flat.ndim == 0:
                raise strange()
            flat[start:start + weight.numel()] = value.flatten()
    return joined


def strange() -> LoraFileError:
    """The refusal of a state of other weights."""
    return LoraFileError("The training state does not fit this run", why="other weights were trained in it",
                         remedy="start anew, or go on with the settings it was made with")
