"""What any adapter offers to the container around the adapters, to the optimizer and to the LoRA file.

An adapter is the trained weights beside one frozen layer. For the computation it is also one of the two kinds that
`model.ops.layers` knows: a `DeltaAdapter` adds a low-rank product, a `LayerAdapter` computes linear layers and
convolutions in the place of the frozen ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from lib_lora_train.adapters.targets import Target

WorkingCopy = Callable[[nn.Parameter], "Tensor | None"]
"""A weight -> the same numbers in the dtype of the computation, None where there is no copy."""


class Adapter(Protocol):
    """The trained weights beside one frozen layer: an `nn.Module` whose parameters, in a fixed order, are fp32.

    rank, alpha   what the file's metadata say of it
    multiplier    the weight in `<lora:name:weight>`: 1 while training, 0 for the layer without the adapter
    """

    rank: int
    alpha: float
    multiplier: float

    def use_working_copies(self, copy: WorkingCopy) -> None:
        """Compute with the copies of the weights in place of a cast; whoever made them keeps them up to date."""

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the last part of their keys in the file ("alpha"), fp32, sharing memory with the weights."""


class AdapterKind(Protocol):
    """One kind of adapter: makes adapters for targets."""

    network_module: str
    """kohya's name of the kind in a file's metadata, "networks.lora"."""
    tensor_names: Collection[str]
    """The last parts of the keys that its files hold."""

    def build(self, target: Target, *, rank: int, alpha: float, generator: torch.Generator) -> Adapter:
        """A new one, which changes nothing yet."""

    def load(self, target: Target, tensors: Mapping[str, Tensor]) -> Adapter:
        """The one that a file's `tensors` (as `Adapter.tensors`, in any dtype) hold.

        Raises LoraFileError where they are incomplete or do not fit the target.
        """

    def cost(self, target: Target, *, rank: int) -> int:
        """How many numbers of one of that rank are trained."""
