"""All trained weights in one buffer, their gradients in another: what is done to every weight is one kernel, not hundreds.

The layers keep their own parameters; these become views of the buffers. A view begins at a multiple of 256 bytes, as an
allocated tensor would, so that kernels find the alignment they are fast with; what lies between two views stays zero.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_ALIGNMENT = 64  # fp32 numbers: 256 bytes


@dataclasses.dataclass(frozen=True, eq=False)
class FlatGroup:
    """A torch parameter group as one weight.

    parameter   [n] fp32, a view of `FlatWeights.values`; its gradient is a view of `FlatWeights.gradient`
    members     (number, weight, start): a weight's place among those of all groups, and where in `parameter` it begins
    """

    name: str
    rate: float
    parameter: nn.Parameter
    members: tuple[tuple[int, nn.Parameter, int], ...]

    def cut(self, flat: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(number, view) of each weight's part of `flat` [n], in the weight's shape."""
        for number, weight, start in self.members:
            yield number, flat[start:start + weight.numel()].view(weight.shape)


class FlatWeights:
    """The weights of some parameter groups, moved together. A weight that wants no gradient stays where it is.

    values     [n] fp32
    gradient   [n] fp32; always there: it is cleared with zeros, never set to None
    working    [n]: the same numbers in the dtype of the computation, as of the last `refresh`; None where that is fp32
    partial    [n]: gradients in that dtype, which `collect` adds to `gradient`; None where that is fp32
    shapes     of all weights of the groups, also of those that want no gradient: a member's number is a place in it
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], *, dtype: torch.dtype = torch.float32) -> None:
        """`groups` are torch's, with a "name" and an "lr" each; their weights are fp32, on one device, and now views."""
        weights = [weight for group in groups for weight in group["params"]]
        trained = [weight for weight in weights if weight.requires_grad]
        assert trained and all(weight.dtype == torch.float32 for weight in trained), "nothing to train, or not in fp32"
        self.shapes = tuple(weight.shape for weight in weights)
        self._starts = dict(zip(trained, itertools.accumulate(map(_padded, trained), initial=0), strict=False))
        self.values = torch.zeros(sum(map(_padded, trained)), device=trained[0].device)
        self.gradient = torch.zeros_like(self.values)
        self.working, self.partial = (
            None if dtype == torch.float32 else torch.zeros_like(self.values, dtype=dtype) for _ in range(2))
        for weight in trained:
            self._view(self.values, weight).copy_(weight.detach())
        numbers = {weight: number for number, weight in enumerate(weights)}
        self.groups = tuple(
            self._group(group, [(numbers[weight], weight) for weight in group["params"] if weight.requires_grad])
            for group in groups if any(weight.requires_grad for weight in group["params"]))
        self.rebind()
        self.refresh()

    def _group(self, group: Mapping[str, Any], numbered: Sequence[tuple[int, nn.Parameter]]) -> FlatGroup:
        begin = self._starts[numbered[0][1]]
        end = self._starts[numbered[-1][1]] + _padded(numbered[-1][1])
        return FlatGroup(group["name"], float(group["lr"]), nn.Parameter(self.values[begin:end]),
                         tuple((number, weight, self._starts[weight] - begin) for number, weight in numbered))

    def _view(self, flat: Tensor, weight: nn.Parameter) -> Tensor:
        start = self._starts[weight]
        return flat[start:start + weight.numel()].view(weight.shape)

    def buffers(self) -> list[Tensor]:
        """All that takes memory. Who moves it, in place, calls `rebind` afterwards."""
        return [buffer for buffer in (self.values, self.gradient, self.working, self.partial) if buffer is not None]

    def rebind(self) -> None:
        """Make weights, groups and their gradients views of the buffers where these are now."""
        for weight in self._starts:
            weight.data = self._view(self.values, weight)
            weight.grad = self._view(self.gradient, weight)
        for group in self.groups:
            begin = self._starts[group.members[0][1]]
            own = slice(begin, begin + group.parameter.numel())
            group.parameter.data = self.values[own]
            group.parameter.grad = self.gradient[own]

    def trained(self) -> list[nn.Parameter]:
        """The weights that are trained, in the order in which they lie in the buffer."""
        return [weight for group in self.groups for _, weight, _ in group.members]

    def cut(self, flat: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(number, view) of each trained weight's part of `flat` [n], in the weight's shape."""
        for number, weight in ((number, weight) for group in self.groups for number, weight, _ in group.members):
            yield number, self._view(flat, weight)

    def working_copy(self, weight: nn.Parameter) -> Tensor | None:
        """The view of `working` that belongs to `weight`, and as its `grad` that of `partial`; None where there is none."""
        if self.working is None or self.partial is None or weight not in self._starts:
            return None
        copy = self._view(self.working, weight)
        copy.grad = self._view(self.partial, weight)
        return copy

    def collect(self) -> None:
        """Add to `gradient` what layers have added to `partial`: one cast for all, after each micro-batch."""
        if self.partial is not None:
            self.gradient.add_(self.partial)
            self.partial.zero_()

    def clear(self) -> None:
        """Set all gradients to zero."""
        self.gradient.zero_()
        if self.partial is not None:
            self.partial.zero_()

    def refresh(self) -> None:
        """Bring `working` up to date: one copy, after each change of the weights."""
        if self.working is not None:
            self.working.copy_(self.values)


def _padded(weight: Tensor) -> int:
    """Numbers from the start of a weight to that of the next."""
    return -(-weight.numel() // _ALIGNMENT) * _ALIGNMENT
