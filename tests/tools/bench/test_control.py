"""The outside control is the trainer's work done by others: the same data, loss, gradients and file. What differs is chance."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from lib_lora_train.adapters import file
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.demo import STYLE
from lib_lora_train.demo.embedded import CHECKPOINT
from lib_lora_train.errors import DatasetError, ModelError, SettingError
from lib_lora_train.host.standalone import StandaloneHost
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.model import frozen
from lib_lora_train.run.planning import plan_job
from lib_lora_train.settings import flat, parse
from lib_lora_train.training.loss import LossConfig, denoising_loss
from tools.bench import control
from tools.bench.control import train_control
from tools.bench.joint_scorer import TRIGGER
from tools.bench.real_images import read_dataset
from tools.bench.sampler import Sampler
from tools.bench.training import settings_of, train_lora

RANK, ALPHA = 8, 4.0
LOUD = {"learning_rate": "3e-3", "train_batch_size": 2}  # much is learnt soon


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest number."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> StandaloneHost:
    folder = tmp_path_factory.mktemp("control")
    return StandaloneHost(CHECKPOINT, lora_folder=folder / "loras", runs_folder=folder / "runs")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of a style with their captions."""
    folder = tmp_path_factory.mktemp("few")
    for image in sorted(STYLE.glob("*.png"))[::6]:
        for part in (image, image.with_suffix(".txt")):
            shutil.copy(part, folder)
    return folder


def built(host: StandaloneHost, changed: Mapping[str, torch.Tensor] | None = None) -> frozen.FrozenModel:
    """The trainer's model of the checkpoint, with other tensors in the UNet."""
    with host.lease() as leased:
        tensors = {name: tensor.float() for name, tensor in leased.tensors.items()}
        tensors |= {f"{control.PREFIX}{name}": tensor for name, tensor in (changed or {}).items()}
        return frozen.build(tensors, hints=leased.hints, tokenizers=leased.tokenizers)


@pytest.fixture(scope="module")
def ours(host) -> frozen.FrozenModel:
    return built(host)


@pytest.fixture(scope="module")
def theirs() -> control.Models:
    """With a LoRA of random weights."""
    models = control.load_models(CHECKPOINT)
    control.add_lora(models, rank=RANK, alpha=ALPHA)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in models.unet.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return models


@pytest.fixture(scope="module")
def sampler(host) -> Sampler:
    return Sampler(host)


@pytest.fixture(scope="module")
def trained(host, few) -> Path:
    return train_control(CHECKPOINT, settings=settings_of(LOUD), data=few, trigger_word=TRIGGER,
                         target=host.lora_folder / "outside.safetensors", steps=8)


@torch.no_grad()
def test_a_checkpoint_becomes_the_model_that_the_trainer_has(ours):
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([30, 900]), torch.randn(2, 77, 48)
    models = control.load_models(CHECKPOINT)
    control.add_lora(models, rank=RANK, alpha=ALPHA)  # it changes nothing
    assert error(models.unet(x, t, context).sample, ours.unet(x, t, context)) < 1e-4


def test_images_and_captions_become_the_same_latents_and_conditions(ours, theirs, host, few):
    mean, std, context = control.encoded(theirs, few, trigger_word=TRIGGER)
    plan = plan_job(parse({"train_data_dir": str(few), "trigger_word": TRIGGER, "resolution": "128", "output_name": "it",
                           "validation_split": 0.0}), host)
    assert {placement.bucket for placement in plan.placements} == {placement.original for placement in plan.placements}
    files, _, pixels = read_dataset(few)
    assert [example.path for example in plan.dataset.examples] == files
    expected = ours.vae.encode(2 * pixels[:2] - 1)
    assert all(error(found[:2], part) < 1e-4 for found, part in zip((mean, std), expected, strict=True))
    condition = ours.text.encode([ours.text.tokenize(example.caption) for example in plan.dataset.examples])
    assert error(context, condition.context) < 1e-4


@pytest.mark.parametrize("gamma", [5.0, 0.0])
def test_of_the_same_noise_the_loss_and_all_gradients_are_the_trainers(gamma, ours, theirs):
    generator = torch.Generator().manual_seed(3)
    mean, std, drawn, noise = (torch.randn(3, 4, 16, 16, generator=generator) for _ in range(4))
    t, context = torch.tensor([5, 400, 990]), torch.randn(3, 77, 48, generator=generator)
    theirs.unet.zero_grad()
    their_loss = control.denoising_loss(theirs, (mean + std * drawn) * theirs.latent_scale, noise, t, context,
                                        min_snr_gamma=gamma)
    their_loss.backward()

    tensors = control.kohya_tensors(theirs.unet, alpha=ALPHA)
    network = AdapterNetwork.continued(find_targets(ours.components, family=ours.architecture.family, text_encoder=False),
                                       {key: tensor.detach().clone() for key, tensor in tensors.items()}, seed=0)
    batch = Batch({"mean": mean, "std": std, "latent_noise": drawn, "noise": noise, "timesteps": t,
                   "weight": torch.full((3,), 1 / 3)})
    conditioning = ours.text.encode([ours.text.tokenize("")] * 3)
    our_loss = denoising_loss(ours, batch, conditioning=type(conditioning)(context, None), adapters=network.adapters()["unet"],
                              config=LossConfig(torch.float32, min_snr_gamma=gamma))
    our_loss.backward()
    assert their_loss.item() == pytest.approx(our_loss.item(), rel=1e-5)
    for target in network.targets:
        layer = network.layers[target.key]
        for side, name in ((layer.down, "lora_down"), (layer.up, "lora_up")):
            gradient = tensors[f"{target.key}.{name}.weight"].grad
            assert error(side.grad, gradient.flatten(1)) < 1e-3, (target.key, name)


def test_the_file_is_like_the_trainers_and_nothing_in_it_is_lost(trained, host, sampler, few):
    of_trainer = train_lora(host, settings=settings_of(LOUD), data=few, trigger_word=TRIGGER, name="inside", steps=1,
                            wanted=(1,), say=lambda text: None)[1]
    found, expected = (file.load(path).tensors for path in (trained, of_trainer))
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in found.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in expected.items()}
    assert all(tensor == expected[key] for key, tensor in found.items() if key.endswith(".alpha"))
    assert all(tensor.any() for key, tensor in found.items() if key.endswith(".lora_up.weight"))
    assert len(sampler.lora(trained, weight=1.0)["unet"]) == len(found) / 3


def test_the_loss_on_what_it_was_shown_falls_at_every_timestep(trained, sampler, few):
    _, captions, pixels = read_dataset(few)
    prompts = [f"{TRIGGER}, {caption}" for caption in captions[:2]]
    before, after = (sampler.held_out_loss(pixels[:2], prompts, lora, timesteps=(150, 650))
                     for lora in ({}, sampler.lora(trained, weight=1.0)))
    assert all(after[t] < before[t] for t in before)


@torch.no_grad()
def test_the_whole_unet_is_trained_and_its_checkpoint_is_the_model_that_diffusers_trained(ours, host, few, tmp_path):
    unet = control.load_models(CHECKPOINT).unet
    for parameter in unet.parameters():
        parameter += 0.3 * parameter.std(correction=0) * torch.randn_like(parameter)
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([30, 900]), torch.randn(2, 77, 48)
    moved = unet(x, t, context).sample
    assert error(built(host, control.ldm_tensors(CHECKPOINT, unet)).unet(x, t, context), moved) < 1e-4
    assert error(ours.unet(x, t, context), moved) > 0.01

    path = control.fine_tune(CHECKPOINT, settings=settings_of({"train_batch_size": 2}), data=few, trigger_word=TRIGGER,
                             target=tmp_path / "whole.safetensors", steps=2)
    before, after = (Sampler(StandaloneHost(file, lora_folder=tmp_path, runs_folder=tmp_path)) for file in (CHECKPOINT, path))
    _, captions, pixels = read_dataset(few)
    prompts = [f"{TRIGGER}, {caption}" for caption in captions[:2]]
    first, then = (sampler.held_out_loss(pixels[:2], prompts, timesteps=(150, 650)) for sampler in (before, after))
    assert all(then[t] < first[t] for t in first)


def test_the_same_seed_gives_the_same_file_and_the_programs_random_state_stays(few, tmp_path):
    state, paths = torch.get_rng_state(), [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        train_control(CHECKPOINT, settings=settings_of({"seed": seed, "train_batch_size": 1}), data=few,
                      trigger_word=TRIGGER, target=path, steps=1)
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again != other


def test_in_an_epoch_each_image_comes_as_often_as_its_repeats():
    batches = control._batches(3, repeats=3, size=2, seed=0)
    for _ in range(2):
        epoch = [next(batches) for _ in range(5)]
        assert [len(batch) for batch in epoch] == [2, 2, 2, 2, 1]
        assert sorted(sum(epoch, [])) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_what_the_control_does_not_do_is_off_by_default():
    default = flat(parse({}))
    off = ("flip_aug", "color_aug", "random_crop", "rotate_aug_degrees", "shuffle_caption", "caption_dropout_rate",
           "caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "token_warmup_step", "clip_skip", "noise_offset",
           "multires_noise_iterations", "ip_noise_gamma", "min_timestep", "lr_warmup_steps", "ema_decay", "network_dropout",
           "rank_dropout", "module_dropout", "scale_weight_norms", "loraplus_lr_ratio", "rs_lora", "dora_wd", "conv_dim",
           "train_trigger_embedding", "debiased_estimation_loss", "v_pred_like_loss", "unet_lr", "num_repeats")
    assert not any(default[name] for name in off)
    plain = {"network_train_unet_only": True, "network_module": "LoRA", "network_targets": "attention and feed-forward",
             "loss_type": "l2", "timestep_distribution": "uniform", "max_timestep": 1000, "preservation": "none",
             "gradient_accumulation_steps": 1, "optimizer_args": ""}
    assert {name: default[name] for name in plain} == plain


@pytest.mark.parametrize("name, value", [
    ("optimizer_type", "Lion"), ("lr_scheduler", "linear"), ("resolution", "64"), ("noise_offset", 0.1),
    ("network_train_unet_only", False), ("learning_rat", 1)])
def test_a_setting_that_it_does_not_know_is_refused_before_anything_is_done(name, value, tmp_path):
    with pytest.raises(SettingError, match=name):
        train_control(tmp_path / "none", settings={**settings_of({}), name: value}, data=tmp_path, trigger_word="",
                      target=tmp_path / "it.safetensors", steps=1)
    assert not list(tmp_path.iterdir())


def test_a_dataset_or_a_checkpoint_that_it_cannot_use_is_refused(tmp_path, theirs):
    with pytest.raises(DatasetError, match="128×128"):
        control.encoded(theirs, tmp_path, trigger_word="")
    with pytest.raises(ModelError, match="none.safetensors"):
        control.load_models(tmp_path / "none.safetensors")
