"""Outside controls for `bench quality`: the reference line trained once more, by diffusers, transformers and peft, and the
whole UNet trained in place of a LoRA.

Model, adapters, noise, loss, gradients and optimizer are theirs or torch's, in a plain loop. The trainer shares what a LoRA is
trained on: settings with their defaults, images, captions, how often an image is shown, the vocabulary. Where both headlines
are equal within their spread, it is not the trainer's loop that limits a LoRA; the whole UNet says what the model can learn.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib_lora_train.adapters import file
from lib_lora_train.dataset.captions import with_trigger_word
from lib_lora_train.dataset.images import read_size
from lib_lora_train.dataset.plan import plain_folder_repeats
from lib_lora_train.errors import DatasetError, ModelError, SettingError
from lib_lora_train.model.sd.tokens import clip_tokenizer
from lib_lora_train.settings import Settings, flat, parse
from tools.bench.real_images import SIDE, read_dataset

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

CHOICES = {"optimizer_type": ("AdamW",), "lr_scheduler": ("cosine", "constant"), "resolution": (str(SIDE),)}
KNOWN = (*CHOICES, "learning_rate", "weight_decay", "max_grad_norm", "train_batch_size", "seed", "network_dim", "network_alpha",
         "min_snr_gamma", "save_precision")
"""The settings that the control heeds; all others are as the trainer has them by default."""
ADAPTED = r".*\.attentions\.\d+\.(.*\.)?(proj_in|proj_out|to_[qkv]|to_out\.0|net\.0\.proj|net\.2)"
"""What kohya adapts of diffusers' UNet."""
FINE_TUNING_RATE = 2e-4
"""Of the whole UNet, whatever the LoRA's is."""
TOKENS, PREFIX = 77, "model.diffusion_model."


@dataclasses.dataclass(frozen=True, eq=False)
class Models:
    """A checkpoint as diffusers and transformers have it, in fp32 on the CPU, frozen."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text: CLIPTextModel
    scheduler: DDPMScheduler
    latent_scale: float


def train_control(checkpoint: Path, *, settings: Mapping[str, object], data: Path, trigger_word: str, target: Path,
                  steps: int) -> Path:
    """Train with diffusers and peft; writes a LoRA in kohya's format to `target` and returns it.

    Raises SettingError for what the control does not know, ModelError and DatasetError for what it cannot use.
    """
    chosen = checked(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.optimizer.seed)
        models = load_models(checkpoint)
        add_lora(models, rank=chosen.network.network_dim, alpha=chosen.network.network_alpha)
        _train(models, [parameter for parameter in models.unet.parameters() if parameter.requires_grad], chosen,
               data=data, trigger_word=trigger_word, rate=chosen.optimizer.learning_rate, steps=steps)
    file.save(target, kohya_tensors(models.unet, alpha=chosen.network.network_alpha), {},
              dtype=file.SAVE_PRECISIONS[chosen.save.save_precision])
    return target


def fine_tune(checkpoint: Path, *, settings: Mapping[str, object], data: Path, trigger_word: str, target: Path,
              steps: int) -> Path:
    """Train the whole UNet at FINE_TUNING_RATE, with what else `settings` say; writes a checkpoint to `target`, its .yaml and
    text encoder's folder beside it, and returns it. Raises what `train_control` raises."""
    chosen = checked(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.optimizer.seed)
        models = load_models(checkpoint)
        models.unet.requires_grad_(True)
        _train(models, [*models.unet.parameters()], chosen, data=data, trigger_word=trigger_word, rate=FINE_TUNING_RATE,
               steps=steps)
    tensors = load_file(checkpoint)
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in ldm_tensors(checkpoint, models.unet).items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target)
    shutil.copyfile(checkpoint.with_suffix(".yaml"), target.with_suffix(".yaml"))
    folder = yaml.safe_load(target.with_suffix(".yaml").read_text(encoding="utf-8"))["model"]["params"]["cond_stage_config"][
        "params"]["version"]
    shutil.copytree(checkpoint.parent / folder, target.parent / folder, dirs_exist_ok=True)
    return target


def _train(models: Models, trained: Sequence[nn.Parameter], chosen: Settings, *, data: Path, trigger_word: str, rate: float,
           steps: int) -> None:
    """Train the parameters `trained` of the UNet in place."""
    optimizer = chosen.optimizer
    with torch.enable_grad():
        mean, std, context = encoded(models, data, trigger_word=trigger_word)
        adamw = torch.optim.AdamW(trained, lr=rate, weight_decay=optimizer.weight_decay)
        schedule = (torch.optim.lr_scheduler.CosineAnnealingLR(adamw, T_max=steps) if optimizer.lr_scheduler == "cosine"
                    else torch.optim.lr_scheduler.ConstantLR(adamw, factor=1.0))
        batches = _batches(len(mean), repeats=plain_folder_repeats(len(mean), max_train_epochs=optimizer.max_train_epochs),
                           size=optimizer.train_batch_size, seed=optimizer.seed)
        for rows in itertools.islice(batches, steps):
            latents = (mean[rows] + std[rows] * torch.randn_like(std[rows])) * models.latent_scale
            denoising_loss(models, latents, torch.randn_like(latents), torch.randint(len(models.scheduler), (len(rows),)),
                           context[rows], min_snr_gamma=chosen.loss.min_snr_gamma).backward()
            if optimizer.max_grad_norm:
                nn.utils.clip_grad_norm_(trained, optimizer.max_grad_norm)
            adamw.step()
            schedule.step()
            adamw.zero_grad()


def checked(settings: Mapping[str, object]) -> Settings:
    """The settings with the trainer's defaults. Raises SettingError for what the control does not know."""
    chosen = parse(settings)
    for name, known in CHOICES.items():
        if (value := flat(chosen)[name]) not in known:
            raise SettingError(f"{name} = {value} is not possible for the control", why="it does not know it",
                               remedy=f"set it to {' or '.join(known)}")
    for name in settings:
        if name not in KNOWN:
            raise SettingError(f"{name} cannot be set for the control", why=f"it knows {', '.join(KNOWN)} only",
                               remedy="leave it out")
    return chosen


def load_models(checkpoint: Path) -> Models:
    """Of a Stable Diffusion 1 checkpoint. Beside it lies ldm's .yaml, which names the folder of the text encoder's config.json.
    Raises ModelError, also for a tensor that is missing or has no place."""
    try:
        # Imported late: they take seconds, and only the control needs them.
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from diffusers.pipelines.stable_diffusion import convert_from_ckpt as convert
        from transformers import CLIPTextConfig, CLIPTextModel

        tensors = {name: tensor.float() for name, tensor in load_file(checkpoint).items()}
        configuration = yaml.safe_load(checkpoint.with_suffix(".yaml").read_text(encoding="utf-8"))
        model = configuration["model"]["params"]
        folder, prefix = checkpoint.parent / model["cond_stage_config"]["params"]["version"], "cond_stage_model.transformer."
        text = CLIPTextModel(CLIPTextConfig.from_json_file(folder / "config.json"))
        # The positions' numbers are no weights; not every version has them among its tensors.
        text.load_state_dict({name: tensor for name, tensor in text.state_dict().items() if name.endswith("position_ids")} | {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items()
            if name.startswith(prefix) and not name.endswith("position_ids")})
        sizes = convert.create_vae_diffusers_config(configuration, image_size=SIDE)
        vae = AutoencoderKL(**sizes)
        vae.load_state_dict(convert.convert_ldm_vae_checkpoint(tensors, sizes))
        sizes = convert.create_unet_diffusers_config(configuration, image_size=SIDE)
        unet = UNet2DConditionModel(**sizes)
        unet.load_state_dict(convert.convert_ldm_unet_checkpoint(tensors, sizes))
    except (ImportError, OSError, LookupError, TypeError, RuntimeError) as error:
        raise ModelError(f"The control cannot read {checkpoint.name}", why=str(error).splitlines()[0], remedy="install what "
                         "tools/requirements-test*.txt name, and take a checkpoint like the demo's") from error
    for part in (unet, vae, text):
        part.requires_grad_(False).eval()
    return Models(unet, vae, text, latent_scale=model["scale_factor"], scheduler=DDPMScheduler(
        model["timesteps"], beta_start=model["linear_start"], beta_end=model["linear_end"], beta_schedule="scaled_linear"))


def add_lora(models: Models, *, rank: int, alpha: float) -> None:
    """peft's layers into the UNet; they are trained and change nothing yet."""
    from peft import LoraConfig, inject_adapter_in_model  # imported late, as above

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=ADAPTED), models.unet)


def ldm_tensors(checkpoint: Path, unet: nn.Module) -> dict[str, Tensor]:
    """The weights of diffusers' UNet in fp32 under ldm's names, read off diffusers' own conversion of the checkpoint's."""
    from diffusers.pipelines.stable_diffusion import convert_from_ckpt as convert

    tensors = load_file(checkpoint)
    configuration = yaml.safe_load(checkpoint.with_suffix(".yaml").read_text(encoding="utf-8"))
    converted = convert.convert_ldm_unet_checkpoint(dict(tensors), convert.create_unet_diffusers_config(
        configuration, image_size=SIDE))
    names = {id(tensor): name.removeprefix(PREFIX) for name, tensor in tensors.items()}
    trained = unet.state_dict()
    return {names[id(tensor)]: trained[name].contiguous() for name, tensor in converted.items()}


@torch.no_grad()
def encoded(models: Models, data: Path, *, trigger_word: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation of each image's latents, [N, 4, 16, 16] each and unscaled, and the condition of its
    caption, [N, 77, C]. Raises DatasetError."""
    files, captions, pixels = read_dataset(data)
    tokenizer = clip_tokenizer()
    tokens = [tokenizer.encode(with_trigger_word(caption, trigger_word)) for caption in captions]
    if not files or {read_size(each) for each in files} != {(SIDE, SIDE)} or max(map(len, tokens)) > TOKENS - 2:
        raise DatasetError(f"The control cannot use {data}", why=f"it takes .png pictures of {SIDE}×{SIDE} pixels and "
                           f"captions of up to {TOKENS - 2} tokens", remedy="take a dataset like the demo's style")
    ids = [[tokenizer.start, *each, *[tokenizer.end] * (TOKENS - 1 - len(each))] for each in tokens]
    posteriors = [models.vae.encode(2 * part - 1).latent_dist for part in pixels.split(4)]
    return (torch.cat([each.mean for each in posteriors]), torch.cat([each.std for each in posteriors]),
            models.text(torch.tensor(ids)).last_hidden_state)


def denoising_loss(models: Models, latents: Tensor, noise: Tensor, timesteps: Tensor, context: Tensor, *,
                   min_snr_gamma: float) -> Tensor:
    """The mean squared error of the predicted noise, each image's times min(snr, γ) / snr unless γ is 0.

    latents (scaled) and noise [B, 4, h, w], timesteps [B], context [B, 77, C]
    """
    prediction = models.unet(models.scheduler.add_noise(latents, noise, timesteps), timesteps, context).sample
    loss = F.mse_loss(prediction, noise, reduction="none").mean(dim=(1, 2, 3))
    signal = models.scheduler.alphas_cumprod[timesteps]
    snr = signal / (1 - signal)
    return (loss * snr.clamp(max=min_snr_gamma) / snr if min_snr_gamma else loss).mean()


def kohya_tensors(unet: nn.Module, *, alpha: float) -> dict[str, Tensor]:
    """peft's weights under the names of kohya's files."""
    layers = {f"lora_unet_{name.replace('.', '_')}": layer for name, layer in unet.named_modules() if hasattr(layer, "lora_A")}
    return {f"{key}.{name}": tensor for key, layer in layers.items() for name, tensor in (
        ("lora_down.weight", layer.lora_A["default"].weight), ("lora_up.weight", layer.lora_B["default"].weight),
        ("alpha", torch.tensor(alpha)))}


def _batches(images: int, *, repeats: int, size: int, seed: int) -> Iterator[list[int]]:
    """Numbers of images, without end: in each epoch each comes `repeats` times, and the last batch may be smaller."""
    order, rng = [*range(images)] * repeats, random.Random(seed)
    while True:
        rng.shuffle(order)
        yield from (order[start:start + size] for start in range(0, len(order), size))
