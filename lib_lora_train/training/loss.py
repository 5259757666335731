"""The loss of each example, with kohya's order of reductions: elementwise in fp32, mean over (C,H,W), times the example's
weight, times the SNR weight. The mean over the batch, which comes last, is in the weights: see `training.step`."""

from __future__ import annotations

import torch


def min_snr_weight(snr: torch.Tensor, *, gamma: float, v_prediction: bool) -> torch.Tensor:
    """Min-SNR-γ (Hang et al. 2023, arXiv 2303.09556): min(s,γ)/s for ε, min(s,γ)/(s+1) for v. Shapes [B] -> [B]."""
    clamped = torch.clamp(snr, max=gamma)
    if v_prediction:
        return clamped / (snr + 1)
    # Pure noise (s = 0, a schedule with zero terminal SNR): the limit of s/s, not 0/0.
    return torch.nan_to_num(clamped / snr, nan=1.0)


def weighted_losses(prediction: torch.Tensor, target: torch.Tensor, *, example_weight: torch.Tensor,
                    snr_weight: torch.Tensor | None) -> torch.Tensor:
    """Mean squared errors of `prediction` against `target`, both [B,C,h,w], times weights [B]; [B] fp32."""
    per_example = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3)) * example_weight
    return per_example if snr_weight is None else per_example * snr_weight
