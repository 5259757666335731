"""What the page and the API ask for: start, plan, status and the lists, as plain data.

Both are thin over these functions, so an outside program can do exactly what the page does. Refusals are the package's
exceptions; how they are shown is the caller's matter.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib_lora_train.dataset.folder import subset_tables
from lib_lora_train.errors import DatasetError
from lib_lora_train.host.port import Checkpoint, Host
from lib_lora_train.memory.device import matrix_rate, seconds_per_step
from lib_lora_train.memory.plan import MemoryPlan
from lib_lora_train.model.family import FAMILIES
from lib_lora_train.results.overview import plain
from lib_lora_train.results.saves import lora_text
from lib_lora_train.results.start import find_learning_rate as find_learning_rate
from lib_lora_train.results.start import folder_of as folder_of
from lib_lora_train.results.start import resume as resume
from lib_lora_train.results.start import start as start
from lib_lora_train.run.diagnostics import bundle
from lib_lora_train.run.memory import predicted_memory
from lib_lora_train.run.output import checked_name
from lib_lora_train.run.planning import RunPlan, output_folder, plan_dataset
from lib_lora_train.run.record import past_runs
from lib_lora_train.run.runner import Runner, Status
from lib_lora_train.run.sweep import SweepRun, blamed, same_plans
from lib_lora_train.settings import AREAS, Settings, declarations, parse
from lib_lora_train.settings.allowed_paths import check_allowed
from lib_lora_train.settings.toml import write_toml

_MEASURED_FROM = 10  # steps


def folder_settings(values: Mapping[str, object], *, host: Host) -> str:
    """The text of a `dataset_config` with every folder of the dataset folder that holds images, as it is trained without, to
    be changed. Raises UserError."""
    settings = parse({name: values[name] for name in ("train_data_dir", "trigger_word")})
    check_allowed(settings, host.allowed)
    if not settings.dataset.train_data_dir:
        raise DatasetError("No dataset folder was given", remedy="choose a folder of pictures")
    tables = subset_tables(Path(settings.dataset.train_data_dir), trigger_word=settings.dataset.trigger_word,
                           may_read=host.allowed.may_read if host.allowed else None)
    return "[[datasets]]\n" + "".join(f"\n[[datasets.subsets]]\n{write_toml(table)}" for table in tables)


def plan(values: Mapping[str, object], *, host: Host, runner: Runner | None = None,
         should_stop: Callable[[], bool] | None = None) -> dict[str, Any]:
    """What a run with these settings would do; nothing is written and no picture is decoded.

    Returns summary (one line), pictures, buckets, epochs, batches_per_epoch, steps, resolution [width, height],
    warnings (sentences), notes (others, of held-out pictures), name_taken (a LoRA of that name exists and would not be
    overwritten) and estimate ("" while no model is loaded), corrected by the speed of `runner`'s run. Raises UserError, and
    Interrupted where `should_stop()` says so.
    """
    settings = parse(values)
    check_allowed(settings, host.allowed)
    loaded = host.checkpoint()
    found = plan_dataset(settings, family=loaded.family if loaded else "", allowed=host.allowed, should_stop=should_stop)
    estimate, warning = _estimate(settings, found, host, slower=_slower(runner, found.resolution), should_stop=should_stop)
    return {
        "summary": found.summary,
        "pictures": found.dataset.images,
        "buckets": len(found.schedule.buckets),
        "epochs": found.schedule.epochs,
        "batches_per_epoch": found.schedule.batches_per_epoch,
        "steps": found.schedule.steps,
        "resolution": list(found.resolution),
        "warnings": [*found.warnings, *filter(None, (warning,))],
        "notes": list(found.notes),
        "name_taken": name_taken(settings, host),
        "estimate": estimate,
    }


def plan_sweep(runs: Sequence[SweepRun], *, host: Host, runner: Runner | None = None) -> dict[str, Any]:
    """What a sweep would do: the number of its runs, their names, the steps of all, and how long they take ("about 3.1 h", ""
    where that is not known). Nothing is written. Raises UserError, naming the run."""
    loaded = host.checkpoint()
    steps, time, known = 0, 0.0, dict[int, float | None]()
    for run in runs:
        check_allowed(run.settings, host.allowed)
    look = same_plans(lambda settings: plan_dataset(settings, family=loaded.family if loaded else "", allowed=host.allowed))
    for run in runs:
        with blamed(run.name):
            found = look(run.settings)
            if id(found) not in known:
                known[id(found)] = _memory_and_seconds(
                    run.settings, found, host, slower=_slower(runner, found.resolution), should_stop=None)[1]
        steps += found.schedule.steps
        time += known[id(found)] or math.nan
    return {"runs": len(runs), "names": [run.name for run in runs], "steps": steps,
            "estimate": f"about {_duration(time)}" if math.isfinite(time) else ""}


def _estimate(settings: Settings, found: RunPlan, host: Host, *, slower: float,
              should_stop: Callable[[], bool] | None) -> tuple[str, str]:
    """ "about 9 min · about 5.1 of 8.0 GB of memory: …" and a warning; "" while no model is loaded. Without the time where that
    is not known."""
    memory, time = _memory_and_seconds(settings, found, host, slower=slower, should_stop=should_stop)
    if memory is None:
        return "", ""
    return memory.text if time is None else " · ".join([f"about {_duration(time)}", memory.text]), memory.warning


def _memory_and_seconds(settings: Settings, found: RunPlan, host: Host, *, slower: float,
                        should_stop: Callable[[], bool] | None) -> tuple[MemoryPlan | None, float | None]:
    """What a run takes of both, from the loaded model's shapes; None while no model is loaded, for the seconds also where the
    device has not been measured yet and others compute on it."""
    outline, checkpoint = host.outline(), host.checkpoint()
    if outline is None or checkpoint is None:
        return None, None
    memory, dtype = predicted_memory(found, host, outline, should_stop=should_stop)
    rate = matrix_rate(outline.device, dtype, idle=host.idle)
    if rate is None:
        return memory, None
    return memory, slower * found.schedule.steps * seconds_per_step(
        memory.flops, blocks=len(memory.blocks), passes=memory.passes * settings.optimizer.gradient_accumulation_steps,
        device_type=outline.device.type, rate=rate)


def _slower(runner: Runner | None, resolution: tuple[int, int]) -> float:
    """How many times as long as estimated the steps of the current or last run took, if it had this resolution; 1 before that
    is known. What a small step takes is mostly its launching, and what the first take is warming up."""
    run = runner.status() if runner else None
    if not run or not run.step or not run.planned or run.planned.resolution != "{}×{}".format(*resolution) or \
            run.step.step - run.planned.resumed_at < _MEASURED_FROM:
        return 1.0
    speed, seconds = run.step.steps_per_second, run.planned.seconds
    return run.planned.steps / speed / seconds if speed and seconds else 1.0


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds / 10)) * 10} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def status(*, runner: Runner, host: Host, after: int = 0) -> dict[str, Any]:
    """Everything a watcher shows, in one call; numbers that are not finite are None.

        model           {name, title, family, text} of what the host holds, None if it holds nothing
        run             id of the current or last run, "" before the first; name is its LoRA's name
        running         whether it is under way; stopping is "", "stop" or "save"
        started         seconds since 1970
        planned         {pictures, buckets, batches_per_epoch, epochs, steps, summary, …} or None
        waiting         whether it waits for the host's own generation before it begins
        stage           {name, done, total} of the work that is not a training step, or None
        step            {step, total, epoch, epochs, loss, average_loss, learning_rate, steps_per_second, …} or None
        fraction        0 to 1, of the steps; seconds_left is an estimate until the speed is known
        points          [step, loss, average loss] after the step `after`; every `every`-th step is kept. When `every`
                        has changed, points that were sent before were dropped: request once more with after=0
        warnings        sentences
        saved           [{path, step, epoch, final, lora_text}] in the order they were written
        finished        {outcome: "done"|"stopped"|"failed", message, path, steps, verdict} or None; the verdict is "healthy",
                        "ruined", or "" where nobody looked
        evaluated       a count that changes with each measurement and sample: then ask for the run's results
        diagnosed       {step, finding, message, setting, value}: how the training goes, or None
        lora_text       "<lora:name:1>" once the run's result is written, else ""
        trigger_word    of the run, "" for none
    """
    state = runner.status(after=after)
    answer: dict[str, Any] = {
        "model": _model(host.checkpoint()), "run": "", "name": "", "running": False, "stopping": "", "waiting": False,
        "started": None, "planned": None, "stage": None, "step": None, "fraction": 0.0, "seconds_left": None, "points": [],
        "every": 1, "warnings": [], "saved": [], "finished": None, "evaluated": 0, "diagnosed": None, "lora_text": "",
        "trigger_word": ""}
    if state is None:
        return answer
    result = state.finished.path if state.finished else ""
    answer.update(
        run=state.run, name=state.name, running=state.running, stopping=state.stopping,
        waiting=state.running and host.waiting(), started=state.started,
        planned=_fields(state.planned), stage=_fields(state.stage), step=_fields(state.step), fraction=state.fraction,
        seconds_left=_seconds_left(state) if state.running else None,
        points=[list(point) for point in state.points], every=state.every, warnings=list(state.warnings),
        saved=[{**dataclasses.asdict(saved), "lora_text": lora_text(saved.path)} for saved in state.saved],
        finished=_fields(state.finished), evaluated=state.evaluated, diagnosed=_fields(state.diagnosed),
        lora_text=lora_text(result) if result else "",
        trigger_word=str(runner.settings().get("trigger_word", "")))
    return plain(answer)


def _seconds_left(state: Status) -> float | None:
    """As measured; by the estimate before; None before there is one."""
    if state.step and state.step.seconds_left is not None:
        return state.step.seconds_left
    planned = state.planned
    return planned.seconds * (1 - planned.resumed_at / planned.steps) or None if planned else None


def runs(host: Host) -> list[dict[str, Any]]:
    """The host's past runs, newest first: id, name, outcome ("done", "stopped", "failed", "running", or "interrupted" for
    one whose process ended before it did), message, path, steps, total, resume_step (None where it cannot be resumed),
    verdict (as that of `finished`)."""
    return plain([dataclasses.asdict(run) for run in past_runs(host.runs_folder)])


def report(run: str, *, host: Host, program: str) -> bytes:
    """A zip about that run of the host, "" for the newest, with nothing private in it.

    Raises LoraFileError where there is no such run.
    """
    past = [] if run else past_runs(host.runs_folder, most=1)
    found = folder_of(run, host) if run else host.runs_folder / past[0].id if past else None
    return bundle(found, host=host, program=program)


def settings_list() -> list[dict[str, Any]]:
    """Every setting: area, name, type ("bool", "int", "float", "str"), default, minimum, maximum, step, choices, label,
    help, in_view (whether the page shows it above the fold), is_path, zero (what its 0 stands for, "" for a number)."""
    return [
        {"area": area, **dataclasses.asdict(declaration), "type": declaration.type.__name__,
         "choices": list(declaration.choices)}
        for area, cls in AREAS.items() for declaration in declarations(cls)]


def model_text(checkpoint: Checkpoint) -> str:
    """One line: "base: dreamshaper_8 [879db523c3] · SD1 · VAE: baked"; of one that cannot be trained, why."""
    base = f"base: {checkpoint.name} [{checkpoint.sha256[:10]}]" if checkpoint.sha256 else f"base: {checkpoint.name}"
    known = FAMILIES.get(checkpoint.family)
    if checkpoint.refusal:
        return " · ".join([base, checkpoint.refusal])
    family = known.title if known else "this kind of model cannot be trained"
    return " · ".join([base, family, f"VAE: {checkpoint.vae_name}" if checkpoint.vae_name else "VAE: baked"])


def name_taken(settings: Settings, host: Host) -> bool:
    """Whether a LoRA of the name is there and may not be overwritten. A missing name is not taken, nor that of a run which
    goes on (`start` knows whose file it is); raises OutputError for an impossible one, SettingError for a folder that is not
    allowed."""
    check_allowed(settings, host.allowed)
    if settings.save.overwrite or settings.save.resume or not settings.save.output_name:
        return False
    return os.path.lexists(output_folder(settings, host) / f"{checked_name(settings.save.output_name)}.safetensors")


def _model(checkpoint: Checkpoint | None) -> dict[str, str] | None:
    if checkpoint is None:
        return None
    return {"name": checkpoint.name, "title": checkpoint.title, "family": checkpoint.family,
            "text": model_text(checkpoint)}


def _fields(event: object) -> dict[str, Any] | None:
    return dataclasses.asdict(event) if event is not None else None  # type: ignore[call-overload]
