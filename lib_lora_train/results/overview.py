"""All that the results page shows of a run, as plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lib_lora_train import events
from lib_lora_train.errors import printable
from lib_lora_train.results.grid import Grid, read_grid
from lib_lora_train.results.history import RunHistory, read_history, read_steps
from lib_lora_train.results.improvement import ImageGains, improvement
from lib_lora_train.results.recommend import leaves, recommend
from lib_lora_train.results.saves import Save, lora_text, result_path, saves_of
from lib_lora_train.results.scoring import read_scores
from lib_lora_train.run.record import read_settings

MOST_STEPS = 500
_SHOWN = ("samples", "grid")  # folders of a run's images


def overview(folder: Path) -> dict[str, Any]:
    """What is known of the run in `folder`; numbers that are not finite are None, lists are empty for a run that has none.

        run, name, trigger_word   the run's id, its LoRA's name, "" for no trigger word
        result        {path, lora_text} of the LoRA's own file, or None before there is one
        saves         [{id, path, step, epoch, final, exists, size, is_result, lora_text, preview}], by step; an id stays
                      what it is where the file gets another name; the preview is an image's name in the run's folder, or ""
        held_out      {pictures, derived} or None
        measured      [Measured], by step, each with `better` {training, held_out: [per cent over all, and of each band]} as
                      `improvement` has it; image_losses and diagnosed are such events or None
        image_gains   as `ImageGains` has it, of image_losses, or None
        samples       [{prompt, index, pictures: [{step, epoch, file, seed}]}], by prompt
        steps         [[step, loss, average loss, learning rate, text encoder's, gradient norm]], at most 500
        grid          as `Grid.to_dict` has it, with `scores`, one for each column ([] for none), and those of each cell, both
                      as `Scores.to_dict` has them, a column's with the bounds that it `leaves`, in words; or None
        recommended   {save, weight, reason, order} or None
        task          None: filled by who runs one
    """
    history, settings = read_history(folder), read_settings(folder)
    result, grid, best = result_path(folder), read_grid(folder), recommend(folder)
    return plain({
        "run": folder.name, "name": settings.get("output_name", ""), "trigger_word": settings.get("trigger_word", ""),
        "result": {"path": str(result), "lora_text": lora_text(result)} if result is not None and result.is_file() else None,
        "saves": [{**_save(save), "preview": _shown(folder, history, grid, save_id=save.id, step=save.step, weight=1).file}
                  for save in saves_of(folder)],
        "held_out": _fields(history.held_out),
        "measured": [{**(_fields(event) or {}), "better": _better(event)} for event in history.measured],
        "samples": _samples(history, folder),
        "image_losses": _fields(history.image_losses),
        "image_gains": dataclasses.asdict(ImageGains.of(history.image_losses)) if history.image_losses else None,
        "diagnosed": _fields(history.diagnosed),
        "steps": [[step.step, step.loss, step.average_loss, step.learning_rate, step.text_encoder_lr, step.gradient_norm]
                  for step in thinned(read_steps(folder))],
        "grid": _grid(folder, grid) if grid else None, "recommended": best.to_dict() if best else None, "task": None,
    })


def _grid(folder: Path, grid: Grid) -> dict[str, Any]:
    """The grid with the scores of its columns and its cells, as far as they were measured, and the notes of both."""
    found, scores = grid.to_dict(), read_scores(folder)
    if scores is None:
        return {**found, "scores": []}
    measured = scores.to_dict()
    cells = [{**cell, "scores": measured["images"].get(cell["file"])} for cell in found["cells"]]
    columns = [{**one, "leaves": leaves(column, scores.columns[0], scores.held_out_following) if column.column.save else []}
               for one, column in zip(measured["columns"], scores.columns, strict=True)]
    return {**found, "cells": cells, "scores": columns, "notes": list(dict.fromkeys([*grid.notes, *measured["notes"]]))}


@dataclasses.dataclass(frozen=True)
class Shown:
    """The image that shows a save best: its name in the run's folder, its path and the prompt; "" and None for none."""

    file: str = ""
    path: Path | None = None
    prompt: str = ""


def shown(folder: Path, save_id: str, *, weight: float = 1) -> Shown:
    """What shows this save of the run in `folder` at `weight` best: the first prompt's sample after its step, else the grid's
    first image of it at the nearest weight."""
    history = read_history(folder)
    step = next((event.step for _, event in reversed(history.saved) if Path(event.path).stem == save_id), None)
    return _shown(folder, history, read_grid(folder), save_id=save_id, step=step, weight=weight)


def _shown(folder: Path, history: RunHistory, grid: Grid | None, *, save_id: str, step: int | None, weight: float) -> Shown:
    for event in history.sampled:
        if event.step == step and (path := image_of(folder, event.file)):
            return Shown(event.file, path, event.prompt)
    cells = [cell for cell in grid.wanted if cell.done and grid.columns[cell.column].save == save_id
             and not grid.columns[cell.column].part and grid.prompts[cell.prompt].triggered] if grid else []
    for cell in sorted(cells, key=lambda cell: abs(grid.columns[cell.column].weight - weight)):
        if path := image_of(folder, cell.file):
            return Shown(cell.file, path, grid.prompts[cell.prompt].text)
    return Shown()


def image_of(folder: Path, name: str) -> Path | None:
    """The PNG of a run that `name` ("samples/1.png") names; None for anything else, wherever it leads."""
    parts = PurePosixPath(name).parts
    if len(parts) != 2 or parts[0] not in _SHOWN or set(parts[1]) & set('\\:\0') or not parts[1].endswith(".png"):
        return None
    path = folder.joinpath(*parts)
    try:
        within = path.resolve().parent == folder.resolve() / parts[0]
        return path if within and path.is_file() else None
    except (OSError, ValueError):
        return None


def thinned(steps: Sequence[events.Step], most: int = MOST_STEPS) -> list[events.Step]:
    """At most so many of the steps, evenly, the last among them."""
    every = max(1, -(-len(steps) // most))
    return [steps[index] for index in range((len(steps) - 1) % every, len(steps), every)]


def _samples(history: RunHistory, folder: Path) -> list[dict[str, Any]]:
    """The samples by prompt; of a prompt that was changed on the way, under its last words."""
    strips: dict[int, dict[str, Any]] = {}
    for event in history.sampled:
        if image_of(folder, event.file):
            strip = strips.setdefault(event.index, {"prompt": "", "index": event.index, "pictures": []})
            strip["prompt"] = event.prompt
            strip["pictures"].append({"step": event.step, "epoch": event.epoch, "file": event.file, "seed": event.seed})
    return [strips[index] for index in sorted(strips)]


def _save(save: Save) -> dict[str, Any]:
    return {"id": save.id, "path": str(save.path), "step": save.step, "epoch": save.epoch, "final": save.final,
            "exists": save.exists, "size": save.size, "is_result": save.is_result, "lora_text": lora_text(save.path)}


def _better(event: events.Measured) -> dict[str, list[float | None]]:
    return {kind: [improvement(losses, unadapted), *(improvement([loss], [other]) for loss, other in zip(
        losses, unadapted, strict=False))] for kind, losses, unadapted in (
            ("training", event.training, event.unadapted_training), ("held_out", event.held_out, event.unadapted_held_out))}


def _fields(event: events.Event | None) -> dict[str, Any] | None:
    """The event as plain data, without its kind."""
    return None if event is None else {name: value for name, value in events.to_dict(event).items() if name != "event"}


def plain(value: Any) -> Any:
    """`value` as JSON has it: it has no NaN, nor names of files that are no text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
