"""A test-only extension of the WebUI: looks at what the page and the API do not show, and breaks things on request."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import Body, FastAPI
from modules import call_queue, devices, extra_networks, processing, script_callbacks, sd_models, shared
from PIL import Image


def _beside(name: str) -> Any:
    """A file of the probe that the WebUI does not take for a script."""
    spec = importlib.util.spec_from_file_location(f"probe_{name}", Path(__file__).parents[1] / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


injection = _beside("injection")
pretended_card = _beside("pretended_card")
_healing: list[Callable[[], None]] = []
_held = threading.Event()
_discarded: list[Any] = []
_session: list[str] | None = None
_copied: list[int] = []
_places: dict[str, list[list[str]]] = {"training": [], "painting": []}


def model() -> dict[str, Any]:
    """A hash for every tensor of the loaded model: bytes, shape, dtype, requires_grad; and any gradient there is."""
    with call_queue.queue_lock:
        tensors = _all_tensors(sd_models.model_data.sd_model)
        return {
            "digests": {name: _digest(tensor) for name, tensor in tensors.items()},
            "gradients": [name for name, tensor in tensors.items() if tensor.grad is not None]}


def lent() -> dict[str, Any]:
    """What the host lends, and whether it is the WebUI's own memory."""
    from lib_lora_train.host.webui.host import HOST

    sd_model = sd_models.model_data.sd_model
    own = {_storage(tensor) for tensor in sd_model.state_dict(keep_vars=True).values()}
    with HOST.lease() as borrowed:
        model = _frozen(borrowed)
        functional = [t for component in (*model.components.values(), model.vae.tensors) for t in component.values()]
        return {
            "names": sorted(borrowed.tensors), "family": model.architecture.family.name,
            "checkpoint": vars(borrowed.checkpoint), "clip_skip": borrowed.clip_skip,
            "unet_heads": borrowed.hints.unet_heads, "text_heads": borrowed.hints.text_heads,
            "prediction_type": borrowed.hints.prediction_type, "latent_scale": borrowed.hints.latent_scale,
            "foreign": sum(_storage(t) not in own for t in [*borrowed.tensors.values(), *functional]),
            "zero_terminal_snr": borrowed.hints.zero_terminal_snr,
            "schedule_difference": _schedule_difference(model),
            "job": shared.state.job, "locked": not call_queue.queue_lock.acquire(blocking=False),
            "merged": _merged()}


def parity(name: str = Body(""), prompt: str = Body(""), multiplier: float = Body(1.0)) -> dict[str, float]:
    """Our prediction with a LoRA file's weights against the WebUI's with the same file; max|a-b| / max|b|."""
    from lib_lora_train.adapters import file
    from lib_lora_train.adapters.network import AdapterNetwork
    from lib_lora_train.adapters.targets import find_targets
    from lib_lora_train.host.webui.host import HOST

    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, 4, 16, 24, generator=generator)
    t = torch.tensor([5, 400, 980])
    with HOST.lease() as borrowed, torch.no_grad():
        model = _frozen(borrowed)
        base = _predict(model, prompt, x, t, {}, borrowed.clip_skip)
        ours = base
        if name:
            tensors = file.load(HOST.lora_folder / f"{name}.safetensors").tensors
            targets = find_targets(model.components, family=model.architecture.family,
                                   text_encoder=any(".text_model" in k or "lora_te" in k for k in tensors))
            network = AdapterNetwork.continued(targets, tensors, seed=0)
            network.set_multiplier(multiplier)
            ours = _predict(model, prompt, x, t, network.adapters(), borrowed.clip_skip)
    with call_queue.queue_lock, torch.no_grad(), devices.autocast():
        sd_model, networks = shared.sd_model, _networks()
        networks.load_networks([name] if name else [], [multiplier], [multiplier], [None])
        condition = sd_model.get_learned_conditioning([prompt] * len(x))
        theirs = sd_model.apply_model(x, t, condition)
        if isinstance(condition, dict):
            condition = condition["crossattn"]
    return {"difference": _relative(ours[0], theirs), "effect": _relative(base[0], ours[0]),
            "text": _relative(ours[1], condition), "text_effect": _relative(base[1], ours[1])}


def lora(name: str) -> dict[str, Any]:
    """What the Lora extension makes of a file: its layers, the keys it could not place, how many layers are changed, and
    {word: (number of vectors, channels)} of its embeddings."""
    networks = _networks()
    with call_queue.queue_lock, _debug_messages() as messages:
        networks.list_available_networks()
        loaded = networks.load_network(name, networks.available_networks[name])
    embeddings = {word: [one.vectors, one.shape] for word, one in loaded.bundle_embeddings.items()}
    return {"modules": sorted(loaded.modules), "complaints": [m for m in messages if "match" in m], "merged": _merged(),
            "embeddings": embeddings}


def sample(prompt: str = Body(""), negative_prompt: str = Body(""), width: int = Body(64), height: int = Body(64),
           steps: int = Body(4), cfg_scale: float = Body(7.0), seed: int = Body(1)) -> dict[str, str]:
    """An image by our own sampler on the leased model, as base64 of a PNG."""
    from lib_lora_train.host.webui.host import HOST
    from lib_lora_train.model.sampler import SampleRequest, sample_batch, to_image

    request = SampleRequest(prompt, negative_prompt, width, height, steps, cfg_scale, seed)
    with HOST.lease() as borrowed:
        model = _frozen(borrowed)
        image = to_image(model, sample_batch(model, [request], clip_skip=borrowed.clip_skip))
    return {"image": _png(image)}


def render(prompt: str = Body(""), negative_prompt: str = Body(""), width: int = Body(64), height: int = Body(64),
           steps: int = Body(4), cfg_scale: float = Body(7.0), seed: int = Body(1), sampler: str = Body("Euler"),
           count: int = Body(1), checkpoint: str = Body(""), leased: bool = Body(False)) -> dict[str, Any]:
    """What the host renders, as base64 of PNGs; `error` where it refuses. `leased`: while the model is leased."""
    from lib_lora_train.errors import LoraTrainError
    from lib_lora_train.host.port import RenderRequest
    from lib_lora_train.host.webui.host import HOST

    request = RenderRequest(prompt, negative_prompt, width, height, steps, cfg_scale, seed, sampler, count, checkpoint)
    try:
        with HOST.lease() if leased else contextlib.nullcontext():
            return {"images": [_png(image) for image in HOST.render(request)]}
    except LoraTrainError as error:
        return {"error": type(error).__name__}


def tokens(text: str = Body("", embed=True)) -> dict[str, Any]:
    """Our tokens of a text, and the WebUI's, chunk by chunk."""
    from lib_lora_train.host.webui.host import HOST

    with HOST.lease() as borrowed:
        ours = _frozen(borrowed).text.tokenize(text).encoders[0]
    chunks, _ = shared.sd_model.cond_stage_model.tokenize_line(text)
    return {"ours": [list(chunk) for chunk in ours], "theirs": [chunk.tokens for chunk in chunks]}


def fail(step: int = Body(1, embed=True)) -> dict[str, str]:
    """Let the training loop meet an error of ours in its `step`-th loss from now."""
    from lib_lora_train.training import train_step

    original, left = train_step.denoising_loss, [step]

    def breaking(*args: Any, **kwargs: Any) -> torch.Tensor:
        if args[0].device.type == "meta":  # the estimate runs the step on shapes alone
            return original(*args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            train_step.denoising_loss = original
            raise RuntimeError("the probe broke this step")
        return original(*args, **kwargs)

    train_step.denoising_loss = breaking
    return {}


def inject(place: str = Body(""), fault: str = Body("")) -> dict[str, str]:
    """Let a place of tests/injection.py fail once, until `heal`."""
    from lib_lora_train.host.webui.host import HOST

    chosen = next(one for one in injection.PLACES if one.name == place)
    _healing.append(injection.inject(chosen, injection.FAULTS[fault], HOST))
    return {}


def heal() -> dict[str, str]:
    """Undo `inject`."""
    while _healing:
        _healing.pop()()
    return {}


def surroundings() -> dict[str, Any]:
    """Everything that a training must leave as it was, besides the tensors: a digest or a count each."""
    with call_queue.queue_lock:
        sd_model = sd_models.model_data.sd_model
        numbers = np.random.get_state()
        return {
            "hooks": {name: [len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks)]
                      for name, m in sd_model.named_modules()},
            "training": [name for name, m in sd_model.named_modules() if m.training],
            "merged": _merged(), "loras": [network.name for network in _networks().loaded_networks],
            "options": json.dumps(shared.opts.data, sort_keys=True, default=str),
            "torch": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
            "random": hashlib.sha256(repr(random.getstate()).encode()).hexdigest(),
            "numpy": hashlib.sha256(repr((numbers[0], numbers[1].tobytes(), *numbers[2:])).encode()).hexdigest(),
            "threads": torch.get_num_threads(), "dtype": str(torch.get_default_dtype()),
            "job": shared.state.job, "interrupted": shared.state.interrupted, "lowvram": bool(sd_model.lowvram)}


def watch() -> dict[str, str]:
    """From now on, remember which files the process opens and how much of a model that is trained on is not the WebUI's own."""
    from lib_lora_train.run import job

    global _session
    if _session is None:
        sys.addaudithook(lambda event, arguments: _session.append(str(arguments[0])) if event == "open" else None)
        original = job.train

        def watched(model: Any, *arguments: Any, **named: Any) -> Any:
            try:
                return original(model, *arguments, **named)
            finally:
                _copied.append(_bytes_of_ours(model))

        job.train = watched
    _session = []
    _copied.clear()
    return {}


def watched() -> dict[str, Any]:
    """What was seen since `watch`."""
    return {"opened": _session, "copied": _copied}


def pretend_card() -> dict[str, str]:
    """From now on the model lies on a GPU, and the memory plan wants everything off it that a step does not need."""
    from lib_lora_train.host import placement
    from lib_lora_train.run import memory
    from lib_lora_train.training import train_step

    # What the WebUI computes on is the GPU, so the CPU needs another name.
    card, loss = pretended_card.PretendedCard(gpu=torch.device("cpu"), cpu=torch.device("meta")), train_step.denoising_loss
    placement.device_of, placement.copy_to, placement.CPU = card.device_of, card.copy_to, card.cpu
    memory.parts_not_needed = lambda *arguments, **named: frozenset({"vae", "text"})

    def lies_where(doing: str) -> None:
        from lib_lora_train.host.webui.host import HOST

        tensors = HOST.access.collect(sd_models.model_data.sd_model)
        _places[doing].append([part for part in placement.PREFIXES if all(
            card.device_of(tensor) == card.cpu for tensor in placement.tensors_of(tensors, {part}))])

    def seen(*arguments: Any, **named: Any) -> torch.Tensor:
        if arguments[0].device.type != "meta":  # the estimate runs the step on shapes alone
            lies_where("training")
        return loss(*arguments, **named)

    train_step.denoising_loss = seen
    script_callbacks.on_cfg_denoiser(lambda _: lies_where("painting"))
    return {}


def places() -> dict[str, list[list[str]]]:
    """Which parts were off the GPU in each step and at each step of a generation, since the last question."""
    found = {doing: list(parts) for doing, parts in _places.items()}
    for parts in _places.values():
        parts.clear()
    return found


def hold() -> dict[str, str]:
    """Occupy the WebUI's queue, as a long generation would, until `release`."""
    taken = threading.Event()

    def work() -> None:
        with call_queue.queue_lock:
            taken.set()
            _held.wait(60)

    _held.clear()
    threading.Thread(target=work, daemon=True).start()
    taken.wait(60)
    return {}


def release() -> dict[str, str]:
    _held.set()
    return {}


def change_weights() -> dict[str, str]:
    """Change one weight of the loaded model in place and back, past the queue, as a careless extension might."""
    weight = sd_models.model_data.sd_model.model.diffusion_model.out[2].bias
    with torch.no_grad():
        weight.add_(1).sub_(1)
    return {}


def discard() -> dict[str, str]:
    """Take the model away at the next turn in the queue, as an extension that needs the GPU's memory might."""
    def work() -> None:
        with call_queue.queue_lock:
            _discarded.append(sd_models.model_data.sd_model)
            sd_models.model_data.sd_model = None

    threading.Thread(target=work, daemon=True).start()
    return {}


def put_back() -> dict[str, str]:
    """Put the discarded model back."""
    with call_queue.queue_lock:
        sd_models.model_data.sd_model = _discarded.pop()
    return {}


def refresh() -> dict[str, str]:
    """Let the host renew the list of LoRAs, while nothing is lent."""
    from lib_lora_train.host.webui.host import HOST

    HOST.refresh_loras()
    return {}


def reload() -> dict[str, str]:
    """Press "Reload UI"."""
    shared.state.request_restart()
    return {}


def state() -> dict[str, bool]:
    """Whether a model is loaded; whether the WebUI holds text conditions of an earlier prompt."""
    return {"loaded": sd_models.model_data.sd_model is not None,
            "conditions": processing.StableDiffusionProcessing.cached_c[0] is not None}


def refusals() -> dict[str, str]:
    """What the host says to models and switches that it cannot train with, each pretended for a moment."""
    from lib_lora_train.errors import LoraTrainError
    from lib_lora_train.host.webui.host import HOST

    sd_model = sd_models.model_data.sd_model
    unet = sd_model.model.diffusion_model
    stem, gate = unet.input_blocks[0][0], unet.middle_block[1].proj_in
    with torch.no_grad():
        nine = torch.nn.Parameter(torch.zeros(stem.weight.shape[0], 9, 3, 3))
        fp8 = torch.nn.Parameter(gate.weight.to(torch.float8_e4m3fn), requires_grad=False)
    pretended = {
        "lowvram": (shared.cmd_opts, "lowvram", True), "no model": (sd_models.model_data, "sd_model", None),
        "sd3": (sd_model, "is_sd3", True), "ssd": (sd_model, "is_ssd", True),
        "edit": (sd_model, "cond_stage_key", "edit"), "inpainting": (stem, "weight", nine),
        "fp8": (gate, "weight", fp8)}
    said = {}
    for case, (owner, name, value) in pretended.items():
        original = getattr(owner, name)
        setattr(owner, name, value)
        try:
            with HOST.lease():
                said[case] = ""
        except LoraTrainError as error:
            said[case] = str(error)
        finally:
            setattr(owner, name, original)
    return said


def captioners() -> dict[str, Any]:
    """What the host captions with, what of it is missing, and where each of the WebUI's own models lies."""
    from modules import deepbooru

    from lib_lora_train.host.webui.host import HOST
    from lib_lora_train.tagging.sources import sources

    blip, danbooru = shared.interrogator.blip_model, deepbooru.model.model
    return {"missing": {source.name: source.missing() for source in sources(HOST)}, "folder": str(HOST.taggers_folder),
            "blip": blip and str(next(blip.parameters()).device), "dtype": str(shared.interrogator.dtype),
            "deepdanbooru": danbooru and str(next(danbooru.parameters()).device)}


def describe(name: str = Body(""), images: tuple[str, ...] = Body(()), threshold: float = Body(0.5)) -> dict[str, Any]:
    """What a captioner of the host says of images; `error` where it cannot be opened, `busy` for the queue meanwhile."""
    from lib_lora_train.errors import LoraTrainError
    from lib_lora_train.host.webui.host import HOST
    from lib_lora_train.tagging.options import TagOptions
    from lib_lora_train.tagging.sources import find_source, sources

    decoded = [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") for data in images]
    try:
        source = find_source(name, sources(HOST))
        with source.open(TagOptions(general_threshold=threshold), devices.device) as captioner:
            busy = not call_queue.queue_lock.acquire(blocking=False)
            if not busy:
                call_queue.queue_lock.release()
            found = captioner.describe(decoded)
    except LoraTrainError as error:
        return {"error": str(error)}
    return {"busy": busy, "texts": [one.text for one in found], "tags": [[list(tag) for tag in one.tags] for one in found]}


def install(_: Any, app: FastAPI) -> None:
    for function in (model, lent, lora, state, refusals, surroundings, captioners, watched, places):
        app.add_api_route(f"/probe/{function.__name__}", function, methods=["GET"])
    for function in (parity, sample, render, tokens, fail, hold, release, change_weights, reload,
                     refresh, discard, put_back, inject, heal, describe, watch, pretend_card):
        app.add_api_route(f"/probe/{function.__name__}", function, methods=["POST"])


def _png(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def _all_tensors(sd_model: Any) -> dict[str, torch.Tensor]:
    """Every tensor of the loaded model. Forge's is no module, but holds three."""
    if not hasattr(sd_model, "forge_objects"):
        return sd_model.state_dict(keep_vars=True)
    held = sd_model.forge_objects
    modules = (held.unet.model, held.clip.cond_stage_model, held.vae.first_stage_model)
    return {f"{number}.{name}": tensor for number, module in enumerate(modules)
            for name, tensor in module.state_dict(keep_vars=True).items()}


def _digest(tensor: torch.Tensor) -> str:
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{hashlib.sha256(content).hexdigest()} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}"


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes_of_ours(model: Any) -> int:
    """Bytes that a frozen model computes on and that are not the WebUI's own memory."""
    own = {_storage(tensor) for tensor in sd_models.model_data.sd_model.state_dict(keep_vars=True).values()}
    tensors = [tensor for part in (*model.components.values(), model.vae.tensors) for tensor in part.values()]
    return sum(tensor.nbytes for tensor in tensors if _storage(tensor) not in own)


def _schedule_difference(model: Any) -> float:
    """Of our schedule from the one that the WebUI paints with."""
    sd_models.apply_alpha_schedule_override(sd_models.model_data.sd_model)
    return float((model.schedule.alphas_cumprod - sd_models.model_data.sd_model.alphas_cumprod).abs().max())


def _frozen(borrowed: Any) -> Any:
    from lib_lora_train.model import frozen

    return frozen.build(borrowed.tensors, hints=borrowed.hints, tokenizers=borrowed.tokenizers,
                        comma_padding_backtrack=borrowed.comma_padding_backtrack)


def _predict(model: Any, prompt: str, x: torch.Tensor, t: torch.Tensor, adapters: Any, clip_skip: int) -> Any:
    from lib_lora_train.model.sd.text import size_vector

    tokens = model.text.tokenize(prompt, adapters=adapters)
    condition = model.text.encode([tokens] * len(x), clip_skip=clip_skip, adapters=adapters)
    size = (1024, 1024)  # what the WebUI assumes for a prompt alone
    y = None if condition.pooled is None else size_vector(condition.pooled, original=size, crop=(0, 0), target=size)
    return model.unet(x, t, condition.context, y, adapters=adapters.get("unet", {})), condition.context


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _networks() -> Any:
    return sys.modules[type(extra_networks.extra_network_registry["lora"]).__module__].networks


def _merged() -> int:
    layers = sd_models.model_data.sd_model.network_layer_mapping.values()
    return sum(getattr(layer, "network_current_names", ()) != () for layer in layers)


@contextlib.contextmanager
def _debug_messages() -> Iterator[list[str]]:
    """What the root logger is told meanwhile, from level DEBUG."""
    messages: list[str] = []
    root = logging.getLogger()
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield messages
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


script_callbacks.on_app_started(install)
