"""Several LoRAs at once, each at a weight of its own, as `<lora:name:weight>` in a prompt asks for them."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lib_lora_train.adapters import file
from lib_lora_train.adapters.base import merged
from lib_lora_train.adapters.embedding import WordVectors
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import find_targets, of_keys
from lib_lora_train.errors import LoraFileError, plain_line
from lib_lora_train.model.architecture import UNET_COMPONENT
from lib_lora_train.model.family import FAMILIES
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.ops.layers import Adapter, DeltaAdapter, adapted_conv2d, adapted_linear
from lib_lora_train.model.ops.linear import LoRADelta
from lib_lora_train.model.ops.weights import Weight, dense

Stack = Mapping[str, Mapping[str, Adapter]]
"""{component: {module: adapter}}, as the sampler takes it."""

_TAG = re.compile(r"<lora:([^>]+)>")


@dataclasses.dataclass(frozen=True)
class LoraTag:
    """`<lora:name:text_weight:unet_weight>`: the name of a LoRA file without its ending, and a weight for each part."""

    name: str
    text_weight: float = 1.0
    unet_weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class WeightedLora:
    """A LoRA file, and the weights of what it changes in the text encoders and in the UNet."""

    path: Path
    text_weight: float = 1.0
    unet_weight: float = 1.0


def split_tags(prompt: str) -> tuple[str, tuple[LoraTag, ...]]:
    """The prompt without its `<lora:…>`, and what they say, read as the WebUI reads them: the first number is both weights, a
    second one is the UNet's, and `te=` and `unet=` name them. Raises LoraFileError where one is no number."""
    return _TAG.sub("", prompt), tuple(_tag(match[1]) for match in _TAG.finditer(prompt))


def find_lora(tag: LoraTag, folder: Path) -> WeightedLora:
    """The file of that name anywhere below `folder`. Raises LoraFileError where there is none."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(".safetensors") and name.rpartition(".")[0] == tag.name:
                return WeightedLora(Path(parent, name), tag.text_weight, tag.unet_weight)
    raise LoraFileError(f"There is no LoRA {plain_line(tag.name)[:80]!r}", why=f"no such file is below {folder}",
                        remedy="take its file's name without .safetensors")


def load_stack(model: FrozenModel, loras: Sequence[WeightedLora]) -> Stack:
    """What the LoRAs together add to `model`, on its device: where several change a layer, the sum. A LoRA at weight 0
    changes no layer; the vectors of its words stand for them at any weight, as in the WebUI. Raises LoraFileError for a file
    that cannot be read or does not fit the model."""
    return stacked([_load(model, lora) for lora in loras])


def merge_into(model: FrozenModel, loras: Sequence[WeightedLora]) -> None:
    """Let `model` compute with copies of the weights that the LoRAs change, each put into what those before it left, as the
    WebUI applies them. The borrowed tensors stay as they are, and words mean what they did. Raises LoraFileError."""
    parts = {UNET_COMPONENT: model.unet.layers,
             **{encoder.config.component: encoder.layers for encoder in model.text.encoders}}
    for lora in loras:
        for component, modules in _load(model, lora).items():
            changed: dict[str, Tensor] = {}
            for module, adapter in modules.items():
                if isinstance(adapter, WordVectors):
                    continue
                weight = parts[component].weight(module)
                if adapter.multiplier:
                    with torch.no_grad():
                        changed[f"{module}.weight"] = merged(adapter, dense(weight, torch.float32).to(model.device)).to(
                            weight.dtype).contiguous()
            parts[component].replace(changed)


def stacked(stacks: Sequence[Stack]) -> Stack:
    """What several mappings of adapters add together."""
    found: dict[str, dict[str, list[Adapter]]] = {}
    for stack in stacks:
        for component, modules in stack.items():
            for module, adapter in modules.items():
                found.setdefault(component, {}).setdefault(module, []).append(adapter)
    return {component: {module: _together(adapters) for module, adapters in modules.items()}
            for component, modules in found.items()}


def _together(adapters: Sequence[Adapter]) -> Adapter:
    if len(adapters) == 1:
        return adapters[0]
    if isinstance(adapters[0], WordVectors):
        return WordVectors(adapters[0].component, [one for each in adapters for one in each.embeddings])
    return SummedDeltas(adapters) if all(isinstance(adapter, DeltaAdapter) for adapter in adapters) else Chained(adapters)


class Chained:
    """Adapters of any kinds beside one layer, as the WebUI applies several: each to the weight with those before it in it; a
    `LayerAdapter`. It composes a weight at each use, which suits sampling and not training."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        *self._before, self._last = adapters

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """See `LayerAdapter`."""
        return adapted_linear(self._last, x, self._merged(weight), bias)

    def conv2d(self, x: Tensor, weight: Weight, bias: Tensor | None, *, stride: int, padding: int) -> Tensor:
        """See `LayerAdapter`."""
        return adapted_conv2d(self._last, x, self._merged(weight), bias, stride=stride, padding=padding)

    def _merged(self, weight: Weight) -> Weight:
        for adapter in self._before:
            weight = merged(adapter, dense(weight, torch.float32)) if adapter.multiplier else weight
        return weight


class SummedDeltas:
    """The sum of low-rank products beside one layer, which is one product with their ranks side by side; a `DeltaAdapter`.
    They are asked anew for each use, so that one of them may be in training."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        assert all(isinstance(adapter, DeltaAdapter) for adapter in adapters), "only low-rank products can be added up"
        self._adapters = tuple(adapters)

    def delta(self) -> LoRADelta | None:
        """Σ sᵢ Bᵢ Aᵢ, with the scales in B; None where all are at weight 0."""
        deltas = [delta for adapter in self._adapters if (delta := adapter.delta()) is not None]
        if len(deltas) < 2:
            return deltas[0] if deltas else None
        return LoRADelta(torch.cat([delta.down for delta in deltas]),
                         torch.cat([delta.up * delta.scale for delta in deltas], dim=1), 1.0)


def _tag(text: str) -> LoraTag:
    name, *parts = text.split(":")
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    numbers = [part for part in parts if "=" not in part]
    try:
        both = float(numbers[0]) if numbers else 1.0
        text_weight = float(named.get("te", both))
        unet_weight = float(named.get("unet", numbers[1] if len(numbers) > 1 else text_weight))
    except ValueError:
        text_weight = unet_weight = math.nan
    if not math.isfinite(text_weight + unet_weight):
        raise LoraFileError(f"<lora:{plain_line(text)[:80]}> cannot be understood", why="its weight is not a number",
                            remedy="write <lora:name:0.8>")
    return LoraTag(name, text_weight, unet_weight)


def _load(model: FrozenModel, lora: WeightedLora) -> Stack:
    """The adapters of one file. Layers that it does not hold get none."""
    read, family = file.load(lora.path), model.architecture.family
    try:
        targets = find_targets(model.components, family=family, text_encoder=family.adapts_text(read.tensors),
                               chosen=of_keys(read.tensors))
        network = AdapterNetwork.continued(targets, read.tensors, seed=0).to(model.device)
    except LoraFileError as error:
        made_for = file.recognise(read.tensors, read.metadata)
        other = made_for not in (None, family.name)
        raise LoraFileError(
            f"{lora.path.name} cannot be used", remedy=f"choose a LoRA for {family.title}",
            why=f"it is for {FAMILIES[made_for].title}, and the model is {family.title}" if other else
            (error.why or error.what)) from error
    network.freeze(model.components)
    for target in targets:
        network.layers[target.key].multiplier = lora.unet_weight if target.component == UNET_COMPONENT else lora.text_weight
    return network.adapters()
