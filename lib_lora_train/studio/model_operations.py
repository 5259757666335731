"""Background tasks of the studio that need the host's model: caption scores and class (preservation) images.

Refused while a training uses the model; the host's own generation comes first, between two images.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from lib_lora_train.errors import DatasetError, HostError, Interrupted
from lib_lora_train.evaluation.caption_check import Checked, check_captions
from lib_lora_train.evaluation.class_images import make_class_images
from lib_lora_train.settings import parse
from lib_lora_train.storage.atomic import write_atomic
from lib_lora_train.studio import thumbs
from lib_lora_train.studio.dataset_session import DatasetSession, Score
from lib_lora_train.studio.requests import Selection
from lib_lora_train.studio.session import Studio
from lib_lora_train.studio.tasks import Task, TaskFunction

MOST_GENERATED = 48
"""Most captions that images are generated from: the worst of those that are checked."""


def check(studio: Studio, selection: Selection, *, seeds: int, steps: int, worst: int, values: Mapping[str, object]) -> int:
    """Score the selected captions, as edited, and generate images from the `worst` of them. Raises UserError, HostError."""
    settings = parse(values)
    with studio.using() as session:
        names = session.chosen_names(selection)
        captions = {session.path(name): session.store.caption(session.index(name)) for name in names}
        folder = _folder(session)

    def run(task: Task) -> str:
        shutil.rmtree(folder, ignore_errors=True)
        judged = []
        checking = check_captions(studio.host, list(captions.items()), settings=settings, seeds=seeds, steps=steps,
                                  worst=min(worst, len(captions)), on_progress=task.progress, should_stop=task.should_stop)
        # Closed at once where storing a result fails (a full disk): the model must not wait for Python's collector.
        with contextlib.closing(checking):
            for checked in checking:
                if checked.problem or checked.score is None:
                    task.problem(checked.path.name, checked.problem)
                    continue
                judged.append(_put_down(studio, session, checked, folder))
        task.result({"checked": len(judged)})
        return f"{len(judged):,} caption{'' if len(judged) == 1 else 's'} checked; look at the lowest scores first."

    return _start(studio, "Checking captions", run)


def _put_down(studio: Studio, session: DatasetSession, checked: Checked, folder: Path) -> Score:
    """One result, as soon as it is known: the worst come first."""
    name = session.name(checked.path)
    for number, image in enumerate(checked.images):
        write_atomic(_generated(folder, name, number), thumbs.jpeg(image))
    assert checked.score is not None
    likeness = None if checked.similarity is None else round(100 * checked.similarity, 1)
    score = Score(checked.caption, round(checked.score, 1), len(checked.images), likeness)
    with studio.using():
        session.scores[name] = score
        studio.changed()
    return score


def generated(studio: Studio, name: str, number: int) -> bytes:
    """An image that was generated from a caption, a JPEG. Raises DatasetError where there is none."""
    with studio.using() as session:
        session.index(name)
        path = _generated(_folder(session), name, number)
    with contextlib.suppress(OSError):
        return path.read_bytes()
    raise DatasetError(f"Nothing was painted from the caption of {name}", remedy="check captions first")


def class_images(studio: Studio, *, prompts: Sequence[str], count: int, size: tuple[int, int], steps: int, cfg: float,
                   seed: int) -> int:
    """Paint preservation images beside the dataset; the result names the folder to train with. Raises HostError."""
    with studio.using() as session:
        folder = session.dataset.folder.with_name(f"{session.dataset.name}-reg")

    def run(task: Task) -> str:
        task.result({"reg_data_dir": str(folder)})
        made = make_class_images(studio.host, prompts=prompts, count=count, folder=folder, size=size, steps=steps, cfg=cfg,
                                   seed=seed, on_progress=task.progress, should_stop=task.should_stop)
        task.result({"made": made.made, "found": made.found})
        return f"{made.made:,} painted, {made.found:,} were there."

    return _start(studio, "Painting class pictures", run)


def _start(studio: Studio, name: str, function: TaskFunction) -> int:
    if studio.runner.running():
        raise HostError("The model is in use", why="a training is running", remedy="wait for it or stop it first")
    if studio.host.checkpoint() is None:
        raise HostError("No model is loaded", remedy="choose a checkpoint first")

    def stopped_by_name(task: Task) -> str:
        try:
            return function(task)
        except Interrupted as error:
            raise Interrupted(f"{name} was stopped; what was done is kept") from error

    return studio.tasks.start(name, stopped_by_name, interrupted=studio.host.interrupted, with_model=True)


def _folder(session: DatasetSession) -> Path:
    return session.dataset.studio_folder / "checked"


def _generated(folder: Path, name: str, number: int) -> Path:
    digits = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return folder / f"{digits}-{number}.jpg"
