"""The autoencoder (ldm's `AutoencoderKL`, arXiv 2112.10752) as functions over borrowed tensors.

Used to encode images and to decode samples; it is never trained, so no graph is built.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_lora_train.errors import SettingError
from lib_lora_train.model.architecture import VAEConfig
from lib_lora_train.model.ops.layers import Layers, attention

EPS = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)


class VAE:
    """Images to the mean and standard deviation of latents, and latents to images.

    Computes in fp32 whatever the weights' dtype (SDXL's VAE overflows in fp16).
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: VAEConfig) -> None:
        """`tensors` under local names, without "first_stage_model."."""
        self.config = config
        self.layers = Layers(tensors)
        self.tensors = self.layers.tensors

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B, 3, H, W] in [-1, 1] -> (mean, standard deviation), each [B, 4, H/8, W/8] fp32, unscaled.

        A sample is `mean + std * noise`; the UNet takes it times `architecture.latent_scale`. NaN is not checked for.
        Raises SettingError where height or width is not a multiple of 8.
        """
        height, width = pixels.shape[-2:]
        if height % self.config.factor or width % self.config.factor:
            raise SettingError(f"A picture of {width}x{height} pixels cannot be encoded",
                               remedy=f"use widths and heights that are multiples of {self.config.factor}")
        x = pixels.to(torch.float32)
        layers, last = self.layers, len(self.config.encoder_levels) - 1
        x = layers.conv2d("encoder.conv_in", x, padding=1)
        for level, blocks in enumerate(self.config.encoder_levels):
            x = self._level(f"encoder.down.{level}", blocks, x)
            if level != last:
                # One row and one column of zeros, on the far sides only.
                x = layers.conv2d(f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self._end("encoder", self._middle("encoder", x))
        if layers.has("quant_conv"):
            x = layers.conv2d("quant_conv", x)
        mean, log_variance = x.float().chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents [B, 4, h, w] -> pixels [B, 3, 8h, 8w] fp32, about in [-1, 1] (not clamped)."""
        layers, x = self.layers, latents.to(torch.float32)
        if layers.has("post_quant_conv"):
            x = layers.conv2d("post_quant_conv", x)
        x = self._middle("decoder", layers.conv2d("decoder.conv_in", x, padding=1))
        for level, blocks in reversed(list(enumerate(self.config.decoder_levels))):
            x = self._level(f"decoder.up.{level}", blocks, x)
            if level != 0:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = layers.conv2d(f"decoder.up.{level}.upsample.conv", x, padding=1)
        return self._end("decoder", x).float()

    def _level(self, name: str, blocks: int, x: Tensor) -> Tensor:
        for block in range(blocks):
            x = self._resnet(f"{name}.block.{block}", x)
            if self.layers.has(f"{name}.attn.{block}.q"):
                x = self._attention(f"{name}.attn.{block}", x)
        return x

    def _middle(self, part: str, x: Tensor) -> Tensor:
        x = self._resnet(f"{part}.mid.block_1", x)
        x = self._attention(f"{part}.mid.attn_1", x)
        return self._resnet(f"{part}.mid.block_2", x)

    def _end(self, part: str, x: Tensor) -> Tensor:
        x = self.layers.group_norm(f"{part}.norm_out", x, eps=EPS, silu=True)
        return self.layers.conv2d(f"{part}.conv_out", x, padding=1)

    def _resnet(self, name: str, x: Tensor) -> Tensor:
        layers = self.layers
        h = layers.conv2d(f"{name}.conv1", layers.group_norm(f"{name}.norm1", x, eps=EPS, silu=True), padding=1)
        h = layers.conv2d(f"{name}.conv2", layers.group_norm(f"{name}.norm2", h, eps=EPS, silu=True), padding=1)
        if layers.has(f"{name}.nin_shortcut"):
            x = layers.conv2d(f"{name}.nin_shortcut", x)
        return x + h

    def _attention(self, name: str, x: Tensor) -> Tensor:
        """Single-headed self-attention over the pixels of x [B, C, h, w]."""
        height = x.shape[-2]
        layers, norm = self.layers, self.layers.group_normed(f"{name}.norm", eps=EPS, rows=True)
        q, k, v = layers.linears([f"{name}.{projection}" for projection in "qkv"], x, recipe=norm)
        h = layers.linear(f"{name}.proj_out", attention(q, k, v, heads=1))
        return x + h.unflatten(1, (height, -1)).permute(0, 3, 1, 2)
