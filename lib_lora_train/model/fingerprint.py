"""Which weights a model holds, told from a sample or from all of them; and which of them are not numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def sampled_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and up to 81 numbers of each tensor, on any device.

    Copying all of a checkpoint from the GPU takes seconds; two checkpoints that agree in this are taken for the same.
    """
    digest, samples = hashlib.sha256(), []
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        samples.append(tensor[tuple(slice(None, None, max(1, size // 2)) for size in tensor.shape)].reshape(-1).float())
    # One copy off the device, at the beginning of a run.
    digest.update(torch.cat(samples).cpu().numpy().tobytes() if samples else b"")
    return digest.hexdigest()


def tensor_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and all bytes of a model's tensors, e.g. those of the VAE.

    Each tensor is copied to the CPU in turn (a VAE is 160 to 335 MB; under a second).
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def encoder_fingerprint(vae: Mapping[str, Tensor]) -> str:
    """The `tensor_fingerprint` of all that makes latents of images, of a VAE's tensors under local names: 70 to 137 MB are
    read. Its decoder has no part in them."""
    return tensor_fingerprint(encoder_tensors(vae))


def encoder_tensors(vae: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a VAE's tensors, under local names, that make latents of images."""
    return {name: tensor for name, tensor in vae.items() if name.startswith(("encoder.", "quant_conv."))}


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold a NaN or an infinity, in order.

    The smallest and the largest number of each are enough, since both are NaN where one is: no copy, one synchronisation.
    """
    floating = {name: tensor.detach() for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    if not floating:
        return []
    # torch cannot compare numbers of eight bits.
    wide = (tensor.half() if tensor.element_size() == 1 else tensor for tensor in floating.values())
    extremes = [torch.stack((tensor.min(), tensor.max())).float() for tensor in wide]
    fine = torch.stack([pair.to(extremes[0].device) for pair in extremes]).isfinite().all(dim=1).tolist()
    return [name for name, good in zip(floating, fine, strict=True) if not good]
