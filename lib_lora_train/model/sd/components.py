"""The flat dict of a checkpoint cut into its parts, each under local names.

    model.diffusion_model.                  -> UNet, ldm/sgm names
    first_stage_model.                      -> VAE, ldm names
    cond_stage_model. (SD1, SD2)            -> text encoder, Hugging Face names
    conditioner.embedders.{0,1}. (SDXL)     -> two text encoders, Hugging Face names

A text encoder arrives in one of two layouts: Hugging Face's CLIPTextModel (CLIP-L everywhere; every encoder in Forge)
or OpenCLIP's, whose fused `in_proj_weight` is cut into q, k and v. The cuts and the transposed projection are views
of the borrowed storage, never copies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."

# Where the encoder proper may sit below its prefix: `transformer.` is ldm's FrozenCLIPEmbedder,
# `model.` ldm's FrozenOpenCLIPEmbedder, `model.transformer.` a Hugging Face model where OpenCLIP's used to be.
_WRAPPERS = re.compile(r"^(model\.transformer\.|transformer\.|model\.)(?=text_model\.|text_projection)")
_OPENCLIP_LAYER = re.compile(r"^transformer\.resblocks\.(\d+)\.(.+)$")
_OPENCLIP_NAMES = {
    "ln_1.weight": "layer_norm1.weight", "ln_1.bias": "layer_norm1.bias",
    "ln_2.weight": "layer_norm2.weight", "ln_2.bias": "layer_norm2.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight", "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight", "mlp.c_proj.bias": "mlp.fc2.bias",
    "attn.out_proj.weight": "self_attn.out_proj.weight", "attn.out_proj.bias": "self_attn.out_proj.bias",
}
_OPENCLIP_ENDS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, under the rest of their names."""
    return {name[len(prefix):]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def unet_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The UNet's tensors under local names; empty where there is none."""
    return below(tensors, UNET_PREFIX)


def vae_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The VAE's tensors under local names; empty where there is none."""
    return below(tensors, VAE_PREFIX)


def text_tensors(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One text encoder's tensors under Hugging Face names; empty where there is none."""
    local = below(tensors, prefix)
    if is_openclip(local):
        return _from_openclip({name.removeprefix("model."): tensor for name, tensor in local.items()})
    named = {}
    for name, tensor in local.items():
        # Early SD1 checkpoints come from a transformers that had no `text_model.` level.
        name = re.sub(r"^transformer\.(?=embeddings\.|encoder\.|final_layer_norm\.)", "transformer.text_model.", name)
        name = _WRAPPERS.sub("", name)
        if name == "text_projection":  # OpenCLIP's parameter [width, projection] beside Hugging Face names
            name, tensor = "text_projection.weight", tensor.detach().t()
        if name.startswith(("text_model.", "text_projection.")) and not name.endswith("position_ids"):
            named[name] = tensor
    return named


def is_openclip(local: Mapping[str, Tensor]) -> bool:
    """Whether these names (below a text encoder's prefix) are OpenCLIP's."""
    return any(name.startswith(("model.transformer.resblocks.", "transformer.resblocks.")) for name in local)


def _from_openclip(local: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, tensor in local.items():
        # Views are taken of detached tensors: a view of a leaf that requires gradients would join its graph.
        tensor = tensor.detach()
        layer = _OPENCLIP_LAYER.match(name)
        if layer is not None:
            prefix, rest = f"text_model.encoder.layers.{layer[1]}.", layer[2]
            if rest in _OPENCLIP_NAMES:
                named[prefix + _OPENCLIP_NAMES[rest]] = tensor
            elif rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
                kind = rest.removeprefix("attn.in_proj_")
                for projection, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                    named[f"{prefix}self_attn.{projection}.{kind}"] = part
        elif name in _OPENCLIP_ENDS:
            named[_OPENCLIP_ENDS[name]] = tensor
        elif name == "text_projection":  # OpenCLIP multiplies from the right, Hugging Face has a linear layer
            named["text_projection.weight"] = tensor.t()
        elif name == "text_projection.weight":
            named[name] = tensor
    return named
