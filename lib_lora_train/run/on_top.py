"""Other LoRAs that a run trains on top of: named in a setting, checked before the start, and put into copies of the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lib_lora_train.adapters import file
from lib_lora_train.adapters.embedding import EMBEDDING_PREFIX
from lib_lora_train.adapters.stack import WeightedLora, find_lora, split_tags
from lib_lora_train.adapters.targets import find_targets, of_keys
from lib_lora_train.errors import LoraFileError, SettingError
from lib_lora_train.host.port import Host
from lib_lora_train.model.family import FAMILIES, Family
from lib_lora_train.settings import Settings, named

_WEIGHTED = re.compile(r"(?P<path>.+?\.safetensors)\"?(?::(?P<weight>[^:\\/]*))?", re.IGNORECASE)


def loras_on_top(settings: Settings, host: Host, *, family: str) -> tuple[WeightedLora, ...]:
    """The LoRAs that `train_on_top_of` names, in its order, checked to be for a model of `family` ("" is any) and to lie where
    others may read. Raises SettingError and LoraFileError; no weight is read."""
    prompt, tags = split_tags(settings.network.train_on_top_of)
    found = [find_lora(tag, host.lora_folder) for tag in tags]
    for part in filter(None, map(str.strip, re.split(r"[\n,;]", prompt))):
        match = _WEIGHTED.fullmatch(part.lstrip('"'))
        try:
            weight = float((match and match["weight"]) or 1.0)
        except ValueError:
            weight = math.nan
        if match is None or not math.isfinite(weight):
            raise SettingError(f"{named('train_on_top_of')} = {part:.80} cannot be understood",
                               remedy="write <lora:name:0.8>, or path.safetensors:0.8")
        found.append(WeightedLora(Path(match["path"]), weight, weight))
    for lora in found:
        _check(lora.path, host, family)
    return tuple(found)


def written(loras: Sequence[WeightedLora]) -> str:
    """The setting that names them by their absolute paths; those with a weight for each part by name."""
    return ", ".join(f"{lora.path.absolute()}:{lora.unet_weight:g}" if lora.unet_weight == lora.text_weight else
                     f"<lora:{lora.path.stem}:{lora.text_weight:g}:{lora.unet_weight:g}>" for lora in loras)


def unused_words(loras: Sequence[WeightedLora]) -> list[str]:
    """A sentence for each of the LoRAs that has words with vectors of their own."""
    return [f"{lora.path.name} has vectors of its own for a word. While training on top of it, captions are read without them."
            for lora in loras if any(key.startswith(EMBEDDING_PREFIX) for key in file.read_shapes(lora.path))]


def merged_bytes(loras: Sequence[WeightedLora], components: Mapping[str, Mapping[str, Tensor]], *, family: Family) -> int:
    """Bytes of the copies of weights that the LoRAs go into; of the model's `components` only shapes are used."""
    if not loras:
        return 0
    keys = [key for lora in loras for key in file.read_shapes(lora.path)]
    targets = find_targets(components, family=family, text_encoder=family.adapts_text(keys), chosen=of_keys(keys))
    weights = [components[target.component][f"{target.module}.weight"] for target in targets]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _check(path: Path, host: Host, family: str) -> None:
    if host.allowed is not None and not host.allowed.may_read(path):
        raise SettingError(f"{named('train_on_top_of')} = {path} cannot be used",
                           why="others can reach this page, so it keeps to the folders it is allowed",
                           remedy=f"choose a LoRA in {' or '.join(map(str, host.allowed.reading))}; {host.allowed.advice}")
    shapes = {key: torch.empty(shape, device="meta") for key, shape in file.read_shapes(path).items()}
    made_for = file.recognise(shapes, file.read_metadata(path))
    if family and made_for not in (None, family):
        raise LoraFileError(f"{path.name} cannot be trained on top of", why=f"it is for {FAMILIES[made_for].title}, and the "
                            f"model is {FAMILIES[family].title}", remedy="choose a LoRA of the model's family")
