"""A training step rehearsed on the meta device: the real step, on shapes alone, with its memory followed.

The UNet, the text encoders, the LoRA, the loss, the optimiser and what is recomputed or kept off the device are those of the
run; only the numbers are missing, and with them time and memory: SD1's step takes about a second, SDXL's about four.

Not here: which of several ways is taken (`memory_plan`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib_lora_train.adapters.lora import LoRALayer
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import Target, find_targets
from lib_lora_train.inputs.text import TextCache
from lib_lora_train.memory.tracker import Attention, AttentionKernel, Ledger
from lib_lora_train.model.architecture import Architecture
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.ops.layers import Layers
from lib_lora_train.model.ops.quantised import quantised
from lib_lora_train.model.sd.schedule import NoiseSchedule
from lib_lora_train.model.sd.text import SIZE_EMBEDDING, TextConditioner
from lib_lora_train.model.sd.text_encoder import TextEncoder, transformer_layer
from lib_lora_train.model.sd.unet import DIRECTLY, Run, UNet
from lib_lora_train.model.sd.vae import VAE
from lib_lora_train.training.condition import CachedText, Condition, TrainedText
from lib_lora_train.training.device_step import Work
from lib_lora_train.training.optimizer import Stepper
from lib_lora_train.training.precision import LossScaler
from lib_lora_train.training.step import StepInputs, StepOptions

META = torch.device("meta")
_SIZES = 6 * SIZE_EMBEDDING  # SDXL's sizes as sinusoids, beside the pooled text
Part = Literal["unet", "vae", "text"]
Base = Literal["", "int8", "fp8"]
"""What the UNet's weights are held in; "" for the lender's own."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A LoRA layer to be: where, how large, and whether it is trained or only applied."""

    target: Target
    rank: int
    trained: bool = True


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a step's memory depends on and no plan changes. Sizes are pixels; `chunks` are those of the longest caption.

    shapes     of inputs that occur in the run, of which this is the largest
    encoded    pictures that the VAE encodes together in front of each step; 0 where latents are cached
    """

    width: int
    height: int
    dtype: torch.dtype
    layers: tuple[Layer, ...]
    device_type: str = "cuda"
    attention: AttentionKernel = "fused"
    chunks: int = 1
    min_snr_gamma: float = 5.0
    text_recomputed: bool = False
    shapes: int = 1
    encoded: int = 0

    @property
    def weights(self) -> int:
        """Of the LoRA."""
        return sum(layer.rank * (layer.target.in_features + layer.target.out_features) for layer in self.layers)

    @property
    def text_trained(self) -> bool:
        """Whether the text encoders run in the step."""
        return any(layer.trained and layer.target.component != "unet" for layer in self.layers)


@dataclasses.dataclass(frozen=True)
class Way:
    """How a step is made: what a plan chooses. `aside` is what is not on the device."""

    batch: int
    recompute: frozenset[str] = frozenset()
    offload: bool = False
    base: Base = ""
    channels_last: bool = False
    aside: frozenset[Part] = frozenset()


@dataclasses.dataclass(frozen=True)
class Unit:
    """One of the UNet's units: what it keeps from forward to backward beside its result, and what it takes to recompute."""

    name: str
    kept: int
    operations: float
    kernels: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a step takes. `peak` and `kept` (when forward ends) are bytes by kind; `again` are those of the operations that
    are made a second time."""

    peak: Mapping[str, int]
    kept: Mapping[str, int]
    operations: float
    again: float
    kernels: int
    units: tuple[Unit, ...]


def layers_of(network: AdapterNetwork) -> tuple[Layer, ...]:
    """The layers of a network that is there."""
    return tuple(Layer(target, network.layers[target.key].rank, network.layers[target.key].down.requires_grad)
                 for target in network.targets)


def layers_for(tensors: Mapping[str, Tensor], architecture: Architecture, *, rank: int,
               text_encoder: bool) -> tuple[Layer, ...]:
    """The layers of a new network of one rank; of `tensors` (checkpoint names) only shapes are used."""
    unet, _, texts = architecture.family.parts(tensors)
    components = {"unet": unet, **dict(zip(architecture.components[1:], texts, strict=True))}
    return tuple(Layer(target, rank) for target in find_targets(components, family=architecture.family,
                                                                 text_encoder=text_encoder))


def rehearse(tensors: Mapping[str, Tensor], architecture: Architecture, scene: Scene, way: Way) -> Outcome:
    """One step on the shapes of `tensors` (checkpoint names)."""
    ledger = Ledger(scene.device_type)
    attention = Attention(ledger, scene.attention)
    model, watch = _model(tensors, architecture, ledger, attention)
    network = _network(scene.layers)
    with torch.enable_grad():
        _furnish(model, ledger, way, scene)
        weights = network.flatten(1.0, 1.0, dtype=scene.dtype)
        stepper = Stepper(weights, weight_decay=0.0, max_grad_norm=1.0, captured=True)
        moments = [tensor for state in stepper.optimizer.state.values() for tensor in state.values()]
        ledger.enter("LoRA and optimiser", [weights.values, weights.gradient, *moments, *network.parameters(),
                                            *([] if weights.working is None else [weights.working])])
        scaler = _WatchedScaler(META, enabled=scene.dtype == torch.float16)
        scaler.watch = watch
        work = Work(model, adapters=network.adapters().get("unet", {}), condition=_condition(model, network, scene),
                    stepper=stepper, scaler=scaler,
                    options=StepOptions(dtype=scene.dtype, min_snr_gamma=scene.min_snr_gamma, recompute=way.recompute,
                                        offload=way.offload))
        inputs = _inputs(architecture, scene, way.batch)
        ledger.enter("inputs", inputs.tensors())
        with ledger, attention:
            work.gradients(inputs)
            if not _fused_adamw(scene.device_type):
                # Two tensors of the weights' size are made on the way. Not run: it reads a number, which there is none of here.
                ledger.work(2 * weights.values.nbytes)
    return Outcome(dict(ledger.peak), watch.kept, ledger.operations, watch.again, ledger.kernels, watch.units())


def _model(tensors: Mapping[str, Tensor], architecture: Architecture, ledger: Ledger,
           attention: Attention) -> tuple[FrozenModel, _Watch]:
    shapes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device=META) for name, tensor in tensors.items()}
    watch = _Watch(ledger, attention)
    unet_shapes, vae_shapes, texts = architecture.family.parts(shapes)
    unet = _WatchedUNet(unet_shapes, architecture.unet)
    unet.watch = watch
    encoders = [_WatchedEncoder(text, config) for text, config in zip(texts, architecture.text, strict=True)]
    for encoder in encoders:
        encoder.watch = watch
    schedule = NoiseSchedule.build(prediction_type=architecture.prediction_type, alphas_cumprod=None,
                                   zero_terminal_snr=architecture.zero_terminal_snr).to(META)
    stem = unet.tensors["input_blocks.0.0.weight"]
    return FrozenModel(architecture=architecture, unet=unet, vae=VAE(vae_shapes, architecture.vae),
                       text=TextConditioner(encoders, [_NoTokenizer()] * len(encoders)), schedule=schedule, device=META,
                       dtype=stem.dtype), watch


def _furnish(model: FrozenModel, ledger: Ledger, way: Way, scene: Scene) -> None:
    """Put on the device what lies there while the step runs: the lender's parts that are not aside, and our copies."""
    parts: dict[Part, list[Tensor]] = {"unet": _dense(model.unet.layers), "vae": _dense(model.vae.layers),
                                       "text": [t for encoder in model.text.encoders for t in _dense(encoder.layers)]}
    names: dict[Part, str] = {"unet": "UNet", "vae": "VAE", "text": "text encoders"}
    for part, tensors in parts.items():
        if part not in way.aside:
            ledger.enter(names[part], tensors)
    if way.base:
        copies = dict(quantised(model.unet.layers.tensors, way.base, device=META, channels_last=way.channels_last))
        model.unet.layers.replace(copies)
        ledger.enter("copies", [t for copy in copies.values() for t in (copy.values, copy.scale)])
        if "unet" in way.aside:  # norms and biases are needed on the device all the same
            ledger.enter("copies", _dense(model.unet.layers))
    elif way.channels_last:
        before = {id(tensor) for tensor in _dense(model.unet.layers)}
        model.unet.layers.lay_out_channels_last()
        ledger.enter("copies", [t for t in _dense(model.unet.layers) if id(t) not in before])


@functools.lru_cache(maxsize=4)
def _fused_adamw(device_type: str) -> bool:
    """Whether AdamW is one kernel: on CUDA always, on the CPU in newer torch."""
    if device_type != "cpu":
        return device_type == "cuda"
    try:
        torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=True)
    except RuntimeError:
        return False
    return True


def _dense(layers: Layers) -> list[Tensor]:
    return [weight for weight in layers.tensors.values() if isinstance(weight, Tensor)]


def _network(layers: Sequence[Layer]) -> AdapterNetwork:
    """The network without a number in it."""
    made = {}
    for layer in layers:
        target = layer.target
        made[target.key] = LoRALayer(torch.empty(layer.rank, target.in_features, device=META),
                                     torch.empty(target.out_features, layer.rank, device=META), alpha=1.0)
        made[target.key].requires_grad_(layer.trained)
    return AdapterNetwork([layer.target for layer in layers], made)


def _condition(model: FrozenModel, network: AdapterNetwork, scene: Scene) -> Condition:
    if not scene.text_trained:
        return CachedText(TextCache(model.text))  # only asked to hand on what was prepared
    return TrainedText(model.text, clip_skip=1, adapters=network.adapters(), checkpointing=scene.text_recomputed,
                       dtype=scene.dtype)


def _inputs(architecture: Architecture, scene: Scene, batch: int) -> StepInputs:
    factor, config = architecture.vae.factor, architecture.unet
    latents = [torch.empty(batch, config.in_channels, scene.height // factor, scene.width // factor, device=META)
               for _ in range(4)]
    if scene.text_trained:
        text = tuple(torch.empty(batch, scene.chunks, 77, dtype=torch.long, device=META) for _ in architecture.text)
    else:
        pooled = [torch.empty(batch, config.adm_channels - _SIZES, device=META)] if config.adm_channels else []
        text = (torch.empty(batch, 77 * scene.chunks, config.context_dim, device=META), *pooled)
    return StepInputs(*latents, timesteps=torch.empty(batch, dtype=torch.long, device=META),
                      share=torch.empty(batch, device=META), sizes=torch.empty(batch, 6, device=META), text=text)


class _Watch:
    """Sees the units come and go in forward, what is kept when it ends, and how many operations are made `again`."""

    def __init__(self, ledger: Ledger, attention: Attention) -> None:
        self.kept: Mapping[str, int] = {}
        self.again = 0.0
        self._ledger, self._attention = ledger, attention
        self._seen: dict[str, tuple[int, int, float, int, int]] = {}
        self._units: tuple[Unit, ...] = ()

    def run(self, name: str, function: Callable[..., Tensor], arguments: Sequence[Any], *, recompute: bool) -> Tensor:
        """The unit `name`."""
        ledger = self._ledger
        births, operations, kernels = ledger.births, ledger.operations, ledger.kernels
        result = self.recomputed(function, *arguments) if recompute else function(*arguments)
        self._seen.setdefault(name, (births, ledger.births, ledger.operations - operations, ledger.kernels - kernels,
                                     result.numel() * result.element_size()))
        return result

    def recomputed(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """As `torch.utils.checkpoint`, which before torch 2.4 does not know the meta device: it is not shown the tensors.

        In backward the attention's mode is off, and is put in place again.
        """
        def unit(inputs: _Inputs) -> Tensor:
            before, again = self._ledger.operations, inputs.met
            try:
                with self._attention:
                    return function(*inputs.all())
            finally:  # torch may leave it as soon as it has what it needs
                self.again += self._ledger.operations - before if again else 0.0
        return checkpoint(unit, _Inputs(arguments), use_reentrant=False, preserve_rng_state=False)

    def forward_ends(self) -> None:
        """To be called between forward and backward."""
        self.kept = self._ledger.live()
        alive = self._ledger.born_between([(begin, end) for begin, end, *_ in self._seen.values()])
        self._units = tuple(Unit(name, max(0, size - result), operations, kernels) for size, (
            name, (_, _, operations, kernels, result)) in zip(alive, self._seen.items(), strict=True))

    def units(self) -> tuple[Unit, ...]:
        """In the order of computation, each after those inside it."""
        return self._units


class _Inputs:
    """A unit's inputs: given as they are the first time, then by autograd, which keeps them (and may keep them elsewhere)."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        self._first: Sequence[Any] | None = arguments
        self._saved = _Saved.apply(torch.empty(0, requires_grad=True), *(a for a in arguments if isinstance(a, Tensor)))
        self._rest = [_Saved if isinstance(argument, Tensor) else argument for argument in arguments]

    @property
    def met(self) -> bool:
        """Whether they were asked for before."""
        return self._first is None

    def all(self) -> Sequence[Any]:
        """The arguments."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        tensors = iter(self._saved.grad_fn.saved_tensors)
        return [next(tensors) if argument is _Saved else argument for argument in self._rest]


class _Saved(torch.autograd.Function):
    """Has autograd keep some tensors."""

    @staticmethod
    def forward(ctx: Any, dummy: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return dummy.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        raise AssertionError("nothing depends on this")


@dataclasses.dataclass(frozen=True)
class _WatchedRun(Run):
    watch: _Watch

    def __call__(self, name: str, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return self.watch.run(name, function, arguments, recompute=name in self.checkpointed)

    def inside(self, name: str) -> Run:
        return DIRECTLY if name in self.checkpointed else self


class _WatchedUNet(UNet):
    watch: _Watch

    def runner(self, recompute: frozenset[str]) -> Run:
        return _WatchedRun(recompute, self.watch)


class _WatchedEncoder(TextEncoder):
    watch: _Watch

    def _layer(self, layers: Layers, index: int, x: Tensor, *, checkpointing: bool) -> Tensor:
        if checkpointing:
            return self.watch.recomputed(transformer_layer, layers, f"text_model.encoder.layers.{index}", x, self.config)
        return super()._layer(layers, index, x, checkpointing=False)


class _WatchedScaler(LossScaler):
    """Where forward ends and backward begins."""

    watch: _Watch

    def scaled(self, loss: Tensor) -> Tensor:
        self.watch.forward_ends()
        return super().scaled(loss)


class _NoTokenizer:
    """Nothing is tokenised in a rehearsal."""

    start = end = 0
    comma = None

    def encode(self, text: str) -> list[int]:
        raise AssertionError("a rehearsal has no captions")
