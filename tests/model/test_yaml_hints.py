"""The `.yaml` beside a checkpoint is read as the hosts read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from lib_lora_train.errors import ModelError
from lib_lora_train.model.sd.hints_file import hints_from_yaml

# The parts that matter of v1-inference.yaml, v2-inference-v.yaml and sd_xl_base.yaml as published.
SD1 = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    timesteps: 1000
    scale_factor: 0.18215
    unet_config:
      params: {model_channels: 320, attention_resolutions: [4, 2, 1], num_heads: 8, context_dim: 768}
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
"""
SD2_V = """
model:
  params:
    parameterization: "v"
    linear_start: 0.00085
    linear_end: 0.0120
    unet_config:
      params: {num_head_channels: 64, use_linear_in_transformer: True}
    cond_stage_config:
      params: {freeze: True, layer: "penultimate"}
"""
SDXL = """
model:
  target: sgm.models.diffusion.DiffusionEngine
  params:
    scale_factor: 0.13025
    denoiser_config:
      params:
        scaling_config: {target: sgm.modules.diffusionmodules.denoiser_scaling.%s}
    network_config:
      params: {adm_in_channels: 2816, num_head_channels: 64, num_heads: -1}
    conditioner_config:
      params:
        emb_models:
          - {input_key: txt, params: {layer: hidden, layer_idx: 11}}
          - {input_key: txt, params: {arch: ViT-bigG-14, legacy: False}}
          - {input_key: original_size_as_tuple, params: {outdim: 256}}
"""


def read(folder: Path, text: str):
    path = folder / "model.yaml"
    path.write_text(text, encoding="utf-8")
    return hints_from_yaml(path)


def test_ldm_layout(tmp_path: Path) -> None:
    hints = read(tmp_path, SD1)
    assert (hints.unet_heads, hints.unet_head_channels) == (8, None)
    assert (hints.prediction_type, hints.latent_scale, hints.zero_terminal_snr) == ("epsilon", 0.18215, None)
    assert hints.text_heads is None and hints.text_activations is None
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.allclose(hints.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-4)


def test_ldm_layout_with_v_prediction(tmp_path: Path) -> None:
    hints = read(tmp_path, SD2_V)
    assert (hints.unet_heads, hints.unet_head_channels, hints.prediction_type) == (None, 64, "v_prediction")


@pytest.mark.parametrize("scaling, prediction", [("EpsScaling", "epsilon"), ("VScaling", "v_prediction")])
def test_sgm_layout(tmp_path: Path, scaling: str, prediction: str) -> None:
    hints = read(tmp_path, SDXL % scaling)
    assert (hints.unet_heads, hints.unet_head_channels, hints.latent_scale) == (None, 64, 0.13025)
    assert hints.prediction_type == prediction and hints.alphas_cumprod is None


def test_a_text_encoder_given_as_a_folder_tells_its_heads(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps({"num_attention_heads": 4, "hidden_act": "quick_gelu"}))
    text = SD1.replace("FrozenCLIPEmbedder", "FrozenCLIPEmbedder\n      params: {version: text}")
    hints = read(tmp_path, text)
    assert (hints.text_heads, hints.text_activations) == ((4,), ("quick_gelu",))


@pytest.mark.parametrize("text", ["", "[1, 2]", "model: 3", "{", "a: b", "\t- x: ["])
def test_what_is_not_a_model_configuration_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ModelError, match="model.yaml"):
        read(tmp_path, text)


def test_a_value_that_is_not_a_number_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model.yaml.*not a number"):
        read(tmp_path, SD1.replace("num_heads: 8", "num_heads: eight"))
    with pytest.raises(ModelError, match="missing.yaml"):
        hints_from_yaml(tmp_path / "missing.yaml")
