"""Building the whole model: what it is made of, and that a damaged checkpoint is found out before work begins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib_lora_train.errors import ModelError
from lib_lora_train.model.architecture import Hints
from lib_lora_train.model.frozen import FrozenModel, build
from lib_lora_train.model.sd.schedule import rescaled_to_zero_terminal_snr, scaled_linear_alphas_cumprod
from tests.model.small_checkpoints import FAMILIES, HINTS, checkpoint, full_size, tokenizers


def built(family: str, tensors: dict[str, Tensor]) -> FrozenModel:
    return build(tensors, hints=HINTS[family], tokenizers=tokenizers(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_size_checkpoint_fits_itself(family: str) -> None:
    model = build(full_size(family), tokenizers=tokenizers(family))
    assert model.architecture.family.name == family
    assert model.dtype == torch.float32 and model.device.type == "meta"


@pytest.mark.parametrize("family", FAMILIES)
def test_components_are_the_parts_that_can_be_adapted(family: str) -> None:
    model = built(family, checkpoint(family))
    assert tuple(model.components) == model.architecture.components
    assert "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight" in model.components["unet"]
    for component, tensors in model.components.items():
        if component != "unet":
            assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in tensors


@pytest.mark.parametrize("name", [
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight",
    "model.diffusion_model.output_blocks.4.0.in_layers.0.bias",
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_out.0.bias",
    "first_stage_model.encoder.mid.attn_1.k.bias",
    "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
])
def test_a_missing_tensor_is_named(name: str) -> None:
    tensors = checkpoint("sd1")
    del tensors[name]
    local = name.replace("model.diffusion_model.", "").replace("first_stage_model.", "")
    with pytest.raises(ModelError, match=local.replace("cond_stage_model.transformer.", "")):
        built("sd1", tensors)


@pytest.mark.parametrize("name", [
    "model.diffusion_model.output_blocks.4.0.in_layers.2.weight",
    "first_stage_model.decoder.up.1.block.0.conv2.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.out_proj.weight",
])
def test_tensors_that_do_not_fit_each_other_are_refused(name: str) -> None:
    tensors = checkpoint("sd1")
    tensors[name] = tensors[name][:, 1:]
    with pytest.raises(ModelError, match="do not fit each other"):
        built("sd1", tensors)


@pytest.mark.parametrize("stored", [torch.full((1000,), torch.nan), torch.empty(0), torch.tensor(0.5), torch.ones(1000)])
def test_a_stored_schedule_that_is_none_is_passed_over(stored: torch.Tensor) -> None:
    model = built("sd1", {**checkpoint("sd1"), "alphas_cumprod": stored})
    assert torch.equal(model.schedule.alphas_cumprod, scaled_linear_alphas_cumprod())


def test_the_schedule_is_the_hosts_else_the_checkpoints_else_the_default() -> None:
    tensors, own, hosts = checkpoint("sd1"), torch.linspace(0.99, 0.02, 1000), torch.linspace(0.98, 0.01, 1000)
    default = scaled_linear_alphas_cumprod()
    assert torch.equal(built("sd1", tensors).schedule.alphas_cumprod, default)
    assert torch.equal(built("sd1", {**tensors, "alphas_cumprod": own}).schedule.alphas_cumprod, own)
    # A buffer rounded to 16 bits is worse than none.
    assert torch.equal(built("sd1", {**tensors, "alphas_cumprod": own.half()}).schedule.alphas_cumprod, default)
    hints = Hints(unet_heads=8, text_heads=(4,), alphas_cumprod=hosts)
    model = build({**tensors, "alphas_cumprod": own}, hints=hints, tokenizers=tokenizers("sd1"))
    assert torch.equal(model.schedule.alphas_cumprod, hosts)


def test_zero_terminal_snr_rescales_the_schedule() -> None:
    model = built("sd1", {**checkpoint("sd1"), "v_pred": torch.tensor([]), "ztsnr": torch.tensor([])})
    assert model.schedule.prediction_type == "v_prediction"
    assert torch.equal(model.schedule.alphas_cumprod, rescaled_to_zero_terminal_snr(scaled_linear_alphas_cumprod()))


def test_dtype_is_that_of_the_stored_weights() -> None:
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor
              for name, tensor in checkpoint("sd1").items()}
    assert built("sd1", halves).dtype == torch.float16
