"""From prepared tensors to buffers on the device that stay where they are."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_lora_train.training.step import StepInputs

Shapes = tuple[tuple[torch.Size, torch.dtype], ...]

_ALIGNMENT = 256  # bytes, as the allocator's
_BLOCKS = 3


def shapes_of(inputs: StepInputs) -> Shapes:
    """What inputs must have in common to share buffers, and a recorded step."""
    return tuple((tensor.shape, tensor.dtype) for tensor in inputs.tensors())


class Staging:
    """Buffers for inputs of one kind. `inputs` are those on the device, with the values of the last `fill`.

    Everything crosses to the device in one copy out of pinned memory, behind what the device is at; a pinned block is
    written again only when its last copy has been made.
    """

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        self._device, self._pinned = device, device.type == "cuda"
        self._places, end = [], 0
        for shape, dtype in shapes:
            size = shape.numel() * torch.empty((), dtype=dtype).element_size()
            self._places.append((end, end + size, shape, dtype))
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._block = torch.zeros(end, dtype=torch.uint8, device=device)
        self._views = self._cut(self._block)
        self.inputs = StepInputs.of(self._views)
        blocks = [torch.zeros(end, dtype=torch.uint8, pin_memory=self._pinned) for _ in range(_BLOCKS)]
        self._waiting: list[tuple[Tensor, list[Tensor], torch.cuda.Event | None]] = [
            (block, self._cut(block), None) for block in blocks]

    def _cut(self, block: Tensor) -> list[Tensor]:
        return [block[start:end].view(dtype).view(shape) for start, end, shape, dtype in self._places]

    def fill(self, inputs: StepInputs) -> None:
        """Let the buffers hold `inputs`, as far as what is enqueued from now on can see."""
        block, views, copied = self._waiting.pop(0)
        if copied is not None:
            copied.synchronize()  # of the copy three fills ago: it has long been made, unless the device lags behind
        for view, tensor in zip(views, inputs.tensors(), strict=True):
            if tensor.device.type == "cpu":
                view.copy_(tensor)
        self._block.copy_(block, non_blocking=self._pinned)  # without pinned memory nothing says when it may be written again
        for view, tensor in zip(self._views, inputs.tensors(), strict=True):
            if tensor.device.type != "cpu":  # latents that were encoded just now
                view.copy_(tensor, non_blocking=True)
        if self._pinned:
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self._device))
        self._waiting.append((block, views, copied))
