"""Which layers of the frozen model get a LoRA, and what each is called in the file.

The choice and the keys are those of kohya-ss/sd-scripts (`networks.lora` without `conv_dim`): every linear or
1x1 layer inside the UNet's transformers, and the attention and MLP layers of the text encoders. Only names and
shapes are read here, so a mapping of shapes (or of meta tensors) is enough, and a small model of the same
layout works like a full one.

Not here: convolutions outside the transformers (LoCon).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lib_lora_train.errors import ModelError
from lib_lora_train.model.ops.weights import Weight

_IN_A_TRANSFORMER = re.compile(
    r"(?P<block>(?:input_blocks|output_blocks)\.\d+\.1|middle_block\.1)"
    r"\.(?P<rest>proj_in|proj_out|transformer_blocks\.\d+\."
    r"(?:attn[12]\.(?:to_q|to_k|to_v|to_out\.0)|ff\.net\.(?:0\.proj|2)))")
_IN_A_TEXT_LAYER = re.compile(
    r"text_model\.encoder\.layers\.(?P<layer>\d+)\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])")


@dataclass(frozen=True)
class Target:
    """One layer to adapt.

    component     "unet", "te" (SD1, SD2), "te1" or "te2" (SDXL)
    module        its name in our model, "input_blocks.1.1.proj_in"
    key           its name in the file, "lora_unet_down_blocks_0_attentions_0_proj_in"
    as_conv       write the weights as 1x1 convolutions ([r, in, 1, 1]): kohya does so for `proj_in` and
                  `proj_out` of SD1 and SD2, even where SD2's frozen layer is linear
    """

    component: str
    module: str
    key: str
    in_features: int
    out_features: int
    as_conv: bool


def find_targets(
    components: Mapping[str, Mapping[str, Weight | Sequence[int]]], *, family: str, text_encoder: bool = True,
) -> tuple[Target, ...]:
    """The layers to adapt, in an order that depends on their names alone.

    `components` maps "unet", "te", "te1", "te2" to {local weight name: weight or shape}; give all names, since
    the SD1/SD2 file names count the blocks by the down- and upsamplers between them. `family` is "sd1", "sd2"
    or "sdxl". SD2's last text layer is left out: its output is not used, and sd-scripts drops it.

    Raises ModelError when a wanted component is missing or has no layer of the expected name.
    """
    wanted = [name for name in sorted(components) if name == "unet" or text_encoder]
    if "unet" not in components:
        raise ModelError("The model has no UNet", remedy="choose a complete checkpoint")
    if text_encoder and all(name == "unet" for name in wanted):
        raise ModelError("The model has no text encoder", remedy="switch text encoder training off")
    targets: list[Target] = []
    for component in wanted:
        shapes = {name: tuple(getattr(value, "shape", value)) for name, value in components[component].items()}
        keys = _unet_keys(shapes, family=family) if component == "unet" else _text_keys(shapes, component, family)
        found = [_target(component, module, key, shapes[f"{module}.weight"], family) for module, key in keys]
        if not found:
            raise ModelError(
                f"No layer to train was found in {component}", why="its layers do not have the names of "
                "Stable Diffusion 1, 2 or XL", remedy="choose another checkpoint")
        targets += sorted(found, key=lambda target: _natural(target.module))
    return tuple(targets)


def _target(component: str, module: str, key: str, shape: tuple[int, ...], family: str) -> Target:
    return Target(
        component=component, module=module, key=key, in_features=shape[1], out_features=shape[0],
        as_conv=family != "sdxl" and module.endswith((".proj_in", ".proj_out")))


def _text_keys(shapes: Mapping[str, tuple[int, ...]], component: str, family: str) -> Iterator[tuple[str, str]]:
    matches = [match for match in map(_IN_A_TEXT_LAYER.fullmatch, _modules(shapes)) if match]
    unused = max((int(match["layer"]) for match in matches), default=-1) if family == "sd2" else None
    for match in matches:
        if int(match["layer"]) != unused:
            yield match[0], f"lora_{component}_" + match[0].replace(".", "_")


def _unet_keys(shapes: Mapping[str, tuple[int, ...]], *, family: str) -> Iterator[tuple[str, str]]:
    blocks = None if family == "sdxl" else _diffusers_blocks(shapes)
    for module in _modules(shapes):
        match = _IN_A_TRANSFORMER.fullmatch(module)
        if match:
            block = match["block"] if blocks is None else blocks[match["block"]]
            yield module, f"lora_unet_{block}_{match['rest']}".replace(".", "_")


def _diffusers_blocks(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """ldm's place of each transformer -> Diffusers' name of it, as SD1 and SD2 files use.

    ldm numbers the blocks through ("input_blocks.4.1"), Diffusers counts inside each resolution
    ("down_blocks.1.attentions.0"). A resolution ends at its down- or upsampler.
    """
    names = {"middle_block.1": "mid_block.attentions.0"}
    level = place = 0
    for index in _indices(shapes, "input_blocks")[1:]:              # block 0 is the first convolution
        if f"input_blocks.{index}.0.op.weight" in shapes:
            level, place = level + 1, 0
        else:
            names[f"input_blocks.{index}.1"] = f"down_blocks.{level}.attentions.{place}"
            place += 1
    level = place = 0
    for index in _indices(shapes, "output_blocks"):
        names[f"output_blocks.{index}.1"] = f"up_blocks.{level}.attentions.{place}"
        place += 1
        if any(f"output_blocks.{index}.{last}.conv.weight" in shapes for last in (1, 2)):
            level, place = level + 1, 0
    return names


def _indices(shapes: Mapping[str, tuple[int, ...]], blocks: str) -> list[int]:
    return sorted({int(name.split(".")[1]) for name in shapes if name.startswith(f"{blocks}.")})


def _modules(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    return (name[:-len(".weight")] for name in shapes if name.endswith(".weight"))


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sort key under which block 10 follows block 9."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in name.split("."))
