"""Checkpoints of each family as files, with the .yaml beside them that says what shapes cannot tell."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from lib_lora_train.model.architecture import Hints
from tests.model import small_checkpoints
from tools import checkpoint_shapes as shapes
from tools import tiny_checkpoint

SHALLOW_HINTS = {"sd2": Hints(unet_head_channels=16, text_heads=(2,)), "sdxl": Hints(unet_head_channels=16, text_heads=(2, 2))}


def write_other(folder: Path, family: str, tensors: Mapping[str, Tensor], hints: Hints) -> Path:
    """An SD2 (v-prediction) or SDXL of these tensors, with a .yaml in the layout of ldm or sgm. It shares the vocabulary of the
    SD1 in the folder, `sd1-text`."""
    path = folder / f"{family}.safetensors"
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    versions = []
    for number, heads in enumerate(hints.text_heads):
        text = shutil.copytree(folder / "sd1-text", folder / f"{family}-text-{number}")
        config = json.loads((text / "config.json").read_text(encoding="utf-8"))
        config |= {"num_attention_heads": heads, "hidden_act": "gelu" if family == "sd2" or number else "quick_gelu"}
        (text / "config.json").write_text(json.dumps(config), encoding="utf-8")
        versions.append({"version": text.name})
    heads = {"params": {"num_head_channels": hints.unet_head_channels}}
    if family == "sd2":
        params = {"parameterization": "v", "linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000,
                  "unet_config": heads, "cond_stage_config": {"params": versions[0]}}
    else:
        scaling = {"target": "sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling"}
        params = {"scale_factor": 0.13025, "network_config": heads,
                  "denoiser_config": {"params": {"scaling_config": scaling}},
                  "conditioner_config": {"params": {"emb_models": [{"input_key": "txt", "params": v} for v in versions]}}}
    path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": {"params": params}}), encoding="utf-8")
    return path


def write_shallow(folder: Path) -> dict[str, Path]:
    """The smallest checkpoint of each family: two levels of the UNet, a block of each kind."""
    paths = {"sd1": tiny_checkpoint.write(folder, name="sd1", size=tiny_checkpoint.SHALLOW)}
    return paths | {family: write_other(folder, family, _shallow(family), hints) for family, hints in SHALLOW_HINTS.items()}


def _shallow(family: str) -> dict[str, Tensor]:
    sdxl, width, vocabulary = family == "sdxl", 32, small_checkpoints.VOCABULARY
    clip, openclip = (make(vocabulary=vocabulary, width=width, layers=2) for make in (shapes.clip_text, shapes.openclip_text))
    unet = shapes.unet(shapes.UNetSize(
        32, (1, 2), (0, 1) if sdxl else (1, 0), middle_depth=1, context=2 * width if sdxl else width, linear=True,
        vector=width + small_checkpoints.SIZES if sdxl else None))
    vae = shapes.vae(channels=32, multipliers=(1, 1, 1, 1), blocks=1)
    texts = {"conditioner.embedders.0.transformer.text_model": clip, "conditioner.embedders.1.model": openclip} if sdxl else {
        "cond_stage_model.model": openclip}
    parts = {"model.diffusion_model": unet, "first_stage_model": vae, **texts}
    generator = torch.Generator().manual_seed(0)
    return {f"{part}.{name}": shapes.scaled(f"{part}.{name}", torch.randn(shape, generator=generator))
            for part, names in parts.items() for name, shape in names}
