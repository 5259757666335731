"""Background tasks of the studio: importing, captioning, checking, shaping, caption scores, class (preservation) images.

Each function starts one and returns its number.

Nothing is locked while a task runs. Its results are stored at the end, under the session's lock; what was done until it was
stopped stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib_lora_train.dataset.findings import DatasetReport
from lib_lora_train.dataset.progress import Progress, ShouldStop
from lib_lora_train.dataset.report import examine
from lib_lora_train.errors import DatasetError, HostError, Interrupted, ModelError, SettingError, counted
from lib_lora_train.evaluation import caption_check
from lib_lora_train.evaluation.class_images import make_class_images
from lib_lora_train.model.family import training_sizes
from lib_lora_train.model.sd.tokens import Tokenizer
from lib_lora_train.settings import parse
from lib_lora_train.storage.atomic import write_atomic
from lib_lora_train.studio import thumbs
from lib_lora_train.studio.cropping.crop import Shape, apply_shape
from lib_lora_train.studio.dataset_session import DatasetSession, Score
from lib_lora_train.studio.importing.collect import Collected, Upload, collect
from lib_lora_train.studio.importing.owned import DEFAULT_REPEATS
from lib_lora_train.studio.requests import Selection, validated
from lib_lora_train.studio.session import Studio, proposed_repeats
from lib_lora_train.studio.tasks import Task, TaskFunction
from lib_lora_train.tagging.loop import tag_images
from lib_lora_train.tagging.options import parse_options
from lib_lora_train.tagging.sources import find_source, sources

SAMPLES = {name: Path(__file__).parents[1] / "demo" / name for name in ("style", "subject")}
"""The sample sets that come with the extension: images with captions, only read."""


def import_paths(studio: Studio, paths: Sequence[str]) -> int:
    """Copy images from folders, files and zips of this machine into the dataset. Raises UserError, HostError."""
    return _import(studio, [studio.allowed(path) for path in paths], uploads=None)


def import_samples(studio: Studio, name: str) -> int:
    """Copy a sample set into the dataset. Raises SettingError for a name that is none of `SAMPLES`, HostError."""
    if name not in SAMPLES:
        raise SettingError(f"There are no sample pictures called {name!r}", remedy="choose style or subject")
    return _import(studio, [SAMPLES[name]], uploads=None, trusted=True)


def import_uploads(studio: Studio, batch: str) -> int:
    """Take what a page sent into the dataset. Raises DatasetError where nothing was sent, HostError."""
    with studio.using() as session:
        uploads, sent = session.uploads, session.uploads.pop(batch)
    try:
        return _import(studio, sent, uploads=sent, trusted=True)
    except BaseException:
        uploads.drop(sent)
        raise


def _import(studio: Studio, from_where: Sequence[Path | Upload], *, uploads: list[Upload] | None, trusted: bool = False) -> int:
    with studio.changing("imported") as session:
        allowed, trained = studio.host.allowed, session.trained

        def may_read(path: Path) -> bool:
            # What was sent and the sample sets are in folders of our own.
            return trusted or allowed is None or allowed.may_read(path)

        def run(task: Task) -> str:
            before, stopped, collected = set(session.dataset.images), "", Collected((), ())
            try:
                collected = collect(session.dataset, from_where, may_read=may_read, on_progress=task.progress,
                                    should_stop=task.should_stop)
                with studio.using():
                    session.store.reread(collected.captioned)
                for name, why in collected.skipped:
                    task.problem(name, why)
            except Interrupted:
                stopped = "Stopped: "
            finally:
                # Also where the disk gave up: what is in the folder is in the dataset.
                new = [path for path in session.dataset.images if path not in before]
                with studio.using():
                    session.store.add(new)
                    _keep_repeats(session, before=trained)
                    session.renew()
                    studio.changed()
            for note in filter(None, [*collected.notes, collected.repeats_note(session.dataset.repeats),
                                      collected.captions if collected.unmatched or collected.unread else ""]):
                task.problem("", note)
            task.add_result({"added": [session.name(path) for path in new[:1000]], "count": len(new)})
            return f"{stopped}{counted(len(new), 'picture')} added."

        def ended() -> None:
            if uploads:
                session.uploads.drop(uploads)

        return studio.tasks.start("Importing pictures", run, ended=ended)


def _keep_repeats(session: DatasetSession, *, before: int) -> None:
    """Adapt the repeats to the number of images that are trained, unless the user chose others."""
    usual = (DEFAULT_REPEATS, proposed_repeats(max(1, before)))
    if session.store.images and session.dataset.repeats in usual:
        with contextlib.suppress(DatasetError):  # a program holds the folder: "Use for training" will say so
            session.set_repeats(proposed_repeats(session.trained))


def tag(studio: Studio, source_name: str, values: Mapping[str, Any], selection: Selection) -> int:
    """Caption the selected images; the captions land unsaved, as one step to undo. Raises UserError, HostError."""
    options, source = parse_options(values), find_source(source_name, sources(studio.host))
    if (missing := source.missing()) and not options.download:
        raise DatasetError(missing)
    with studio.using() as session:
        names = session.chosen_names(selection)
        paths = {session.path(name): name for name in names}

    def run(task: Task) -> str:
        found: dict[str, str] = {}

        def existing(path: Path) -> str:
            with studio.using():
                return session.store.readable_caption(session.index(paths[path]))

        stopped, changed = "", 0
        try:
            for path, caption, problem in tag_images(
                    list(paths), source, options=options, existing=existing, device=_device(), on_progress=task.progress,
                    should_stop=task.should_stop):
                if problem:
                    task.problem(path.name, problem)
                if caption is not None:
                    found[paths[path]] = caption
        except Interrupted:
            stopped = "Stopped: "
        finally:
            with studio.using():
                # An image may have been removed meanwhile.
                there = {index: text for name, text in found.items() if (index := session.find(name)) is not None}
                changed = session.store.set_captions(there, f"Caption with {source.label}") if there else 0
                session.renew()
                studio.changed()
        task.add_result({"changed": changed})
        return f"{stopped}{counted(changed, 'caption')} changed, not saved yet."

    return studio.tasks.start("Captioning", run)


def check(studio: Studio, values: Mapping[str, object]) -> int:
    """Look at every image and caption, as edited; the report is the dataset's afterwards. `values` are settings of the
    training. Raises UserError, HostError."""
    look = _look(studio, values)
    return studio.tasks.start("Looking at pictures", lambda task: look(
        on_progress=task.progress, should_stop=task.should_stop, problem=lambda text: task.problem("", text)).summary)


def check_in_background(studio: Studio, values: Mapping[str, object]) -> int:
    """The same after a change, in nobody's way: what changes images or captions ends it. Raises UserError, HostError."""
    look, second = _look(studio, values), studio.second_look
    if studio.tasks.running():
        raise HostError(f"The studio is busy ({studio.tasks.name()})", remedy="wait for it or stop it first")
    return second.start(lambda: look(on_progress=None, should_stop=lambda: bool(second.stopping), problem=lambda text: None),
                        name="The second look", doing="looking at pictures again", busy="Pictures are being looked at again")


def _look(studio: Studio, values: Mapping[str, object]) -> Callable[..., DatasetReport]:
    """What looks at the dataset as it is now and leaves the report with it."""
    with studio.using() as session:
        dataset, store, content = session.dataset, session.store, session.content
        settings = session.settings = parse({"trigger_word": dataset.concept, **values})
        unsaved = {store.images[i]: store.caption(i) for i in range(len(store.images)) if store.is_changed(i)}

    def look(*, on_progress: Progress | None, should_stop: ShouldStop, problem: Callable[[str], None]) -> DatasetReport:
        try:
            tokenizer: Tokenizer | None = studio.tokenizer()
        except (HostError, ModelError) as error:
            tokenizer = None
            problem(f"{error}")
        allowed = studio.host.allowed
        with studio.reading:
            report = examine(dataset.folder, settings=settings, tokenizer=tokenizer, sizes=training_sizes(studio.family()),
                             unsaved=unsaved, may_read=allowed.may_read if allowed else None, on_progress=on_progress,
                             should_stop=lambda: should_stop() or session.content != content and on_progress is None)
        with studio.held():
            session.set_report(report, content=content)
            studio.changed()
        return report

    return look


def shape(studio: Studio, values: Mapping[str, Any], selection: Selection) -> int:
    """Cut and scale the selected images. Raises UserError, HostError."""
    wanted = validated(Shape, values, what="shape")
    with studio.changing("shaped") as session:
        names = session.chosen_names(selection)
        for name in names:
            session.path(name)

        def run(task: Task) -> str:
            try:
                shaped = apply_shape(session.dataset, names, wanted, family=studio.family(),
                                     models_folder=studio.host.models_folder, on_progress=task.progress,
                                     should_stop=task.should_stop)
                for name, why in shaped.skipped:
                    task.problem(name, why)
                for note in shaped.notes:
                    task.problem("", note)
                task.add_result({"count": len(shaped.done)})
                return f"{counted(len(shaped.done), 'picture')} shaped."
            finally:
                # Also where it was stopped: some are different now.
                with studio.using():
                    session.renew(names)
                    studio.changed()

        return studio.tasks.start("Shaping pictures", run)


# ---- with the host's model: refused while a training uses it; the host's own generation comes first, between two images

def check_captions(studio: Studio, selection: Selection, *, seeds: int, steps: int, worst: int,
                   values: Mapping[str, object]) -> int:
    """Score the selected captions, as edited, and generate images from the `worst` of them. Raises UserError, HostError."""
    settings = parse(values)
    with studio.using() as session:
        names = session.chosen_names(selection)
        captions = {session.path(name): session.store.caption(session.index(name)) for name in names}
        folder = _folder(session)

    def run(task: Task) -> str:
        shutil.rmtree(folder, ignore_errors=True)
        count = 0

        def passes(images: int) -> int:
            return caption_check.PASSES * min(images, len(captions)) + seeds * steps * max(0, images - len(captions))

        checking = caption_check.check_captions(
            studio.host, list(captions.items()), settings=settings, seeds=seeds, steps=steps, worst=min(worst, len(captions)),
            on_progress=lambda done, total: task.progress(done, total, share=passes(done) / passes(total)),
            should_stop=task.should_stop)
        # Closed at once where storing a result fails (a full disk): the model must not wait for Python's collector.
        with contextlib.closing(checking):
            for checked in checking:
                if checked.problem or checked.score is None:
                    task.problem(checked.path.name, checked.problem)
                    continue
                _store_score(studio, session, checked, folder)
                count += 1
        task.add_result({"checked": count})
        return f"{counted(count, 'caption')} checked; look at the lowest scores first."

    return _start_with_model(studio, "Checking captions", run)


def _store_score(studio: Studio, session: DatasetSession, checked: caption_check.Checked, folder: Path) -> None:
    """One result, as soon as it is known: the worst come first."""
    name = session.name(checked.path)
    for number, image in enumerate(checked.images):
        write_atomic(_generated(folder, name, number), thumbs.jpeg(image))
    assert checked.score is not None
    likeness = None if checked.similarity is None else round(100 * checked.similarity, 1)
    with studio.using():
        session.scores[name] = Score(checked.caption, round(checked.score, 1), len(checked.images), likeness)
        studio.changed()


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
        task.add_result({"reg_data_dir": str(folder)})
        made = make_class_images(studio.host, prompts=prompts, count=count, folder=folder, size=size, steps=steps, cfg=cfg,
                                 seed=seed, on_progress=task.progress, should_stop=task.should_stop)
        task.add_result({"made": made.made, "found": made.found})
        return f"{made.made:,} painted, {made.found:,} were there."

    return _start_with_model(studio, "Painting class pictures", run)


def _start_with_model(studio: Studio, name: str, function: TaskFunction) -> int:
    if studio.runner.running():
        raise HostError("The model is in use", why="a training is running", remedy="wait for it or stop it first")
    if studio.host.checkpoint() is None:
        raise HostError("No model is loaded", remedy="choose a checkpoint first")

    def stopped_by_name(task: Task) -> str:
        try:
            return function(task)
        except Interrupted as error:
            raise Interrupted(f"{name} was stopped; what was done is kept") from error

    return studio.runner.with_model(lambda: studio.tasks.start(
        name, stopped_by_name, interrupted=studio.host.interrupted, with_model=True))


def _folder(session: DatasetSession) -> Path:
    return session.dataset.studio_folder / "checked"


def _generated(folder: Path, name: str, number: int) -> Path:
    digits = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return folder / f"{digits}-{number}.jpg"


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
