"""The model's sizes, its weights before training, and the checkpoint it becomes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib_lora_train.model import frozen
from lib_lora_train.model.architecture import Hints
from lib_lora_train.model.frozen import FrozenModel
from tools import styles, tiny_checkpoint

SIZE = tiny_checkpoint.Size(channels=64, multipliers=(1, 2), vae_channels=96, vae_multipliers=(1, 1, 1, 1), heads=2,
                            text_width=48, text_layers=2, text_heads=4)
SHIPPED = Path(__file__).resolve().parents[2] / "lib_lora_train" / "demo" / "model" / "emoji.safetensors"
NAME = SHIPPED.stem
START, END = 49406, 49407
PREFIXES = {"unet": "model.diffusion_model.", "te": "cond_stage_model.transformer.", "vae": "first_stage_model."}


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


def build(tensors: Mapping[str, Tensor]) -> FrozenModel:
    """The model of a checkpoint's weights, in fp32."""
    return frozen.build({name: tensor.float() for name, tensor in tensors.items()},
                        hints=Hints(unet_heads=SIZE.heads, text_heads=(SIZE.text_heads,)))


def read(checkpoint: Path) -> FrozenModel:
    """The model of a checkpoint that `write` wrote."""
    return build(load_file(checkpoint))


def write(folder: Path, weights: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """NAME.safetensors in fp16, NAME.yaml and NAME-text/config.json in `folder`; returns the checkpoint's path.

    `weights`: those of each of PREFIXES by local name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{prefix}{name}": tensor for part, prefix in PREFIXES.items() for name, tensor in weights[part].items()}
    path = folder / f"{NAME}.safetensors"
    part = path.with_suffix(".part")
    credits = dict.fromkeys(f"{style.credit} ({style.licence})" for style in styles.SEEN)
    save_file({name: tensor.detach().cpu().half().contiguous() for name, tensor in tensors.items()}, part, metadata={
        "format": "pt", "modelspec.title": "Emoji, a tiny Stable Diffusion 1",
        "modelspec.license": f"AGPL-3.0-or-later; trained on {', '.join(credits)}; its decoder also on {styles.TWEMOJI.credit} "
                             f"({styles.TWEMOJI.licence})"})
    os.replace(part, path)
    (folder / f"{NAME}.yaml").write_text(
        yaml.safe_dump(tiny_checkpoint.configuration(f"{NAME}-text", SIZE), sort_keys=False), encoding="utf-8")
    text = folder / f"{NAME}-text"
    text.mkdir(exist_ok=True)
    vocabulary = len(weights["te"]["text_model.embeddings.token_embedding.weight"])
    configuration = tiny_checkpoint.text_configuration(SIZE, vocabulary=vocabulary, start=START, end=END)
    (text / "config.json").write_text(json.dumps(configuration, indent=1) + "\n", encoding="utf-8")
    return path
