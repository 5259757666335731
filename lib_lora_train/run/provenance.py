"""What a LoRA file says about its own making: kohya's metadata from the parts of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence

from lib_lora_train.adapters.metadata import TrainingMetadata, describe
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.dataset.examples import Example
from lib_lora_train.host.port import LeasedModel
from lib_lora_train.model.family import training_sizes
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.run.optimizing import optimizer_name
from lib_lora_train.run.planning import RunPlan
from lib_lora_train.run.selection import module_of
from lib_lora_train.settings import flat, resolution_of
from lib_lora_train.settings.dataset_config import SubsetSettings, subsets_of
from lib_lora_train.settings.network import BLOCK_RATES, BLOCK_SIZES, LORA_PLUS
from lib_lora_train.settings.network_checks import unused_of_kind, unused_of_network


class Provenance:
    """Knows a run from its start; `metadata` describes a file of it."""

    def __init__(self, plan: RunPlan, model: FrozenModel, leased: LeasedModel, network: AdapterNetwork, *,
                 started_at: float) -> None:
        self._plan, self._model, self._leased, self._network = plan, model, leased, network
        self.started_at = started_at

    def metadata(self, name: str, *, step: int, epoch: int) -> dict[str, str]:
        """The metadata of `name`.safetensors as it is after `step`."""
        plan, settings, model, network = self._plan, self._plan.settings, self._model, self._network
        checkpoint, family = self._leased.checkpoint, model.architecture.family
        schedule = plan.schedule
        return describe(TrainingMetadata(
            family=family, v_prediction=model.schedule.prediction_type == "v_prediction",
            zero_terminal_snr=model.architecture.zero_terminal_snr, resolution=plan.resolution,
            dim=network.usual_size[0], alpha=network.usual_size[1], network_module=network.kind.network_module,
            network_args={**network.arguments(), **self._arguments()},
            optimizer=optimizer_name(settings),
            steps=step, epoch=epoch, total_epochs=schedule.epochs, total_steps=schedule.steps,
            batches_per_epoch=schedule.batches_per_epoch, batch_size=settings.optimizer.train_batch_size,
            processes=plan.processes, started_at=self.started_at, finished_at=time.time(),
            clip_skip=(settings.captions.clip_skip or self._leased.clip_skip) if model.text.uses_clip_skip else None,
            checkpoint_name=checkpoint.name, checkpoint_legacy_hash=checkpoint.legacy_hash or None,
            checkpoint_sha256=checkpoint.sha256 or None, vae_name=checkpoint.vae_name or None,
            dataset_dirs=plan.dataset.dataset_dirs(), reg_dataset_dirs=plan.dataset.dataset_dirs(regularisation=True),
            tag_frequency=plan.dataset.tag_frequency(), datasets=_datasets(plan),
            buckets=dict(schedule.buckets) if settings.dataset.enable_bucket else None,
            aspect_error=plan.aspect_error, settings=self._written()), name)

    def _arguments(self) -> dict[str, str]:
        """The settings that kohya's network_args hold, where they are set and have an effect."""
        chosen = self._plan.settings.network
        names = ("rank_dropout", "module_dropout", *LORA_PLUS, *BLOCK_SIZES, *BLOCK_RATES, "block_lr_zero_threshold")
        unused = {name for name, _ in (*unused_of_network(chosen), *unused_of_kind(module_of(self._network.kind)[0]))}
        return {name: str(value) for name in names if name not in unused and (value := getattr(chosen, name))}

    def _written(self) -> dict[str, object]:
        """The settings as kohya writes them: what is switched off is None, what was chosen by itself is what it became."""
        values: dict[str, object] = dict(flat(self._plan.settings))
        optimizer = self._plan.settings.optimizer
        values["unet_lr"] = optimizer.unet_lr or optimizer.learning_rate
        values["text_encoder_lr"] = None if self._plan.settings.network.network_train_unet_only else optimizer.text_encoder_lr
        # Of folders with words of their own all are told.
        triggers = dict.fromkeys(subset.dataset.trigger_word for subset in subsets_of(self._plan.settings))
        values["trigger_word"] = ", ".join(filter(None, triggers))
        values["debiased_estimation"] = values["debiased_estimation_loss"]
        for name in ("network_dropout", "scale_weight_norms", "min_snr_gamma", "noise_offset", "adaptive_noise_scale",
                     "multires_noise_iterations", "ip_noise_gamma"):
            values[name] = values[name] or None
        return values


def _datasets(plan: RunPlan) -> list[dict[str, object]]:
    """sd-scripts' `ss_datasets`, an entry for each size, where the run's settings do not say it all; folders by name only."""
    if plan.settings.dataset.dataset_config == "" and len(plan.resolutions) < 2:
        return []
    frequency = plan.dataset.tag_frequency()
    blocks: dict[tuple[object, ...], dict[tuple[str, SubsetSettings], list[Example]]] = {}
    for example in plan.dataset.examples:
        chosen = example.subset.dataset
        size = (chosen.resolution, chosen.enable_bucket, chosen.min_bucket_reso, chosen.max_bucket_reso)
        blocks.setdefault(size, {}).setdefault((example.folder, example.subset), []).append(example)
    result = []
    for (resolution, enable_bucket, smallest, largest), subsets in blocks.items():
        visits = [sum(e.repeats for found in subsets.values() for e in found if e.is_regularisation == is_reg)
                  for is_reg in (False, True)]
        result.append({
            "is_dreambooth": True, "batch_size_per_device": plan.settings.optimizer.train_batch_size,
            "resolution": resolution_of(str(resolution), default=training_sizes(plan.family).default),
            "num_train_images": visits[0], "num_reg_images": visits[1], "enable_bucket": enable_bucket,
            "min_bucket_reso": smallest, "max_bucket_reso": largest,
            "tag_frequency": {folder: frequency[folder] for folder, _ in subsets if folder in frequency},
            "subsets": [_subset(folder, subset, found) for (folder, subset), found in subsets.items()]})
    return result


def _subset(folder: str, subset: SubsetSettings, found: Sequence[Example]) -> dict[str, object]:
    names = ("color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens", "keep_tokens_separator",
             "secondary_separator", "enable_wildcard", "caption_prefix", "caption_suffix")
    values = {**vars(subset.dataset), **vars(subset.captions)}
    return {"img_count": len(found), "num_repeats": found[0].repeats, "image_dir": folder, "is_reg": found[0].is_regularisation,
            "class_tokens": subset.class_tokens or None, "loss_weight": subset.loss_weight,
            **{name: None if values[name] == "" else values[name] for name in names}}
