"""A run from settings, as the command line makes it: the plan, then the job."""

from __future__ import annotations

from pathlib import Path

from lib_lora_train.dataset.examples import Dataset
from lib_lora_train.dataset.plan import Plan
from lib_lora_train.distributed import SINGLE_PROCESS, ProcessGroup
from lib_lora_train.events import Finished, Report
from lib_lora_train.host.port import Host
from lib_lora_train.run.callbacks import Stop
from lib_lora_train.run.inputs import stage
from lib_lora_train.run.job import run_job
from lib_lora_train.run.planning import RunPlan, plan_job
from lib_lora_train.settings import Settings


def run_settings(settings: Settings, host: Host, *, report: Report, stop: Stop, folder: Path | None = None,
                 group: ProcessGroup = SINGLE_PROCESS) -> Finished:
    """Plan the run that `settings` describe, and carry it out."""
    plan = plan_job(settings, host, group=group, on_progress=stage("Reading pictures", report),
                    should_stop=lambda: bool(stop()))
    return run_job(plan, host, report=report, stop=stop, folder=folder, group=group)


def plan_of(settings: Settings) -> RunPlan:
    """A plan without a dataset, for runners whose job is a stand-in."""
    schedule = Plan(batches_per_epoch=1, steps_per_epoch=1, epochs=1, steps=1, buckets=())
    return RunPlan(settings=settings, family="", dataset=Dataset(Path(), "plain", ()), placements=(), resolutions=((64, 64),),
                   schedule=schedule, warnings=())
