"""`bench speed`: seconds a training step, for several settings in one run, each beside the step's physical floor.

On a card the models have their true size and the three cases that others publish figures for; on a processor one narrow
model, unless told otherwise. Settings that are compared are run in turn, as often as asked, so that a machine that becomes
slower meanwhile slows them all. Losses of settings that should compute the same are compared step by step.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lib_lora_train.bench.floor import Floor, Rates, measured_rates, moved_bytes, step_floor
from lib_lora_train.bench.grid import gigabytes, grid
from lib_lora_train.bench.lender import RandomHost, make_pictures
from lib_lora_train.bench.machine import machine_text
from lib_lora_train.bench.measured import Measured, measure_run
from lib_lora_train.bench.training import Say
from lib_lora_train.bench.true_size import DTYPES
from lib_lora_train.errors import SettingError
from lib_lora_train.host.port import Host
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.model.components import unet_tensors
from lib_lora_train.model.family import detect
from lib_lora_train.settings.field import Value
from lib_lora_train.training.estimate import picture_cost
from lib_lora_train.whole_file import write_whole


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained: the family, the pictures' side in pixels, the batch, and GB of the card's memory that the promise
    for it names (0: none)."""

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

COMPARED: Mapping[str, Mapping[str, Value]] = {
    "defaults": {},
    "eager": {"cuda_graphs": "off"},
    "graphs": {"cuda_graphs": "auto"},
    "compiled": {"torch_compile": True, "cuda_graphs": "off"},
    "channels_last": {"channels_last": "on"},
    "channels_first": {"channels_last": "off"},
    "recompute": {"gradient_checkpointing": True},
    "offload": {"cpu_offload_checkpointing": True},
    "int8": {"base_weights": "int8"},
    "fp8": {"base_weights": "fp8"},
    "fp32": {"mixed_precision": "no"},
    "fp16": {"mixed_precision": "fp16"},
    "bf16": {"mixed_precision": "bf16"},
}
"""Names for `--compare`, and the settings that they stand for."""

SAME_LOSS = {"no": 1e-4, "fp16": 5e-3, "bf16": 5e-3}
"""How far losses of the same step may lie apart, relative to the loss, to count as equal: float error over some dozens of
steps, in which a difference in the last digit of a gradient becomes one of the weights."""


@dataclasses.dataclass(frozen=True)
class SpeedPlan:
    """What to measure. `compared` names settings beside each other; `changes` are settings of all of them."""

    output: Path
    device: torch.device
    cases: tuple[Case, ...]
    compared: Mapping[str, Mapping[str, Value]]
    steps: int = 50
    warm_up: int = 5
    repeats: int = 1
    rank: int = 16
    precision: str = "no"
    small: bool = False
    checkpoint: Path | None = None
    changes: Mapping[str, Value] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting of one case, all its repeats."""

    case: Case
    name: str
    runs: tuple[Measured, ...]
    floor: Floor

    @property
    def seconds(self) -> float:
        """Median of the repeats' medians."""
        return statistics.median(run.seconds for run in self.runs)


def run_speed(plan: SpeedPlan, *, say: Say) -> str:
    """Measure, write `speed.md` and `speed.json` into the plan's folder, and return the table.

    Raises SettingError for settings that do not exist, and what `run_job` raises.
    """
    rates = measured_rates(plan.device, _compute_dtype(plan.precision))
    parts, rows = [], []
    for case in plan.cases:
        say(f"{case.name} …")
        made = _measure_case(plan, case, rates, say)
        rows += made
        parts += [*_same_losses(made, plan.precision), *_within(made)]
    text = "\n\n".join([machine_text(plan.device), _conditions(plan, rates), _table(rows, plan.device),
                        *filter(None, [_ratios(rows)]), *parts]) + "\n"
    write_whole(plan.output / "speed.md", text.encode("utf-8"))
    write_whole(plan.output / "speed.json", json.dumps(
        {"machine": machine_text(plan.device), "rates": dataclasses.asdict(rates),
         "rows": [dataclasses.asdict(row) for row in rows]}, indent=1).encode("utf-8"))
    return text


def shared_settings(plan: SpeedPlan, case: Case) -> dict[str, Value]:
    """The settings of every measured run of a case: those that an outside trainer has too, and the plan's own."""
    return {"train_batch_size": case.batch, "resolution": str(case.resolution), "network_dim": plan.rank,
            "network_alpha": float(plan.rank), "mixed_precision": plan.precision, "lr_scheduler": "constant",
            "min_snr_gamma": 0.0, "seed": 42, "save_precision": "fp16", "cache_latents_to_disk": True, **plan.changes}


def pictures_of(plan: SpeedPlan, case: Case) -> Path:
    """The folder of pictures that a case is trained on: few on a processor, which takes long to encode them."""
    count = max(8 if plan.device.type == "cuda" else 2, 2 * case.batch)
    return make_pictures(plan.output / f"pictures-{case.resolution}-{count}", side=case.resolution, count=count)


def compared_settings(names: Sequence[str]) -> dict[str, dict[str, Value]]:
    """{name: settings} for what `--compare` was given: names of COMPARED, or NAME:SETTING=VALUE,SETTING=VALUE.

    Raises SettingError for an unknown name.
    """
    chosen: dict[str, dict[str, Value]] = {}
    for text in names:
        name, _, changes = text.partition(":")
        if changes:
            pairs = [part.partition("=") for part in changes.split(",")]
            chosen[name] = {key.strip(): value.strip() for key, _, value in pairs}
        elif name in COMPARED:
            chosen[name] = dict(COMPARED[name])
        else:
            raise SettingError(f"There is nothing called '{name}' to compare",
                               remedy=f"write one of {', '.join(COMPARED)}, or NAME:SETTING=VALUE")
    return chosen


def _measure_case(plan: SpeedPlan, case: Case, rates: Rates, say: Say) -> list[Row]:
    dtype = _compute_dtype(plan.precision)
    host: Host = RandomHost(case.family, folder=plan.output, device=plan.device, dtype=dtype, small=plan.small)
    if plan.checkpoint is not None:
        host = StandaloneHost(plan.checkpoint, lora_folder=plan.output / "loras", runs_folder=plan.output / "runs",
                              device=plan.device)
    data = pictures_of(plan, case)
    compared = dict(plan.compared)
    if case.within and plan.device.type == "cuda":
        compared[f"within {case.within:g} GB"] = {"memory_budget": case.within}
    floor, runs = case_floor(host, case, rank=plan.rank, dtype=dtype, rates=rates), {name: [] for name in compared}
    for number in range(plan.repeats):
        for name, changes in compared.items():
            run = measure_run(host, settings={**shared_settings(plan, case), **changes}, data=data, steps=plan.steps,
                              warm_up=plan.warm_up, device=plan.device, stretch=10 if plan.device.type == "cuda" else 1)
            for note in run.notes:
                say(f"  note: {note}")
            say(f"  {number + 1}/{plan.repeats} {name:16} {run.seconds:.4f} s a step, {floor.times(run.seconds)}")
            runs[name].append(run)
    return [Row(case, name, tuple(found), floor) for name, found in runs.items()]


def case_floor(host: Host, case: Case, *, rank: int, dtype: torch.dtype, rates: Rates) -> Floor:
    """The floor of a case's step on the host's model."""
    outline = host.outline()
    assert outline is not None, "the checkpoint was checked before"
    cost = picture_cost(outline.tensors, detect(outline.tensors, outline.hints), width=case.resolution,
                        height=case.resolution, rank=rank, dtype=dtype)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in unet_tensors(outline.tensors).values())
    moved = moved_bytes(weights=weights, activations=cost.activation_bytes * case.batch, parameters=cost.parameters)
    return step_floor(operations=cost.operations * case.batch, moved=moved, rates=rates)


def _compute_dtype(precision: str) -> torch.dtype:
    return DTYPES["fp32" if precision == "no" else precision]


def _conditions(plan: SpeedPlan, rates: Rates) -> str:
    model = plan.checkpoint.name if plan.checkpoint else f"random weights, {'narrow' if plan.small else 'true size'}"
    changes = "".join(f", {name} {value}" for name, value in plan.changes.items())
    return (f"Model: {model}; rank {plan.rank}, AdamW, latents and captions cached, UNet only, precision {plan.precision}"
            f"{changes}. {plan.repeats} × {plan.steps} steps after {plan.warm_up} to warm up. The device reaches "
            f"{rates.operations / 1e12:.3g} TFLOP/s in matrix products and {rates.bytes / 1e9:.3g} GB/s in copies.")


def _table(rows: Sequence[Row], device: torch.device) -> str:
    head = ["case", "settings", "s a step", "from", "to", "steps a s", "processor s", "floor s", "× floor"]
    head += ["GB in steps", "GB in all"] if device.type == "cuda" else []
    lines = []
    for row in rows:
        every = [seconds for run in row.runs for seconds in run.wall]
        line = [row.case.name, row.name, f"{row.seconds:.4f}", f"{min(every):.4f}", f"{max(every):.4f}",
                f"{1 / row.seconds:.3f}", f"{statistics.median(run.processor_seconds for run in row.runs):.4f}",
                f"{row.floor.seconds:.4f}", f"{row.seconds / row.floor.seconds:.1f}"]
        if device.type == "cuda":
            cards = [run.card for run in row.runs if run.card]
            line += [gigabytes(max(card.steps_reserved for card in cards)),
                     gigabytes(max(card.run_reserved for card in cards))] if cards else ["", ""]
        lines.append(line)
    return grid(head, lines)


def _ratios(rows: Sequence[Row]) -> str:
    """Each setting's time relative to the first of its case, repeat by repeat."""
    lines = []
    for row in rows:
        first = next(other for other in rows if other.case == row.case)
        if row is first:
            continue
        for kind, figure in (("clock", lambda run: run.seconds), ("processor", lambda run: run.processor_seconds)):
            ratios = [figure(own) / figure(other) for own, other in zip(row.runs, first.runs, strict=True)]
            lines.append((row.case.name, f"{row.name} ÷ {first.name}", kind, f"{statistics.median(ratios):.3f}",
                          " ".join(f"{ratio:.3f}" for ratio in ratios)))
    return grid(("case", "time of", "by the", "median", "run by run"), lines) if lines else ""


def _same_losses(rows: Sequence[Row], precision: str) -> list[str]:
    """How far the losses of a case's settings lie from those of its first, step by step."""
    first, said = rows[0], []
    allowed = SAME_LOSS[precision]
    for row in rows[1:]:
        worst = most_apart(first.runs[0].losses, row.runs[0].losses)
        verdict = "equal within float error" if worst <= allowed else f"**not equal: more than {allowed:g}**"
        said.append(f"{row.case.name}: losses of {row.name} and {first.name} differ by at most {worst:.2g} of the loss in "
                    f"{len(row.runs[0].losses)} steps: {verdict}.")
    return said


def most_apart(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest difference between two sequences of losses, relative to the first's."""
    assert len(a) == len(b), "runs of the same plan have the same steps"
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def _within(rows: Sequence[Row]) -> list[str]:
    """Whether the runs that were given a budget stayed in it."""
    said = []
    for row in rows:
        cards = [run.card for run in row.runs if run.card]
        if row.case.within and cards and row.name.startswith("within "):
            most = max(card.run_reserved + card.outside for card in cards)
            met = "met" if most <= row.case.within * 2**30 else "**missed**"
            said.append(f"Target {row.case.name} inside {row.case.within:g} GB: {met} ({gigabytes(most)} GB, CUDA's own and "
                        "other programs' included).")
    return said
