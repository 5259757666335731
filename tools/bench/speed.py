"""`bench speed`: seconds a training step, for several settings in one run, each beside the step's roofline.

On a GPU the default is the true model size and the three cases that others publish figures for, on a CPU one narrow model.
Compared settings run in turn, so that a machine that becomes slower slows them all. Losses are compared step by step, with a
verdict where the settings should compute the same. On a GPU each case with a memory target runs once more with torch limited to
it, the encoding of the images included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from lib_lora_train.errors import TrainingError
from lib_lora_train.host.port import Host
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.memory.estimate import Workload, blocks_of
from lib_lora_train.memory.plan import CONTEXT, GIGABYTE
from lib_lora_train.model.family import detect
from lib_lora_train.model.sd.components import unet_tensors
from lib_lora_train.run.memory import layers_for
from lib_lora_train.settings import Settings, flat, parse
from lib_lora_train.settings.field import Value
from lib_lora_train.training.precision import compute_dtype
from tools.bench.host import RandomHost, make_images
from tools.bench.report import gigabytes, grid, machine_text, write_report
from tools.bench.roofline import Rates, Roofline, measured_rates, moved_bytes, step_roofline
from tools.bench.timed_run import Measured, limited_gpu, measure_run
from tools.bench.training import Say
from tools.bench.true_size import dtype_of
from tools.bench.variants import HOW_ONLY


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained: the family, the images' side in pixels, the batch, and the target for the GPU's memory in GB (0:
    none)."""

    family: str
    resolution: int
    batch: int
    within: float = 0.0

    @property
    def name(self) -> str:
        """As "sd1 512² batch 1"."""
        return f"{self.family} {self.resolution}² batch {self.batch}"


PUBLISHED = (Case("sd1", 512, 1, within=4.0), Case("sd1", 512, 4), Case("sdxl", 1024, 1, within=8.0))
NARROW = (Case("sd1", 256, 1),)

SAME_LOSS = {"no": 1e-4, "fp16": 5e-3, "bf16": 5e-3}
"""The largest difference between losses of the same step, relative to the loss, that counts as equal: the float error of some
dozens of steps, in which differences of gradients in the last digit become differences of weights."""


@dataclasses.dataclass(frozen=True)
class SpeedPlan:
    """What to measure. `compared` names settings beside each other; `changes` are settings of all of them."""

    output: Path
    device: torch.device
    cases: tuple[Case, ...]
    compared: Mapping[str, Mapping[str, Value]]
    steps: int
    warm_up: int
    repeats: int = 1
    rank: int = 16
    precision: str = "no"
    small: bool = False
    checkpoint: Path | None = None
    changes: Mapping[str, Value] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting of one case, all its repeats. `settings` are those of the runs, `failed` why they ended, if they did."""

    case: Case
    name: str
    settings: Mapping[str, Value]
    runs: tuple[Measured, ...]
    roofline: Roofline
    failed: str = ""

    @property
    def seconds(self) -> float:
        """Median of the repeats' medians."""
        return statistics.median(run.seconds for run in self.runs)


def run_speed(plan: SpeedPlan, *, say: Say) -> str:
    """Measure, write `speed.md` and `speed.json` into the plan's folder after each case, and return the table.

    A run that fails, for example without enough memory, is reported in its row.
    Raises SettingError for settings that do not exist, and what `run_job` raises besides TrainingError.
    """
    @functools.cache
    def rates(dtype: torch.dtype) -> Rates:
        return measured_rates(plan.device, dtype)

    rows, said, text = [], [], ""
    for case in plan.cases:
        say(f"{case.name} …")
        made = _measure_case(plan, case, rates, say)
        rows += made
        said += [*_failures(made), *_same_losses(made, plan.precision), *_within(made)]
        known = rates(dtype_of(plan.precision))
        text = "\n\n".join([machine_text(plan.device), _conditions(plan, known), _table(rows, plan.device),
                            *filter(None, [_ratios(rows)]), *said]) + "\n"
        write_report(plan.output, "speed", text, {"machine": machine_text(plan.device), "rates": dataclasses.asdict(known),
                                                  "rows": [dataclasses.asdict(row) for row in rows]})
    return text


def shared_settings(case: Case, *, rank: int, precision: str) -> dict[str, Value]:
    """The settings of every measured run of a case, which other trainers have too."""
    return {"train_batch_size": case.batch, "resolution": str(case.resolution), "network_dim": rank,
            "network_alpha": float(rank), "mixed_precision": precision, "lr_scheduler": "constant",
            "min_snr_gamma": 0.0, "seed": 42, "save_precision": "fp16", "cache_latents_to_disk": True}


def images_of(plan: SpeedPlan, case: Case) -> Path:
    """The folder of images that a case is trained on; few on a CPU, where encoding is slow."""
    count = max(8 if plan.device.type == "cuda" else 2, 2 * case.batch)
    return make_images(plan.output / f"pictures-{case.resolution}-{count}", side=case.resolution, count=count)


def _measure_case(plan: SpeedPlan, case: Case, rates: Callable[[torch.dtype], Rates], say: Say) -> list[Row]:
    host: Host = RandomHost(case.family, folder=plan.output, device=plan.device, dtype=dtype_of(plan.precision),
                            small=plan.small)
    if plan.checkpoint is not None:
        host = StandaloneHost(plan.checkpoint, lora_folder=plan.output / "loras", runs_folder=plan.output / "runs",
                              device=plan.device)
    data = images_of(plan, case)
    shared = {**shared_settings(case, rank=plan.rank, precision=plan.precision), **plan.changes}
    compared = {name: {**shared, **changes} for name, changes in plan.compared.items()}
    within = f"within {case.within:g} GB" if case.within and plan.device.type == "cuda" else ""
    if within:  # the images are encoded in it too, so that nothing is read that earlier runs have kept
        compared[within] = {**shared, "memory_budget": case.within, "cache_latents_to_disk": False}
    rows = {name: Row(case, name, flat(parse(settings)), (), _row_roofline(host, plan.device, case, parse(settings), rates))
            for name, settings in compared.items()}
    for number in range(plan.repeats):
        for name, settings in compared.items():
            row, turn = rows[name], f"  {number + 1}/{plan.repeats} {name:16}"
            if row.failed:
                continue
            try:
                with limited_gpu(plan.device, case.within) if name == within else contextlib.nullcontext():
                    run = measure_run(host, settings=settings, data=data, steps=plan.steps, warm_up=plan.warm_up,
                                      device=plan.device, stretch=10 if plan.device.type == "cuda" else 1)
            except TrainingError as error:
                rows[name] = dataclasses.replace(row, failed=str(error))
                say(f"{turn} {error}")
                continue
            for note in run.notes:
                say(f"  note: {note}")
            say(f"{turn} {run.seconds:.4f} s a step, {row.roofline.times(run.seconds)}")
            rows[name] = dataclasses.replace(row, runs=(*row.runs, run))
    return list(rows.values())


def _row_roofline(host: Host, device: torch.device, case: Case, settings: Settings,
                  rates: Callable[[torch.dtype], Rates]) -> Roofline:
    """The roofline of a step with a row's own batch, rank, number format and model in eight bits."""
    outline = host.outline()
    assert outline is not None, "the checkpoint was checked before"
    stored = next(iter(unet_tensors(outline.tensors).values())).dtype
    dtype = compute_dtype(settings.memory.mixed_precision, device, weights=stored)
    own = dataclasses.replace(case, batch=settings.optimizer.train_batch_size)
    return case_roofline(host, own, rank=settings.network.network_dim, dtype=dtype, rates=rates(dtype),
                         quantized=settings.memory.base_weights != "as they are")


def case_roofline(host: Host, case: Case, *, rank: int, dtype: torch.dtype, rates: Rates, quantized: bool = False) -> Roofline:
    """The roofline of a case's step on the host's model, held in eight bits where it is `quantized`."""
    outline = host.outline()
    assert outline is not None, "the checkpoint was checked before"
    tensors, architecture = outline.tensors, detect(outline.tensors, outline.hints)
    workload = Workload(width=case.resolution, height=case.resolution, dtype=dtype,
                        layers=layers_for(tensors, architecture, rank=rank, text_encoder=False))
    blocks = blocks_of(tensors, architecture, workload)
    weights = sum(t.numel() * (1 if quantized else t.element_size()) for t in unet_tensors(tensors).values())
    moved = moved_bytes(weights=weights, activations=case.batch * sum(block.kept for block in blocks),
                        parameters=workload.parameters)
    return step_roofline(operations=case.batch * sum(block.forward + block.backward for block in blocks), moved=moved,
                         rates=rates)


def _conditions(plan: SpeedPlan, rates: Rates) -> str:
    model = plan.checkpoint.name if plan.checkpoint else f"random weights, {'narrow' if plan.small else 'true size'}"
    changes = "".join(f", {name} {value}" for name, value in plan.changes.items())
    return (f"Model: {model}; rank {plan.rank}, AdamW, latents and captions cached, UNet only, precision {plan.precision}"
            f"{changes}. {plan.repeats} × {plan.steps} steps after {plan.warm_up} to warm up. The device reaches "
            f"{rates.operations / 1e12:.3g} TFLOP/s in matrix products and {rates.bytes / 1e9:.3g} GB/s in copies. "
            "The roofline counts direct convolutions at that rate: faster algorithms (Winograd's, TF32 on GPUs in fp32) can go "
            "below it.")


def _table(rows: Sequence[Row], device: torch.device) -> str:
    head = ["case", "settings", "s a step", "from", "to", "steps a s", "CPU s", "roofline s", "× roofline"]
    head += ["GB allocated in steps", "reserved in steps", "reserved in all"] if device.type == "cuda" else []
    lines = []
    for row in rows:
        if row.failed:
            lines.append([row.case.name, row.name, "failed", *[""] * (len(head) - 3)])
            continue
        every = [seconds for run in row.runs for seconds in run.wall]
        line = [row.case.name, row.name, f"{row.seconds:.4f}", f"{min(every):.4f}", f"{max(every):.4f}",
                f"{1 / row.seconds:.3f}", f"{statistics.median(run.cpu_seconds for run in row.runs):.4f}",
                f"{row.roofline.seconds:.4f}", f"{row.seconds / row.roofline.seconds:.1f}"]
        if device.type == "cuda":
            gpus = [run.gpu for run in row.runs if run.gpu]
            line += [gigabytes(max(sizes)) for sizes in zip(*(
                (gpu.steps_allocated, gpu.steps_reserved, gpu.run_reserved) for gpu in gpus), strict=True)]
        lines.append(line)
    return grid(head, lines)


def _ratios(rows: Sequence[Row]) -> str:
    """Each setting's time relative to the first of its case, repeat by repeat."""
    lines = []
    for row in rows:
        first = next((other for other in rows if other.case == row.case and not other.failed), row)
        if row is first or row.failed:
            continue
        for kind, figure in (("clock", lambda run: run.seconds), ("CPU", lambda run: run.cpu_seconds)):
            ratios = [figure(own) / figure(other) for own, other in zip(row.runs, first.runs, strict=True)]
            lines.append((row.case.name, f"{row.name} ÷ {first.name}", kind, f"{statistics.median(ratios):.3f}",
                          " ".join(f"{ratio:.3f}" for ratio in ratios)))
    return grid(("case", "time of", "by the", "median", "run by run"), lines) if lines else ""


def _failures(rows: Sequence[Row]) -> list[str]:
    return [f"{row.case.name}, {row.name}: **failed.** {row.failed}" for row in rows if row.failed]


def _same_losses(rows: Sequence[Row], precision: str) -> list[str]:
    """How far the losses of a case's settings lie from those of its first, step by step; whether that is too far where the
    settings differ in how a step is computed only."""
    done, said = [row for row in rows if not row.failed], []
    allowed = SAME_LOSS[precision]
    for row in done[1:]:
        first = done[0]
        worst = most_apart(first.runs[0].losses, row.runs[0].losses)
        verdict = ""
        if {name for name, value in row.settings.items() if value != first.settings[name]} <= HOW_ONLY:
            verdict = ": equal within float error" if worst <= allowed else f": **not equal: more than {allowed:g}**"
        said.append(f"{row.case.name}: losses of {row.name} and {first.name} differ by at most {worst:.2g} of the loss in "
                    f"{len(row.runs[0].losses)} steps{verdict}.")
    return said


def most_apart(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest difference between two sequences of losses, relative to the first's."""
    assert len(a) == len(b), "runs of the same plan have the same steps"
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def _within(rows: Sequence[Row]) -> list[str]:
    """Whether the runs within a case's memory target ended."""
    said = []
    for row in rows:
        if row.case.within and row.name.startswith("within "):
            gpus = [run.gpu for run in row.runs if run.gpu]
            took = f" ({gigabytes(max(gpu.run_reserved for gpu in gpus))} GB of it at most)" if gpus else ""
            said.append(f"Target {row.case.name} inside {row.case.within:g} GB: {'**missed**' if row.failed else 'met'}. Torch "
                        f"got {gigabytes(row.case.within * GIGABYTE - CONTEXT)} GB for the whole run{took}; the rest is left "
                        "to CUDA itself.")
    return said
