"""The whole frozen model in one object, built from a flat dict of borrowed tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lib_lora_train.errors import LoraTrainError, ModelError
from lib_lora_train.model.architecture import NO_HINTS, UNET_COMPONENT, Architecture, Hints
from lib_lora_train.model.family import detect
from lib_lora_train.model.ops.weights import Weight
from lib_lora_train.model.sd.schedule import NoiseSchedule, is_schedule
from lib_lora_train.model.sd.text import TextConditioner
from lib_lora_train.model.sd.tokens import Tokenizer, clip_tokenizer
from lib_lora_train.model.sd.unet import UNet
from lib_lora_train.model.sd.vae import VAE

_Shapes = tuple[tuple[str, torch.Size, torch.dtype], ...]


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """UNet, VAE, text encoders and schedule over borrowed tensors. Nothing in it can be trained."""

    architecture: Architecture
    unet: UNet
    vae: VAE
    text: TextConditioner
    schedule: NoiseSchedule
    device: torch.device
    """Where to compute."""
    dtype: torch.dtype
    """In which the UNet's weights are stored; the computation takes that of its input."""

    @property
    def components(self) -> Mapping[str, Mapping[str, Weight]]:
        """What can be adapted, the UNet and the text encoders: each its weights by local name."""
        return {UNET_COMPONENT: self.unet.tensors,
                **{encoder.config.component: encoder.tensors for encoder in self.text.encoders}}

    def release(self) -> None:
        """Hold none of the borrowed memory, so that its owner may move or free it; to be followed by `rebind`."""
        for part in (self.unet, self.vae, *self.text.encoders):
            part.layers.release()

    def rebind(self, tensors: Mapping[str, Tensor]) -> None:
        """Compute on `tensors` (checkpoint names) from now on: the same weights on the same device."""
        unet, vae, texts = self.architecture.family.parts(tensors)
        for part, local in zip((self.unet, self.vae, *self.text.encoders), (unet, vae, *texts), strict=True):
            part.layers.rebind(local)


def build(tensors: Mapping[str, Tensor], *, device: torch.device | None = None, hints: Hints = NO_HINTS,
          tokenizers: Sequence[Tokenizer] | None = None, comma_padding_backtrack: int = 20) -> FrozenModel:
    """The frozen model over `tensors` (ldm/sgm checkpoint names), without copying one of them.

    device: where to compute; by default where the UNet's weights are.
    tokenizers: one a text encoder; by default CLIP's.
    The schedule's ᾱ are the hint's, else the checkpoint's own in fp32, else Stable Diffusion's; they are rescaled where
    the architecture has zero terminal SNR.
    Raises ModelError for what `detect` refuses, and for tensors that are missing or do not fit each other: every part
    is run once on shapes alone, which takes no memory and no weights.
    """
    architecture = detect(tensors, hints)
    family, (unet, vae, texts) = architecture.family, architecture.family.parts(tensors)
    tokenizers = [clip_tokenizer()] * len(texts) if tokenizers is None else tokenizers
    _dry_run(architecture, _shapes(unet), _shapes(vae), tuple(map(_shapes, texts)))

    stem = unet["input_blocks.0.0.weight"]
    device = device or stem.device
    schedule = family.schedule(
        prediction_type=architecture.prediction_type, zero_terminal_snr=architecture.zero_terminal_snr,
        alphas_cumprod=_alphas_cumprod(tensors, hints))
    return FrozenModel(
        architecture=architecture,
        unet=family.unet(unet, architecture.unet),
        vae=family.vae(vae, architecture.vae),
        text=family.conditioner(
            [family.text_encoder(text, config) for text, config in zip(texts, architecture.text, strict=True)], tokenizers,
            comma_padding_backtrack=comma_padding_backtrack),
        schedule=schedule.to(device),
        device=device,
        dtype=stem.dtype,
    )


def _alphas_cumprod(tensors: Mapping[str, Tensor], hints: Hints) -> Tensor | None:
    if hints.alphas_cumprod is not None:
        return hints.alphas_cumprod
    stored = tensors.get("alphas_cumprod")
    # Checkpoints pruned to fp16 carry a rounded buffer, worse than none; damaged ones a wrong one.
    return stored if stored is not None and stored.dtype in (torch.float32, torch.float64) and is_schedule(stored) else None


def _shapes(tensors: Mapping[str, Tensor]) -> _Shapes:
    return tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())


@lru_cache(maxsize=4)
def _dry_run(architecture: Architecture, unet: _Shapes, vae: _Shapes, texts: tuple[_Shapes, ...]) -> None:
    """Run every part on the meta device, so that a missing or misshapen tensor is found before the training.

    It takes a second, and is done once for all models of the same shapes; one that failed is not remembered.
    """
    def shapes(part: _Shapes) -> dict[str, Tensor]:
        return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape, dtype in part}

    family, side = architecture.family, 2 ** architecture.unet.halvings
    zeros = torch.zeros(1, architecture.unet.in_channels, side, side, device="meta")
    vector = architecture.unet.adm_channels
    try:
        autoencoder = family.vae(shapes(vae), architecture.vae)
        autoencoder.encode(autoencoder.decode(zeros))
        for tensors, config in zip(texts, architecture.text, strict=True):
            tokens = torch.zeros(1, config.positions, dtype=torch.long, device="meta")
            family.text_encoder(shapes(tensors), config)(tokens, pooled=config.pooled)
        with torch.no_grad():
            family.unet(shapes(unet), architecture.unet)(
                zeros, torch.zeros(1, device="meta"),
                torch.zeros(1, 77, architecture.unet.context_dim, device="meta"),
                None if vector is None else torch.zeros(1, vector, device="meta"))
    except LoraTrainError:
        raise
    except (RuntimeError, IndexError) as error:
        raise ModelError(
            "The checkpoint's tensors do not fit each other", why=str(error).splitlines()[0],
            remedy="download it again, or choose another one") from error
