"""What a training step does on the device, in two halves: a micro-batch's gradients, and what is done with their sum.

Both read and write tensors that stay where they are, and neither waits for the device, so that each can be recorded once and
replayed (`graph.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch

from lib_lora_train.errors import is_out_of_memory
from lib_lora_train.events import Report, Warned
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.layers import Adapter
from lib_lora_train.training.condition import Condition
from lib_lora_train.training.offload import offloaded
from lib_lora_train.training.optimizer import Stepper
from lib_lora_train.training.precision import LossScaler
from lib_lora_train.training.step import StepInputs, StepOptions, denoising_loss

_MOST_COMPILED = 64
"""Shapes for which torch.compile makes kernels, as torch 2.1 has it. Newer torch stops after 8, without a word."""


class Work:
    """The two halves of one run's steps. `loss` is the sum of what `gradients` met since the last `finish`, 0-d fp32."""

    def __init__(self, model: FrozenModel, *, adapters: Mapping[str, Adapter], condition: Condition, stepper: Stepper,
                 scaler: LossScaler, options: StepOptions) -> None:
        """`adapters` are the UNet's."""
        self.device = model.device
        self.loss = torch.zeros((), device=model.device)
        self._result = torch.zeros(2, device=model.device)
        self._model, self._adapters, self._condition = model, adapters, condition
        self._stepper, self._scaler, self._options = stepper, scaler, options
        self._compiled: Callable[..., torch.Tensor] | None = None
        self._met: set[tuple[torch.Size, ...]] = set()
        self._report: Report = lambda _: None

    def compile(self, report: Report) -> None:
        """Let torch.compile make the kernels of the loss from now on; where it cannot, that is reported once."""
        self._report = report
        try:
            self._compiled = torch.compile(denoising_loss, dynamic=False)
        except RuntimeError as error:  # a Python or a system that torch.compile does not know
            self._give_up_compiling(error)

    @property
    def compiles(self) -> bool:
        """Whether the first call for each shape of inputs makes kernels."""
        return self._compiled is not None

    @property
    def waits(self) -> bool:
        """Whether `finish` asks the device for an answer: where the optimiser has no kernel that is told of an overflow."""
        return not self._stepper.fused

    def recompute(self) -> bool:
        """From now on, let backward compute all of the UNet again that can be. False where it does."""
        units = frozenset(self._model.unet.units)
        if self._options.recompute == units:
            return False
        self._options = dataclasses.replace(self._options, recompute=units)
        return True

    def gradients(self, inputs: StepInputs) -> None:
        """Add the gradients of these inputs' loss to those that are there, and the loss to `loss`.

        Raises RuntimeError where the memory runs out: gradients and loss are then half done; see `clear`.
        """
        if self._compiled is None:
            self._backward(inputs, denoising_loss)
            return
        shapes = tuple(tensor.shape for tensor in inputs.tensors())
        gradient = self._stepper.weights.gradient
        before = None if shapes in self._met else (gradient.clone(), self.loss.clone())
        try:
            with _many_shapes():
                self._backward(inputs, self._compiled)
            self._met.add(shapes)
        except RuntimeError as error:
            if before is None or is_out_of_memory(error):
                raise
            gradient.copy_(before[0])
            self.loss.copy_(before[1])
            self._give_up_compiling(error)
            self._backward(inputs, denoising_loss)

    def _backward(self, inputs: StepInputs, loss_of: Callable[..., torch.Tensor]) -> None:
        with offloaded(self.device, spared=self._weights()) if self._options.offload else contextlib.nullcontext():
            loss = loss_of(self._model, inputs=inputs, conditioning=self._condition.encode(inputs.text),
                           adapters=self._adapters, options=self._options)
            self._scaler.scaled(loss).backward()
        self.loss.add_(loss.detach())

    def _weights(self) -> Iterator[torch.Tensor]:
        """The lender's and ours."""
        for tensors in self._model.components.values():
            yield from (tensor for tensor in tensors.values() if isinstance(tensor, torch.Tensor))
        weights = self._stepper.weights
        yield from filter(lambda tensor: tensor is not None, (weights.values, weights.working))

    def _give_up_compiling(self, error: RuntimeError) -> None:
        self._compiled = None
        lines = str(error).strip().splitlines() or [type(error).__name__]
        self._report(Warned(f"torch_compile has no effect here: {lines[0]}"))

    def finish(self) -> torch.Tensor:
        """Change the weights by the gradients and clear these. (loss, 1 if the gradients overflowed), [2] fp32 on the device,
        overwritten by the next call."""
        overflowed = self._stepper.step(self._scaler.inverse())
        self._scaler.update(overflowed)
        self._result.copy_(torch.stack([self.loss, overflowed.float()]))
        self.loss.zero_()
        return self._result

    def clear(self) -> None:
        """Forget gradients and losses since the last `finish`."""
        self._stepper.weights.gradient.zero_()
        self.loss.zero_()


def _many_shapes() -> contextlib.AbstractContextManager[None]:
    from torch._dynamo import config  # takes seconds where nobody has compiled yet
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    return contextlib.nullcontext() if getattr(config, name) >= _MOST_COMPILED else config.patch({name: _MOST_COMPILED})
