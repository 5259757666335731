"""The UNet of SD1, SD2 and SDXL as functions over borrowed tensors.

Structure and names are those of ldm's `UNetModel` (Rombach et al. 2022, arXiv 2112.10752) and of sgm's, its successor
in SDXL (Podell et al. 2023, arXiv 2307.01952): residual blocks that are told the timestep, spatial transformers that
attend to the text, skip connections from the downward to the upward half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lib_lora_train.errors import SettingError
from lib_lora_train.model.architecture import Block, UNetConfig
from lib_lora_train.model.ops.layers import NO_ADAPTERS, Adapters, Layers, attention
from lib_lora_train.model.ops.recipes import GatedGELU
from lib_lora_train.model.ops.weights import is_nhwc_kernel

# ldm's GroupNorm32 keeps torch's default; its spatial transformers choose their own.
RESNET_EPS, TRANSFORMER_EPS = 1e-5, 1e-6


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoids of `timesteps` [N] (int or float): [N, dim] fp32, cosines first, periods from 2π to 10000·2π."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class UNet:
    """Predicts noise (or v) from noisy latents. Holds no state but the borrowed tensors."""

    def __init__(self, tensors: Mapping[str, Tensor], config: UNetConfig) -> None:
        """`tensors` under local names, without "model.diffusion_model."."""
        self.config = config
        self.checkpointable = tuple(_checkpointable(config))
        """Names of the blocks that can be recomputed in backward: residual blocks ("input_blocks.1.0"), transformer blocks
        ("input_blocks.1.1.transformer_blocks.0"), and of those the attentions (".attn1", ".attn2") and the feed-forward
        (".ff")."""
        self.layers = Layers(tensors)
        self.tensors = self.layers.tensors

    def __call__(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor | None = None, *,
                 adapters: Adapters = NO_ADAPTERS, checkpointed: Collection[str] = frozenset()) -> Tensor:
        """The prediction, of x's shape and dtype; everything is computed in x's dtype, norms in fp32.

        x: noisy latents [B, 4, h, w], scaled, h and w multiples of `2 ** config.halvings`.
        timesteps: [B] in 0…999, int or float.
        context: text condition [B, 77·n, config.context_dim].
        y: vector condition [B, config.adm_channels], None where the model has none.
        adapters: trained layers by local module name ("input_blocks.1.1.transformer_blocks.0.attn1.to_q").
        checkpointed: those of `checkpointable` that are recomputed in backward instead of keeping their activations.
            A block inside another one of them is not checkpointed once more.
        Raises SettingError for a height or width that does not survive the halvings.
        """
        self._check(x, y)
        layers = self.layers.adapted(adapters)
        assert set(checkpointed) <= set(self.checkpointable), "only these blocks can be recomputed"
        run = self.runner(frozenset(checkpointed)) if torch.is_grad_enabled() else DIRECTLY
        context = context.to(x.dtype)
        emb = self._time_and_vector(layers, timesteps, y, dtype=x.dtype)

        skips, x = [], x.contiguous(memory_format=self._order(x))
        for blocks in self.config.input_blocks:
            for block in blocks:
                x = self._block(layers, block, x, emb=emb, context=context, run=run)
            skips.append(x)
        for block in self.config.middle_block:
            x = self._block(layers, block, x, emb=emb, context=context, run=run)
        for blocks in self.config.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for block in blocks:
                x = self._block(layers, block, x, emb=emb, context=context, run=run)
        x = layers.conv2d("out.2", layers.group_norm("out.0", x, eps=RESNET_EPS, silu=True), padding=1)
        return x.contiguous()

    def runner(self, checkpointed: frozenset[str]) -> Run:
        """What runs the blocks while gradients are wanted; a dry run overrides it to watch them."""
        return Run(checkpointed)

    def _order(self, x: Tensor) -> torch.memory_format:
        """The memory layout of images between the layers. NHWC spares copies around each transformer. On the CPU kernels of
        either layout are used as they are; a GPU would copy NCHW kernels at each call, so images follow them."""
        nhwc = x.is_cpu or is_nhwc_kernel(self.layers.weight("input_blocks.1.0.in_layers.2"))
        return torch.channels_last if nhwc else torch.contiguous_format

    def _check(self, x: Tensor, y: Tensor | None) -> None:
        step, (height, width) = 2 ** self.config.halvings, x.shape[-2:]
        if height % step or width % step:
            raise SettingError(
                f"A picture of {width * 8}x{height * 8} pixels does not fit this model",
                why=f"its UNet halves both sides {self.config.halvings} times",
                remedy=f"use widths and heights that are multiples of {step * 8}")
        assert (y is None) == (self.config.adm_channels is None), "y belongs to models with a vector condition"

    def _time_and_vector(self, layers: Layers, timesteps: Tensor, y: Tensor | None, *, dtype: torch.dtype) -> Tensor:
        """What every residual block is told, [B, 4·model_channels], already through the SiLU they all begin with."""
        emb = timestep_embedding(timesteps, self.config.model_channels).to(dtype)
        emb = layers.linear("time_embed.2", F.silu(layers.linear("time_embed.0", emb)))
        if y is not None:
            emb = emb + layers.linear("label_emb.0.2", F.silu(layers.linear("label_emb.0.0", y.to(dtype))))
        return F.silu(emb)

    def _block(self, layers: Layers, block: Block, x: Tensor, *, emb: Tensor, context: Tensor, run: Run) -> Tensor:
        if block.kind == "resnet":
            return run(block.name, resnet, layers, block.name, x, emb)
        if block.kind == "transformer":
            return spatial_transformer(layers, block, x, context, heads=self.config.heads(x.shape[1]), run=run)
        if block.kind == "down":
            return layers.conv2d(f"{block.name}.op", x, stride=2, padding=1)
        if block.kind == "up":
            return layers.conv2d(f"{block.name}.conv", F.interpolate(x, scale_factor=2.0, mode="nearest"), padding=1)
        return layers.conv2d(block.name, x, padding=1)


class Run:
    """Runs the blocks of a UNet, those in `checkpointed` by recomputing them in backward. Not a dataclass, whose frozen fields
    torch.compile cannot follow."""

    def __init__(self, checkpointed: frozenset[str]) -> None:
        self.checkpointed = checkpointed

    def __call__(self, name: str, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """`function(*arguments)`, which is the block `name`."""
        if name not in self.checkpointed:
            return function(*arguments)
        # Reentrant checkpointing would lose the gradients of adapters where no input requires one. Nothing here is
        # random, and reading the generator's state would forbid CUDA graphs.
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)

    def inside(self, name: str) -> Run:
        """What runs the blocks inside the block `name`: directly, where that is recomputed as a whole."""
        return DIRECTLY if name in self.checkpointed else self


DIRECTLY = Run(frozenset())


def _checkpointable(config: UNetConfig) -> Iterator[str]:
    """In the order of computation, each block before those inside it."""
    for block in (*(block for blocks in config.input_blocks for block in blocks), *config.middle_block,
                  *(block for blocks in config.output_blocks for block in blocks)):
        if block.kind == "resnet":
            yield block.name
        for index in range(block.depth):
            name = f"{block.name}.transformer_blocks.{index}"
            yield from (name, f"{name}.attn1", f"{name}.attn2", f"{name}.ff")


def swappable(config: UNetConfig) -> tuple[str, ...]:
    """Names of the blocks whose weights can wait on the CPU, in the order of computation: residual blocks, transformer blocks,
    and what halves and doubles images. They are nearly all of a UNet's bytes, and none is inside another."""
    found = []
    for block in (*(block for blocks in config.input_blocks for block in blocks), *config.middle_block,
                  *(block for blocks in config.output_blocks for block in blocks)):
        if block.kind in ("resnet", "down", "up"):
            found.append(block.name)
        found += [f"{block.name}.transformer_blocks.{index}" for index in range(block.depth)]
    return tuple(found)


def resnet(layers: Layers, name: str, x: Tensor, emb: Tensor) -> Tensor:
    """A residual block: x [B, C, h, w], emb [B, E] after its SiLU -> [B, C', h, w]."""
    h = layers.group_norm(f"{name}.in_layers.0", x, eps=RESNET_EPS, silu=True)
    h = layers.conv2d(f"{name}.in_layers.2", h, padding=1)
    h = h + layers.linear(f"{name}.emb_layers.1", emb)[:, :, None, None]
    h = layers.group_norm(f"{name}.out_layers.0", h, eps=RESNET_EPS, silu=True)
    h = layers.conv2d(f"{name}.out_layers.3", h, padding=1)
    if layers.has(f"{name}.skip_connection"):
        x = layers.conv2d(f"{name}.skip_connection", x)
    return x + h


def spatial_transformer(layers: Layers, block: Block, x: Tensor, context: Tensor, *, heads: int,
                        run: Run = DIRECTLY) -> Tensor:
    """Transformer layers over the pixels of x [B, C, h, w], between two projections and beside a skip connection.

    The projections are 1x1 convolutions in SD1 and linear layers in SD2 and SDXL, which is the same over rows of pixels.
    In NHWC order an image is such rows already.
    """
    height, norm = x.shape[-2], layers.group_normed(f"{block.name}.norm", eps=TRANSFORMER_EPS, rows=True)
    h = layers.linear(f"{block.name}.proj_in", x, recipe=norm)
    for index in range(block.depth):
        name = f"{block.name}.transformer_blocks.{index}"
        h = run(name, transformer_block, layers, name, h, context, heads, run.inside(name))
    h = layers.linear(f"{block.name}.proj_out", h)
    return x + h.unflatten(1, (height, -1)).permute(0, 3, 1, 2)


def transformer_block(layers: Layers, name: str, x: Tensor, context: Tensor, heads: int, run: Run = DIRECTLY) -> Tensor:
    """Self-attention, attention to the text, gated feed-forward (GEGLU); x [B, h·w, C], context [B, m, D]."""
    x = run(f"{name}.attn1", self_attention, layers, name, x, heads)
    x = run(f"{name}.attn2", cross_attention, layers, name, x, context, heads)
    return run(f"{name}.ff", feed_forward, layers, name, x)


def self_attention(layers: Layers, block: str, x: Tensor, heads: int) -> Tensor:
    """x plus attention among its pixels [B, n, C], after a norm."""
    name, norm = f"{block}.attn1", layers.layer_normed(f"{block}.norm1")
    q, k, v = layers.linears([f"{name}.to_q", f"{name}.to_k", f"{name}.to_v"], x, bias=False, recipe=norm)
    return x + layers.linear(f"{name}.to_out.0", attention(q, k, v, heads=heads))


def cross_attention(layers: Layers, block: str, x: Tensor, context: Tensor, heads: int) -> Tensor:
    """x plus attention of its pixels [B, n, C] to the text [B, m, D], after a norm."""
    name, norm = f"{block}.attn2", layers.layer_normed(f"{block}.norm2")
    q = layers.linear(f"{name}.to_q", x, bias=False, recipe=norm)
    k, v = layers.linears([f"{name}.to_k", f"{name}.to_v"], context, bias=False)
    return x + layers.linear(f"{name}.to_out.0", attention(q, k, v, heads=heads))


def feed_forward(layers: Layers, block: str, x: Tensor) -> Tensor:
    """x plus the gated feed-forward of its pixels [B, n, C], after a norm."""
    norm = layers.layer_normed(f"{block}.norm3")
    return x + layers.linear(f"{block}.ff.net.2", layers.linear(f"{block}.ff.net.0.proj", x, recipe=norm), recipe=GatedGELU())
