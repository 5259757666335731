"""`bench speed --against CMD`: this trainer and an outside one on the same model, images and settings, run by run."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
from pathlib import Path

import torch

from lib_lora_train.errors import SettingError
from tools.bench.host import KOHYA_FOLDER
from tools.bench.programs import GpuBytes, Pair, ratio_text, run_pairs
from tools.bench.report import gigabytes, grid, machine_text, write_report
from tools.bench.speed import Case, SpeedPlan, images_of, shared_settings
from tools.bench.timed_run import gpu_memory_used
from tools.bench.training import Say
from tools.bench.true_size import dtype_of, true_size_checkpoint

GPU_TIMES = {("sd1", 512, 1): 4.0, ("sd1", 512, 4): 2.0, ("sdxl", 1024, 1): 3.0}
CPU_SHARE, GPU_MEMORY_SHARE = 0.9, 0.7
"""What is promised: so many times the steps per second on a GPU at no more than this share of the memory; on a CPU
at most this share of the time per step."""
_START = "import runpy, sys; sys.path.insert(0, {root!r}); runpy.run_module('lib_lora_train', run_name='__main__')"
"""`python -m lib_lora_train` from whatever folder the measuring was started in."""


def run_against(plan: SpeedPlan, command: str, *, pairs: int, by_cpu: bool, say: Say) -> str:
    """Run both trainers in turn for each case, write `against.md` and `against.json`, and return the table.

    `by_cpu` compares CPU seconds instead of the clock, for machines that do other work.
    Raises SettingError for a command that cannot be filled in, TrainingError where a trainer fails.
    """
    parts, figures = [machine_text(plan.device), f"Outside trainer: `{command}`"], []
    lines = []
    for case in plan.cases:
        say(f"{case.name} …")
        made = _case_pairs(plan, case, command, pairs=pairs, say=say)
        _check_cpu_seconds(made, by_cpu)
        lines.append(_line(case, made, by_cpu))
        parts += [f"{case.name}, {kind}" for kind in _kinds(made)] + [_verdict(case, made, plan.device, by_cpu)]
        figures.append({"case": dataclasses.asdict(case), "pairs": [dataclasses.asdict(pair) for pair in made]})
    kind = "CPU s a step" if by_cpu else "s a step"
    head = ("case", f"ours, {kind}", f"theirs, {kind}", "ours ÷ theirs", "from", "to", "GB of the GPU, ours", "theirs")
    parts.insert(2, grid(head, lines))
    parts.insert(2, f"Rank {plan.rank}, precision {plan.precision}, AdamW, UNet only, latents cached; {pairs} pairs of runs of "
                    f"{plan.steps} steps, the first {plan.warm_up} of each left out.")
    return write_report(plan.output, "against", "\n\n".join(parts) + "\n",
                        {"machine": machine_text(plan.device), "cases": figures})


def our_command(plan: SpeedPlan, case: Case, *, data: Path, checkpoint: Path) -> list[str]:
    """The words of this trainer's own command line with what `run_pairs` fills in left open."""
    settings = {**shared_settings(case, rank=plan.rank, precision=plan.precision), **plan.changes,
                "max_train_steps": "{steps}", "overwrite": "true"}
    settings.pop("cache_latents_to_disk")  # as the outside trainer: encoded anew at each start
    start = _START.format(root=str(Path(__file__).parents[2]))
    words = [sys.executable, "-c", start, "train", "--checkpoint", str(checkpoint), "--data", str(data / KOHYA_FOLDER),
             "--name", "ours", "--output-dir", str(plan.output / "loras"), "--no-record"]
    for name, value in settings.items():
        words += ["--set", f"{name}={value}"]
    return words


def _case_pairs(plan: SpeedPlan, case: Case, command: str, *, pairs: int, say: Say) -> list[Pair]:
    data = images_of(plan, case)
    checkpoint = plan.checkpoint or true_size_checkpoint(
        case.family, plan.output, dtype=dtype_of(plan.precision), small=plan.small)
    values = {"checkpoint": checkpoint, "data": data, "batch": case.batch, "resolution": case.resolution, "rank": plan.rank,
              "precision": plan.precision, "output": plan.output / "theirs", "family": case.family}
    values = {name: value.resolve() if isinstance(value, Path) else value for name, value in values.items()}
    ours = our_command(plan, case, data=data.resolve(), checkpoint=checkpoint.resolve())
    return run_pairs(ours, command, values=values, steps=plan.steps, pairs=pairs, say=say, warm_up=plan.warm_up,
                     gpu_bytes=_gpu_bytes(plan.device))


def _gpu_bytes(device: torch.device) -> GpuBytes | None:
    return functools.partial(gpu_memory_used, device) if device.type == "cuda" else None


def _check_cpu_seconds(pairs: list[Pair], by_cpu: bool) -> None:
    if by_cpu and not _counted(pairs):
        raise SettingError("CPU seconds are not to be had", why="this system does not count those of other programs, or "
                           "the runs were too short", remedy="leave out --cpu-time")


def _kinds(pairs: list[Pair]) -> list[str]:
    return [ratio_text(pairs, cpu=cpu) for cpu in ((False, True) if _counted(pairs) else (False,))]


def _counted(pairs: list[Pair]) -> bool:
    """Whether CPU seconds were to be had; none at all is none that a clock tick could count."""
    return all(run.cpu for pair in pairs for run in (pair.ours, pair.theirs))


def _line(case: Case, pairs: list[Pair], by_cpu: bool) -> list[str]:
    ratios = [pair.ratio(cpu=by_cpu) for pair in pairs]
    line = [case.name]
    for runs in ([pair.ours for pair in pairs], [pair.theirs for pair in pairs]):
        line.append(f"{statistics.median((run.cpu or 0.0) if by_cpu else run.wall for run in runs):.4f}")
    line += [f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f}", f"{max(ratios):.3f}"]
    for runs in ([pair.ours for pair in pairs], [pair.theirs for pair in pairs]):
        gpus = [run.gpu_bytes for run in runs if run.gpu_bytes is not None]
        line.append(gigabytes(max(gpus)) if gpus else "-")
    return line


def _verdict(case: Case, pairs: list[Pair], device: torch.device, by_cpu: bool) -> str:
    """Whether what is promised for this case was seen."""
    ratio = statistics.median(pair.ratio(cpu=by_cpu) for pair in pairs)
    if device.type != "cuda":
        return f"Target at most {CPU_SHARE:g} of the time per step: {_met(ratio <= CPU_SHARE)} ({ratio:.3f})."
    said = []
    times = GPU_TIMES.get((case.family, case.resolution, case.batch))
    if times:
        said.append(f"Target {times:g} times the steps per second: {_met(1 / ratio >= times)} ({1 / ratio:.2f}).")
    ours, theirs = (max(run.gpu_bytes or 0 for run in runs) for runs in zip(
        *((pair.ours, pair.theirs) for pair in pairs), strict=True))
    if theirs:
        said.append(f"Target at most {GPU_MEMORY_SHARE:g} of the memory: {_met(ours <= GPU_MEMORY_SHARE * theirs)} "
                    f"({ours / theirs:.2f}).")
    return " ".join(said) or "No target is set for this case."


def _met(met: bool) -> str:
    return "met" if met else "**missed**"
