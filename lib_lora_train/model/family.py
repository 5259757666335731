"""The families of models that can be trained, one object each, and which of them a checkpoint is of.

Everything that differs between families is in these objects; nothing else in the package names a family. A new family
is one more entry of `FAMILIES`. Sizes are read from the checkpoint, so a small model of the same layout works like a
full one; only shapes, names and dtypes are looked at, so tensors on the meta device do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lib_lora_train.dataset.buckets import TrainingSizes
from lib_lora_train.errors import ModelError
from lib_lora_train.model.architecture import NO_HINTS, Architecture, Hints, PredictionType, TextEncoderSpec
from lib_lora_train.model.sd import detection, lora_keys
from lib_lora_train.model.sd.components import text_tensors, unet_tensors, vae_tensors
from lib_lora_train.model.sd.refusals import SUPPORTED, refuse_other_kinds
from lib_lora_train.model.sd.schedule import NoiseSchedule
from lib_lora_train.model.sd.text import TextConditioner
from lib_lora_train.model.sd.text_encoder import TextEncoder
from lib_lora_train.model.sd.unet import UNet
from lib_lora_train.model.sd.vae import VAE


@dataclass(frozen=True)
class MetadataNames:
    """What a LoRA file calls the family; pairs are for epsilon and for v-prediction.

    base_version     kohya's `ss_base_model_version`
    architecture     Stability's `modelspec.architecture`, without "/lora"
    implementation   `modelspec.implementation`: which naming the keys follow
    v2               kohya's `ss_v2`
    """

    base_version: tuple[str, str]
    architecture: tuple[str, str]
    implementation: str = "diffusers"
    v2: bool = False


@dataclass(frozen=True, eq=False)
class Family:
    """One kind of model: what its tensors do not tell, and the code that computes it.

    name             in API, files and settings, "sd1"; `title` is for users, "SD1"
    sizes            its training sizes in pixels; `sizes.multiple` are the pixels a latent element, along one side
    latent_scale     the UNet works on `latents * latent_scale`
    num_heads, head_channels   of the UNet's attention, as `UNetConfig` has them; exactly one is set
    text             its text encoders, in the order in which their states are joined
    vector_condition   whether the UNet is also told the pooled text and the image's sizes
    lora_prefixes    how some key of each of its LoRA files begins, which tells it from other layouts
    text_width       channels of the text condition at full size, which tell families of one layout apart
    metadata         what its LoRA files call it
    recognises       whether a checkpoint's tensors are of this family; families that are registered later are asked first
    read             (family, tensors, hints) -> Architecture
    guess_prediction what a checkpoint predicts that does not say so; None where all published ones predict noise or say v
    lora_keys        (component, {weight name: shape}) -> (module, key in the file, whether to write 1x1 convolutions)
                     of each layer that kohya's LoRA can adapt
    block_index      key in the file -> kohya's number of the UNet's block that the layer is in
    block_counts     how many downward, middle and upward blocks kohya counts, and `blocks_around`: before and after them
    b_lora           whether it has the blocks of B-LoRA (arXiv 2403.14572)
    """

    name: str
    title: str
    sizes: TrainingSizes
    latent_scale: float
    text: tuple[TextEncoderSpec, ...]
    lora_prefixes: tuple[str, ...]
    text_width: int
    metadata: MetadataNames
    recognises: Callable[[Mapping[str, Tensor]], bool]
    lora_keys: Callable[[str, Mapping[str, tuple[int, ...]]], Iterator[lora_keys.LoRAKey]]
    block_index: Callable[[str], int] = lora_keys.sd_block
    block_counts: tuple[int, int, int] = (12, 1, 12)
    blocks_around: tuple[int, int] = (0, 0)
    b_lora: bool = False
    num_heads: int | None = None
    head_channels: int | None = None
    vector_condition: bool = False
    guess_prediction: Callable[[Mapping[str, Tensor]], PredictionType] | None = None
    read: Callable[[Family, Mapping[str, Tensor], Hints], Architecture] = detection.read
    unet: Callable[..., Any] = UNet
    vae: Callable[..., Any] = VAE
    text_encoder: Callable[..., Any] = TextEncoder
    conditioner: Callable[..., Any] = TextConditioner
    schedule: Callable[..., Any] = NoiseSchedule.build

    def parts(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Tensor]]]:
        """A checkpoint's tensors cut into UNet, VAE and text encoders, each under local names."""
        return unet_tensors(tensors), vae_tensors(tensors), [text_tensors(tensors, spec.prefix) for spec in self.text]

    @property
    def blocks(self) -> int:
        """How many blocks kohya counts in the UNet."""
        return sum((*self.block_counts, *self.blocks_around))

    def adapts_text(self, keys: Iterable[str]) -> bool:
        """Whether some of a LoRA file's keys are those of a text encoder."""
        return any(key.startswith(tuple(f"lora_{spec.component}_" for spec in self.text)) for key in keys)


SD1 = Family(
    name="sd1", title="SD1", sizes=TrainingSizes(512), latent_scale=0.18215, num_heads=8,
    text=(TextEncoderSpec("te", "cond_stage_model.", openclip=False, skip=1),), text_width=768,
    lora_prefixes=lora_keys.DIFFUSERS_PREFIXES, lora_keys=partial(lora_keys.sd_keys, last_text_layer=True),
    recognises=detection.has_unet, metadata=MetadataNames(("sd_v1", "sd_v1_v"), ("stable-diffusion-v1",) * 2))

SD2 = Family(
    name="sd2", title="SD2", sizes=TrainingSizes(768), latent_scale=0.18215, head_channels=64,
    text=(TextEncoderSpec("te", "cond_stage_model.", openclip=True, skip=2),), text_width=1024,
    lora_prefixes=lora_keys.DIFFUSERS_PREFIXES, lora_keys=partial(lora_keys.sd_keys, last_text_layer=False),
    recognises=detection.has_openclip, guess_prediction=detection.guess_sd2_prediction,
    metadata=MetadataNames(("sd_v2", "sd_v2_v"), ("stable-diffusion-v2-512", "stable-diffusion-v2-768-v"), v2=True))

SDXL = Family(
    # Every resolution has a bucket only up to 2048; kohya's scripts ask their users to raise the bound by hand.
    name="sdxl", title="SDXL", sizes=TrainingSizes(1024, largest_side=2048), latent_scale=0.13025, head_channels=64,
    text=(TextEncoderSpec("te1", "conditioner.embedders.0.", openclip=False, skip=2, final_norm=False, label="first ",
                          embedding_key="clip_l"),
          TextEncoderSpec("te2", "conditioner.embedders.1.", openclip=True, skip=2, final_norm=False, pooled=True,
                          label="second ", embedding_key="clip_g")),
    text_width=2048, vector_condition=True, lora_prefixes=lora_keys.SGM_PREFIXES, lora_keys=lora_keys.sdxl_keys,
    block_index=lora_keys.sdxl_block, block_counts=(9, 3, 9), blocks_around=(1, 1), b_lora=True,
    recognises=detection.has_vector_condition,
    metadata=MetadataNames(("sdxl_base_v1-0",) * 2, ("stable-diffusion-xl-v1-base",) * 2,
                           implementation="https://github.com/Stability-AI/generative-models"))

FAMILIES: dict[str, Family] = {family.name: family for family in (SD1, SD2, SDXL)}
"""By name."""


def detect(tensors: Mapping[str, Tensor], hints: Hints = NO_HINTS) -> Architecture:
    """Recognise a checkpoint by its flat dict of tensors under ldm/sgm names.

    Raises ModelError, in one sentence, for a kind that is not supported (inpainting, instruct-pix2pix, refiner, SD3,
    Flux, quantised weights, …) and for a checkpoint that lacks a part, saying which.
    """
    for family in reversed(FAMILIES.values()):
        if family.recognises(tensors):
            return family.read(family, tensors, hints)
    refuse_other_kinds(tensors)
    raise ModelError("The file holds no Stable Diffusion UNet",
                     why="no tensor is named 'model.diffusion_model.input_blocks…'", remedy=SUPPORTED)


def training_sizes(name: str) -> TrainingSizes:
    """Those of the family of that name; SD1's where there is none."""
    return FAMILIES.get(name, SD1).sizes
