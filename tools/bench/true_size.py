"""Checkpoints of the published sizes with random weights, made on the spot: what speed and memory are measured on.

A step takes the same time and memory whatever the weights are, so nothing is downloaded. Weights are scaled so that
activations stay of ordinary size, in fp16 too. "Small" is the same structure, narrower: for CPUs.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import torch

from lib_lora_train.errors import SettingError, translated
from lib_lora_train.storage.atomic import replacing
from tools import checkpoint_shapes as shapes

FAMILIES = ("sd1", "sd2", "sdxl")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VOCABULARY = 49408  # CLIP's

_SAFETENSORS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SIZE_VECTOR = 6 * 256  # SDXL's sizes as sinusoids, beside the pooled text


@dataclasses.dataclass(frozen=True)
class Text:
    """One text encoder: where it lies, in whose names, and its size."""

    prefix: str
    openclip: bool
    width: int
    layers: int


@dataclasses.dataclass(frozen=True)
class Model:
    """All parts of a checkpoint."""

    unet: shapes.UNetSize
    vae_channels: int
    text: tuple[Text, ...]


_CLIP, _OPENCLIP = "transformer.text_model.", "model."
_PUBLISHED = {
    "sd1": Model(shapes.UNetSize(320, (1, 2, 4, 4), (1, 1, 1, 0), 1, 768), 128,
                 (Text(f"cond_stage_model.{_CLIP}", False, 768, 12),)),
    "sd2": Model(shapes.UNetSize(320, (1, 2, 4, 4), (1, 1, 1, 0), 1, 1024, linear=True), 128,
                 (Text(f"cond_stage_model.{_OPENCLIP}", True, 1024, 24),)),
    "sdxl": Model(shapes.UNetSize(320, (1, 2, 4), (0, 2, 10), 10, 2048, linear=True, vector=1280 + _SIZE_VECTOR), 128,
                  (Text(f"conditioner.embedders.0.{_CLIP}", False, 768, 12),
                   Text(f"conditioner.embedders.1.{_OPENCLIP}", True, 1280, 32))),
}


def dtype_of(precision: str) -> torch.dtype:
    """What `mixed_precision` computes in: "no" is fp32."""
    return DTYPES["fp32" if precision == "no" else precision]


def model_of(family: str, *, small: bool = False) -> Model:
    """The sizes of a family as published; or a fifth of its channels, a quarter of the VAE's and the texts' width.

    Raises SettingError for a family there is none of.
    """
    if family not in _PUBLISHED:
        raise SettingError(f"There is no model family '{family}'", remedy=f"write one of {', '.join(FAMILIES)}")
    model = _PUBLISHED[family]
    if not small:
        return model
    text = tuple(dataclasses.replace(part, width=part.width // 4) for part in model.text)
    unet = dataclasses.replace(
        model.unet, channels=model.unet.channels // 5, context=sum(part.width for part in text),
        vector=None if model.unet.vector is None else text[-1].width + _SIZE_VECTOR)
    return Model(unet, model.vae_channels // 4, text)


def true_size_shapes(family: str, *, small: bool = False) -> dict[str, tuple[int, ...]]:
    """{checkpoint name: shape} of UNet, VAE and text encoders."""
    model = model_of(family, small=small)
    parts = [("model.diffusion_model.", shapes.unet(model.unet)),
             ("first_stage_model.", shapes.vae(channels=model.vae_channels, multipliers=(1, 2, 4, 4), blocks=2))]
    for text in model.text:
        make = shapes.openclip_text if text.openclip else shapes.clip_text
        parts.append((text.prefix, make(vocabulary=VOCABULARY, width=text.width, layers=text.layers)))
    return {f"{prefix}{name}": shape for prefix, names in parts for name, shape in names}


def true_size_tensors(family: str, *, dtype: torch.dtype, device: torch.device | str = "cpu", small: bool = False,
                      seed: int = 0) -> dict[str, torch.Tensor]:
    """The whole checkpoint in memory, drawn on `device`. The bits depend on the device's generator."""
    return dict(_drawn(family, dtype=dtype, device=torch.device(device), small=small, seed=seed))


def true_size_checkpoint(family: str, folder: Path, *, dtype: torch.dtype, small: bool = False, seed: int = 0) -> Path:
    """Write FAMILY[-small]-DTYPE.safetensors into `folder` and return its path; the same file, where it is there, is kept.

    One tensor is in memory at a time. SD1 takes 4.3 GB in fp32, SDXL 6.9 GB in fp16.
    Raises SettingError for an unknown family or dtype, OutputError where the disk refuses.
    """
    names = {kind: name for name, kind in DTYPES.items()}
    if dtype not in names:
        raise SettingError(f"A checkpoint cannot be written in {dtype}", remedy=f"write one of {', '.join(DTYPES)}")
    path = folder / f"{family}{'-small' if small else ''}-{names[dtype]}.safetensors"
    header, size = _header(true_size_shapes(family, small=small), dtype, {"format": "pt", "random_weights": f"seed {seed}"})
    if path.is_file() and path.stat().st_size == len(header) + size:
        with translated("reading the random checkpoint"), path.open("rb") as file:
            if file.read(len(header)) == header:
                return path
    with translated("writing the random checkpoint"), replacing(path) as file:
        file.write(header)
        for _, tensor in _drawn(family, dtype=dtype, device=torch.device("cpu"), small=small, seed=seed):
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return path


def _drawn(family: str, *, dtype: torch.dtype, device: torch.device, small: bool,
           seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in true_size_shapes(family, small=small).items():
        noise = torch.randn(shape, generator=generator, device=device)
        yield name, shapes.scaled(name, noise).to(dtype)


def _header(names: dict[str, tuple[int, ...]], dtype: torch.dtype, metadata: dict[str, str]) -> tuple[bytes, int]:
    """What a safetensors file begins with, and how many bytes of tensors follow."""
    entries: dict[str, object] = {"__metadata__": metadata}
    begin, item = 0, torch.empty((), dtype=dtype).element_size()
    for name, shape in names.items():
        end = begin + item * torch.Size(shape).numel()
        entries[name] = {"dtype": _SAFETENSORS[dtype], "shape": shape, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes
    return struct.pack("<Q", len(text)) + text, begin
