"""The `.yaml` beside a checkpoint is read as the hosts read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file

from lib_lora_train.errors import ModelError
from lib_lora_train.model.architecture import Hints
from lib_lora_train.model.sd.hints_file import hints_from_yaml, with_words_of_file

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


MODEL = "model:\n  params: {linear_start: 0.00085, linear_end: 0.012"


@pytest.mark.parametrize(("text", "word"), [
    (f"{MODEL}, linear_start: -0.1}}", "linear_start"), (f"{MODEL}, linear_end: 1.5}}", "linear_end"),
    (f"{MODEL}, linear_start: .nan}}", "linear_start"), (f"{MODEL}, linear_start: [1]}}", "number"),
    (f"{MODEL}, timesteps: 0}}", "timesteps"), (f"{MODEL}, timesteps: 1000000000000}}", "timesteps"),
    (f"{MODEL}, scale_factor: 0}}", "scale_factor"), (f"{MODEL}, scale_factor: -1}}", "scale_factor"),
    (f"{MODEL}, unet_config: {{params: {{num_heads: .inf}}}}}}", "integer"),
    (f"{MODEL}, unet_config: {{params: {{num_heads: {'9' * 5000}}}}}}}", "model.yaml"),
    ("a: " + "[" * 5_000, "model.yaml"), ("# " + "x" * 2_000_000, "longer")])
def test_a_configuration_that_cannot_be_is_refused_in_a_sentence_that_names_the_value(tmp_path: Path, text: str, word: str):
    with pytest.raises(ModelError) as refusal:
        read(tmp_path, text)
    assert word in str(refusal.value) and "model.yaml" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("part", ["unet_config: text", "unet_config: {params: text}", "cond_stage_config: text",
                                  "conditioner_config: {params: {emb_models: [text, 3]}}", "denoiser_config: []",
                                  "cond_stage_config: {params: {version: \"a\\0b\"}}",
                                  f"cond_stage_config: {{params: {{version: {'x' * 5000}}}}}"])
def test_sections_that_are_no_sections_say_nothing(tmp_path: Path, part: str) -> None:
    assert read(tmp_path, f"model:\n  params:\n    scale_factor: 0.5\n    {part}\n").latent_scale == 0.5


@pytest.mark.parametrize("config", [{"num_attention_heads": "many"}, {"num_attention_heads": [4]}, {"hidden_act": "relu"},
                                    {"hidden_act": []}])
def test_a_text_encoders_configuration_of_wrong_types_is_refused(tmp_path: Path, config: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="model.yaml"):
        read(tmp_path, SD1.replace("FrozenCLIPEmbedder", "FrozenCLIPEmbedder\n      params: {version: .}"))


@pytest.mark.parametrize(("metadata", "tensors", "prediction", "zero"), [
    ({"modelspec.prediction_type": "v"}, {}, "v_prediction", None),  # ModelSpec
    ({"modelspec.prediction_type": "epsilon"}, {}, "epsilon", None),
    ({"modelspec.prediction_type": "V-Prediction"}, {}, "v_prediction", None),  # as people write it
    ({"modelspec.prediction_type": " vpred "}, {}, "v_prediction", None),
    ({"modelspec.prediction_type": "flow"}, {}, "flow", None),
    ({"modelspec.predict_key": "v"}, {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, "v_prediction", True),  # ComfyUI
    ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, {}, "v_prediction", None),
    ({"modelspec.architecture": "stable-diffusion-v2-512"}, {}, "epsilon", None),
    ({}, {"v_pred": torch.tensor([])}, "v_prediction", None),
    ({}, {"alphas_cumprod": torch.linspace(1, 0, 1000)}, None, True),
    ({}, {"alphas_cumprod": torch.linspace(0.999, 0.0047, 1000)}, None, None),  # Stable Diffusion's own ends there
    ({"format": "pt"}, {"alphas_cumprod": torch.tensor(0.0)}, None, None)])
def test_what_a_checkpoints_file_says_of_prediction_and_schedule_is_read(
        tmp_path: Path, metadata: dict[str, str], tensors: dict[str, torch.Tensor], prediction: str | None, zero: bool | None):
    path = tmp_path / "model.safetensors"
    save_file({**tensors, "x": torch.zeros(1)}, path, metadata)
    hints = with_words_of_file(Hints(latent_scale=0.5), path)
    assert (hints.file_prediction_type, hints.file_zero_terminal_snr, hints.latent_scale) == (prediction, zero, 0.5)


def test_a_file_that_cannot_be_read_as_safetensors_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"no such thing")
    for name in ("none.safetensors", "model.ckpt", "damaged.safetensors"):
        assert with_words_of_file(hints := Hints(), tmp_path / name) is hints


def test_a_value_that_is_not_a_number_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model.yaml.*not a number"):
        read(tmp_path, SD1.replace("num_heads: 8", "num_heads: eight"))
    with pytest.raises(ModelError, match="missing.yaml"):
        hints_from_yaml(tmp_path / "missing.yaml")


@pytest.mark.parametrize("said", ["x0", "V_prediction", "[1]"])
def test_a_configuration_of_another_prediction_is_refused_and_not_taken_for_noise(tmp_path: Path, said: str) -> None:
    # ldm/models/diffusion/ddpm.py knows eps, x0 and v.
    with pytest.raises(ModelError, match="not eps or v"):
        read(tmp_path, f"model: {{params: {{parameterization: {said}, unet_config: {{params: {{}}}}}}}}")
    with pytest.raises(ModelError, match="not eps or v"):
        read(tmp_path, "model: {params: {denoiser_config: {params: {scaling_config: {target: sgm.EDMScaling}}}}}")
