"""A second family plugs in by one entry of `FAMILIES`: detection, computation, targets, metadata, file and training sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import pytest
import torch

from lib_lora_train.adapters.file import recognise
from lib_lora_train.adapters.metadata import TrainingMetadata, describe
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.dataset.buckets import TrainingSizes, buckets_for
from lib_lora_train.model import frozen
from lib_lora_train.model.family import FAMILIES, SD1, Family, MetadataNames, training_sizes
from lib_lora_train.model.sd.schedule import NoiseSchedule, scaled_linear_alphas_cumprod
from lib_lora_train.model.sd.text import TextConditioner
from lib_lora_train.settings import Settings
from tests.model.small_checkpoints import HINTS, checkpoint, tokenizers


class UpperCase(TextConditioner):
    """Reads captions in capitals."""

    def tokenize(self, caption: str):
        return super().tokenize(caption.upper())


def keys(component: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, str, bool]]:
    """The queries only."""
    ends = "attn1.to_q.weight" if component == "unet" else "q_proj.weight"
    for name in (name.removesuffix(".weight") for name in shapes if name.endswith(ends)):
        yield name, f"tiny_{component}_{name}".replace(".", "_"), False


def linear_schedule(**given: object) -> NoiseSchedule:
    return NoiseSchedule.build(**{**given, "alphas_cumprod": scaled_linear_alphas_cumprod(steps=10)})


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Family:
    family = dataclasses.replace(
        SD1, name="tiny", title="Tiny", sizes=TrainingSizes(256, largest_side=512, multiple=16), latent_scale=0.5,
        text=(dataclasses.replace(SD1.text[0], component="words"),), lora_prefixes=("tiny_",), lora_keys=keys,
        recognises=lambda tensors: "tiny" in tensors, conditioner=UpperCase, schedule=linear_schedule,
        metadata=MetadataNames(("tiny_1", "tiny_1_v"), ("tiny-diffusion",) * 2))
    monkeypatch.setitem(FAMILIES, "tiny", family)
    return family


def test_its_checkpoint_is_recognised_and_computed_by_its_own_parts(tiny: Family) -> None:
    model = frozen.build({**checkpoint("sd1"), "tiny": torch.zeros(1)}, hints=HINTS["sd1"], tokenizers=tokenizers("sd1"))
    assert model.architecture.family is tiny and model.architecture.latent_scale == 0.5
    assert model.architecture.components == ("unet", "words") and len(model.schedule) == 10
    assert isinstance(model.text, UpperCase)
    assert frozen.build(checkpoint("sd1"), hints=HINTS["sd1"], tokenizers=tokenizers("sd1")).architecture.family is SD1
    network = AdapterNetwork.build(find_targets(model.components, family=tiny), rank=2, alpha=2, seed=0)
    assert set(network.adapters()) == {"unet", "words"}
    assert all(key.startswith(("tiny_unet_", "tiny_words_")) for key in network.layers)
    assert recognise(network.state_dict(), {}) == "tiny"


def test_its_metadata_and_training_sizes_are_its_own(tiny: Family) -> None:
    written = describe(TrainingMetadata(
        family=tiny, v_prediction=True, zero_terminal_snr=False, resolution=(256, 256), dim=2, alpha=2, steps=1, epoch=1,
        total_epochs=1, total_steps=1, batches_per_epoch=1, batch_size=1, started_at=0), "it")
    assert (written["ss_base_model_version"], written["modelspec.architecture"]) == ("tiny_1_v", "tiny-diffusion/lora")
    buckets = buckets_for(Settings().dataset, sizes=training_sizes("tiny"))
    assert buckets.resolution == (256, 256)
    assert training_sizes("").default == training_sizes("unheard of").default == 512
