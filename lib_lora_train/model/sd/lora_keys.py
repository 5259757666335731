"""Which layers of Stable Diffusion kohya's LoRA can adapt, and what each is called in the file.

Layers and keys are those of kohya-ss/sd-scripts (`networks.lora` with `conv_dim`): every linear or 1x1 layer inside the UNet's
transformers, the layers of its residual blocks, its down- and upsamplers, and the attention and MLP layers of the text
encoders; and what LyCORIS adapts besides. `adapters.targets` chooses among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from lib_lora_train.model.architecture import UNET_COMPONENT

LoRAKey = tuple[str, str, bool]
"""A layer's module name, its key in the file, and whether its weights are written as 1x1 convolutions."""
Shapes = Mapping[str, tuple[int, ...]]

DIFFUSERS_PREFIXES = ("lora_te_", "lora_unet_down_blocks_", "lora_unet_mid_block_", "lora_unet_up_blocks_")
SGM_PREFIXES = ("lora_te1_", "lora_te2_", "lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_")

_FOREIGN = re.compile(r"(?:^|\.)(?P<peft>lora_[AB])\.|(?:^|[._])lora(?:_linear_layer)?\.(?:down|up)\.weight$")
_IN_A_TRANSFORMER = re.compile(
    r"(?P<block>(?:input_blocks|output_blocks)\.\d+\.1|middle_block\.1)"
    r"\.(?P<rest>proj_in|proj_out|transformer_blocks\.\d+\."
    r"(?:attn[12]\.(?:to_q|to_k|to_v|to_out\.0)|ff\.net\.(?:0\.proj|2)))")
_IN_A_RESIDUAL_BLOCK = re.compile(
    r"(?P<block>(?:input_blocks|output_blocks)\.\d+\.[0-2]|middle_block\.[02])"
    r"\.(?P<rest>in_layers\.2|out_layers\.3|emb_layers\.1|skip_connection|op|conv)")
_DIFFUSERS_LAYERS = {"in_layers.2": "conv1", "out_layers.3": "conv2", "emb_layers.1": "time_emb_proj",
                     "skip_connection": "conv_shortcut", "op": "conv"}
_AROUND_THE_BLOCKS = {"input_blocks.0.0": "conv_in", "out.2": "conv_out", "time_embed.0": "time_embedding_linear_1",
                      "time_embed.2": "time_embedding_linear_2"}
"""What LyCORIS' preset "full" adapts beside kohya's layers, of the UNets that are called as in Diffusers."""
_IN_A_TEXT_LAYER = re.compile(
    r"text_model\.encoder\.layers\.(?P<layer>\d+)\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])")


def foreign_layout(names: Iterable[str]) -> str:
    """Whose layout a LoRA's tensor names have that is not kohya's: "PEFT" or "diffusers"; "" for all others."""
    match = next(filter(None, map(_FOREIGN.search, names)), None)
    return "" if match is None else "PEFT" if match["peft"] else "diffusers"


def sd_keys(component: str, shapes: Shapes, *, last_text_layer: bool) -> Iterator[LoRAKey]:
    """SD1's and SD2's: the UNet's blocks are called as in Diffusers. SD2 has no last text layer: its output is not used, and
    sd-scripts drops it."""
    if component == UNET_COMPONENT:
        return _unet_keys(shapes, blocks=_diffusers_blocks(shapes))
    return _text_keys(component, shapes, last=last_text_layer)


def sdxl_keys(component: str, shapes: Shapes) -> Iterator[LoRAKey]:
    """SDXL's: the UNet's blocks are called as in sgm, and no layer is written as a convolution."""
    return _unet_keys(shapes, blocks=None) if component == UNET_COMPONENT else _text_keys(component, shapes, last=True)


def sd_block(key: str) -> int:
    """kohya's number of the block that a layer of SD1's or SD2's UNet is in, by its key: three to a resolution, downward from 1
    on, 12 the middle, upward from 13 on (sd-scripts, get_block_index)."""
    match = re.search(r"(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)", key)
    if match is None:
        return 12 if "mid_block" in key else 0
    place = 2 if match[3].endswith("samplers") else int(match[4])
    return (1 if match[1] == "down" else 13) + 3 * int(match[2]) + place


def sdxl_block(key: str) -> int:
    """kohya's number of the block that a layer of SDXL's UNet is in, by its key: nine downward ones from 1 on, three middle
    ones from 10 on, nine upward ones from 13 on."""
    match = re.search(r"(input|middle|output)_blocks?_(\d+)", key)
    assert match is not None, "no other layers are adapted"
    return {"input": 1, "middle": 10, "output": 13}[match[1]] + int(match[2])


def _text_keys(component: str, shapes: Shapes, *, last: bool) -> Iterator[LoRAKey]:
    matches = [match for match in map(_IN_A_TEXT_LAYER.fullmatch, _modules(shapes)) if match]
    unused = -1 if last else max((int(match["layer"]) for match in matches), default=-1)
    for match in matches:
        if int(match["layer"]) != unused:
            yield match[0], f"lora_{component}_" + match[0].replace(".", "_"), False


def _unet_keys(shapes: Shapes, *, blocks: Mapping[str, str] | None) -> Iterator[LoRAKey]:
    """With Diffusers' names of the blocks kohya writes `proj_in` and `proj_out` as convolutions, also SD2's linear ones."""
    for module in _modules(shapes):
        match = _IN_A_TRANSFORMER.fullmatch(module) or _IN_A_RESIDUAL_BLOCK.fullmatch(module)
        if match:
            block, rest = match["block"], match["rest"]
            as_conv = rest == "skip_connection" or blocks is not None and rest in ("proj_in", "proj_out")
            if blocks is not None:
                block, rest = blocks[block], _DIFFUSERS_LAYERS.get(rest, rest)
            yield module, f"lora_unet_{block}_{rest}".replace(".", "_"), as_conv
        elif blocks is not None and module in _AROUND_THE_BLOCKS:
            yield module, f"lora_unet_{_AROUND_THE_BLOCKS[module]}", False


def _diffusers_blocks(shapes: Shapes) -> dict[str, str]:
    """ldm's name of each transformer, residual block and sampler -> Diffusers' name of it, as SD1 and SD2 files use.

    ldm numbers the blocks through ("input_blocks.4.1"), Diffusers counts inside each resolution
    ("down_blocks.1.attentions.0"). A resolution ends at its down- or upsampler.
    """
    names = {"middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
             "middle_block.2": "mid_block.resnets.1"}
    level = place = 0
    for index in _indices(shapes, "input_blocks")[1:]:              # block 0 is the first convolution
        if f"input_blocks.{index}.0.op.weight" in shapes:
            names[f"input_blocks.{index}.0"] = f"down_blocks.{level}.downsamplers.0"
            level, place = level + 1, 0
        else:
            names[f"input_blocks.{index}.0"] = f"down_blocks.{level}.resnets.{place}"
            names[f"input_blocks.{index}.1"] = f"down_blocks.{level}.attentions.{place}"
            place += 1
    level = place = 0
    for index in _indices(shapes, "output_blocks"):
        names[f"output_blocks.{index}.0"] = f"up_blocks.{level}.resnets.{place}"
        names[f"output_blocks.{index}.1"] = f"up_blocks.{level}.attentions.{place}"
        place += 1
        for last in (1, 2):
            if f"output_blocks.{index}.{last}.conv.weight" in shapes:
                names[f"output_blocks.{index}.{last}"] = f"up_blocks.{level}.upsamplers.0"
                level, place = level + 1, 0
    return names


def _indices(shapes: Shapes, blocks: str) -> list[int]:
    return sorted({int(name.split(".")[1]) for name in shapes if name.startswith(f"{blocks}.")})


def _modules(shapes: Shapes) -> Iterator[str]:
    return (name[:-len(".weight")] for name in shapes if name.endswith(".weight"))
