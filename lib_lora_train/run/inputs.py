"""What the steps are fed with, from a dataset and a leased model: latents, batches, and the condition of captions."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import ImageOps

from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.dataset.augment import scale_and_crop, to_samples
from lib_lora_train.dataset.buckets import buckets_for
from lib_lora_train.dataset.held_out import HeldOutImage, name_of
from lib_lora_train.dataset.images import read_image
from lib_lora_train.dataset.prefetch import reading_threads
from lib_lora_train.distributed import ProcessGroup
from lib_lora_train.errors import DatasetError, Interrupted, TrainingError, translated
from lib_lora_train.events import Report, Stage, Warned
from lib_lora_train.host.port import LeasedModel
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.inputs.batches import Batches, image_batch
from lib_lora_train.inputs.latent_files import LatentDisk
from lib_lora_train.inputs.latents import CachedLatents, FreshLatents, LatentSource
from lib_lora_train.inputs.masks import Masks
from lib_lora_train.inputs.text import CAPTIONS_AT_ONCE, DEFAULT_MAX_BYTES, MAX_BYTES_VARIED, TextCache
from lib_lora_train.inputs.vae_batches import EncodingBudget, VaeBatches, check_finite, encoding_bytes
from lib_lora_train.model.fingerprint import encoder_fingerprint
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.sd.text import Conditioning, Tokens
from lib_lora_train.run.callbacks import Pause, Stop
from lib_lora_train.run.planning import RunPlan
from lib_lora_train.settings import Settings
from lib_lora_train.settings.dataset_config import subsets_of
from lib_lora_train.training.condition import CachedText, Condition, TrainedText
from lib_lora_train.training.preservation import Preservation


def stage(name: str, report: Report, pause: Callable[[], bool] = lambda: True) -> Callable[[int, int], None]:
    """Reports progress; with `pause`, others get the model between two images too."""
    def progress(done: int, total: int) -> None:
        report(Stage(name, done, total))
        if done < total and not pause():
            raise Interrupted("The run was stopped while other work of the WebUI used the model")
    return progress


def latents_of(plan: RunPlan, model: FrozenModel, vae: Mapping[str, torch.Tensor], group: ProcessGroup, folder: Path | None, *,
               budget: EncodingBudget, report: Report, stop: Stop, pause: Pause) -> LatentSource:
    """Encoded images: once and kept, or anew at each step where augmentations change the pixels. `vae` are the host's
    tensors of it; in `folder` lies what is too much for the memory, until the source is closed."""
    settings, chosen, at_once = plan.settings, plan.settings.dataset, plan.settings.memory.vae_batch_size
    shared = {"device": model.device, "should_stop": lambda: bool(stop()), "group": group}
    with translated("encoding the pictures"):
        if settings.encodes_in_steps:
            # The memory plan counts what is encoded beside a step, so it does not follow what is free.
            fresh = FreshLatents.build(model.vae, plan.dataset, plan.placements, vae_batch_size=at_once or 1,
                                       on_progress=stage("Checking pictures", report, pause),
                                       warn=lambda text: report(Warned(text)), **shared)
            # Some are looked at before the first step, and until then the VAE may be where the host keeps it.
            budget(encoding_bytes(max((placement.bucket for placement in plan.placements), key=math.prod)) * (at_once or 1))
            return fresh
        disk = LatentDisk(vae_fingerprint=encoder_fingerprint(vae)) if chosen.cache_latents_to_disk else None
        return CachedLatents.build(model.vae, plan.dataset, plan.placements, disk=disk, folder=folder,
                                   seed=settings.optimizer.seed, vae_batch_size=at_once, budget=budget,
                                   on_progress=stage("Encoding pictures", report, pause), **shared)


def held_out_batches(images: Sequence[HeldOutImage], plan: RunPlan, model: FrozenModel, *, budget: EncodingBudget,
                     report: Report) -> dict[str, Batch]:
    """Held-out images of a plan by their name (`held_out.name_of`), each a batch of one; to be called while the VAE is on the
    device. What cannot be used is told and left out."""
    settings = plan.settings
    vae = VaeBatches(model.vae, device=model.device, batch_size=1, warn=lambda text: None,
                     budget=None if settings.encodes_in_steps else budget)
    found = {}
    for image in images:
        try:
            picture = read_image(image.example.path).crop(image.box)
            buckets = buckets_for(image.example.subset.dataset, sizes=model.architecture.family.sizes)
            placement = buckets.assign(*picture.size)
            samples = to_samples(scale_and_crop(ImageOps.mirror(picture) if image.mirrored else picture, placement))
            latents = vae.encode([samples], (False,))[0, 0]
            check_finite(latents[None], [image.example])
            name = name_of(image.example.path, plan.dataset.folder)
            found[name] = image_batch(latents, placement, caption=image.example.caption)
        except (DatasetError, TrainingError) as error:
            report(Warned(f"A held-out picture is left out. {error}"))
    return found


def batches_of(plan: RunPlan, source: LatentSource, group: ProcessGroup, *, factor: int, report: Report) -> Batches:
    """The batches of all processes together; `factor` pixels are a latent."""
    optimizer, chosen = plan.settings.optimizer, plan.settings.masks
    masks = Masks(source.dataset, source.placements, plan.masks, factor=factor, unmasked_weight=chosen.unmasked_weight,
                  prior_weight=chosen.masked_prior_preservation_weight, threads=reading_threads(),
                  warn=lambda text: report(Warned(text))) if plan.masks else None
    return Batches(
        source, group=group, masks=masks, seed=optimizer.seed, train_batch_size=optimizer.train_batch_size * group.world_size,
        prior_loss_weight=plan.settings.dataset.prior_loss_weight, steps=plan.schedule.steps,
        gradient_accumulation_steps=optimizer.gradient_accumulation_steps)


def preservation_of(settings: Settings) -> Preservation:
    """What of the model is to stay as it is."""
    chosen = settings.preservation
    triggers = {subset.dataset.trigger_word: None for subset in subsets_of(settings) if subset.dataset.trigger_word}
    return Preservation(kind=chosen.preservation, weight=chosen.preservation_weight, class_word=chosen.preservation_class,
                        trigger_words=tuple(triggers))


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """How captions become the condition, and whether the steps still need the text encoders for it.

    evaluated       the condition of texts that are looked at between steps, the `extra_captions` among them: what it encodes it
                    keeps apart and one by one, so that no step's numbers depend on it
    """

    condition: Condition
    evaluated: Condition
    needs_encoders: bool


def condition_of(settings: Settings, model: FrozenModel, leased: LeasedModel, network: AdapterNetwork, batches: Batches, *,
                 encode_now: bool, dtype: torch.dtype, report: Report, stop: Stop, pause: Pause,
                 extra_captions: Sequence[str] = ()) -> Text:
    """How a batch's captions become the UNet's condition: looked up while the text encoders are frozen, else computed. With
    `encode_now` all captions and `extra_captions` are encoded now, since the text encoders are about to leave the device; else
    each when it is met, so that the first step comes sooner."""
    clip_skip = settings.captions.clip_skip or leased.clip_skip
    adapters = {component: layers for component, layers in network.adapters().items() if component != "unet"}
    if settings.encodes_text_in_steps:
        for component, unused in model.text.unused_layers(clip_skip).items():
            network.freeze_below(component, unused)  # no gradient ever reaches them: nor must weight decay
        trained = TrainedText(model.text, clip_skip=clip_skip, adapters=network.training_adapters(), dtype=dtype,
                              checkpointing=settings.memory.gradient_checkpointing)
        return Text(trained, trained, needs_encoders=True)

    class Adapted:
        """The text encoders with the frozen layers and words of a LoRA that is continued."""

        tokenize = staticmethod(functools.partial(model.text.tokenize, adapters=adapters))

        @staticmethod
        def encode(batch: list[Tokens], *, clip_skip: int, dtype: torch.dtype) -> Conditioning:
            return model.text.encode(batch, clip_skip=clip_skip, dtype=dtype, adapters=adapters)

    captions = batches.fixed_captions()
    if captions is not None:
        captions = (*captions, *preservation_of(settings).captions(captions))
    cache = TextCache(Adapted, clip_skip=clip_skip, one_by_one=True, lru=captions is None, kept_as=dtype,
                      max_bytes=MAX_BYTES_VARIED if captions is None else DEFAULT_MAX_BYTES)
    extra = TextCache(Adapted, clip_skip=clip_skip, one_by_one=True, kept_as=dtype)
    needs_encoders = True
    if captions is not None and encode_now:
        with translated("encoding the captions"):
            for each, texts, at_once in ((cache, captions, CAPTIONS_AT_ONCE), (extra, extra_captions, 1)):
                each.fill((*texts, ""), batch_size=at_once, on_progress=stage("Encoding captions", report, pause),
                          should_stop=lambda: bool(stop()))
        needs_encoders = not (cache.holds(captions) and extra.holds(extra_captions))
    return Text(CachedText(cache), CachedText(extra), needs_encoders=needs_encoders)
