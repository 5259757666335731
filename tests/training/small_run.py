"""The training loop on small random models of each family and batches made up here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import pytest
import torch

from lib_lora_train import events
from lib_lora_train.adapters.base import AdapterKind
from lib_lora_train.adapters.dropout import DropoutRates
from lib_lora_train.adapters.network import DEFAULT_KIND, AdapterNetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.distributed import SINGLE_PROCESS, ProcessGroup
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.inputs.text import TextCache
from lib_lora_train.memory.step_config import StepConfig
from lib_lora_train.model import frozen
from lib_lora_train.model.architecture import Hints
from lib_lora_train.training.checkpoint import TrainingState
from lib_lora_train.training.condition import CachedText, TrainedText
from lib_lora_train.training.loop import Progress, TrainConfig, train
from lib_lora_train.training.loss import LossConfig, LossFunction, mse
from lib_lora_train.training.noise import NoiseConfig
from lib_lora_train.training.optimizer_kinds import Traits
from lib_lora_train.training.optimizers import OptimizerConfig
from lib_lora_train.training.schedules import ScheduleConfig
from lib_lora_train.training.weight_norms import ScaleWeightNorms
from tests.model import small_checkpoints
from tools import tiny_checkpoint

SQUARE, WIDE = (8, 8), (8, 16)


@dataclasses.dataclass(frozen=True)
class Sgd:
    """An optimizer as docs/architecture.md adds one; not `accepts_flat`: it is given each weight by itself."""

    accepts_flat: bool
    class_name = "torch.optim.sgd.SGD"

    def traits(self, arguments):
        return Traits(accepts_flat=self.accepts_flat)

    def check(self, arguments):
        pass

    def build(self, groups, *, arguments, pairs=()):
        return torch.optim.SGD(groups, **arguments)


OWN = {"sd1": tiny_checkpoint.SHALLOW, "sd1 of four levels": tiny_checkpoint.SMALLEST}


def tensors(family: str) -> dict[str, torch.Tensor]:
    """A checkpoint of the caller's own: of SD1 by `tiny_checkpoint`, else by other people's code."""
    if family in OWN:
        return tiny_checkpoint.tensors(vocabulary=small_checkpoints.VOCABULARY, size=OWN[family])
    return {name: tensor.detach() for name, tensor in small_checkpoints.checkpoint(family).items()}


def built(family: str, lent: dict[str, torch.Tensor]) -> frozen.FrozenModel:
    hints = Hints(unet_heads=4, text_heads=(2,)) if family in OWN else small_checkpoints.HINTS[family]
    return frozen.build(lent, hints=hints, tokenizers=small_checkpoints.tokenizers(family.split()[0]))


@functools.lru_cache(maxsize=4)
def model(family: str, device: str = "cpu") -> frozen.FrozenModel:
    return built(family, {name: tensor.to(device) for name, tensor in tensors(family).items()})


def batch(number: int, *, rows: int = 1, shape: tuple[int, int] = SQUARE, caption: str = "a cat") -> Batch:
    """Random latents [rows, 4, *shape]; sizes, crops and weights differ from row to row."""
    generator = torch.Generator().manual_seed(number)
    row = torch.arange(rows)[:, None]
    sizes = torch.cat([torch.tensor([[70, 64]]) + row, row * torch.tensor([[1, 2]]),
                       8 * torch.tensor([shape]).expand(rows, 2)], dim=1)
    return Batch({
        "mean": torch.randn(rows, 4, *shape, generator=generator), "std": torch.rand(rows, 4, *shape, generator=generator),
        "loss_weight": 1 / (1 + row[:, 0].float()), "sizes": sizes.float()}, tuple(f"{caption} {i}" for i in range(rows)))


@dataclasses.dataclass
class Result:
    """What a run said and left."""

    network: AdapterNetwork
    seen: list[events.Event]
    steps: int
    state: TrainingState | None

    @property
    def losses(self) -> list[float]:
        return [event.loss for event in self.seen if isinstance(event, events.Step)]

    @property
    def skipped(self) -> list[bool]:
        return [event.skipped for event in self.seen if isinstance(event, events.Step)]

    @property
    def warnings(self) -> list[str]:
        return [event.message for event in self.seen if isinstance(event, events.Warned)]

    def learnt(self) -> torch.Tensor:
        """All that was zero at the beginning."""
        return torch.cat([layer.up.detach().flatten() for layer in self.network.layers.values()])


def assert_equal(one: Result, other: Result, *, rtol: float = 1e-4, learnt: float = 0.05) -> None:
    """The same steps with the same losses, and the same learnt, but for the order in which numbers were added.

    AdamW divides by the gradient's own size, so that a weight whose gradient is next to nothing (there are many in models as
    small as these) follows its rounding error: what is learnt agrees less closely than the losses.
    """
    assert one.steps == other.steps and one.skipped == other.skipped
    assert one.losses == pytest.approx(other.losses, rel=rtol), (one.losses, other.losses)
    assert other.learnt().any() and (one.learnt() - other.learnt()).norm() < learnt * other.learnt().norm()


class Watching:
    """A callback that calls `before` in front of each step and keeps the training's progress."""

    progress: Progress | None = None

    def __init__(self, before: Callable[[Progress], bool]) -> None:
        self._before = before

    def before_step(self, progress: Progress) -> bool:
        self.progress = progress
        return self._before(progress)

    def after_step(self, progress: Progress) -> None:
        assert progress is self.progress


def run(family: str, batches: Sequence[Batch], *, accumulation: int = 1, text: bool = False, dtype: torch.dtype = torch.float32,
        min_snr: float = 0.0, device: str = "cpu", before_step: Callable[[Progress], bool] = lambda progress: True,
        group: ProcessGroup = SINGLE_PROCESS, graphs: bool = False, compiled: bool = False, learning_rate: float = 1e-3,
        checkpointing: bool = False, microbatch: int = 64, optimizer: str = "AdamW", loss: LossFunction = mse,
        dropout: DropoutRates | None = None, largest_norm: float = 0.0, kind: AdapterKind = DEFAULT_KIND,
        resumed: TrainingState | None = None) -> Result:
    """Train on `batches` in order. Text encoders are trained with `text`, else their answers are looked up."""
    frozen_model = model(family, device)
    targets = find_targets(frozen_model.components, family=frozen_model.architecture.family, text_encoder=text)
    if resumed is None:
        network = AdapterNetwork.build(targets, rank=2, alpha=2, seed=0, kind=kind).to(device)
        network.begin_at(frozen_model.components, network.layers)
    else:
        network = AdapterNetwork.continued(targets, resumed.lora, seed=0).to(device)
    network.dropout = dropout or network.dropout
    adapters = {name: layers for name, layers in network.training_adapters().items() if name != "unet"}
    norms = [ScaleWeightNorms(network, largest_norm)] if largest_norm else []
    condition = TrainedText(frozen_model.text, clip_skip=1, adapters=adapters, checkpointing=checkpointing, dtype=dtype) \
        if text else CachedText(TextCache(frozen_model.text))
    steps = -(-len(batches) // accumulation)
    config = TrainConfig(
        steps=steps, epochs=1, steps_per_epoch=steps, accumulation=accumulation,
        optimizer=OptimizerConfig(optimizer, {"weight_decay": 0.01}), noise=NoiseConfig(noise_offset=0.05),
        schedule=ScheduleConfig("cosine", steps=steps, warmup=2), unet_lr=learning_rate,
        text_encoder_lr=learning_rate / 2 if text else 0.0, seed=3, cuda_graphs=graphs, compiled=compiled,
        loss=LossConfig(dtype=dtype, min_snr_gamma=min_snr, function=loss),
        step=StepConfig(microbatch=microbatch,
                        checkpointed=frozenset(frozen_model.unet.checkpointable if checkpointing else ())))
    seen: list[events.Event] = []
    progress = train(frozen_model, network=network, epoch_batches=lambda epoch, start: batches[start:], condition=condition,
                     config=config, report=seen.append, callbacks=[Watching(before_step), *norms], group=group,
                     resumed=resumed)
    for each in norms:
        each.tell(seen.append)
    return Result(network, seen, progress.step, progress.snapshot())
