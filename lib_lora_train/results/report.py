"""The report of a run: one HTML file that stands alone, to read later or to give to others.

It asks no network for anything: curves are inline SVG, images small JPEGs inside the file, the look is `report.css`. Files
are named and folders are not; users' names and the comment are replaced as in the report of a problem.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import torch

from lib_lora_train import __version__, events
from lib_lora_train.adapters.file import read_metadata
from lib_lora_train.errors import LoraFileError, counted, printable
from lib_lora_train.host.port import Host
from lib_lora_train.results.charts import Line, chart
from lib_lora_train.results.history import read_history
from lib_lora_train.results.improvement import improvement
from lib_lora_train.results.inline_images import image, spread, strips
from lib_lora_train.results.overview import overview
from lib_lora_train.results.saves import lora_text
from lib_lora_train.run.diagnostics import Private
from lib_lora_train.run.record import PastRun, past_run, read_events, read_settings
from lib_lora_train.settings import DECLARATIONS, named
from lib_lora_train.settings.toml import write_toml
from lib_lora_train.storage.atomic import write_atomic

log = logging.getLogger(__name__)
FILE = "report.html"
_BANDS = ("Little noise (low timesteps)", "Middle timesteps", "Much noise (high timesteps)")
_KIND = {"learning": "good", "diverging": "bad", "ruined": "bad", "done": "good", "failed": "bad"}
_LEFT_OUT = frozenset({"training_comment", "output_dir", "resume", "train_data_dir"})
"""Settings that say where things are, or are nobody else's business."""
_POLICY = ('<meta http-equiv="Content-Security-Policy" '
           'content="default-src \'none\'; img-src data:; style-src \'unsafe-inline\'">')
"""Captions and names are escaped; the page opens the report from memory, where no header of the server counts."""
_MOST_LISTED = 500
_MOST_COLUMNS = 24
_NUMBERS = {
    "likeness": ("Likeness", "to the pictures that were not trained on, patch by patch; more is better"),
    "prompt_following": ("Prompt following", "how well the caption without the trigger word fits; about 0 is good, much less "
                         "forgets what was asked for"),
    "tag_recall": ("Tags", "share of the prompt's tags that a tagger finds; more is better"),
    "drift": ("Drift", "how far pictures without the trigger word move; less is better"),
    "copy_risk": ("Copy risk", "how much nearer they are to a trained picture than to a held-out one; less is better"),
}
"""Of the grid's scores: what each is called, and what it says."""


def write_report(folder: Path, host: Host | None = None) -> None:
    """Write the run's report into its folder. A fault is logged: a run has ended well without one."""
    try:
        if folder.is_dir():
            write_atomic(folder / FILE, report_html(folder, host).encode())
    except Exception:
        log.exception("The report of the run %s was not written", folder.name)


def report_html(folder: Path, host: Host | None = None) -> str:
    """The report of the run of this folder, however it ended and whatever version recorded it."""
    run = _Run.read(folder, host)
    samples = _section("Pictures on the way", strips(folder, run.data["samples"]),
                       "The same prompts and seeds after so many steps; a click enlarges.")
    sections = (_header(run), _recommended(run), _curves(run), samples, _grid(run), _saves(run), _image_gains(run),
                _dataset(run), _settings(run), _repeat(run), _warnings(run))
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    title = html.escape(run.past.name or folder.name)
    return printable(
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{_POLICY}<title>{title}: report of a LoRA</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>\n{style}</style></head>\n'
        f'<body><main>{"".join(sections)}</main>{_footer()}</body></html>\n')


@dataclasses.dataclass(frozen=True)
class _Run:
    """All that a report tells; `data` is `overview`'s, `metadata` that of the newest save that is there."""

    folder: Path
    data: Mapping[str, Any]
    past: PastRun
    settings: Mapping[str, Any]
    planned: events.Planned | None
    warnings: tuple[str, ...]
    metadata: Mapping[str, str]
    private: Private
    paths: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path, host: Host | None) -> _Run:
        known, settings, data = tuple(read_events(folder)), read_settings(folder), overview(folder)
        warned = dict.fromkeys(event.message for event in known if isinstance(event, events.Warned))
        paths = {path: _file_name(path) for event in known if (path := getattr(event, "path", ""))}
        metadata: Mapping[str, str] = {}
        for save in data["saves"]:
            try:
                metadata = read_metadata(Path(save["path"])) if save["exists"] else metadata
            except LoraFileError:
                continue
        return cls(folder, data, past_run(folder), settings, read_history(folder).planned, tuple(warned), metadata,
                   Private.of(settings, host=host, run=folder), paths)

    def text(self, message: str) -> str:
        """A sentence as HTML, without folders and users."""
        for path, name in sorted(self.paths.items(), key=lambda entry: -len(entry[0])):
            message = message.replace(path, name)
        return html.escape(self.private.replaced(message))

    @functools.cached_property
    def checkpoint(self) -> str:
        """The name and the hash of the model that was trained on, as far as anybody knows them."""
        name = self.planned.checkpoint if self.planned else self.metadata.get("ss_sd_model_name", "")
        known = self.metadata.get("ss_new_sd_model_hash", "")[:10] or self.metadata.get("ss_sd_model_hash", "")
        return f"{_file_name(name)} [{known}]" if known else _file_name(name)


def _file_name(path: str) -> str:
    return PureWindowsPath(path).name or path  # it takes both kinds of slashes


def _section(title: str, body: str, lead: str = "") -> str:
    about = f'<p class="lead">{html.escape(lead)}</p>' if lead else ""
    return f"<section><h2>{html.escape(title)}</h2>{about}{body}</section>\n" if body else ""


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table of rows that are HTML; a head that begins with > is that of numbers."""
    names = "".join(f'<th class="n">{head[1:]}</th>' if head[:1] == ">" else f"<th>{head}</th>" for head in heads)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _listed(entries: Mapping[str, object]) -> str:
    return "<dl>" + "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>"
                            for name, value in entries.items() if value not in ("", None)) + "</dl>"


def _header(run: _Run) -> str:
    past, found, planned = run.past, run.data["diagnosed"], run.planned
    trained = f"{past.steps:,} of {past.total:,}" if past.total and past.steps != past.total else f"{past.steps:,}"
    told = f"<p>{run.text(past.message)}</p>" if past.message else ""
    kind = _KIND.get(past.outcome, "warn")
    if found:
        kind = _KIND.get(found["finding"], "warn") if past.outcome != "failed" else "bad"
        change = f"{named(found['setting'])} = {found['value']}" if found["setting"] in DECLARATIONS else ""
        told = (f"<b>{run.text(found['finding'].capitalize())}</b><p>{run.text(found['message'])}</p>"
                f"{f'<p>Next time: <code>{html.escape(change)}</code></p>' if change else ''}{told}")
    elif past.verdict == "ruined":
        kind = "bad"
    settings, verdict = run.settings, f'<div class="verdict {kind}">{told}</div>' if told else ""
    rank = f"{settings.get('network_dim', '')} / {settings.get('network_alpha', '')}"
    return (f'<h1>{html.escape(past.name or run.folder.name)}</h1><p class="lead">{html.escape(run.folder.name)} · '
            f'{html.escape(past.outcome)}</p>{verdict}' + _listed({
                "Checkpoint": run.checkpoint, "Pictures": planned.pictures if planned else "", "Steps": trained,
                "Size": planned.resolution if planned else "", "Rank / alpha": rank if settings else "",
                "Learning rate": settings.get("unet_lr") or settings.get("learning_rate", ""),
                "Trigger word": settings.get("trigger_word", ""), "Seed": planned.seed if planned else ""}))


def _recommended(run: _Run) -> str:
    chosen = run.data["recommended"]
    save = next((save for save in run.data["saves"] if chosen and save["id"] == chosen["save"]), None)
    if save is None:
        return ""
    shown = image(run.folder, save["preview"], save["id"]) if save["preview"] else ""
    prompt = html.escape(lora_text(save["path"], chosen["weight"]))
    return _section("The save to take", f'<div class="take">{shown}<div><p><code>{prompt}</code></p>'
                    f"<p>{run.text(chosen['reason'])}</p></div></div>")


def _compared(measured: Sequence[Mapping[str, Any]], band: slice, *, marked: bool) -> list[Line]:
    """How much better than the base model, on held-out and on training pictures, in these bands of timesteps."""
    return [Line(name, style, [(entry["step"], improvement(entry[key][band], entry[f"unadapted_{key}"][band]))
                               for entry in measured], marked=marked)
            for name, style, key in (("held-out pictures", "blue", "held_out"), ("training pictures", "orange", "training"))]


def _curves(run: _Run) -> str:
    measured, steps = run.data["measured"], run.data["steps"]
    last = max([run.past.steps, *(entry["step"] for entry in measured), *(entry[0] for entry in steps[-1:])])
    percent, short = "{:.3g} %".format, "{:.3g}".format
    learnt = chart("Better than the base model", _compared(measured, slice(None), marked=True), shown=percent, last=last,
                   zero=True, note="The loss on fixed noise, compared with the base model on the same pictures. Where the "
                   "training pictures go on rising and the held-out ones do not, the LoRA copies.")
    bands = "".join(chart(name, _compared(measured, slice(index, index + 1), marked=True), shown=percent, last=last, zero=True,
                          small=True) for index, name in enumerate(_BANDS))

    def of(column: int) -> list[tuple[int, float | None]]:
        return [(entry[0], entry[column]) for entry in steps]
    loss = chart("Loss of the steps", [Line("each step", "faint", of(1)), Line("moving average", "blue", of(2))],
                 shown=short, last=last)
    rates = [Line("UNet", "blue", of(3))] + ([Line("text encoder", "orange", of(4))] if any(e[4] for e in steps) else [])
    others = (chart("Learning rate", rates, shown=short, last=last, small=True, zero=True)
              + chart("Length of the gradient", [Line("before clipping", "blue", of(5))], shown=short, last=last, small=True))
    return _section("Curves", learnt + (f'<div class="charts">{bands}</div>' if bands else "") + loss
                    + (f'<div class="charts two">{others}</div>' if others else ""))


def _grid(run: _Run) -> str:
    grid = run.data["grid"]
    if not grid or not grid["columns"]:
        return ""
    rated = grid["scores"]
    measured = [name for name in _NUMBERS if any(one[name]["mean"] is not None for one in rated)]
    first = {(cell["column"], cell["prompt"]): cell["file"] for cell in reversed(grid["cells"]) if cell["done"]}
    rows = []
    for number in spread(range(len(grid["columns"])), _MOST_COLUMNS):
        column = grid["columns"][number]
        part = {"unet": ", UNet only", "text": ", text encoder only"}.get(column["part"], "")
        told = [html.escape(column["save"]), f"{column['weight']:g}{part}"] if column["save"] else ["base model"]
        files = [first.get((number, line), "") for line in range(len(grid["prompts"]))]
        numbers = "".join(f'<td class="n">{_number(rated[number][name], rated[0][name])}</td>' for name in measured)
        shown = "".join(f"<td>{file and image(run.folder, file, '')}</td>" for file in files)
        rows.append(f"<tr><td>{'<br>'.join([*told, run.text(column['problem'])])}</td>{numbers}{shown}</tr>")
    heads = ["Save, weight", *(f">{_NUMBERS[name][0]}" for name in measured),
             *(html.escape(prompt["text"]) for prompt in grid["prompts"])]
    lead = "The numbers of a save are what it differs by from the base model, ± their deviation over the seeds. " + " ".join(
        f"{_NUMBERS[name][0]}: {_NUMBERS[name][1]}." for name in measured) if measured else ""
    notes = "".join(f'<p class="note">{run.text(note)}</p>' for note in dict.fromkeys(grid["notes"]))
    return _section("Saves and weights", _table(heads, rows) + notes, lead)


def _number(score: Mapping[str, float | None], unadapted: Mapping[str, float | None]) -> str:
    """A score beside the base model's, or the base model's own."""
    mean, zero, deviation = score["mean"], unadapted["mean"], score["deviation"]
    if mean is None:
        return ""
    told = f"{mean:.3f}" if score is unadapted or zero is None else f"{mean - zero:+.3f}"
    return told + ("" if deviation is None else f" ± {deviation:.3f}")


def _saves(run: _Run) -> str:
    by_step = {entry["step"]: entry for entry in run.data["measured"]}
    chosen, rows = (run.data["recommended"] or {}).get("save"), []
    for save in run.data["saves"]:
        entry = by_step.get(save["step"])
        better = [improvement(entry[key], entry[f"unadapted_{key}"]) if entry else None for key in ("held_out", "training")]
        marks = [name for name, holds in (
            ("recommended", save["id"] == chosen), ("the LoRA", save["is_result"]), ("last", save["final"]),
            ("gone", not save["exists"])) if holds]
        size = f"{save['size'] / 1e6:.1f} MB" if save["size"] else ""
        cells = "".join(f'<td class="n">{text}</td>' for text in (
            f"{save['step']:,}", save["epoch"], *("" if b is None else f"{b:+.1f} %" for b in better), size))
        rows.append(f'<tr{" class=best" if save["id"] == chosen else ""}><td>{html.escape(save["id"])}</td>{cells}'
                    f'<td>{" ".join(f"<span class=mark>{mark}</span>" for mark in marks)}</td></tr>')
    heads = ("Save", ">Step", ">Epoch", ">Better than base, held-out", ">Better than base, training", ">Size", "")
    return _section("Saves", _table(heads, rows) if rows else "")


def _image_gains(run: _Run) -> str:
    gains = run.data["image_gains"]
    if not gains or not gains["images"]:
        return ""

    def table(images: Sequence[Mapping[str, Any]]) -> str:
        return _table(("Picture", ">Better than base"), [
            f'<tr><td>{html.escape(_file_name(one["name"]))}</td><td class="n">{one["gain"]:+.1f} %</td></tr>'
            for one in images])
    ends = (("Never learnt", gains["never"]), ("Learnt at once", gains["at_once"]))
    made = "".join(f"<div><h3>{title}</h3>{table(end)}</div>" for title, end in ends if end)
    every = table(gains["images"][:_MOST_LISTED])
    return _section("Training pictures", (f'<div class="charts two">{made}</div>' if made else "<p>None stands out.</p>")
                    + f"<details><summary>All of them</summary>{every}</details>", (
        "By how much the loss of each is below the base model's at the end. One that is never learnt may be mislabelled or "
        "unlike the others; one that is learnt long before the others may be there several times."))


def _dataset(run: _Run) -> str:
    planned, kept = run.planned, run.data["held_out"]
    if not planned:
        return ""
    names = ", ".join(_file_name(name) for name in kept["pictures"]) if kept else ""
    told = "mirrored crops of trained pictures, since there were few" if kept and kept["derived"] else "not trained on"
    held_out = f"<p>Held out ({told}): {html.escape(names)}</p>" if names else ""
    return _section("Dataset", f"<p>{run.text(planned.summary)}</p>{held_out}" + (
        f"<p>Planned: {run.text(planned.memory)}</p>" if planned.memory else ""))


def _shown(run: _Run, name: str, value: Any) -> Any:
    """A setting's value, of a path the file's name alone."""
    if not isinstance(value, str):
        return value
    return run.private.replaced(_file_name(value) if name in DECLARATIONS and DECLARATIONS[name].is_path else value)


def _settings(run: _Run) -> str:
    values = {name: _shown(run, name, value) for name, value in run.settings.items() if name not in _LEFT_OUT}
    rows = [f"<tr><td>{html.escape(named(name))}</td><td>{html.escape(str(value))}</td>"
            f"<td>{html.escape(str(DECLARATIONS[name].default))}</td></tr>" for name, value in values.items()
            if name in DECLARATIONS and name != "output_name" and value != DECLARATIONS[name].default]
    changed = _table(("Setting", "Here", "Default"), rows) if rows else "<p>All settings have their defaults.</p>"
    return _section("Settings", f"{changed}<details><summary>All settings (settings.toml)</summary>"
                    f"<pre>{html.escape(write_toml(values))}</pre></details>" if values else "")


def _repeat(run: _Run) -> str:
    if not run.settings:
        return ""
    name = str(run.settings.get("output_name", ""))
    more = "".join(f" --set {path}=FILE" for path in ("reg_data_dir", "network_weights") if run.settings.get(path))
    command = (f'python -m lib_lora_train train --checkpoint "{_file_name(run.checkpoint.split(" [")[0])}.safetensors" '
               f'--data "FOLDER OF THE PICTURES" --name "{name}" --config settings.toml{more}')
    seed = run.planned.seed if run.planned else run.settings.get("seed", "")
    return _section("How to repeat it", f"<pre>{html.escape(command)}</pre><p>settings.toml holds all settings as shown above; "
                    f"a copy is in the folder of the run. Checkpoint: {html.escape(run.checkpoint or 'not known')}. Seed: "
                    f"{html.escape(str(seed))}. The same pictures, captions, settings and seed give the same LoRA on the same "
                    "machine.</p>")


def _warnings(run: _Run) -> str:
    return _section(counted(len(run.warnings), "Note"), "".join(f"<p>{run.text(message)}</p>" for message in run.warnings))


def _footer() -> str:
    return (f"<footer>Written by Train LoRA {__version__}, Python {platform.python_version()}, torch "
            f"{html.escape(torch.__version__)}, {platform.system()}.</footer>")
