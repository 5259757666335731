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
from tools.bench import real_images, table
from tools.bench.evaluator import THOROUGH, Effort, Evaluator, ScorerFigures
from tools.bench.report import write_report
from tools.bench.sampler import Sampler
from tools.bench.style import StyleResult, measure_style
from tools.bench.subject import SubjectResult, measure_subject
from tools.bench.training import Say, settings_of

STEPS, SUBJECT_STEPS = 400, 200


@dataclasses.dataclass(frozen=True)
class QualityPlan:
    """What to measure: datasets' folders (`subject` None leaves it out), steps, settings that differ from the reference
    line. An `effort` less than THOROUGH is to see whether it works, not to be quoted."""

    output: Path
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
    scorers: ScorerFigures
    style: StyleResult
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
    say("Fitting the scorers on real pictures as the model's VAE shows them ...")
    sampler = Sampler(host, steps=plan.effort.sampler_steps)
    evaluator = Evaluator(sampler, real_images.load(), effort=plan.effort, kept=plan.output)
    say(table.scorers_text(evaluator.figures))
    say(f"Training a style for {plan.steps} steps ...")
    style = measure_style(host, sampler, evaluator, data=plan.style, output=plan.output, settings=settings,
                          steps=plan.steps, say=say)
    subject = None
    if plan.subject is not None:
        say(f"Training a subject for {plan.subject_steps} steps ...")
        subject = measure_subject(host, sampler, evaluator, data=plan.subject, output=plan.output, settings=settings,
                                  steps=plan.subject_steps, say=say)
    checkpoint = host.checkpoint()
    quality = Quality(
        checkpoint=checkpoint.title if checkpoint else "", settings=dict(settings), thorough=plan.effort == THOROUGH,
        torch=torch.__version__, seconds=time.monotonic() - begin, scorers=evaluator.figures, style=style, subject=subject)
    write_report(plan.output, "quality", table.quality_text(
        settings=quality.settings, checkpoint=quality.checkpoint, scorers=quality.scorers, style=style, subject=subject,
        thorough=quality.thorough, seconds=quality.seconds), dataclasses.asdict(quality))
    return quality
