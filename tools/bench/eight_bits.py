"""`bench eight-bits`: what a LoRA loses that is trained beside weights in int8 or fp8, where it is used beside the exact ones.

For the demo's style and subject and each seed: a run beside the model as it is and one beside each kind of eight-bit weights.
Each LoRA is then measured beside the exact model: the loss on held-out pictures as a share of the model's own, and how far its
change of the weights is from that of the run beside exact ones, which is set beside how far two seeds are apart.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch

from lib_lora_train.adapters.file import load
from lib_lora_train.errors import translated
from lib_lora_train.host.port import Host
from lib_lora_train.settings import parse
from tools.bench.rates import Figures, held_out_share, spread
from tools.bench.recommend import DATA, SETTINGS, TRIGGERS
from tools.bench.report import grid as table
from tools.bench.report import write_report
from tools.bench.training import Say

EXACT = "as they are"
KINDS = (EXACT, "int8", "fp8")


@dataclasses.dataclass(frozen=True)
class EightBitsPlan:
    """What to measure; `steps` are those of each run."""

    output: Path
    cases: tuple[str, ...] = ("style", "subject")
    seeds: tuple[int, ...] = (42, 43, 44)
    steps: int = 120
    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)


def run_eight_bits(plan: EightBitsPlan, host: Host, *, say: Say) -> str:
    """Measure and return the report, which also lies in `plan.output`/eight-bits.md and .json."""
    with translated("making the folder of the results"):
        plan.output.mkdir(parents=True, exist_ok=True)
    figures = Figures(plan.output / "figures.json")
    for seed in plan.seeds:
        for case in plan.cases:
            for kind in KINDS:
                figures.ensure(f"{case} {seed} {kind}", functools.partial(_loss, plan, host, case, seed, kind), say)
    text = "\n\n".join(_case_text(plan, host, figures, case) for case in plan.cases) + "\n"
    return write_report(plan.output, "eight-bits", text, figures.values)


def _loss(plan: EightBitsPlan, host: Host, case: str, seed: int, kind: str) -> float:
    """Train beside weights of this kind, and measure beside exact ones: in a run of one step that moves nothing."""
    shared = {**SETTINGS, **plan.changes, "seed": seed, "trigger_word": TRIGGERS[case], "train_data_dir": str(DATA[case]),
              "save_every_n_epochs": 0}
    name = _name(case, seed, kind)
    held_out_share(parse({**shared, "output_name": name, "base_weights": kind, "max_train_steps": plan.steps}), host)
    return held_out_share(parse({**shared, "output_name": f"{name}-measured", "network_weights": str(_file(host, name)),
                                 "max_train_steps": 1, "learning_rate": 1e-12}), host)


def _name(case: str, seed: int, kind: str) -> str:
    return f"{case}-{seed}-{kind.replace(' ', '-')}"


def _file(host: Host, name: str) -> Path:
    return Path(host.lora_folder, f"{name}.safetensors")


def distance(one: Path, other: Path) -> float:
    """‖ΔW - ΔW'‖ / ‖ΔW‖ over all layers of two plain LoRA files of the same layers."""
    first, second = (load(path).tensors for path in (one, other))
    apart = size = 0.0
    for key in (name.removesuffix(".alpha") for name in first if name.endswith(".alpha")):
        changes = [_change(tensors, key) for tensors in (first, second)]
        apart += float((changes[0] - changes[1]).square().sum())
        size += float(changes[0].square().sum())
    return (apart / size) ** 0.5


def _change(tensors: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    down, up = (tensors[f"{key}.lora_{side}.weight"].double().flatten(1) for side in ("down", "up"))
    return float(tensors[f"{key}.alpha"]) / len(down) * up @ down


def _case_text(plan: EightBitsPlan, host: Host, figures: Figures, case: str) -> str:
    """A row for each kind: the losses of the seeds, their mean and spread, and how far ΔW is from the exact run's."""
    files = {(seed, kind): _file(host, _name(case, seed, kind)) for seed in plan.seeds for kind in KINDS}
    rows = []
    for kind in KINDS:
        losses = [figures.values[f"{case} {seed} {kind}"] for seed in plan.seeds]
        away = statistics.mean(distance(files[seed, EXACT], files[seed, kind]) for seed in plan.seeds)
        rows.append((kind, *(f"{loss:.4f}" for loss in losses), f"{statistics.mean(losses):.4f}", f"{spread(losses):.4f}",
                     f"{away:.2f}"))
    text = table(("weights", *(f"seed {seed}" for seed in plan.seeds), "mean", "spread", "ΔW apart"), rows)
    if len(plan.seeds) > 1:
        seeds = distance(files[plan.seeds[0], EXACT], files[plan.seeds[1], EXACT])
        text += f"\n\nTwo runs beside exact weights with different seeds: ΔW {seeds:.2f} apart."
    return f"### {case}, {plan.steps} steps\n\n{text}"
