"""The loss of a batch, with kohya's order of reductions: elementwise in fp32, mean over (C,H,W), times the example's
weight, times the SNR weight, mean over the batch."""

from __future__ import annotations

import torch


def min_snr_weight(snr: torch.Tensor, *, gamma: float, v_prediction: bool) -> torch.Tensor:
    """Min-SNR-γ (Hang et al. 2023, arXiv 2303.09556): min(s,γ)/s for ε, min(s,γ)/(s+1) for v. Shapes [B] -> [B]."""
    clamped = torch.clamp(snr, max=gamma)
    if v_prediction:
        return clamped / (snr + 1)
    # Pure noise (s = 0, a schedule with zero terminal SNR): the limit of s/s, not 0/0.
    return torch.where(snr > 0, clamped / snr, 1.0)


def weighted_loss(prediction: torch.Tensor, target: torch.Tensor, *, example_weight: torch.Tensor,
                  snr_weight: torch.Tensor | None) -> torch.Tensor:
    """Mean squared error of `prediction` against `target`, both [B,C,h,w], weights [B]; a 0-d fp32 tensor."""
    per_example = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3)) * example_weight
    if snr_weight is not None:
        per_example = per_example * snr_weight
    return per_example.mean()
