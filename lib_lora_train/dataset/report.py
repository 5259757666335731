"""A folder of images → what is in it, what is wrong with it, what to fix first. Nothing is written, no model is needed.

Every image is decoded, so this takes as long as reading them: a second for some forty photographs. What a training would
only warn of when it starts, or never see (duplicates, blur, tags spelt in two ways), is found here.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from lib_lora_train.dataset import likeness
from lib_lora_train.dataset.advice import Circumstances, advise
from lib_lora_train.dataset.buckets import DEFAULT_SIZES, Buckets, Size, TrainingSizes, buckets_for
from lib_lora_train.dataset.caption_files import CaptionFile, CaptionNotes, count_of_captions
from lib_lora_train.dataset.caption_variation import plain, written
from lib_lora_train.dataset.captions import Tokenizer, count_tags, first_line
from lib_lora_train.dataset.findings import DEEP_CROP, LONG_CAPTION, NARROW, DatasetReport, Examined, Proposal
from lib_lora_train.dataset.folder import Subset, find_images
from lib_lora_train.dataset.held_out import held_out_of, known_choices
from lib_lora_train.dataset.images import decode_image
from lib_lora_train.dataset.listing import MayRead
from lib_lora_train.dataset.plan import plain_folder_repeats, plan_run
from lib_lora_train.dataset.progress import Progress, ShouldStop, Watch
from lib_lora_train.dataset.text_files import CAPTION_SUFFIXES
from lib_lora_train.errors import DatasetError, printable
from lib_lora_train.settings import Settings
from lib_lora_train.settings.dataset_config import SubsetSettings
from lib_lora_train.settings.risks import risks

ENLARGED = 1.1  # more than this many times as long at the training size: small


@dataclasses.dataclass(frozen=True)
class _Caption:
    """The caption of one image; `text` is None where there is no file."""

    text: str | None
    trained: str  # with trigger word, or what replaces it
    error: str = ""  # why it cannot be read


def examine(
    folder: Path | str, *, settings: Settings, tokenizer: Tokenizer | None = None, sizes: TrainingSizes = DEFAULT_SIZES,
    on_progress: Progress | None = None, should_stop: ShouldStop | None = None, may_read: MayRead | None = None,
    unsaved: Mapping[Path, str] | None = None,
) -> DatasetReport:
    """Look at every image and caption of `folder` (kohya's layout or a plain one) as `settings` would train them.

    `sizes` are those of the model's family, where the settings leave them open. `unsaved` are
    captions that were edited and are not in their files yet. `settings.dataset.train_data_dir` is not looked at.
    Raises DatasetError for a folder that is missing, unreadable or without an image's name, SettingError for sizes that
    contradict each other, Interrupted when `should_stop()` says so. Damaged images and captions are part of the report.
    """
    folder = Path(folder)
    buckets = buckets_for(settings.dataset, sizes=sizes)
    subsets, layout, found = find_images(folder, what="dataset", may_read=may_read,
                                         chosen=SubsetSettings(settings.dataset, settings.captions))
    watch = Watch(sum(len(subset.images) for subset in subsets), doing="the pictures were examined",
                  on_progress=on_progress, should_stop=should_stop)
    reader = _Reader(buckets, tokenizer=tokenizer, unsaved=unsaved or {})
    for subset in subsets:
        for path in subset.images:
            watch.check()
            reader.read(path, subset)
            watch.advance()
    images, twins = _compare(reader.images, reader.thumbnails, should_stop=should_stop)
    texts = [caption.text or "" for caption in reader.captions]
    tags = count_tags(texts)
    usable = {image.path: image.bucket for image in images if image.usable}
    by_bucket, kept = Counter(usable.values()), held_out_of(
        list(usable), folder, share=settings.evaluation.validation_split, seed=settings.optimizer.seed,
        choices=known_choices(folder, may_read=may_read))
    report = DatasetReport(
        folder=folder, images=tuple(images), duplicates=twins,
        sizes=tuple(Counter((image.width, image.height) for image in images if image.width).most_common()),
        buckets=tuple(by_bucket.most_common()), tags=tags, once=tuple(tag for tag, count in tags.items() if count == 1),
        proposal=_proposal(by_bucket - Counter(usable[path] for path in kept), settings), advice=(),
        resolution=buckets.resolution, captions=count_of_captions(
            len(images), reader.notes.captioned, [name for subset in subsets for name in subset.captions.unmatched],
            unread=[name for subset in subsets for name in subset.captions.unread]))
    trained = [repeats for image, repeats in zip(images, reader.repeats, strict=True) if image.path in usable.keys() - kept]
    visits, optimizer = _planned_visits(trained, layout=layout, settings=settings), settings.optimizer
    steps = report.proposal.steps if visits is None else -(
        -visits // (optimizer.train_batch_size * optimizer.gradient_accumulation_steps))
    return dataclasses.replace(report, advice=advise(report, Circumstances(
        layout=layout, trigger_word=settings.dataset.trigger_word, enable_bucket=settings.dataset.enable_bucket,
        concepts=tuple(dict.fromkeys(subset.caption for subset in subsets if subset.caption)),
        captions=tuple(caption.trained for caption in reader.captions), spellings=count_tags(texts, key=str.casefold),
        planned_visits=visits, risks=tuple(risks(settings, steps=steps, images=len(trained))),
        notes=tuple(reader.notes.sentences()), problems=tuple(problem.text for problem in found))))


class _Reader:
    """Reads one image after the other, and gathers what is found."""

    def __init__(self, buckets: Buckets, *, tokenizer: Tokenizer | None, unsaved: Mapping[Path, str]) -> None:
        self._buckets, self._tokenizer, self._unsaved = buckets, tokenizer, unsaved
        self.images: list[Examined] = []
        self.captions: list[_Caption] = []
        self.repeats: list[int] = []
        self.thumbnails: dict[int, likeness.Thumbnail] = {}  # by index among the images; broken ones have none
        self.notes = CaptionNotes()

    def read(self, path: Path, subset: Subset) -> None:
        """One more image."""
        caption = self._caption(path, subset)
        examined, thumbnail = _examine(path, caption, buckets=self._buckets, tokenizer=self._tokenizer)
        if thumbnail is not None:
            self.thumbnails[len(self.images)] = thumbnail
        self.images.append(examined)
        self.captions.append(caption)
        self.repeats.append(subset.repeats)

    def _caption(self, path: Path, subset: Subset) -> _Caption:
        """The caption as `read_folder` reads it."""
        found = subset.captions.of(path)
        text = found.line if found and (found.line or found.file.suffix.lower() in CAPTION_SUFFIXES) else None
        if path in self._unsaved:
            text = first_line(self._unsaved[path])
            found = CaptionFile(path, text)
        elif found and found.error:
            return _Caption(None, "", error=found.error.reason)
        chosen = subset.chosen.captions
        self.notes.add(found, chosen)
        return _Caption(None if text is None else printable(text), plain(
            written(text or subset.caption, chosen, trigger_word=subset.chosen.dataset.trigger_word), chosen))


def _examine(path: Path, caption: _Caption, *, buckets: Buckets,
             tokenizer: Tokenizer | None) -> tuple[Examined, likeness.Thumbnail | None]:
    """Everything that one image says by itself."""
    problems = ["unreadable_caption"] if caption.error else [] if caption.text else [
        "no_caption" if caption.text is None else "empty_caption"]
    tokens = None if tokenizer is None or caption.error else len(tokenizer.encode(caption.trained))
    if tokens is not None and tokens > LONG_CAPTION:
        problems.append("long_caption")
    try:
        decoded = decode_image(path)
    except DatasetError as error:
        return Examined(path, 0, 0, (0, 0), 0.0, 0.0, tokens, ("broken", *problems), why=error.reason,
                        unread=caption.error), None
    image, (width, height) = decoded.image, decoded.image.size
    pixels = buckets.resolution[0] * buckets.resolution[1]
    examined = Examined(path, width, height, (0, 0), 0.0, likeness.sharpness(image, pixels=pixels), tokens, (),
                        several=decoded.several, unread=caption.error)
    narrow = max(width, height) > NARROW * min(width, height)
    try:
        placement = buckets.assign(width, height)
    except DatasetError:
        problems.insert(0, "narrow" if narrow else "small")
    else:
        loss = 1 - _area(placement.bucket) / _area(placement.resized)
        examined = dataclasses.replace(examined, bucket=placement.bucket, crop_loss=loss,
                                       kept=placement.source_box(placement.crop))
        problems[:0] = [code for code, applies in (
            ("small", pixels > ENLARGED ** 2 * width * height * (1 - loss)), ("narrow", narrow),
            ("deep_crop", loss > DEEP_CROP)) if applies]
    return dataclasses.replace(examined, problems=tuple(problems)), likeness.thumbnail(image)


def _compare(images: Sequence[Examined], thumbnails: Mapping[int, likeness.Thumbnail], *,
             should_stop: ShouldStop | None) -> tuple[list[Examined], tuple[tuple[Path, ...], ...]]:
    """What only the comparison shows: duplicates, and images softer than the rest."""
    readable = list(thumbnails)
    result = list(images)

    def add_problem(index: int, code: str) -> None:
        result[index] = dataclasses.replace(result[index], problems=(code, *result[index].problems))

    if readable:
        median = statistics.median(images[index].sharpness for index in readable)
        for index in readable:
            if likeness.is_blurred(images[index].sharpness, median=median):
                add_problem(index, "blurry")
    groups = []
    for group in likeness.near_duplicates([thumbnails[index] for index in readable], should_stop=should_stop):
        # The largest is the best; of equal ones the sharpest, then one with a caption.
        best_first = sorted((readable[number] for number in group), key=lambda index: (
            -images[index].width * images[index].height, -round(images[index].sharpness, 2),
            len(images[index].problems), index))
        groups.append(tuple(images[index].path for index in best_first))
        for index in best_first[1:]:
            add_problem(index, "duplicate")
    return result, tuple(groups)


def _proposal(buckets: Mapping[Size, int], settings: Settings) -> Proposal:
    """The rule of plain folders, as steps of the batch that is set."""
    optimizer, pictures = settings.optimizer, sum(buckets.values())
    repeats = plain_folder_repeats(pictures, max_train_epochs=optimizer.max_train_epochs)
    plan = plan_run({size: count * repeats for size, count in buckets.items()}, train_batch_size=optimizer.train_batch_size,
                    gradient_accumulation_steps=optimizer.gradient_accumulation_steps,
                    max_train_epochs=optimizer.max_train_epochs)
    return Proposal(pictures, repeats, plan.epochs, plan.steps, optimizer.train_batch_size)


def _planned_visits(repeats: Sequence[int], *, layout: str, settings: Settings) -> int | None:
    """How often images of these repeats are seen in all; None where the rule of the proposal decides."""
    optimizer = settings.optimizer
    if optimizer.max_train_steps > 0:
        return optimizer.max_train_steps * optimizer.train_batch_size * optimizer.gradient_accumulation_steps
    if layout == "plain":
        return len(repeats) * settings.dataset.num_repeats * optimizer.max_train_epochs or None
    return sum(repeats) * optimizer.max_train_epochs


def _area(size: Size) -> int:
    return size[0] * size[1]
