"""The model under test: images from prompts with a LoRA at a weight, real images as its VAE shows them, held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from lib_lora_train.adapters import file
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.evaluation.fixed_loss import fixed_inputs, fixed_losses
from lib_lora_train.host.port import Host
from lib_lora_train.inputs.batches import Batch
from lib_lora_train.model import frozen
from lib_lora_train.model.ops.layers import Adapter
from lib_lora_train.model.sampler import SampleRequest, sample_batch
from tools.bench.real_images import SIDE

Adapters = Mapping[str, Mapping[str, Adapter]]
WITHOUT: Adapters = {}

CFG_SCALE, FIRST_SEED = 2.0, 1000
LOSS_TIMESTEPS = (50, 150, 250, 350, 450, 550, 650, 750, 850, 950)
TOGETHER = 16
"""Images generated at once: with more, a CPU's cache no longer holds what it works on."""


class Sampler:
    """Evaluates one checkpoint. All images are fp32 [N, 3, 128, 128] in [0, 1] on the CPU.

    It holds an fp32 copy of the leased weights: casting an fp16 model anew for each of a thousand passes costs more than
    the few megabytes of so small a model.
    """

    def __init__(self, host: Host, *, cfg_scale: float = CFG_SCALE, steps: int = 20) -> None:
        with host.lease() as leased:
            tensors = {name: tensor.float() if tensor.is_floating_point() else tensor
                       for name, tensor in leased.tensors.items()}
            self._model = frozen.build(tensors, hints=leased.hints, tokenizers=leased.tokenizers)
        self._cfg_scale, self._steps = cfg_scale, steps

    @property
    def vae_tensors(self) -> Mapping[str, torch.Tensor]:
        """The VAE's weights by local name."""
        return self._model.vae.tensors

    def lora(self, path: Path, *, weight: float) -> Adapters:
        """The LoRA of a file as `<lora:name:weight>` applies it."""
        content = file.load(path)
        targets = find_targets(self._model.components, family=self._model.architecture.family,
                               text_encoder=any(key.startswith("lora_te") for key in content.tensors))
        network = AdapterNetwork.continued(targets, content.tensors, seed=0).to(self._model.device)
        network.set_multiplier(weight)
        return network.adapters()

    def sample(self, prompts: Sequence[str], lora: Adapters = WITHOUT, *, cfg_scale: float | None = None) -> torch.Tensor:
        """One image for each prompt; the seed is its position in the list, so all LoRAs start from the same noise."""
        scale = self._cfg_scale if cfg_scale is None else cfg_scale
        requests = [SampleRequest(prompt, width=SIDE, height=SIDE, steps=self._steps, cfg_scale=scale,
                                  seed=FIRST_SEED + index) for index, prompt in enumerate(prompts)]
        latents = [sample_batch(self._model, requests[start:start + TOGETHER], adapters=lora)
                   for start in range(0, len(requests), TOGETHER)]
        return self.shown(torch.cat(latents))

    def through_vae(self, pixels: torch.Tensor) -> torch.Tensor:
        """The same images encoded and decoded again, as soft as generated ones."""
        return self.shown(self.latents(pixels))

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """The means of the images' latents, [N, 4, 16, 16]."""
        return self._encoded(pixels)[0]

    def shown(self, latents: torch.Tensor) -> torch.Tensor:
        """The images of latents."""
        decode: Callable[[torch.Tensor], torch.Tensor] = self._model.vae.decode
        return torch.cat([(decode(part).clamp(-1, 1) + 1).cpu() / 2 for part in latents.split(TOGETHER)])

    def held_out_loss(self, pixels: torch.Tensor, captions: Sequence[str], lora: Adapters = WITHOUT, *,
                      seed: int = 1, timesteps: Sequence[int] = LOSS_TIMESTEPS) -> dict[int, float]:
        """{timestep: loss} on images that nobody trained on, with noise that depends on nothing but `seed`."""
        mean, std = self._encoded(pixels)
        sizes = torch.tensor([SIDE, SIDE, 0, 0, SIDE, SIDE], dtype=torch.float32).expand(len(pixels), 6)
        everything = Batch({"mean": mean, "std": std, "loss_weight": torch.ones(len(pixels)), "sizes": sizes}, tuple(captions))
        batches = [everything.rows(slice(start, start + TOGETHER)) for start in range(0, len(pixels), TOGETHER)]
        with torch.no_grad():
            conditions = [self._model.text.encode([self._model.text.tokenize(caption) for caption in batch.captions],
                                                  adapters=lora) for batch in batches]
        return {t: sum(float(fixed_losses(self._model, fixed_inputs(batch, timestep=t, seed=seed, number=number), condition,
                                          adapters=lora.get("unet", {})).sum())
                       for number, (batch, condition) in enumerate(zip(batches, conditions, strict=True))) / len(pixels)
                for t in timesteps}

    def _encoded(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [self._model.vae.encode(2 * part.to(self._model.device) - 1) for part in pixels.split(TOGETHER)]
        return torch.cat([mean for mean, _ in parts]), torch.cat([std for _, std in parts])
