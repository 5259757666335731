"""Names and shapes of the full-size models, written down from their published architecture.

SD1, SD2: CompVis/stable-diffusion and Stability-AI/stablediffusion (v1-inference.yaml, v2-inference.yaml);
SDXL: Stability-AI/generative-models (sd_xl_base.yaml). Text encoders: transformers' CLIPTextModel.
"""

from __future__ import annotations

import torch

Shapes = dict[str, tuple[int, ...]]


def model(family: str) -> dict[str, dict[str, torch.Tensor]]:
    """{component: {weight name: meta tensor}} of the full-size model."""
    if family == "sd1":
        parts = {"unet": unet(context=768), "te": text(width=768, layers=12)}
    elif family == "sd2":
        parts = {"unet": unet(context=1024, linear=True), "te": text(width=1024, layers=24)}
    else:
        parts = {"unet": unet(multipliers=(1, 2, 4), depths=(0, 2, 10), context=2048, linear=True),
                 "te1": text(width=768, layers=12), "te2": text(width=1280, layers=32)}
    return {component: {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            for component, shapes in parts.items()}


def unet(*, context: int, channels: int = 320, multipliers: tuple[int, ...] = (1, 2, 4, 4),
         depths: tuple[int, ...] = (1, 1, 1, 0), blocks: int = 2, linear: bool = False) -> Shapes:
    """Weights of the UNet (biases left out); `depths` are the transformer blocks at each resolution."""
    shapes: Shapes = {"input_blocks.0.0.weight": (channels, 4, 3, 3)}
    skips, width, index, time = [channels], channels, 1, channels * 4
    shapes |= {"time_embed.0.weight": (time, channels), "time_embed.2.weight": (time, time)}
    last = len(multipliers) - 1
    for level, (multiplier, depth) in enumerate(zip(multipliers, depths, strict=False)):
        for _ in range(blocks):
            shapes |= _resnet(f"input_blocks.{index}.0", width, multiplier * channels, time)
            width = multiplier * channels
            shapes |= _transformer(f"input_blocks.{index}.1", width, context, depth, linear)
            skips.append(width)
            index += 1
        if level != last:
            shapes[f"input_blocks.{index}.0.op.weight"] = (width, width, 3, 3)
            skips.append(width)
            index += 1
    shapes |= _resnet("middle_block.0", width, width, time)
    shapes |= _transformer("middle_block.1", width, context, depths[-1] or 1, linear)
    shapes |= _resnet("middle_block.2", width, width, time)
    index = 0
    for level in reversed(range(len(multipliers))):
        for place in range(blocks + 1):
            shapes |= _resnet(f"output_blocks.{index}.0", width + skips.pop(), multipliers[level] * channels, time)
            width = multipliers[level] * channels
            shapes |= _transformer(f"output_blocks.{index}.1", width, context, depths[level], linear)
            if level and place == blocks:
                shapes[f"output_blocks.{index}.{2 if depths[level] else 1}.conv.weight"] = (width, width, 3, 3)
            index += 1
    return shapes | {"out.0.weight": (width,), "out.2.weight": (4, width, 3, 3)}


def text(*, width: int, layers: int) -> Shapes:
    """Weights of a CLIP text encoder under transformers' names."""
    shapes: Shapes = {"text_model.embeddings.token_embedding.weight": (49408, width),
                      "text_model.embeddings.position_embedding.weight": (77, width),
                      "text_model.final_layer_norm.weight": (width,)}
    for layer in range(layers):
        name = f"text_model.encoder.layers.{layer}"
        shapes |= {f"{name}.self_attn.{part}_proj.weight": (width, width) for part in ("q", "k", "v", "out")}
        shapes |= {f"{name}.mlp.fc1.weight": (4 * width, width), f"{name}.mlp.fc2.weight": (width, 4 * width),
                   f"{name}.layer_norm1.weight": (width,), f"{name}.layer_norm2.weight": (width,)}
    return shapes


def _resnet(name: str, width: int, out: int, time: int) -> Shapes:
    shapes: Shapes = {f"{name}.in_layers.0.weight": (width,), f"{name}.in_layers.2.weight": (out, width, 3, 3),
                      f"{name}.emb_layers.1.weight": (out, time), f"{name}.out_layers.0.weight": (out,),
                      f"{name}.out_layers.3.weight": (out, out, 3, 3)}
    return shapes if width == out else shapes | {f"{name}.skip_connection.weight": (out, width, 1, 1)}


def _transformer(name: str, width: int, context: int, depth: int, linear: bool) -> Shapes:
    if depth == 0:
        return {}
    square = (width, width) if linear else (width, width, 1, 1)
    shapes: Shapes = {f"{name}.norm.weight": (width,), f"{name}.proj_in.weight": square,
                      f"{name}.proj_out.weight": square}
    for block in range(depth):
        inner = f"{name}.transformer_blocks.{block}"
        for attention, source in (("attn1", width), ("attn2", context)):
            shapes |= {f"{inner}.{attention}.to_q.weight": (width, width),
                       f"{inner}.{attention}.to_k.weight": (width, source),
                       f"{inner}.{attention}.to_v.weight": (width, source),
                       f"{inner}.{attention}.to_out.0.weight": (width, width)}
        shapes |= {f"{inner}.ff.net.0.proj.weight": (8 * width, width), f"{inner}.ff.net.2.weight": (width, 4 * width)}
        shapes |= {f"{inner}.norm{number}.weight": (width,) for number in (1, 2, 3)}
    return shapes
