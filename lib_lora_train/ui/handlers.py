"""What the page's buttons do. They are plain functions of the fields' values, in the order of `names`.

Everything that goes into HTML is escaped here: names, paths and messages come from users, files and other programs.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from lib_lora_train.api import OUTDATED, service
from lib_lora_train.api.queue import QueueRequest, enqueue, enqueue_sweep, queue_for
from lib_lora_train.errors import Interrupted, LoraTrainError, OutputError
from lib_lora_train.host.port import Host
from lib_lora_train.run.background import Failure
from lib_lora_train.run.presets import offered
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import DECLARATIONS, Value, flat, named, parse
from lib_lora_train.settings.presets import CHANGED, IDENTITY, NO_PRESET, Preset, name_and_version
from lib_lora_train.studio.requests import validated
from lib_lora_train.ui.fields import displayed, update
from lib_lora_train.ui.schedule_curve import schedule_curve

_NO_PRESET_ABOUT = "Everything as it was at the start, but for the names and folders."
# What is meant for one press of Train and not remembered.
ONCE = frozenset({"overwrite", "resume"})


@dataclasses.dataclass(frozen=True)
class Handlers:
    """The page's actions on one runner and host. `names` are those of the settings in the order of the fields, with the preset,
    whose list is updated apart; `defaults` is what the fields show at first.

    What reads a folder or starts a run wants the page's `token` first. gradio answers any request that names a function by
    its number, also one that a foreign page makes the user's browser send; only our own page knows the token.
    """

    runner: Runner
    host: Host
    names: Sequence[str]
    defaults: Mapping[str, Value]
    token: str = dataclasses.field(repr=False)

    def plan(self, token: str, page: OpenPage, number: str, preset: str, *values: object) -> tuple[Any, ...]:
        """(the summary as HTML, the fields as JSON for the browser to remember, the refusal, the button "Overwrite it", the
        preset in force, the curve of the learning rate as HTML, `number`).

        A refusal of other values than these is removed together with the button. By the `number` the script knows what is
        answered.
        """
        if not self._ours(token):
            return _problem(OUTDATED), *[gr.update()] * 5, number
        chosen = self._by_name(values)
        in_force = self._in_force(preset, chosen)
        offer = self._presets()[name_and_version(in_force)[0]]
        draft = json.dumps({name: value for name, value in chosen.items() if name not in ONCE} | {
            "preset": in_force, "preset_version": offer.version})
        outdated = page.ask()
        summary, steps = self._summary(chosen, outdated)
        if outdated():
            # A newer question is being answered, or a refusal came that this plan knows nothing of.
            return (gr.update(),) * 7
        return (summary, draft, *page.shown(chosen), self._list_of_presets(in_force, before=preset),
                _curve(chosen, steps=steps), number)

    def start(self, token: str, page: OpenPage, *values: object, overwrite: bool = False) -> tuple[Any, Any]:
        """(a refusal as HTML or nothing, whether the button "Overwrite it" shows)."""
        if not self._ours(token):
            return _problem(OUTDATED), gr.update(visible=False)
        chosen = self._by_name(values)
        page.ask()  # the page plans once more afterwards; an older plan would come too late
        page.press(chosen)
        try:
            chosen["overwrite"] = overwrite or chosen["overwrite"]
            chosen["preset"] = self._recorded(chosen)
            service.start(chosen, runner=self.runner, host=self.host)
        except LoraTrainError as error:
            taken = isinstance(error, OutputError) and self._taken(chosen)
            if taken:
                error = OutputError(error.what, why=error.why, remedy="choose another name or overwrite it")
            return page.answer(_problem(str(error)), taken=_file(chosen) if taken else ())
        except Exception as error:  # noqa: BLE001 - as in `_summary`
            return page.answer(_problem(Failure.of(error, name="Starting").message))
        return page.answer("")

    def find_rate(self, token: str, page: OpenPage, *values: object) -> tuple[Any, Any]:
        """As `start`, of a short run that finds a learning rate for these settings."""
        if not self._ours(token):
            return _problem(OUTDATED), gr.update(visible=False)
        chosen = self._by_name(values)
        page.ask()  # as in `_start`
        page.press(chosen)
        try:
            service.find_learning_rate(chosen, runner=self.runner, host=self.host)
        except LoraTrainError as error:
            return page.answer(_problem(str(error)))
        except Exception as error:  # noqa: BLE001 - as in `_summary`
            return page.answer(_problem(Failure.of(error, name="Starting").message))
        return page.answer("")

    def start_overwriting(self, token: str, page: OpenPage, *values: object) -> tuple[Any, Any]:
        """As `start`, replacing a LoRA of the name, this once: the one that the page was refused for."""
        return self.start(token, page, *values, overwrite=page.taken == _file(self._by_name(values)))

    def enqueue(self, token: str, page: OpenPage, request: str, *values: object) -> tuple[Any, Any, Any]:
        """(a refusal as HTML or nothing, the button "Overwrite it", the sign for the script that it is done). `request` is JSON
        of the script: what `queue/add` is sent besides the settings, or the id of a run that waits and is to have these; and
        the sign."""
        try:
            told = dict(json.loads(request))
        except (ValueError, TypeError):
            told = {}
        done = str(told.pop("sign", ""))
        if not self._ours(token) or not done:
            return _problem(OUTDATED), gr.update(visible=False), done
        chosen = self._by_name(values)
        page.press(chosen)
        try:
            chosen["preset"] = self._recorded(chosen)
            wanted = validated(QueueRequest, {**told, "settings": chosen})
            put = enqueue_sweep if wanted.axes or wanted.overrides else enqueue
            put(wanted, queue=queue_for(self.host, self.runner), host=self.host)
        except LoraTrainError as error:
            return *page.answer(_problem(str(error))), done
        except Exception as error:  # noqa: BLE001 - as in `_summary`
            return *page.answer(_problem(Failure.of(error, name="Queueing").message)), done
        return *page.answer(""), done

    def list_folders(self, token: str, page: OpenPage, *values: object) -> tuple[Any, Any, Any]:
        """(an update of the folders' settings with each folder that holds images, a refusal as HTML or nothing, the button
        "Overwrite it")."""
        if not self._ours(token):
            return gr.update(), _problem(OUTDATED), gr.update(visible=False)
        chosen = self._by_name(values)
        page.press(chosen)
        found, refusal = gr.update(), ""
        if chosen["dataset_config"]:
            refusal = _problem(f"{named('dataset_config')} is not empty. Empty it to have the folders listed anew.")
        else:
            try:
                found = gr.update(value=service.folder_settings(chosen, host=self.host))
            except LoraTrainError as error:
                refusal = _problem(str(error))
        return found, *page.answer(refusal)

    def apply_preset(self, page: OpenPage, picked: gr.SelectData) -> list[Any]:
        """[what the preset is for, as HTML; an update for each field, empty where the preset does not name it]. `picked` is
        the press on the list, also one on what is in force already."""
        page.ask()  # a plan under way would put the name back that was shown before
        preset = self._presets().get(str(picked.value))  # "Style, changed" stays as it is
        return [_note(preset.description if preset else ""), *self._updates(preset.values if preset else {})]

    def fill(self, token: str, page: OpenPage, incoming: str) -> list[Any]:
        """[what the preset is for; the preset in force; an update for each field] from what the script has read, as JSON:
        {"values", "foreign", "preset"}. Of another program's file what it does not name becomes as at the start."""
        try:
            told = json.loads(incoming)
            values, foreign, preset = dict(told.get("values", {})), bool(told.get("foreign")), told.get("preset")
        except (ValueError, TypeError, AttributeError):
            told = None
        if not self._ours(token) or told is None:
            return [*[gr.update()] * 2, *self._updates({})]
        page.ask()
        if foreign:
            values = {**{name: value for name, value in self.defaults.items() if name not in IDENTITY}, **values}
        if preset in self._presets() and not values:
            return [_note(self._presets()[preset].description), self._list_of_presets(preset), *self._updates({})]
        return ["", self._list_of_presets(self._in_force(None, {**self.defaults, **values})), *self._updates(values)]

    def restore(self, page: OpenPage, draft: str) -> list[Any]:
        """[the sign that the fields are filled; a summary for the time being; what the preset is for; the preset in force; an
        update for each field: what the browser remembers, else the settings of the last run]. gradio draws its buttons before
        it listens to them, so the script calls until it sees the sign: only the first call fills the fields, or the answer to
        a later one would undo what was typed meanwhile."""
        if not page.first():
            return [*[gr.update()] * 4, *self._updates({})]
        try:
            remembered = json.loads(draft or "{}")
        except (ValueError, RecursionError):
            remembered = {}
        if not isinstance(remembered, dict) or not remembered:
            remembered = self.runner.settings()
        kept = {name: value for name, value in remembered.items() if name not in ONCE}
        named_so = kept.get("preset") if "preset_version" in kept or kept.get("preset") != NO_PRESET else None  # a run's
        now = self._in_force(named_so, {**self.defaults, **kept})
        about = _note(self._about(now, kept))
        return ["restored", _note("Looking at the pictures"), about, self._list_of_presets(now), *self._updates(kept)]

    def _presets(self) -> dict[str, Preset]:
        """By name, the user's own behind the others."""
        first = {name: value for name, value in self.defaults.items() if name not in IDENTITY}
        return {NO_PRESET: Preset(NO_PRESET, _NO_PRESET_ABOUT, 0, first)} | {
            preset.name: preset for preset in offered(self.host.presets_folder)}

    def _about(self, now: str, kept: Mapping[str, object]) -> str:
        """What the preset in force is for; of one that was updated since these settings were chosen, what is other now."""
        name, version = name_and_version(str(kept.get("preset", "")))
        told = kept.get("preset_version")
        version = version or (told if isinstance(told, int) else 0)
        preset = self._presets()[name_and_version(now)[0]]
        if preset.name != name or not version or version == preset.version:
            return preset.description * (now != NO_PRESET)
        others = [f"{named(key)} {kept.get(key)} → {value}" for key, value in preset.values.items()
                  if key in kept and kept[key] not in (value, displayed(DECLARATIONS[key], value))]
        return (f"{name} is version {preset.version} now, and these settings are of version {version}. "
                f"Choose it again for: {', '.join(others)}." if others else preset.description)

    def _recorded(self, chosen: Mapping[str, object]) -> str:
        """The preset as a run's record has it, with its version."""
        preset = self._presets()[name_and_version(self._in_force(chosen["preset"], chosen))[0]]
        return NO_PRESET if preset.name == NO_PRESET else preset.recorded(flat(parse(chosen)))

    def _in_force(self, shown_name: object, chosen: Mapping[str, object]) -> str:
        """ "Style", or "Style, changed" where one of its settings is another now. Settings without a preset's
        name, such as a run's, are the preset that they equal."""
        known, name = self._presets(), name_and_version(str(shown_name))[0]
        held = [preset.name for preset in known.values() if all(
            chosen.get(key) in (value, displayed(DECLARATIONS[key], value)) for key, value in preset.values.items())]
        if name not in known:
            name = held[0] if held else NO_PRESET
        return name if name in held else name + CHANGED

    def _list_of_presets(self, now: str, *, before: object = None) -> Any:
        """The list showing `now`. Nothing where it does already: an update would close a list that is open."""
        return gr.update() if now == before else gr.update(value=now, choices=list(dict.fromkeys([*self._presets(), now])))

    def _ours(self, token: object) -> bool:
        return isinstance(token, str) and secrets.compare_digest(token.encode(errors="replace"), self.token.encode())

    def _summary(self, chosen: Mapping[str, object], outdated: Callable[[], bool]) -> tuple[str, int]:
        """The plan as HTML, and the run's steps, 0 where there is none."""
        try:
            found = service.plan(chosen, host=self.host, runner=self.runner, should_stop=outdated)
        except Interrupted:
            return "", 0
        except LoraTrainError as error:
            if not (chosen.get("train_data_dir") or chosen.get("dataset_config")):
                return _note("Choose a folder of pictures to see what will happen."), 0
            return _problem(str(error)), 0
        except Exception as error:  # noqa: BLE001 - a defect; what stood there before would look like the answer
            return _problem(Failure.of(error, name="Planning").message), 0
        name = str(chosen.get("output_name", "")).strip()
        # The one that is being made is no other.
        made = self.runner.running() and self.runner.settings().get("output_name") == name
        return _plan_text(found, taken="" if made or not found["name_taken"] else name), found["steps"]

    def _taken(self, chosen: Mapping[str, object]) -> bool:
        try:
            return service.name_taken(parse(chosen), self.host)
        except LoraTrainError:
            return False

    def _by_name(self, values: Sequence[object]) -> dict[str, object]:
        return dict(zip(self.names, values, strict=True))

    def _updates(self, values: Mapping[str, object]) -> list[Any]:
        return [update(DECLARATIONS[name], values[name]) if name in values else update(DECLARATIONS[name])
                for name in self.names if name != "preset"]


class OpenPage:
    """What is known of one page in a browser: its newest question, and what stands beside its button, of which values. gradio
    copies it for each page."""

    def __init__(self) -> None:
        self._number = 0
        self._visits = itertools.count()  # its next() is one step, whichever thread asks
        self._pressed: dict[str, object] = {}
        self._answer: str | None = ""
        self.taken: tuple[object, ...] = ()
        """The LoRA, as `_file` has it, that the last press was refused for and that may be overwritten; () for none."""

    def first(self) -> bool:
        """True once for a page, when it fills its fields."""
        return next(self._visits) == 0

    def ask(self) -> Callable[[], bool]:
        """Begin a question; the answer tells whether a newer one came."""
        self._number += 1
        mine = self._number
        return lambda: mine != self._number

    def press(self, values: Mapping[str, object]) -> None:
        """A button is pressed with these values, to which the answer beside it will belong."""
        self._pressed, self._answer, self.taken = _without_preset(values), None, ()

    def answer(self, refusal: str, *, taken: tuple[object, ...] = ()) -> tuple[Any, Any]:
        """What stands beside the button from now on: (the refusal as HTML or nothing, the button "Overwrite it")."""
        self._answer, self.taken = refusal, taken
        return refusal, gr.update(visible=bool(taken))

    def shown(self, values: Mapping[str, object]) -> tuple[Any, Any]:
        """What is to stand there when the fields have these values, as `answer` has it; nothing new before there is one. What
        was of others is over."""
        if self._pressed != _without_preset(values):
            return self.answer("")
        return (gr.update(), gr.update()) if self._answer is None else self.answer(self._answer, taken=self.taken)


def _curve(values: Mapping[str, object], *, steps: int) -> str:
    """The learning rate over the run; nothing where the settings are refused, which the summary tells."""
    try:
        return schedule_curve(parse(values), steps=steps)
    except LoraTrainError:
        return ""


def _without_preset(values: Mapping[str, object]) -> dict[str, object]:
    """The preset is named after the others, so it may be called otherwise a moment later."""
    return {name: value for name, value in values.items() if name != "preset"}


def _file(values: Mapping[str, object]) -> tuple[object, ...]:
    """What says which LoRA's file is written."""
    return values["output_name"], values["output_dir"]


def _plan_text(found: Mapping[str, Any], *, taken: str) -> str:
    """The plan as HTML; `taken` is the name of a LoRA that is there already, "" for none."""
    line = " · ".join(filter(None, (found["summary"], found["estimate"])))
    warnings = list(found["warnings"])
    if taken:
        warnings.insert(0, f"There is a LoRA called {taken!r} already; Train will ask before replacing it.")
    items = "".join(f"<li>{html.escape(warning)}</li>" for warning in warnings)
    return f'<div class="lora-train-plan">{html.escape(line)}</div>' + "".join(map(_note, found["notes"])) + (
        f'<ul class="lora-train-warnings">{items}</ul>' if items else "")


def _note(text: str) -> str:
    return f'<div class="lora-train-note">{html.escape(text)}</div>'


def _problem(text: str) -> str:
    return f'<div class="lora-train-problem" role="alert">{html.escape(text)}</div>'
