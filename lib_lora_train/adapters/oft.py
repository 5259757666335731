"""OFT of one layer (Qiu et al. 2023, arXiv 2306.07280): blocks of its outputs are rotated, W' = R W.

R = (I + Q)(I - Q)⁻¹ with Q = B - Bᵀ (Cayley), block by block, as sd-scripts (networks/oft.py), LyCORIS (diag-oft) and the WebUI
v1.10.1 (network_oft.py) have it: `oft_blocks` B [n, size, size], and as alpha the bound of ‖Q‖ for each output.
Since R turns the layer's outputs, no weight is composed: y' = y + y (R - I), and R - I = 2 Q (I - Q)⁻¹ without cancellation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from lib_lora_train.adapters.base import WorkingCopy, required
from lib_lora_train.adapters.targets import Target
from lib_lora_train.errors import LoraFileError
from lib_lora_train.model.ops.composed import composed_blocks
from lib_lora_train.model.ops.convolution import frozen_conv2d
from lib_lora_train.model.ops.linear import frozen_linear
from lib_lora_train.model.ops.weights import Weight

BLOCKS = "oft_blocks"


class OFTLayer(nn.Module):
    """B [n, size, size] in fp32; a `LayerAdapter`. `rank` is n, and `alpha` the constraint, 0 for none."""

    def __init__(self, blocks: Tensor, *, alpha: float) -> None:
        super().__init__()
        self.blocks, self.alpha, self.multiplier = nn.Parameter(blocks), float(alpha), 1.0

    @property
    def rank(self) -> int:
        """n, the number of blocks."""
        return self.blocks.shape[0]

    def begin_at(self, weight: Weight) -> None:
        """Zeros are no rotation of any weight."""

    def merged(self, weight: Tensor) -> Tensor:
        """See `OfWeight`."""
        blocks = weight.unflatten(0, (self.rank, -1))
        return weight + torch.einsum("knm,kn...->km...", self._turn(self.blocks), blocks).flatten(0, 1) * self.multiplier

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """See `LayerAdapter`."""
        if not self.multiplier:
            return frozen_linear(x, weight, bias)
        y = frozen_linear(x, weight, None)
        return _with_bias(y + composed_blocks(y, self._turn, [self.blocks]) * self.multiplier, bias)

    def conv2d(self, x: Tensor, weight: Weight, bias: Tensor | None, *, stride: int, padding: int) -> Tensor:
        """See `LayerAdapter`."""
        if not self.multiplier:
            return frozen_conv2d(x, weight, bias, stride=stride, padding=padding)
        y = frozen_conv2d(x, weight, None, stride=stride, padding=padding)
        turned = composed_blocks(y.permute(0, 2, 3, 1), self._turn, [self.blocks]).permute(0, 3, 1, 2)
        return _with_bias(y + turned * self.multiplier, None if bias is None else bias[:, None, None])

    def use_working_copies(self, copy: WorkingCopy) -> None:
        """The rotation is made in fp32."""

    def tensors(self) -> dict[str, Tensor]:
        """The blocks and the constraint."""
        return {BLOCKS: self.blocks.detach(), "alpha": torch.tensor(self.alpha)}

    def _turn(self, blocks: Tensor) -> Tensor:
        """R - I, [n, size, size]."""
        q = blocks - blocks.mT
        if self.alpha > 0:
            norm = torch.linalg.vector_norm(q)
            q = q * ((norm.clamp(max=self.alpha * q.shape[0] * q.shape[1]) + 1e-8) / (norm + 1e-8))
        # The variant that checks nothing does not wait for the device; I - Q has an inverse for every Q.
        return torch.linalg.solve_ex(torch.eye(q.shape[1], device=q.device) - q, 2 * q)[0]


@dataclasses.dataclass(frozen=True)
class OFT:
    """The `AdapterKind` of OFT. A rank is the number of blocks; where that does not divide a layer's outputs, the next smaller
    number that does."""

    network_module = "networks.oft"
    tensor_names = (BLOCKS, "alpha")
    arguments: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def build(self, target: Target, *, rank: int, alpha: float, generator: torch.Generator) -> OFTLayer:
        """Without a rotation."""
        count = _blocks(target, rank)
        size = target.out_features // count
        return OFTLayer(torch.zeros(count, size, size), alpha=alpha)

    def load(self, target: Target, tensors: Mapping[str, Tensor]) -> OFTLayer:
        """See `AdapterKind`."""
        blocks = required(target, tensors, BLOCKS)
        if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2] or blocks.shape[:2].numel() != target.out_features:
            raise LoraFileError("The LoRA file does not fit the model", why=f"{target.key}.{BLOCKS} is "
                                f"{tuple(blocks.shape)}, and the layer has {target.out_features} outputs in the model",
                                remedy="choose an OFT that was made for this kind of model")
        return OFTLayer(blocks, alpha=float(tensors["alpha"].flatten()[0]) if "alpha" in tensors else 0.0)

    def rank_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """See `AdapterKind`."""
        return shapes[BLOCKS][0]

    def cost(self, target: Target, *, rank: int) -> int:
        """The numbers of all blocks."""
        return target.out_features ** 2 // _blocks(target, rank)

    def composed(self, target: Target, *, rank: int) -> int:
        """Rotations, and what their gradient is made of."""
        return 3 * self.cost(target, rank=rank)


def _blocks(target: Target, rank: int) -> int:
    return next(count for count in range(min(rank, target.out_features), 0, -1) if target.out_features % count == 0)


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)
