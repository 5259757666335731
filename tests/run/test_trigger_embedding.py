"""The trigger word's own vectors in a run: how they begin, that they are trained and kept, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib_lora_train import events
from lib_lora_train.errors import SettingError
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.model.sd.text_encoder import TOKEN_EMBEDDING
from lib_lora_train.model.sd.tokens import clip_tokenizer
from lib_lora_train.run import job
from lib_lora_train.run.planning import plan_dataset
from tests.jobs import run_settings
from tests.run.test_job import metadata, of, settings
from tests.run.test_resume import going_on, interrupted, run

KEY = "bundle_emb.zzk.string_to_param.*"
ON = {"train_trigger_embedding": True, "save_every_n_steps": 1, "max_train_steps": 3, "overwrite": True, "flip_aug": True}


class _AtTheLoopError(Exception):
    """Raised where the training would begin."""


def at_the_loop(images, host, monkeypatch, **changes):
    """What a run would train, and how: (network, config, warnings)."""
    seen, told = [], []

    def train(model, *, network, config, **rest):
        seen.append((network, config))
        raise _AtTheLoopError
    monkeypatch.setattr(job, "train", train)
    with pytest.raises(_AtTheLoopError):
        run_settings(settings(images, **ON | changes), host, report=told.append, stop=lambda: "")
    return *seen[0], [event.message for event in of(events.Warned, told)]


def rows_of(host: StandaloneHost, text: str) -> Tensor:
    """The token embeddings of a text."""
    with host.lease() as leased:
        table = next(tensor for name, tensor in leased.tensors.items() if name.endswith(f"{TOKEN_EMBEDDING}.weight"))
        tokenizer = leased.tokenizers[0] if leased.tokenizers else clip_tokenizer()
        return table[tokenizer.encode(text)].float().clone()


def test_the_vectors_are_trained_kept_in_every_file_and_the_model_stays_as_it_is(images, host, tmp_path):
    with host.lease() as leased:
        before = {name: tensor.clone() for name, tensor in leased.tensors.items()}
    chosen = settings(images, **ON, stop_embedding_training=0.5, validation=True, sample_images=True, sample_prompts="zzk, red",
                      train_batch_size=1, save_precision="fp16", gradient_checkpointing=True)
    finished, seen = run(chosen, host, tmp_path / "runs" / "zzk-1")
    assert finished.verdict == "healthy" and len(of(events.Sampled, seen)) > 0
    saved = [load_file(event.path) for event in of(events.Saved, seen)]
    assert [tensors[KEY].dtype for tensors in saved] == [torch.float16] * 3
    first, second, third = (tensors[KEY] for tensors in saved)
    start = rows_of(host, "zzk")
    assert len(first) == 2 and not torch.equal(first, start[:1].half().expand_as(first))
    # Two of three steps are at most half of them, rounded up; then it stays.
    assert not torch.equal(first, second) and torch.equal(second, third)
    down = next(key for key in saved[0] if key.endswith("lora_up.weight"))
    assert not torch.equal(saved[1][down], saved[2][down])
    assert not any(key.startswith("lora_te") for key in saved[2])
    described = metadata(finished.path)
    assert described["ss_train_trigger_embedding"] == "True" and described["modelspec.trigger_phrase"] == "zzk"
    with host.lease() as leased:
        assert all(torch.equal(tensor, before[name]) for name, tensor in leased.tensors.items())


def test_interrupted_and_resumed_equals_the_straight_run(images, host):
    chosen = settings(images, **ON | {"network_train_unet_only": False, "mixed_precision": "bf16", "ema_decay": 0.9,
                                      "stop_embedding_training": 0.6, "preservation": "dco"})
    straight, _ = run(chosen, host, None)
    expected = load_file(straight.path)
    folder = interrupted(chosen, host, after=2)
    finished, _ = run(going_on(chosen, folder), host, folder)
    result = load_file(finished.path)
    assert KEY in result and result.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in result.items())


def test_what_is_chosen_reaches_the_training(images, host, monkeypatch):
    network, config, told = at_the_loop(images, host, monkeypatch, embedding_vectors=3, embedding_init_text="red cat",
                                        embedding_lr=5e-4, stop_embedding_training=0.34, network_train_unet_only=True)
    (own,), red = network.embeddings, rows_of(host, "red cat")
    assert torch.equal(own.by_component["te"].detach(), red[[number * len(red) // 3 for number in range(3)]])
    assert (config.embedding_lr, config.text_encoder_lr, config.embedding_steps) == (5e-4, 0.0, 2)
    assert [group["name"] for group in network.parameter_groups(1e-3, 0.0, config.embedding_lr)] == ["unet", "embedding"]
    network, _, _ = at_the_loop(images, host, monkeypatch, preservation="dop", preservation_class="cat")
    assert torch.equal(network.embeddings[0].by_component["te"][0].detach(), rows_of(host, "cat")[0])


def test_a_file_that_is_continued_brings_its_vectors_along(images, host, monkeypatch, tmp_path):
    network, _, _ = at_the_loop(images, host, monkeypatch)
    tensors = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    tensors[KEY] = torch.full((5, tensors[KEY].shape[1]), 0.25)
    tensors["bundle_emb.other.string_to_param.*"] = torch.full((1, tensors[KEY].shape[1]), 0.5)
    path = tmp_path / "before.safetensors"
    save_file(tensors, path)
    network, _, told = at_the_loop(images, host, monkeypatch, network_weights=str(path), embedding_vectors=4)
    trained = {one.word: any(weight.requires_grad for weight in one.parameters()) for one in network.embeddings}
    assert trained == {"zzk": True, "other": False}
    assert torch.equal(network.state_dict()[KEY], tensors[KEY]) and any("embedding_vectors" in text for text in told)
    # Without the setting they are kept, and read with the captions, but not trained.
    network, config, _ = at_the_loop(images, host, monkeypatch, network_weights=str(path), train_trigger_embedding=False)
    assert not any(weight.requires_grad for one in network.embeddings for weight in one.parameters())
    assert config.embedding_lr == 0.0 and KEY in network.state_dict()


def test_a_word_that_the_model_knows_is_told(images, host, monkeypatch):
    known, made_up = (at_the_loop(images, host, monkeypatch, trigger_word=word)[2] for word in ("cat", "zumiwok"))
    assert [sum("trigger_word" in text for text in told) for told in (known, made_up)] == [1, 0]


@pytest.mark.parametrize("changes", [
    {"trigger_word": ""}, {"trigger_word": "zzk.v2"}, {"trigger_word": "zzk (toy)"}, {"trigger_word": "zzk, toy"},
    {"trigger_word": "zzk AND toy"}, {"trigger_word": "zzk-"}, {"embedding_lr": 0.0},
    {"optimizer_type": "Prodigy", "learning_rate": 1.0, "embedding_lr": 0.5}])
def test_what_is_impossible_is_refused_before_anything_is_read(images, changes):
    with pytest.raises(SettingError):
        plan_dataset(settings(images, **ON | changes), family="sd1")


def test_two_trigger_words_are_refused_and_a_folder_without_one_is_not(images: Path):
    def plan(word: str) -> object:
        text = f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\ntrigger_word = "{word}"'
        return plan_dataset(settings(images, **ON, dataset_config=text), family="sd1")
    assert plan("zzk") and plan("")
    with pytest.raises(SettingError, match="other"):
        plan("other")


@pytest.mark.parametrize("changes, unused", [
    ({"embedding_vectors": 3, "embedding_lr": 1e-4}, {"embedding_vectors", "embedding_lr"}),
    ({**ON, "optimizer_type": "Adafactor", "embedding_lr": 1e-4, "stop_embedding_training": 0.5},  # with its own rate
     {"embedding_lr", "stop_embedding_training"}),
    ({**ON, "embedding_vectors": 3, "embedding_lr": 1e-4, "stop_embedding_training": 0.5}, set())])
def test_settings_of_the_embedding_that_are_not_used_are_told(images, changes, unused):
    told = plan_dataset(settings(images, **changes), family="sd1").warnings
    names = [name for name in dataclasses.asdict(settings(images).network) if "embedding" in name]
    assert {name for text in told for name in names if f"({name}) has no effect" in text} == unused
