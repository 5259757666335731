"""Optimiser by name, learning rate over the run, clipping, and a step that overflowed gradients cannot spoil."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from lib_lora_train.adapters.flat import FlatWeights


def learning_rate_factor(schedule: str, step: int, *, total: int, warmup: int, cycles: int = 1) -> float:
    """What the learning rate is multiplied by in step `step` (from 0) of `total`.

    The formulas are those of transformers' `get_scheduler`, which kohya uses, so that curves can be compared.
    """
    if step < warmup:
        return step / max(1, warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return max(0.0, (total - step) / max(1, total - warmup))
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if schedule == "cosine_with_restarts":
        return 0.0 if progress >= 1.0 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((cycles * progress) % 1.0))))
    raise AssertionError(f"no schedule {schedule!r}")


class Stepper:
    """Gradients in, changed weights out: clipping, AdamW, and skipping of steps that overflowed.

    Overflow is read off the gradients' norm, which clipping needs anyway: it is not finite if and only if one of them is
    not (or the norm itself overflows, as bad). The optimiser's state is there from the beginning, at addresses that stay.
    """

    def __init__(self, weights: FlatWeights, *, weight_decay: float, max_grad_norm: float, captured: bool = False) -> None:
        """`captured`: whether `step` will be recorded once and replayed, also on another device than CUDA."""
        device = weights.values.device
        self.weights = weights
        self.max_grad_norm = max_grad_norm
        self._rates = {group.name: group.rate for group in weights.groups}
        # The fused kernel takes the overflow flag and the learning rate as tensors, so that the device decides alone.
        # Without it the flag is read, which costs nothing on the CPU.
        self.optimizer, self.fused = _adamw(weights, weight_decay=weight_decay)
        for group in self.optimizer.param_groups:
            if captured or device.type == "cuda":
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
            for parameter in group["params"]:
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), device=device), "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False)}

    def set_factor(self, factor: float) -> None:
        """Multiply every group's learning rate by the schedule's factor."""
        for group, flat in zip(self.optimizer.param_groups, self.weights.groups, strict=True):
            self._rates[flat.name] = flat.rate * factor
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(flat.rate * factor)
            else:
                group["lr"] = flat.rate * factor

    def rates(self) -> dict[str, float]:
        """The learning rates in force, by the group's name."""
        return dict(self._rates)

    def step(self, inverse_scale: torch.Tensor | None = None) -> torch.Tensor:
        """Unscale, clip, apply and clear the gradients. Returns whether they overflowed: 0-d bool on the device.

        `inverse_scale` (0-d, a power of two) is what gradients of a scaled loss are to be multiplied by.
        """
        gradient = self.weights.gradient
        norm = torch.linalg.vector_norm(gradient)
        if inverse_scale is not None:
            norm = norm * inverse_scale
        overflowed = ~torch.isfinite(norm)
        factor = inverse_scale
        if self.max_grad_norm:  # torch.nn.utils.clip_grad_norm_
            clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            factor = clip if factor is None else factor * clip
        if factor is not None:
            gradient.mul_(factor)
        if self.fused:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, overflowed.float()
            self.optimizer.step()
        elif not bool(overflowed):
            self.optimizer.step()
        gradient.zero_()
        self.weights.refresh()
        return overflowed

    def moments(self) -> Iterator[tuple[int, str, torch.Tensor]]:
        """(number of a weight, name, tensor) for all that is kept of each weight, sharing memory with what is in use."""
        for group in self.weights.groups:
            for name, value in self.optimizer.state[group.parameter].items():
                for number, view in group.cut(value) if value.ndim else ((n, value) for n, _, _ in group.members):
                    yield number, name, view


def _adamw(weights: FlatWeights, *, weight_decay: float) -> tuple[torch.optim.AdamW, bool]:
    """AdamW in one kernel a group where this torch has it for the device (CUDA; from 2.4 on the CPU), and whether it has."""
    def groups() -> list[dict[str, Any]]:
        return [{"name": group.name, "params": [group.parameter], "lr": group.rate} for group in weights.groups]
    cuda = weights.values.device.type == "cuda"
    try:
        return torch.optim.AdamW(groups(), weight_decay=weight_decay, fused=True, capturable=cuda), True
    except RuntimeError:
        return torch.optim.AdamW(groups(), weight_decay=weight_decay), False
