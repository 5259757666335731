"""How a run's steps fit into the memory there is: the first rung of an ordered ladder that fits is taken.

1. As the settings wish it.
2. The UNet's blocks are checkpointed (computed again in backward instead of keeping what is inside), those that keep the most
   first, and no more than it takes.
3. A batch is computed in microbatches of a half, a quarter, …: the same gradients from more kernels.
4. On a GPU, and where the settings allow it, the weights of some of the UNet's blocks wait in the CPU's memory, no more than it
   takes.
5. On a GPU, what autograd still keeps lies in the CPU's memory.
6. On a GPU, the UNet's weights are held in int8, and 1 to 5 again. It comes last because it changes what is learnt.

What is predicted is the highest sum of bytes in use at any moment of a step, and that before the first step. `corrected` puts
in its place what the first step really took. The constants stand for what no shape tells.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import Interrupted
from lib_lora_train.inputs import text, vae_batches
from lib_lora_train.memory.estimate import Block, Workload, blocks_of, peak_bytes
from lib_lora_train.memory.step_config import BaseDtype, Part, StepConfig
from lib_lora_train.model.architecture import Architecture
from lib_lora_train.model.ops.block_swap import block_of, spread
from lib_lora_train.model.ops.quantised import is_kernel
from lib_lora_train.model.sd.components import unet_tensors, vae_tensors
from lib_lora_train.model.sd.unet import swappable
from lib_lora_train.settings import MemorySettings, named

GIGABYTE = 1 << 30
CONTEXT = 420 << 20
"""CUDA's context with torch's kernels, cuDNN and cuBLAS loaded; taken before anything is computed."""
WORKSPACES = 64 << 20
"""cuBLAS's workspaces (8 to 32 MiB for each stream that computes) and cuDNN's."""
FRAGMENTS = 0.05
"""Share of activations and of what kernels take that the allocator loses between blocks."""

_PARTS: Mapping[Part, str] = {"unet": "UNet", "vae": "VAE", "text": "text encoders"}
_BASE_DTYPE: Mapping[str, BaseDtype] = {"as they are": "", "int8": "int8", "fp8": "fp8"}
_HALF = GIGABYTE // 20 - 1  # of a tenth of a GB: what is missing is rounded up


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """How the run's steps are made, and what that takes.

    batch          images that the user wants in a batch
    predicted      bytes by kind at the highest moment of a step: the host's parts, "copies" of ours, "LoRA and optimiser",
                   "activations" that are kept for backward, "working" for what else comes and goes, "encoding" by the
                   VAE where latents are not cached, "fragments" and "context" of CUDA
    before         bytes at the highest moment before the first step
    sampling       bytes while a sample is decoded between two steps, 0 where none is
    budget         bytes that may be taken; None where nobody said
    flops          of `config.microbatch` images; `checkpointed_flops` are those that are computed a second time,
                   `preservation_flops` those that hold the LoRA to the base model's predictions
    blocks         all blocks that can be checkpointed
    swappable      number of blocks whose weights could wait on the CPU; 0 without a GPU
    settings       what the user asked for; `resumed_base_dtype` is what a run that goes on has held the model in
    measured       bytes that the first step really took; 0 before it
    """

    config: StepConfig
    batch: int
    predicted: Mapping[str, int]
    before: int
    budget: int | None
    flops: float
    checkpointed_flops: float
    blocks: frozenset[str]
    settings: MemorySettings
    resumed_base_dtype: BaseDtype = ""
    sampling: int = 0
    measured: int = 0
    preservation_flops: float = 0.0
    swappable: int = 0

    @property
    def bytes(self) -> int:
        """All that a step takes: as measured, or predicted."""
        return self.measured or sum(self.predicted.values())

    @property
    def missing(self) -> int:
        """Bytes that the budget lacks in a step, 0 where it suffices."""
        return max(0, self.bytes - self.budget) if self.budget is not None else 0

    @property
    def passes(self) -> int:
        """Microbatches that a batch is computed in."""
        return -(-self.batch // self.config.microbatch)

    @property
    def text(self) -> str:
        """One sentence: how much, and by what means."""
        of = "" if self.budget is None else f" of {gigabytes(self.budget)}"
        means = self._means() or ("nothing has to be given up for it" if self.budget is not None else "")
        amount = (f"{gigabytes(self.measured)}{of} GB of memory, measured in the first step" if self.measured else
                  f"about {gigabytes(max(self.bytes, self.before, self.sampling))}{of} GB of memory")
        return ": ".join(filter(None, (amount, means)))

    @property
    def warning(self) -> str:
        """What the user should know before the start; "" for nothing."""
        said, budget, base = [], self.budget or 0, self.config.base_dtype
        if self.missing:
            other = f", and {named('memory_plan')} = auto looks for a way that fits" * (self.settings.memory_plan == "manual")
            said.append(f"The training needs about {gigabytes(self.bytes)} GB of memory, {gigabytes(self.missing + _HALF)} "
                        "more than there is: it may fail or become very slow. A smaller "
                        f"{named('resolution')}, {named('network_dim')} or {named('train_batch_size')} needs less"
                        f"{other}.")
        elif self.budget is not None and self.before > budget:
            said.append(f"Before the first step, while pictures and captions are encoded, about {gigabytes(self.before)} GB "
                        f"of memory are taken, {gigabytes(self.before - budget + _HALF)} too much: it may fail or become very "
                        "slow there. The steps fit.")
        elif self.budget is None and 0 < (there := installed_bytes()) < (most := max(self.bytes, self.before)):
            said.append(f"The training needs about {gigabytes(most)} GB of memory, and this machine has {gigabytes(there)}: "
                        "it may fail or become very slow. A smaller resolution, rank or batch needs less.")
        if base and not _BASE_DTYPE[self.settings.base_weights]:
            said.append(
                f"The run goes on with the model held in {base}, as its memory plan had chosen when it began."
                if base == self.resumed_base_dtype else
                f"The model is held in eight bits ({base}) while it is trained on, because nothing else fits into "
                f"{gigabytes(budget)} GB: the LoRA learns beside weights that are a little off. A smaller "
                f"{named('resolution')} or a larger {named('memory_budget')} avoids that.")
        short = self.missing or base and not _BASE_DTYPE[self.settings.base_weights]
        if short and len(self.config.swapped) < self.swappable:
            said.append(f"With {named('blocks_to_swap')} = {self.swappable} the memory plan keeps as many of the UNet's blocks "
                        "in ordinary memory as it must; nobody has measured how much longer a step then takes.")
        if self.config.swapped and (self.settings.cuda_graphs == "on" or self.settings.torch_compile):
            said.append("Steps are neither captured in CUDA graphs nor compiled, because blocks are swapped.")
        return " ".join(said)

    def corrected(self, allocated: int) -> MemoryPlan:
        """The plan with what the first step took: so many bytes that torch gave out at most, and CUDA's context."""
        return dataclasses.replace(self, measured=allocated + CONTEXT)

    def _means(self) -> str:
        config = self.config
        step = self.flops - self.preservation_flops
        share = max(1, round(100 * self.checkpointed_flops / (step - self.checkpointed_flops)))
        means = {
            "the convolutions' weights are laid out anew": config.channels_last and not config.base_dtype,
            "every block is computed twice": config.checkpointed == self.blocks,
            f"{share} % of a step's work is done twice": config.checkpointed and config.checkpointed != self.blocks,
            "activations wait in ordinary memory": config.offload,
            f"{len(config.swapped)} of {self.swappable} blocks are swapped": config.swapped,
            f"each batch is computed in {self.passes} parts": self.passes > 1,
            f"the UNet's weights are held in {config.base_dtype}": config.base_dtype,
            f"{round(100 * self.preservation_flops / step)} % is computed beside it for what the base model predicts itself":
                self.preservation_flops}
        return ", ".join(text for text, used in means.items() if used)


def plan_memory(tensors: Mapping[str, Tensor], architecture: Architecture, workload: Workload, *, batch: int,
                memory: MemorySettings, budget: int | None = None, parts_on_cpu: frozenset[Part] = frozenset(),
                resumed_base_dtype: BaseDtype = "", references: int = 0, repeats: int = 1,
                should_stop: ShouldStop | None = None) -> MemoryPlan:
    """The first rung of the ladder that fits into `budget` bytes, or the last; the first, without a budget or a plan.

    Each image is trained `repeats` times in a step, one after the other, and computed `references` times without gradients,
    which takes time and no more memory.

    Of `tensors` (checkpoint names) only shapes and dtypes are used. `parts_on_cpu` will not lie on the device in any case;
    `resumed_base_dtype` is what a run that goes on has held the model in. Raises Interrupted where `should_stop()` says so.
    """
    if should_stop is not None and should_stop():
        raise Interrupted("It was stopped while the memory was planned")
    cuda, blocks = workload.device_type == "cuda", blocks_of(tensors, architecture, workload)
    by_size = [block.name for block in sorted(blocks, key=lambda block: block.inputs - block.kept) if block.name]
    wished = _with_base_dtype(StepConfig(
        microbatch=batch, checkpointed=frozenset(by_size if memory.gradient_checkpointing else ()),
        offload=memory.cpu_offload_checkpointing and cuda, channels_last=memory.channels_last == "on",
        parts_on_cpu=parts_on_cpu), _BASE_DTYPE[memory.base_weights] or resumed_base_dtype, cuda=cuda)
    swapping = swappable(architecture.unet) if cuda else ()
    swaps = [spread(swapping, count) for count in range(1, min(memory.blocks_to_swap, len(swapping)) + 1)]
    as_chosen = _with_swapped(wished, swaps[-1]) if swaps else wished
    for config in ladder(wished, by_size, swaps, cuda=cuda) if memory.memory_plan == "auto" else [as_chosen]:
        if budget is None or sum(_predicted(tensors, workload, blocks, config).values()) <= budget:
            break
    twice = sum(block.forward for block in blocks if block.name in config.checkpointed)
    step, forward = twice + sum(block.forward + block.backward for block in blocks), sum(block.forward for block in blocks)
    preservation = config.microbatch * ((repeats - 1) * step + references * forward)
    return MemoryPlan(
        config=config, batch=batch, predicted=_predicted(tensors, workload, blocks, config), before=_before(tensors, workload),
        budget=budget, flops=config.microbatch * step + preservation, preservation_flops=preservation,
        checkpointed_flops=config.microbatch * twice, blocks=frozenset(by_size), settings=memory, swappable=len(swapping),
        resumed_base_dtype=resumed_base_dtype, sampling=_sampling(tensors, workload, config, budget=budget))


def ladder(wished: StepConfig, blocks: Sequence[str], swaps: Sequence[tuple[str, ...]] = (), *,
           cuda: bool) -> Iterator[StepConfig]:
    """Ways to make a step, each for less memory than those before; `blocks` are to be checkpointed in this order, and each of
    `swaps` are blocks to be swapped together."""
    config = wished
    yield config
    for count in range(1, len(blocks) + 1):
        if not config.checkpointed.issuperset(blocks[:count]):
            config = dataclasses.replace(config, checkpointed=config.checkpointed | frozenset(blocks[:count]))
            yield config
    while config.microbatch > 1:
        config = dataclasses.replace(config, microbatch=-(-config.microbatch // 2))
        yield config
    for swapped in swaps:
        config = _with_swapped(config, swapped)
        yield config
    if cuda and not config.offload:
        yield dataclasses.replace(config, offload=True)
    if cuda and not wished.base_dtype:
        yield from ladder(_with_base_dtype(wished, "int8", cuda=cuda), blocks, swaps, cuda=cuda)


def installed_bytes() -> int:
    """The machine's memory, which a training without a GPU uses; 0 where it is not known."""
    try:
        import psutil  # the WebUI's; Python itself does not know it on Windows
    except ImportError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return psutil.virtual_memory().total


def gigabytes(size: float) -> str:
    """ "5.1" for a number of bytes."""
    return f"{size / GIGABYTE:.1f}"


def _with_base_dtype(config: StepConfig, dtype: BaseDtype, *, cuda: bool) -> StepConfig:
    """With the UNet's weights held in `dtype`; on a GPU the host's own are then moved to the CPU."""
    parts: frozenset[Part] = frozenset({"unet"}) if dtype and cuda else frozenset()
    return dataclasses.replace(config, base_dtype=dtype, parts_on_cpu=config.parts_on_cpu | parts)


def _with_swapped(config: StepConfig, swapped: tuple[str, ...]) -> StepConfig:
    """With the weights of these blocks on the CPU, where the host's UNet then is."""
    return dataclasses.replace(config, swapped=swapped, parts_on_cpu=config.parts_on_cpu | frozenset[Part]({"unet"}))


def _predicted(tensors: Mapping[str, Tensor], workload: Workload, blocks: Sequence[Block],
               config: StepConfig) -> dict[str, int]:
    """Bytes by kind at the highest moment of a step."""
    unet = unet_tensors(tensors)
    predicted = {_PARTS[part]: size for part, size in _sizes(tensors).items() if part not in config.parts_on_cpu}
    predicted["copies"] = weight_copies(unet, config) + _merged(workload, config)
    predicted["LoRA and optimiser"] = _lora_and_optimizer(workload)
    stem = unet["input_blocks.0.0.weight"]
    peak, kept = peak_bytes(blocks, images=config.microbatch, checkpointed=config.checkpointed, offload=config.offload,
                             composed=workload.composed,
                             casts=bool(config.base_dtype) or stem.dtype != workload.dtype)
    # AdamW makes two tensors of the weights' size where it is not one kernel: on a CPU before torch 2.4.
    moving = peak if workload.device_type == "cuda" else max(peak, 8 * workload.parameters)
    predicted["activations"] = min(moving, kept)
    predicted["working"] = moving - predicted["activations"]
    predicted["encoding"] = max(0, workload.encoded * vae_batches.encoding_bytes((workload.width, workload.height)) - moving)
    if workload.device_type == "cuda":
        predicted["fragments"] = int(FRAGMENTS * moving)
        predicted["context"] = CONTEXT + WORKSPACES
    return {kind: size for kind, size in predicted.items() if size}


def weight_copies(unet: Mapping[str, Tensor], config: StepConfig) -> int:
    """Bytes of the UNet's weights in another form, layout or place, beside or instead of the host's."""
    if config.base_dtype or config.swapped:
        held = {name: t.numel() + 4 * t.shape[0] if config.base_dtype and is_kernel(name, t.ndim) else size_of([t])
                for name, t in unet.items() if "unet" in config.parts_on_cpu or is_kernel(name, t.ndim)}
        swapped = dict.fromkeys(config.swapped, 0)
        for name in held if swapped else ():
            if block := block_of(name, unet[name].ndim, swapped):
                swapped[block] += held[name]
        return sum(held.values()) - sum(swapped.values()) + 2 * max(swapped.values(), default=0)
    return size_of(t for t in unet.values() if t.ndim == 4 and t.shape[2:].numel() > 1) if config.channels_last else 0


def _merged(workload: Workload, config: StepConfig) -> int:
    """Bytes of the weights that other LoRAs are merged into; in eight bits or with swapped blocks those take their place."""
    return 0 if config.base_dtype or config.swapped else workload.merged


def _before(tensors: Mapping[str, Tensor], workload: Workload) -> int:
    """The highest sum of bytes before the first step. On a GPU the VAE encodes an image, then the text encoders captions, each
    without the rest of the model where room is short; elsewhere the whole model is there."""
    parts, image = _sizes(tensors), 0 if workload.encoded else vae_batches.encoding_bytes((workload.width, workload.height))
    if workload.device_type != "cuda":
        return sum(parts.values()) + image + 4 * workload.parameters + workload.merged
    encoding = max(parts["vae"] + image, parts["text"] + text.encoding_bytes(workload.chunks))
    return encoding + 4 * workload.parameters + workload.merged + CONTEXT + WORKSPACES


def _sampling(tensors: Mapping[str, Tensor], workload: Workload, config: StepConfig, *, budget: int | None) -> int:
    """The highest sum of bytes between two steps, while the VAE decodes a sample; 0 where nothing is sampled. The UNet itself
    takes less of a sample than of a step. On a GPU the rest of the model leaves where room is short."""
    if workload.sampled is None:
        return 0
    parts, cuda = _sizes(tensors), workload.device_type == "cuda"
    away = config.parts_on_cpu - {"vae"}
    rest = sum(size for part, size in parts.items() if part != "vae" and part not in away)
    rest += weight_copies(unet_tensors(tensors), config) + _merged(workload, config)
    needed = (parts["vae"] + vae_batches.decoding_bytes(workload.sampled) + _lora_and_optimizer(workload)
              + (CONTEXT + WORKSPACES) * cuda)
    return needed + (rest if not cuda or budget is None or needed + rest <= budget else 0)


def _lora_and_optimizer(workload: Workload) -> int:
    """Bytes of weight and gradient in fp32, of the optimizer's state, and of copies of both in the dtype of the computation."""
    copy = 0 if workload.dtype == torch.float32 else 2 * workload.dtype.itemsize
    return int((8 + copy + workload.optimizer_bytes) * workload.parameters)


def _sizes(tensors: Mapping[str, Tensor]) -> dict[Part, int]:
    """Bytes of the model's parts; all that is neither UNet nor VAE counts as text encoders."""
    unet, vae = size_of(unet_tensors(tensors).values()), size_of(vae_tensors(tensors).values())
    return {"unet": unet, "vae": vae, "text": size_of(tensors.values()) - unet - vae}


def size_of(tensors: Iterable[Tensor]) -> int:
    """The bytes of these tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
