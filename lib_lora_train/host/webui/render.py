"""The WebUI's own text-to-image, as a generation of its user: in the queue, with its settings, `<lora:…>` in the prompt."""

from __future__ import annotations

import contextlib
from typing import Any

from modules import call_queue, processing, scripts, sd_models, sd_samplers, shared
from PIL import Image

from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import HostError, Interrupted, translated
from lib_lora_train.host.port import RenderRequest
from lib_lora_train.host.webui.model_access import ModelAccess
from lib_lora_train.host.webui.progress import ProgressDisplay
from lib_lora_train.host.webui.queue import QueueLock


def render(access: ModelAccess, request: RenderRequest, *, stop: ShouldStop) -> list[Image.Image]:
    """See `Renderer.render`. Scripts of extensions do not run, nothing is saved."""
    if request.sampler not in sd_samplers.all_samplers_map:  # the WebUI would take another one
        raise HostError(f"The WebUI has no sampler {request.sampler!r}", remedy="use one of txt2img's")
    if request.checkpoint and request.checkpoint not in sd_models.checkpoint_aliases:  # it would stay with its own
        raise HostError(f"The WebUI has no checkpoint {request.checkpoint!r}", remedy="use a name of its list")
    display, images = ProgressDisplay(), []
    with contextlib.ExitStack() as generation:
        with display.queued():
            generation.enter_context(QueueLock(call_queue.queue_lock).held(stop=stop))
        generation.enter_context(display.running())
        generation.enter_context(translated("rendering"))
        if access.load() is None:
            raise HostError("No model is loaded", remedy="choose a checkpoint at the top of the page")
        if request.checkpoint:  # the WebUI restores its option only, and loads when it generates
            generation.callback(access.restored, access.identity(access.current()))
        shared.state.job_count = request.count
        for index in range(request.count):
            images.append(_image(request, access.current(), seed=request.seed + index))
            if stop() or display.interrupted():
                raise Interrupted("Rendering was stopped")
    return images


def _image(request: RenderRequest, sd_model: Any, *, seed: int) -> Image.Image:
    generation = processing.StableDiffusionProcessingTxt2Img(
        sd_model=sd_model, prompt=request.prompt, negative_prompt=request.negative_prompt, seed=seed,
        steps=request.steps, width=request.width, height=request.height, cfg_scale=request.cfg_scale,
        sampler_name=request.sampler, do_not_save_samples=True, do_not_save_grid=True,
        override_settings={"sd_model_checkpoint": request.checkpoint} if request.checkpoint else {})
    generation.scripts, generation.script_args = scripts.ScriptRunner(), ()  # empty; reForge asks it what there is
    with contextlib.closing(generation):
        return processing.process_images(generation).images[0]
