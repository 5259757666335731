"""What a checkpoint is, is read from its names and shapes; what cannot be trained on is refused in one sentence."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from lib_lora_train.errors import ModelError
from lib_lora_train.model.architecture import Hints
from lib_lora_train.model.family import detect
from tests.model.small_checkpoints import CONTEXT, FAMILIES, HINTS, checkpoint, full_size

# From the configurations published with the models: v1-inference.yaml (CompVis), v2-inference.yaml (Stability AI),
# sd_xl_base.yaml (Stability AI), and the papers' text encoders.
UNET = {
    "sd1": dict(model_channels=320, context_dim=768, adm_channels=None, halvings=3, in_channels=4),
    "sd2": dict(model_channels=320, context_dim=1024, adm_channels=None, halvings=3, in_channels=4),
    "sdxl": dict(model_channels=320, context_dim=2048, adm_channels=2816, halvings=2, in_channels=4),
}
TRANSFORMER_DEPTHS = {  # down, middle, up
    "sd1": ([1] * 6, [1], [1] * 9),
    "sd2": ([1] * 6, [1], [1] * 9),
    "sdxl": ([2, 2, 10, 10], [10], [10, 10, 10, 2, 2, 2]),
}
HEADS = {"sd1": {320: 8, 640: 8, 1280: 8}, "sd2": {320: 5, 640: 10, 1280: 20}, "sdxl": {640: 10, 1280: 20}}
TEXT = {  # component, layers, width, heads, activation, projection
    "sd1": [("te", 12, 768, 12, "quick_gelu", None)],
    "sd2": [("te", 24, 1024, 16, "gelu", 1024)],
    "sdxl": [("te1", 12, 768, 12, "quick_gelu", None), ("te2", 32, 1280, 20, "gelu", 1280)],
}
LATENT_SCALE = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_models_are_recognised_by_shapes_alone(family: str) -> None:
    tensors = full_size(family)
    assert all(tensor.is_meta for tensor in tensors.values())
    found = detect(tensors)
    assert (found.family.name, found.prediction_type, found.zero_terminal_snr) == (family, "epsilon", False)
    assert found.latent_scale == LATENT_SCALE[family]
    assert {name: getattr(found.unet, name) for name in UNET[family]} == UNET[family]
    assert {width: found.unet.heads(width) for width in HEADS[family]} == HEADS[family]
    sections = (found.unet.input_blocks, (found.unet.middle_block,), found.unet.output_blocks)
    assert tuple([block.depth for group in section for block in group if block.kind == "transformer"]
                 for section in sections) == TRANSFORMER_DEPTHS[family]
    assert [(text.component, text.layers, text.width, text.heads, text.activation, text.projection)
            for text in found.text] == TEXT[family]
    assert (found.vae.encoder_levels, found.vae.decoder_levels, found.vae.factor) == ((2,) * 4, (3,) * 4, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_small_models_of_the_same_layout_are_recognised(family: str) -> None:
    found = detect(checkpoint(family), HINTS[family])
    assert (found.family.name, found.unet.model_channels, found.unet.context_dim) == (family, 32, CONTEXT[family])
    assert found.components == (("unet", "te1", "te2") if family == "sdxl" else ("unet", "te"))
    assert found.unet.heads(64) == (8 if family == "sd1" else 4)
    assert [text.heads for text in found.text] == list(HINTS[family].text_heads)


@pytest.mark.parametrize("family", FAMILIES)
def test_v_prediction_and_zero_terminal_snr_come_from_the_keys(family: str) -> None:
    tensors = {**checkpoint(family), "v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    found = detect(tensors, HINTS[family])
    assert (found.prediction_type, found.zero_terminal_snr) == ("v_prediction", True)


def test_hints_win_over_keys_and_rules() -> None:
    tensors = {**checkpoint("sd1"), "v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    hints = Hints(prediction_type="epsilon", zero_terminal_snr=False, latent_scale=0.5, unet_heads=4, text_heads=(2,),
                  text_activations=("gelu",))
    found = detect(tensors, hints)
    assert (found.prediction_type, found.zero_terminal_snr, found.latent_scale) == ("epsilon", False, 0.5)
    assert (found.unet.heads(64), found.text[0].heads, found.text[0].activation) == (4, 2, "gelu")


def test_sd2s_v_models_need_a_word_from_outside() -> None:
    assert detect(full_size("sd2"), Hints(prediction_type="v_prediction")).prediction_type == "v_prediction"
    assert detect(full_size("sd2")).prediction_type == "epsilon"


@pytest.mark.parametrize(("spread", "prediction"), [(0.05, "epsilon"), (0.12, "v_prediction")])
def test_an_sd2_model_that_says_nothing_is_guessed_from_a_weight_and_called_a_guess(spread: float, prediction: str) -> None:
    # ComfyUI's rule: the biases of output_blocks.11's first norm spread by more than 0.09 in models that predict v.
    bias = torch.tensor([-spread, spread]).repeat(160)
    tensors = {**full_size("sd2"), "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias": bias}
    found = detect(tensors)
    assert (found.prediction_type, found.prediction_guessed) == (prediction, True)
    for hints in (Hints(prediction_type="epsilon"), Hints(file_prediction_type="epsilon")):
        assert (detect(tensors, hints).prediction_type, detect(tensors, hints).prediction_guessed) == ("epsilon", False)
    assert not any(detect(full_size(family)).prediction_guessed for family in ("sd1", "sdxl"))


def test_sd2_is_known_by_its_linear_projections_where_a_host_renamed_the_text_encoder() -> None:
    clip = {name: tensor for name, tensor in full_size("sdxl").items() if name.startswith("conditioner.embedders.0.")}
    renamed = {name.replace("conditioner.embedders.0.", "cond_stage_model."): torch.empty(
        [1024 if size == 768 else size for size in tensor.shape], device="meta") for name, tensor in clip.items()}
    found = detect({**without("sd2", "cond_stage_model."), **renamed})
    assert (found.family.name, found.text[0].activation, found.text[0].openclip) == ("sd2", "gelu", True)


def test_ema_weights_and_training_leftovers_do_no_harm() -> None:
    extra = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3),
             "betas": torch.zeros(1000), "cond_stage_model.transformer.text_model.embeddings.position_ids":
             torch.arange(77)[None]}
    assert detect({**checkpoint("sd1"), **extra}, HINTS["sd1"]).family.name == "sd1"


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e5m2])
def test_tensors_that_are_not_used_do_not_make_a_checkpoint_quantised(dtype: torch.dtype) -> None:
    names = ("teacher.model.weight", "model.diffusion_model.extra.weight", "first_stage_model.loss.discriminator.weight",
             "cond_stage_model.transformer.vision_model.head.weight", "optimizer.state.bias")
    extra = {name: torch.zeros(4, dtype=torch.float32).to(dtype) for name in names}
    assert detect({**checkpoint("sd1"), **extra}, HINTS["sd1"]).family.name == "sd1"


# --- refusals ---------------------------------------------------------------------------------------------------------

STEM = "model.diffusion_model.input_blocks.0.0.weight"


def with_input_channels(family: str, channels: int) -> dict[str, Tensor]:
    return {**full_size(family), STEM: torch.empty(320, channels, 3, 3, device="meta")}


def without(family: str, prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in full_size(family).items() if not name.startswith(prefix)}


def refiner() -> dict[str, Tensor]:
    """The refiner has one text encoder, OpenCLIP, in the first place."""
    return {name.replace("embedders.1.", "embedders.0."): tensor
            for name, tensor in without("sdxl", "conditioner.embedders.0.").items()}


def named(*names: str) -> dict[str, Tensor]:
    return {name: torch.empty(8, 8, device="meta") for name in names}


def stored_as(dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if name.endswith("to_q.weight") else tensor
            for name, tensor in full_size("sd1").items()}


@pytest.mark.parametrize("tensors, sentence", [
    (lambda: with_input_channels("sd1", 9), "inpainting model.*9 channels"),
    (lambda: with_input_channels("sd2", 9), "inpainting model.*9 channels"),
    (lambda: with_input_channels("sdxl", 9), "inpainting model.*9 channels"),
    (lambda: with_input_channels("sd1", 8), "instruct-pix2pix model.*8 channels"),
    (lambda: with_input_channels("sd2", 5), "depth-to-image"),
    (lambda: with_input_channels("sd2", 7), "upscaling"),
    (refiner, "SDXL refiner"),
    (lambda: named("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"), "Stable Diffusion 3"),
    (lambda: named("model.diffusion_model.double_blocks.0.img_attn.qkv.weight"), "Flux"),
    (lambda: named("double_blocks.0.img_attn.qkv.weight"), "Flux"),
    (lambda: named("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"), "a LoRA"),
    (lambda: named("base_model.model.unet.down_blocks.0.to_q.lora_A.weight"), "a LoRA in the layout of PEFT"),
    (lambda: named("unet.down_blocks.0.attentions.0.to_q.lora.down.weight"), "a LoRA in the layout of diffusers"),
    (lambda: named("unet.mid_block.attn1.processor.to_q_lora.up.weight"), "a LoRA in the layout of diffusers"),
    (lambda: named("text_encoder.text_model.q_proj.lora_linear_layer.up.weight"), "a LoRA in the layout of diffusers"),
    (lambda: named("control_model.input_blocks.0.0.weight"), "a ControlNet"),
    (lambda: named("emb_params"), "^The file is a textual inversion embedding, not a checkpoint; choose"),
    (lambda: named("down_blocks.0.resnets.0.conv1.weight"), "layout of diffusers"),
    (lambda: named("first_stage_model.encoder.conv_in.weight"), "no Stable Diffusion UNet"),
    (lambda: {}, "no Stable Diffusion UNet"),
    (lambda: {**full_size("sdxl"), "edm_mean": torch.zeros(4)}, "EDM"),
    (lambda: {**full_size("sd2"), **named("embedder.model.ln_final.weight")}, "unCLIP"),
    (lambda: stored_as(torch.int8), "quantised.*int8"),
    (lambda: stored_as(torch.uint8), "quantised.*uint8"),
    (lambda: stored_as(torch.float8_e4m3fn), "quantised.*float8_e4m3fn.*fp8"),
    (lambda: without("sd1", "first_stage_model."), "no VAE"),
    (lambda: without("sdxl", "first_stage_model.encoder."), "no VAE encoder"),
    (lambda: without("sd1", "cond_stage_model."), "no text encoder"),
    (lambda: without("sdxl", "conditioner.embedders.1."), "no second text encoder"),
    (lambda: without("sdxl", "conditioner.embedders.0."), "no first text encoder"),
    (lambda: without("sdxl", "conditioner.embedders.1.model.text_projection"), "no projection"),
    (lambda: without("sd1", "model.diffusion_model.out.2."), "incomplete.*out.2.weight"),
    (lambda: {**full_size("sd2"), **without("sd1", "cond_stage_model.")}, "do not belong together"),
    (lambda: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in named("double_blocks.0.a.weight").items()},
     "Flux"),
])
def test_other_kinds_are_refused_in_one_sentence(tensors: object, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence) as refusal:
        detect(tensors())
    text = str(refusal.value)
    assert text.endswith(".") and "\n" not in text and ". " not in text


@pytest.mark.parametrize("extra", ["lora_unet_a.lora_down.weight", "lycoris_a.lokr_w1", "clip_l", "emb_params"])
def test_what_a_merge_left_beside_a_whole_checkpoint_does_not_make_it_another_kind(extra: str) -> None:
    assert detect({**full_size("sdxl"), **named(extra)}).family.name == "sdxl"


def test_heads_that_do_not_fit_are_refused_and_the_yaml_is_named() -> None:
    with pytest.raises(ModelError, match=r"32 channels cannot be cut into heads.*\.yaml"):
        detect(checkpoint("sd2"))
    with pytest.raises(ModelError, match=r"2 text encoders, its checkpoint of 1"):
        detect(checkpoint("sd1"), dataclasses.replace(HINTS["sd1"], text_heads=(4, 2)))
    with pytest.raises(ModelError, match=r"48 channels cannot be cut into 5 heads"):
        detect(checkpoint("sd1"), dataclasses.replace(HINTS["sd1"], text_heads=(5,)))
