"""`bench memory`: what the memory plan predicts, for GPUs of several sizes and compared with what was measured.

The first table is computed from shapes alone and is the same on every machine: which plan fits SD1.5 and SDXL into 4 to 24
GB, and what it is predicted to take. The second runs real steps under several plans. On a GPU it compares what is predicted
beside CUDA's own memory with what torch had given out and had taken from the driver in the steps. On a CPU it compares
what a step adds to what lies there before it, since that alone is the plan's: a profiler books each allocation of one step.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lib_lora_train.errors import TrainingError
from lib_lora_train.memory.estimate import Workload
from lib_lora_train.memory.plan import CONTEXT, GIGABYTE, MemoryPlan, plan_memory
from lib_lora_train.model.family import detect
from lib_lora_train.run.memory import layers_for
from lib_lora_train.settings import parse
from lib_lora_train.settings.field import Value
from tools.bench.host import RandomHost, make_images
from tools.bench.report import gigabytes, grid, machine_text, write_report
from tools.bench.speed import PUBLISHED, Case, shared_settings
from tools.bench.timed_run import measure_run
from tools.bench.training import Say
from tools.bench.true_size import dtype_of

BUDGETS = (3, 4, 6, 8, 12, 24)
IN_A_STEP = ("activations", "working")
"""The kinds of bytes that come and go within a step; the others lie there before it."""

PLANS: Mapping[str, Mapping[str, Value]] = {
    "nothing given up": {"memory_plan": "manual"},
    "every block recomputed": {"memory_plan": "manual", "gradient_checkpointing": True},
    "int8": {"memory_plan": "manual", "base_weights": "int8"},
    "int8, every block recomputed": {"memory_plan": "manual", "base_weights": "int8", "gradient_checkpointing": True},
}
ON_GPU: Mapping[str, Mapping[str, Value]] = {
    "activations offloaded": {"memory_plan": "manual", "cpu_offload_checkpointing": True},
    "all blocks swapped, every block recomputed": {"memory_plan": "manual", "blocks_to_swap": 200,
                                                   "gradient_checkpointing": True},
    "int8, all blocks swapped": {"memory_plan": "manual", "blocks_to_swap": 200, "base_weights": "int8"},
}
SWAP: Mapping[str, Value] = {"blocks_to_swap": 200}


@dataclasses.dataclass(frozen=True)
class MemoryPlanned:
    """What to predict and to measure; `budgets` in GB (2^30 bytes)."""

    output: Path
    device: torch.device
    cases: tuple[Case, ...]
    small: bool
    precision: str
    rank: int = 16
    budgets: tuple[int, ...] = BUDGETS
    predict: bool = True


@dataclasses.dataclass(frozen=True)
class Compared:
    """Bytes that a plan was predicted to take and that were measured; on a GPU these are the ones taken from the driver, of
    which `allocated` were given out. A run that `failed` tells why and has no figures."""

    case: Case
    name: str
    predicted: int
    measured: int = 0
    allocated: int = 0
    failed: str = ""

    @property
    def error(self) -> float:
        """The prediction's, relative to what was measured."""
        return self.predicted / self.measured - 1


def run_memory(plan: MemoryPlanned, *, say: Say) -> str:
    """Predict and measure; write `memory.md` and `memory.json` into the plan's folder after each case, and return the tables.

    A run that fails, as where the memory runs out, is told in its row.
    """
    parts, predicted = [machine_text(plan.device)], []
    if plan.predict:
        predicted = [(case, budget, made) for case in PUBLISHED for budget in plan.budgets
                     for made in _for_a_gpu(plan, case, budget, say)]
        parts += ["Predicted for a GPU, fp16, CUDA's own memory included: before the first step, while pictures and "
                  "captions are encoded, and in steps, text encoders and VAE on the CPU (GB of 2^30 bytes):",
                  _predictions(predicted)]
    cuda = plan.device.type == "cuda"
    what = "in the steps, beside CUDA's own" if cuda else "within a step, beside model, LoRA and optimiser"
    parts.append(f"Predicted and measured, {'narrow model, ' if plan.small else ''}precision {plan.precision}, {what}:")
    compared, text = [], ""
    for case in plan.cases:
        compared += _compare(plan, case, say)
        failures = [f"{row.case.name}, {row.name}: **failed.** {row.failed}" for row in compared if row.failed]
        text = "\n\n".join([*parts, _comparisons(compared, cuda=cuda), *failures]) + "\n"
        write_report(plan.output, "memory", text, {
            "machine": machine_text(plan.device),
            "predicted": [{"case": case.name, "budget": budget, "bytes": made.bytes, "before": made.before,
                           "kinds": dict(made.predicted), "plan": made.text} for case, budget, made in predicted],
            "compared": [dataclasses.asdict(row) for row in compared]})
    return text


def planned(tensors: Mapping[str, torch.Tensor], case: Case, *, settings: Mapping[str, Value], device_type: str,
            precision: str, rank: int, budget: int | None = None) -> MemoryPlan:
    """What the memory plan says of a case on a model of these shapes, once text encoders and VAE are on the CPU (on a
    GPU)."""
    architecture = detect(tensors)
    workload = Workload(width=case.resolution, height=case.resolution, dtype=dtype_of(precision), device_type=device_type,
                        layers=layers_for(tensors, architecture, rank=rank, text_encoder=False))
    return plan_memory(tensors, architecture, workload, batch=case.batch, memory=parse(settings).memory, budget=budget,
                       parts_on_cpu=frozenset({"vae", "text"} if device_type == "cuda" else ()))


def _for_a_gpu(plan: MemoryPlanned, case: Case, budget: int, say: Say) -> Iterator[MemoryPlan]:
    """By default, and where that is short of memory with as many blocks swapped as it must."""
    host = RandomHost(case.family, folder=plan.output, device=plan.device, dtype=torch.float16)
    for settings in ({}, SWAP):
        made = planned(host.outline().tensors, case, settings=settings, device_type="cuda", precision="fp16",
                       rank=plan.rank, budget=budget * GIGABYTE)
        say(f"{case.name} in {budget} GB: {made.text}")
        yield made
        if not made.config.base_dtype and not made.missing:
            break


def _compare(plan: MemoryPlanned, case: Case, say: Say) -> list[Compared]:
    cuda = plan.device.type == "cuda"
    host = RandomHost(case.family, folder=plan.output, device=plan.device, dtype=dtype_of(plan.precision), small=plan.small)
    data = make_images(plan.output / f"pictures-{case.resolution}", side=case.resolution, count=max(4, case.batch))
    plans = {**PLANS, **(ON_GPU if cuda else {})}
    if cuda and case.within:
        plans[f"within {case.within:g} GB"] = {"memory_budget": case.within}
    rows = []
    for name, settings in plans.items():
        budget = int(float(settings["memory_budget"]) * GIGABYTE) if "memory_budget" in settings else None
        predicted = planned(host.outline().tensors, case, settings=settings, device_type=plan.device.type,
                            precision=plan.precision, rank=plan.rank, budget=budget)
        row = Compared(case, name, predicted.bytes - CONTEXT if cuda else
                       sum(predicted.predicted.get(kind, 0) for kind in IN_A_STEP))
        shared = shared_settings(case, rank=plan.rank, precision=plan.precision)
        try:
            row = _measured(plan, row, host, data, {**shared, **settings})
            say(f"{case.name}, {name}: {gigabytes(row.predicted)} GB predicted, {gigabytes(row.measured)} GB measured")
        except TrainingError as error:
            row = dataclasses.replace(row, failed=str(error))
            say(f"{case.name}, {name}: {error}")
        rows.append(row)
    return rows


def _measured(plan: MemoryPlanned, row: Compared, host: RandomHost, data: Path, settings: Mapping[str, Value]) -> Compared:
    """`row` with what one run took."""
    if plan.device.type == "cuda":
        run = measure_run(host, settings=settings, data=data, steps=20, warm_up=5, device=plan.device, stretch=10)
        assert run.gpu is not None, "a run on a GPU tells its memory"
        return dataclasses.replace(row, measured=run.gpu.steps_reserved, allocated=run.gpu.steps_allocated)
    with _Booked(last=3) as booked:
        measure_run(host, settings=settings, data=data, steps=2, warm_up=1, device=plan.device, each=booked.between)
    return dataclasses.replace(row, measured=booked.peak)


class _Booked:
    """Books what a CPU's allocator gives out and takes back in each step from the second to the `last`; `peak` is the highest
    sum of one.

    More than one, since a step was once seen with most of its events missing, on a busy machine.
    """

    def __init__(self, *, last: int) -> None:
        self.peak, self._last = 0, last
        self._profile: Any = None

    def __enter__(self) -> _Booked:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def between(self, step: int) -> None:
        """To be called when `step` steps are done."""
        self._end()
        if step == self._last:
            return
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()

    def _end(self) -> None:
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.__exit__(None, None, None)
        self.peak = max(self.peak, peak_allocated(profile))


def peak_allocated(profile: torch.profiler.profile) -> int:
    """The highest sum of bytes that the allocator gave out since the profile began; it needs `profile_memory`."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    # The name of an event's time changed with torch 2.2 or so; events of the same moment stay in order.
    ordered = sorted(events, key=lambda event: event.start_ns() if hasattr(event, "start_ns") else event.start_us())
    return max(itertools.accumulate((event.nbytes() for event in ordered), initial=0))


def _predictions(rows: list[tuple[Case, int, MemoryPlan]]) -> str:
    return grid(("case", "GB there are", "GB before", "GB in steps", "fits", "plan"), [
        (case.name, str(budget), gigabytes(made.before), gigabytes(made.bytes),
         "**no**" if max(made.bytes, made.before) > budget * GIGABYTE else "yes", made.text.partition(": ")[2])
        for case, budget, made in rows])


def _comparisons(rows: list[Compared], *, cuda: bool) -> str:
    head = ("case", "plan", "MB predicted", *(("MB allocated", "MB reserved") if cuda else ("MB measured",)), "error")
    lines = []
    for row in rows:
        sizes = (row.predicted, *((row.allocated,) if cuda else ()), row.measured)
        cells = [f"{size / 2**20:.1f}" for size in sizes]
        error = "failed" if row.failed else f"{100 * row.error:+.1f} %"
        lines.append((row.case.name, row.name, *(cells if not row.failed else [cells[0], *[""] * len(cells[1:])]), error))
    return grid(head, lines)
