"""A small Stable Diffusion 1 checkpoint made on the spot, complete enough for the WebUI to paint with.

Names and shapes follow CompVis' v1-inference.yaml at a smaller size, from that text and not from our own code, so that
tests of ours have something independent to stand on. Beside the `.safetensors` lie the `.yaml` that the WebUI reads and
a folder with the text encoder's configuration and a vocabulary of single characters and a few words.

All weights are random: it paints noise, but it paints. The model that paints pictures is `embedded.py`'s.

Eight heads, or 64 channels a text head, would be right by the family's rule; here both are others, so that whoever
ignores the host's word on them fails.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

RES_BLOCKS, VAE_RES_BLOCKS = 2, 1
WORDS = ("cat", "a", "of", "photo", "red", "blue", "zzk")
Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Size:
    """Channels of UNet and VAE, and what they are multiplied by from level to level; heads; the text encoder."""

    channels: int
    multipliers: tuple[int, ...]
    vae_channels: int
    vae_multipliers: tuple[int, ...]
    heads: int = 4
    text_width: int = 64
    text_layers: int = 3
    text_heads: int = 2


RANDOM = Size(32, (1, 2, 4, 4), 32, (1, 1, 2, 2))


def write(folder: Path, *, name: str = "tiny", seed: int = 0, size: Size = RANDOM) -> Path:
    """Write NAME.safetensors (about 40 MB), NAME.yaml and NAME-text/ into `folder`; returns the checkpoint's path."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_text_folder(folder / f"{name}-text", size)
    (folder / f"{name}.yaml").write_text(
        yaml.safe_dump(configuration(str(folder / f"{name}-text"), size), sort_keys=False), encoding="utf-8")
    path = folder / f"{name}.safetensors"
    save_file(tensors(vocabulary=vocabulary, seed=seed, size=size), path, metadata={"format": "pt"})
    return path


def tensors(*, vocabulary: int, seed: int = 0, size: Size = RANDOM) -> dict[str, torch.Tensor]:
    """The checkpoint's fp32 tensors, scaled so that activations, latents and pictures are of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        **{f"model.diffusion_model.{n}": s for n, s in _unet(size)}, **{f"first_stage_model.{n}": s for n, s in _vae(size)},
        **{f"cond_stage_model.transformer.text_model.{n}": s for n, s in _text(vocabulary, size)}}
    made = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:  # norms: weights about 1; biases about 0
            made[name] = noise * 0.05 + float("norm" in name and name.endswith("weight") or _is_group_norm(name))
        elif "embedding" in name:
            made[name] = noise * 0.5
        else:
            made[name] = noise / math.sqrt(noise[0].numel())
    mean, log_variance = slice(0, 4), slice(4, 8)
    made["first_stage_model.quant_conv.weight"][mean] *= 8  # latents of about 1 after the scale factor
    made["first_stage_model.quant_conv.weight"][log_variance] *= 0.2
    made["first_stage_model.quant_conv.bias"][log_variance] -= 6
    return made


def _is_group_norm(name: str) -> bool:
    return name.endswith(("in_layers.0.weight", "out_layers.0.weight", "out.0.weight"))


def _layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _unet(size: Size) -> Shapes:
    channels, multipliers = size.channels, size.multipliers
    embedding = channels * 4
    yield from _layer("time_embed.0", embedding, channels)
    yield from _layer("time_embed.2", embedding, embedding)
    yield from _layer("input_blocks.0.0", channels, 4, 3, 3)
    widths, width, index = [channels], channels, 1
    for level, multiplier in enumerate(multipliers):
        for _ in range(RES_BLOCKS):
            yield from _unet_block(f"input_blocks.{index}", width, channels * multiplier, embedding=embedding,
                                   context=size.text_width if level < 3 else None)
            width, index = channels * multiplier, index + 1
            widths.append(width)
        if level < len(multipliers) - 1:
            yield from _layer(f"input_blocks.{index}.0.op", width, width, 3, 3)
            index += 1
            widths.append(width)
    yield from _resnet("middle_block.0", width, width, embedding)
    yield from _transformer("middle_block.1", width, size.text_width)
    yield from _resnet("middle_block.2", width, width, embedding)
    index = 0
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for block in range(RES_BLOCKS + 1):
            name = f"output_blocks.{index}"
            yield from _unet_block(name, width + widths.pop(), channels * multiplier, embedding=embedding,
                                   context=size.text_width if level < 3 else None)
            width, index = channels * multiplier, index + 1
            if level and block == RES_BLOCKS:
                yield from _layer(f"{name}.{2 if level < 3 else 1}.conv", width, width, 3, 3)
    yield from _layer("out.0", channels)
    yield from _layer("out.2", 4, channels, 3, 3)


def _unet_block(name: str, inside: int, outside: int, *, embedding: int, context: int | None) -> Shapes:
    yield from _resnet(f"{name}.0", inside, outside, embedding)
    if context is not None:
        yield from _transformer(f"{name}.1", outside, context)


def _resnet(name: str, inside: int, outside: int, embedding: int) -> Shapes:
    yield from _layer(f"{name}.in_layers.0", inside)
    yield from _layer(f"{name}.in_layers.2", outside, inside, 3, 3)
    yield from _layer(f"{name}.emb_layers.1", outside, embedding)
    yield from _layer(f"{name}.out_layers.0", outside)
    yield from _layer(f"{name}.out_layers.3", outside, outside, 3, 3)
    if inside != outside:
        yield from _layer(f"{name}.skip_connection", outside, inside, 1, 1)


def _transformer(name: str, width: int, text_width: int) -> Shapes:
    yield from _layer(f"{name}.norm", width)
    yield from _layer(f"{name}.proj_in", width, width, 1, 1)
    block = f"{name}.transformer_blocks.0"
    for attention, context in (("attn1", width), ("attn2", text_width)):
        yield from _layer(f"{block}.{attention}.to_q", width, width, bias=False)
        yield from _layer(f"{block}.{attention}.to_k", width, context, bias=False)
        yield from _layer(f"{block}.{attention}.to_v", width, context, bias=False)
        yield from _layer(f"{block}.{attention}.to_out.0", width, width)
    yield from _layer(f"{block}.ff.net.0.proj", width * 8, width)
    yield from _layer(f"{block}.ff.net.2", width, width * 4)
    for norm in ("norm1", "norm2", "norm3"):
        yield from _layer(f"{block}.{norm}", width)
    yield from _layer(f"{name}.proj_out", width, width, 1, 1)


def _vae(size: Size) -> Shapes:
    channels, multipliers = size.vae_channels, size.vae_multipliers
    yield from _layer("encoder.conv_in", channels, 3, 3, 3)
    width = channels
    for level, multiplier in enumerate(multipliers):
        for block in range(VAE_RES_BLOCKS):
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
        for block in range(VAE_RES_BLOCKS + 1):
            yield from _vae_resnet(f"decoder.up.{level}.block.{block}", width, channels * multiplier)
            width = channels * multiplier
        if level:
            yield from _layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    yield from _layer("decoder.norm_out", width)
    yield from _layer("decoder.conv_out", 3, width, 3, 3)
    yield from _layer("quant_conv", 8, 8, 1, 1)
    yield from _layer("post_quant_conv", 4, 4, 1, 1)


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


def _text(vocabulary: int, size: Size) -> Shapes:
    width = size.text_width
    yield "embeddings.token_embedding.weight", (vocabulary, width)
    yield "embeddings.position_embedding.weight", (77, width)
    for layer in range(size.text_layers):
        name = f"encoder.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _layer(f"{name}.self_attn.{projection}", width, width)
        yield from _layer(f"{name}.layer_norm1", width)
        yield from _layer(f"{name}.mlp.fc1", width * 4, width)
        yield from _layer(f"{name}.mlp.fc2", width, width * 4)
        yield from _layer(f"{name}.layer_norm2", width)
    yield from _layer("final_layer_norm", width)


def _write_text_folder(folder: Path, size: Size) -> int:
    """CLIP's files for a vocabulary of printable ASCII and `WORDS`; returns its size."""
    folder.mkdir(exist_ok=True)
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    merges, pieces = [], dict.fromkeys([*characters, *(f"{c}</w>" for c in characters)])
    for word in WORDS:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        while len(symbols) > 1:
            merges.append(f"{symbols[0]} {symbols[1]}")
            symbols[:2] = [symbols[0] + symbols[1]]
            pieces[symbols[0]] = None
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = {piece: index for index, piece in enumerate([*pieces, start, end])}
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n", encoding="utf-8")
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json",
                {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True})
    _write_json(folder / "config.json", text_configuration(
        size, vocabulary=len(vocabulary), start=vocabulary[start], end=vocabulary[end]))
    return len(vocabulary)


def text_configuration(size: Size, *, vocabulary: int, start: int, end: int) -> dict[str, object]:
    """transformers' `config.json` of the text encoder."""
    return {
        "model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "vocab_size": vocabulary,
        "hidden_size": size.text_width, "intermediate_size": size.text_width * 4, "projection_dim": size.text_width,
        "num_hidden_layers": size.text_layers, "num_attention_heads": size.text_heads, "max_position_embeddings": 77,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0,
        "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def configuration(text_folder: str, size: Size) -> dict[str, object]:
    """The `.yaml` that the WebUI reads beside a checkpoint of this size."""
    return {"model": {"base_learning_rate": 1e-4, "target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {
        "linear_start": 0.00085, "linear_end": 0.012, "num_timesteps_cond": 1, "log_every_t": 200, "timesteps": 1000,
        "first_stage_key": "jpg", "cond_stage_key": "txt", "image_size": 64, "channels": 4,
        "cond_stage_trainable": False, "conditioning_key": "crossattn", "monitor": "val/loss_simple_ema",
        "scale_factor": 0.18215, "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": size.channels,
            "attention_resolutions": [4, 2, 1], "num_res_blocks": RES_BLOCKS, "channel_mult": list(size.multipliers),
            "num_heads": size.heads, "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": size.text_width,
            "use_checkpoint": False, "legacy": False}},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {
            "embed_dim": 4, "monitor": "val/rec_loss", "lossconfig": {"target": "torch.nn.Identity"}, "ddconfig": {
                "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3,
                "ch": size.vae_channels, "ch_mult": list(size.vae_multipliers), "num_res_blocks": VAE_RES_BLOCKS,
                "attn_resolutions": [], "dropout": 0.0}}},
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                              "params": {"version": text_folder}}}}}
