"""Swapped blocks: the same numbers as with all weights on the device, whenever their copies are made, in less memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lib_lora_train.adapters.base import AdapterKind
from lib_lora_train.adapters.network import ADAPTERS, DEFAULT_KIND, AdapterNetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.memory.plan import size_of, weight_copies
from lib_lora_train.memory.step_config import StepConfig
from lib_lora_train.model import frozen
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.model.ops.block_swap import BlockSwap, CudaCopies, PlainCopies, spread
from lib_lora_train.model.ops.quantised import quantised
from lib_lora_train.model.sd.components import unet_tensors
from lib_lora_train.model.sd.unet import swappable
from tests.model.small_checkpoints import HINTS, checkpoint, tokenizers

CPU, META = torch.device("cpu"), torch.device("meta")


class LateCopies(PlainCopies):
    """As a slow bus: nothing is copied before somebody waits for it, and then in order."""

    def __init__(self) -> None:
        self._waiting: list[Sequence[tuple[Tensor, Tensor]]] = []

    def begin(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        self._waiting.append(pairs)
        return pairs

    def wait(self, copied: Any) -> None:
        while any(pairs is copied for pairs in self._waiting):
            super().begin(self._waiting.pop(0))

    def finish(self) -> None:
        while self._waiting:
            super().begin(self._waiting.pop(0))


class ThreadCopies(PlainCopies):
    """In a thread of their own, beside the computation."""

    def __init__(self) -> None:
        self._thread, self._last = ThreadPoolExecutor(1), Future()
        self._last.set_result(None)

    def begin(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        self._last = self._thread.submit(super().begin, pairs)
        return self._last

    def wait(self, copied: Any) -> None:
        copied.result()

    def finish(self) -> None:
        self._last.result()


COPIES = [PlainCopies, LateCopies, ThreadCopies]


def built(family: str, dtype: torch.dtype = torch.float32) -> FrozenModel:
    tensors = {name: tensor.detach().to(dtype) for name, tensor in checkpoint(family).items()}
    return frozen.build(tensors, hints=HINTS[family], tokenizers=tokenizers(family))


def adapters_of(model: FrozenModel, kind: AdapterKind = DEFAULT_KIND) -> AdapterNetwork:
    """Of rank 2 on all of the UNet, with random factors, so that each gradient is something."""
    targets = find_targets(model.components, family=model.architecture.family, text_encoder=False)
    network = AdapterNetwork.build(targets, rank=2, alpha=2.0, seed=0, kind=kind)
    network.begin_at(model.components, network.layers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def step(model: FrozenModel, network: AdapterNetwork, *, checkpointed: Sequence[str] = (),
         dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> list[Tensor]:
    """The prediction, and the gradients of its square."""
    generator, unet = torch.Generator().manual_seed(2), model.architecture.unet
    x, context = (torch.randn(shape, generator=generator).to(device, dtype)
                  for shape in ((2, 4, 16, 16), (2, 77, unet.context_dim)))
    y = None if unet.adm_channels is None else torch.randn(2, unet.adm_channels, generator=generator).to(device, dtype)
    predicted = model.unet(x, torch.tensor([10, 700], device=device), context, y, adapters=network.adapters()["unet"],
                           checkpointed=frozenset(checkpointed))
    for parameter in network.parameters():
        parameter.grad = None
    predicted.square().sum().backward()
    return [predicted.detach(), *(parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None)]


def swapping(model: FrozenModel, count: int = 1000, copies: Callable[[], Any] = PlainCopies) -> BlockSwap:
    swap = BlockSwap(spread(swappable(model.architecture.unet), count), CPU, copies=copies())
    model.unet.layers.begin_swap(swap)
    return swap


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) > 1 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("family", "checkpointing", "copies"), [
    ("sd1", "none", PlainCopies), ("sd2", "all", ThreadCopies), ("sdxl", "some", LateCopies), ("sd1", "all", LateCopies)])
def test_the_gradients_are_the_same_bit_for_bit(family: str, checkpointing: str, copies: Callable[[], Any]) -> None:
    model = built(family)
    blocks, network = model.unet.checkpointable, adapters_of(model)
    checkpointed = {"none": (), "some": blocks[::3], "all": blocks}[checkpointing]
    resident = step(model, network, checkpointed=checkpointed)
    swapping(model, copies=copies)
    for _ in range(2):
        assert same(step(model, network, checkpointed=checkpointed), resident)


@pytest.mark.parametrize(("count", "kind", "copies"), [
    (1, "int8", PlainCopies), (2, None, LateCopies), (5, "int8", LateCopies)])
def test_so_they_are_with_some_blocks_in_eight_bits_and_in_half_precision(count: int, kind: str | None,
                                                                           copies: Callable[[], Any]) -> None:
    model = built("sdxl", torch.bfloat16)
    network = adapters_of(model)
    if kind:
        model.unet.layers.replace(dict(quantised(model.unet.tensors, kind, device=CPU)))
    resident = step(model, network, dtype=torch.bfloat16)
    swapping(model, count, copies)
    assert same(step(model, network, dtype=torch.bfloat16), resident)


@pytest.mark.parametrize("kind", ["LoHa with DoRA", "LoKr", "OFT"])
def test_so_they_are_with_every_kind_of_network(kind: str) -> None:
    model = built("sd1")
    network = adapters_of(model, ADAPTERS[kind])
    resident = step(model, network, checkpointed=model.unet.checkpointable)
    swapping(model, copies=LateCopies)
    assert same(step(model, network, checkpointed=model.unet.checkpointable), resident)


@pytest.mark.parametrize("copies", COPIES)
def test_any_order_of_blocks_gives_their_own_weights(copies: Callable[[], Any]) -> None:
    weights = {f"block.{number}.weight": torch.full((3, number + 2), float(number)) for number in range(6)}
    swap = BlockSwap([f"block.{number}" for number in range(6)], CPU, copies=copies())
    held = {name: swap.placed(name, weight) for name, weight in weights.items()}
    order = [random.Random(0).choice(sorted(held)) for _ in range(300)]
    for name in order:
        assert torch.equal(held[name].dense(torch.float32), weights[name])


@pytest.mark.parametrize("copies", COPIES)
def test_after_an_error_in_forward_or_backward_the_next_step_is_the_same(copies: Callable[[], Any]) -> None:
    model = built("sd1")
    network = adapters_of(model)
    resident, whole = step(model, network), network.adapters()
    swapping(model, copies=copies)
    layers = whole["unet"]
    middle = layers["middle_block.1.transformer_blocks.0.attn1.to_q"]

    class Failing:
        """A layer of which forward, or the gradient, is not to be had."""

        def __init__(self, on: str) -> None:
            self._on = on

        def linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
            if self._on == "forward":
                raise ZeroDivisionError
            x = x.clone()
            x.register_hook(lambda grad: 1 / 0)
            return x

    for on in ("forward", "backward"):
        layers["middle_block.1.transformer_blocks.0.attn1.to_q"] = Failing(on)
        network.adapters = lambda: {"unet": layers}
        with pytest.raises(ZeroDivisionError):
            step(model, network)
        layers["middle_block.1.transformer_blocks.0.attn1.to_q"] = middle
        assert same(step(model, network), resident)


@pytest.mark.parametrize(("kind", "copies"), [("int8", PlainCopies), (None, LateCopies)])
def test_after_the_model_was_handed_over_the_next_step_is_the_same(kind: str | None, copies: Callable[[], Any]) -> None:
    tensors = {name: tensor.detach().clone() for name, tensor in checkpoint("sd1").items()}
    model = frozen.build(tensors, hints=HINTS["sd1"], tokenizers=tokenizers("sd1"))
    network = adapters_of(model)
    if kind:
        model.unet.layers.replace(dict(quantised(model.unet.tensors, kind, device=CPU)))
    resident = step(model, network)
    swap = swapping(model, 5, copies)
    assert same(step(model, network), resident)
    model.release()
    assert not swap.device_bytes
    elsewhere = {name: tensor.clone() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.fill_(100)  # the owner has that memory for something else
    model.rebind(elsewhere)
    assert same(step(model, network), resident)


class LiveBytes(TorchDispatchMode):
    """The meta device as a GPU that counts: bytes of the storages there that were made inside, `most` at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._live: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                storage = tensor.untyped_storage()
                key = StorageWeakRef(storage)
                self._now += 0 if key in self._live else storage.nbytes()
                self._live[key] = storage.nbytes()
        if self._now > self.most:  # what has gone is only looked for then
            self._live = {reference: size for reference, size in self._live.items() if not reference.expired()}
            self._now = sum(self._live.values())
            self.most = max(self.most, self._now)
        return result


def most_bytes(count: int, kind: str | None = None) -> int:
    """On the device in a step with so many blocks swapped, weights included."""
    model = built("sd1", torch.bfloat16)
    network = adapters_of(model).to(META)
    swapped = spread(swappable(model.architecture.unet), count) if count else ()
    if kind:
        model.unet.layers.replace(dict(quantised(model.unet.tensors, kind, device=CPU)))
    with LiveBytes() as live:
        model.unet.layers.begin_swap(BlockSwap(swapped, META))
        step(model, network, dtype=torch.bfloat16, device=META)
    return live.most


@pytest.mark.parametrize("kind", [None, "int8"])
def test_a_step_takes_as_much_less_memory_as_the_plan_counts_with(kind: str | None) -> None:
    tensors = unet_tensors({name: tensor.detach().to(torch.bfloat16) for name, tensor in checkpoint("sd1").items()})
    blocks = swappable(built("sd1").architecture.unet)

    def copies(count: int) -> int:
        return weight_copies(tensors, StepConfig(
            1, base_dtype=kind or "", parts_on_cpu=frozenset({"unet"}), swapped=spread(blocks, count) if count else ()))

    resident = most_bytes(0, kind)
    expected = copies(0) if kind else size_of(tensors.values())
    for count in (20, len(blocks)):
        saved = resident - most_bytes(count, kind)
        assert saved == pytest.approx(expected - copies(count), rel=0.02) and saved > 0.2 * expected


class Cudart:
    """Stands for CUDA's runtime where there is none: what is page-locked, and no more of it than `most` bytes."""

    def __init__(self, most: int) -> None:
        self.most, self.locked = most, dict[int, int]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert address not in self.locked
        if sum(self.locked.values()) + size > self.most:
            return 2
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


class CopiesOfStandIn(CudaCopies):
    """`CudaCopies` as far as it can be run without CUDA: what it locks."""

    def __init__(self) -> None:
        self._device, self._pinned, self._refused = CPU, {}, False

    begin, wait, finish = PlainCopies.begin, PlainCopies.wait, PlainCopies.finish


@pytest.mark.parametrize("most", [1 << 30, 100_000])
def test_the_hosts_memory_is_page_locked_in_place_and_unlocked_before_it_goes_back(most: int, monkeypatch) -> None:
    cudart = Cudart(most)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: False)
    model = built("sd1")
    theirs = {tensor.data_ptr() for tensor in model.unet.tensors.values()}
    network = adapters_of(model)
    resident = step(model, network)
    swapping(model, copies=CopiesOfStandIn)
    assert cudart.locked and cudart.locked.keys() <= theirs and sum(cudart.locked.values()) <= most
    assert same(step(model, network), resident)
    model.unet.layers.end_swap()
    assert not cudart.locked


def test_memory_is_unlocked_before_it_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its owner, who moved his weights meanwhile, holds it no longer: others may have those addresses then."""
    weight = torch.ones(64, 64)
    memory, held = StorageWeakRef(weight.untyped_storage()), list[bool]()

    class Watching(Cudart):
        def cudaHostUnregister(self, address: int) -> int:
            held.append(not memory.expired())
            return super().cudaHostUnregister(address)

    cudart = Watching(1 << 30)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: False)
    swap = BlockSwap(["block"], CPU, copies=CopiesOfStandIn())
    swap.placed("block.weight", weight)
    swap.placed("block.weight", torch.ones(64, 64))
    del weight
    swap.release()
    assert len(held) == 2 and all(held) and not cudart.locked
