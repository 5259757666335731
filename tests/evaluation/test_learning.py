"""A LoRA learns what it is shown: real pictures (24 Twemoji faces), the whole road, and the file it leaves."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lib_lora_train.cache.batches import Batches
from lib_lora_train.cache.latents import CachedLatents
from lib_lora_train.cache.text import TextCache
from lib_lora_train.demo import STYLE, tiny_checkpoint
from lib_lora_train.evaluation.fixed_loss import fixed_loss
from lib_lora_train.evaluation.sampler import SampleRequest, sample_latents
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.job import run_job
from lib_lora_train.model import frozen
from lib_lora_train.network import file
from lib_lora_train.network.network import LoRANetwork
from lib_lora_train.network.targets import find_targets
from lib_lora_train.preparation import prepare
from lib_lora_train.settings import parse

SETTINGS = parse({
    "output_name": "faces", "train_data_dir": str(STYLE), "trigger_word": "twemoji", "resolution": "64",
    "max_train_steps": 150, "train_batch_size": 2, "network_dim": 16, "network_alpha": 16, "learning_rate": 2e-3,
    "min_snr_gamma": 0, "min_bucket_reso": 64})


class Learnt:
    """The model, the LoRA read back from its file, and the pictures as batches."""

    def __init__(self, folder: Path) -> None:
        checkpoint = tiny_checkpoint.write(folder, size=tiny_checkpoint.DEMO)
        host = StandaloneHost(checkpoint, lora_folder=folder / "loras", runs_folder=folder / "runs")
        path = Path(run_job(SETTINGS, host, report=lambda event: None, stop=lambda: "").path)
        with host.borrow() as lent:
            self.model = frozen.build(lent.tensors, hints=lent.hints, tokenizers=lent.tokenizers)
        targets = find_targets(self.model.components, family="sd1", text_encoder=False)
        self.adapters = LoRANetwork.continued(targets, file.load(path).tensors, seed=0).adapters()
        ready = prepare(SETTINGS, family="sd1")
        self.source = CachedLatents.build(self.model.vae, ready.dataset, ready.placements)
        self.batches = Batches(self.source, train_batch_size=8, seed=1, trigger_word="twemoji")
        cache = TextCache(self.model.text)
        self.condition = lambda batch: cache.get(batch.captions)

    def loss(self, adapters) -> dict[int, float]:
        visits = list(self.batches.epoch(1))[:3]
        # Beyond t = 700 almost all is noise, which is what the untrained model says already: nothing is left to learn.
        return fixed_loss(self.model, visits, self.condition, adapters=adapters.get("unet", {}), seed=9,
                          timesteps=(100, 300, 500, 700))

    def distance_to_nearest_picture(self, adapters) -> float:
        """Mean over six paintings of the RMS difference (pixels, 0 to 1) to the nearest training picture, both as the
        VAE shows them."""
        indices = list(range(len(self.source.dataset.examples)))
        shown = self.source.get(indices, [random.Random(0)] * len(indices)).mean
        training = self.model.vae.decode(shown).clamp(-1, 1) / 2
        distances = []
        for seed in range(6):
            request = SampleRequest("twemoji, grinning face", width=64, height=64, steps=20, cfg_scale=1.0, seed=seed)
            painted = self.model.vae.decode(sample_latents(self.model, request, adapters=adapters)).clamp(-1, 1) / 2
            distances.append((training - painted).square().mean(dim=(1, 2, 3)).sqrt().min())
        return torch.stack(distances).mean().item()


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> Learnt:
    return Learnt(tmp_path_factory.mktemp("faces"))


def test_the_loss_on_fixed_noise_falls_at_every_timestep(learnt):
    before, after = learnt.loss({}), learnt.loss(learnt.adapters)
    assert all(after[t] < before[t] for t in before)
    assert sum(after.values()) < 0.6 * sum(before.values())


def test_what_is_painted_with_the_lora_looks_more_like_the_pictures(learnt):
    before, after = learnt.distance_to_nearest_picture({}), learnt.distance_to_nearest_picture(learnt.adapters)
    assert after < 0.75 * before
