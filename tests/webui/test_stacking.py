"""Several LoRAs of ours in one prompt of the real WebUI."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.webui.running import WebUI
from tests.webui.test_training import PROMPT, train

WEIGHTS = {"one": 0.8, "two": 0.5}


def test_two_loras_with_weights_in_one_prompt_are_the_sum_of_their_changes(webui: WebUI, dataset: Path) -> None:
    for seed, name in enumerate(WEIGHTS):
        assert train(webui, dataset, name, seed=seed)["outcome"] == "done"
    write_sum(webui.loras)
    webui.post("/sdapi/v1/refresh-loras")
    stacked = pixels(webui, "".join(f" <lora:{name}:{weight}>" for name, weight in WEIGHTS.items()))
    summed = pixels(webui, " <lora:sum:1>")
    # The same sum in another order of rounding: a pixel is off by one grey level here and there.
    assert np.abs(stacked - summed).max() <= 1
    for name, weight in WEIGHTS.items():
        assert np.abs(pixels(webui, f" <lora:{name}:{weight}>") - summed).mean() > 1, f"{name} alone paints the same"


def write_sum(loras: Path) -> None:
    """One LoRA whose change of each layer is the weighted sum: w₁s₁·B₁A₁ + w₂s₂·B₂A₂ = [w₁s₁B₁, w₂s₂B₂]·[A₁; A₂], at a scale
    of 1 (alpha is the rank)."""
    files = {name: load_file(loras / f"{name}.safetensors") for name in WEIGHTS}
    first, tensors = files["one"], {}
    for layer in sorted({key.partition(".")[0] for key in first}):
        downs, ups = [], []
        for name, weight in WEIGHTS.items():
            down, up = (files[name][f"{layer}.lora_{side}.weight"] for side in ("down", "up"))
            downs.append(down)
            ups.append(up * (weight * float(files[name][f"{layer}.alpha"]) / len(down)))
        tensors[f"{layer}.lora_down.weight"] = torch.cat(downs)
        tensors[f"{layer}.lora_up.weight"] = torch.cat(ups, dim=1)
        tensors[f"{layer}.alpha"] = torch.tensor(float(sum(map(len, downs))))
    with safe_open(loras / "one.safetensors", "pt") as file:
        metadata = {**file.metadata(), "ss_output_name": "sum"}
    save_file(tensors, loras / "sum.safetensors", metadata)


def pixels(webui: WebUI, loras: str) -> np.ndarray:
    """The image [H, W, 3] as int, of the fixed seed."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(webui.sample(PROMPT + loras)))).convert("RGB")).astype(int)
