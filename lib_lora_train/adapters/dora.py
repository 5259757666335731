"""DoRA around another adapter (Liu et al. 2024, arXiv 2402.09353): W' = m · (W + ΔW) / ‖W + ΔW‖.

Norm and magnitude are those of each input (a column of the weight), as the WebUI v1.10.1 applies `dora_scale` [1, in, …]
(extensions-builtin/Lora/network.py, apply_weight_decompose; LyCORIS' `wd_on_output=False`). So the layer is the one inside on
an input whose channels are scaled, and no weight has to be composed for the product with x. The norm's gradient is followed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lib_lora_train.adapters.base import Adapter, AdapterKind, Product, WorkingCopy, required
from lib_lora_train.adapters.targets import Target
from lib_lora_train.errors import LoraFileError
from lib_lora_train.model.ops.composed import remade
from lib_lora_train.model.ops.convolution import frozen_conv2d
from lib_lora_train.model.ops.layers import adapted_conv2d, adapted_linear
from lib_lora_train.model.ops.linear import frozen_linear
from lib_lora_train.model.ops.weights import Weight, dense

SCALE = "dora_scale"
_TINY = 1e-12  # of the norm of an input that the model does not use


class DoRALayer(nn.Module):
    """The magnitudes m [1, in, …] in fp32 and the adapter inside; a `LayerAdapter`."""

    def __init__(self, inner: Adapter, scale: Tensor) -> None:
        super().__init__()
        assert isinstance(inner, Product), "ΔW is added to the weight before it is normalised"
        self.inner, self.dora_scale, self.multiplier = inner, nn.Parameter(scale), 1.0

    @property
    def rank(self) -> int:
        """Of the adapter inside."""
        return self.inner.rank

    @property
    def alpha(self) -> float:
        """Of the adapter inside."""
        return self.inner.alpha

    @torch.no_grad()
    def begin_at(self, weight: Weight) -> None:
        """See `OfWeight`."""
        norms = self._norms(weight.to(self.dora_scale.device))  # a host may have its model elsewhere before the training
        self.dora_scale.data = norms.reshape(1, -1, *[1] * (len(weight.shape) - 2))

    def merged(self, weight: Tensor) -> Tensor:
        """See `OfWeight`."""
        whole = weight + self.inner.product(*self.inner.factors).reshape(weight.shape)
        scales = self._scales(weight).view(1, -1, *[1] * (weight.ndim - 2))
        return weight + (whole * scales - weight) * self.multiplier

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """See `LayerAdapter`."""
        if not self.multiplier:
            return frozen_linear(x, weight, bias)
        y = adapted_linear(self.inner, (x * self._scales(weight)).to(x.dtype), weight, bias)
        return y if self.multiplier == 1 else torch.lerp(frozen_linear(x, weight, bias), y, self.multiplier)

    def conv2d(self, x: Tensor, weight: Weight, bias: Tensor | None, *, stride: int, padding: int) -> Tensor:
        """See `LayerAdapter`."""
        frozen = None if self.multiplier == 1 else frozen_conv2d(x, weight, bias, stride=stride, padding=padding)
        if not self.multiplier:
            return frozen
        scaled = (x * self._scales(weight)[:, None, None]).to(x.dtype)
        y = adapted_conv2d(self.inner, scaled, weight, bias, stride=stride, padding=padding)
        return y if frozen is None else torch.lerp(frozen, y, self.multiplier)

    def use_working_copies(self, copy: WorkingCopy) -> None:
        """Those of the adapter inside."""
        self.inner.use_working_copies(copy)

    def tensors(self) -> dict[str, Tensor]:
        """Those of the adapter inside, and the magnitudes."""
        return {**self.inner.tensors(), SCALE: self.dora_scale.detach()}

    def _scales(self, weight: Weight) -> Tensor:
        """m / ‖W + ΔW‖ [in] in fp32."""
        return self.dora_scale.flatten() / self._norms(weight)

    def _norms(self, weight: Weight) -> Tensor:
        """‖W + ΔW‖ of each input, [in] in fp32."""
        def norms(*factors: Tensor) -> Tensor:
            delta = self.inner.product(*factors)
            whole = dense(weight, delta.dtype).reshape(delta.shape) + delta
            return torch.linalg.vector_norm(whole, dim=[d for d in range(whole.ndim) if d != 1]).clamp(min=_TINY)
        return remade(norms, self.inner.factors)


@dataclasses.dataclass(frozen=True)
class DoRA:
    """The `AdapterKind` of DoRA around another kind."""

    inner: AdapterKind
    network_module = "lycoris.kohya"

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """See `AdapterKind`."""
        return *self.inner.tensor_names, SCALE

    @property
    def arguments(self) -> dict[str, str]:
        """See `AdapterKind`."""
        return {"algo": "lora", **self.inner.arguments, "dora_wd": "True", "wd_on_output": "False"}

    def build(self, target: Target, *, rank: int, alpha: float, generator: torch.Generator) -> DoRALayer:
        """It needs `begin_at`."""
        inner = self.inner.build(target, rank=rank, alpha=alpha, generator=generator)
        return DoRALayer(inner, torch.ones(1, target.in_features, *[1] * len(target.kernel)))

    def load(self, target: Target, tensors: Mapping[str, Tensor]) -> DoRALayer:
        """See `AdapterKind`. Raises LoraFileError also for magnitudes of outputs."""
        scale = required(target, tensors, SCALE)
        if scale.shape[:2] != (1, target.in_features) or scale.numel() != target.in_features:
            raise LoraFileError(
                "The DoRA file cannot be continued", why=f"{target.key}.{SCALE} is {tuple(scale.shape)}: it is not one for "
                "each input, which is what the WebUI applies", remedy="choose one that was trained with wd_on_output=False")
        inner = {name: tensor for name, tensor in tensors.items() if name != SCALE}
        return DoRALayer(self.inner.load(target, inner), scale)

    def rank_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """See `AdapterKind`."""
        return self.inner.rank_of(shapes)

    def cost(self, target: Target, *, rank: int) -> int:
        """With the magnitudes."""
        return self.inner.cost(target, rank=rank) + target.in_features

    def composed(self, target: Target, *, rank: int) -> int:
        """That of the adapter inside; the weight whose norm is taken is made while little else is there."""
        return self.inner.composed(target, rank=rank)
