"""All adapters of a run: made from targets, or from a file to continue from it.

A plain container: it says nothing about how they are trained or when they are saved.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lib_lora_train.adapters.base import Adapter, AdapterKind, OfWeight
from lib_lora_train.adapters.dora import DoRA
from lib_lora_train.adapters.dropout import DropoutKeys, DropoutRates, DroppedLayer
from lib_lora_train.adapters.embedding import WordEmbedding, WordVectors, split_embeddings
from lib_lora_train.adapters.flat import FlatWeights
from lib_lora_train.adapters.loha import LoHa
from lib_lora_train.adapters.lokr import LoKr, kind_of_layers
from lib_lora_train.adapters.lora import LoRA, LoRALayer
from lib_lora_train.adapters.oft import OFT
from lib_lora_train.adapters.targets import Target
from lib_lora_train.errors import LoraFileError, some_of
from lib_lora_train.model.architecture import UNET_COMPONENT
from lib_lora_train.model.ops.layers import Adapter as LayersAdapter
from lib_lora_train.model.ops.weights import Weight
from lib_lora_train.model.sd.lora_keys import foreign_layout
from lib_lora_train.model.sd.text_encoder import TOKEN_EMBEDDING

DEFAULT_KIND = LoRA()
_ADDED: dict[str, AdapterKind] = {"LoRA": DEFAULT_KIND, "LoHa": LoHa(), "LoKr": LoKr()}
ADAPTERS: dict[str, AdapterKind] = {
    **_ADDED, "OFT": OFT(), **{f"{name} with DoRA": DoRA(kind) for name, kind in _ADDED.items()}}
"""Each kind of adapter by its name, as files are recognised: a kind whose tensors another one has too stands before it."""
EMBEDDING_GROUP = "embedding"
"""The parameter group of words' vectors."""
Sizes = Mapping[str, tuple[int, float]]
"""{layer's key: (rank, alpha)}"""


class AdapterNetwork:
    """The adapters by their key in the file. Build it with `build` or `continued`.

    layers      {key: adapter}
    embeddings  words with vectors of their own, in the file too
    fresh       keys of layers that the file to continue from did not hold; () for a new network
    dropout     what is left out in training, as long as `dropout_keys` has keys
    """

    def __init__(self, targets: Sequence[Target], layers: Mapping[str, Adapter], *, kind: AdapterKind = DEFAULT_KIND,
                 fresh: tuple[str, ...] = (), embeddings: tuple[WordEmbedding, ...] = ()) -> None:
        assert [target.key for target in targets] == list(layers), "one layer for each target, in the same order"
        self.targets = tuple(targets)
        self.layers = MappingProxyType(dict(layers))
        self.kind = kind
        self.fresh = fresh
        self.embeddings = embeddings
        self._flat: FlatWeights | None = None
        self._rate_factors: dict[nn.Parameter, float] = {}
        self.dropout, self.dropout_keys = DropoutRates(), DropoutKeys()

    @classmethod
    def build(cls, targets: Sequence[Target], *, rank: int, alpha: float, seed: int, kind: AdapterKind = DEFAULT_KIND,
              sizes: Sizes = MappingProxyType({})) -> AdapterNetwork:
        """A new network that changes nothing yet. A layer's start depends on (seed, its key) alone. Layers that are not among
        `sizes` have this rank and alpha."""
        layers = {}
        for target in targets:
            own_rank, own_alpha = sizes.get(target.key, (rank, alpha))
            layers[target.key] = kind.build(target, rank=own_rank, alpha=own_alpha, generator=_generator(target, seed))
        return cls(targets, layers, kind=kind)

    @classmethod
    def continued(cls, targets: Sequence[Target], tensors: Mapping[str, Tensor], *, seed: int,
                  kind: AdapterKind | None = None) -> AdapterNetwork:
        """The network that a file holds (`tensors` from `file.load`); kind, ranks and alphas are the file's.

        Targets that the file has no layer for start anew with the file's most common rank and alpha (see
        `fresh`). Raises LoraFileError for a layer that is not among the targets, so that nothing learnt is
        dropped silently, and for shapes that do not fit the model. Its words' vectors are frozen.
        """
        tensors, embeddings = split_embeddings(tensors)
        found = _by_layer(tensors)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        kind = kind_of_shapes(shapes) if kind is None else kind_of(tensors, among=(kind,))
        _refuse_strangers(found, targets)
        layers = {target.key: kind.load(target, found[target.key]) for target in targets if target.key in found}
        rank, alpha = _usual_size(layers.values())
        fresh = tuple(target.key for target in targets if target.key not in found)
        if fresh:
            layers |= cls.build([target for target in targets if target.key in fresh], rank=rank, alpha=alpha, seed=seed,
                                kind=kind).layers
        return cls(targets, {target.key: layers[target.key] for target in targets}, kind=kind, fresh=fresh,
                   embeddings=embeddings)

    @property
    def usual_size(self) -> tuple[int, float]:
        """The rank and alpha that most layers have."""
        return _usual_size(self.layers.values())

    def begin_at(self, components: Mapping[str, Mapping[str, Weight]], keys: Collection[str]) -> None:
        """Let the layers of these keys take over what they need of the frozen weights ({component: {name: weight}}) before the
        first step; to be called on the device of the training."""
        for target in self.targets:
            layer = self.layers[target.key]
            if target.key in keys and isinstance(layer, OfWeight):
                layer.begin_at(components[target.component][f"{target.module}.weight"])

    def adapters(self) -> dict[str, dict[str, LayersAdapter]]:
        """{component: {local module name: layer}}, as UNet and text encoders accept them."""
        result: dict[str, dict[str, LayersAdapter]] = {}
        for target in self.targets:
            result.setdefault(target.component, {})[target.module] = self.layers[target.key]
        for component in dict.fromkeys(component for one in self.embeddings for component in one.by_component):
            result.setdefault(component, {})[TOKEN_EMBEDDING] = WordVectors(component, self.embeddings)
        return result

    def training_adapters(self) -> dict[str, dict[str, LayersAdapter]]:
        """As `adapters`, with what is left out at random while there are keys (see `dropout.py`)."""
        if not self.dropout:
            return self.adapters()
        result = self.adapters()
        for number, target in enumerate(self.targets):
            result[target.component][target.module] = DroppedLayer(
                self.layers[target.key], self.dropout, self.dropout_keys, number=number)
        return result

    def parameters(self, components: Collection[str] | None = None) -> list[nn.Parameter]:
        """All trainable weights in a fixed order, or those of the layers of the named components."""
        layers = [parameter for target in self.targets if components is None or target.component in components
                  for parameter in self.layers[target.key].parameters()]
        return layers + self._vectors() if components is None else layers

    def _vectors(self) -> list[nn.Parameter]:
        return [parameter for one in self.embeddings for parameter in one.parameters()]

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(A [r, ...], B [out, r]) of each layer whose change of the model is their product."""
        layers = (getattr(layer, "inner", layer) for layer in self.layers.values())
        return [(layer.down, layer.up) for layer in layers if isinstance(layer, LoRALayer)]

    def set_rate_factors(self, of_layers: Mapping[str, float], *, up: tuple[float, float] = (1.0, 1.0)) -> None:
        """Multiply the learning rates of layers, by their keys, and those of the second matrices of the UNet's and of the text
        encoders' pairs (LoRA+, Hayou et al. 2024, arXiv 2402.12354). A layer at 0 is frozen."""
        seconds = {second for _, second in self.pairs()}
        for target in self.targets:
            factor = of_layers.get(target.key, 1.0)
            for parameter in self.layers[target.key].parameters():
                ratio = up[target.component != UNET_COMPONENT] if parameter in seconds else 1.0
                self._rate_factors[parameter] = factor * ratio
                if not factor:
                    parameter.requires_grad_(False)

    def parameter_groups(self, unet_lr: float, text_encoder_lr: float, embedding_lr: float = 0.0) -> list[dict[str, object]]:
        """torch's parameter groups with a "name": "unet", then "text_encoder", and further ones for weights of a part that have
        another rate (see `set_rate_factors`); then "embedding".

        A part whose rate is 0 or that has no layer gets no group; `freeze` it to spare its gradients.
        """
        text = {target.component for target in self.targets} - {UNET_COMPONENT}
        groups: list[dict[str, object]] = []
        for name, components, rate in (("unet", {UNET_COMPONENT}, unet_lr), ("text_encoder", text, text_encoder_lr)):
            by_factor: dict[float, list[nn.Parameter]] = {}
            for parameter in self.parameters(components) if rate else ():
                if factor := self._rate_factors.get(parameter, 1.0):
                    by_factor.setdefault(factor, []).append(parameter)
            groups += [{"name": name if not number else f"{name} × {factor:g}", "params": parameters, "lr": rate * factor}
                       for number, (factor, parameters) in enumerate(by_factor.items())]
        groups.append({"name": EMBEDDING_GROUP, "params": self._vectors(), "lr": embedding_lr})
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

    def flatten(self, unet_lr: float, text_encoder_lr: float, embedding_lr: float = 0.0, *,
                dtype: torch.dtype = torch.float32) -> FlatWeights:
        """Put all weights that are to be trained into one buffer, and copies in `dtype` beside them where that is not fp32.

        To be called on the device of the training; the layers compute with the copies, which `FlatWeights.refresh` brings
        up to date after every step.
        """
        self._flat = FlatWeights(self.parameter_groups(unet_lr, text_encoder_lr, embedding_lr), dtype=dtype)
        self.rebind()
        return self._flat

    def refresh(self) -> None:
        """Bring the copies that are computed with up to date, after a change of the weights."""
        if self._flat is not None:
            self._flat.refresh()

    def stored(self) -> list[Tensor]:
        """All that takes memory, before and after `flatten`. Who moves it, in place, calls `rebind` afterwards."""
        if self._flat is None:
            return list(self.parameters())
        trained = set(self._flat.trained())
        return [*self._flat.buffers(), *(weight for weight in self.parameters() if weight not in trained)]

    def rebind(self) -> None:
        """Make the layers' weights views of the flat buffers where these are now, if there are any."""
        if self._flat is not None:
            self._flat.rebind()
            for layer in self.layers.values():
                layer.use_working_copies(self._flat.working_copy)

    def to(self, device: torch.device | str) -> AdapterNetwork:
        """Move the weights (in place, before `flatten`); they stay fp32. Returns itself."""
        assert self._flat is None, "the layers would no longer lie in the buffer"
        for layer in (*self.layers.values(), *self.embeddings):
            layer.to(device)
        return self

    def set_multiplier(self, multiplier: float) -> None:
        """The weight in `<lora:name:weight>`: 1 while training, 0 for the model without the LoRA."""
        for layer in (*self.layers.values(), *self.embeddings):
            layer.multiplier = float(multiplier)

    def arguments(self) -> dict[str, str]:
        """What kohya's `network_args` would be for this network: {} for plain LoRA."""
        own = dict(self.kind.arguments)
        convolutions = [self.layers[target.key] for target in self.targets if target.kernel]
        if not convolutions:
            return own
        rank, alpha = _usual_size(convolutions)
        return own | {"conv_dim": str(rank), "conv_alpha": f"{alpha:g}"}

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the file under kohya's keys, fp32, sharing memory with the weights (no copy)."""
        layers = {f"{target.key}.{name}": tensor for target in self.targets
                  for name, tensor in self.layers[target.key].tensors().items()}
        return layers | {key: tensor for one in self.embeddings for key, tensor in one.tensors().items()}


def _usual_size(layers: Iterable[Adapter]) -> tuple[int, float]:
    return Counter((layer.rank, layer.alpha) for layer in layers).most_common(1)[0][0]


def _generator(target: Target, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{target.key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def kind_of(names: Iterable[str], *, among: Collection[AdapterKind] = ADAPTERS.values()) -> AdapterKind:
    """The kind of network whose file has tensors of these names. Raises LoraFileError for one that is not `among` them."""
    parts = {name.partition(".")[2] for name in names}
    for kind in among:
        if parts <= set(kind.tensor_names):
            return kind
    nearest = min(among, key=lambda kind: len(parts - set(kind.tensor_names)))
    raise LoraFileError(
        f"The file holds weights that cannot be continued ({some_of(sorted(parts - set(nearest.tensor_names)), 2)})",
        why="whole weights, norms, tucker-decomposed convolutions, (IA)³, GLoRA, BOFT and mixed files are not among the kinds "
        "that can be trained", remedy=f"choose one of {', '.join(ADAPTERS)}")


def kind_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> AdapterKind:
    """As `kind_of`, with what the shapes of a file's tensors say of the kind: how a LoKr cuts each layer."""
    kind, layers = kind_of(shapes), dict[str, dict[str, tuple[int, ...]]]()
    if not isinstance(getattr(kind, "inner", kind), LoKr):
        return kind
    for name, shape in shapes.items():
        layers.setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = shape
    cut = kind_of_layers(layers.values())
    return DoRA(cut) if isinstance(kind, DoRA) else cut


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{key: {name: tensor}} of a file's layers; LoraFileError where it holds none."""
    found: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition(".")
        found.setdefault(key, {})[name] = tensor
    if layout := foreign_layout(tensors):
        raise LoraFileError(f"The file is a LoRA in the layout of {layout}", why="its tensors have other names than kohya's, "
                            "which the WebUI reads", remedy="convert it to kohya's layout, or choose another LoRA")
    if not any(key.startswith(("lora_", "lycoris_")) for key in found):
        raise LoraFileError("The file holds no LoRA layer", why=f"it begins with {next(iter(tensors))}" if tensors else "",
                            remedy="choose a LoRA")
    return found


def _refuse_strangers(keys: Collection[str], targets: Sequence[Target]) -> None:
    known = {target.key for target in targets}
    strangers = sorted(key for key in keys if key not in known)
    if not strangers:
        return
    if len(strangers) == len(keys):
        raise LoraFileError(
            f"No layer of the LoRA file is in the model ({some_of(strangers, 2)})",
            why="it was made for another kind of model", remedy="choose a LoRA of the model's family")
    raise LoraFileError(
        f"The LoRA file has layers that would be lost ({some_of(strangers, 2)})",
        why="they are not among the layers of this run",
        remedy="switch text encoder training on if they are the text encoder's, or choose another file")
