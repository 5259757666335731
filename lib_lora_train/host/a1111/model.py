"""The WebUI's loaded model: its tensors by reference under checkpoint names, and what their shapes cannot tell.

The names of the WebUI's modules are those of the checkpoint, but for its wrappers around the text encoders
("cond_stage_model.wrapped.transformer…") and around their token embeddings. No method of a module is called that
computes anything, so none of the WebUI's patches of them matter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from modules import devices, lowvram, sd_models, shared
from torch import Tensor, nn

from lib_lora_train.errors import HostError, ModelError
from lib_lora_train.host import placement
from lib_lora_train.host.port import Checkpoint, Outline
from lib_lora_train.model.architecture import Activation
from lib_lora_train.model.family import FAMILIES, Hints
from lib_lora_train.model.sd.refusals import SUPPORTED
from lib_lora_train.model.sd.tokens import FunctionTokenizer, Tokenizer


class VersionCheck:
    """Detects whether somebody changed a leased model.

    A switch of checkpoint may leave the module in place and copy other weights into the very tensors that are leased.
    torch counts such in-place changes for its own check of tensors that are saved for backward
    (https://pytorch.org/docs/stable/notes/autograd.html#in-place-correctness-checks), which is asked here: the weights
    are saved by a graph of one scalar. Moving a tensor between devices is no change. Inference tensors are not counted.
    """

    def __init__(self, sd_model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self._sd_model, self._info = sd_model, sd_model.sd_checkpoint_info
        self._scalar = torch.zeros((), requires_grad=True)
        with torch.enable_grad():
            self._graph = _Saved.apply(self._scalar, [tensor for tensor in tensors.values() if not tensor.is_inference()])

    def check(self) -> None:
        """Raises HostError if the model is not the leased one any more, weight for weight."""
        same = sd_models.model_data.sd_model is self._sd_model and self._sd_model.sd_checkpoint_info is self._info
        if same:
            try:
                torch.autograd.grad(self._graph, self._scalar, retain_graph=True)
            except RuntimeError:  # "modified by an inplace operation"; there is nothing else in this graph
                same = False
        if not same:
            raise model_changed()


class _Saved(torch.autograd.Function):
    """The identity of a scalar, whose backward asks for `tensors` as they were."""

    @staticmethod
    def forward(ctx: Any, scalar: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        ctx.save_for_backward(*tensors)
        return scalar.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        _ = ctx.saved_tensors
        return gradient, None


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype, int]]:
    """For every tensor of UNet, VAE and text encoders its shape, dtype and a sum over its bits: the same for the same
    weights, wherever they are."""
    weights = placement.weights_of(tensors)
    sums = {name: tensor.detach().view(_BITS[tensor.element_size()]).sum(dtype=torch.int64)
            for name, tensor in weights.items()}
    # All are computed before the first is waited for; a copy of eight bytes each.
    return {name: (weights[name].shape, weights[name].dtype, int(total)) for name, total in sums.items()}


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which checkpoint and VAE a model is made of: their files, "" for the checkpoint's own VAE."""

    checkpoint: str
    vae: str

    @classmethod
    def of(cls, sd_model: nn.Module) -> Identity:
        """That of a loaded model."""
        return cls(sd_model.sd_checkpoint_info.filename, getattr(sd_model, "loaded_vae_file", None) or "")

    def __str__(self) -> str:
        """As a user knows it."""
        return os.path.basename(self.checkpoint) + (f" with {os.path.basename(self.vae)}" if self.vae else "")

    def will_return(self, sd_model: nn.Module) -> bool:
        """Whether the WebUI is set to this checkpoint and holds another one only until the next generation, as after a
        refiner or an API call with `override_settings`."""
        return (sd_model.sd_checkpoint_info.filename != self.checkpoint
                and sd_models.select_checkpoint().filename == self.checkpoint)

    def may_be_back(self) -> bool:
        """Whether it is worth waiting in the queue for it. Asked without the lock, so the answer may be old."""
        sd_model = sd_models.model_data.sd_model
        return sd_model is not None and (Identity.of(sd_model) == self or self.will_return(sd_model))


def model_changed() -> HostError:
    """The error for a model whose weights are not the leased ones any more."""
    return HostError(
        "The WebUI's model was changed while it was trained on",
        why="another checkpoint, VAE or LoRA was put in its place",
        remedy="choose its checkpoint and VAE again at the top of the page and resume the run")


def refuse_kind(sd_model: nn.Module) -> None:
    """Raises ModelError for kinds that names and shapes alone do not give away; `family.detect` knows the others."""
    kinds = {"a Stable Diffusion 3 model": getattr(sd_model, "is_sd3", False),
             "an SSD-1B model": getattr(sd_model, "is_ssd", False),
             "an instruct-pix2pix model": getattr(sd_model, "cond_stage_key", None) == "edit"}
    for kind in (name for name, found in kinds.items() if found):
        raise ModelError(f"The checkpoint is {kind}, which this trainer does not support", remedy=SUPPORTED)


def describe(sd_model: nn.Module) -> Checkpoint:
    """The loaded checkpoint by name. Hashes are those that the WebUI knows already."""
    info = sd_model.sd_checkpoint_info
    vae = getattr(sd_model, "loaded_vae_file", None)
    return Checkpoint(
        name=info.name_for_extra, title=info.title, family=_family(sd_model), sha256=info.sha256 or "",
        legacy_hash=info.hash or "", vae_name=os.path.basename(vae) if vae else "")


def outline(sd_model: nn.Module) -> Outline:
    """The model's names and shapes, and the device it would be trained on; also during a generation."""
    shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
              for name, tensor in collect(sd_model).items()}
    return Outline(shapes, hints(sd_model), _device())


def collect(sd_model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the model by reference, under its checkpoint's name. Raises HostError if one is nowhere."""
    tensors = {}
    sdxl = hasattr(sd_model, "conditioner")
    for name, tensor in sd_model.state_dict(keep_vars=True).items():
        # The WebUI calls SDXL's conditioner by SD1's name too.
        if not (sdxl and name.startswith("cond_stage_model.")):
            tensors[name.replace(".wrapped.", ".")] = tensor
    if any(tensor.is_meta for tensor in tensors.values()):
        raise HostError("The WebUI's model is not in memory", why="it was thrown away",
                        remedy="choose the checkpoint again at the top of the page")
    return tensors


def hints(sd_model: nn.Module) -> Hints:
    """Heads, activations, prediction and schedule as the WebUI's own modules and settings have them."""
    heads, head_channels = _attention_heads(sd_model.model.diffusion_model)
    encoders = [_text_encoder(embedder) for embedder in _embedders(sd_model)]
    return Hints(
        unet_heads=heads, unet_head_channels=head_channels,
        text_heads=tuple(heads for heads, _ in encoders) or None,
        text_activations=tuple(activation for _, activation in encoders) or None,
        prediction_type="v_prediction" if sd_model.parameterization == "v" else "epsilon",
        zero_terminal_snr=shared.opts.sd_noise_schedule == "Zero Terminal SNR",
        # `alphas_cumprod` itself is rewritten, and may be rounded, at every generation.
        alphas_cumprod=sd_model.alphas_cumprod_original.detach().float(),
        latent_scale=float(sd_model.scale_factor))


def tokenizers(sd_model: nn.Module) -> Sequence[Tokenizer]:
    """One a text encoder: the WebUI's own wrapper around it."""
    return [FunctionTokenizer(lambda text, tokenize=embedder.tokenize: tokenize([text])[0], start=embedder.id_start,
                              end=embedder.id_end, comma=embedder.comma_token) for embedder in _embedders(sd_model)]


def device_of_part(part: nn.Module, device: torch.device) -> torch.device:
    """The device of the part's first weight that is not on `device`; `device` if all are."""
    return next((weight.device for weight in part.parameters() if weight.device != device), device)


@contextlib.contextmanager
def on_device(sd_model: nn.Module) -> Iterator[tuple[torch.device, Mapping[str, torch.device]]]:
    """The whole model on the WebUI's device, and each part where it was at the end, also on an exception. Gives that device
    and the original device of each tensor, by its checkpoint's name.

    Only --medvram and an unloaded checkpoint keep parts elsewhere; for everybody else nothing moves.
    """
    device = _device()
    if getattr(sd_model, "lowvram", False):
        # The WebUI remembers which one part it put on the GPU, and would not put it back a second time.
        lowvram.send_everything_to_cpu()
    originals = {name: placement.device_of(tensor) for name, tensor in collect(sd_model).items()}
    text = sd_model.conditioner if hasattr(sd_model, "conditioner") else sd_model.cond_stage_model
    with contextlib.ExitStack() as at_the_end:
        for part in (sd_model.model, sd_model.first_stage_model, text):
            original = device_of_part(part, device)
            if original != device:
                at_the_end.callback(part.to, original)
                part.to(device)
        yield device, originals


def _device() -> torch.device:
    """The WebUI's, with its index."""
    return torch.empty(0, device=devices.device).device


def _family(sd_model: nn.Module) -> str:
    stem = getattr(getattr(getattr(sd_model, "model", None), "diffusion_model", None), "input_blocks", None)
    if stem is None or stem[0][0].weight.shape[1] != 4 or getattr(sd_model, "is_ssd", False):
        return ""
    for family in reversed(FAMILIES.values()):
        if getattr(sd_model, f"is_{family.name}", False):  # the WebUI's own flags
            several = len(family.text) > 1
            return "" if several and len(_embedders(sd_model)) != len(family.text) else family.name
    return ""


def _embedders(sd_model: nn.Module) -> list[Any]:
    """The WebUI's wrappers around the text encoders, in the order of the checkpoint."""
    candidates = sd_model.conditioner.embedders if hasattr(sd_model, "conditioner") else [sd_model.cond_stage_model]
    return [embedder for embedder in candidates if hasattr(embedder, "wrapped") and hasattr(embedder, "tokenize")]


def _text_encoder(embedder: Any) -> tuple[int, Activation]:
    """(heads, activation) of the transformer below a wrapper: Hugging Face's, or OpenCLIP's."""
    if hasattr(embedder.wrapped, "transformer"):
        config = embedder.wrapped.transformer.config
        return config.num_attention_heads, "quick_gelu" if config.hidden_act == "quick_gelu" else "gelu"
    block = embedder.wrapped.model.transformer.resblocks[0]
    quick = type(block.mlp.gelu).__name__ == "QuickGELU"
    return block.attn.num_heads, "quick_gelu" if quick else "gelu"


def _attention_heads(unet: nn.Module) -> tuple[int | None, int | None]:
    """(heads a layer, None) or (None, channels a head): whichever is the same in all of the UNet's attention layers."""
    found = {(m.heads, m.to_q.weight.shape[0]) for m in unet.modules() if hasattr(m, "heads") and hasattr(m, "to_q")}
    heads = {heads for heads, _ in found}
    if len(heads) == 1:
        return heads.pop(), None
    widths = {channels // heads for heads, channels in found}
    return None, widths.pop() if len(widths) == 1 else None
