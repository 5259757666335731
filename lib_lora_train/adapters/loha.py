"""LoHa beside one layer (Hyeon-Woo et al. 2022, arXiv 2108.06098; LyCORIS): ΔW = (alpha / r) · (A₁ B₁) ∘ (A₂ B₂)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lib_lora_train.adapters.base import WorkingCopy, alpha_of, required
from lib_lora_train.adapters.targets import Target
from lib_lora_train.errors import LoraFileError
from lib_lora_train.model.ops.composed import composed_conv2d, composed_linear
from lib_lora_train.model.ops.convolution import frozen_conv2d
from lib_lora_train.model.ops.linear import frozen_linear
from lib_lora_train.model.ops.weights import Weight

NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


class LoHaLayer(nn.Module):
    """Aᵢ [out, r] and Bᵢ [r, in·k·k] in fp32; a `LayerAdapter`. ΔW is made anew wherever it is used."""

    def __init__(self, factors: tuple[Tensor, Tensor, Tensor, Tensor], *, alpha: float, kernel: tuple[int, ...] = ()) -> None:
        """`factors` are A₁, B₁, A₂, B₂; `kernel` the size of a convolution above 1x1."""
        super().__init__()
        self.w1_a, self.w1_b, self.w2_a, self.w2_b = map(nn.Parameter, factors)
        self.alpha, self.multiplier, self.kernel = float(alpha), 1.0, kernel

    @property
    def rank(self) -> int:
        """r."""
        return self.w1_b.shape[0]

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """A₁, B₁, A₂, B₂."""
        return self.w1_a, self.w1_b, self.w2_a, self.w2_b

    def product(self, w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
        """ΔW [out, in, *kernel] at multiplier 1."""
        delta = (w1_a @ w1_b) * (w2_a @ w2_b) * (self.alpha / self.rank)
        return delta.unflatten(1, (-1, *self.kernel)) if self.kernel else delta

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """See `LayerAdapter`."""
        y = frozen_linear(x, weight, bias)
        return y + composed_linear(x, self._scaled, self.factors) if self.multiplier else y

    def conv2d(self, x: Tensor, weight: Weight, bias: Tensor | None, *, stride: int, padding: int) -> Tensor:
        """See `LayerAdapter`."""
        y = frozen_conv2d(x, weight, bias, stride=stride, padding=padding)
        if not self.multiplier:
            return y
        return y + composed_conv2d(x, self._scaled_kernel, self.factors, stride=stride, padding=padding)

    def use_working_copies(self, copy: WorkingCopy) -> None:
        """It composes in fp32 and rounds once."""

    def tensors(self) -> dict[str, Tensor]:
        """The four factors and alpha as LyCORIS' files have them."""
        return dict(zip(NAMES, (factor.detach() for factor in self.factors), strict=True)) | {
            "alpha": torch.tensor(self.alpha)}

    def _scaled(self, *factors: Tensor) -> Tensor:
        return self.product(*factors) if self.multiplier == 1 else self.product(*factors) * self.multiplier

    def _scaled_kernel(self, *factors: Tensor) -> Tensor:
        delta = self._scaled(*factors)
        return delta if delta.ndim == 4 else delta[:, :, None, None]


@dataclasses.dataclass(frozen=True)
class LoHa:
    """The `AdapterKind` of LoHa."""

    network_module: ClassVar[str] = "lycoris.kohya"
    tensor_names: ClassVar[Collection[str]] = (*NAMES, "alpha")

    @property
    def arguments(self) -> dict[str, str]:
        """See `AdapterKind`."""
        return {"algo": "loha"}

    def build(self, target: Target, *, rank: int, alpha: float, generator: torch.Generator) -> LoHaLayer:
        """A₁ with deviation 0.1, B₁ and B₂ with 1, A₂ zero, as in LyCORIS."""
        width = target.in_features * math.prod(target.kernel)
        w1_a = torch.empty(target.out_features, rank).normal_(std=0.1, generator=generator)
        w1_b, w2_b = (torch.empty(rank, width).normal_(generator=generator) for _ in range(2))
        return LoHaLayer((w1_a, w1_b, torch.zeros(target.out_features, rank), w2_b), alpha=alpha, kernel=target.kernel)

    def load(self, target: Target, tensors: Mapping[str, Tensor]) -> LoHaLayer:
        """See `AdapterKind`."""
        factors = tuple(required(target, tensors, name).flatten(1) for name in NAMES)
        rank, width = factors[1].shape[0], target.in_features * math.prod(target.kernel)
        if [tuple(f.shape) for f in factors] != [(target.out_features, rank), (rank, width)] * 2:
            raise LoraFileError(
                "The LoRA file does not fit the model", why=f"{target.key} is {[tuple(f.shape) for f in factors]} in the file "
                f"and {target.in_features} -> {target.out_features} in the model",
                remedy="choose a LoHa that was made for this kind of model")
        return LoHaLayer(factors, alpha=alpha_of(target, tensors, rank=rank), kernel=target.kernel)

    def rank_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """See `AdapterKind`."""
        return shapes["hada_w1_b"][0]

    def cost(self, target: Target, *, rank: int) -> int:
        """The numbers of all factors."""
        return 2 * rank * (target.in_features * math.prod(target.kernel) + target.out_features)

    def composed(self, target: Target, *, rank: int) -> int:
        """ΔW; what it is made of comes and goes before the rest is there."""
        return target.out_features * target.in_features * math.prod(target.kernel)
