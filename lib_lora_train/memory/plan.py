"""How a run fits into the memory there is: the step is rehearsed in one way after another, and of those that fit the one that
costs the least time is taken.

1. Convolutions' weights are copied into the layout that kernels like best; where there is no room, they are not.
2. Where that does not fit, some of the UNet's units are computed again in backward instead of keeping what is inside: those
   that keep most for the least work first, and no more than it takes. Or a batch is computed in halves, quarters, …: the
   same gradients from more kernels. Or both; what costs fewer operations, each kernel counted as some, is taken.
3. Only where that is not enough, what is still kept waits in the CPU's memory.
4. Only where nothing else fits, the model that is trained on is held in eight bits, because that changes what is learnt; then
   2 and 3 anew.

Text encoders and VAE are set aside by the job as soon as they are not needed, whatever the plan. What is predicted is the
highest sum of bytes in use at any moment of a step, and beside it that before the first step. What cannot be seen by
rehearsing is added as constants, below. Not counted: what convolutions on a processor take for themselves (columns, tiles).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from lib_lora_train.dataset.progress import ShouldStop
from lib_lora_train.errors import Interrupted
from lib_lora_train.inputs.vae_batches import encoding_bytes
from lib_lora_train.memory.dry_run import Base, Outcome, Part, Scene, Unit, Way, rehearse
from lib_lora_train.model.architecture import Architecture
from lib_lora_train.model.sd.components import UNET_PREFIX, vae_tensors
from lib_lora_train.model.sd.unet import UNet
from lib_lora_train.settings import MemorySettings
from lib_lora_train.training.cuda_graph import MOST_SHAPES

GIGABYTE = 1 << 30
CONTEXT = 420 << 20
"""CUDA's context with torch's kernels, cuDNN and cuBLAS loaded; taken before anything is computed."""
WORKSPACES = 64 << 20
"""cuBLAS's workspaces (8 to 32 MiB for each stream that computes) and cuDNN's."""
RECORDED_KERNEL = 1536
"""A kernel in a recorded step (a node of a CUDA graph: its arguments, and its place in memory and in the driver's lists): an
assumption. Each shape of inputs has a recording."""
FRAGMENTS = 0.05
"""Share of activations and of what kernels take that the allocator loses between blocks."""
_ROOMY = 0.75
"""Share of the budget up to which it may be filled with a copy that is only for speed."""
_KERNEL, _LAUNCHED, _ON_A_PROCESSOR = 2e8, 8e8, 2e6
"""Operations that could be made in the time that a kernel costs at least: replayed, launched one by one, on a processor. They
are there so that many small ones are not taken for nothing."""


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
                 "inputs", "activations" that are kept for backward, "working" for what else comes and goes, "encoding" by the
                 VAE where latents are not cached, "fragments", "context" and "recordings" of CUDA
    before       bytes at the highest moment before the first step
    budget       bytes that may be taken; None where nobody said
    operations, kernels   of `way.batch` pictures; `again` are those of the operations that are made a second time
    recorded     whether steps may be CUDA graphs
    remembered   what a run that goes on has held the model in; the user did not ask for it
    """

    way: Way
    batch: int
    predicted: Mapping[str, int]
    before: int
    budget: int | None
    operations: float
    again: float
    kernels: int
    recorded: bool
    units: tuple[str, ...]
    asked: Wishes
    remembered: Base = ""

    @property
    def bytes(self) -> int:
        """All that is predicted of a step."""
        return sum(self.predicted.values())

    @property
    def missing(self) -> int:
        """Bytes that the budget lacks in a step, 0 where it suffices."""
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
        return f"about {gigabytes(max(self.bytes, self.before))}{of} GB of memory" + (f": {means}" if means else "")

    @property
    def warning(self) -> str:
        """What the user should know before the start; "" for nothing."""
        said, budget = [], self.budget or 0
        if self.missing:
            said.append(f"The training needs about {gigabytes(self.bytes)} GB of memory, {_lack(self.missing)} more than there "
                        "is: it may fail or become very slow. A smaller resolution, rank or batch needs less"
                        f"{'' if self.asked.plan else ', and memory_plan = auto looks for a way that fits'}.")
        elif self.budget is not None and self.before > budget:
            said.append("Before the first step, while all of the model is lent and its pictures are encoded, about "
                        f"{gigabytes(self.before)} GB of memory are taken, {_lack(self.before - budget)} too much: it may fail "
                        "or become very slow there. The steps fit.")
        if self.way.base and not self.asked.base:
            said.append(
                f"The run goes on with the model held in {self.way.base}, as its memory plan had chosen when it began."
                if self.remembered else
                f"The model is held in eight bits ({self.way.base}) while it is trained on, because nothing else fits into "
                f"{gigabytes(budget)} GB: the LoRA learns beside weights that are a little off. A smaller resolution or a "
                "larger memory budget avoids that.")
        return " ".join(said)

    def _means(self) -> str:
        way, means = self.way, []
        if way.channels_last and not way.base:
            means.append("the convolutions' weights are laid out anew")
        if way.recompute:
            share = self.again / (self.operations - self.again)
            means.append("every block is computed twice" if way.recompute == frozenset(self.units) else
                         f"{max(1, round(100 * share))} % of a step's work is done twice")
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


def _lack(size: int) -> str:
    """As `gigabytes`, rounded up."""
    return gigabytes(math.ceil(10 * size / GIGABYTE) * GIGABYTE / 10)


def choose(tensors: Mapping[str, Tensor], architecture: Architecture, scene: Scene, *, batch: int, wishes: Wishes,
           budget: int | None = None, aside: frozenset[Part] = frozenset(), remembered: Base = "",
           should_stop: ShouldStop | None = None) -> MemoryPlan:
    """The fastest way to make steps of `batch` pictures that fits into `budget` bytes; the smallest where none does.

    Of `tensors` (checkpoint names) only shapes and dtypes are used; `aside` are parts that will not lie on the device;
    `remembered` is what a run that goes on has held the model in. The same step is rehearsed once only. Takes about a second
    for each ten thousand kernels that are rehearsed; raises Interrupted where `should_stop()` says so before one.
    """
    return _Search(tensors, architecture, scene, batch, wishes, budget, aside, remembered, should_stop).plan()


class _Search:
    """One search: what was rehearsed is remembered."""

    def __init__(self, tensors: Mapping[str, Tensor], architecture: Architecture, scene: Scene, batch: int, wishes: Wishes,
                 budget: int | None, aside: frozenset[Part], remembered: Base, should_stop: ShouldStop | None) -> None:
        self._tensors, self._architecture, self._scene = tensors, architecture, scene
        self._batch, self._wishes, self._budget, self._aside = batch, wishes, budget, aside
        self._remembered, self._should_stop = remembered, should_stop
        self._cuda, self._chooses = scene.device_type == "cuda", wishes.plan and budget is not None
        self._blocks = units_of(architecture)
        self._every = frozenset(unit for unit in self._blocks if _outer(unit, self._blocks) is None)
        self._shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        self._outcomes: dict[Way, Outcome] = {}

    def plan(self) -> MemoryPlan:
        """The fastest way that fits; the smallest where none does, which takes a few rehearsals only.

        On the CPU nothing can be put off the device, and eight bits would lie beside the lender's weights.
        """
        wishes, least = self._wishes, None
        wanted = wishes.base or self._remembered
        if not self._chooses:
            return self._made(self._way(base=wanted, batch=self._batch, offload=wishes.offload))
        for base in dict.fromkeys((wanted, wanted or ("int8" if self._cuda else ""))):
            way = self._as_it_is(base, self._batch, wishes.offload)
            if way is not None:
                return self._made(way)
            least = self._way(base=base, batch=1, offload=True, recompute=self._every)
            if self._fits(least):
                return self._made(self._fastest(base))
        assert least is not None, "there is always a way"
        return self._made(least)

    def _fastest(self, base: Base) -> Way:
        """Of the ways on this base the one that costs least; the smallest of them fits."""
        for offload in dict.fromkeys((self._wishes.offload, True)):
            best, batch = None, self._batch
            while True:
                way = self._fitting(base, batch, offload)
                if way is not None and (best is None or self._cost(way) < self._cost(best)):
                    best = way
                half = -(-batch // 2)
                if batch == 1 or best is not None and self._least_cost(best, half) >= self._cost(best):
                    break
                batch = half
            if best is not None:
                return best
        raise AssertionError("the smallest way fits")

    def _fitting(self, base: Base, batch: int, offload: bool) -> Way | None:
        """So many pictures at once, and as much computed again as it takes: all of it where `offload` is not wished but
        needed."""
        least = self._way(base=base, batch=batch, offload=offload, recompute=self._every)
        if offload and not self._wishes.offload:
            return least if self._fits(least) else None
        way = self._as_it_is(base, batch, offload)
        if way is not None or not self._fits(least):
            return way
        free = self._way(base=base, batch=batch, offload=offload)
        return next(way for way in self._greedy(free) if self._fits(way))

    def _as_it_is(self, base: Base, batch: int, offload: bool) -> Way | None:
        """Nothing computed again but what is wished; None where that does not fit."""
        way = self._way(base=base, batch=batch, offload=offload)
        if self._wishes.channels_last == "auto" and not way.channels_last and self._roomy(way):
            return dataclasses.replace(way, channels_last=True)
        return way if self._fits(way) else None

    def _roomy(self, way: Way) -> bool:
        """Whether there is room for a copy of the convolutions' weights, and for others beside."""
        kernels = [t for name, t in self._tensors.items()
                   if name.startswith(UNET_PREFIX) and t.ndim == 4 and t.shape[2:].numel() > 1]
        return self._cuda and self._bytes(way) + _size(kernels) <= _ROOMY * self._budget

    def _greedy(self, free: Way) -> Iterator[Way]:
        """The units that keep most for the least work, as many as it takes, in the end all; `free` is the way without any."""
        wanted = (self._bytes(free) - self._budget) * 1.02
        while True:
            chosen, gained = chosen_units(self._outcome(free).units, wanted)
            way = dataclasses.replace(free, recompute=free.recompute | chosen)
            yield way
            if chosen == self._every:
                return
            # What is recomputed needs room in backward: more than the sum of what is no longer kept.
            wanted = gained + max(self._bytes(way) - self._budget, 0.02 * self._bytes(free))

    def _way(self, *, batch: int, base: Base, offload: bool, recompute: frozenset[str] = frozenset()) -> Way:
        wishes = self._wishes
        layout = wishes.channels_last == "on" or self._chooses and bool(base) and wishes.channels_last == "auto"
        return Way(batch=batch, recompute=self._every if wishes.recompute else recompute, offload=offload and self._cuda,
                   base=base, channels_last=layout,
                   aside=self._aside | ({"unet"} if base and self._cuda else frozenset()))

    def _cost(self, way: Way) -> float:
        """Time of all of a batch, in operations."""
        outcome = self._outcome(way)
        return -(-self._batch // way.batch) * (outcome.operations + outcome.kernels * self._kernel(way))

    def _least_cost(self, way: Way, batch: int) -> float:
        """What `way` would cost at least with `batch` pictures at once and nothing computed again; not rehearsed."""
        outcome = self._outcome(way)
        operations = (outcome.operations - outcome.again) * batch / way.batch
        kernels = outcome.kernels * (outcome.operations - outcome.again) / outcome.operations
        return -(-self._batch // batch) * (operations + kernels * self._kernel(way))

    def _kernel(self, way: Way) -> float:
        return (_KERNEL if self._recorded(way) else _LAUNCHED) if self._cuda else _ON_A_PROCESSOR

    def _recorded(self, way: Way) -> bool:
        return self._cuda and self._wishes.cuda_graphs and not way.offload and not self._scene.encoded

    def _bytes(self, way: Way) -> int:
        return sum(self._predicted(way).values())

    def _fits(self, way: Way) -> bool:
        return self._budget is None or self._bytes(way) <= self._budget

    def _predicted(self, way: Way) -> dict[str, int]:
        outcome, scene = self._outcome(way), self._scene
        predicted = dict(outcome.peak)
        moving = predicted.pop("activations", 0) + predicted.pop("working", 0)
        predicted["activations"] = min(moving, outcome.kept.get("activations", 0))
        predicted["working"] = moving - predicted["activations"]
        # What the VAE took is there for the step that follows: such steps are not recorded.
        predicted["encoding"] = max(0, scene.encoded * encoding_bytes((scene.width, scene.height)) - moving)
        if self._cuda:
            predicted["fragments"] = int(FRAGMENTS * moving)
            predicted["context"] = CONTEXT + WORKSPACES
        if self._recorded(way):
            predicted["recordings"] = outcome.kernels * RECORDED_KERNEL * min(scene.shapes, MOST_SHAPES)
        return {kind: size for kind, size in predicted.items() if size}

    def _before(self) -> int:
        """The highest sum of bytes before the first step: when all of the model is lent, or when its VAE encodes a picture and
        the other parts wait off the card."""
        scene = self._scene
        lent, vae = _size(self._tensors.values()), _size(vae_tensors(self._tensors).values())
        encoding = (vae if self._cuda else lent) + (0 if scene.encoded else encoding_bytes((scene.width, scene.height)))
        return max(lent, encoding) + 4 * scene.weights + (CONTEXT + WORKSPACES if self._cuda else 0)

    def _outcome(self, way: Way) -> Outcome:
        if way not in self._outcomes:
            # Neither matters to the rehearsal.
            scene = dataclasses.replace(self._scene, shapes=1, encoded=0)
            key = (self._shapes, self._architecture, scene, way)
            outcome = _OUTCOMES.get(key)
            if outcome is None:
                if self._should_stop is not None and self._should_stop():
                    raise Interrupted("It was stopped while the memory was planned")
                outcome = rehearse(self._tensors, self._architecture, scene, way)
                if len(_OUTCOMES) >= _MOST_OUTCOMES:
                    _OUTCOMES.clear()
                _OUTCOMES[key] = outcome
            self._outcomes[way] = outcome
        return self._outcomes[way]

    def _made(self, way: Way) -> MemoryPlan:
        predicted, outcome = self._predicted(way), self._outcome(way)
        return MemoryPlan(
            way=way, batch=self._batch, predicted=predicted, before=self._before(), budget=self._budget,
            operations=outcome.operations, again=outcome.again, kernels=outcome.kernels, recorded=self._recorded(way),
            units=tuple(sorted(self._every)), asked=self._wishes, remembered=self._remembered)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def units_of(architecture: Architecture) -> tuple[str, ...]:
    """The UNet's units, which are known without its tensors."""
    return UNet({}, architecture.unet).checkpointable


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


# The page asks again at every change, mostly of something that does not matter to it, and the run asks what the page asked.
_OUTCOMES: dict[Any, Outcome] = {}
_MOST_OUTCOMES = 64
