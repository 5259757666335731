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
from lib_lora_train.memory.offload import offloaded
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.ops.layers import Adapter
from lib_lora_train.training.condition import Condition
from lib_lora_train.training.optimizer import Stepper
from lib_lora_train.training.precision import LossScaler
from lib_lora_train.training.step import StepInputs, StepOptions, denoising_loss

_MOST_COMPILED = 64
"""Shapes for which torch.compile makes kernels, as torch 2.1 has it. Newer torch stops after 8, without a word."""

_ALLOWED = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""How far, relative to its size, a compiled loss may lie from that as written, by what is computed in; gradients ten times."""


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
            self._give_up_compiling(str(error).strip().splitlines()[0])

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
        units = frozenset(self._model.unet.checkpointable)
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
        if shapes in self._met:
            with _many_shapes():
                self._backward(inputs, self._compiled)
        elif trouble := self._trouble_in(inputs, self._compiled):
            self._give_up_compiling(trouble)
        else:
            self._met.add(shapes)

    def _trouble_in(self, inputs: StepInputs, compiled: Callable[..., torch.Tensor]) -> str:
        """As `gradients`, as it is written, and whether the compiled function does the same for inputs of these shapes: "" or
        why not. torch 2.1.2 (on Python 3.10) compiles a loss that is a few per cent off and says nothing."""
        gradient, trouble = self._stepper.weights.gradient, ""
        before = gradient.clone(), self.loss.clone()
        try:
            with _many_shapes():
                self._backward(inputs, compiled)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            trouble = (str(error).strip().splitlines() or [type(error).__name__])[0]
        found = gradient - before[0], self.loss - before[1]
        gradient.copy_(before[0])
        self.loss.copy_(before[1])
        self._backward(inputs, denoising_loss)
        exact = gradient - before[0], self.loss - before[1]
        allowed = _ALLOWED[self._options.dtype]
        # Gradients that overflow, as fp16's do at first, tell nothing of each other; the losses do.
        same = all(bool((a - b).norm() <= most * b.norm()) or not bool(b.isfinite().all())
                   for a, b, most in zip(found, exact, (10 * allowed, allowed), strict=True))
        if not trouble and not same:
            trouble = (f"torch {torch.__version__} makes something else of the step (loss {found[1]:.4f} instead of "
                       f"{exact[1]:.4f})")
        return trouble

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

    def _give_up_compiling(self, why: str) -> None:
        self._compiled = None
        self._report(Warned(f"torch_compile has no effect here: {why}"))

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
