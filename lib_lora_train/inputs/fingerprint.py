"""By which VAE latents were made. Its decoder has no part in them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lib_lora_train.inputs.latent_files import tensor_fingerprint

_MAKES_LATENTS = ("encoder.", "quant_conv.")


def encoder_fingerprint(vae: Mapping[str, Tensor]) -> str:
    """sha256 of all that makes latents of images, of a VAE's tensors under local names: 70 to 137 MB are read."""
    return tensor_fingerprint({name: tensor for name, tensor in vae.items() if name.startswith(_MAKES_LATENTS)})
