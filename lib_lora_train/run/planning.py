"""The plan of a run: all that is decided before the model is leased, computed once and handed on.

The page and the command line show it, the record keeps its settings, and `run_job` carries it out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from lib_lora_train.dataset import held_out
from lib_lora_train.dataset.buckets import Placement, buckets_for
from lib_lora_train.dataset.caption_variation import known_captions
from lib_lora_train.dataset.examples import Dataset, Masked, assign_buckets, at_each_resolution, visits_by_bucket, with_repeats
from lib_lora_train.dataset.folder import read_folder
from lib_lora_train.dataset.held_out import HeldOutImage
from lib_lora_train.dataset.listing import MayRead
from lib_lora_train.dataset.masks import masks_of, white_share
from lib_lora_train.dataset.plan import Plan, plan_run
from lib_lora_train.dataset.progress import Progress, ShouldStop
from lib_lora_train.distributed import SINGLE_PROCESS, ProcessGroup
from lib_lora_train.errors import DatasetError, counted
from lib_lora_train.evaluation.prompts import DEFAULT_STEPS, SamplePrompt, default_prompts, parse_prompts, read_prompts
from lib_lora_train.host.port import Host
from lib_lora_train.inputs.latent_files import CACHE_FOLDER
from lib_lora_train.model.family import training_sizes
from lib_lora_train.model.sampler import SampleRequest
from lib_lora_train.run.consistency import agree_on_settings
from lib_lora_train.run.embedding import check_embedding
from lib_lora_train.run.on_top import loras_on_top, unused_words, written
from lib_lora_train.run.optimizing import check_optimizer, ignored_by_optimizer, in_steps
from lib_lora_train.run.output import checked_name, destination
from lib_lora_train.run.resume import ResumePoint, find, with_recorded_split
from lib_lora_train.run.selection import check_family
from lib_lora_train.run.tracker_checks import check_trackers
from lib_lora_train.settings import DECLARATIONS, Settings, check_preservation, flat, ignored, named, no_effect, parse
from lib_lora_train.settings.allowed_paths import AllowedPaths, check_allowed
from lib_lora_train.settings.dataset_config import notes as folder_notes
from lib_lora_train.settings.dataset_config import subsets_of, with_text
from lib_lora_train.settings.risks import risks


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a run will do.

    settings        complete: the seed is drawn, automatic repeats are numbers, paths are absolute
    family          of the model it was planned for, "" where none was loaded
    dataset         what is trained, with its `placements` into buckets and its `resolutions` (width, height), the largest last
    schedule        epochs, batches, steps; a batch is `processes` times train_batch_size images
    warnings        one sentence for each thing the user should know
    target          the LoRA's file; its name is free
    resume_point    where the run goes on, None for a new run
    held_out        images to measure on, which are not trained unless `held_out_derived` (see `held_out.Split`)
    masks           {`Example.masked`: its mask} of those that are not learnt whole, `white_share` what that leaves, about
    checkpoint      the title of the only model that it may train on, "" for whatever is loaded
    saves           whether it writes a LoRA
    """

    settings: Settings
    family: str
    dataset: Dataset
    placements: tuple[Placement, ...]
    schedule: Plan
    resolutions: tuple[tuple[int, int], ...]
    warnings: tuple[str, ...]
    processes: int = 1
    target: Path = Path()
    resume_point: ResumePoint | None = None
    held_out: tuple[HeldOutImage, ...] = ()
    held_out_derived: bool = False
    notes: tuple[str, ...] = ()
    masks: Mapping[Masked, Path] = dataclasses.field(default_factory=dict)
    white_share: float = 1.0
    prompts: tuple[SamplePrompt, ...] = ()
    checkpoint: str = ""
    saves: bool = True

    @property
    def resolution(self) -> tuple[int, int]:
        """The largest of its resolutions."""
        return self.resolutions[-1]

    @property
    def aspect_error(self) -> float:
        """Mean difference between an image's aspect ratio and its bucket's."""
        return sum(abs(placement.aspect_error) for placement in self.placements) / len(self.placements)

    def epoch_of(self, step: int) -> int:
        """The epoch that `step` (from 1) belongs to."""
        return max(1, -(-step // self.schedule.steps_per_epoch))

    def without_damaged(self, *, dataset: Dataset, placements: tuple[Placement, ...]) -> RunPlan:
        """The plan after encoding, without the images that could not be decoded; these are its only warnings."""
        lost = tuple(problem.text for problem in dataset.problems[len(self.dataset.problems):])
        return dataclasses.replace(self, dataset=dataset, placements=placements, warnings=lost,
                                   schedule=_schedule(self.settings, dataset, placements, processes=self.processes))

    @property
    def summary(self) -> str:
        """One line: images, repeats, epochs, batches, steps."""
        repeats = sorted({e.repeats for e in self.dataset.examples if not e.is_regularisation})
        shown = counted(repeats[0], "repeat") if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]} repeats"
        regularisation = len({e.path for e in self.dataset.examples if e.is_regularisation})
        sizes = " and ".join(f"{width}×{height}" for width, height in self.resolutions)
        schedule = self.schedule
        said = [f"{counted(self.dataset.images, 'picture')} × {shown}, {counted(schedule.epochs, 'epoch')}, "
                f"{counted(len(schedule.buckets), 'bucket')} at {sizes} = {counted(schedule.steps, 'step')}"]
        if self.processes > 1:
            said.append(f"on {self.processes} processes")
        if regularisation:
            said.append(f"with {counted(regularisation, 'regularisation picture')}")
        if self.held_out and not self.held_out_derived:
            said.append(f"{len(self.held_out)} of {len(self.held_out) + self.dataset.images} pictures kept back to measure on")
        return "; ".join([*said, *self._masked])

    @property
    def _masked(self) -> list[str]:
        """How many images have a mask, and what it leaves of them; [] where none has."""
        masked = len({example.path for example in self.dataset.examples if example.masked in self.masks})
        return [f"{masked} of {counted(self.dataset.images, 'picture')} with a mask, about {self.white_share:.0%} of the area "
                "is learnt"] if masked else []


def plan_job(settings: Settings, host: Host, *, on_progress: Progress | None = None,
             should_stop: ShouldStop | None = None, group: ProcessGroup = SINGLE_PROCESS) -> RunPlan:
    """The plan of a run that can start: the name is free, the output folder is there and can be written to. Raises UserError;
    no image is decoded. All processes of a `group` call this, and are refused where their settings differ."""
    check_allowed(settings, host.allowed)
    check_optimizer(settings, built=True)
    check_trackers(settings)
    agree_on_settings(group, settings)
    resume_point = find(settings.save.resume, host.runs_folder) if settings.save.resume else None
    settings = with_recorded_split(_with_seed(settings, resume_point, group), resume_point)
    target = result_path(settings, host, resume_point) if group.rank == 0 else Path(settings.save.output_name)
    checkpoint = host.checkpoint()
    on_top = loras_on_top(settings, host, family=checkpoint.family if checkpoint else "")
    settings = dataclasses.replace(settings, network=dataclasses.replace(settings.network, train_on_top_of=written(on_top)))
    plan = plan_dataset(settings, family=checkpoint.family if checkpoint else "", allowed=host.allowed, on_progress=on_progress,
                        should_stop=should_stop, processes=group.world_size)
    return dataclasses.replace(plan, settings=_frozen(plan), target=target, resume_point=resume_point,
                               warnings=(*plan.warnings, *unused_words(on_top)))


def plan_dataset(settings: Settings, *, family: str, allowed: AllowedPaths | None = None,
                 on_progress: Progress | None = None,
                 should_stop: ShouldStop | None = None, processes: int = 1) -> RunPlan:
    """Read the dataset's folder and plan the run of so many processes for a model of `family` ("" plans as for SD1), wherever
    its result will go.

    Links that lead out of the `allowed` paths are passed over; the folders themselves are the caller's to check.
    Raises DatasetError and SettingError; nothing is written, no image is decoded.
    """
    settings = with_text(settings)
    dataset_settings, optimizer = settings.dataset, settings.optimizer
    if not dataset_settings.train_data_dir:
        raise DatasetError("No dataset folder was given", remedy="choose a folder of pictures")
    check_optimizer(settings)  # what is not possible is refused here, before anything is read
    check_embedding(settings)
    check_family(settings.network, family)
    check_preservation(settings.preservation, triggers=[each.dataset.trigger_word for each in subsets_of(settings)])
    buckets = functools.lru_cache(maxsize=None)(functools.partial(buckets_for, sizes=training_sizes(family)))
    may_read = allowed.may_read if allowed else None
    found = at_each_resolution(read_folder(
        Path(dataset_settings.train_data_dir), subsets=subsets_of(settings), reg_data_dir=dataset_settings.reg_data_dir or None,
        on_progress=on_progress, should_stop=should_stop, may_read=may_read))
    if allowed and dataset_settings.cache_latents_to_disk:
        _check_caches(found, allowed)
    # Held-out images must fit a bucket too, and repeats are counted for those that are trained.
    split = held_out.split(assign_buckets(found, buckets)[0], share=settings.evaluation.validation_split,
                           seed=optimizer.seed, may_read=may_read)
    dataset, placements = assign_buckets(with_repeats(
        split.training, max_train_epochs=optimizer.max_train_epochs, num_repeats=dataset_settings.num_repeats), buckets)
    schedule = _schedule(settings, dataset, placements, processes=processes)
    masks, unmasked = _masks(settings, dataset, may_read)
    resolutions = sorted({buckets(example.subset.dataset).resolution for example in dataset.examples}, key=math.prod)
    settings, prompts = _with_prompts(settings, split.held_out, dataset, resolution=resolutions[-1])
    return RunPlan(
        settings=settings, family=family, dataset=dataset, placements=placements, resolutions=tuple(resolutions),
        processes=processes, schedule=schedule, prompts=prompts, held_out=split.held_out, held_out_derived=split.derived,
        notes=split.notes if split.derived else (), masks=masks, white_share=white_share(masks),
        warnings=(*ignored(settings), *folder_notes(settings), *_varied(settings, dataset), *ignored_by_optimizer(settings),
                  *unmasked, *risks(settings, steps=schedule.steps, images=dataset.images, processes=processes,
                                    epoch=schedule.steps_per_epoch),
                  *(problem.text for problem in dataset.problems)))


def _masks(settings: Settings, dataset: Dataset, may_read: MayRead | None) -> tuple[Mapping[Masked, Path], list[str]]:
    """The masks that the settings ask for, and a sentence where there are none. Raises DatasetError."""
    masks, chosen = masks_of(dataset, may_read=may_read), settings.masks
    if masks or not any(each.masks.masked_loss or each.masks.alpha_mask for each in subsets_of(settings)):
        return masks, []
    where = "paint one on the dataset page, or put it at masks/a.png for the picture a" if chosen.masked_loss else (
        f"take pictures that are transparent in part, or {named('masked_loss')} with masks")
    return masks, [no_effect("masked_loss" if chosen.masked_loss else "alpha_mask",
                             f"no picture has a mask, and all of each is learnt; {where}")]


def output_folder(settings: Settings, host: Host) -> Path:
    """Where the result goes: the folder the user named, else the host's."""
    return Path(settings.save.output_dir) if settings.save.output_dir else host.lora_folder


def result_path(settings: Settings, host: Host, resume_point: ResumePoint | None) -> Path:
    """Where the result goes, the folder made and the name known to be free; raises OutputError. A run that goes on may replace
    what it has saved itself."""
    folder, name = output_folder(settings, host), checked_name(settings.save.output_name)
    own = resume_point is not None and resume_point.wrote(folder / f"{name}.safetensors")
    return destination(folder, name=name, overwrite=settings.save.overwrite or own)


def _with_seed(settings: Settings, resume_point: ResumePoint | None, group: ProcessGroup) -> Settings:
    """A seed is drawn where none was given, once in a run, for all of its processes."""
    if settings.optimizer.seed >= 0:
        return settings
    seed = int(resume_point.metadata["settings"].get("seed", -1)) if resume_point else -1
    seed = group.all_gather(seed if seed >= 0 else secrets.randbelow(2**32))[0]
    return dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, seed=seed))


def _frozen(plan: RunPlan) -> Settings:
    """The settings with what was derived from them, so that a resumed run derives nothing anew."""
    values = flat(plan.settings)
    absolute = {name: str(Path(str(values[name])).absolute()) for name, declaration in DECLARATIONS.items()
                if declaration.is_path and name != "resume" and values[name]}
    repeats = plan.dataset.examples[0].repeats if plan.dataset.layout == "plain" else values["num_repeats"]
    shares = {name: in_steps(values[name], plan.schedule.steps)
              for name in ("lr_warmup_steps", "lr_decay_steps", "token_warmup_step")}
    return parse({**values, **absolute, **shares, "num_repeats": repeats})


def _varied(settings: Settings, dataset: Dataset) -> list[str]:
    """What captions cost that are too many to be encoded beforehand."""
    if settings.encodes_text_in_steps or known_captions(dataset.examples) is not None:
        return []
    return ["Captions vary from step to step, so each new one is read by the text encoder when its step comes, which stays on "
            "the GPU: about 0.2 GB for SD1, 0.7 GB for SD2, 1.6 GB for SDXL in fp16, and a few hundredths of a second a step."]


def _with_prompts(settings: Settings, held_out_images: Sequence[HeldOutImage], dataset: Dataset, *,
                  resolution: tuple[int, int]) -> tuple[Settings, tuple[SamplePrompt, ...]]:
    """What is sampled, by default captions of held-out images; the settings with the text of a file that they name. Raises
    SettingError."""
    chosen = settings.evaluation
    if not chosen.sample_images:
        return settings, ()
    text, (width, height) = read_prompts(chosen.sample_prompts), resolution
    defaults = SampleRequest("", width=width, height=height, steps=DEFAULT_STEPS, seed=max(0, settings.optimizer.seed))
    prompts = parse_prompts(text, defaults=defaults) or default_prompts(
        [image.example.caption for image in held_out_images], trigger_word=settings.dataset.trigger_word, defaults=defaults,
        others=[example.caption for example in dataset.examples if not example.is_regularisation])
    return dataclasses.replace(settings, evaluation=dataclasses.replace(chosen, sample_prompts=text)), prompts


def _check_caches(dataset: Dataset, allowed: AllowedPaths) -> None:
    """The cache is written to; a link in its place would write elsewhere."""
    for folder in sorted({example.path.parent for example in dataset.examples}):
        if not allowed.may_read(folder / CACHE_FOLDER):
            raise DatasetError(f"The cache {folder / CACHE_FOLDER} cannot be used", why="it is a link to a folder that is "
                               "not allowed", remedy=f"remove the link or switch {named('cache_latents_to_disk')} off")


def _schedule(settings: Settings, dataset: Dataset, placements: tuple[Placement, ...], *, processes: int) -> Plan:
    """The steps of a run over these examples, as `settings` want them. train_batch_size is each process's."""
    optimizer = settings.optimizer
    return plan_run(
        visits_by_bucket(dataset.examples, placements), train_batch_size=optimizer.train_batch_size * processes,
        gradient_accumulation_steps=optimizer.gradient_accumulation_steps,
        max_train_epochs=optimizer.max_train_epochs, max_train_steps=optimizer.max_train_steps)
