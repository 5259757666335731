"""What is left out at random while a network is trained, as kohya's `network_dropout`, `rank_dropout` and `module_dropout`.

No random state is used: each number is a hash of a key that the training loop gives to each image and step, of the layer, and
of the place in the tensor. So a step that is split, checkpointed or resumed leaves out the same. Without a key, as in samples
and measurements, nothing is left out.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_lora_train.adapters.lora import LoRALayer
from lib_lora_train.model.ops.convolution import frozen_conv2d
from lib_lora_train.model.ops.layers import Adapter, adapted_conv2d, adapted_linear
from lib_lora_train.model.ops.linear import LoRADelta, frozen_linear
from lib_lora_train.model.ops.weights import Weight

_BITS = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class DropoutRates:
    """Shares that are left out: of the numbers between A and B, of the ranks for each image, of the layers. The first two are
    for LoRA."""

    numbers: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    def __bool__(self) -> bool:
        return any(dataclasses.astuple(self))


class DropoutKeys:
    """The keys of the images that are computed now: [B, 2] int64 below 2³², one of its own and one that all of a step share.
    None while nothing is left out."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None


class DroppedLayer:
    """An adapter of which parts are left out in training; a `LayerAdapter`. `number` tells it from the other layers."""

    def __init__(self, layer: Adapter, rates: DropoutRates, keys: DropoutKeys, *, number: int) -> None:
        self._layer, self._rates, self._keys, self._number = layer, rates, keys, number
        self._masked = isinstance(layer, LoRALayer) and bool(rates.numbers or rates.rank)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """See `LayerAdapter`."""
        keys = self._keys.keys
        if keys is None:
            return adapted_linear(self._layer, x, weight, bias)
        frozen = frozen_linear(x, weight, bias)
        if not self._masked:
            return self._kept(frozen, adapted_linear(self._layer, x, weight, bias), keys)
        delta = self._delta()
        down, up = delta.factors(x.dtype)
        projected = F.linear(x, down)
        parts = projected.reshape(len(keys), -1, projected.shape[-1])                   # [B, n, r]
        projected = (parts * self._mask(keys, parts.shape, rank_dim=2).to(x.dtype)).view_as(projected)
        return self._kept(frozen, frozen + F.linear(projected, up) * delta.scale, keys)

    def conv2d(self, x: Tensor, weight: Weight, bias: Tensor | None, *, stride: int, padding: int) -> Tensor:
        """See `LayerAdapter`."""
        keys = self._keys.keys
        if keys is None:
            return adapted_conv2d(self._layer, x, weight, bias, stride=stride, padding=padding)
        frozen = frozen_conv2d(x, weight, bias, stride=stride, padding=padding)
        if not self._masked:
            return self._kept(frozen, adapted_conv2d(self._layer, x, weight, bias, stride=stride, padding=padding), keys)
        delta = self._delta()
        down, up = (side if side.ndim == 4 else side[:, :, None, None] for side in delta.factors(x.dtype))
        projected = F.conv2d(x, down, stride=stride, padding=padding)                   # [B, r, h, w]
        projected = projected * self._mask(keys, projected.shape, rank_dim=1).to(x.dtype)
        return self._kept(frozen, frozen + F.conv2d(projected, up) * delta.scale, keys)

    def _delta(self) -> LoRADelta:
        delta = self._layer.delta()
        assert delta is not None, "a network is trained at multiplier 1"
        return delta

    def _kept(self, frozen: Tensor, adapted: Tensor, keys: Tensor) -> Tensor:
        """The adapted layer's output, or the frozen one's where the whole layer is left out in this step."""
        if not self._rates.module:
            return adapted
        return torch.where(_uniform(keys[0, 1], self._number * 4 + 2) < self._rates.module, frozen, adapted)

    def _mask(self, keys: Tensor, shape: torch.Size, *, rank_dim: int) -> Tensor:
        """What the numbers between A and B are multiplied by, so that their mean stays: [B, ...], broadcast against `shape`."""
        row = keys[:, 0].view(-1, *[1] * (len(shape) - 1))
        mask = torch.ones((), device=keys.device)
        if self._rates.numbers:
            places = torch.arange(shape[1:].numel(), device=keys.device).view(1, *shape[1:])
            mask = mask * (_uniform(row, self._number * 4, places) >= self._rates.numbers) / (1 - self._rates.numbers)
        if self._rates.rank:
            ranks = torch.arange(shape[rank_dim], device=keys.device)
            ranks = ranks.view(-1, *[1] * (len(shape) - 1 - rank_dim))
            mask = mask * (_uniform(row, self._number * 4 + 1, ranks) >= self._rates.rank) / (1 - self._rates.rank)
        return mask


def _uniform(key: Tensor, number: int, index: Tensor | int = 0) -> Tensor:
    """Numbers in [0, 1) that depend on key, number and index alone."""
    return _hashed(_hashed(key ^ (number * 0x9E3779B1 & _BITS)) + index & _BITS).float() / 2 ** 32


def _hashed(x: Tensor) -> Tensor:
    """A hash of integers below 2³² (T. Mueller's, with products below 2⁶³)."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & _BITS
    return (x >> 16) ^ x
