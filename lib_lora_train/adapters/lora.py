"""LoRA beside one layer (Hu et al. 2021, arXiv 2106.09685): h = W x + b + (alpha / r) · B A x.

The layer owns A (`down`) and B (`up`); `model.ops` computes what they add together with the frozen layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lib_lora_train.adapters.base import WorkingCopy, alpha_of, required
from lib_lora_train.adapters.targets import Target
from lib_lora_train.errors import LoraFileError
from lib_lora_train.model.ops.linear import LoRADelta

DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"


class LoRALayer(nn.Module):
    """A [r, in] and B [out, r] in fp32; a `DeltaAdapter`. For a convolution above 1x1, A is [r, in, k, k].

    `alpha` is a Python number: a tensor would have to be read back from the device at each step.
    """

    def __init__(self, down: Tensor, up: Tensor, *, alpha: float, as_conv: bool = False) -> None:
        """`as_conv` writes A and B of a linear layer as 1x1 convolutions."""
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.alpha = float(alpha)
        self.multiplier = 1.0
        self.as_conv = as_conv or down.ndim == 4
        self._working: tuple[Tensor, Tensor] | None = None

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / r, times the multiplier."""
        return self.multiplier * self.alpha / self.rank

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """A and B."""
        return self.down, self.up

    def product(self, down: Tensor, up: Tensor) -> Tensor:
        """ΔW [out, in, *kernel] at multiplier 1."""
        return (up @ down.flatten(1) * (self.alpha / self.rank)).unflatten(1, down.shape[1:])

    def delta(self) -> LoRADelta | None:
        """What is added to the frozen layer; None at multiplier 0, which is bit for bit the layer without a LoRA."""
        return LoRADelta(self.down, self.up, self.scale, self._working) if self.multiplier else None

    def use_working_copies(self, copy: WorkingCopy) -> None:
        """Compute with copies of A and B, where there are both."""
        down, up = copy(self.down), copy(self.up)
        self._working = None if down is None or up is None else (down, up)

    def tensors(self) -> dict[str, Tensor]:
        """A, B and alpha as kohya's files have them."""
        down, up = (side[:, :, None, None] if self.as_conv and side.ndim == 2 else side
                    for side in (self.down.detach(), self.up.detach()))
        return {DOWN: down, UP: up, ALPHA: torch.tensor(self.alpha)}


class LoRA:
    """The `AdapterKind` of plain LoRA."""

    network_module = "networks.lora"
    tensor_names = (DOWN, UP, ALPHA)
    arguments: Mapping[str, str] = MappingProxyType({})

    def build(self, target: Target, *, rank: int, alpha: float, generator: torch.Generator) -> LoRALayer:
        """A uniform as kaiming_uniform(a=√5) makes it, B zero."""
        shape = (target.in_features, *target.kernel)
        bound = 1 / math.sqrt(math.prod(shape))     # kaiming_uniform: gain(√5) · √3 / √fan_in, gain = √(1/3)
        down = torch.empty(rank, *shape).uniform_(-bound, bound, generator=generator)
        return LoRALayer(down, torch.zeros(target.out_features, rank), alpha=alpha, as_conv=target.as_conv)

    def load(self, target: Target, tensors: Mapping[str, Tensor]) -> LoRALayer:
        """Without an alpha it is the rank, as old files mean it."""
        down, up = (required(target, tensors, name) for name in (DOWN, UP))
        kernel = down.shape[2:] if down.shape[2:].numel() != 1 else ()
        if any(side.ndim not in (2, 4) for side in (down, up)) or kernel != target.kernel or up.shape[2:].numel() != 1:
            raise LoraFileError(
                f"The layer {target.key} does not fit the model", why=f"it is {tuple(down.shape)} and {tuple(up.shape)} in the "
                "file", remedy="choose a LoRA that was made for this kind of model")
        rank = down.shape[0]
        if (down.shape[1], up.shape[0], up.shape[1]) != (target.in_features, target.out_features, rank):
            raise LoraFileError(
                "The LoRA file does not fit the model",
                why=f"{target.key} is {down.shape[1]} -> {rank}/{up.shape[1]} -> {up.shape[0]} in the file and "
                f"{target.in_features} -> {target.out_features} in the model",
                remedy="choose a LoRA that was made for this kind of model")
        return LoRALayer(down.reshape(rank, target.in_features, *target.kernel), up.flatten(1), as_conv=target.as_conv,
                         alpha=alpha_of(target, tensors, rank=rank))

    def rank_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """See `AdapterKind`."""
        return shapes[DOWN][0]

    def cost(self, target: Target, *, rank: int) -> int:
        """The numbers of A and B."""
        return rank * (target.in_features * math.prod(target.kernel) + target.out_features)

    def composed(self, target: Target, *, rank: int) -> int:
        """None: the product is never made."""
        return 0
