"""The loss of a micro-batch as CUDA graphs: the host launches two graphs a step instead of thousands of kernels.

Off by default: nobody has measured it on a GPU. torch itself captures forward and backward
(`torch.cuda.make_graphed_callables`), once for each shape of batch. Up to torch 2.12 a capture that CUDA invalidates can leave
torch's allocator unusable for the rest of the process (PR 180395), so it is not for a WebUI that must go on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lib_lora_train.errors import is_out_of_memory
from lib_lora_train.events import Warned
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.training.train_step import TrainStep

Shapes = tuple[tuple[str, torch.Size, torch.dtype], ...]
_MOST_SHAPES = 24
"""Each shape holds memory for its graphs; shapes beyond this number run without."""


class CudaGraphStep(TrainStep):
    """A `TrainStep` whose forward and backward are replayed for each shape of batch. What cannot be captured runs as it is
    written, with the same numbers; why is reported once, and graphs that exist stay."""

    capture = staticmethod(torch.cuda.make_graphed_callables)
    _graphs: dict[Shapes, Callable[..., Tensor]] | None = None
    _refused = False

    def forward(self, batch: Batch) -> Tensor:
        """See `TrainStep.forward`."""
        batch, self._graphs = batch.to(self.model.device), self._graphs or {}
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.tensors.items())
        eager = self._refused or self.config.offload or bool(self.config.swapped)
        if shapes not in self._graphs and not eager and len(self._graphs) < _MOST_SHAPES:
            self._capture(shapes, batch)
        graphed = self._graphs.get(shapes)
        return super().forward(batch) if graphed is None else graphed(*batch.tensors.values())

    def release(self) -> None:
        """Drop the graphs too: they name memory that is about to move."""
        self._graphs = None
        super().release()

    def _capture(self, shapes: Shapes, batch: Batch) -> None:
        loss = _Loss(super().forward, names=tuple(batch.tensors), weights=self.weights.trained())
        before = self.weights.gradient.clone()  # warming up adds to the gradients
        try:
            self._graphs[shapes] = self.capture(loss, tuple(batch.tensors.values()), allow_unused_input=True)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._refused = True
            self._report(Warned(f"The step runs without CUDA graphs: {str(error).splitlines()[0]}"))
        self.weights.clear()
        self.weights.gradient.copy_(before)


class _Loss(nn.Module):
    """The loss as a function of tensors alone, with the trained weights as its parameters: what torch captures."""

    def __init__(self, forward: Callable[[Batch], Tensor], *, names: tuple[str, ...], weights: list[nn.Parameter]) -> None:
        super().__init__()
        self._forward, self._names, self.weights = forward, names, nn.ParameterList(weights)

    def forward(self, *tensors: Tensor) -> Tensor:
        """The tensors of a batch in the order of `names` -> the loss, 0-d."""
        return self._forward(Batch(dict(zip(self._names, tensors, strict=True))))
