"""How a run fits into the memory there is: the step is rehearsed in one way after another, and the fastest that fits is taken.

From what costs nothing to what costs something, each only where what stands before it is not enough:

1. Convolutions' weights are copied into the layout that kernels like best; where there is no room, they are not.
2. Some of the UNet's units are computed again in backward instead of keeping what is inside: those that keep most for the
   least work first, and no more than it takes.
3. What is still kept waits in the CPU's memory.
4. A batch is computed in halves, quarters, …: the same gradients, in more time.
5. The model that is trained on is held in eight bits. It comes last because it changes what is learnt; then 2 to 4 anew.

Text encoders and VAE are set aside by the job as soon as they are not needed, whatever the plan. What is predicted is the
highest sum of bytes in use at any moment of a step. What cannot be seen by rehearsing is added as constants, below.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lib_lora_train.model.architecture import Architecture
from lib_lora_train.model.components import UNET_PREFIX
from lib_lora_train.model.text import CHUNK
from lib_lora_train.model.unet import UNet
from lib_lora_train.settings import MemorySettings
from lib_lora_train.training.ledger import AttentionKernel
from lib_lora_train.training.rehearsal import Base, Outcome, Part, Scene, Unit, Way, rehearse

GIGABYTE = 1 << 30
CONTEXT = 420 << 20
"""CUDA's context with torch's kernels, cuDNN and cuBLAS loaded; taken before anything is computed."""
WORKSPACES = 64 << 20
"""cuBLAS's workspaces (8 to 32 MiB for each stream that computes) and cuDNN's."""
RECORDINGS = 64 << 20
"""Lists of kernels and input buffers of recorded steps (CUDA graphs)."""
FRAGMENTS = 0.05
"""Share of activations and of what kernels take that the allocator loses between blocks."""
_ROOMY = 0.75
"""Share of the budget up to which it may be filled with a copy that is only for speed."""
_KERNEL = 2e8
"""Operations that a small kernel costs at least: it is there so that many small ones are not taken for nothing."""


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What the user has chosen. Where `plan` is set and there is a budget, the rest is the plan's to choose."""

    plan: bool = True
    recompute: bool = False
    offload: bool = False
    base: Base = ""
    channels_last: Literal["auto", "off", "on"] = "auto"
    cuda_graphs: bool = True

    @classmethod
    def of(cls, memory: MemorySettings) -> Wishes:
        """Those of a run's settings."""
        base = {"as they are": "", "int8": "int8", "fp8": "fp8"}[memory.base_weights]
        return cls(plan=memory.memory_plan == "auto", recompute=memory.gradient_checkpointing,
                   offload=memory.cpu_offload_checkpointing, base=base, channels_last=memory.channels_last,
                   cuda_graphs=memory.cuda_graphs == "auto")


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """How the run's steps are made, and what that takes.

    way          what was chosen; `way.batch` pictures are computed at once
    batch        pictures that the user wants in a batch
    predicted    bytes by kind at the highest moment of a step: the lender's parts, "copies" of ours, "LoRA and optimiser",
                 "inputs", "activations" that are kept for backward, "working" for what else comes and goes, "fragments" and
                 "context" of CUDA
    budget       bytes that may be taken; None where nobody said
    tried        (what, bytes) for each way that was rehearsed, in order
    operations, kernels   of `way.batch` pictures
    """

    way: Way
    batch: int
    predicted: Mapping[str, int]
    budget: int | None
    tried: tuple[tuple[str, int], ...]
    operations: float
    kernels: int
    units: tuple[str, ...]
    asked: Wishes

    @property
    def bytes(self) -> int:
        """All that is predicted."""
        return sum(self.predicted.values())

    @property
    def missing(self) -> int:
        """Bytes that the budget lacks, 0 where it suffices."""
        return max(0, self.bytes - self.budget) if self.budget is not None else 0

    @property
    def passes(self) -> int:
        """Parts that a batch is computed in."""
        return -(-self.batch // self.way.batch)

    @property
    def text(self) -> str:
        """One sentence: how much, and by what means."""
        of = "" if self.budget is None else f" of {gigabytes(self.budget)}"
        means = self._means() or ("nothing has to be given up for it" if self.budget is not None else "")
        return f"about {gigabytes(self.bytes)}{of} GB of memory" + (f": {means}" if means else "")

    @property
    def warning(self) -> str:
        """What the user should know before the start; "" for nothing."""
        if self.missing:
            return (f"The training needs about {gigabytes(self.bytes)} GB of memory, {gigabytes(self.missing)} more than there "
                    "is: it may fail or become very slow. A smaller resolution, rank or batch needs less.")
        if self.way.base and not self.asked.base:
            return (f"The model is held in eight bits ({self.way.base}) while it is trained on, because nothing else fits into "
                    f"{gigabytes(self.budget or 0)} GB: the LoRA learns beside weights that are a little off. A smaller "
                    "resolution or a larger memory budget avoids that.")
        return ""

    def _means(self) -> str:
        way, means = self.way, []
        if way.channels_last and not way.base:
            means.append("the convolutions' weights are laid out anew")
        if way.recompute:
            means.append("every block is computed twice" if way.recompute == frozenset(self.units) else
                         f"{len(way.recompute)} of {len(self.units)} parts of the UNet are computed twice")
        if way.offload:
            means.append("activations wait in ordinary memory")
        if way.batch < self.batch:
            means.append(f"each batch is computed in {self.passes} parts")
        if way.base:
            means.append(f"the UNet's weights are held in {way.base}")
        return ", ".join(means)


def gigabytes(size: float) -> str:
    """ "5.1" for a number of bytes."""
    return f"{size / GIGABYTE:.1f}"


def choose(tensors: Mapping[str, Tensor], architecture: Architecture, scene: Scene, *, batch: int, wishes: Wishes,
           budget: int | None = None, aside: frozenset[Part] = frozenset()) -> MemoryPlan:
    """The fastest way to make steps of `batch` pictures that fits into `budget` bytes; the smallest where none does.

    Of `tensors` (checkpoint names) only shapes and dtypes are used; `aside` are parts that will not lie on the device. The
    same step is rehearsed once only. Takes about a second for each ten thousand kernels that are rehearsed.
    """
    return _Search(tensors, architecture, scene, batch, wishes, budget, aside).plan()


def budget_of(wanted: float, device: torch.device, *, ours: int) -> int | None:
    """Bytes that all of a run may take: `wanted` GB (0 for as much as there is), and on a card no more than there is.

    `ours` are bytes on the card already that the plan counts too: the lender's model, the LoRA. None without a card, where
    nothing was wanted. A card is asked for its free memory, which waits for nothing.
    """
    asked = int(wanted * GIGABYTE) or None
    if device.type != "cuda":
        return asked
    free, _ = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    there = free + reserved - allocated + min(allocated, ours) + CONTEXT
    there -= there % (GIGABYTE // 4)  # a little less from time to time is no other question
    return there if asked is None else min(asked, there)


def largest(buckets: Iterable[tuple[tuple[int, int], int]]) -> tuple[int, int]:
    """(width, height) of the bucket that needs the most memory, of ((width, height), pictures)."""
    return max((size for size, _ in buckets), key=lambda size: (size[0] * size[1], size))


def chunks_of(captions: Iterable[str]) -> int:
    """Chunks of 75 tokens that the longest of the captions takes, without reading it word for word: about four tokens for
    three words or marks."""
    longest = max(captions, key=len, default="")
    return 1 + len(re.findall(r"\w+|[^\w\s]", longest)) * 4 // 3 // CHUNK


def attention_kernel(device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """What torch's attention is on this device: whether it keeps the whole map."""
    if device.type != "cuda":
        return "fused" if device.type == "cpu" else "math"
    capability = torch.cuda.get_device_capability(device)
    flash = torch.backends.cuda.flash_sdp_enabled() and capability >= (8, 0) and dtype != torch.float32
    efficient = torch.backends.cuda.mem_efficient_sdp_enabled() and capability >= (5, 3)
    return "fused" if flash or efficient else "math"


class _Search:
    """One search: `tried` remembers every way that was rehearsed."""

    def __init__(self, tensors: Mapping[str, Tensor], architecture: Architecture, scene: Scene, batch: int, wishes: Wishes,
                 budget: int | None, aside: frozenset[Part]) -> None:
        self._tensors, self._architecture, self._scene = tensors, architecture, scene
        self._batch, self._wishes, self._budget, self._aside = batch, wishes, budget, aside
        self._blocks = units_of(architecture)
        self._every = frozenset(unit for unit in self._blocks if _outer(unit, self._blocks) is None)
        self._shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        self._outcomes: dict[Way, Outcome] = {}

    def plan(self) -> MemoryPlan:
        """The first way that fits."""
        wishes, best = self._wishes, None
        if not wishes.plan or self._budget is None:
            return self._made(self._way(batch=self._batch, base=wishes.base, offload=wishes.offload,
                                        channels_last=wishes.channels_last == "on"))
        for way in self._ways():
            if self._fits(way):
                return self._made(way)
            if best is None or self._bytes(way) < self._bytes(best):
                best = way
        assert best is not None, "there is always a way"
        return self._made(best)

    def _ways(self) -> Iterator[Way]:
        """From the fastest on; each is rehearsed by whoever asks for the next.

        On the CPU nothing can be put off the device, and eight bits would lie beside the lender's weights.
        """
        wishes, cuda = self._wishes, self._scene.device_type == "cuda"
        for base in dict.fromkeys((wishes.base, wishes.base or ("int8" if cuda else ""))):
            batch = self._batch
            while True:
                for offload in dict.fromkeys((wishes.offload, wishes.offload or cuda)):
                    yield from self._recomputing(base, batch, offload)
                if batch == 1:
                    break
                batch = -(-batch // 2)

    def _recomputing(self, base: Base, batch: int, offload: bool) -> Iterator[Way]:
        """From recomputing nothing to recomputing everything."""
        wishes = self._wishes
        layout = wishes.channels_last == "on" or bool(base) and wishes.channels_last == "auto"
        least = self._way(base=base, batch=batch, offload=offload, channels_last=layout, recompute=self._every)
        if wishes.recompute or offload:  # what would fill the memory goes off the device anyway
            yield least
            return
        free = self._way(base=base, batch=batch, offload=offload, channels_last=layout)
        if batch < self._batch and not self._fits(least):  # no need to look at what takes more
            yield least
            return
        if wishes.channels_last == "auto" and not layout and self._roomy(free):
            yield dataclasses.replace(free, channels_last=True)
        yield free
        if self._fits(least):
            yield from self._greedy(free)
        yield least

    def _roomy(self, way: Way) -> bool:
        """Whether there is room for a copy of the convolutions' weights, and for others beside."""
        kernels = [t for name, t in self._tensors.items()
                   if name.startswith(UNET_PREFIX) and t.ndim == 4 and t.shape[2:].numel() > 1]
        copies = sum(t.numel() * t.element_size() for t in kernels)
        return self._scene.device_type == "cuda" and self._bytes(way) + copies <= _ROOMY * self._budget

    def _greedy(self, free: Way) -> Iterator[Way]:
        """The units that keep most for the least work, as many as it takes; `free` is the way without any."""
        wanted = (self._bytes(free) - self._budget) * 1.02
        while True:
            chosen, gained = chosen_units(self._outcomes[free].units, wanted)
            way = dataclasses.replace(free, recompute=chosen)
            yield way
            if chosen == self._every:
                return
            # What is recomputed needs room in backward: more than the sum of what is no longer kept.
            wanted = gained + max(self._bytes(way) - self._budget, 0.02 * self._bytes(free))

    def _way(self, *, batch: int, base: Base, offload: bool, recompute: frozenset[str] = frozenset(),
             channels_last: bool | None = None) -> Way:
        wishes = self._wishes
        layout = wishes.channels_last == "on" if channels_last is None else channels_last
        cuda = self._scene.device_type == "cuda"
        return Way(batch=batch, recompute=self._every if wishes.recompute else recompute, offload=offload and cuda, base=base,
                   channels_last=layout, aside=self._aside | ({"unet"} if base and cuda else frozenset()))

    def _bytes(self, way: Way) -> int:
        return sum(self._predicted(way).values())

    def _fits(self, way: Way) -> bool:
        return self._budget is None or self._bytes(way) <= self._budget

    def _predicted(self, way: Way) -> dict[str, int]:
        outcome = self._outcomes.get(way)
        if outcome is None:
            outcome = self._outcomes[way] = self._rehearsed(way)
        predicted, cuda = dict(outcome.peak), self._scene.device_type == "cuda"
        moving = predicted.pop("activations", 0) + predicted.pop("working", 0)
        predicted["activations"] = min(moving, outcome.kept.get("activations", 0))
        predicted["working"] = moving - predicted["activations"]
        if cuda:
            predicted["fragments"] = int(FRAGMENTS * moving)
            predicted["context"] = CONTEXT + WORKSPACES + (RECORDINGS if self._wishes.cuda_graphs and not way.offload else 0)
        return {kind: size for kind, size in predicted.items() if size}

    def _rehearsed(self, way: Way) -> Outcome:
        key = (self._shapes, self._architecture, self._scene, way)
        outcome = _OUTCOMES.get(key)
        if outcome is None:
            outcome = rehearse(self._tensors, self._architecture, self._scene, way)
            if len(_OUTCOMES) >= _MOST_OUTCOMES:
                _OUTCOMES.clear()
            _OUTCOMES[key] = outcome
        return outcome

    def _made(self, way: Way) -> MemoryPlan:
        predicted, outcome = self._predicted(way), self._outcomes[way]
        return MemoryPlan(
            way=way, batch=self._batch, predicted=predicted, budget=self._budget,
            tried=tuple((_named(tried, self._every), self._bytes(tried)) for tried in self._outcomes),
            operations=outcome.operations, kernels=outcome.kernels, units=tuple(sorted(self._every)), asked=self._wishes)


def units_of(architecture: Architecture) -> tuple[str, ...]:
    """The UNet's units, which are known without its tensors."""
    return UNet({}, architecture.unet).units


def _outer(unit: str, units: Collection[str]) -> str | None:
    """The unit in which this one lies."""
    block = unit.rpartition(".")[0]
    return block if block in units else None


def chosen_units(units: Sequence[Unit], wanted: float) -> tuple[frozenset[str], int]:
    """Units to recompute so that `wanted` bytes are no longer kept: those that keep most for the least work first. And what
    they keep in all. A block stands for all that is inside it."""
    by_name = {unit.name: unit for unit in units}
    inside: dict[str, list[str]] = {}
    for name in by_name:
        block = _outer(name, by_name)
        if block is not None:
            inside.setdefault(block, []).append(name)
    chosen: set[str] = set()
    gained = 0
    for unit in sorted(units, key=lambda unit: unit.kept / (unit.operations + unit.kernels * _KERNEL), reverse=True):
        if gained >= wanted:
            break
        if _outer(unit.name, by_name) in chosen or not unit.kept:
            continue
        replaced = chosen.intersection(inside.get(unit.name, ()))
        chosen -= replaced
        chosen.add(unit.name)
        gained += unit.kept - sum(by_name[name].kept for name in replaced)
    if gained < wanted:
        chosen = {name for name in by_name if _outer(name, by_name) is None}
    return frozenset(chosen), gained


def _named(way: Way, every: frozenset[str]) -> str:
    parts = [f"batch {way.batch}"]
    if way.recompute:
        parts.append("every block recomputed" if way.recompute == every else f"{len(way.recompute)} units recomputed")
    if way.offload:
        parts.append("offloaded")
    if way.base:
        parts.append(way.base)
    if way.channels_last:
        parts.append("channels last")
    return ", ".join(parts)


# The page asks again at every change, mostly of something that does not matter to it, and the run asks what the page asked.
_OUTCOMES: dict[Any, Outcome] = {}
_MOST_OUTCOMES = 64
