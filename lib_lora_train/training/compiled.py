"""The loss made by torch.compile, and dropped where it is not the loss as written.

Off by default: nobody has measured a gain. torch 2.1.2 compiles it to another loss on the CPU, without an error, so that the
first batch of each shape is computed both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from lib_lora_train.errors import is_out_of_memory
from lib_lora_train.events import Report, Warned
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.ops.layers import Adapter
from lib_lora_train.model.sd.text import Conditioning
from lib_lora_train.settings import no_effect
from lib_lora_train.training.loss import LossConfig, denoising_loss

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""How far, relative to its size, a compiled loss may lie from the loss as written, by the dtype that is computed in."""


class CompiledLoss:
    """Called as `denoising_loss`. What cannot be compiled, or computes something else, runs as written, which is reported."""

    def __init__(self, report: Report) -> None:
        self._report, self._checked = report, set[tuple[torch.Size, ...]]()
        self._loss = torch.compile(denoising_loss, dynamic=False)

    def __call__(self, model: FrozenModel, batch: Batch, *, conditioning: Conditioning, adapters: Mapping[str, Adapter],
                 config: LossConfig, checkpointed: Collection[str] = frozenset()) -> Tensor:
        def run(loss: Callable[..., Tensor]) -> Tensor:
            return loss(model, batch, conditioning=conditioning, adapters=adapters, config=config, checkpointed=checkpointed)

        shapes = tuple(tensor.shape for tensor in batch.tensors.values())
        if self._loss is denoising_loss or shapes in self._checked:
            return run(self._loss)
        with torch.no_grad():
            written = run(denoising_loss)
        try:
            loss = run(self._loss)
            if torch.allclose(loss.detach(), written, rtol=_TOLERANCE[config.dtype], atol=0.0):
                self._checked.add(shapes)
                return loss
            why = f"torch {torch.__version__} compiles it to another loss ({loss:.4f} instead of {written:.4f})"
        except Exception as error:  # inductor and the compilers it calls raise errors of all kinds
            if is_out_of_memory(error):
                raise
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        self._loss = denoising_loss
        self._report(Warned(no_effect("torch_compile", why)))
        return run(denoising_loss)
