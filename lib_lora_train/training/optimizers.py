"""Optimizers by kohya's names, and how a run uses one: learning rates, clipping, and steps that overflowed.

An optimizer is added by one entry in `OPTIMIZERS`: an object with the attributes of `OptimizerSpec`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from lib_lora_train.adapters.flat import FlatGroup, FlatWeights
from lib_lora_train.errors import SettingError
from lib_lora_train.settings import named

ParamGroup = dict[str, Any]


class OptimizerSpec(Protocol):
    """How an optimizer is built, and what it can be given.

    class_name      what the LoRA file's metadata call it (ss_optimizer)
    accepts_flat    whether it treats every element alike (no norms of single weights): it is then given one flat parameter a
                    group instead of hundreds, which is one kernel instead of hundreds
    """

    class_name: str
    accepts_flat: bool

    def build(self, groups: list[ParamGroup], *, weight_decay: float) -> torch.optim.Optimizer:
        """The optimizer of torch's parameter groups, each with "name", "params" and "lr"."""

    def state_dict(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
        """What the optimizer keeps of a parameter, by name: of the parameter's shape, or 0-d. The tensors share memory with
        those in use and exist before the first step, so that a resumed run copies its state into them."""

    def set_training(self, optimizer: torch.optim.Optimizer, training: bool) -> None:
        """Switch between the weights to train and the weights to save, where they differ (schedule-free optimizers)."""


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), torch's own; one kernel a group where torch has one that heeds the
    overflow flag (CUDA; from torch 2.4 on the CPU). The one for MPS, from torch 2.4 on, ignores it."""

    class_name, accepts_flat = "torch.optim.adamw.AdamW", True

    def build(self, groups: list[ParamGroup], *, weight_decay: float) -> torch.optim.Optimizer:
        """See `OptimizerSpec`. Its state is there before the first step, so that it can be restored."""
        device = groups[0]["params"][0].device
        try:
            # Copies: torch writes its options into the groups, also where it then refuses.
            optimizer = torch.optim.AdamW([dict(group) for group in groups], weight_decay=weight_decay,
                                          fused=device.type in ("cuda", "cpu"),
                                          capturable=device.type == "cuda")
        except RuntimeError:
            optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=device), "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False)}
        return optimizer

    def state_dict(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
        """See `OptimizerSpec`."""
        return optimizer.state[parameter]

    def set_training(self, optimizer: torch.optim.Optimizer, training: bool) -> None:
        """AdamW saves the weights that it trains."""


OPTIMIZERS: dict[str, OptimizerSpec] = {"AdamW": AdamW()}
"""By kohya's name (optimizer_type)."""


def spec_of(name: str) -> OptimizerSpec:
    """The optimizer of this name, in upper or lower case. Raises SettingError where there is none."""
    for known, spec in OPTIMIZERS.items():
        if known.lower() == name.lower():
            return spec
    raise SettingError(f"{named('optimizer_type')} = {name!r} is not known", remedy=f"choose one of {', '.join(OPTIMIZERS)}")


class RunOptimizer:
    """The optimizer of a run on its flat weights.

    Overflow is read off the gradients' norm, which clipping needs anyway: it is not finite if one of them is not.
    """

    def __init__(self, weights: FlatWeights, spec: OptimizerSpec, *, weight_decay: float, max_grad_norm: float) -> None:
        self.weights, self.spec, self._max_grad_norm = weights, spec, max_grad_norm
        self._rates = {group.name: group.rate for group in weights.groups}
        self.optimizer = spec.build(
            [{"name": group.name, "lr": group.rate, "params": [group.parameter] if spec.accepts_flat else
              [weight for _, weight, _ in group.members]} for group in weights.groups], weight_decay=weight_decay)
        # A fused kernel takes the overflow flag and the learning rate as tensors, so that the device decides alone and nothing
        # waits for it. Without one the flag is read, which costs nothing on the CPU.
        self._fused = bool(self.optimizer.defaults.get("fused"))
        if self._fused and weights.values.device.type == "cuda":
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=weights.values.device)

    def set_learning_rate(self, factor: float) -> None:
        """Multiply each group's learning rate by the schedule's factor."""
        for group, flat in zip(self.optimizer.param_groups, self.weights.groups, strict=True):
            self._rates[flat.name] = flat.rate * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(flat.rate * factor)
            else:
                group["lr"] = flat.rate * factor

    def learning_rates(self) -> dict[str, float]:
        """The learning rates in force, by the group's name."""
        return dict(self._rates)

    def clip(self, inverse_scale: Tensor | None = None) -> Tensor:
        """Unscale the gradients and clip their norm (torch.nn.utils.clip_grad_norm_). Returns the norm before, 0-d on the
        device: not finite where they overflowed. `inverse_scale` (0-d) is what gradients of a scaled loss are multiplied
        by."""
        gradient = self.weights.gradient
        norm = torch.linalg.vector_norm(gradient)
        if inverse_scale is not None:
            norm = norm * inverse_scale
        factor = inverse_scale
        if self._max_grad_norm:
            clip = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            factor = clip if factor is None else factor * clip
        if factor is not None:
            gradient.mul_(factor)
        return norm

    def step(self, overflowed: Tensor) -> None:
        """Apply the gradients unless they overflowed."""
        if self._fused:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, overflowed.float()
            self.optimizer.step()
        elif not bool(overflowed):
            self.optimizer.step()
        self.weights.refresh()

    def set_training(self, training: bool) -> None:
        """Let the weights be those to train, or those to save."""
        self.spec.set_training(self.optimizer, training)

    def stored(self) -> list[Tensor]:
        """All that it keeps on the device, but for single numbers; it may be moved in place."""
        return [value for state in self.optimizer.state.values() for value in state.values()
                if isinstance(value, Tensor) and value.ndim]

    def state(self) -> Iterator[tuple[int, str, Tensor]]:
        """(number of a weight, name, tensor) of all that is kept of each weight, sharing memory with what is in use."""
        for group in self.weights.groups:
            yield from self._flat_state(group) if self.spec.accepts_flat else self._state(group)

    def _flat_state(self, group: FlatGroup) -> Iterator[tuple[int, str, Tensor]]:
        for name, value in self.spec.state_dict(self.optimizer, group.parameter).items():
            for number, view in group.cut(value) if value.ndim else ((n, value) for n, _, _ in group.members):
                yield number, name, view

    def _state(self, group: FlatGroup) -> Iterator[tuple[int, str, Tensor]]:
        for number, weight, _ in group.members:
            for name, value in self.spec.state_dict(self.optimizer, weight).items():
                yield number, name, value
