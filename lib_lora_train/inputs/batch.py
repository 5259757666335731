"""A batch: named tensors with a row for each image, and the images' captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one bucket that go through the network together. Each stage on the way to the loss adds tensors by name.

    From the dataset (`batches.py`):
        mean, std       [B, C, h, w] fp32: the VAE's posterior, unscaled
        loss_weight     [B] fp32: 1, or prior_loss_weight for regularisation images
        sizes           [B, 6] fp32: original (height, width), crop (top, left), target (height, width), in pixels
    From the training loop:
        noise, latent_noise, timesteps   see `training.noise`
        weight          [B] fp32: what each image's loss counts for in the step's sum
        context, pooled or ids.*, plain.ids.*   see `training.condition`
    Optional:
        mask            [B, 1, h, w]: a weight for each latent element, multiplied into the loss
        prior           [B, 1, h, w]: a weight for each latent element of the loss towards the base model's prediction
        reference       [B, C, h, w] fp32: that prediction
        reference.*     the text it is made with, under the names above, where it is another one
    """

    tensors: Mapping[str, Tensor]
    captions: tuple[str, ...] = ()

    def __len__(self) -> int:
        """B, the number of images."""
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def extended(self, tensors: Mapping[str, Tensor]) -> Batch:
        """The same images with more tensors."""
        return replace(self, tensors={**self.tensors, **tensors})

    def rows(self, rows: slice) -> Batch:
        """These images alone, without a copy."""
        return Batch({name: tensor[rows] for name, tensor in self.tensors.items()}, self.captions[rows])

    def split(self, most: int) -> list[Batch]:
        """The batch in as few parts of at most `most` images as possible, of nearly equal size; none if it is empty."""
        parts, count = -(-len(self) // most), len(self)
        if parts == 1:
            return [self]
        return [self.rows(slice(count * part // parts, count * (part + 1) // parts)) for part in range(parts)]

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; copies to a GPU go through pinned memory and do not wait for it."""
        def moved(tensor: Tensor) -> Tensor:
            if tensor.device.type == "cpu" and device.type == "cuda":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=device.type == "cuda")
        return replace(self, tensors={name: moved(tensor) for name, tensor in self.tensors.items()})
