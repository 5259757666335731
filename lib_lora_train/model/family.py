"""Names and shapes of a checkpoint -> its `Architecture`.

Sizes are read, never assumed, so a small checkpoint of the same layout works like a full one. What shapes cannot tell
comes from `Hints` (the host's modules, the user, the `.yaml`), else from a key in the checkpoint, else from the rule:

    heads of the UNet        8 in SD1; 64 channels a head in SD2 and SDXL
    heads of text encoders   64 channels a head
    activation of text       quick_gelu in CLIP-L (SD1, SDXL's first); gelu in OpenCLIP (SD2, SDXL's second)
    prediction               v where the checkpoint has a key `v_pred`, else epsilon. SD2's 768-v models carry no such
                             key and have the shapes of the epsilon ones: they need the host's word or their `.yaml`
    zero terminal SNR        where the checkpoint has a key `ztsnr`
    latent scale             0.18215; 0.13025 in SDXL

Only shapes, names and dtypes are looked at: tensors on the meta device do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from lib_lora_train.errors import ModelError
from lib_lora_train.model.architecture import (
    NO_HINTS,
    Architecture,
    Block,
    Family,
    Hints,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from lib_lora_train.model.sd.components import (
    SDXL_TEXT_PREFIXES,
    TEXT_PREFIXES,
    below,
    is_openclip,
    text_tensors,
    unet_tensors,
    vae_tensors,
)
from lib_lora_train.model.sd.hints_file import hints_from_yaml
from lib_lora_train.model.sd.refusals import SUPPORTED, incomplete, refuse_other_kinds

__all__ = ["Architecture", "Family", "Hints", "detect", "family_of", "hints_from_yaml", "text_prefixes", "unet_config",
           "vae_config"]

_LATENT_SCALE = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
_CHANNELS_A_HEAD = 64
_SIZE_VECTOR = 6 * 256
_TOKEN_EMBEDDING = "text_model.embeddings.token_embedding.weight"


def detect(tensors: Mapping[str, Tensor], hints: Hints = NO_HINTS) -> Architecture:
    """Recognise a checkpoint by its flat dict of tensors under ldm/sgm names.

    Raises ModelError, in one sentence, for a kind that is not supported (inpainting, instruct-pix2pix, refiner, SD3,
    Flux, quantised weights, …) and for a checkpoint that lacks a part, saying which.
    """
    refuse_other_kinds(tensors)
    unet = unet_tensors(tensors)
    if "input_blocks.0.0.weight" not in unet:
        raise ModelError(
            "The file holds no Stable Diffusion UNet", why="no tensor is named 'model.diffusion_model.input_blocks…'",
            remedy=SUPPORTED)
    family = family_of(tensors, unet)
    sizes = unet_config(unet, family=family, hints=hints)
    return Architecture(
        family=family,
        unet=sizes,
        vae=vae_config(vae_tensors(tensors)),
        text=_text(tensors, family=family, hints=hints, unet=sizes),
        prediction_type=hints.prediction_type or ("v_prediction" if "v_pred" in tensors else "epsilon"),
        zero_terminal_snr="ztsnr" in tensors if hints.zero_terminal_snr is None else hints.zero_terminal_snr,
        latent_scale=hints.latent_scale or _LATENT_SCALE[family],
    )


def text_prefixes(family: Family) -> tuple[str, ...]:
    """What the names of each text encoder's tensors begin with."""
    return SDXL_TEXT_PREFIXES if family == "sdxl" else TEXT_PREFIXES


def family_of(tensors: Mapping[str, Tensor], unet: Mapping[str, Tensor]) -> Family:
    """Which family a checkpoint is of; `unet` is its UNet under local names."""
    if "label_emb.0.0.weight" in unet:
        if any(name.startswith("cond_stage_model.") for name in tensors):
            raise ModelError("The checkpoint is an unCLIP model, which this trainer does not support", remedy=SUPPORTED)
        return "sdxl"
    # Hosts that rename OpenCLIP's tensors leave one trace of SD2: projections that are not convolutions.
    projections = [tensor.ndim for name, tensor in unet.items() if name.endswith(".proj_in.weight")]
    openclip = is_openclip(below(tensors, TEXT_PREFIXES[0]))
    return "sd2" if openclip or 2 in projections else "sd1"


# --- the UNet ---------------------------------------------------------------------------------------------------------

def unet_config(unet: Mapping[str, Tensor], *, family: Family, hints: Hints) -> UNetConfig:
    """The sizes of a UNet (local names); ModelError where they make no sense."""
    blocks = _blocks(unet)
    heads, head_channels = hints.unet_heads, hints.unet_head_channels
    if head_channels is not None:
        heads = None  # as in ldm: num_head_channels wins over num_heads
    elif heads is None:
        heads, head_channels = (8, None) if family == "sd1" else (None, _CHANNELS_A_HEAD)
    stem, vector = unet["input_blocks.0.0.weight"], unet.get("label_emb.0.0.weight")
    config = UNetConfig(
        in_channels=stem.shape[1],
        out_channels=_shape(unet, "out.2.weight")[0],
        model_channels=stem.shape[0],
        context_dim=_context_dim(unet),
        adm_channels=None if vector is None else vector.shape[1],
        num_heads=heads,
        head_channels=head_channels,
        input_blocks=blocks["input_blocks"],
        middle_block=tuple(block for group in blocks["middle_block"] for block in group),
        output_blocks=blocks["output_blocks"],
    )
    for block in (block for group in config.input_blocks for block in group if block.kind == "transformer"):
        config.heads(_shape(unet, f"{block.name}.norm.weight")[0])  # raises where the head count does not fit
    return config


def _context_dim(unet: Mapping[str, Tensor]) -> int:
    for name, tensor in unet.items():
        if name.endswith(".attn2.to_k.weight") and tensor.ndim > 1:
            return tensor.shape[1]
    raise ModelError("The checkpoint's UNet has no layer that attends to a text", remedy=SUPPORTED)


_PLACE = re.compile(r"(\d{1,4})\.(\d{1,4})\.(.+)", re.ASCII | re.DOTALL)  # block.module.parameter


def _blocks(names: Iterable[str]) -> dict[str, tuple[tuple[Block, ...], ...]]:
    """For input_blocks, middle_block and output_blocks: their blocks in order, each a tuple of modules in order."""
    tails: dict[tuple[str, int, int], set[str]] = {}
    for name in names:
        section, _, rest = name.partition(".")
        if section == "middle_block":
            rest = f"0.{rest}"
        elif section not in ("input_blocks", "output_blocks"):
            continue
        match = _PLACE.fullmatch(rest)
        if match is None:
            raise ModelError(f"The checkpoint's UNet has an unknown block '{name}'", remedy=SUPPORTED)
        tails.setdefault((section, int(match[1]), int(match[2])), set()).add(match[3])
    found: dict[str, dict[int, list[Block]]] = {"input_blocks": {}, "middle_block": {}, "output_blocks": {}}
    for (section, index, module), tail in sorted(tails.items()):
        name = f"{section}.{module}" if section == "middle_block" else f"{section}.{index}.{module}"
        found[section].setdefault(index, []).append(_block(name, tail))
    return {section: tuple(tuple(group) for group in groups.values()) for section, groups in found.items()}


def _block(name: str, tails: set[str]) -> Block:
    """The module `name`, known by the parameters it has."""
    if "in_layers.2.weight" in tails:
        return Block(name, "resnet")
    if "proj_in.weight" in tails:
        return Block(name, "transformer", depth=_count(tails, r"transformer_blocks\.(\d+)\."))
    if "op.weight" in tails:
        return Block(name, "down")
    if "conv.weight" in tails:
        return Block(name, "up")
    if "weight" in tails:
        return Block(name, "conv")
    raise ModelError(f"The checkpoint's UNet has an unknown block '{name}'", remedy=SUPPORTED)


# --- the VAE and the text encoders ------------------------------------------------------------------------------------

def vae_config(vae: Mapping[str, Tensor]) -> VAEConfig:
    """The sizes of a VAE (local names); ModelError where its encoder or decoder is missing."""
    for part, name in (("VAE", "decoder.conv_in.weight"), ("VAE encoder", "encoder.conv_in.weight")):
        if name not in vae:
            raise ModelError(
                f"The checkpoint has no {part}", why=f"no tensor is named 'first_stage_model.{name}'",
                remedy="choose a checkpoint that contains its VAE")

    def levels(way: str) -> tuple[int, ...]:
        number = _count(vae, rf"{way}\.(\d+)\.")
        return tuple(_count(vae, rf"{way}\.{level}\.block\.(\d+)\.") for level in range(number))

    return VAEConfig(
        latent_channels=_shape(vae, "decoder.conv_in.weight")[1],
        encoder_levels=levels(r"encoder\.down"), decoder_levels=levels(r"decoder\.up"))


def _text(tensors: Mapping[str, Tensor], *, family: Family, hints: Hints, unet: UNetConfig) -> tuple[TextConfig, ...]:
    configs, prefixes = [], text_prefixes(family)
    for said in (hints.text_heads, hints.text_activations):
        if said is not None and len(said) != len(prefixes):
            raise ModelError(
                f"The model's configuration is of {len(said)} text encoders, its checkpoint of {len(prefixes)}",
                remedy="replace or remove the .yaml beside it")
    for index, prefix in enumerate(prefixes):
        text = text_tensors(tensors, prefix)
        if _TOKEN_EMBEDDING not in text:
            which = "" if family != "sdxl" else ("first ", "second ")[index]
            raise ModelError(
                f"The checkpoint has no {which}text encoder", why=f"no token embedding was found below '{prefix}'",
                remedy="choose a checkpoint that contains its text encoders")
        configs.append(_text_encoder(text, index=index, family=family, hints=hints))
    width = sum(config.width for config in configs)
    if width != unet.context_dim:
        raise _mismatch(f"the UNet expects a text condition of width {unet.context_dim}, the text gives {width}")
    if family == "sdxl" and configs[1].projection is None:
        raise ModelError("The checkpoint's second text encoder has no projection", why="'text_projection' is missing",
                         remedy="choose a checkpoint that contains its text encoders")
    if family == "sdxl" and unet.adm_channels != configs[1].projection + _SIZE_VECTOR:
        raise _mismatch(f"the UNet expects a vector condition of width {unet.adm_channels}, "
                        f"pooled text and sizes give {configs[1].projection + _SIZE_VECTOR}")
    return tuple(configs)


def _text_encoder(text: Mapping[str, Tensor], *, index: int, family: Family, hints: Hints) -> TextConfig:
    openclip = family == "sd2" or index == 1
    width, projection = _shape(text, _TOKEN_EMBEDDING)[1], text.get("text_projection.weight")
    heads = hints.text_heads[index] if hints.text_heads else max(1, width // _CHANNELS_A_HEAD)
    if width % heads:
        raise ModelError(
            f"The text encoder's {width} channels cannot be cut into {heads} heads",
            remedy="put the checkpoint's .yaml beside it, which names the text encoder's configuration")
    return TextConfig(
        component="te" if family != "sdxl" else f"te{index + 1}",
        layers=_count(text, r"text_model\.encoder\.layers\.(\d+)\."),
        width=width,
        heads=heads,
        activation=hints.text_activations[index] if hints.text_activations else "gelu" if openclip else "quick_gelu",
        positions=_shape(text, "text_model.embeddings.position_embedding.weight")[0],
        projection=None if projection is None else projection.shape[0],
        skip=1 if family == "sd1" else 2,
        final_norm=family != "sdxl",
        pooled=family == "sdxl" and index == 1,
        pad_with_end=not openclip,
    )


def _mismatch(why: str) -> ModelError:
    return ModelError("The checkpoint's UNet and text encoder do not belong together", why=why,
                      remedy="choose a checkpoint whose parts come from one model")


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise incomplete(name)
    return tuple(tensors[name].shape)


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest index that `pattern` captures at the beginning of a name; 0 without any."""
    expression = re.compile(pattern)
    return 1 + max((int(match[1]) for match in map(expression.match, names) if match), default=-1)
