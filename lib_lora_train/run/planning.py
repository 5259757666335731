"""Everything that is known before the model is borrowed: pictures, sizes, steps, and what is wrong with the settings.

The line above the Train button and the job itself are made from the same `Preparation`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from lib_lora_train.dataset.buckets import Placement, buckets_for
from lib_lora_train.dataset.folder import Dataset, assign_buckets, scan, visits_by_bucket
from lib_lora_train.dataset.plan import Plan, plan_run
from lib_lora_train.errors import DatasetError
from lib_lora_train.inputs.latent_files import CACHE_FOLDER
from lib_lora_train.settings import Settings, ignored
from lib_lora_train.settings.allowed_paths import AllowedPaths


@dataclasses.dataclass(frozen=True)
class Preparation:
    """The dataset placed into buckets, the plan, and one sentence for each thing the user should know.

    `processes` train together, so that a batch of the plan is that many times train_batch_size.
    """

    dataset: Dataset
    placements: tuple[Placement, ...]
    plan: Plan
    resolution: tuple[int, int]
    warnings: tuple[str, ...]
    processes: int = 1

    @property
    def aspect_error(self) -> float:
        """Mean difference between a picture's aspect ratio and its bucket's."""
        return sum(abs(placement.aspect_error) for placement in self.placements) / len(self.placements)

    def epoch_of(self, step: int) -> int:
        """The epoch that `step` (from 1) belongs to."""
        return max(1, -(-step // self.plan.steps_per_epoch))

    def without_damaged(self, settings: Settings, *, dataset: Dataset, placements: tuple[Placement, ...]) -> Preparation:
        """The same after encoding: without the pictures that could not be decoded, which are its only warnings."""
        lost = tuple(problem.text for problem in dataset.problems[len(self.dataset.problems):])
        return dataclasses.replace(self, dataset=dataset, placements=placements, warnings=lost,
                                   plan=replan(settings, dataset=dataset, placements=placements, processes=self.processes))

    @property
    def summary(self) -> str:
        """One line: pictures, repeats, epochs, batches, steps."""
        repeats = sorted({e.repeats for e in self.dataset.examples if not e.is_regularisation})
        shown = str(repeats[0]) if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
        regularisation = len(self.dataset.examples) - self.dataset.images
        with_reg = f" + {regularisation} regularisation pictures" if regularisation else ""
        return (f"{_count(self.dataset.images, 'picture')} × {shown} repeats{with_reg}, {_count(self.plan.epochs, 'epoch')}, "
                f"{_count(len(self.plan.buckets), 'bucket')} at {self.resolution[0]}×{self.resolution[1]} "
                f"= {_count(self.plan.steps, 'step')}{f' of {self.processes} processes' if self.processes > 1 else ''}")


def prepare(settings: Settings, *, family: str, allowed: AllowedPaths | None = None,
            on_progress: Callable[[int, int], None] | None = None,
            should_stop: Callable[[], bool] | None = None, processes: int = 1) -> Preparation:
    """Read the dataset's folder and plan the run of so many processes for a model of `family` ("" plans as for SD1).

    Within a `allowed`, links that lead out of it are passed over; the folders themselves are the caller's to `check_allowed`.
    Raises DatasetError and SettingError; nothing is written, no picture is decoded.
    """
    dataset_settings, optimizer = settings.dataset, settings.optimizer
    if not dataset_settings.train_data_dir:
        raise DatasetError("No dataset folder was given", remedy="choose a folder of pictures")
    buckets = buckets_for(dataset_settings, family=family)
    found = scan(
        Path(dataset_settings.train_data_dir), max_train_epochs=optimizer.max_train_epochs,
        num_repeats=dataset_settings.num_repeats, trigger_word=dataset_settings.trigger_word,
        reg_data_dir=dataset_settings.reg_data_dir or None, on_progress=on_progress, should_stop=should_stop,
        may_read=allowed.may_read if allowed else None)
    if allowed and dataset_settings.cache_latents_to_disk:
        _check_caches(found, allowed)
    dataset, placements = assign_buckets(found, buckets)
    return Preparation(
        dataset=dataset, placements=placements, resolution=buckets.resolution, processes=processes,
        plan=replan(settings, dataset=dataset, placements=placements, processes=processes),
        warnings=(*ignored(settings), *(problem.text for problem in dataset.problems)))


def _check_caches(dataset: Dataset, allowed: AllowedPaths) -> None:
    """The cache is written to; a link in its place would write elsewhere."""
    for folder in sorted({example.path.parent for example in dataset.examples}):
        if not allowed.may_read(folder / CACHE_FOLDER):
            raise DatasetError(f"The cache {folder / CACHE_FOLDER} cannot be used", why="it is a link to a folder that is "
                               "not allowed", remedy="remove the link or switch cache_latents_to_disk off")


def replan(settings: Settings, *, dataset: Dataset, placements: tuple[Placement, ...], processes: int = 1) -> Plan:
    """The steps of a run over these examples, as `settings` want them. train_batch_size is each process's."""
    optimizer = settings.optimizer
    return plan_run(
        visits_by_bucket(dataset.examples, placements), train_batch_size=optimizer.train_batch_size * processes,
        gradient_accumulation_steps=optimizer.gradient_accumulation_steps,
        max_train_epochs=optimizer.max_train_epochs, max_train_steps=optimizer.max_train_steps)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
