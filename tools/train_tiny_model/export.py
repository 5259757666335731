"""The model's sizes, its weights before training, and the checkpoint it becomes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from autoencoder import LatentStatistics
from safetensors.torch import save_file
from torch import Tensor

from tools import tiny_checkpoint

SIZE = tiny_checkpoint.Size(channels=64, multipliers=(1, 2), vae_channels=96, vae_multipliers=(1, 1, 1, 1), heads=2,
                            text_width=48, text_layers=2, text_heads=4)
TARGET = Path(__file__).resolve().parents[2] / "lib_lora_train" / "demo" / "model"
NAME, SCALE = "emoji", 0.18215
START, END = 49406, 49407


def untrained(*, vocabulary: int, seed: int) -> dict[str, Tensor]:
    """Random weights of the right size; what adds to a skip connection begins at zero, as in ldm."""
    made = tiny_checkpoint.tensors(vocabulary=vocabulary, seed=seed, size=SIZE)
    for name, tensor in made.items():
        if name.startswith("model.diffusion_model.") and name.endswith((
                "out_layers.3.weight", "out_layers.3.bias", "proj_out.weight", "proj_out.bias", "out.2.weight", "out.2.bias")):
            tensor.zero_()
    made["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"] *= 0.2
    made["cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"] *= 0.2
    return made


def write(folder: Path, *, vae: Mapping[str, Tensor], statistics: LatentStatistics,
          weights: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """NAME.safetensors in fp16, NAME.yaml and NAME-text/config.json in `folder`; returns the checkpoint's path."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"first_stage_model.{name}": tensor for name, tensor in _normalised(vae, statistics).items()}
    tensors |= {f"model.diffusion_model.{name}": tensor for name, tensor in weights["unet"].items()}
    tensors |= {f"cond_stage_model.transformer.{name}": tensor for name, tensor in weights["te"].items()}
    path = folder / f"{NAME}.safetensors"
    part = path.with_suffix(".part")
    save_file({name: tensor.detach().cpu().half().contiguous() for name, tensor in tensors.items()}, part, metadata={
        "format": "pt", "modelspec.title": "Emoji, a tiny Stable Diffusion 1",
        "modelspec.license": "AGPL-3.0-or-later; trained on Noto Emoji (Apache-2.0), its decoder also on Twemoji (CC-BY 4.0)"})
    os.replace(part, path)
    (folder / f"{NAME}.yaml").write_text(
        yaml.safe_dump(tiny_checkpoint.configuration(f"{NAME}-text", SIZE), sort_keys=False), encoding="utf-8")
    text = folder / f"{NAME}-text"
    text.mkdir(exist_ok=True)
    vocabulary = len(weights["te"]["text_model.embeddings.token_embedding.weight"])
    configuration = tiny_checkpoint.text_configuration(SIZE, vocabulary=vocabulary, start=START, end=END)
    (text / "config.json").write_text(json.dumps(configuration, indent=1) + "\n", encoding="utf-8")
    return path


def _normalised(vae: Mapping[str, Tensor], statistics: LatentStatistics) -> dict[str, Tensor]:
    """The same autoencoder with latents of mean 0 and size 1 / SCALE: the change is made in the two 1×1 convolutions."""
    made = {name: tensor.detach().float().clone() for name, tensor in vae.items()}
    mean, size = statistics.mean.flatten().cpu(), statistics.deviation.flatten().cpu() * SCALE
    into, out_of = made["quant_conv.weight"], made["post_quant_conv.weight"]
    into[:4] /= size[:, None, None, None]
    made["quant_conv.bias"][:4] = (made["quant_conv.bias"][:4] - mean) / size
    made["quant_conv.bias"][4:] -= 2 * torch.log(size)
    made["post_quant_conv.bias"] += out_of[:, :, 0, 0] @ mean
    out_of *= size[None, :, None, None]
    return made
