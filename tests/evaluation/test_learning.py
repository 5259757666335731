"""A LoRA learns what it is shown: real pictures (24 Twemoji), the whole road, and the file it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib_lora_train.cache.batches import Batches
from lib_lora_train.cache.latents import CachedLatents
from lib_lora_train.cache.text import TextCache
from lib_lora_train.demo import STYLE, embedded
from lib_lora_train.evaluation.fixed_loss import fixed_loss
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.job import run_job
from lib_lora_train.model import frozen
from lib_lora_train.network import file
from lib_lora_train.network.network import LoRANetwork
from lib_lora_train.network.targets import find_targets
from lib_lora_train.preparation import prepare
from lib_lora_train.settings import parse

SETTINGS = parse({
    "output_name": "style", "train_data_dir": str(STYLE), "resolution": "128",
    "max_train_steps": 60, "train_batch_size": 4, "network_dim": 16, "network_alpha": 16, "learning_rate": 1e-3})


class Learnt:
    """The model, the LoRA read back from its file, and the pictures as batches."""

    def __init__(self, folder: Path) -> None:
        host = StandaloneHost(embedded.CHECKPOINT, lora_folder=folder / "loras", runs_folder=folder / "runs")
        path = Path(run_job(SETTINGS, host, report=lambda event: None, stop=lambda: "").path)
        with host.borrow() as lent:
            tensors = {name: tensor.float() for name, tensor in lent.tensors.items()}
            self.model = frozen.build(tensors, hints=lent.hints, tokenizers=lent.tokenizers)
        targets = find_targets(self.model.components, family="sd1", text_encoder=False)
        self.adapters = LoRANetwork.continued(targets, file.load(path).tensors, seed=0).adapters()
        ready = prepare(SETTINGS, family="sd1")
        self.source = CachedLatents.build(self.model.vae, ready.dataset, ready.placements)
        self.batches = Batches(self.source, train_batch_size=8, seed=1)
        cache = TextCache(self.model.text)
        self.condition = lambda batch: cache.get(batch.captions)

    def loss(self, adapters) -> dict[int, float]:
        visits = list(self.batches.epoch(1))[:3]
        return fixed_loss(self.model, visits, self.condition, adapters=adapters.get("unet", {}), seed=9)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> Learnt:
    return Learnt(tmp_path_factory.mktemp("style"))


def test_the_loss_on_fixed_noise_falls_at_every_timestep(learnt):
    before, after = learnt.loss({}), learnt.loss(learnt.adapters)
    assert all(after[t] < before[t] for t in before)
