"""Which layers of the frozen model are adapted, and what each is called in the file: as its family says.

Only names and shapes are read, so a mapping of shapes (or of meta tensors) is enough, and a small model of the same
layout works like a full one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lib_lora_train.errors import ModelError
from lib_lora_train.model.architecture import UNET_COMPONENT
from lib_lora_train.model.family import Family
from lib_lora_train.model.ops.weights import Weight


@dataclass(frozen=True)
class Target:
    """One layer to adapt.

    component     "unet", or the text encoder's, "te"
    module        its name in our model, "input_blocks.1.1.proj_in"
    key           its name in the file, "lora_unet_down_blocks_0_attentions_0_proj_in"
    as_conv       write the weights of a linear layer as 1x1 convolutions, [r, in, 1, 1]
    kernel        (height, width) of a convolution above 1x1; () for every other layer
    """

    component: str
    module: str
    key: str
    in_features: int
    out_features: int
    as_conv: bool
    kernel: tuple[int, ...] = ()


Choice = Callable[[Target], bool]
"""Whether a layer is to be adapted."""

DEFAULT_PRESET, WITH_CONVOLUTIONS, TEXT_ENCODER = "attention and feed-forward", "attention and convolutions", "text encoder"
_B_LORA = r"output_blocks\.%s\.1\..*attn[12]\..*"
# W4 is up_blocks.0.attentions.0 in Diffusers' words, W5 is up_blocks.0.attentions.1 (Frenkel et al. 2024, arXiv 2403.14572, and
# BLOCKS of their blora_utils.py).
PRESETS: Mapping[str, str] = {
    DEFAULT_PRESET: r".*\.(proj_in|proj_out|transformer_blocks\..*)", "attention": r".*\.attn[12]\..*",
    "cross-attention": r".*\.attn2\..*", WITH_CONVOLUTIONS: r"(?!time_embed|out\.|input_blocks\.0\.).*", TEXT_ENCODER: r"",
    "B-LoRA content": _B_LORA % "0", "B-LoRA style": _B_LORA % "1", "B-LoRA content and style": _B_LORA % "[01]"}
"""The setting's value -> which of the UNet's modules are adapted. Of text encoders it is all layers that kohya adapts."""


def of_preset(name: str) -> Choice:
    """The layers of one of `PRESETS`."""
    pattern = re.compile(PRESETS[name])
    return lambda target: target.component != UNET_COMPONENT or bool(pattern.fullmatch(target.module))


def of_keys(keys: Iterable[str]) -> Choice:
    """The layers that a file with tensors of these keys holds."""
    held = {key.partition(".")[0] for key in keys}
    return lambda target: target.key in held


_BY_DEFAULT = of_preset(DEFAULT_PRESET)


def find_targets(components: Mapping[str, Mapping[str, Weight | Sequence[int]]], *, family: Family,
                 text_encoder: bool = True, chosen: Choice = _BY_DEFAULT) -> tuple[Target, ...]:
    """The `chosen` layers to adapt, in an order that depends on their names alone.

    `components` maps "unet" and the text encoders' components to {local weight name: weight or shape}; give all names,
    since some families' files count the blocks by the down- and upsamplers between them.

    Raises ModelError when a wanted component is missing or has no layer of the expected name.
    """
    wanted = [name for name in sorted(components) if name == UNET_COMPONENT or text_encoder]
    if UNET_COMPONENT not in components:
        raise ModelError("The model has no UNet", remedy="choose a complete checkpoint")
    if text_encoder and wanted == [UNET_COMPONENT]:
        raise ModelError("The model has no text encoder", remedy="switch text encoder training off")
    targets: list[Target] = []
    for component in wanted:
        shapes = {name: tuple(getattr(value, "shape", value)) for name, value in components[component].items()}
        found = [_target(component, module, key, shapes[f"{module}.weight"], as_conv=as_conv)
                 for module, key, as_conv in family.lora_keys(component, shapes)]
        if not any(".transformer_blocks." in target.module or target.component != UNET_COMPONENT for target in found):
            raise ModelError(
                f"No layer to train was found in {component}", why="its layers do not have the names of "
                "Stable Diffusion 1, 2 or XL", remedy="choose another checkpoint")
        targets += sorted(filter(chosen, found), key=lambda target: _natural(target.module))
    return tuple(targets)


def _target(component: str, module: str, key: str, shape: tuple[int, ...], *, as_conv: bool) -> Target:
    kernel = shape[2:] if shape[2:] not in ((), (1, 1)) else ()
    return Target(component, module, key, in_features=shape[1], out_features=shape[0], as_conv=as_conv, kernel=kernel)


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key under which block 10 follows block 9."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in name.split("."))
