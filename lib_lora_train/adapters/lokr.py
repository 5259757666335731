"""LoKr beside one layer (Yeh et al. 2024, arXiv 2309.14859; LyCORIS): ΔW = (alpha / r) · W₁ ⊗ W₂, each whole or A·B."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_lora_train.adapters.base import WorkingCopy, alpha_of, required
from lib_lora_train.adapters.targets import Target
from lib_lora_train.errors import LoraFileError
from lib_lora_train.model.ops.convolution import frozen_conv2d
from lib_lora_train.model.ops.linear import frozen_linear
from lib_lora_train.model.ops.weights import Weight

FIRST, SECOND = ("lokr_w1", "lokr_w1_a", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a", "lokr_w2_b")


class LoKrLayer(nn.Module):
    """W₁ [a, c] and W₂ [b, d·k·k] in fp32, where out = a·b and in = c·d; a `LayerAdapter`.

    Each of the two is given whole, (W,), or as a product (A, B). The product with x is made of two small ones: first W₂ with
    each of the c parts of x, then W₁ across them; the Kronecker product itself is never made.
    """

    def __init__(self, first: tuple[Tensor, ...], second: tuple[Tensor, ...], *, rank: int, alpha: float,
                 kernel: tuple[int, ...] = (), as_conv: bool = False) -> None:
        """`as_conv` writes a whole W₂ of a linear layer as a 1x1 convolution."""
        super().__init__()
        self.first, self.second = nn.ParameterList(first), nn.ParameterList(second)
        self.rank, self.alpha, self.multiplier = rank, float(alpha), 1.0
        self.kernel, self.as_conv = kernel, as_conv

    @property
    def scale(self) -> float:
        """alpha / r; 1 where both are whole, as in LyCORIS and the WebUI."""
        return 1.0 if len(self.first) == len(self.second) == 1 else self.alpha / self.rank

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """Those of W₁, then those of W₂."""
        return *self.first, *self.second

    def product(self, *factors: Tensor) -> Tensor:
        """ΔW [out, in, *kernel] at multiplier 1."""
        w1, w2 = self._pair(factors)
        delta = torch.kron(w1, w2) * self.scale
        return delta.unflatten(1, (-1, *self.kernel)) if self.kernel else delta

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """See `LayerAdapter`."""
        y = frozen_linear(x, weight, bias)
        if not self.multiplier:
            return y
        w1, w2 = (factor.to(x.dtype) for factor in self._pair(self.factors))
        parts = F.linear(x.unflatten(-1, (w1.shape[1], -1)), w2)                    # [..., c, b]
        return y + F.linear(parts.mT, w1).mT.flatten(-2) * (self.multiplier * self.scale)

    def conv2d(self, x: Tensor, weight: Weight, bias: Tensor | None, *, stride: int, padding: int) -> Tensor:
        """See `LayerAdapter`."""
        y = frozen_conv2d(x, weight, bias, stride=stride, padding=padding)
        if not self.multiplier:
            return y
        w1, w2 = (factor.to(x.dtype) for factor in self._pair(self.factors))
        w2 = w2.unflatten(1, (-1, *(self.kernel or (1, 1))))
        parts = F.conv2d(x.unflatten(1, (w1.shape[1], -1)).flatten(0, 1), w2, stride=stride, padding=padding)
        parts = parts.unflatten(0, (len(x), -1))                                    # [B, c, b, h', w']
        return y + torch.einsum("ac,ncbhw->nabhw", w1, parts).flatten(1, 2) * (self.multiplier * self.scale)

    def use_working_copies(self, copy: WorkingCopy) -> None:
        """It casts its small factors instead."""

    def tensors(self) -> dict[str, Tensor]:
        """W₁ and W₂ and alpha as LyCORIS' files have them."""
        found = {}
        for names, factors in ((FIRST, self.first), (SECOND, self.second)):
            found |= dict(zip(names[:1] if len(factors) == 1 else names[1:], (f.detach() for f in factors), strict=True))
        if "lokr_w2" in found and (self.kernel or self.as_conv):
            found["lokr_w2"] = found["lokr_w2"].unflatten(1, (-1, *(self.kernel or (1, 1))))
        return found | {"alpha": torch.tensor(self.alpha)}

    def _pair(self, factors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """(W₁, W₂)."""
        first, second = factors[:len(self.first)], factors[len(self.first):]
        w1, w2 = (part[0] if len(part) == 1 else part[0] @ part[1] for part in (first, second))
        return w1, w2


@dataclasses.dataclass(frozen=True)
class LoKr:
    """The `AdapterKind` of LoKr.

    factor        the size of W₁'s sides, or the next smaller one that divides the layer's; -1 for the most even split
    full_matrix   W₂ is whole whatever the rank is
    """

    factor: int = -1
    full_matrix: bool = False
    network_module: ClassVar[str] = "lycoris.kohya"
    tensor_names: ClassVar[Collection[str]] = (*FIRST, *SECOND, "alpha")

    @property
    def arguments(self) -> dict[str, str]:
        """See `AdapterKind`."""
        return {"algo": "lokr", "factor": str(self.factor)} | ({"full_matrix": "True"} if self.full_matrix else {})

    def build(self, target: Target, *, rank: int, alpha: float, generator: torch.Generator) -> LoKrLayer:
        """W₁ and A uniform as kaiming_uniform(a=√5) makes them, W₂ or its B zero, as in LyCORIS."""
        (out_1, out_2), (in_1, in_2) = self._split(target)
        width = in_2 * math.prod(target.kernel)
        first = torch.empty(out_1, in_1).uniform_(-in_1 ** -0.5, in_1 ** -0.5, generator=generator)
        if self._second_is_full(target, rank):
            return LoKrLayer((first,), (torch.zeros(out_2, width),), rank=rank, alpha=rank, kernel=target.kernel,
                             as_conv=target.as_conv)
        a = torch.empty(out_2, rank).uniform_(-rank ** -0.5, rank ** -0.5, generator=generator)
        return LoKrLayer((first,), (a, torch.zeros(rank, width)), rank=rank, alpha=alpha, kernel=target.kernel,
                         as_conv=target.as_conv)

    def load(self, target: Target, tensors: Mapping[str, Tensor]) -> LoKrLayer:
        """Of any factor."""
        pairs = []
        for whole, a, b in (FIRST, SECOND):
            names = (whole,) if whole in tensors else (a, b)
            pairs.append(tuple(required(target, tensors, name).flatten(1) for name in names))
        first, second = pairs
        ranks = [pair[1].shape[0] for pair in pairs if len(pair) == 2]
        rank = ranks[-1] if ranks else max(1, int(alpha_of(target, tensors, rank=1)))  # LyCORIS writes it as alpha
        height, width = first[0].shape[0] * second[0].shape[0], first[-1].shape[1] * second[-1].shape[1]
        if (height, width) != (target.out_features, target.in_features * math.prod(target.kernel)) or any(
                len(pair) == 2 and pair[0].shape[1] != pair[1].shape[0] for pair in pairs):
            raise LoraFileError(
                "The LoRA file does not fit the model", why=f"{target.key} is {width} -> {height} in the file and "
                f"{target.in_features} -> {target.out_features} in the model",
                remedy="choose a LoKr that was made for this kind of model")
        return LoKrLayer(first, second, rank=rank, alpha=alpha_of(target, tensors, rank=rank), kernel=target.kernel,
                         as_conv=target.as_conv)

    def rank_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """See `AdapterKind`. A whole W₂ has the rank from which on it is whole."""
        low = shapes.get("lokr_w2_b") or shapes.get("lokr_w1_b")
        return low[0] if low else max(shapes["lokr_w2"][:2])

    def cost(self, target: Target, *, rank: int) -> int:
        """The numbers of W₁ and of W₂ or its factors."""
        (out_1, out_2), (in_1, in_2) = self._split(target)
        width = in_2 * math.prod(target.kernel)
        return out_1 * in_1 + (out_2 * width if self._second_is_full(target, rank) else rank * (out_2 + width))

    def composed(self, target: Target, *, rank: int) -> int:
        """None: the Kronecker product is never made."""
        return 0

    def _split(self, target: Target) -> tuple[tuple[int, int], tuple[int, int]]:
        return split(target.out_features, self.factor), split(target.in_features, self.factor)

    def _second_is_full(self, target: Target, rank: int) -> bool:
        return self.full_matrix or rank >= max(side for _, side in self._split(target)) / 2


def split(size: int, factor: int) -> tuple[int, int]:
    """`size` as a product of two, the smaller first: `factor` where that divides it, else the largest divisor that is not
    above it, and not above the root of `size`; -1 for no bound."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    most = math.isqrt(size) if factor <= 0 else min(factor, math.isqrt(size))
    smaller = next(part for part in range(most, 0, -1) if size % part == 0)
    return smaller, size // smaller
