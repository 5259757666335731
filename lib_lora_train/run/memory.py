"""How a run's steps fit into the memory of its device: the plan, and what it and the encoding want done to the lent model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from lib_lora_train.adapters.file import read_ranks
from lib_lora_train.adapters.network import LoRANetwork
from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import translated
from lib_lora_train.events import Report
from lib_lora_train.host.port import Host, LeasedModel
from lib_lora_train.inputs.batches import Batches
from lib_lora_train.inputs.overflow import DiskOverflow
from lib_lora_train.inputs.vae_batches import Room, free_bytes
from lib_lora_train.memory.budget import attention_kernel, budget_of, chunks_of, largest, shapes_of
from lib_lora_train.memory.dry_run import Base, Layer, Part, Scene, Way, layers_for, layers_of
from lib_lora_train.memory.plan import CONTEXT, GIGABYTE, WORKSPACES, MemoryPlan, Wishes, choose
from lib_lora_train.model.architecture import Architecture
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.quantised import quantised
from lib_lora_train.run.inputs import Text, condition_of
from lib_lora_train.run.planning import Preparation
from lib_lora_train.settings import Settings
from lib_lora_train.training.loop import Pause, Stop


def memory_plan(settings: Settings, preparation: Preparation, model: FrozenModel, borrowed: LeasedModel, network: LoRANetwork, *,
                dtype: torch.dtype, remembered: Base, should_stop: ShouldStop | None) -> MemoryPlan:
    """How the steps on the lent model are made so that they fit into the memory there is; `remembered` is what a run that goes
    on has computed on. Raises Interrupted."""
    return planned(settings, preparation, tensors=borrowed.tensors, architecture=model.architecture,
                   device=model.device, dtype=dtype, layers=layers_of(network), ours=network.parameters(),
                   remembered=remembered, should_stop=should_stop)


def planned(settings: Settings, preparation: Preparation, *, tensors: Mapping[str, torch.Tensor], architecture: Architecture,
            device: torch.device, dtype: torch.dtype, layers: Sequence[Layer], ours: Sequence[torch.Tensor] = (),
            remembered: Base = "", should_stop: ShouldStop | None = None) -> MemoryPlan:
    """The plan for a model of these `tensors` (checkpoint names), lent or on the meta device; `ours` is what is on the device
    already for the LoRA. Raises Interrupted."""
    memory, batch, rates = settings.memory, settings.optimizer.train_batch_size, settings.rates
    # The largest bucket: it needs the most memory, and the resolution itself may be no bucket's size.
    width, height = largest(preparation.plan.buckets)
    trained = tuple(dataclasses.replace(layer, trained=layer.trained and bool(rates[layer.target.component != "unet"]))
                    for layer in layers)
    scene = Scene(
        width, height, dtype, trained, device_type=device.type, attention=attention_kernel(device, dtype),
        chunks=chunks_of(example.caption for example in preparation.dataset.examples),
        min_snr_gamma=settings.loss.min_snr_gamma, text_recomputed=memory.gradient_checkpointing,
        shapes=shapes_of(preparation.plan.buckets, batch),
        encoded=min(memory.vae_batch_size or 1, batch) if settings.encodes_in_steps else 0)
    there = [t for t in (*tensors.values(), *ours) if t.device.type in (device.type, "meta")]
    budget = budget_of(memory.memory_budget, device, ours=_size(there))
    return choose(tensors, architecture, scene, batch=batch, wishes=Wishes.of(memory), budget=budget,
                  aside=unneeded(settings, device), remembered=remembered, should_stop=should_stop)


def planned_layers(settings: Settings, tensors: Mapping[str, torch.Tensor], architecture: Architecture) -> tuple[Layer, ...]:
    """The layers that a run with these settings will have, those of a LoRA that is continued with the file's ranks. Raises
    LoraFileError."""
    network = settings.network
    ranks = read_ranks(Path(network.network_weights)) if network.network_weights else {}
    text = not network.network_train_unet_only or any(key.startswith("lora_te") for key in ranks)
    layers = layers_for(tensors, architecture, rank=network.network_dim, text_encoder=text)
    return tuple(dataclasses.replace(layer, rank=ranks.get(layer.target.key, layer.rank)) for layer in layers)


def unneeded(settings: Settings, device: torch.device) -> frozenset[Part]:
    """Parts of the model that no step computes with, once pictures and captions are encoded, and that take up a card's
    memory until then."""
    if device.type != "cuda":
        return frozenset()
    captions = settings.captions
    varied = captions.shuffle_caption or captions.caption_tag_dropout_rate
    text = not settings.rates[1] and not varied
    parts: dict[Part, bool] = {"vae": not settings.encodes_in_steps, "text": text}
    return frozenset(part for part, idle in parts.items() if idle)


def room_for_encoding(settings: Settings, model: FrozenModel, host: Host, network: LoRANetwork) -> Room:
    """What encoding pictures may take of a card: what is free, or what the memory budget leaves. Where that is less than it
    needs, UNet and text encoders wait off the card until `settle`."""
    def there() -> int:
        free = free_bytes(model.device)
        if settings.memory.memory_budget:
            lent = [t for part in (*model.components.values(), model.vae.tensors) for t in part.values()]
            taken = _size(t for t in (*lent, *network.parameters()) if t.device.type == model.device.type)
            free = min(free, int(settings.memory.memory_budget * GIGABYTE) - taken - CONTEXT - WORKSPACES)
        return max(0, free)

    def room(needed: int) -> int:
        if there() < needed:
            model.take(host.offload_parts({"unet", "text"}))
            torch.cuda.empty_cache()
        return there()
    return room


def settle(settings: Settings, model: FrozenModel, host: Host, borrowed: LeasedModel, network: LoRANetwork, batches: Batches,
           overflow: DiskOverflow, way: Way, *, dtype: torch.dtype, report: Report, stop: Stop, pause: Pause) -> Text:
    """Bring the model to where the steps want it: the VAE goes, captions are encoded, the text encoders go where they can, and
    the UNet's weights are held as the plan says."""
    if "vae" in way.aside:
        model.take(host.offload_parts({"vae"}))
    # What made room for encoding.
    model.take(host.reload_parts({"text", "unet"} - ({"unet"} & way.aside)))
    text = condition_of(settings, model, borrowed, network, batches, overflow, ahead="text" in way.aside, dtype=dtype,
                        report=report, stop=stop, pause=pause)
    if "text" in way.aside and text.known:
        model.take(host.offload_parts({"text"}))
    if way.base:
        with translated("holding the model in eight bits"):
            if "unet" in way.aside:
                model.take(host.offload_parts({"unet"}))
            model.unet.layers.replace(dict(quantised(model.unet.tensors, way.base, device=model.device,
                                                     channels_last=way.channels_last)))
    elif way.channels_last:
        model.unet.layers.lay_out_channels_last()
    return text


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
