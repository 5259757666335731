"""Optimiser by name, learning rate over the run, clipping, and a step that overflowed gradients cannot spoil."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


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

    `groups` are torch parameter groups with a "name" and an "lr" each. Overflow is read off the gradients' norm, which
    clipping needs anyway: it is not finite if and only if one of them is not (or the norm itself overflows, as bad).
    """

    def __init__(self, groups: Sequence[dict], *, weight_decay: float, max_grad_norm: float, device: torch.device) -> None:
        self.parameters = [p for group in groups for p in group["params"]]
        self.base_rates = [float(group["lr"]) for group in groups]
        self.max_grad_norm = max_grad_norm
        # The fused kernel takes the overflow flag as a tensor, so that the device decides alone; elsewhere it is read,
        # which costs nothing on the CPU.
        self._fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            [dict(group) for group in groups], weight_decay=weight_decay, fused=self._fused or None)

    def set_factor(self, factor: float) -> None:
        """Multiply every group's learning rate by the schedule's factor."""
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor

    def rates(self) -> dict[str, float]:
        """The learning rates in force, by the group's name."""
        return {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}

    def step(self) -> torch.Tensor:
        """Clip, apply and clear the (unscaled) gradients. Returns whether they overflowed: 0-d bool on the device."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or math.inf)
        overflowed = ~torch.isfinite(norm)
        if self._fused:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, overflowed.float()
            self.optimizer.step()
        elif not bool(overflowed):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return overflowed
