"""Whether two images show the same kind of thing, by the diffusion model's own features.

As in DIFT (Tang et al. 2023, "Emergent Correspondence from Image Diffusion", arXiv 2306.03881), an image is noised to
timestep 261 and shown to the UNet with an empty text; the features are the input of the coarsest level's last transformer
on the way up, here averaged over the image, so that a subject may be elsewhere in it (`likeness.py` compares them patch by
patch).
Nothing has to be downloaded, and a model judges what it knows: of the demo's emoji, its own sample of a word is nearer to
the word's image than to another one's in all cases, and in 92 of 100 where another artist drew that image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_lora_train.errors import ModelError
from lib_lora_train.model.architecture import UNetConfig
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.ops.linear import frozen_linear

TIMESTEP, FINE_TIMESTEP = 261, 100
_SEED = 261


def subject_features(model: FrozenModel, latents: Tensor, *, clip_skip: int, dtype: torch.dtype) -> Tensor:
    """[C] fp32 on the CPU: the features of one image, latents [1, 4, h, w] in the VAE's own scale."""
    return patch_features(model, latents, clip_skip=clip_skip, dtype=dtype).mean(dim=0).cpu()


@torch.no_grad()
def patch_features(model: FrozenModel, latents: Tensor, *, clip_skip: int, dtype: torch.dtype, fine: bool = False) -> Tensor:
    """[n, C] fp32 on the model's device: the features at each of n patches, row by row, of one image as above. `fine` ones are
    those of the finest level with little noise, which tell how a thing is drawn more than what it is."""
    t = torch.full((1,), FINE_TIMESTEP if fine else TIMESTEP, device=model.device)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(_SEED)).to(model.device)
    x_t = model.schedule.add_noise(latents.to(model.device) * model.architecture.latent_scale, noise, t)
    empty = model.text.encode([model.text.tokenize("")], clip_skip=clip_skip)
    height, width = (side * model.architecture.vae.factor for side in latents.shape[2:])
    y = empty.vector(original=(height, width), crop=(0, 0), target=(height, width))
    probe = _Probe()
    model.unet(x_t.to(dtype), t, empty.context.to(model.device, dtype), None if y is None else y.to(model.device, dtype),
               adapters={_layer(model.architecture.unet, fine=fine): probe})
    assert probe.seen is not None
    return probe.seen


def resemblance(features: Tensor, others: Tensor) -> float:
    """The cosine between two images' features [C], not below 0: 1 is the same; unrelated images have about a half."""
    return min(1.0, max(0.0, float(F.cosine_similarity(features, others, dim=0))))  # rounding can exceed 1


class _Probe:
    """An adapter that changes nothing and keeps the layer's input, [h·w, C]."""

    def __init__(self) -> None:
        self.seen: Tensor | None = None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [1, h·w, C]."""
        self.seen = x[0].float()
        return frozen_linear(x, weight, bias)


def _layer(unet: UNetConfig, *, fine: bool) -> str:
    """The last transformer on the way up of the coarsest level that has one, the level DIFT reads in SD1 and SD2; or of all."""
    found = ""
    for block in (block for group in unet.output_blocks for block in group):
        if block.kind == "transformer":
            found = block.name
        elif block.kind == "up" and found and not fine:
            break
    if not found:
        raise ModelError("The checkpoint's UNet has no layer that attends to a text on its way up")
    return f"{found}.proj_in"
