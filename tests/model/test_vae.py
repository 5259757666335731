"""The VAE equals ldm's and diffusers'."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib_lora_train.errors import SettingError
from lib_lora_train.model.sd.detection import vae_config
from lib_lora_train.model.sd.vae import VAE
from tests.model.small_checkpoints import ldm_names_of_vae, ldm_vae, randomised, relative_error


def vae_of(tensors: dict[str, Tensor]) -> VAE:
    return VAE(tensors, vae_config(tensors))


def image(height: int = 64, width: int = 96) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1


def latents() -> Tensor:
    return torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("attention_at", [(), (16,)])
@torch.no_grad()
def test_encode_and_decode_equal_ldm(attention_at: tuple[int, ...]) -> None:
    theirs = randomised(ldm_vae(attention_at=attention_at))
    ours = vae_of(theirs.state_dict())
    posterior, (mean, std) = theirs.encode(image()), ours.encode(image())
    assert relative_error(mean, posterior.mean) <= 1e-5
    assert relative_error(std, posterior.std) <= 1e-5
    assert relative_error(ours.decode(latents()), theirs.decode(latents())) <= 1e-5


@torch.no_grad()
def test_encode_and_decode_equal_diffusers() -> None:
    from diffusers import AutoencoderKL

    theirs = randomised(AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4))
    ours = vae_of(ldm_names_of_vae(theirs.state_dict()))
    posterior, (mean, std) = theirs.encode(image()).latent_dist, ours.encode(image())
    assert relative_error(mean, posterior.mean) <= 1e-5
    assert relative_error(std, posterior.std) <= 1e-5
    assert relative_error(ours.decode(latents()), theirs.decode(latents()).sample) <= 1e-5


@torch.no_grad()
def test_attention_weights_stored_as_matrices_do_as_well() -> None:
    state = randomised(ldm_vae()).state_dict()
    matrices = {name: tensor.flatten(1) if ".attn_1." in name and tensor.ndim == 4 else tensor
                for name, tensor in state.items()}
    assert torch.equal(vae_of(matrices).encode(image())[0], vae_of(state).encode(image())[0])


@torch.no_grad()
def test_half_precision_weights_are_computed_in_fp32() -> None:
    theirs = randomised(ldm_vae()).half()
    ours = vae_of(theirs.state_dict())
    mean, std = ours.encode(image())
    assert mean.dtype == std.dtype == torch.float32
    assert relative_error(mean, theirs.float().encode(image()).mean) <= 1e-5


def test_the_standard_deviation_is_bounded_as_in_ldm() -> None:
    theirs = randomised(ldm_vae())
    with torch.no_grad():
        theirs.quant_conv.bias[4:] += torch.tensor([1e3, -1e3, 0.0, 0.0])
        _, std = vae_of(theirs.state_dict()).encode(image())
        expected = theirs.encode(image()).std
    assert std.isfinite().all() and relative_error(std, expected) <= 1e-5


def test_a_size_that_is_not_a_multiple_of_eight_is_refused() -> None:
    with pytest.raises(SettingError, match="100x64 .* multiples of 8"):
        vae_of(ldm_vae().state_dict()).encode(image(64, 100))


def test_no_graph_is_built() -> None:
    vae = vae_of(dict(ldm_vae().named_parameters()))
    assert not vae.decode(latents().requires_grad_()).requires_grad
