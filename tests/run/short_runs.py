"""Runs of three steps whose results are compared: by precision, or by device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image

from lib_lora_train.settings import Settings, parse
from tests.conftest import MakeImage

SGD = {"optimizer_type": "torch.optim.SGD", "learning_rate": 0.5, "max_grad_norm": 0.0}
"""In which a wrong gradient shows: AdamW goes as far whatever the gradient's size."""


def transparent_images(make_image: MakeImage, count: int) -> Path:
    """A folder of so many captioned images with a gradient of transparency."""
    for number in range(count):
        path = make_image(f"images/{number}.png", size=(64, 64), caption="zzk, a red cat, on grass")
        image = Image.open(path).convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(image.size).point(lambda value: max(value, 1)))
        image.save(path)
    return path.parent


def short_run(images: Path, **changes: object) -> Settings:
    """Three steps of a constant rate with SGD."""
    return parse({
        "train_data_dir": str(images), "output_name": "zzk", "trigger_word": "zzk", "resolution": "64", "min_bucket_reso": 64,
        "num_repeats": 1, "max_train_steps": 3, "network_dim": 4, "network_alpha": 4, "save_precision": "float",
        "train_batch_size": 2, "lr_scheduler": "constant", "sample_images": False, "validation": False, "save_state": False,
        "save_every_n_epochs": 0, "preservation_class": "cat", **SGD, **changes})


def flat(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All numbers of a LoRA's tensors, [n] fp32."""
    return torch.cat([tensor.flatten().float() for tensor in tensors.values()])
