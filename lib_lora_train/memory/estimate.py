"""What a training step takes, from the model's shapes alone: the bytes that come and go within it, and its FLOPs.

The UNet, and the text encoders where they are trained, run forward once on torch's meta device with one image, while
`torch.autograd.graph.saved_tensors_hooks` count what autograd keeps in each block. The rest is arithmetic. While a block's
backward runs, the memory holds

- what this block and all before it keep; of a checkpointed block only its inputs, until its inside is computed once more,
- what that backward takes for a moment: gradients, and what norms and gates compute a second time (see `_working`),
- one kernel of the block in the dtype of the computation, where the weights are stored in another.

The largest of these sums is the peak. All of it but the kernel grows with the number of images. Not counted: what a
convolution on a CPU takes for itself (columns, Winograd tiles), gradients of skip connections, memory of CUDA graphs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from lib_lora_train.adapters.base import Adapter, AdapterKind
from lib_lora_train.adapters.dropout import DropoutKeys, DropoutRates, DroppedLayer
from lib_lora_train.adapters.embedding import WordEmbedding, WordVectors
from lib_lora_train.adapters.network import DEFAULT_KIND
from lib_lora_train.adapters.targets import Target
from lib_lora_train.model.architecture import UNET_COMPONENT, Architecture
from lib_lora_train.model.sd.components import UNET_PREFIX
from lib_lora_train.model.sd.text_encoder import TOKEN_EMBEDDING
from lib_lora_train.model.sd.unet import DIRECTLY, Run

AttentionKernel = Literal["fused", "math"]
"""Whether attention keeps q, k, v and its result (flash, memory-efficient), or the whole map as well."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """An adapted layer of a run: where, the adapter's rank and kind, and whether it is trained or only applied."""

    target: Target
    rank: int
    trained: bool = True
    kind: AdapterKind = DEFAULT_KIND


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a step's memory depends on and no plan changes.

    width, height       of the images, in pixels
    dtype               of the computation
    chunks              of 77 tokens that the longest caption takes
    text_checkpointed   whether the layers of trained text encoders are computed again in backward
    encoded             images that the VAE encodes together in front of each step; 0 where latents are cached
    sampled             (width, height) of the largest image that is sampled between steps; None where none is
    words               vectors of the trigger word that are trained, which the text encoders read
    dropout             what is left out of the adapters, which then compute by themselves
    optimizer_bytes     that the optimizer keeps for each weight of the adapters
    merged              bytes of copies of weights that other LoRAs are merged into
    """

    width: int
    height: int
    dtype: torch.dtype
    layers: tuple[Layer, ...]
    device_type: str = "cuda"
    attention: AttentionKernel = "fused"
    chunks: int = 1
    text_checkpointed: bool = False
    encoded: int = 0
    sampled: tuple[int, int] | None = None
    words: int = 0
    dropout: DropoutRates = DropoutRates()
    optimizer_bytes: float = 8.0
    merged: int = 0

    @property
    def parameters(self) -> int:
        """Number of weights of the adapters."""
        return sum(layer.kind.cost(layer.target, rank=layer.rank) for layer in self.layers)

    @property
    def composed(self) -> int:
        """Bytes that the backward of one adapter takes for a moment to compose its factors, at most."""
        trained = (layer for layer in self.layers if layer.trained)
        return 4 * max((layer.kind.composed(layer.target, rank=layer.rank) for layer in trained), default=0)


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of the step. `name` is what the UNet calls it where it can be checkpointed, "" elsewhere.

    kept, inputs, largest   bytes for one image: what autograd keeps inside, the block's inputs, its largest kept tensor
    working                 bytes for one image that backward takes for a moment beside them
    kernel                  bytes of its largest weight in the dtype of the computation
    forward, backward       FLOPs for one image
    """

    name: str
    kept: int = 0
    inputs: int = 0
    largest: int = 0
    working: int = 0
    kernel: int = 0
    forward: float = 0.0
    backward: float = 0.0


def peak_bytes(blocks: Sequence[Block], *, images: int, checkpointed: frozenset[str] = frozenset(), offload: bool = False,
               casts: bool = False, composed: int = 0) -> tuple[int, int]:
    """Bytes that come and go within a step of so many images at once: at its highest moment, and when forward ends.

    checkpointed   names of the blocks that are computed again in backward
    offload        whether what autograd keeps lies in the CPU's memory
    casts          whether weights are stored in another dtype than that of the computation
    composed       bytes that an adapter's backward takes beside them (`Workload.composed`)
    """
    before = peak = 0
    for block in blocks:
        repeated = block.name in checkpointed
        before += 0 if offload else block.inputs if repeated else block.kept
        inside = block.kept if repeated else block.largest if offload else 0
        peak = max(peak, images * (before + inside + block.working) + casts * block.kernel)
    return peak + composed, images * before


def blocks_of(tensors: Mapping[str, Tensor], architecture: Architecture, workload: Workload) -> tuple[Block, ...]:
    """The step's blocks in the order of forward; of `tensors` (checkpoint names) only shapes and dtypes are used. Takes about
    a second for SD1 and two for SDXL, once for the same shapes and workload."""
    shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
    return _blocks_of(shapes, architecture,
                      dataclasses.replace(workload, encoded=0, sampled=None, optimizer_bytes=0.0, merged=0))


@functools.lru_cache(maxsize=64)  # the page asks at every change, mostly of something else, and the run asks again
def _blocks_of(shapes: tuple[tuple[str, torch.Size, torch.dtype], ...], architecture: Architecture,
               workload: Workload) -> tuple[Block, ...]:
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape, dtype in shapes}
    unet_tensors, _, text_tensors = architecture.family.parts(tensors)
    adapters: dict[str, dict[str, Adapter]] = {}
    with torch.device("meta"):  # where no random number is drawn
        keys = DropoutKeys()
        keys.keys = torch.empty(1, 2, dtype=torch.long) if workload.dropout else None
        for number, layer in enumerate(workload.layers):
            adapter = layer.kind.build(layer.target, rank=layer.rank, alpha=1.0, generator=None).requires_grad_(layer.trained)
            if workload.dropout:
                adapter = DroppedLayer(adapter, workload.dropout, keys, number=number)
            adapters.setdefault(layer.target.component, {})[layer.target.module] = adapter
        for text in architecture.text if workload.words else ():
            word = WordEmbedding("word", {text.component: torch.empty(workload.words, text.width)})
            adapters.setdefault(text.component, {})[TOKEN_EMBEDDING] = WordVectors(text.component, [word])
    config, factor, observer = architecture.unet, architecture.vae.factor, _Observer(workload, tensors)
    new = functools.partial(torch.empty, dtype=workload.dtype, device="meta")
    x = new(1, config.in_channels, workload.height // factor, workload.width // factor)
    context = new(1, 77 * workload.chunks, config.context_dim)
    y = None if config.adm_channels is None else new(1, config.adm_channels)
    unet = architecture.family.unet(unet_tensors, config)
    unet.runner = lambda checkpointed: observer
    with torch.enable_grad(), observer, torch.autograd.graph.saved_tensors_hooks(observer.keep, lambda tensor: tensor):
        if workload.words or any(layer.trained and layer.target.component != UNET_COMPONENT for layer in workload.layers):
            context = _context(text_tensors, architecture, workload, adapters, observer)
        unet(x, torch.zeros(1, device="meta"), context, y, adapters=adapters.get(UNET_COMPONENT, {}))
        observer.next_block("")
    return tuple(observer.blocks)


def _context(tensors: Sequence[Mapping[str, Tensor]], architecture: Architecture, workload: Workload,
             adapters: Mapping[str, Mapping[str, Adapter]], observer: _Observer) -> Tensor:
    """The text, [1, 77·n, C], computed by the text encoders as one block."""
    family, ids = architecture.family, torch.zeros(1, workload.chunks, 77, dtype=torch.long, device="meta")
    encoders = [family.text_encoder(part, config) for part, config in zip(tensors, architecture.text, strict=True)]
    text = family.conditioner(encoders, [None] * len(encoders)).encode_ids(
        [ids] * len(encoders), adapters=adapters, dtype=workload.dtype)
    observer.next_block("")
    if workload.text_checkpointed:  # the inputs of all layers are kept, and the inside of one at a time
        block, layers = observer.blocks.pop(), sum(config.layers for config in architecture.text)
        numbers = sum(77 * workload.chunks * config.width * config.layers for config in architecture.text)
        observer.blocks.append(dataclasses.replace(
            block, kept=numbers * workload.dtype.itemsize, working=block.working + block.kept // layers))
    return text.context


class _Observer(TorchFunctionMode):
    """Counts what autograd keeps and what products compute, block by block. The weights' `tensors` are there anyway."""

    def __init__(self, workload: Workload, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.blocks: list[Block] = []
        self._workload, self._tensors, self._block = workload, tensors, Block("")
        self._kept = {StorageWeakRef(tensor.untyped_storage()) for tensor in tensors.values()}
        self._inputs: set[StorageWeakRef] = set()

    def __call__(self, name: str, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Run one of the UNet's outermost blocks, as `model.sd.unet.Run` does."""
        kernel = max(t.numel() for key, t in self._tensors.items() if key.startswith(f"{UNET_PREFIX}{name}."))
        self.next_block(name, arguments=arguments, kernel=kernel * self._workload.dtype.itemsize)
        result = function(*arguments)
        self.next_block("")
        return result

    def inside(self, name: str) -> Run:
        """What runs the blocks inside one."""
        return DIRECTLY

    def keep(self, tensor: Tensor) -> Tensor:
        """To be called with each tensor that autograd saves."""
        key, block, size = StorageWeakRef(tensor.untyped_storage()), self._block, tensor.untyped_storage().nbytes()
        if key not in self._kept:
            self._kept.add(key)
            self._block = dataclasses.replace(block, kept=block.kept + size, largest=max(block.largest, size),
                                              working=max(block.working, _working(tensor, block.name)))
        return tensor

    def next_block(self, name: str, *, arguments: Sequence[Any] = (), kernel: int = 0) -> None:
        """What comes from now on belongs to another block, which has these arguments."""
        storages = [argument.untyped_storage() for argument in arguments if isinstance(argument, Tensor)]
        new = {key: storage.nbytes() for storage in storages if (key := StorageWeakRef(storage)) not in self._inputs}
        self._inputs.update(new)
        self.blocks.append(self._block)
        self._block = Block(name, inputs=sum(new.values()), kernel=kernel)

    def __torch_function__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        fused = func is F.scaled_dot_product_attention and self._workload.attention == "fused"
        result = _FusedAttention.apply(*args[:3]) if fused else func(*args, **(kwargs or {}))
        if func in _FLOPS:
            forward, block = _FLOPS[func](result, args), self._block
            # Weights are frozen: backward makes one product for each of forward's. In attention it makes five for two.
            backward = forward * (2.5 if func is F.scaled_dot_product_attention else 1)
            self._block = dataclasses.replace(block, forward=block.forward + forward, backward=block.backward + backward)
        return result


def _working(kept: Tensor, block: str) -> int:
    """Bytes that backward takes for a moment at a tensor that it kept.

    Group norm, [C, h, w], in fp32: values normed, two gradients and the one that came, and of half precision also the values
    themselves. Gated feed-forward, [n, 8C]: its gradient of 8C numbers a row, the gate, its gradient, the gated values and
    theirs of 4C each, and the gradient that came.
    """
    if kept.ndim == 4 and ".transformer_blocks." not in block:
        return kept.numel() * (16 if kept.dtype == torch.float32 else 20)
    return kept.untyped_storage().nbytes() * 25 // 8


_FLOPS: Mapping[Any, Callable[[Tensor, Sequence[Any]], float]] = {
    F.linear: lambda result, args: 2.0 * result.numel() * args[0].shape[-1],
    Tensor.matmul: lambda result, args: 2.0 * result.numel() * args[0].shape[-1],
    Tensor.addmm_: lambda result, args: 2.0 * result.numel() * args[1].shape[-1],
    F.conv2d: lambda result, args: 2.0 * result.numel() * args[1][0].numel(),
    F.scaled_dot_product_attention: lambda result, args: 4.0 * result.numel() * args[1].shape[-2]}


class _FusedAttention(torch.autograd.Function):
    """Keeps what flash attention keeps (Dao 2023, arXiv 2307.08691): q [B, h, n, d], k and v [B, h, m, d], the result, which
    lies as [B, n, h, d], and a number for each row. On the meta device torch would keep the map [B, h, n, m]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out
