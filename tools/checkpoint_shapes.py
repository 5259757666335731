"""Names and shapes of a checkpoint's tensors, at any size.

Written down from the published configurations and not from our own code, so that tests of ours have something independent
to stand on: CompVis' v1-inference.yaml, Stability's v2-inference.yaml and sd_xl_base.yaml; the VAE is ldm's
AutoencoderKL, the text encoders are transformers' CLIPTextModel and OpenCLIP's. Names are local to each part.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

Shapes = Iterator[tuple[str, tuple[int, ...]]]

RES_BLOCKS = 2  # a level of the UNet, in every published model
POSITIONS = 77


@dataclasses.dataclass(frozen=True)
class UNetSize:
    """Channels and their multiples from level to level, transformer blocks at each level, and the text's width.

    linear    whether the transformers' projections are matrices (SD2, SDXL) or 1x1 convolutions (SD1)
    vector    width of the vector condition, None where there is none
    """

    channels: int
    multipliers: tuple[int, ...]
    depths: tuple[int, ...]
    middle_depth: int
    context: int
    linear: bool = False
    vector: int | None = None


def unet(size: UNetSize) -> Shapes:
    """The UNet's tensors in the order of its modules."""
    channels, embedding = size.channels, size.channels * 4
    yield from _layer("time_embed.0", embedding, channels)
    yield from _layer("time_embed.2", embedding, embedding)
    if size.vector is not None:
        yield from _layer("label_emb.0.0", embedding, size.vector)
        yield from _layer("label_emb.0.2", embedding, embedding)
    yield from _layer("input_blocks.0.0", channels, 4, 3, 3)
    widths, width, index = [channels], channels, 1
    for level, multiplier in enumerate(size.multipliers):
        for _ in range(RES_BLOCKS):
            yield from _unet_block(f"input_blocks.{index}", width, channels * multiplier, size, size.depths[level])
            width, index = channels * multiplier, index + 1
            widths.append(width)
        if level < len(size.multipliers) - 1:
            yield from _layer(f"input_blocks.{index}.0.op", width, width, 3, 3)
            index += 1
            widths.append(width)
    yield from _resnet("middle_block.0", width, width, embedding)
    yield from _transformer("middle_block.1", width, size, size.middle_depth)
    yield from _resnet("middle_block.2", width, width, embedding)
    index = 0
    for level, multiplier in reversed(list(enumerate(size.multipliers))):
        for block in range(RES_BLOCKS + 1):
            name, depth = f"output_blocks.{index}", size.depths[level]
            yield from _unet_block(name, width + widths.pop(), channels * multiplier, size, depth)
            width, index = channels * multiplier, index + 1
            if level and block == RES_BLOCKS:
                yield from _layer(f"{name}.{2 if depth else 1}.conv", width, width, 3, 3)
    yield from _layer("out.0", channels)
    yield from _layer("out.2", 4, channels, 3, 3)


def vae(*, channels: int, multipliers: tuple[int, ...], blocks: int) -> Shapes:
    """The VAE's tensors; `blocks` residual blocks at each resolution of the encoder, one more of the decoder."""
    yield from _layer("encoder.conv_in", channels, 3, 3, 3)
    width = channels
    for level, multiplier in enumerate(multipliers):
        for block in range(blocks):
            yield from _vae_resnet(f"encoder.down.{level}.block.{block}", width, channels * multiplier)
            width = channels * multiplier
        if level < len(multipliers) - 1:
            yield from _layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    yield from _vae_middle("encoder", width)
    yield from _layer("encoder.norm_out", width)
    yield from _layer("encoder.conv_out", 8, width, 3, 3)
    yield from _layer("decoder.conv_in", width, 4, 3, 3)
    yield from _vae_middle("decoder", width)
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for block in range(blocks + 1):
            yield from _vae_resnet(f"decoder.up.{level}.block.{block}", width, channels * multiplier)
            width = channels * multiplier
        if level:
            yield from _layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    yield from _layer("decoder.norm_out", width)
    yield from _layer("decoder.conv_out", 3, width, 3, 3)
    yield from _layer("quant_conv", 8, 8, 1, 1)
    yield from _layer("post_quant_conv", 4, 4, 1, 1)


def clip_text(*, vocabulary: int, width: int, layers: int) -> Shapes:
    """A text encoder under transformers' names, below "text_model."."""
    yield "embeddings.token_embedding.weight", (vocabulary, width)
    yield "embeddings.position_embedding.weight", (POSITIONS, width)
    for layer in range(layers):
        name = f"encoder.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _layer(f"{name}.self_attn.{projection}", width, width)
        yield from _layer(f"{name}.layer_norm1", width)
        yield from _layer(f"{name}.mlp.fc1", width * 4, width)
        yield from _layer(f"{name}.mlp.fc2", width, width * 4)
        yield from _layer(f"{name}.layer_norm2", width)
    yield from _layer("final_layer_norm", width)


def openclip_text(*, vocabulary: int, width: int, layers: int) -> Shapes:
    """A text encoder under OpenCLIP's names, its pooled vector projected to the same width."""
    yield "positional_embedding", (POSITIONS, width)
    yield "text_projection", (width, width)
    yield "logit_scale", ()
    for layer in range(layers):
        name = f"transformer.resblocks.{layer}"
        yield from _layer(f"{name}.ln_1", width)
        yield f"{name}.attn.in_proj_weight", (3 * width, width)
        yield f"{name}.attn.in_proj_bias", (3 * width,)
        yield from _layer(f"{name}.attn.out_proj", width, width)
        yield from _layer(f"{name}.ln_2", width)
        yield from _layer(f"{name}.mlp.c_fc", width * 4, width)
        yield from _layer(f"{name}.mlp.c_proj", width, width * 4)
    yield "token_embedding.weight", (vocabulary, width)
    yield from _layer("ln_final", width)


def scaled(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Standard normal `noise` made the tensor `name` of a checkpoint (its full name), so that activations, latents and
    images are of ordinary size: they stay finite in fp16 too. Changed in place."""
    mean, log_variance = slice(0, 4), slice(4, 8)
    if noise.ndim < 2:  # norms: weights about 1; biases about 0
        noise.mul_(0.05)
        if name.endswith("weight"):
            noise.add_(1)
        elif name == "first_stage_model.quant_conv.bias":
            noise[log_variance] -= 6
        return noise
    if "embedding" in name:
        return noise.mul_(0.5)
    noise.div_(math.sqrt(noise[0].numel()))
    if name == "first_stage_model.quant_conv.weight":
        noise[mean] *= 8  # latents of about 1 after the scale factor
        noise[log_variance] *= 0.2
    return noise


def _layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _unet_block(name: str, inside: int, outside: int, size: UNetSize, depth: int) -> Shapes:
    yield from _resnet(f"{name}.0", inside, outside, size.channels * 4)
    if depth:
        yield from _transformer(f"{name}.1", outside, size, depth)


def _resnet(name: str, inside: int, outside: int, embedding: int) -> Shapes:
    yield from _layer(f"{name}.in_layers.0", inside)
    yield from _layer(f"{name}.in_layers.2", outside, inside, 3, 3)
    yield from _layer(f"{name}.emb_layers.1", outside, embedding)
    yield from _layer(f"{name}.out_layers.0", outside)
    yield from _layer(f"{name}.out_layers.3", outside, outside, 3, 3)
    if inside != outside:
        yield from _layer(f"{name}.skip_connection", outside, inside, 1, 1)


def _transformer(name: str, width: int, size: UNetSize, depth: int) -> Shapes:
    square = (width, width) if size.linear else (width, width, 1, 1)
    yield from _layer(f"{name}.norm", width)
    yield from _layer(f"{name}.proj_in", *square)
    for number in range(depth):
        block = f"{name}.transformer_blocks.{number}"
        for attention, context in (("attn1", width), ("attn2", size.context)):
            yield from _layer(f"{block}.{attention}.to_q", width, width, bias=False)
            yield from _layer(f"{block}.{attention}.to_k", width, context, bias=False)
            yield from _layer(f"{block}.{attention}.to_v", width, context, bias=False)
            yield from _layer(f"{block}.{attention}.to_out.0", width, width)
        yield from _layer(f"{block}.ff.net.0.proj", width * 8, width)
        yield from _layer(f"{block}.ff.net.2", width, width * 4)
        for norm in ("norm1", "norm2", "norm3"):
            yield from _layer(f"{block}.{norm}", width)
    yield from _layer(f"{name}.proj_out", *square)


def _vae_middle(part: str, width: int) -> Shapes:
    yield from _vae_resnet(f"{part}.mid.block_1", width, width)
    yield from _layer(f"{part}.mid.attn_1.norm", width)
    for projection in ("q", "k", "v", "proj_out"):
        yield from _layer(f"{part}.mid.attn_1.{projection}", width, width, 1, 1)
    yield from _vae_resnet(f"{part}.mid.block_2", width, width)


def _vae_resnet(name: str, inside: int, outside: int) -> Shapes:
    yield from _layer(f"{name}.norm1", inside)
    yield from _layer(f"{name}.conv1", outside, inside, 3, 3)
    yield from _layer(f"{name}.norm2", outside)
    yield from _layer(f"{name}.conv2", outside, outside, 3, 3)
    if inside != outside:
        yield from _layer(f"{name}.nin_shortcut", outside, inside, 1, 1)
