"""By which VAE latents were made. The half of it that paints has no part in them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lib_lora_train.inputs.latent_files import tensor_fingerprint
from lib_lora_train.model.fingerprint import Fingerprints

_ENCODERS = Fingerprints(tensor_fingerprint)
_MAKES_LATENTS = ("encoder.", "quant_conv.")


def encoder_fingerprint(vae: Mapping[str, Tensor]) -> str:
    """sha256 of all that turns pictures into latents, of a VAE's tensors under local names.

    They must be the host's own, and not views: while they are the same, they are read once for all runs of a process (in a
    VAE of 335 MB it is 137 MB).
    """
    return _ENCODERS.of({name: tensor for name, tensor in vae.items() if name.startswith(_MAKES_LATENTS)})
