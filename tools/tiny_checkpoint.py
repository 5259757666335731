"""A small Stable Diffusion 1 checkpoint made on the spot, complete enough for the WebUI to sample with.

Names and shapes follow CompVis' v1-inference.yaml at a smaller size (`checkpoint_shapes.py`). Beside the `.safetensors` lie the
`.yaml` that the WebUI reads and a folder with the text encoder's configuration and a vocabulary of single characters and
a few words.

All weights are random, so its images are noise. The model that samples images is the demo's.

By the family's rule it would have eight heads and 64 channels a text head. Here both differ, so that code that ignores the
host's numbers fails.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from tools import checkpoint_shapes as shapes

WORDS = ("cat", "a", "of", "photo", "red", "blue", "zzk")


@dataclasses.dataclass(frozen=True)
class Size:
    """Channels of UNet and VAE, and what they are multiplied by from level to level; heads; the text encoder.

    depths      transformer blocks at each level of the UNet, as far as it has so many levels
    vocabulary  rows of the token embedding, None for as many as there are tokens
    """

    channels: int
    multipliers: tuple[int, ...]
    vae_channels: int
    vae_multipliers: tuple[int, ...]
    depths: tuple[int, ...] = (1, 1, 1, 0)
    heads: int = 4
    text_width: int = 64
    text_layers: int = 3
    text_heads: int = 2
    vae_blocks: int = 1
    vocabulary: int | None = None


RANDOM = Size(32, (1, 2, 4, 4), 32, (1, 1, 2, 2))
SMALLEST = Size(32, (1, 1, 2, 2), 32, (1, 1, 1, 1), text_width=32, text_layers=2)
"""All of its blocks, each as narrow as they can be."""
SHALLOW = Size(32, (1, 2), 32, (1, 1, 1, 1), depths=(1, 0), text_width=32, text_layers=2)
"""The first of its levels and the last, which has no transformers: a block of each kind, and a third of the time."""
RECOGNISED = Size(320, (1, 1, 1, 1), 128, (1, 2, 4, 4), heads=8, text_width=768, text_layers=12, text_heads=12, vae_blocks=2,
                  vocabulary=49408)
"""The smallest that Forge, Forge Neo and reForge take for Stable Diffusion 1: they look a model up by the width of its UNet's
first layer and of its text, and make VAE and text encoder at their published sizes."""


def write(folder: Path, *, name: str = "tiny", seed: int = 0, size: Size = RANDOM, dtype: torch.dtype = torch.float32) -> Path:
    """Write NAME.safetensors (about 40 MB; of SMALLEST 11 MB; of RECOGNISED in fp16 600 MB), NAME.yaml and NAME-text/ into
    `folder`; returns the checkpoint's path."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_text_folder(folder / f"{name}-text", size)
    (folder / f"{name}.yaml").write_text(
        yaml.safe_dump(configuration(str(folder / f"{name}-text"), size), sort_keys=False), encoding="utf-8")
    path = folder / f"{name}.safetensors"
    save_file(tensors(vocabulary=vocabulary, seed=seed, size=size, dtype=dtype), path, metadata={"format": "pt"})
    return path


def tensors(*, vocabulary: int, seed: int = 0, size: Size = RANDOM,
            dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, scaled so that activations, latents and images are of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "model.diffusion_model": shapes.unet(_unet_size(size)),
        "first_stage_model": shapes.vae(channels=size.vae_channels, multipliers=size.vae_multipliers, blocks=size.vae_blocks),
        "cond_stage_model.transformer.text_model": shapes.clip_text(
            vocabulary=vocabulary, width=size.text_width, layers=size.text_layers)}
    return {f"{part}.{name}": shapes.scaled(f"{part}.{name}", torch.randn(shape, generator=generator)).to(dtype)
            for part, names in parts.items() for name, shape in names}


def _unet_size(size: Size) -> shapes.UNetSize:
    return shapes.UNetSize(channels=size.channels, multipliers=size.multipliers, depths=size.depths, middle_depth=1,
                           context=size.text_width)


def _write_text_folder(folder: Path, size: Size) -> int:
    """CLIP's files for a vocabulary of printable ASCII and `WORDS`; returns the rows of its embedding."""
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
    rows = size.vocabulary or len(vocabulary)
    _write_json(folder / "config.json", text_configuration(
        size, vocabulary=rows, start=vocabulary[start], end=vocabulary[end]))
    return rows


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
            "attention_resolutions": [2 ** level for level, depth in enumerate(size.depths) if depth][::-1],
            "num_res_blocks": shapes.RES_BLOCKS, "channel_mult": list(size.multipliers),
            "num_heads": size.heads, "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": size.text_width,
            "use_checkpoint": False, "legacy": False}},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {
            "embed_dim": 4, "monitor": "val/rec_loss", "lossconfig": {"target": "torch.nn.Identity"}, "ddconfig": {
                "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3,
                "ch": size.vae_channels, "ch_mult": list(size.vae_multipliers), "num_res_blocks": size.vae_blocks,
                "attn_resolutions": [], "dropout": 0.0}}},
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
                              "params": {"version": text_folder}}}}}
