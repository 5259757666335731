"""A save is promoted: it becomes the LoRA, under the LoRA's own name, with card and preview. Saves are deleted.

Nothing is lost on the way: what lay under the name is written elsewhere before it is replaced, whole, and the steps are such
that a kill between any two of them leaves every weight on the disk.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib_lora_train.adapters import file
from lib_lora_train.adapters.metadata import renamed
from lib_lora_train.errors import HostError, LoraFileError, LoraTrainError, OutputError, SettingError, counted, translated
from lib_lora_train.host.port import Host
from lib_lora_train.model.family import FAMILIES
from lib_lora_train.results import user_metadata
from lib_lora_train.results.grid import FOLDER
from lib_lora_train.results.history import read_history
from lib_lora_train.results.overview import shown
from lib_lora_train.results.recommend import recommend
from lib_lora_train.results.references import resolution_of
from lib_lora_train.results.saves import Save, lora_text, origin, result_path, saves_of, wrote
from lib_lora_train.run.record import read_settings
from lib_lora_train.settings.allowed_paths import AllowedPaths, inside
from lib_lora_train.storage.atomic import remove
from lib_lora_train.storage.lock import is_locked

log = logging.getLogger(__name__)
MOST_WEIGHT = 2.0  # of the WebUI's slider
AVERAGE = "average"
_REFRESH_SECONDS = 2.0
_LOCK = threading.Lock()  # two requests at once would use the same temporary files


def promote(folder: Path, save_id: str, *, weight: float, host: Host) -> dict[str, Any]:
    """Make a save of the run in `folder` the LoRA, to be used at `weight`. "NAME-average" is the mean of the last saves, where
    the grid made one.

    Returns path, card and preview of the LoRA, where the weights are `kept` that had its name before ("" for none), and what
    to send to text-to-image: lora_text, prompt (with it), width, height.
    Raises LoraFileError for a save that is not there or not the run's, SettingError for a weight that cannot be, OutputError
    where another LoRA has the name or the card is damaged, and HostError while a run of that name is under way. Nothing has
    changed then, but where the disk refused half-way; all weights are there all the same.
    """
    if not (math.isfinite(weight) and 0 < weight <= MOST_WEIGHT):
        raise SettingError(f"A weight of {weight:g} is not possible", why=f"the WebUI's cards know 0 to {MOST_WEIGHT:g}")
    with _LOCK:
        source, target = source_of(folder, save_id), _target(folder, host)
        _refuse_while_training(folder)
        card = user_metadata.read_user_metadata(target)
        kept = _keep_former(folder, target, source)
        image_shown = shown(folder, save_id, weight=weight)
        image = user_metadata.read_preview(image_shown.path)
        _copy(source, target, trigger=_trigger(folder), thumbnail=user_metadata.thumbnail(image) if image else b"")
        preview = user_metadata.write_preview(target, image)
        best = recommend(folder)
        reason = f" {best.reason}" if best and (best.save, best.weight) == (save_id, weight) else ""
        values = {**_values_of(folder, target), "preferred weight": round(weight, 2), "negative text": "",
                  "notes": f"Taken from {save_id}, at a weight of {weight:g}.{reason}"}
        user_metadata.write_user_metadata(target, user_metadata.merged(card, values))
    if kept is not None:
        dress(folder, host.allowed, only=kept)
    _refresh(host)
    text = lora_text(target, round(weight, 2))
    width, height = resolution_of(folder)
    return {"path": str(target), "card": str(user_metadata.metadata_path(target)), "preview": str(preview or ""),
            "kept": str(kept or ""), "lora_text": text, "prompt": f"{image_shown.prompt or _trigger(folder)} {text}".strip(),
            "width": width, "height": height}


def delete(folder: Path, ids: Sequence[str], *, host: Host) -> list[str]:
    """Delete these saves of the run in `folder`, with the cards and previews that are ours; returns the names of the files.

    Raises LoraFileError for one that the run has not, did not write or that is the LoRA itself, before anything is deleted,
    and OutputError.
    """
    with _LOCK:
        known, result = {save.id: save for save in saves_of(folder)}, result_path(folder)
        chosen = [save for save in (_known(known, one) for one in dict.fromkeys(ids)) if save.exists]
        for save in chosen:
            _check(save)
            if save.path == result:
                raise LoraFileError(f"{save.id} is not deleted", why="it is what the LoRA's own file holds",
                                    remedy="make another one the LoRA first")
            _check_writable(save.path, host.allowed)
        for save in chosen:
            with translated(f"deleting {save.path.name}"):
                remove(save.path)
            user_metadata.remove_ours(save.path)
    _refresh(host)
    return [save.path.name for save in chosen]


def dress(folder: Path, allowed: AllowedPaths | None = None, *, only: Path | None = None) -> None:
    """Give every save of the run its card and preview, or the one at `only`, so that it can be told from the others among the
    WebUI's LoRAs. What cannot be written, or is not `allowed`, is logged, and nothing of the user's changed."""
    for save in saves_of(folder):
        if not save.own or only not in (None, save.path):
            continue
        try:
            with _LOCK:
                _check_writable(save.path, allowed)
                card = user_metadata.read_user_metadata(save.path)
                user_metadata.write_preview(save.path, user_metadata.read_preview(shown(folder, save.id).path))
                user_metadata.write_user_metadata(save.path, user_metadata.merged(card, _values_of(folder, save.path)))
        except (LoraTrainError, OSError, ValueError) as error:
            log.warning("%s has no card: %s", save.path.name, error)


def source_of(folder: Path, save_id: str) -> Path:
    """The file of that save of the run, or of the mean of its last ones. Raises LoraFileError."""
    average = _average(folder)
    if save_id == average.stem and average.is_file():
        return average
    save = _known({save.id: save for save in saves_of(folder)}, save_id)
    _check(save)
    return save.path


def _known(known: dict[str, Save], save_id: str) -> Save:
    if save_id not in known:
        raise LoraFileError(f"The run has no save called {save_id!r}", remedy="see the list of its saves")
    return known[save_id]


def _check(save: Save) -> None:
    if not save.exists:
        raise LoraFileError(f"{save.id} is gone", why="its file was removed, or another LoRA lies there",
                            remedy="choose another save")
    if not save.own:
        raise LoraFileError(f"{save.path} is left as it is", why="it does not say that this run wrote it",
                            remedy="choose another save")


def _target(folder: Path, host: Host) -> Path:
    """The LoRA's own file, which is this run's or not there yet."""
    target = result_path(folder)
    assert target is not None, "a run with a save has one"
    _check_writable(target, host.allowed)
    if target.exists() and not wrote(folder, target):
        raise OutputError(f"There is another LoRA called {target.stem!r}", why=f"{target} was not written by this run",
                          remedy="rename it, then try again")
    return target


def _average(folder: Path) -> Path:
    """Where the grid keeps the mean of the last saves."""
    return folder / FOLDER / f"{read_settings(folder).get('output_name', '')}-{AVERAGE}.safetensors"


def _keep_former(folder: Path, target: Path, source: Path) -> Path | None:
    """Have what lies at `target` somewhere else, before it is replaced by `source`; returns where, None where nothing lay there
    or it is the same."""
    def hash_of(path: Path) -> str:
        found = origin(path)
        return found.model_hash if found else ""

    saves, former = saves_of(folder), hash_of(target)
    if former in ("", hash_of(source)):
        return None
    lying = next((save for save in saves if save.is_result), None)
    kept = lying.home if lying else target.with_name(f"{target.stem}-{AVERAGE}{target.suffix}")
    for place in (kept, _average(folder), *(save.path for save in saves if save.path != target)):
        if hash_of(place) == former:
            return place
    if kept.exists():
        raise OutputError(f"{target.stem} is not replaced, for it could not be kept", why=f"{kept} is another LoRA",
                          remedy="rename it, then try again")
    _copy(target, kept)
    return kept


def _copy(source: Path, target: Path, *, trigger: str = "", thumbnail: bytes = b"") -> None:
    """Write the weights of `source` to `target`, described under that name."""
    read = file.load(source)
    dtype = next(iter(read.tensors.values())).dtype
    file.save(target, read.tensors, renamed(read.metadata, target.stem, trigger_word=trigger, thumbnail=thumbnail), dtype=dtype)


def _values_of(folder: Path, lora: Path) -> dict[str, object]:
    """What a card says of any save, by the WebUI's names."""
    metadata, planned = file.read_metadata(lora), read_history(folder).planned
    version = metadata.get("ss_base_model_version", "")
    family = next((one.title for one in FAMILIES.values() if version.startswith(one.metadata.base_version)), "Unknown")
    made = f"Step {metadata.get('ss_steps')}, epoch {metadata.get('ss_epoch')}"
    if planned:
        made = f"{made}; trained for {planned.steps} on {planned.checkpoint} with {counted(planned.pictures, 'picture')}"
    return {"description": f"{made}.", "sd version": family, "activation text": _trigger(folder)}


def _trigger(folder: Path) -> str:
    return str(read_settings(folder).get("trigger_word", ""))


def _refuse_while_training(folder: Path) -> None:
    """Raise HostError while this run, or another one of its name, is under way: it writes to the same files."""
    name = read_settings(folder).get("output_name")
    for run in [folder, *folder.parent.glob("*")]:
        if is_locked(run) and (run == folder or read_settings(run).get("output_name") == name):
            raise HostError(f"A training of {name} is under way", why=f"{run.name} writes to the same files",
                            remedy="wait for it or stop it first")


def _check_writable(path: Path, allowed: AllowedPaths | None) -> None:
    if allowed is not None and not inside(str(path), allowed.writing):
        raise SettingError(f"{path} is left as it is", why="others can reach this page, so it keeps to the folders it "
                           "is allowed", remedy=allowed.advice)


def _refresh(host: Host) -> None:
    """Have the host list its LoRAs anew, at once where it can: a training may hold its queue for hours."""
    thread = threading.Thread(target=host.refresh_loras, name="lora-train-refresh", daemon=True)
    thread.start()
    thread.join(_REFRESH_SECONDS)
