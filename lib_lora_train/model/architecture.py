"""What a checkpoint is, as value objects: the sizes read from it, and the hints about what sizes cannot tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from lib_lora_train.errors import ModelError

if TYPE_CHECKING:
    from lib_lora_train.model.family import Family

PredictionType = Literal["epsilon", "v_prediction"]
Activation = Literal["quick_gelu", "gelu"]

UNET_COMPONENT = "unet"


@dataclass(frozen=True)
class Block:
    """One module of the UNet: its local name, what it is and, for a transformer, how many layers it stacks."""

    name: str
    kind: Literal["conv", "resnet", "transformer", "down", "up"]
    depth: int = 0


@dataclass(frozen=True)
class UNetConfig:
    """The UNet's sizes. Exactly one of `num_heads` (heads a layer) and `head_channels` (channels a head) is set."""

    in_channels: int
    model_channels: int
    context_dim: int
    adm_channels: int | None
    """Width of the vector condition `y` (pooled text + 1536), None where there is none."""
    num_heads: int | None
    head_channels: int | None
    input_blocks: tuple[tuple[Block, ...], ...]
    middle_block: tuple[Block, ...]
    output_blocks: tuple[tuple[Block, ...], ...]

    def heads(self, channels: int) -> int:
        """Attention heads of a layer that is `channels` wide."""
        heads = self.num_heads or channels // (self.head_channels or channels)
        if heads < 1 or channels % heads:
            raise ModelError(
                f"The UNet's attention layers of {channels} channels cannot be cut into heads",
                why=f"expected {self.num_heads or '-'} heads, or {self.head_channels or '-'} channels a head",
                remedy="put the checkpoint's .yaml beside it, which names num_heads or num_head_channels")
        return heads

    @property
    def halvings(self) -> int:
        """How often height and width are halved on the way down: latents are multiples of `2 ** halvings`."""
        return sum(block.kind == "down" for blocks in self.input_blocks for block in blocks)


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder's sizes: residual blocks at each resolution, finest first, for encoder and decoder."""

    latent_channels: int
    encoder_levels: tuple[int, ...]
    decoder_levels: tuple[int, ...]

    @property
    def factor(self) -> int:
        """Pixels a latent element, along one side (8 in every published SD model)."""
        return 2 ** (len(self.encoder_levels) - 1)


@dataclass(frozen=True)
class TextEncoderSpec:
    """What a family fixes of one of its text encoders, beside the sizes that are read.

    component   the part's name for what is adapted, "te"
    prefix      how the names of its tensors begin in a checkpoint
    openclip    whether it was trained by OpenCLIP: gelu, and chunks filled with token 0 after the first end token; else CLIP's
                quick_gelu, and end tokens
    skip        the hidden state that is used: 1 is the last layer's, which clip skip may replace; 2 is always the one before
    final_norm  whether the final layer norm is applied to that hidden state
    pooled      whether this encoder's pooled vector is part of the condition
    label       which of several it is, for messages: "first "
    embedding_key   what the WebUI calls this encoder's vectors of a textual inversion
    """

    component: str
    prefix: str
    openclip: bool
    skip: int
    final_norm: bool = True
    pooled: bool = False
    label: str = ""
    embedding_key: str = "string_to_param.*"


@dataclass(frozen=True, kw_only=True)
class TextConfig(TextEncoderSpec):
    """One text encoder: its sizes, beside what its family fixes."""

    layers: int
    width: int
    heads: int
    activation: Activation
    positions: int
    projection: int | None
    """Width of the projected pooled vector, None where the checkpoint has no projection."""


@dataclass(frozen=True)
class Architecture:
    """Everything about a checkpoint but its weights."""

    family: Family
    unet: UNetConfig
    vae: VAEConfig
    text: tuple[TextConfig, ...]
    prediction_type: PredictionType
    zero_terminal_snr: bool
    latent_scale: float
    """The UNet works on `latents * latent_scale`; the VAE's own output is unscaled."""
    prediction_guessed: bool = False
    """Whether nothing says what it predicts, in a family where that differs between models of the same shapes."""
    file_prediction_type: str | None = None
    file_zero_terminal_snr: bool | None = None
    """What the checkpoint's file says, which the host or the user may contradict; None where it does not."""

    @property
    def components(self) -> tuple[str, ...]:
        """The parts that can be adapted: "unet", then the text encoders."""
        return (UNET_COMPONENT, *(text.component for text in self.text))


@dataclass(frozen=True, eq=False)
class Hints:
    """What names and shapes cannot tell, as far as the host, the user or a `.yaml` knows it. None means unknown.

    `file_prediction_type` and `file_zero_terminal_snr` are what the checkpoint's own file says: taken where nobody else knows.
    """

    unet_heads: int | None = None
    unet_head_channels: int | None = None
    text_heads: tuple[int, ...] | None = None
    text_activations: tuple[Activation, ...] | None = None
    prediction_type: PredictionType | None = None
    zero_terminal_snr: bool | None = None
    alphas_cumprod: Tensor | None = None
    """Fp32, one entry a timestep, before any rescaling to zero terminal SNR."""
    latent_scale: float | None = None
    file_prediction_type: str | None = None
    file_zero_terminal_snr: bool | None = None


NO_HINTS = Hints()


def incomplete(name: str) -> ModelError:
    """The error for a checkpoint that lacks the tensor `name`."""
    return ModelError("The checkpoint is incomplete", why=f"it has no tensor '{name}'",
                      remedy="download it again, or choose another one")
