"""What processes that train together must have in common, compared before any of them begins."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lib_lora_train import __version__
from lib_lora_train.distributed import ProcessGroup, agree
from lib_lora_train.model.fingerprint import sampled_fingerprint
from lib_lora_train.run import resume
from lib_lora_train.run.planning import RunPlan
from lib_lora_train.settings import DECLARATIONS, Settings, flat


def agree_on_settings(ranks: ProcessGroup, settings: Settings) -> None:
    """Raises Disagreement where the processes were started with different settings. Their paths may differ, as machines do."""
    known = {d.name: bool(flat(settings)[d.name]) if d.is_path else flat(settings)[d.name] for d in DECLARATIONS.values()}
    agree(ranks, shown={**known, "the version": __version__}, digests={})


def agree_on_data(ranks: ProcessGroup, plan: RunPlan, checkpoint: Mapping[str, str], *, step: int,
                  weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Raises Disagreement where the processes have different pictures, models or resume points: `step` and `weights` (none for
    new ones) are those that the run goes on from."""
    if ranks.world == 1:
        return
    shown = {"the number format computed in (mixed_precision)": str(dtype),
             "the step to go on from": step}
    agree(ranks, shown=shown, digests={
        "the pictures, captions or repeats": resume.dataset_fingerprint(plan.dataset, plan.placements),
        "the checkpoints": checkpoint["fingerprint"],
        "the weights to go on from": sampled_fingerprint(weights)})
