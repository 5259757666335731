"""What a page shows of the studio, as plain data: JSON can hold it as it is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lib_lora_train.dataset.held_out import FEWEST
from lib_lora_train.errors import printable
from lib_lora_train.settings.field import declarations
from lib_lora_train.studio.dataset_session import DatasetSession
from lib_lora_train.studio.requests import Selection
from lib_lora_train.studio.session import Studio
from lib_lora_train.tagging.options import TagOptions
from lib_lora_train.tagging.sources import sources

if TYPE_CHECKING:
    from lib_lora_train.dataset.findings import DatasetReport

MOST_TAGS = 500


def state(studio: Studio) -> dict[str, Any]:
    """Everything but the images themselves: the open dataset, the others, the task, the captioners."""
    task, datasets = studio.tasks.status(), studio.datasets()
    with studio.held() as session:
        shown = None if session is None else _dataset(session)
        version = studio.version
    return {
        "dataset": shown, "datasets": [{"name": printable(name), "pictures": count} for name, count in datasets],
        "task": None if task is None else {
            "id": task.id, "name": task.name, "done": task.done, "total": task.total, "seconds_left": task.seconds_left,
            "running": task.running, "stopping": task.stopping, "outcome": task.outcome, "message": task.message,
            "problems": [{"picture": image, "text": text} for image, text in task.problems],
            "more_problems": task.more_problems, "result": task.result},
        "sources": [{"name": source.name, "label": source.label, "reads": source.reads, "missing": source.missing()}
                    for source in sources(studio.host)],
        "training": studio.runner.running(), "version": version}


def _dataset(session: DatasetSession) -> dict[str, Any]:
    dataset, store = session.dataset, session.store
    counts, look, shaped = session.counts()
    return {
        "name": printable(dataset.name), "folder": printable(str(dataset.folder)),
        "repeats": dataset.repeats, "trigger_word": dataset.concept, "pictures": len(store.images), "shaped": shaped,
        "held_out": {"pictures": len(session.held_out), "fewest": FEWEST,
                     "share": session.settings.evaluation.validation_split},
        "unsaved": store.unsaved, "can_undo": store.can_undo, "can_redo": store.can_redo,
        "report": None if session.report is None else {
            **_report(session.report, session), "counts": dict(counts), "to_look_at": look}}


def _report(report: DatasetReport, session: DatasetSession) -> dict[str, Any]:
    return {"advice": list(report.advice), "proposal": dataclasses.asdict(report.proposal),
            "summary": report.summary, "fresh": session.fresh,
            "duplicates": [[session.name(path) for path in group] for group in report.duplicates]}


def images(studio: Studio, selection: Selection, *, offset: int, limit: int, sort: str) -> dict[str, Any]:
    """One page of the gallery: {"total": how many the filter lets through, "pictures": […]}."""
    with studio.using() as session:
        chosen = session.sorted(session.chosen(selection), sort)
        shown = [session.entry(index) for index in chosen[offset:offset + limit]]
        return {"total": len(chosen), "pictures": shown}


def tags(studio: Studio, selection: Selection) -> dict[str, Any]:
    """The tags of the selected images, the most frequent first."""
    with studio.using() as session:
        found = session.store.tags(session.chosen(selection))
        return {"tags": [list(pair) for pair in found[:MOST_TAGS]], "total": len(found)}


def tag_options() -> list[dict[str, Any]]:
    """What can be chosen when images are captioned, as `service.settings_list` lists settings."""
    return [{"name": d.name, "type": d.type.__name__, "default": d.default, "minimum": d.minimum, "maximum": d.maximum,
             "step": d.step, "choices": list(d.choices), "label": d.label, "help": d.help, "in_view": d.in_view}
            for d in declarations(TagOptions)]
