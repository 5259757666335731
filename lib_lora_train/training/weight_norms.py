"""Max-norm regularisation (kohya's scale_weight_norms, apply_max_norm_regularization in sd-scripts' networks/lora.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_lora_train.adapters.base import Product
from lib_lora_train.adapters.lora import LoRALayer
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.events import Report, Warned
from lib_lora_train.training.loop import Progress


class ScaleWeightNorms:
    """A `Callback` that scales a layer's factors down after each step where ‖ΔW‖ is above `largest`, which is 0 for any norm.
    Nothing waits for the device, but `tell`."""

    def __init__(self, network: AdapterNetwork, largest: float) -> None:
        self._network, self._largest = network, largest
        layers = [getattr(layer, "inner", layer) for layer in network.layers.values() if largest]
        self._layers = [layer for layer in layers if isinstance(layer, Product)
                        and all(factor.requires_grad for factor in layer.factors)]
        self._norms: list[Tensor] = []

    def before_step(self, progress: Progress) -> bool:
        """See `Callback`."""
        return True

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """See `Callback`."""
        if not self._layers:
            return
        self._norms = []
        for layer in self._layers:
            norm = _norm(layer)
            clamped = norm.clamp(min=self._largest / 2)
            ratio = clamped.clamp(max=self._largest) / clamped
            for factor in layer.factors:
                factor.mul_(ratio ** (1 / len(layer.factors)))
            self._norms.append(norm * ratio)
        self._network.refresh()

    def tell(self, report: Report) -> None:
        """Report how many layers are held at the norm, and what the norms are on average."""
        if self._norms:
            norms = torch.stack(self._norms)
            held = int((norms >= self._largest * (1 - 1e-6)).sum())
            report(Warned(f"{held} of {len(norms)} layers are held at the weight norm {self._largest:g}; the mean norm is "
                          f"{float(norms.mean()):.3g}."))


def _norm(layer: Product) -> Tensor:
    """‖ΔW‖, 0-d."""
    if isinstance(layer, LoRALayer):
        down, up = layer.down.flatten(1), layer.up
        return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt() * abs(layer.alpha / layer.rank)  # as tr(BᵀB·AAᵀ)
    return layer.product(*layer.factors).norm()
