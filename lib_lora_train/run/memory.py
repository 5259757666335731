"""A run's memory: the plan of its steps, and where the parts of the leased model lie while it encodes and trains."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.errors import translated
from lib_lora_train.events import Report
from lib_lora_train.host.port import Host, LeasedModel
from lib_lora_train.inputs.batches import Batches
from lib_lora_train.inputs.vae_batches import Room, free_bytes
from lib_lora_train.memory.step_config import Part, StepConfig
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.ops.quantised import quantised
from lib_lora_train.run.callbacks import Pause, Stop
from lib_lora_train.run.inputs import condition_of
from lib_lora_train.settings import Settings
from lib_lora_train.training.condition import Condition

CONTEXT, WORKSPACES, GIGABYTE = 420 << 20, 64 << 20, 1 << 30


def parts_not_needed(settings: Settings, device: torch.device) -> frozenset[Part]:
    """Parts of the model that no step computes with, once images and captions are encoded, and that take up a GPU's memory
    until then."""
    if device.type != "cuda":
        return frozenset()
    captions = settings.captions
    varied = captions.shuffle_caption or captions.caption_tag_dropout_rate
    parts: dict[Part, bool] = {"vae": not settings.encodes_in_steps, "text": not settings.rates[1] and not varied}
    return frozenset(part for part, idle in parts.items() if idle)


def room_for_encoding(settings: Settings, model: FrozenModel, host: Host, network: AdapterNetwork) -> Room:
    """What encoding images may take of a GPU: what is free, or what the memory budget leaves. Where that is less than it
    needs, UNet and text encoders wait on the CPU until `place_model`."""
    def available() -> int:
        free = free_bytes(model.device)
        if settings.memory.memory_budget:
            leased = [t for part in (*model.components.values(), model.vae.tensors) for t in part.values()]
            taken = _size(t for t in (*leased, *network.parameters()) if t.device.type == model.device.type)
            free = min(free, int(settings.memory.memory_budget * GIGABYTE) - taken - CONTEXT - WORKSPACES)
        return max(0, free)

    def room(needed: int) -> int:
        if available() < needed:
            model.rebind(host.offload_parts({"unet", "text"}))
            torch.cuda.empty_cache()
        return available()
    return room


def place_model(settings: Settings, model: FrozenModel, host: Host, leased: LeasedModel, network: AdapterNetwork, batches: Batches,
                config: StepConfig, *, dtype: torch.dtype, report: Report, stop: Stop, pause: Pause) -> Condition:
    """Bring the model to where the steps want it: the VAE leaves the device, captions are encoded, the text encoders leave it
    where they can, and the UNet's weights are held as `config` says. Returns the condition of the captions."""
    if "vae" in config.parts_on_cpu:
        model.rebind(host.offload_parts({"vae"}))
    # What made room for encoding.
    model.rebind(host.reload_parts({"text", "unet"} - ({"unet"} & config.parts_on_cpu)))
    text = condition_of(settings, model, leased, network, batches, encode_now="text" in config.parts_on_cpu, dtype=dtype,
                        report=report, stop=stop, pause=pause)
    if "text" in config.parts_on_cpu and not text.needs_encoders:
        model.rebind(host.offload_parts({"text"}))
    if config.base_dtype:
        with translated("holding the model in eight bits"):
            if "unet" in config.parts_on_cpu:
                model.rebind(host.offload_parts({"unet"}))
            model.unet.layers.replace(dict(quantised(model.unet.tensors, config.base_dtype, device=model.device,
                                                     channels_last=config.channels_last)))
    elif config.channels_last:
        model.unet.layers.lay_out_channels_last()
    return text.condition


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Stub:
    warning, text = "", ""
    def __init__(self, config): self.config = config
    def measured(self, size): return ""


def memory_plan(plan, model, leased, network, *, dtype):
    s = plan.settings
    base = {"as they are": "", "int8": "int8", "fp8": "fp8"}[s.memory.base_weights]
    return _Stub(StepConfig(microbatch=s.optimizer.train_batch_size, base_dtype=base, parts_on_cpu=parts_not_needed(s, model.device),
                 channels_last=s.memory.channels_last == "on",
                 checkpointed=frozenset(u for u in model.unet.checkpointable if u.rpartition(".")[0] not in model.unet.checkpointable) if s.memory.gradient_checkpointing else frozenset()))
