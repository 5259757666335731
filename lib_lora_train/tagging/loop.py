"""The loop over the images: read, described a few at a time, composed into captions. Nothing is written here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from lib_lora_train.dataset.images import read_image
from lib_lora_train.dataset.progress import Progress, ShouldStop, Watch
from lib_lora_train.errors import DatasetError, Interrupted, LoraTrainError, is_out_of_memory, printable
from lib_lora_train.tagging.captioner import Captioner, CaptionerSource, Description
from lib_lora_train.tagging.options import TagOptions
from lib_lora_train.tagging.rules import compose

log = logging.getLogger(__name__)

Row = tuple[Path, "str | None", str]
"""An image, its new caption (None: it keeps the one it has), and what went wrong ("": nothing)."""

# What a foreign model raises on an image it cannot use. A host's own classes of errors derive from one of these.
_FOREIGN = (RuntimeError, OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, MemoryError)


def tag_images(
    images: Sequence[Path], source: CaptionerSource, *, options: TagOptions, existing: Callable[[Path], str],
    device: torch.device, on_progress: Progress | None = None, should_stop: ShouldStop | None = None,
) -> Iterator[Row]:
    """A row for each image, as soon as it is known; those that keep their caption come first.

    `existing` gives an image's caption ("" for none); where it raises DatasetError, the image is a row with that problem,
    unless captions are overwritten. An image that cannot be read or described is a row with a problem, and the loop goes on;
    full memory makes the batches smaller. Raises what opening the source raises, and Interrupted, after the rows that were
    finished, when `should_stop` says so.
    """
    watch = Watch(len(images), doing="captions were made", on_progress=on_progress, should_stop=should_stop)
    watch.check()
    waiting: list[tuple[Path, str]] = []
    for path in images:
        caption, problem = _existing(path, existing, options)
        if problem or (options.mode == "only_empty" and caption):
            watch.advance()
            yield path, None, problem
        else:
            waiting.append((path, caption))
    if not waiting:
        return
    with source.open(options, device, should_stop=should_stop) as captioner:
        batches = _Batches(captioner, device, batch_size=options.batch_size)
        describe = batches.describe if source.reads == "pixels" else lambda paths: [
            _tried(lambda path=path: captioner(path), path) for path in paths]
        for start in range(0, len(waiting), options.batch_size):
            watch.check()
            group = waiting[start:start + options.batch_size]
            for (path, caption), found in zip(group, describe([path for path, _ in group]), strict=True):
                watch.advance()
                if isinstance(found, str):
                    yield path, None, found
                else:
                    composed = compose(caption, found, options)
                    yield path, None if composed == caption else composed, ""


def _existing(path: Path, existing: Callable[[Path], str], options: TagOptions) -> tuple[str, str]:
    try:
        return existing(path).strip(), ""
    except DatasetError as error:
        return "", "" if options.mode == "overwrite" else str(error)


class _Batches:
    """Describes images together; a batch that is too large for the memory is halved, and stays so."""

    def __init__(self, captioner: Captioner, device: torch.device, *, batch_size: int) -> None:
        self._captioner, self._device, self._batch_size = captioner, device, batch_size

    def describe(self, paths: Sequence[Path]) -> list[Description | str]:
        """A description for each image, or the sentence that says why there is none."""
        read = [_tried(lambda path=path: read_image(path), path) for path in paths]
        images = [(path, image) for path, image in zip(paths, read, strict=True) if not isinstance(image, str)]
        found: list[Description | str] = []
        while len(found) < len(images):
            found += self._together(images[len(found):][:self._batch_size])
        described = iter(found)
        return [image if isinstance(image, str) else next(described) for image in read]

    def _together(self, batch: Sequence[tuple[Path, Image.Image]]) -> list[Description | str]:
        """One pass over several images; [] where the memory was full and fewer are to be tried."""
        full = False
        if len(batch) > 1:
            try:
                return [*self._captioner.describe([image for _, image in batch])]
            except Interrupted:
                raise
            except (LoraTrainError, *_FOREIGN) as error:
                full = is_out_of_memory(error)
            # Only here, when the error and the tensors it holds are gone, is there memory to free.
            self._free()
        if full:
            self._batch_size = len(batch) // 2
            return []
        found = []
        for path, image in batch:
            found.append(_tried(lambda image=image: self._captioner.describe([image])[0], path))
            if isinstance(found[-1], str):
                self._free()
        return found

    def _free(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


_Result = TypeVar("_Result")


def _tried(function: Callable[[], _Result], path: Path) -> _Result | str:
    """What `function` returns, or the sentence that says what was wrong with this image."""
    try:
        return function()
    except Interrupted:
        raise
    except LoraTrainError as error:
        return str(error)
    except _FOREIGN as error:
        if is_out_of_memory(error):
            return printable(f"The memory ran out while {path.name} was described, even alone.")
        log.warning("Describing %s", path, exc_info=error)  # a foreign model's, or a defect of ours: the log keeps where
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return printable(f"{path.name} could not be described: {reason.rstrip('.')}.")
