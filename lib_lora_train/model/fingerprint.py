"""Which weights a model holds, told without reading all of them twice."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def sampled_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, number formats and up to 81 numbers of each tensor, wherever it lies.

    Reading all of a checkpoint off the card takes seconds; two checkpoints that agree in this are the same one.
    """
    digest, samples = hashlib.sha256(), []
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        samples.append(tensor[tuple(slice(None, None, max(1, size // 2)) for size in tensor.shape)].reshape(-1).float())
    # One copy off the device, at the beginning of a run.
    digest.update(torch.cat(samples).cpu().numpy().tobytes() if samples else b"")
    return digest.hexdigest()


@dataclass(frozen=True)
class _Known:
    touched: Mapping[str, tuple[weakref.ref[Tensor], int]]
    sample: str
    fingerprint: str


class Fingerprints:
    """Remembers the fingerprint of the tensors that were asked about last, for as long as they are the same.

    The same are: the very objects that were lent before (held weakly, so they may go), not written to since as far as torch
    counts, and equal in their samples, for what torch does not count. Tensors that it does not count at all (inference
    tensors) are read anew each time.
    """

    def __init__(self, compute: Callable[[Mapping[str, Tensor]], str]) -> None:
        """`compute` reads all of the tensors."""
        self._compute = compute
        self._known: _Known | None = None

    def of(self, tensors: Mapping[str, Tensor]) -> str:
        """The fingerprint of the host's own tensors: views of them, made anew for each run, are never the same."""
        if any(tensor.is_inference() for tensor in tensors.values()):
            return self._compute(tensors)
        known, sample = self._known, sampled_fingerprint(tensors)
        if known is None or known.sample != sample or not _untouched(known, tensors):
            touched = {name: (weakref.ref(tensor), tensor._version) for name, tensor in tensors.items()}
            known = self._known = _Known(touched, sample, self._compute(tensors))
        return known.fingerprint


def _untouched(known: _Known, tensors: Mapping[str, Tensor]) -> bool:
    return known.touched.keys() == tensors.keys() and all(
        known.touched[name][0]() is tensor and known.touched[name][1] == tensor._version for name, tensor in tensors.items())
