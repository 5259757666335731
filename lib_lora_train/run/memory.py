"""A run's memory: the plan of its steps, and where the parts of the leased model lie while it encodes and trains."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lib_lora_train.adapters.embedding import EMBEDDING_PREFIX
from lib_lora_train.adapters.file import read_shapes
from lib_lora_train.adapters.network import AdapterNetwork, kind_of_shapes
from lib_lora_train.adapters.stack import WeightedLora
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.dataset.buckets import Size
from lib_lora_train.dataset.caption_variation import known_captions
from lib_lora_train.dataset.examples import Example
from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import translated
from lib_lora_train.events import Report
from lib_lora_train.host import placement
from lib_lora_train.host.port import Host, LeasedModel, Outline
from lib_lora_train.inputs.batches import Batches
from lib_lora_train.inputs.text import encoding_bytes
from lib_lora_train.inputs.vae_batches import EncodingBudget, decoding_bytes, free_bytes
from lib_lora_train.memory.device import attention_kernel, budget_of
from lib_lora_train.memory.estimate import Layer, Workload
from lib_lora_train.memory.plan import CONTEXT, GIGABYTE, WORKSPACES, MemoryPlan, plan_memory, size_of
from lib_lora_train.memory.step_config import BaseDtype, Part, StepConfig
from lib_lora_train.model.architecture import UNET_COMPONENT, Architecture
from lib_lora_train.model.family import detect
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.ops.block_swap import BlockSwap, block_of
from lib_lora_train.model.ops.quantised import quantised
from lib_lora_train.model.sd.text import CHUNK
from lib_lora_train.run.callbacks import Pause, Stop
from lib_lora_train.run.inputs import Text, condition_of
from lib_lora_train.run.on_top import loras_on_top, merged_bytes
from lib_lora_train.run.optimizing import kept_bytes
from lib_lora_train.run.planning import RunPlan
from lib_lora_train.run.resume import quantized_dtype
from lib_lora_train.run.selection import dropout_rates, select, targets_of_file
from lib_lora_train.settings import Settings
from lib_lora_train.training.precision import compute_dtype


def memory_plan(plan: RunPlan, model: FrozenModel, leased: LeasedModel, network: AdapterNetwork, *,
                dtype: torch.dtype, on_top: Sequence[WeightedLora] = ()) -> MemoryPlan:
    """How the steps on the leased model are made so that they fit into the memory there is."""
    resumed = quantized_dtype(plan.resume_point, plan.settings) if plan.resume_point else ""
    return plan_for(plan, tensors=leased.tensors, architecture=model.architecture, device=model.device, dtype=dtype,
                    layers=layers_of(network), ours=network.parameters(), resumed_base_dtype=resumed, on_top=on_top)


def plan_for(plan: RunPlan, *, tensors: Mapping[str, Tensor], architecture: Architecture, device: torch.device,
             dtype: torch.dtype, layers: Sequence[Layer], ours: Sequence[Tensor] = (), resumed_base_dtype: BaseDtype = "",
             should_stop: ShouldStop | None = None, on_top: Sequence[WeightedLora] = ()) -> MemoryPlan:
    """The plan for a model of these `tensors` (checkpoint names), leased or on the meta device; `ours` is what is on the device
    already for the LoRA, and `on_top` what is merged into copies of weights. Raises Interrupted."""
    settings, memory = plan.settings, plan.settings.memory
    batch, rates = settings.optimizer.train_batch_size, settings.rates
    # The largest bucket: it needs the most memory, and the resolution itself may be no bucket's size.
    width, height = max((size for size, _ in plan.schedule.buckets), key=lambda size: (size[0] * size[1], size))
    workload = Workload(
        width, height, dtype, device_type=device.type, attention=attention_kernel(device, dtype),
        layers=tuple(dataclasses.replace(layer, trained=layer.trained and bool(rates[layer.target.component != UNET_COMPONENT]))
                     for layer in layers),
        chunks=chunks_in_longest(line for example in plan.dataset.examples for line in example.lines),
        text_checkpointed=memory.gradient_checkpointing,
        encoded=min(memory.vae_batch_size or 1, batch) if settings.encodes_in_steps else 0,
        words=settings.network.embedding_vectors if settings.embedding_rate else 0,
        dropout=dropout_rates(settings.network), optimizer_bytes=kept_bytes(settings),
        merged=merged_bytes(on_top, _components(tensors, architecture), family=architecture.family),
        sampled=max(((p.request.width, p.request.height) for p in plan.prompts), key=math.prod, default=None))
    kept = settings.preservation.preservation
    again = kept in ("dop", "blank")
    compared = kept == "dco" or bool(plan.masks and settings.masks.masked_prior_preservation_weight)
    on_device = [t for t in (*tensors.values(), *ours) if t.device.type in (device.type, "meta")]
    return plan_memory(tensors, architecture, workload, batch=batch, memory=memory,
                       budget=budget_of(memory.memory_budget, device, ours=size_of(on_device)),
                       parts_on_cpu=parts_not_needed(settings, device, examples=plan.dataset.examples),
                       resumed_base_dtype=resumed_base_dtype, references=again + compared, repeats=1 + again,
                       should_stop=should_stop)


def predicted_memory(plan: RunPlan, host: Host, outline: Outline, *,
                     should_stop: ShouldStop | None = None) -> tuple[MemoryPlan, torch.dtype]:
    """The memory plan of a run on what the host holds now, from its shapes, and the dtype to compute in. Raises Interrupted."""
    architecture, settings = detect(outline.tensors, outline.hints), plan.settings
    stored = next(iter(architecture.family.parts(outline.tensors)[0].values())).dtype
    dtype = compute_dtype(settings.memory.mixed_precision, outline.device, weights=stored)
    return plan_for(plan, tensors=outline.tensors, architecture=architecture, device=outline.device, dtype=dtype,
                    layers=planned_layers(settings, outline.tensors, architecture), should_stop=should_stop,
                    on_top=loras_on_top(settings, host, family=architecture.family.name)), dtype


def chunks_in_longest(captions: Iterable[str]) -> int:
    """Chunks of 75 tokens that the longest of the captions takes, without a tokenizer: about four tokens for three words or
    marks."""
    longest = max(captions, key=len, default="")
    return 1 + len(re.findall(r"\w+|[^\w\s]", longest)) * 4 // 3 // CHUNK


def layers_of(network: AdapterNetwork) -> tuple[Layer, ...]:
    """The layers of a network that exists."""
    return tuple(Layer(target, layer.rank, any(weight.requires_grad for weight in layer.parameters()), network.kind)
                 for target, layer in zip(network.targets, network.layers.values(), strict=True))


def layers_for(tensors: Mapping[str, Tensor], architecture: Architecture, *, rank: int,
               text_encoder: bool) -> tuple[Layer, ...]:
    """The layers of a new network of one rank; of `tensors` (checkpoint names) only shapes are used."""
    targets = find_targets(_components(tensors, architecture), family=architecture.family, text_encoder=text_encoder)
    return tuple(Layer(target, rank) for target in targets)


def planned_layers(settings: Settings, tensors: Mapping[str, Tensor], architecture: Architecture) -> tuple[Layer, ...]:
    """The layers that a run with these settings will have, those of a LoRA that is continued with the file's ranks. Raises
    LoraFileError and SettingError."""
    network, components, family = settings.network, _components(tensors, architecture), architecture.family
    if not network.network_weights:
        selected = select(network, components, family=family)
        return tuple(Layer(target, selected.sizes[target.key][0], kind=selected.kind) for target in selected.targets)
    shapes = {name: shape for name, shape in read_shapes(Path(network.network_weights)).items()
              if not name.startswith(EMBEDDING_PREFIX)}
    kind, held = kind_of_shapes(shapes), dict[str, dict[str, tuple[int, ...]]]()
    for name, shape in shapes.items():
        held.setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = shape
    ranks = {key: kind.rank_of(layer) for key, layer in held.items()}
    targets = targets_of_file(network, components, family=family, keys=shapes)
    return tuple(Layer(target, ranks.get(target.key, max(ranks.values())), kind=kind) for target in targets)


def _components(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, dict[str, Tensor]]:
    """The parts that can be adapted of `tensors` (checkpoint names)."""
    unet, _, texts = architecture.family.parts(tensors)
    return dict(zip(architecture.components, (unet, *texts), strict=True))


def parts_not_needed(settings: Settings, device: torch.device, *, examples: Sequence[Example]) -> frozenset[Part]:
    """Parts of the model that no step computes with, once images and captions are encoded, and that take up a GPU's memory
    until then."""
    if device.type != "cuda":
        return frozenset()
    parts: dict[Part, bool] = {"vae": not settings.encodes_in_steps,
                               "text": not settings.encodes_text_in_steps and known_captions(examples) is not None}
    return frozenset(part for part, idle in parts.items() if idle)


def encoding_budget(part: Part, settings: Settings, model: FrozenModel, leased: LeasedModel,
                    network: AdapterNetwork) -> EncodingBudget:
    """Brings the part to the device that is about to encode, and says what that may take of a GPU: what is free, or what the
    memory budget leaves. Where that is less than it needs, the other parts wait on the CPU until `place_model` wants them."""
    def available() -> int:
        if model.device.type != "cuda":
            return sys.maxsize
        free = free_bytes(model.device)
        if settings.memory.memory_budget:
            held = [t for part in (*model.components.values(), model.vae.tensors) for t in part.values()]
            taken = sum(t.nbytes for t in (*held, *network.parameters()) if placement.device_of(t).type == model.device.type)
            taken += model.unet.layers.swap_bytes
            free = min(free, int(settings.memory.memory_budget * GIGABYTE) - taken - CONTEXT - WORKSPACES)
        return max(0, free)

    def budget(needed: int) -> int:
        model.rebind(leased.reload_parts({part}))
        if available() < needed:
            model.rebind(leased.offload_parts(placement.PARTS - {part}))
            torch.cuda.empty_cache()
        return available()
    return budget


@contextlib.contextmanager
def reachable_decoder(settings: Settings, model: FrozenModel, leased: LeasedModel,
                    network: AdapterNetwork) -> Iterator[Callable[[Size], None]]:
    """Yields what brings the VAE to the device with room to decode an image of a size (width, height). Where that is short, the
    rest of the model leaves it. Afterwards each part is where it was. Raises TrainingError where there is no room for it."""
    away = frozenset(part for part in placement.PARTS if any(
        placement.device_of(t).type != model.device.type for t in placement.tensors_of(leased.tensors, {part})))
    budget = encoding_budget("vae", settings, model, leased, network)

    def bring(size: Size) -> None:
        if budget(decoding_bytes(size)) < decoding_bytes(size):
            model.unet.layers.release()  # of copies that are no part of the leased model
            torch.cuda.empty_cache()

    try:
        yield bring
    finally:
        model.vae.layers.release()
        model.rebind(leased.offload_parts(away))
        model.rebind(leased.reload_parts(placement.PARTS - away))


def place_model(settings: Settings, model: FrozenModel, leased: LeasedModel, network: AdapterNetwork, batches: Batches,
                config: StepConfig, *, dtype: torch.dtype, report: Report, stop: Stop,
                pause: Pause, extra_captions: Sequence[str] = (), encode_prompts: Callable[[], None] = lambda: None) -> Text:
    """Bring the model to where the steps want it: the VAE leaves the device, captions are encoded, the text encoders leave it
    where they can, then the UNet comes, its weights held as `config` says. Returns the condition of the captions; the
    `extra_captions` are those of no training image, but needed between steps. `encode_prompts` is called while the text
    encoders are on the device."""
    away = config.parts_on_cpu
    model.rebind(leased.offload_parts(away & {"vae"}))
    if "text" in away:
        chunks = chunks_in_longest(batches.fixed_captions() or ())
        encoding_budget("text", settings, model, leased, network)(encoding_bytes(chunks))
    text = condition_of(settings, model, leased, network, batches, encode_now="text" in away, dtype=dtype, report=report,
                        stop=stop, pause=pause, extra_captions=extra_captions)
    if text.needs_encoders:
        away -= {"text"}
    if "text" in away:
        encode_prompts()
    model.rebind(leased.offload_parts(away))
    model.rebind(leased.reload_parts(placement.PARTS - away))
    if "text" not in away:
        encode_prompts()
    with translated("laying out the model's weights"):
        _lay_out(model, config)
    return text


def _lay_out(model: FrozenModel, config: StepConfig) -> None:
    """Hold the UNet's weights as the steps want them."""
    layers, swapped = model.unet.layers, frozenset(config.swapped)
    if config.base_dtype:
        for name, weight in quantised(model.unet.tensors, config.base_dtype, device=model.device,
                                      channels_last=config.channels_last):
            waits = block_of(name, len(weight.shape), swapped)
            layers.replace({name: weight.to(placement.CPU) if waits else weight})
    elif config.channels_last:
        layers.lay_out_channels_last()
    if config.swapped:
        layers.begin_swap(BlockSwap(config.swapped, model.device))
