"""What the frozen model computes in, and the loss scaling that fp16 needs.

The LoRA's weights, their gradients and the optimiser's state are fp32 always; only activations change.
"""

from __future__ import annotations

import torch

from lib_lora_train.errors import HostError, SettingError

TRAINABLE = ("cuda", "cpu", "mps", "xpu")  # ROCm calls itself cuda


def compute_dtype(mixed_precision: str, device: torch.device, *, weights: torch.dtype) -> torch.dtype:
    """The activations' dtype for kohya's `mixed_precision`; "auto" looks at the device and at the frozen `weights`.

    On CUDA "auto" computes in what the weights are stored in (the WebUI keeps fp16), so that none has to be cast at every
    step. fp32 weights are computed with in bf16 or, on older GPUs, as they are: the WebUI holds them where its user started
    it with --no-half, as on a GTX 16xx, whose fp16 gives NaN. bf16 is asked of compute capability 8 (Ampere) and above only:
    older GPUs emulate it, slower than fp32.
    Raises SettingError where the device cannot compute in what was asked, and HostError where nothing can be trained on it.
    """
    if device.type not in TRAINABLE:
        raise HostError(
            f"Training on {'DirectML' if device.type == 'privateuseone' else f'the device {device.type!r}'} is not supported",
            why="its PyTorch lacks operations that training needs",
            remedy="start the WebUI with --use-cpu all, or with a PyTorch for CUDA or ROCm")
    cuda = device.type == "cuda"
    ampere = cuda and torch.cuda.get_device_capability(device)[0] >= 8
    if mixed_precision == "auto":
        if not cuda:
            return torch.float32
        if ampere:
            return torch.float16 if weights == torch.float16 else torch.bfloat16
        return torch.float32 if weights == torch.float32 else torch.float16
    if mixed_precision == "bf16":
        if cuda and not ampere:
            raise SettingError("mixed_precision = 'bf16' is not possible on this GPU",
                               why="it is older than Ampere (RTX 30)", remedy="use fp16 or auto")
        return torch.bfloat16
    if mixed_precision == "fp16":
        if not cuda:
            raise SettingError(f"mixed_precision = 'fp16' is not possible on the device {device.type!r}",
                               why="half precision needs a CUDA GPU", remedy="use auto, no or bf16")
        return torch.float16
    return torch.float32


class LossScaler:
    """Dynamic loss scaling as in Micikevicius et al., "Mixed Precision Training" (arXiv 1710.03740), section 3.2.

    The scale doubles after `growth_interval` good steps and halves after an overflow. Everything is a tensor on the
    device, so that nothing waits for it. torch's own GradScaler reads the overflow flag back to the CPU for every
    optimiser that is not fused and, before torch 2.3, does not run on the CPU at all.

    With `enabled=False` the scale is 1 and only the overflow check is left: a step whose gradients are not finite is
    never applied, in any precision, so the weights stay good.

    `scale` and `good_steps` stay the same tensors for ever: a captured step reads and writes them where they lie.
    """

    def __init__(self, device: torch.device, *, enabled: bool, initial: float = 65536.0, growth_interval: int = 2000) -> None:
        self.enabled = enabled
        self.growth_interval = growth_interval
        self.scale = torch.full((), initial if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def restore(self, *, scale: torch.Tensor, good_steps: torch.Tensor) -> None:
        """Go on where a scaler was that was kept. One that did not scale, as where the precision was another, knows nothing of
        a good scale: then this one begins anew."""
        if self.enabled and (scale != 1 or good_steps != 0):
            self.scale.copy_(scale)
            self.good_steps.copy_(good_steps)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call backward on."""
        return loss * self.scale if self.enabled else loss

    def inverse(self) -> torch.Tensor | None:
        """What the gradients of a scaled loss are to be multiplied by; None where it is not scaled."""
        return self.scale.reciprocal() if self.enabled else None

    def update(self, overflowed: torch.Tensor) -> None:
        """Adapt the scale; `overflowed` is a 0-d bool tensor on the device."""
        if self.enabled:
            bad = overflowed.float()
            self.good_steps.add_(1).mul_(1 - bad)
            grown = (self.good_steps >= self.growth_interval).float()
            self.scale.mul_(1 - 0.5 * bad + grown)  # halved, kept or doubled: bad and grown are never both 1
            self.good_steps.mul_(1 - grown)
