"""What any adapter offers to the container around the adapters, to the optimizer and to the LoRA file.

An adapter is the trained weights beside one frozen layer. For the computation it is also one of the two kinds that
`model.ops.layers` knows: a `DeltaAdapter` adds a low-rank product, a `LayerAdapter` computes linear layers and
convolutions in the place of the frozen ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lib_lora_train.adapters.targets import Target
from lib_lora_train.errors import LoraFileError
from lib_lora_train.model.ops.weights import Weight

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


@runtime_checkable
class Product(Protocol):
    """An adapter whose change is a product of its factors, whatever the frozen weight is: ΔW, which is added to it.

    factors   tensors that `product` takes, in this order
    """

    factors: tuple[Tensor, ...]
    multiplier: float

    def product(self, *factors: Tensor) -> Tensor:
        """ΔW [out, in, *kernel] at multiplier 1, in the dtype of the factors; differentiable."""


@runtime_checkable
class OfWeight(Protocol):
    """An adapter whose change depends on the frozen weight."""

    def begin_at(self, weight: Weight) -> None:
        """Take over what depends on the frozen weight before the first step, so that nothing is changed yet."""

    def merged(self, weight: Tensor) -> Tensor:
        """The weight [out, in, …] fp32 with the adapter in it."""


def merged(adapter: Adapter, weight: Tensor) -> Tensor:
    """The weight [out, in, …] fp32 with an adapter at its multiplier in it, as a new tensor."""
    if isinstance(adapter, OfWeight):
        return adapter.merged(weight)
    assert isinstance(adapter, Product), "every kind is one of the two"
    return weight + (adapter.product(*adapter.factors) * adapter.multiplier).reshape(weight.shape)


class AdapterKind(Protocol):
    """One kind of adapter: makes adapters for targets. Equal ones make equal adapters."""

    network_module: str
    """kohya's name of the kind in a file's metadata, "networks.lora"."""
    tensor_names: Collection[str]
    """The last parts of the keys that its files hold."""
    arguments: Mapping[str, str]
    """kohya's `network_args` that say what `network_module` does not."""

    def build(self, target: Target, *, rank: int, alpha: float, generator: torch.Generator) -> Adapter:
        """A new one, which changes nothing yet."""

    def load(self, target: Target, tensors: Mapping[str, Tensor]) -> Adapter:
        """The one that a file's `tensors` (as `Adapter.tensors`, in any dtype) hold.

        Raises LoraFileError where they are incomplete or do not fit the target.
        """

    def rank_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The rank of a layer of a file, of the shapes of its tensors."""

    def cost(self, target: Target, *, rank: int) -> int:
        """How many numbers of one of that rank are trained."""

    def composed(self, target: Target, *, rank: int) -> int:
        """How many fp32 numbers backward makes for a moment of its factors, in a layer of that rank."""


def required(target: Target, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A copy of a layer's tensor in fp32. Raises LoraFileError where the file lacks it."""
    if name not in tensors:
        raise LoraFileError("The LoRA file is incomplete", why=f"{target.key}.{name} is missing")
    return tensors[name].detach().to(torch.float32, copy=True)


def alpha_of(target: Target, tensors: Mapping[str, Tensor], *, rank: int) -> float:
    """A layer's alpha; without one it is the rank, as old files mean it. Raises LoraFileError."""
    alphas = tensors["alpha"].flatten().tolist() if "alpha" in tensors else [float(rank)]
    if len(alphas) != 1 or not alphas[0]:
        raise LoraFileError("The LoRA file is damaged", remedy="choose another LoRA",
                            why=f"{target.key}.alpha is {alphas!s:.60}, and not one number other than 0")
    return alphas[0]
