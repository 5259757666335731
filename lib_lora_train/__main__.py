"""The command line: `python -m lib_lora_train train | prepare | check | tag | …`; without a command it lists them.

Exit codes: 0 done, 1 the run failed, 2 bad input (one sentence on stderr), 130 interrupted.
"""

from __future__ import annotations

from lib_lora_train import terminal

if __name__ == "__main__":
    terminal.set_up()  # before other imports, which take a while

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lib_lora_train import events
from lib_lora_train.errors import LoraTrainError, SettingError, UserError, translated
from lib_lora_train.events import Report, shielded
from lib_lora_train.run import RUNS_FOLDER
from lib_lora_train.settings import AREAS, Settings, declarations, parse, user_path
from lib_lora_train.studio.commands.advice import add_find_rate, add_suggest
from lib_lora_train.studio.commands.arguments import add_check, add_prepare, add_tag, add_verify
from lib_lora_train.studio.commands.queue import add_queue
from lib_lora_train.studio.commands.results import add_results
from lib_lora_train.studio.commands.settings import add_settings
from lib_lora_train.studio.commands.sweep import add_compare, add_given, add_runs, add_sweep, given_values

if TYPE_CHECKING:
    from lib_lora_train.distributed import LaunchEnvironment
    from lib_lora_train.run.record import RunRecord


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # Windows consoles are not UTF-8 by default, and images have names in every script.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of damaged pictures, which are named otherwise
    chosen = _parser().parse_args(arguments)
    try:
        return chosen.command(chosen)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except LoraTrainError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        terminal.say("Stopped.")
        return terminal.INTERRUPTED


def _train(chosen: argparse.Namespace) -> int:
    from lib_lora_train.distributed import LaunchEnvironment, process_group
    from lib_lora_train.host.standalone import StandaloneHost, describe_file
    from lib_lora_train.run.background import StopKind
    from lib_lora_train.run.inputs import stage
    from lib_lora_train.run.job import run_job
    from lib_lora_train.run.output import checked_name, destination
    from lib_lora_train.run.planning import plan_job
    from lib_lora_train.run.record import RunRecord, new_folder
    from lib_lora_train.studio.commands.progress import RunBar, show_json

    launch = LaunchEnvironment.read(os.environ)
    first = launch is None or launch.rank == 0  # it alone records and prints
    try:
        settings, notes = _train_settings(chosen)
        checked_name(settings.save.output_name)  # it names the record's folder too
        describe_file(chosen.checkpoint)  # a wrong one is refused before anything is read
        output = Path(settings.save.output_dir or ".")
        if first:
            destination(output, name=settings.save.output_name, overwrite=True)  # refused before a record is begun there
        resumed = Path(settings.save.resume) if settings.save.resume else None
        runs_folder = resumed.parent if resumed else output / RUNS_FOLDER
        folder = resumed or new_folder(runs_folder, settings.save.output_name)
        record = RunRecord(folder, settings) if chosen.record and first else None
    except LoraTrainError as error:
        if launch is not None:
            _refused_together(launch, error)
        raise
    show: Report = _QuietOutput(launch.rank) if launch and not first else show_json if chosen.json else RunBar()
    with contextlib.closing(record) if record else contextlib.nullcontext(), terminal.StopRequest(
            launched=launch is not None, tells=first) as request:
        def stop() -> StopKind:
            return "save" if request.wanted else ""

        def job(report: Report) -> events.Finished:
            for note in notes:
                report(events.Warned(note))
            with process_group(launch, timeout=60 * chosen.wait_for_others) as group:
                host = StandaloneHost(chosen.checkpoint, lora_folder=output, runs_folder=runs_folder,
                                      device=launch.device() if launch else None)
                plan = plan_job(settings, host, group=group, on_progress=stage("Reading pictures", report),
                                should_stop=lambda: request.wanted)
                if record:
                    record.complete(plan.settings)
                return run_job(plan, host, report=report, stop=stop, group=group,
                               folder=folder if record else None)
        finished, failure = _ending(job, show=show, record=record)
    if record:
        _conclude(folder)
    if finished.outcome == "failed":
        if launch is not None:
            failed_together(launch, finished.message, failure)
        print(finished.message, file=sys.stderr)
        return 2 if isinstance(failure, UserError) else 1
    # The first one's exit code says how it ended; to a launcher another's would be a failure, which ends the first one too.
    return terminal.INTERRUPTED if finished.outcome == "stopped" and first else 0


def _conclude(folder: Path) -> None:
    """What follows a run: cards for its saves, its report, and the notice that it has ended."""
    from lib_lora_train.results.promote import dress
    from lib_lora_train.results.report import write_report
    from lib_lora_train.run.webhook import webhook_of

    dress(folder)
    write_report(folder)
    webhook_of(folder.parent).send(folder)
    webhook_of(folder.parent).wait()


def _ending(job: Callable[[Report], events.Finished], *, show: Report,
            record: RunRecord | None) -> tuple[events.Finished, LoraTrainError | None]:
    """How a job ended, whatever happens, told to the record and the terminal; and the refusal, for the exit code."""
    from lib_lora_train.run.background import Failure

    latest, show = 0, shielded(show)
    refusal: LoraTrainError | None = None

    def report(event: events.Event) -> None:
        nonlocal latest
        latest = event.step if isinstance(event, events.Step) else latest
        if record:
            record.write(event)
        show(event)

    try:
        with translated("training"):
            try:
                finished = job(report)
            except LoraTrainError as error:
                refusal = error
                raise
    except Exception as error:  # noqa: BLE001 - however it ends, the record and the terminal are told
        ending = Failure.of(error, name="The training")
        if record and ending.trace:
            record.keep_failure(ending.trace)
        finished = events.Finished(ending.outcome, ending.message, "", latest)
    report(finished)
    return finished, refusal


def _refused_together(launch: LaunchEnvironment, error: LoraTrainError) -> NoReturn:
    """The end of one of several processes that cannot even begin: the others would wait for it, so that it tells them."""
    from lib_lora_train.distributed import process_group

    try:
        with process_group(launch):
            raise error
    except LoraTrainError:
        failed_together(launch, str(error), error)


def failed_together(launch: LaunchEnvironment, message: str, failure: LoraTrainError | None) -> NoReturn:
    """The end of one of several processes: what all of them know, the first one tells, and what one alone knows, that one. Of
    one that was lost without a word all others tell: it may have been the first."""
    from lib_lora_train.distributed import ProcessLost
    from lib_lora_train.run.consistency import ProcessesDiffer

    if launch.rank == 0:
        print(message, file=sys.stderr)
    elif not (isinstance(failure, ProcessesDiffer) or isinstance(failure, ProcessLost) and failure.explained):
        print(f"Process {launch.rank}: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: a GPU may wait for ever for a process that is gone, and what tidies up would wait for the GPU.
    os._exit(2 if isinstance(failure, UserError) else 1)


def _train_settings(chosen: argparse.Namespace) -> tuple[Settings, list[str]]:
    """What the command line says, over the configuration file, over the run to go on with; and what became of the file's."""
    from lib_lora_train.run.resume import find, settings_of

    values, notes = given_values(chosen)
    if not values.get("resume"):
        return parse(values), notes
    named = user_path(str(values.pop("resume")))  # a path, else the name of a run beside the results
    folder = named if os.path.lexists(named) else user_path(str(values.get("output_dir", "."))) / RUNS_FOLDER / named
    return settings_of(find(str(folder), folder.parent), values), notes


def _ui(chosen: argparse.Namespace) -> int:
    from lib_lora_train.host.standalone import StandaloneHost, describe_file, listening_allowed_paths
    from lib_lora_train.ui.standalone import serve

    if chosen.checkpoint:
        describe_file(chosen.checkpoint)  # as `train` does: a wrong one is refused at once
    output = user_path(chosen.output_dir)
    host = StandaloneHost(chosen.checkpoint, lora_folder=output, runs_folder=output / RUNS_FOLDER,
                          allowed=listening_allowed_paths(chosen.listen, output, *map(user_path, chosen.allow)))
    serve(host, port=chosen.port, address=chosen.listen, auth=chosen.auth)
    return 0


def _inspect(chosen: argparse.Namespace) -> int:
    from lib_lora_train.adapters.file import inspect

    data = vars(inspect(chosen.file))
    if chosen.json:
        print(json.dumps(data, indent=1, default=str))
        return 0
    for name, value in data.items():
        if name == "metadata":
            print("metadata")
            for key, text in sorted(value.items()):
                print(f"  {key:36} {text if len(text) <= 120 else text[:117] + '…'}")
        elif name in ("keys", "not_finite"):
            print(f"{name:16} {len(value)}{' (--json lists them)' if value else ''}")
        else:
            print(f"{name:16} {'-' if value is None else value}")
    return 0


def _diagnose(chosen: argparse.Namespace) -> int:
    from lib_lora_train.run.diagnostics import bundle
    from lib_lora_train.run.record import newest_run
    from lib_lora_train.storage.atomic import write_atomic

    # Where this program and the WebUI keep them, below the current folder.
    run = chosen.run or newest_run(RUNS_FOLDER, f"loras/{RUNS_FOLDER}", f"demo-output/{RUNS_FOLDER}", "lora_train_runs")
    if run and not run.is_dir():
        raise SettingError(f"There is no run's folder {run}", remedy="name the folder that holds its events.jsonl")
    out = chosen.out or Path("lora-train-report.zip")
    write_atomic(out, bundle(run, program="command line", paths=chosen.paths))
    print(f"{out}: {f'about the run {run.name}' if run else 'about this machine; no run was found'}")
    return 0


def _demo(chosen: argparse.Namespace) -> int:
    from lib_lora_train.demo import embedded, run_demo

    if chosen.copy_model is not None:
        print(f"Copied to {embedded.put_beside(chosen.copy_model)}: refresh the WebUI's list of checkpoints.")
        return 0
    return run_demo(user_path(chosen.output_dir), page=not chosen.no_page, port=chosen.port, address=chosen.listen,
                    auth=chosen.auth)


class _QuietOutput:
    """What a process of rank 1 or above prints: its own warnings only, since rank 0 prints what all have in common."""

    def __init__(self, rank: int) -> None:
        self._rank, self._training = rank, False

    def __call__(self, event: events.Event) -> None:
        self._training = self._training or isinstance(event, events.Planned)
        if self._training and isinstance(event, events.Warned):
            print(f"note of process {self._rank}: {event.message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {d.name} = {d.default!r}\n      {d.help}" for area in AREAS.values() for d in declarations(area))
    parser = argparse.ArgumentParser(prog="python -m lib_lora_train", description="Train a LoRA from a folder of pictures.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    train = commands.add_parser(
        "train", help="train a LoRA", epilog=f"settings and their defaults:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    train.add_argument("--checkpoint", type=user_path, required=True, help="the model, a .safetensors file")
    add_given(train)
    train.add_argument("--json", action="store_true", help="one JSON event a line instead of a progress bar")
    train.add_argument("--resume", default="", metavar="RUN|FOLDER", help="go on with an interrupted run (see `runs`); its "
                       "settings are kept, but for those given here")
    train.add_argument("--record", action=argparse.BooleanOptionalAction, default=True,
                       help="keep settings, events and the resume point in a folder under OUTPUT/runs")
    train.add_argument("--wait-for-others", type=float, default=30.0, metavar="MINUTES", help="with several processes "
                       "(torchrun, accelerate launch): how long one that does not answer is waited for")
    train.set_defaults(command=_train)

    ui = commands.add_parser("ui", help="serve the page without a WebUI")
    ui.add_argument("--checkpoint", type=user_path, help="the model, a .safetensors file")
    ui.add_argument("--output-dir", default="loras", help="where LoRAs go")
    ui.add_argument("--allow", action="append", default=[], metavar="FOLDER", help="with --listen: a folder that datasets "
                    "may come from, besides where LoRAs go; may be repeated")
    _add_address(ui)
    ui.set_defaults(command=_ui)

    for add in (add_find_rate, add_suggest, add_sweep, add_runs, add_compare, add_results, add_settings, add_queue, add_prepare,
                add_check, add_tag, add_verify):
        add(commands)

    inspect = commands.add_parser("inspect", help="say what a LoRA file is")
    inspect.add_argument("file", type=user_path)
    inspect.add_argument("--json", action="store_true", help="everything, as JSON")
    inspect.set_defaults(command=_inspect)

    diagnose = commands.add_parser("diagnose", help="put what a helper needs to know into one zip")
    diagnose.add_argument("run", nargs="?", type=user_path, help="a run's folder; the newest below here if none is named")
    diagnose.add_argument("--out", type=user_path, metavar="F.zip", help="where the zip goes (lora-train-report.zip)")
    diagnose.add_argument("--paths", action="store_true", help="show folders, user and computer names, which are replaced "
                          "otherwise")
    diagnose.set_defaults(command=translated("the report was written")(_diagnose))

    demo = commands.add_parser("demo", help="train on a small model and serve the page")
    demo.add_argument("--output-dir", default="demo-output")
    demo.add_argument("--no-page", action="store_true", help="end after the pictures are written")
    demo.add_argument("--copy-model", type=user_path, metavar="FOLDER", help="do nothing but copy the demo's model, as the "
                      "WebUI loads it, into a folder: its models/Stable-diffusion")
    _add_address(demo)
    demo.set_defaults(command=translated("the demo was made")(_demo))
    return parser


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=7870)
    parser.add_argument("--listen", default="127.0.0.1", metavar="ADDRESS", help="where to listen; by default on localhost")
    parser.add_argument("--auth", default="", metavar="USER:PASSWORD", help="what the page asks for; with --listen a "
                        "password is made up and printed where none is given")


if __name__ == "__main__":
    code = main()
    terminal.end_on_interrupt()
    sys.exit(code)
