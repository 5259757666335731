"""A tagger as it is published, but small: timm's own architecture, random weights, three files as on huggingface.co."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

# Whoever needs these files needs timm, and is skipped without it.
pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

SIZE = 64
# The first lines of the published lists, and characters from further down. 9: rating, 0: general, 4: character.
TAGS = (("general", 9), ("sensitive", 9), ("questionable", 9), ("explicit", 9), ("1girl", 0), ("solo", 0), ("long_hair", 0),
        ("^_^", 0), ("hatsune_miku", 4), ("saber_(fate)", 4))
# Arguments as the published config.json files have them, each for its kind of model.
ARCHITECTURES = {
    "vit_tiny_patch16_224": {"class_token": False, "global_pool": "avg", "fc_norm": False, "act_layer": "gelu_tanh",
                             "img_size": SIZE},
    "convnext_atto": {"drop_path_rate": 0.2, "act_layer": "gelu_tanh"},
    "eva02_tiny_patch14_224": {"img_size": 56, "global_pool": "avg", "ref_feat_shape": [4, 4]},
}


def make_model(architecture: str, *, seed: int = 0) -> nn.Module:
    """By timm's own public function, spread out so that scores lie between 0 and 1 and differ from image to image."""
    torch.manual_seed(seed)
    arguments = {name: value for name, value in ARCHITECTURES[architecture].items() if value is not None}
    model = timm.create_model(architecture, pretrained=False, num_classes=len(TAGS), **arguments).eval()
    classifier = model.get_classifier()
    with torch.no_grad():
        classifier.weight.normal_(std=2.0 / classifier.in_features ** 0.5)
        classifier.bias.normal_(std=1.0)
    return model


def write_config(folder: Path, kind: str, **changes: object) -> None:
    side = ARCHITECTURES[kind].get("img_size", SIZE)
    config = {
        "architecture": kind, "num_classes": len(TAGS), "num_features": 192, "global_pool": "avg",
        "model_args": ARCHITECTURES[kind],
        "pretrained_cfg": {
            "custom_load": False, "input_size": [3, side, side], "fixed_input_size": False, "interpolation": "bicubic",
            "crop_pct": 1.0, "crop_mode": "center", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
            "num_classes": len(TAGS), "pool_size": None, "first_conv": "patch_embed.proj", "classifier": "head"}}
    (folder / "config.json").write_text(json.dumps({**config, **changes}, indent=2), encoding="utf-8")


def write_tags(folder: Path) -> None:
    with (folder / "selected_tags.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["tag_id", "name", "category", "count"])
        table.writerows([9999990 + number, name, category, 1000 - number] for number, (name, category) in enumerate(TAGS))


def write_tagger(folder: Path, architecture: str = "vit_tiny_patch16_224") -> nn.Module:
    """The three files in `folder`; returns timm's model that they were written from."""
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(architecture)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    write_config(folder, architecture)
    write_tags(folder)
    return model
