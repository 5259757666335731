"""All LoRA layers of a run: made from targets, or from a file to continue from it.

A plain container around the layers: it says nothing about how they are trained or when they are saved.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lib_lora_train.adapters.flat import FlatWeights
from lib_lora_train.adapters.lora import LoRALayer
from lib_lora_train.adapters.targets import Target
from lib_lora_train.errors import LoraFileError

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


class LoRANetwork:
    """The layers by their key in the file. Build it with `build` or `continued`.

    layers    {key: LoRALayer}
    fresh     keys of layers that the file to continue from did not hold; () for a new network
    """

    def __init__(self, targets: Sequence[Target], layers: Mapping[str, LoRALayer], *,
                 fresh: tuple[str, ...] = ()) -> None:
        assert [target.key for target in targets] == list(layers), "one layer for each target, in the same order"
        self.targets = tuple(targets)
        self.layers = MappingProxyType(dict(layers))
        self.fresh = fresh
        self._flat: FlatWeights | None = None

    @classmethod
    def build(cls, targets: Sequence[Target], *, rank: int, alpha: float, seed: int) -> LoRANetwork:
        """A new network that changes nothing yet. A layer's start depends on (seed, its key) alone."""
        return cls(targets, {
            target.key: _new_layer(target, rank=rank, alpha=alpha, seed=seed) for target in targets})

    @classmethod
    def continued(cls, targets: Sequence[Target], tensors: Mapping[str, Tensor], *, seed: int) -> LoRANetwork:
        """The network that a file holds (`tensors` from `file.load`); ranks and alphas are the file's.

        Targets that the file has no layer for start anew with the file's most common rank and alpha (see
        `fresh`). Raises LoraFileError for a layer that is not among the targets, so that nothing learnt is
        dropped silently, and for shapes that do not fit the model.
        """
        found = _file_layers(tensors)
        _refuse_strangers(found, targets)
        (rank, alpha), _ = Counter((down.shape[0], alpha) for down, _, alpha in found.values()).most_common(1)[0]
        layers = {}
        for target in targets:
            if target.key in found:
                down, up, own_alpha = found[target.key]
                _check_fit(target, down, up)
                layer = _new_layer(target, rank=down.shape[0], alpha=own_alpha, seed=seed)
                _fill(layer, down, up)
            else:
                layer = _new_layer(target, rank=rank, alpha=alpha, seed=seed)
            layers[target.key] = layer
        return cls(targets, layers, fresh=tuple(target.key for target in targets if target.key not in found))

    def adapters(self) -> dict[str, dict[str, LoRALayer]]:
        """{component: {local module name: layer}}, as UNet and text encoders take them."""
        result: dict[str, dict[str, LoRALayer]] = {}
        for target in self.targets:
            result.setdefault(target.component, {})[target.module] = self.layers[target.key]
        return result

    def parameters(self, components: Collection[str] | None = None) -> list[nn.Parameter]:
        """All trainable weights in a fixed order, or those of the named components."""
        return [parameter for target in self.targets if components is None or target.component in components
                for parameter in self.layers[target.key].parameters()]

    def parameter_groups(self, unet_lr: float, text_encoder_lr: float) -> list[dict[str, object]]:
        """torch's parameter groups with a "name": "unet", then "text_encoder".

        A part whose rate is 0 or that has no layer gets no group; `freeze` it to spare its gradients.
        """
        text = {target.component for target in self.targets} - {"unet"}
        parts = [("unet", {"unet"}, unet_lr), ("text_encoder", text, text_encoder_lr)]
        groups = [{"name": name, "params": self.parameters(components), "lr": lr} for name, components, lr in parts]
        return [group for group in groups if group["params"] and group["lr"]]

    def freeze(self, components: Collection[str]) -> None:
        """Keep these components as they are: applied and saved, but never given a gradient."""
        for parameter in self.parameters(components):
            parameter.requires_grad_(False)

    def freeze_below(self, component: str, modules: Sequence[str]) -> None:
        """Keep the layers in these modules of a component as they are ("text_model.encoder.layers.11")."""
        for target in self.targets:
            if target.component == component and target.module.startswith(tuple(f"{module}." for module in modules)):
                self.layers[target.key].requires_grad_(False)

    def flatten(self, unet_lr: float, text_encoder_lr: float, *, dtype: torch.dtype = torch.float32) -> FlatWeights:
        """Put all weights that are to be trained into one buffer, and copies in `dtype` beside them where that is not fp32.

        To be called on the device of the training; the layers compute with the copies, which `FlatWeights.refresh` brings
        up to date after every step.
        """
        self._flat = FlatWeights(self.parameter_groups(unet_lr, text_encoder_lr), dtype=dtype)
        for layer in self.layers.values():
            down, up = self._flat.working_copy(layer.down), self._flat.working_copy(layer.up)
            layer.working = None if down is None or up is None else (down, up)
        return self._flat

    def to(self, device: torch.device | str) -> LoRANetwork:
        """Move the weights (in place, before `flatten`); they stay fp32. Returns itself."""
        assert self._flat is None, "the layers would no longer lie in the buffer"
        for layer in self.layers.values():
            layer.to(device)
        return self

    def set_multiplier(self, multiplier: float) -> None:
        """The weight in `<lora:name:weight>`: 1 while training, 0 for the model without the LoRA."""
        for layer in self.layers.values():
            layer.multiplier = float(multiplier)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the file under kohya's keys, fp32, sharing memory with the weights (no copy)."""
        result: dict[str, Tensor] = {}
        for target in self.targets:
            layer = self.layers[target.key]
            down, up = layer.down.detach(), layer.up.detach()
            result[target.key + DOWN] = down[:, :, None, None] if target.as_conv else down
            result[target.key + UP] = up[:, :, None, None] if target.as_conv else up
            result[target.key + ALPHA] = torch.tensor(layer.alpha)
        return result

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the weights of such a state back into these very layers (same keys, same ranks).

        Raises LoraFileError when keys or shapes differ; nothing is changed then.
        """
        found = _file_layers(tensors)
        _refuse_strangers(found, self.targets)
        for target in self.targets:
            if target.key not in found:
                raise LoraFileError("The LoRA file is incomplete", why=f"it has no layer {target.key}")
            down, up, _ = found[target.key]
            _check_fit(target, down, up)
            if down.shape[0] != self.layers[target.key].rank:
                raise LoraFileError(
                    f"The LoRA file has rank {down.shape[0]} at {target.key}",
                    why=f"this run has rank {self.layers[target.key].rank}")
        for key, (down, up, alpha) in found.items():
            _fill(self.layers[key], down, up)
            self.layers[key].alpha = alpha
        if self._flat is not None:
            self._flat.refresh()


def _new_layer(target: Target, *, rank: int, alpha: float, seed: int) -> LoRALayer:
    digest = hashlib.sha256(f"{seed}:{target.key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return LoRALayer(in_features=target.in_features, out_features=target.out_features,
                     rank=rank, alpha=alpha, generator=generator)


def _fill(layer: LoRALayer, down: Tensor, up: Tensor) -> None:
    with torch.no_grad():
        layer.down.copy_(down)
        layer.up.copy_(up)


def _file_layers(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{key: (down [r, in], up [out, r], alpha)}; without an alpha it is the rank, as old files mean it."""
    keys = [name[:-len(DOWN)] for name in tensors if name.endswith(DOWN)]
    known = {key + part for key in keys for part in (DOWN, UP, ALPHA)}
    other = sorted(name for name in tensors if name not in known)
    if other:
        raise LoraFileError(
            f"The file holds weights that are not LoRA's ({_some(other)})",
            why="LoHa, LoKr, DoRA and the like cannot be continued yet", remedy="choose a plain LoRA")
    if not keys:
        raise LoraFileError("The file holds no LoRA layer", remedy="choose another file")
    result = {}
    for key in keys:
        if key + UP not in tensors:
            raise LoraFileError("The LoRA file is incomplete", why=f"{key}{UP} is missing")
        down, up = tensors[key + DOWN], tensors[key + UP]
        if any(side.ndim not in (2, 4) or side.shape[2:].numel() != 1 for side in (down, up)):
            raise LoraFileError(
                f"The layer {key} is a {tuple(down.shape)} convolution",
                why="LoRAs with convolutions (LoCon) cannot be continued yet", remedy="choose a plain LoRA")
        alpha = float(tensors[key + ALPHA]) if key + ALPHA in tensors else float(down.shape[0])
        result[key] = down.flatten(1), up.flatten(1), alpha
    return result


def _check_fit(target: Target, down: Tensor, up: Tensor) -> None:
    if down.shape[1] != target.in_features or up.shape[0] != target.out_features or down.shape[0] != up.shape[1]:
        raise LoraFileError(
            "The LoRA file does not fit the model",
            why=f"{target.key} is {down.shape[1]} -> {down.shape[0]}/{up.shape[1]} -> {up.shape[0]} in the file and "
                f"{target.in_features} -> {target.out_features} in the model",
            remedy="choose a LoRA that was made for this kind of model")


def _refuse_strangers(keys: Collection[str], targets: Sequence[Target]) -> None:
    known = {target.key for target in targets}
    strangers = sorted(key for key in keys if key not in known)
    if not strangers:
        return
    if len(strangers) == len(keys):
        raise LoraFileError(
            f"No layer of the LoRA file is in the model ({_some(strangers)})",
            why="it was made for another kind of model", remedy="choose a LoRA of the model's family")
    raise LoraFileError(
        f"The LoRA file has layers that would be lost ({_some(strangers)})",
        why="they are not among the layers of this run",
        remedy="switch text encoder training on if they are the text encoder's, or choose another file")


def _some(names: Sequence[str]) -> str:
    """The first names and how many there are more."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
