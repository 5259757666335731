"""Names and shapes of a Stable Diffusion checkpoint -> its `Architecture`.

Sizes are read, never assumed. What shapes cannot tell comes from `Hints` (the host's modules, the user, the `.yaml`),
else from a key in the checkpoint, else from the family:

    heads of text encoders   64 channels a head
    prediction               what the file's metadata say, or v where the checkpoint has a key `v_pred`, else epsilon. SD2's
                             768-v models mostly say nothing and have the shapes of the epsilon ones: guessed from a weight
    zero terminal SNR        where the checkpoint has a key `ztsnr`, or a stored schedule that ends at zero
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lib_lora_train.errors import ModelError
from lib_lora_train.model.architecture import (
    Activation,
    Architecture,
    Block,
    Hints,
    PredictionType,
    TextConfig,
    TextEncoderSpec,
    UNetConfig,
    VAEConfig,
    incomplete,
)
from lib_lora_train.model.sd.components import UNET_PREFIX, below, is_openclip
from lib_lora_train.model.sd.refusals import SUPPORTED, refuse_other_kinds, refuse_quantised
from lib_lora_train.model.sd.text import SIZE_EMBEDDING

if TYPE_CHECKING:
    from lib_lora_train.model.family import Family

_CHANNELS_A_HEAD = 64
_SIZE_VECTOR = 6 * SIZE_EMBEDDING
_GUESSED_FROM = f"{UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_TOKEN_EMBEDDING = "text_model.embeddings.token_embedding.weight"


def has_unet(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint holds a UNet in the layout of ldm or sgm."""
    return f"{UNET_PREFIX}input_blocks.0.0.weight" in tensors


def has_openclip(tensors: Mapping[str, Tensor]) -> bool:
    """Whether its text encoder is OpenCLIP's, as SD2's is."""
    # Hosts that rename OpenCLIP's tensors leave one trace: projections of the UNet that are not convolutions.
    linear = any(tensor.ndim == 2 and name.startswith(UNET_PREFIX) and name.endswith(".proj_in.weight")
                 for name, tensor in tensors.items())
    return has_unet(tensors) and (linear or is_openclip(below(tensors, "cond_stage_model.")))


def has_vector_condition(tensors: Mapping[str, Tensor]) -> bool:
    """Whether its UNet takes a vector condition, as SDXL's does."""
    return has_unet(tensors) and f"{UNET_PREFIX}label_emb.0.0.weight" in tensors


def read(family: Family, tensors: Mapping[str, Tensor], hints: Hints) -> Architecture:
    """The sizes of a checkpoint of `family`; ModelError for a kind that is not trained, or a part that is missing."""
    refuse_other_kinds(tensors)
    if family.vector_condition and any(name.startswith("cond_stage_model.") for name in tensors):
        raise ModelError("The checkpoint is an unCLIP model, which this trainer does not support", remedy=SUPPORTED)
    unet, vae, text = family.parts(tensors)
    for part in (unet, vae, *text):
        refuse_quantised(part)
    sizes = unet_config(unet, family=family, hints=hints)
    file_prediction = hints.file_prediction_type or ("v_prediction" if "v_pred" in tensors else None)
    prediction = hints.prediction_type or (file_prediction if file_prediction in ("epsilon", "v_prediction") else None)
    file_zero = hints.file_zero_terminal_snr or "ztsnr" in tensors or None
    return Architecture(
        family=family,
        unet=sizes,
        vae=vae_config(vae),
        text=_text(text, family=family, hints=hints, unet=sizes),
        prediction_type=prediction or (family.guess_prediction(tensors) if family.guess_prediction else "epsilon"),
        zero_terminal_snr=bool(file_zero) if hints.zero_terminal_snr is None else hints.zero_terminal_snr,
        latent_scale=hints.latent_scale or family.latent_scale,
        prediction_guessed=prediction is None and family.guess_prediction is not None,
        file_prediction_type=file_prediction,
        file_zero_terminal_snr=file_zero,
    )


def guess_sd2_prediction(tensors: Mapping[str, Tensor]) -> PredictionType:
    """What an SD2 UNet predicts, by the spread of one of its biases: ComfyUI's rule (comfy/supported_models.py), which calls
    it unsure itself. Epsilon on the meta device."""
    bias = tensors.get(_GUESSED_FROM)
    known = bias is not None and not bias.is_meta
    return "v_prediction" if known and bias.float().std(unbiased=False).item() > 0.09 else "epsilon"


# --- the UNet ---------------------------------------------------------------------------------------------------------

def unet_config(unet: Mapping[str, Tensor], *, family: Family, hints: Hints) -> UNetConfig:
    """The sizes of a UNet (local names); ModelError where they make no sense."""
    blocks = _blocks(unet)
    heads, head_channels = hints.unet_heads, hints.unet_head_channels
    if head_channels is not None:
        heads = None  # as in ldm: num_head_channels wins over num_heads
    elif heads is None:
        heads, head_channels = family.num_heads, family.head_channels
    stem, vector = unet["input_blocks.0.0.weight"], unet.get("label_emb.0.0.weight")
    to_text = next((t for name, t in unet.items() if name.endswith(".attn2.to_k.weight") and t.ndim > 1), None)
    if to_text is None:
        raise ModelError("The checkpoint's UNet has no layer that attends to a text", remedy=SUPPORTED)
    _shape(unet, "out.2.weight")  # raises where it is missing
    config = UNetConfig(
        in_channels=stem.shape[1],
        model_channels=stem.shape[0],
        context_dim=to_text.shape[1],
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


_KINDS = {"in_layers.2.weight": "resnet", "proj_in.weight": "transformer", "op.weight": "down", "conv.weight": "up",
          "weight": "conv"}


def _block(name: str, tails: set[str]) -> Block:
    """The module `name`, known by the parameters it has."""
    for parameter, kind in _KINDS.items():
        if parameter in tails:
            return Block(name, kind, depth=_count(tails, r"transformer_blocks\.(\d+)\."))
    raise ModelError(f"The checkpoint's UNet has an unknown block '{name}'", remedy=SUPPORTED)


# --- the VAE and the text encoders ------------------------------------------------------------------------------------

def vae_config(vae: Mapping[str, Tensor]) -> VAEConfig:
    """The sizes of a VAE (local names); ModelError where its encoder or decoder is missing."""
    for part, name in (("VAE", "decoder.conv_in.weight"), ("VAE encoder", "encoder.conv_in.weight")):
        if name not in vae:
            raise ModelError(
                f"The checkpoint has no {part}", why=f"no tensor is named 'first_stage_model.{name}'",
                remedy="choose a checkpoint that contains its VAE")

    def levels(part: str) -> tuple[int, ...]:
        number = _count(vae, rf"{part}\.(\d+)\.")
        return tuple(_count(vae, rf"{part}\.{level}\.block\.(\d+)\.") for level in range(number))

    return VAEConfig(
        latent_channels=_shape(vae, "decoder.conv_in.weight")[1],
        encoder_levels=levels(r"encoder\.down"), decoder_levels=levels(r"decoder\.up"))


def _text(parts: Sequence[Mapping[str, Tensor]], *, family: Family, hints: Hints, unet: UNetConfig) -> tuple[TextConfig, ...]:
    for given in (hints.text_heads, hints.text_activations):
        if given is not None and len(given) != len(family.text):
            raise ModelError(
                f"The model's configuration is of {len(given)} text encoders, its checkpoint of {len(family.text)}",
                remedy="replace or remove the .yaml beside it")
    configs = []
    for index, (spec, text) in enumerate(zip(family.text, parts, strict=True)):
        if _TOKEN_EMBEDDING not in text:
            raise ModelError(
                f"The checkpoint has no {spec.label}text encoder", why=f"no token embedding was found below '{spec.prefix}'",
                remedy="choose a checkpoint that contains its text encoders")
        config = _text_encoder(text, spec, heads=hints.text_heads and hints.text_heads[index],
                               activation=hints.text_activations and hints.text_activations[index])
        if spec.pooled and config.projection is None:
            raise ModelError(f"The checkpoint's {spec.label}text encoder has no projection",
                             why="'text_projection' is missing", remedy="choose a checkpoint that contains its text encoders")
        configs.append(config)
    width = sum(config.width for config in configs)
    if width != unet.context_dim:
        raise _mismatch(f"the UNet expects a text condition of width {unet.context_dim}, the text gives {width}")
    vector = _SIZE_VECTOR + sum(config.projection for config in configs if config.pooled)
    if family.vector_condition and unet.adm_channels != vector:
        raise _mismatch(f"the UNet expects a vector condition of width {unet.adm_channels}, "
                        f"pooled text and sizes give {vector}")
    return tuple(configs)


def _text_encoder(text: Mapping[str, Tensor], spec: TextEncoderSpec, *, heads: int | None,
                  activation: Activation | None) -> TextConfig:
    width, projection = _shape(text, _TOKEN_EMBEDDING)[1], text.get("text_projection.weight")
    heads = heads or max(1, width // _CHANNELS_A_HEAD)
    if width % heads:
        raise ModelError(
            f"The text encoder's {width} channels cannot be cut into {heads} heads",
            remedy="put the checkpoint's .yaml beside it, which names the text encoder's configuration")
    return TextConfig(
        **vars(spec),
        layers=_count(text, r"text_model\.encoder\.layers\.(\d+)\."),
        width=width,
        heads=heads,
        activation=activation or ("gelu" if spec.openclip else "quick_gelu"),
        positions=_shape(text, "text_model.embeddings.position_embedding.weight")[0],
        projection=None if projection is None else projection.shape[0],
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
