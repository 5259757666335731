"""All that the results page shows of a run, as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lib_lora_train import events
from lib_lora_train.errors import printable
from lib_lora_train.host.port import Host
from lib_lora_train.results.history import RunHistory, read_history
from lib_lora_train.results.saves import Save, lora_text, result_path, saves_of
from lib_lora_train.run.record import read_settings

MOST_STEPS = 500
_SHOWN = ("samples", "grid")  # folders of a run's images


def overview(folder: Path, host: Host) -> dict[str, Any]:
    """What is known of the run in `folder`; numbers that are not finite are None, lists are empty for a run that has none.

        run, name, trigger_word   the run's id, its LoRA's name, "" for no trigger word
        result        {path, lora_text} of the LoRA's own file, or None before there is one
        saves         [{id, path, step, epoch, final, exists, size, is_result, lora_text, preview}], by step; an id stays
                      what it is where the file gets another name; the preview is an image's name in the run's folder, or ""
        held_out      {pictures, derived} or None
        measured      [Measured], by step; image_losses and diagnosed are such events or None
        samples       [{prompt, index, pictures: [{step, epoch, file, seed}]}], by prompt
        steps         [[step, loss, average loss, learning rate, text encoder's, gradient norm]], at most 500
        grid, recommended, task   None: filled by who makes them
    """
    history, settings = read_history(folder), read_settings(folder)
    result = result_path(folder)
    return plain({
        "run": folder.name, "name": settings.get("output_name", ""), "trigger_word": settings.get("trigger_word", ""),
        "result": {"path": str(result), "lora_text": lora_text(result)} if result is not None and result.is_file() else None,
        "saves": [{**_save(save), "preview": preview(history, folder, save)} for save in saves_of(folder)],
        "held_out": _fields(history.held_out),
        "measured": [_fields(event) for event in history.measured],
        "samples": _samples(history, folder),
        "image_losses": _fields(history.image_losses),
        "diagnosed": _fields(history.diagnosed),
        "steps": [[step.step, step.loss, step.average_loss, step.learning_rate, step.text_encoder_lr, step.gradient_norm]
                  for step in thinned(history.steps)],
        "grid": None, "recommended": None, "task": None,
    })


def preview(history: RunHistory, folder: Path, save: Save) -> str:
    """The image that shows a save best, by name in the run's folder: the first prompt's sample after its step; "" for none."""
    return next((event.file for event in history.sampled if event.step == save.step and image_of(folder, event.file)), "")


def image_of(folder: Path, name: str) -> Path | None:
    """The PNG of a run that `name` ("samples/1.png") names; None for anything else, wherever it leads."""
    parts = PurePosixPath(name).parts
    if len(parts) != 2 or parts[0] not in _SHOWN or set(parts[1]) & set('\\:\0') or not parts[1].endswith(".png"):
        return None
    path = folder.joinpath(*parts)
    try:
        within = path.resolve().parent == (folder / parts[0]).resolve()
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
