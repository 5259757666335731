"""The noise schedule: how much signal is left at each timestep, and what the network predicts.

Ho et al. 2020 (arXiv 2006.11239) for x_t; Salimans & Ho 2022 (arXiv 2202.00512) for v; Lin et al. 2023
(arXiv 2305.08891) for zero terminal SNR.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib_lora_train.model.architecture import PredictionType


def scaled_linear_alphas_cumprod(*, start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> Tensor:
    """ᾱ of Stable Diffusion's schedule, [steps] fp32: √β runs linearly. Computed in fp64, as in ldm."""
    betas = torch.linspace(start ** 0.5, end ** 0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0).float()


def is_schedule(alphas_cumprod: Tensor) -> bool:
    """Whether these numbers can be ᾱ: a row of at least two, from below 1 down to at least 0."""
    return (alphas_cumprod.ndim == 1 and len(alphas_cumprod) > 1 and bool(
        (alphas_cumprod.diff() < 0).all() & (alphas_cumprod[0] < 1) & (alphas_cumprod[-1] >= 0)))


def rescaled_to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """√ᾱ shifted so that the last is 0 and scaled so that the first stays (Lin et al. 2023, algorithm 1).

    Rescaling twice changes nothing.
    """
    root = alphas_cumprod.double().sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * (first / (first - last))).square().to(alphas_cumprod.dtype)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """ᾱ for each timestep, and the prediction type that says what is learned."""

    alphas_cumprod: Tensor
    """[T] fp32, decreasing, on the device where the timesteps will be."""
    prediction_type: PredictionType

    @classmethod
    def build(cls, *, prediction_type: PredictionType, zero_terminal_snr: bool = False,
              alphas_cumprod: Tensor | None = None) -> NoiseSchedule:
        """From the host's ᾱ where there is one, else Stable Diffusion's."""
        alphas = scaled_linear_alphas_cumprod() if alphas_cumprod is None else alphas_cumprod.detach()
        alphas = alphas.float().cpu()  # a thousand numbers, once: not every device can rescale in fp64
        if zero_terminal_snr:
            alphas = rescaled_to_zero_terminal_snr(alphas)
        return cls(alphas, prediction_type)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule on another device."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = √ᾱ x_0 + √(1-ᾱ) ε; x_0 and noise [B, ...], t [B] integers."""
        alpha, sigma = self._alpha_sigma(t, like=x_0)
        return alpha * x_0 + sigma * noise

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should say: ε, or v = √ᾱ ε - √(1-ᾱ) x_0."""
        if self.prediction_type == "epsilon":
            return noise
        alpha, sigma = self._alpha_sigma(t, like=x_0)
        return alpha * noise - sigma * x_0

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio ᾱ / (1-ᾱ), [B] fp32; 0 at the last timestep of a zero-terminal-SNR schedule."""
        alphas_cumprod = self.alphas_cumprod[t]
        return alphas_cumprod / (1.0 - alphas_cumprod)

    def _alpha_sigma(self, t: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor]:
        alphas_cumprod = self.alphas_cumprod[t].reshape(-1, *(1,) * (like.ndim - 1))
        return alphas_cumprod.sqrt().to(like.dtype), (1.0 - alphas_cumprod).sqrt().to(like.dtype)
