"""`bench quality`: trains a style and a subject on fixed splits with fixed seeds, and measures what was learnt."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from lib_lora_train.demo import STYLE, SUBJECT
from lib_lora_train.errors import DatasetError, translated
from lib_lora_train.host.port import Host
from tools.bench import joint_scorer, real_images, styled_images, table
from tools.bench.evaluator import THOROUGH, Effort, Evaluator, ScorerFigures
from tools.bench.headline import HeadlineRow, measure_headlines
from tools.bench.joint_scorer import Extent, JointScorer, WordGate
from tools.bench.report import write_report
from tools.bench.sampler import Sampler
from tools.bench.style import StyleResult, measure_style
from tools.bench.style_scorer import StyleGate
from tools.bench.subject import SubjectResult, measure_subject
from tools.bench.training import Say, settings_of

STEPS, SUBJECT_STEPS = 400, 200


@dataclasses.dataclass(frozen=True)
class QualityPlan:
    """What to measure: datasets' folders (`subject` None leaves it out), steps, settings that differ from the reference
    line. `packages` is where npm's packages are put; None leaves the graded styles and their headline out. `detail` False
    leaves out everything else. An `effort` less than THOROUGH is to see whether it works, not to be quoted."""

    output: Path
    packages: Path | None = None
    extent: Extent = joint_scorer.THOROUGH
    detail: bool = True
    style: Path = STYLE
    subject: Path | None = SUBJECT
    steps: int = STEPS
    subject_steps: int = SUBJECT_STEPS
    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)
    effort: Effort = THOROUGH


@dataclasses.dataclass(frozen=True)
class Quality:
    """All figures of a run."""

    checkpoint: str
    settings: dict[str, object]
    thorough: bool
    torch: str
    seconds: float
    headlines: list[HeadlineRow]
    gates: dict[str, tuple[StyleGate, WordGate]]
    scorers: ScorerFigures | None
    style: StyleResult | None
    subject: SubjectResult | None


def run_quality(plan: QualityPlan, host: Host, *, say: Say) -> Quality:
    """Measure, telling progress line by line; the table goes to `plan.output`/quality.md, the figures to quality.json.

    Raises SettingError for settings that do not exist or are not free, DatasetError, ModelError, OutputError, and what
    `run_job` raises.
    """
    begin, settings = time.monotonic(), settings_of(plan.changes)
    for folder in filter(None, (plan.style, plan.subject)):
        if not any(folder.glob("*.png")):
            raise DatasetError(f"There are no pictures in {folder}", remedy="install the extension anew, with its demo")
    with translated("making the folder of the results"):
        plan.output.mkdir(parents=True, exist_ok=True)
    headlines, gates = _headlines(plan, host, settings, say=say) if plan.packages else ([], {})
    scorers, style, subject = _detail(plan, host, settings, say=say) if plan.detail else (None, None, None)
    checkpoint = host.checkpoint()
    thorough = plan.effort == THOROUGH and plan.extent == joint_scorer.THOROUGH
    quality = Quality(
        checkpoint=checkpoint.title if checkpoint else "", settings=dict(settings), thorough=thorough, torch=torch.__version__,
        seconds=time.monotonic() - begin, headlines=headlines, gates=gates, scorers=scorers, style=style, subject=subject)
    parts = [table.intro_text(settings=quality.settings, checkpoint=quality.checkpoint, thorough=thorough,
                              seconds=quality.seconds)]
    if gates:
        parts += [table.gates_text(gates), table.headlines_text(headlines, gates, steps=plan.steps)]
    if scorers is not None and style is not None:
        parts.append(table.detail_text(scorers=scorers, style=style, subject=subject))
    write_report(plan.output, "quality", "\n\n".join(parts) + "\n", dataclasses.asdict(quality))
    return quality


def _headlines(plan: QualityPlan, host: Host, settings: Mapping[str, object], *, say: Say
               ) -> tuple[list[HeadlineRow], dict[str, tuple[StyleGate, WordGate]]]:
    assert plan.packages is not None
    say("Fitting the scorers of the graded styles ...")
    images = styled_images.load(real_images.load(), plan.packages)
    sampler = Sampler(host, steps=plan.extent.sampler_steps)
    scorer = JointScorer(sampler, images, plan.extent)
    say(table.gates_text(scorer.gates))
    rows = measure_headlines(host, sampler, scorer, output=plan.output, settings=settings, steps=plan.steps, say=say)
    return rows, scorer.gates


def _detail(plan: QualityPlan, host: Host, settings: Mapping[str, object], *, say: Say
            ) -> tuple[ScorerFigures, StyleResult, SubjectResult | None]:
    """One style and one subject at the reference line, looked at from several sides."""
    say("Fitting the scorers on real pictures as the model's VAE shows them ...")
    sampler = Sampler(host, steps=plan.effort.sampler_steps)
    evaluator = Evaluator(sampler, real_images.load(), effort=plan.effort, kept=plan.output)
    say(table.scorers_text(evaluator.figures))
    say(f"Training a style for {plan.steps} steps ...")
    style = measure_style(host, sampler, evaluator, data=plan.style, output=plan.output, settings=settings,
                          steps=plan.steps, say=say)
    if plan.subject is None:
        return evaluator.figures, style, None
    say(f"Training a subject for {plan.subject_steps} steps ...")
    subject = measure_subject(host, sampler, evaluator, data=plan.subject, output=plan.output, settings=settings,
                              steps=plan.subject_steps, say=say)
    return evaluator.figures, style, subject
