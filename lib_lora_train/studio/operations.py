"""Background tasks of the studio: importing, captioning, checking, shaping. Each function starts one and returns its number.

Nothing is locked while a task runs. Its results are stored at the end, under the session's lock; what was done until it was
stopped stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib_lora_train.dataset.report import examine
from lib_lora_train.errors import DatasetError, HostError, Interrupted
from lib_lora_train.model.family import training_sizes
from lib_lora_train.model.sd.tokens import Tokenizer
from lib_lora_train.settings import parse
from lib_lora_train.studio.cropping.crop import Shape, apply_shape
from lib_lora_train.studio.dataset_session import DatasetSession
from lib_lora_train.studio.importing.collect import Upload, collect
from lib_lora_train.studio.importing.owned import DEFAULT_REPEATS
from lib_lora_train.studio.requests import Selection, validated
from lib_lora_train.studio.session import Studio, proposed_repeats
from lib_lora_train.studio.tasks import Task
from lib_lora_train.tagging.loop import tag_images
from lib_lora_train.tagging.options import parse_options
from lib_lora_train.tagging.sources import find_source, sources


def import_paths(studio: Studio, paths: Sequence[str]) -> int:
    """Copy images from folders, files and zips of this machine into the dataset. Raises UserError, HostError."""
    return _import(studio, [studio.allowed(path) for path in paths], uploads=None)


def import_uploads(studio: Studio, batch: str) -> int:
    """Take what a page sent into the dataset. Raises DatasetError where nothing was sent, HostError."""
    with studio.using() as session:
        uploads, sent = session.uploads, session.uploads.pop(batch)
    try:
        return _import(studio, sent, uploads=sent)
    except BaseException:
        uploads.drop(sent)
        raise


def _import(studio: Studio, from_where: Sequence[Path | Upload], *, uploads: list[Upload] | None) -> int:
    with studio.changing("imported") as session:
        allowed = studio.host.allowed

        def may_read(path: Path) -> bool:
            # What was sent is in our own folder.
            return uploads is not None or allowed is None or allowed.may_read(path)

        def run(task: Task) -> str:
            before, stopped, notes = set(session.dataset.images), "", ()
            try:
                collected = collect(session.dataset, from_where, may_read=may_read, on_progress=task.progress,
                                    should_stop=task.should_stop)
                notes = collected.notes
                for name, why in collected.skipped:
                    task.problem(name, why)
            except Interrupted:
                stopped = "Stopped: "
            finally:
                # Also where the disk gave up: what is in the folder is in the dataset.
                new = [path for path in session.dataset.images if path not in before]
                with studio.using():
                    session.store.add(new)
                    _keep_repeats(session, before=len(before))
                    session.renew()
                    studio.changed()
            for note in notes:
                task.problem("", note)
            task.result({"added": [session.name(path) for path in new[:1000]], "count": len(new)})
            return f"{stopped}{_count(len(new), 'picture')} added."

        def ended() -> None:
            if uploads:
                session.uploads.drop(uploads)

        return studio.tasks.start("Importing pictures", run, ended=ended)


def _keep_repeats(session: DatasetSession, *, before: int) -> None:
    """Adapt the repeats to the number of images, unless the user chose others."""
    usual = (DEFAULT_REPEATS, proposed_repeats(max(1, before)))
    if session.store.images and session.dataset.repeats in usual:
        with contextlib.suppress(DatasetError):  # a program holds the folder: "Use for training" will say so
            session.set_repeats(proposed_repeats(len(session.store.images)))


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
        task.result({"changed": changed})
        return f"{stopped}{_count(changed, 'caption')} changed, not saved yet."

    return studio.tasks.start("Captioning", run)


def check(studio: Studio, values: Mapping[str, object]) -> int:
    """Look at every image and caption, as edited; the report is the dataset's afterwards. `values` are settings of the
    training. Raises UserError, HostError."""
    with studio.using() as session:
        dataset, store, content = session.dataset, session.store, session.content
        settings = parse({"trigger_word": dataset.concept, **values})
        unsaved = {store.images[i]: store.caption(i) for i in range(len(store.images)) if store.is_changed(i)}

    def run(task: Task) -> str:
        try:
            tokenizer: Tokenizer | None = studio.tokenizer()
        except HostError as error:
            tokenizer = None
            task.problem("", f"{error}")
        allowed = studio.host.allowed
        report = examine(dataset.folder, settings=settings, tokenizer=tokenizer, sizes=training_sizes(studio.family()),
                         unsaved=unsaved,
                         may_read=allowed.may_read if allowed else None, on_progress=task.progress,
                         should_stop=task.should_stop)
        with studio.using():
            session.set_report(report, content=content)
            studio.changed()
        return report.summary

    return studio.tasks.start("Looking at pictures", run)


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
                task.result({"count": len(shaped.done)})
                return f"{_count(len(shaped.done), 'picture')} shaped."
            finally:
                # Also where it was stopped: some are different now.
                with studio.using():
                    session.reshaped(names)
                    studio.changed()

        return studio.tasks.start("Shaping pictures", run)


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
