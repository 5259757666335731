"""Small models of each family, made by other people's code: ldm, diffusers, transformers and open_clip.

Every parameter is random, those included that these libraries begin at zero: a layer of zeros would hide any
difference behind it. `full_size` makes the published sizes on the meta device, where they weigh nothing.
"""

from __future__ import annotations

import functools
import re
import sys
from types import SimpleNamespace

import torch
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from lib_lora_train.model.architecture import Hints

VOCABULARY, START, END, COMMA = 600, 598, 599, 7
POOLED = 24
SIZES = 6 * 256

# Attention heads of the small models: 8 in SD1 as published, 16 channels a head instead of 64 elsewhere.
HINTS = {
    "sd1": Hints(unet_heads=8, text_heads=(4,)),
    "sd2": Hints(unet_head_channels=16, text_heads=(4,)),
    "sdxl": Hints(unet_head_channels=16, text_heads=(4, 2)),
}
CONTEXT = {"sd1": 48, "sd2": 48, "sdxl": 48 + 32}
FAMILIES = tuple(HINTS)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max|a-b| / max|b|"""
    assert ours.shape == theirs.shape
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


@torch.no_grad()
def randomised(module: nn.Module, *, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew: matrices so that activations keep their size, norms near one, biases near zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(noise * 0.1 + (1.0 if name.endswith("weight") else 0.0))
    return module.eval()


# --- ldm: UNet and VAE under checkpoint names -------------------------------------------------------------------------

def ldm_unet(family: str, *, full: bool = False, in_channels: int = 4, depth: int = 1) -> UNetModel:
    """ldm's own UNet. The PyPI ldm predates SDXL: `label_emb` is put in as sgm has it, and all depths are equal."""
    channels = 320 if full else 32
    context = {"sd1": 768, "sd2": 1024, "sdxl": 2048}[family] if full else CONTEXT[family]
    sdxl, time = family == "sdxl", 4 * channels
    heads = dict(num_heads=8) if family == "sd1" else dict(num_head_channels=64 if full else 16)
    unet = UNetModel(
        image_size=32, in_channels=in_channels, out_channels=4, model_channels=channels, num_res_blocks=2,
        attention_resolutions=[4, 2] if sdxl else [4, 2, 1], channel_mult=[1, 2, 4] if sdxl else [1, 2, 4, 4],
        use_spatial_transformer=True, transformer_depth=depth, context_dim=[context] * depth, legacy=False,
        use_linear_in_transformer=family != "sd1", use_checkpoint=False, **heads)
    if sdxl:
        unet.num_classes = "sequential"
        vector = (1280 if full else POOLED) + SIZES
        unet.label_emb = nn.Sequential(nn.Sequential(nn.Linear(vector, time), nn.SiLU(), nn.Linear(time, time)))
    return unet


@functools.cache
def _ldm_autoencoder() -> type[nn.Module]:
    """ldm's class. Of Lightning, which takes seconds to import, it uses nothing but the base class of its models."""
    lightning = sys.modules.setdefault("pytorch_lightning", SimpleNamespace(LightningModule=nn.Module))
    try:
        from ldm.models.autoencoder import AutoencoderKL
    finally:
        if isinstance(lightning, SimpleNamespace):
            del sys.modules["pytorch_lightning"]
    return AutoencoderKL


def ldm_vae(*, full: bool = False, attention_at: tuple[int, ...] = ()) -> nn.Module:
    """ldm's own autoencoder, with four resolutions as in every published SD model."""
    return _ldm_autoencoder()(
        ddconfig=dict(double_z=True, z_channels=4, resolution=64, in_channels=3, out_ch=3, ch=128 if full else 32,
                      ch_mult=[1, 2, 4, 4] if full else [1, 1, 2, 2], num_res_blocks=2,
                      attn_resolutions=list(attention_at), dropout=0.0),
        lossconfig=dict(target="torch.nn.Identity"), embed_dim=4)


# --- text encoders ----------------------------------------------------------------------------------------------------

def clip_config(*, width: int = 48, heads: int = 4, layers: int = 3, vocabulary: int = VOCABULARY,
                activation: str = "quick_gelu", projection: int = POOLED) -> CLIPTextConfig:
    """transformers' configuration of a small CLIP-L."""
    return CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, projection_dim=projection, hidden_act=activation, bos_token_id=START,
        eos_token_id=END, pad_token_id=END)


def openclip_text(*, width: int, heads: int, layers: int = 3, projection: int = POOLED,
                  vocabulary: int = VOCABULARY) -> nn.Module:
    """open_clip's own text tower."""
    import open_clip  # takes seconds

    return open_clip.transformer.TextTransformer(
        context_length=77, vocab_size=vocabulary, width=width, heads=heads, layers=layers, output_dim=projection)


class SmallTokenizer:
    """One token for each word, a comma being a word: enough to tell where chunks are cut."""

    start, end, comma = START, END, COMMA

    def encode(self, text: str) -> list[int]:
        """Digits stand for themselves; every other word has some fixed id."""
        words = text.replace(",", " , ").split()
        return [COMMA if word == "," else int(word) if word.isdigit() else 10 + len(word) for word in words]


def tokenizers(family: str) -> list[SmallTokenizer]:
    return [SmallTokenizer()] * (2 if family == "sdxl" else 1)


# --- whole checkpoints ------------------------------------------------------------------------------------------------

def _text_parts(family: str, *, full: bool) -> dict[str, nn.Module]:
    """Prefix -> text encoder."""
    clip_l = functools.partial(clip_config, **(dict(width=768, heads=12, layers=12, vocabulary=49408) if full else {}))
    if family == "sd1":
        return {"cond_stage_model.transformer.": CLIPTextModel(clip_l())}
    if family == "sd2":
        vit_h = dict(width=1024, heads=16, layers=24, projection=1024, vocabulary=49408)
        return {"cond_stage_model.model.": openclip_text(**vit_h if full else dict(width=48, heads=4))}
    vit_g = dict(width=1280, heads=20, layers=32, projection=1280, vocabulary=49408)
    return {"conditioner.embedders.0.transformer.": CLIPTextModel(clip_l()),
            "conditioner.embedders.1.model.": openclip_text(**vit_g if full else dict(width=32, heads=2))}


def parts(family: str, *, full: bool = False, in_channels: int = 4) -> dict[str, nn.Module]:
    """The modules of a checkpoint by the prefix of their names, parameters not yet randomised."""
    return {"model.diffusion_model.": ldm_unet(family, full=full, in_channels=in_channels),
            "first_stage_model.": ldm_vae(full=full), **_text_parts(family, full=full)}


def flat(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """A checkpoint as a host lends it: the live parameters (they require gradients) and buffers, by name.

    Checkpoints call CLIP-L's tensors `transformer.text_model.…`; transformers 5 has dropped that level from its names.
    """
    named = {prefix + name: tensor for prefix, module in modules.items()
             for name, tensor in module.state_dict(keep_vars=True).items()}
    return {re.sub(r"\.transformer\.(?=embeddings\.|encoder\.|final_layer_norm\.)", ".transformer.text_model.", name):
            tensor for name, tensor in named.items()}


@functools.cache
def random_parts(family: str) -> dict[str, nn.Module]:
    """The modules of a small random checkpoint by prefix; made once, so leave them as they are."""
    modules = parts(family)
    for seed, module in enumerate(modules.values()):
        randomised(module, seed=seed)
    return modules


def checkpoint(family: str) -> dict[str, Tensor]:
    """A small random checkpoint of `family`, the caller's own: parameters (they require gradients) and buffers."""
    return {name: nn.Parameter(tensor.detach().clone()) if isinstance(tensor, nn.Parameter) else tensor.clone()
            for name, tensor in flat(random_parts(family)).items()}


@functools.cache
def full_size(family: str) -> dict[str, Tensor]:
    """Names and shapes of the published model, on the meta device. SDXL's UNet is diffusers', the rest ldm's."""
    with torch.device("meta"):
        modules = {**{"first_stage_model.": ldm_vae(full=True)}, **_text_parts(family, full=True)}
        if family != "sdxl":
            return flat({"model.diffusion_model.": ldm_unet(family, full=True), **modules})
        unet = ldm_names_of_unet(diffusers_unet("sdxl", full=True).state_dict())
        return {**flat(modules), **{f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}}


# --- diffusers, and its names turned into ldm's -----------------------------------------------------------------------

def diffusers_unet(family: str, *, full: bool = False) -> nn.Module:
    """diffusers' UNet: SDXL's has 0, 2 and 10 transformer layers a resolution (0, 1, 3 in the small one)."""
    from diffusers import UNet2DConditionModel

    base = 320 if full else 32
    context = {"sd1": 768, "sd2": 1024, "sdxl": 2048}[family] if full else CONTEXT[family]
    width = 64 if full else 16
    if family == "sdxl":
        return UNet2DConditionModel(
            block_out_channels=(base, 2 * base, 4 * base), cross_attention_dim=context, use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10) if full else (1, 1, 3),
            attention_head_dim=(base // width, 2 * base // width, 4 * base // width),
            addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=(1280 if full else POOLED) + SIZES)
    channels = (base, 2 * base, 4 * base, 4 * base)
    # diffusers calls the number of heads `attention_head_dim`.
    return UNet2DConditionModel(
        block_out_channels=channels, cross_attention_dim=context, use_linear_projection=family == "sd2",
        attention_head_dim=8 if family == "sd1" else tuple(c // width for c in channels))


def ldm_names_of_unet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' UNet under ldm's names, for two residual blocks a resolution."""
    def rename(name: str) -> str:
        for theirs, ldm in (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
                            ("add_embedding.linear_1", "label_emb.0.0"), ("add_embedding.linear_2", "label_emb.0.2"),
                            ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
                            ("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"),
                            ("mid_block.resnets.1", "middle_block.2")):
            if name.startswith(theirs + "."):
                name = ldm + name[len(theirs):]
        block = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
        if block:
            way, level, kind, index, rest = block[1], int(block[2]), block[3], int(block[4]), block[5]
            section, number = ("input_blocks", 1 + 3 * level) if way == "down" else ("output_blocks", 3 * level)
            if kind == "downsamplers":
                return f"input_blocks.{number + 2}.0.op.{rest.removeprefix('conv.')}"
            if kind == "upsamplers":
                last = 2 if any(key.startswith(f"up_blocks.{level}.attentions.") for key in state) else 1
                return f"output_blocks.{number + 2}.{last}.{rest}"
            name = f"{section}.{number + index}.{int(kind == 'attentions')}.{rest}"
        for theirs, ldm in ((".norm1.", ".in_layers.0."), (".conv1.", ".in_layers.2."), (".conv2.", ".out_layers.3."),
                            (".time_emb_proj.", ".emb_layers.1."), (".norm2.", ".out_layers.0."),
                            (".conv_shortcut.", ".skip_connection.")):
            if ".transformer_blocks." not in name:
                name = name.replace(theirs, ldm)
        return name

    return {rename(name): tensor for name, tensor in state.items()}


def ldm_names_of_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' AutoencoderKL under ldm's names; its attention projections become 1x1 convolutions."""
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("decoder.up_blocks."))

    def rename(name: str) -> str:
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
        for theirs, ldm in (("down_blocks", "down"), ("mid_block.resnets.0", "mid.block_1"),
                            ("mid_block.resnets.1", "mid.block_2"), ("mid_block.attentions.0", "mid.attn_1"),
                            ("resnets", "block"), ("downsamplers.0.conv", "downsample.conv"),
                            ("upsamplers.0.conv", "upsample.conv"), ("conv_shortcut", "nin_shortcut"),
                            ("conv_norm_out", "norm_out"), ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"),
                            ("to_v", "v"), ("to_out.0", "proj_out")):
            name = name.replace(theirs, ldm)
        return name

    return {rename(name): tensor[:, :, None, None] if ".attn_1." in rename(name) and tensor.ndim == 2 else tensor
            for name, tensor in state.items()}
