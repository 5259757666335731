"""The grid of a run: its saves at several weights, sampled by the host's own text-to-image from the same prompts and seeds.

    <run>/grid/cells.json    the columns, prompts, seeds and cells, written before the first image
    <run>/grid/*.png         an image each, named by all that decides what is in it, with infotext
    <run>/grid/scores.json   what was measured on them (`scoring.py`)

So a grid that was stopped or killed goes on where it was, and another grid of the run samples only what is new in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from lib_lora_train.adapters.file import read_metadata
from lib_lora_train.adapters.stack import find_lora, split_tags
from lib_lora_train.dataset.progress import Progress, ShouldStop
from lib_lora_train.errors import HostError, Interrupted, LoraFileError, SettingError, some_of, translated
from lib_lora_train.evaluation.infotext import png_of
from lib_lora_train.evaluation.prompts import bare_prompts
from lib_lora_train.host.port import Host, RenderRequest, never
from lib_lora_train.records import from_plain
from lib_lora_train.results.average import SAVES as AVERAGED
from lib_lora_train.results.average import beside_others, write_average
from lib_lora_train.results.references import references_of, resolution_of, settings_of, without_trigger
from lib_lora_train.results.saves import Save, saves_of
from lib_lora_train.storage.atomic import remove, write_atomic

FOLDER = "grid"
CELLS = f"{FOLDER}/cells.json"
WEIGHTS, SEEDS, MOST_SAVES, MOST_PROMPTS = (0.7, 1.0), (1000, 1001, 1002), 5, 3
MOST_CELLS, MOST_WEIGHT = 10_000, 10.0
Part = Literal["", "unet", "text"]
PARTS: tuple[Part, ...] = ("unet", "text")
EXTRAS = (*PARTS, "average")
NO_DRIFT = "The run has no trigger word, so drift is not measured: every prompt calls what was learnt."


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """How each image is sampled. `size` is (width, height), None the run's resolution; `checkpoint` another model than the
    host's, "" for none."""

    sampler: str = "Euler"
    steps: int = 20
    cfg_scale: float = 7.0
    size: tuple[int, int] | None = None
    negative_prompt: str = ""
    checkpoint: str = ""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt without `<lora:…>` of the run. `triggered`: it calls what was learnt; others show how far the model drifts."""

    text: str
    triggered: bool


@dataclasses.dataclass(frozen=True)
class Column:
    """One save at one weight.

    save       its id; "" is the base model
    part       what of it is used: "" all, or only what it changes in the "unet" or in the "text" encoders
    path       the file, "" for the base model; `file_hash` tells its weights
    problem    why there are no images, "" for none
    """

    save: str = ""
    weight: float = 0.0
    part: Part = ""
    path: str = ""
    file_hash: str = ""
    problem: str = ""

    @property
    def lora_text(self) -> str:
        """What is added to a prompt; the WebUI reads two weights as those of text encoder and UNet."""
        text, unet = (0 if self.part == "unet" else self.weight), (0 if self.part == "text" else self.weight)
        weights = f"{text:g}:{unet:g}" if self.part else f"{self.weight:g}"
        return f"<lora:{Path(self.path).stem}:{weights}>" if self.path else ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One image: its column and prompt (numbers from 0), its seed, its file in the run's folder, and whether it is there."""

    column: int
    prompt: int
    seed: int
    file: str
    done: bool = False


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid, and how far it is. `notes` are sentences about what it does not show."""

    columns: tuple[Column, ...]
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    options: SampleOptions
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()

    @property
    def wanted(self) -> tuple[Cell, ...]:
        """The cells that can be sampled."""
        return tuple(cell for cell in self.cells if not self.columns[cell.column].problem)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data; each column with its text for the prompt, and the progress."""
        columns = [{**dataclasses.asdict(column), "lora_text": column.lora_text} for column in self.columns]
        progress = {"done": sum(cell.done for cell in self.wanted), "total": len(self.wanted)}
        return {**dataclasses.asdict(self), "columns": columns, "progress": progress}


def read_grid(folder: Path) -> Grid | None:
    """The grid of the run in `folder`; None where there is none, or it cannot be read."""
    try:
        grid = from_plain(Grid, json.loads((folder / CELLS).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    if not all(cell.column in range(len(grid.columns)) and cell.prompt in range(len(grid.prompts)) for cell in grid.cells):
        return None
    return _looked_at(folder, grid)


def sample_grid(host: Host, folder: Path, *, saves: Sequence[str] = (), weights: Sequence[float] = (),
                prompts: Sequence[str] = (), seeds: Sequence[int] = (), extras: Sequence[str] = (),
                options: SampleOptions | None = None, on_progress: Progress | None = None,
                should_stop: ShouldStop | None = None) -> Grid:
    """Sample what is missing of this grid of the run in `folder`. What is left empty is chosen: up to five saves over the run,
    the last among them, weights 0.7 and 1, captions of three held-out images and one of them without the trigger word, three
    seeds. The base model is the first column.

    `extras` add, at weight 1: "average", the average of the last saves, and "unet" and "text", the last of `saves` with what it
    changes in the UNet or in the text encoders alone. A save that is gone or cannot be used is told in its column, and the
    others go on.
    Raises SettingError, DatasetError, LoraFileError for a LoRA in a prompt that is not there, OutputError, HostError,
    TrainingError where the memory ran out, and Interrupted; what was sampled by then stays.
    """
    options = options or SampleOptions()
    options = dataclasses.replace(options, size=options.size or resolution_of(folder))
    lines, notes = _prompts(host, folder, prompts, should_stop=should_stop)
    _check(weights, seeds, extras)
    found = saves_of(folder)
    chosen = _chosen(found, saves)
    columns = [_column(save, weight, host=host) for save in chosen for weight in weights or WEIGHTS]
    columns += [_column(chosen[-1], 1.0, host=host, part=part) for part in PARTS if part in extras]
    with contextlib.ExitStack() as stack:
        if "average" in extras:
            columns.append(_average(stack, host, folder, found))
        host.refresh_loras()
        grid = _planned(host, [Column(), *columns], lines, seeds=tuple(seeds) or SEEDS, options=options, notes=notes)
        _remove_damaged(folder, _looked_at(folder, grid))
        grid = _sampled(host, folder, _looked_at(folder, grid), on_progress=on_progress, should_stop=should_stop)
    grid = dataclasses.replace(grid, notes=(*grid.notes, *_without_effect(folder, grid)))
    _write(folder, grid)
    return grid


def _check(weights: Sequence[float], seeds: Sequence[int], extras: Sequence[str]) -> None:
    if bad := [weight for weight in weights if not math.isfinite(weight) or abs(weight) > MOST_WEIGHT]:
        raise SettingError(f"The weight {bad[0]} is not possible", why=f"it must be within {MOST_WEIGHT:g} of 0")
    if bad := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise SettingError(f"The seed {bad[0]} is not possible", why="it must be 0 to 4294967295")
    if bad := [extra for extra in extras if extra not in EXTRAS]:
        raise SettingError(f"There is no column {bad[0]!r}", remedy=f"there are {', '.join(EXTRAS)}")


def _prompts(host: Host, folder: Path, given: Sequence[str], *, should_stop: ShouldStop | None
             ) -> tuple[tuple[Prompt, ...], tuple[str, ...]]:
    """The prompts, and what there is to say of them."""
    settings = settings_of(folder)
    trigger = settings.dataset.trigger_word
    notes: list[str] = []
    texts = list(bare_prompts(given))
    if not texts:
        references = references_of(folder, settings, allowed=host.allowed, should_stop=should_stop)
        captions = [image.example.caption for image in references.held_out]
        if not captions:
            captions = [example.caption for example in references.training]
            notes.append("No picture was held out of this run, so the prompts are captions that it was trained on.")
        captions = list(dict.fromkeys(captions))
        texts = [captions[index * len(captions) // MOST_PROMPTS] for index in range(MOST_PROMPTS)]
        if trigger:
            texts.append(without_trigger(texts[0], trigger))
    if not trigger:
        notes.append(NO_DRIFT)
    for text in texts:
        for tag in split_tags(text)[1]:
            find_lora(tag, host.lora_folder)
    return tuple(Prompt(text, not trigger or without_trigger(text, trigger) != text)
                 for text in dict.fromkeys(texts)), tuple(notes)


def _chosen(found: Sequence[Save], ids: Sequence[str]) -> list[Save]:
    """The saves of these ids; without any, up to five over the run with the last."""
    by_id = {save.id: save for save in found}
    if unknown := [one for one in ids if one not in by_id]:
        raise SettingError(f"The run has no save {unknown[0]!r}", remedy=f"it has {some_of(list(by_id)) or 'none'}")
    if ids:
        return [by_id[one] for one in dict.fromkeys(ids)]
    there = list({save.step: save for save in found if save.exists}.values())
    if not there:
        raise SettingError("The run has no save to sample with", why="none was made, or all of them are gone")
    most = min(MOST_SAVES, len(there))
    return [there[len(there) - 1 - index * (len(there) - 1) // max(1, most - 1)] for index in reversed(range(most))]


def _column(save: Save, weight: float, *, host: Host, part: Part = "") -> Column:
    problem, file_hash = "", ""
    if not save.exists:
        problem = _gone(save.id)
    elif not save.path.resolve().is_relative_to(host.lora_folder.resolve()):
        problem = str(LoraFileError(f"{save.id} cannot be found by the host", why=f"{save.path.parent} is not in its folder "
                                    f"for LoRAs, {host.lora_folder}", remedy="copy it there"))
    else:
        try:
            file_hash = read_metadata(save.path).get("sshs_model_hash") or str(save.path.stat().st_mtime_ns)
        except (LoraFileError, OSError) as error:
            problem = str(error)
    return Column(save.id, weight, part, str(save.path), file_hash, problem)


def _average(stack: contextlib.ExitStack, host: Host, folder: Path, found: Sequence[Save]) -> Column:
    """The column of the average of the last saves, which the host finds until `stack` is closed."""
    there = list({save.step: save.path for save in found if save.exists}.values())
    name = f"{settings_of(folder).save.output_name}-average"
    try:
        path = write_average(there[-AVERAGED:], folder / FOLDER / f"{name}.safetensors")
        path = stack.enter_context(beside_others(host, path))
        return Column(name, 1.0, path=str(path), file_hash=read_metadata(path)["sshs_model_hash"])
    except LoraFileError as error:
        return Column(name, 1.0, problem=str(error))


def _planned(host: Host, columns: Sequence[Column], prompts: tuple[Prompt, ...], *, seeds: tuple[int, ...],
             options: SampleOptions, notes: tuple[str, ...]) -> Grid:
    """The grid with the names of its files, which tell all that decides what is in them."""
    checkpoint = host.checkpoint()
    if checkpoint is None:
        raise HostError("No model is loaded", remedy="choose a checkpoint")
    if len(columns) * len(prompts) * len(seeds) > MOST_CELLS:
        raise SettingError(f"A grid of {len(columns) * len(prompts) * len(seeds):,} pictures is too large",
                           why=f"{MOST_CELLS:,} are possible")
    model = [checkpoint.name, checkpoint.legacy_hash, checkpoint.vae_name]
    cells = []
    for number, column in enumerate(columns):
        for line, prompt in enumerate(prompts):
            for seed in dict.fromkeys(seeds):
                told = [prompt.text, column.weight, column.part, column.file_hash, seed, dataclasses.astuple(options), model]
                name = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]
                cells.append(Cell(number, line, seed, f"{FOLDER}/{name}.png"))
    return Grid(tuple(columns), prompts, tuple(dict.fromkeys(seeds)), options, tuple(cells), notes)


def _sampled(host: Host, folder: Path, grid: Grid, *, on_progress: Progress | None, should_stop: ShouldStop | None) -> Grid:
    """The grid with all of its images that could be sampled."""
    _write(folder, grid)
    stop = should_stop or never
    checkpoint = grid.options.checkpoint or getattr(host.checkpoint(), "name", "")
    done = sum(cell.done for cell in grid.wanted)
    if on_progress:
        on_progress(done, len(grid.wanted))
    for cells in _missing(grid):
        column = grid.columns[cells[0].column]
        if column.problem:
            continue
        if stop():
            raise Interrupted("The grid was stopped")
        try:
            # The WebUI would sample without a LoRA that is gone and not say so.
            if column.path and not os.path.isfile(column.path):
                raise LoraFileError(_gone(column.save))
            images = host.render(dataclasses.replace(_request(grid, cells[0]), count=len(cells)), stop=stop)
        except LoraFileError as error:
            columns = list(grid.columns)
            columns[cells[0].column] = dataclasses.replace(column, problem=str(error))
            grid = dataclasses.replace(grid, columns=tuple(columns))
            _write(folder, grid)
            done = sum(cell.done for cell in _looked_at(folder, grid).wanted)
        else:
            for cell, image in zip(cells, images, strict=True):
                request = _request(grid, cell)
                with translated("writing the grid"):
                    write_atomic(folder / cell.file, png_of(image, request, checkpoint=checkpoint, sampler=request.sampler))
            done += len(cells)
        if on_progress:
            on_progress(done, len(grid.wanted))
    return _looked_at(folder, grid)


def _missing(grid: Grid) -> Iterator[tuple[Cell, ...]]:
    """The cells to sample, one by one; of another checkpoint, which is loaded for each request, those of a prompt at once."""
    for _, group in itertools.groupby(grid.cells, key=lambda cell: (cell.column, cell.prompt)):
        cells = tuple(cell for cell in group if not cell.done)
        in_order = all(cell.seed == cells[0].seed + index for index, cell in enumerate(cells))
        yield from [cells] if cells and grid.options.checkpoint and in_order else [(cell,) for cell in cells]


def _request(grid: Grid, cell: Cell) -> RenderRequest:
    options, assigned = grid.options, grid.options.size
    assert assigned is not None
    prompt = f"{grid.prompts[cell.prompt].text} {grid.columns[cell.column].lora_text}".strip()
    return RenderRequest(prompt, options.negative_prompt, width=assigned[0], height=assigned[1], steps=options.steps,
                         cfg_scale=options.cfg_scale, seed=cell.seed, sampler=options.sampler, checkpoint=options.checkpoint)


def _without_effect(folder: Path, grid: Grid) -> list[str]:
    """A sentence for each save that paints what the base model paints: the host may not have found it."""
    def pixels(cell: Cell) -> bytes:
        with Image.open(folder / cell.file) as image:
            return image.tobytes()

    first = {cell.column: cell for cell in reversed(grid.cells) if cell.done}
    return [f"With {column.lora_text} the first picture is that of the base model: it has no effect there, or the host did not "
            "find it." for number, column in enumerate(grid.columns)
            if number and column.weight and number in first and 0 in first and pixels(first[number]) == pixels(first[0])]


def _remove_damaged(folder: Path, grid: Grid) -> None:
    """Remove images that cannot be read, so that they are sampled again."""
    for cell in grid.cells:
        try:
            if cell.done:
                with Image.open(folder / cell.file) as image:
                    image.verify()
        except (OSError, ValueError, SyntaxError):
            with translated("removing a damaged picture of the grid"):
                remove(folder / cell.file)


def _looked_at(folder: Path, grid: Grid) -> Grid:
    """The grid with what is there of its images."""
    try:
        there = {name for name in os.listdir(folder / FOLDER) if name.endswith(".png")}
    except OSError:
        there = set()
    return dataclasses.replace(grid, cells=tuple(dataclasses.replace(cell, done=cell.file.rpartition("/")[2] in there)
                                                 for cell in grid.cells))


def _write(folder: Path, grid: Grid) -> None:
    with translated("writing the grid"):
        write_atomic(folder / CELLS, json.dumps(dataclasses.asdict(grid), indent=1, ensure_ascii=False).encode())


def _gone(name: str) -> str:
    return str(LoraFileError(f"{name} is gone", why="its file is not there, or is another LoRA now"))
