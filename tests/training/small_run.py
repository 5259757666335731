"""The training loop on small random models of each family and batches made up here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import pytest
import torch

from lib_lora_train import events
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.adapters.targets import find_targets
from lib_lora_train.distributed import SINGLE_PROCESS
from lib_lora_train.inputs.batches import Batch
from lib_lora_train.inputs.text import TextCache
from lib_lora_train.model import frozen
from lib_lora_train.model.architecture import Hints
from lib_lora_train.training.checkpoint import TrainingState
from lib_lora_train.training.condition import CachedText, TrainedText
from lib_lora_train.training.loop import LoopOptions, train
from lib_lora_train.training.step import StepOptions
from tests.model import small_checkpoints
from tools import tiny_checkpoint

SQUARE, WIDE = (8, 8), (8, 16)


def tensors(family: str) -> dict[str, torch.Tensor]:
    """A checkpoint of the caller's own: the smallest where the family is SD1, else other people's code."""
    if family == "sd1":
        return tiny_checkpoint.tensors(vocabulary=small_checkpoints.VOCABULARY, size=tiny_checkpoint.SMALLEST)
    return {name: tensor.detach() for name, tensor in small_checkpoints.checkpoint(family).items()}


def built(family: str, lent: dict[str, torch.Tensor]) -> frozen.FrozenModel:
    hints = Hints(unet_heads=4, text_heads=(2,)) if family == "sd1" else small_checkpoints.HINTS[family]
    return frozen.build(lent, hints=hints, tokenizers=small_checkpoints.tokenizers(family))


@functools.lru_cache(maxsize=4)
def model(family: str, device: str = "cpu") -> frozen.FrozenModel:
    return built(family, {name: tensor.to(device) for name, tensor in tensors(family).items()})


def batch(number: int, *, rows: int = 1, shape: tuple[int, int] = SQUARE, caption: str = "a cat") -> Batch:
    """Random latents [rows, 4, *shape]; sizes, crops and weights differ from row to row."""
    generator = torch.Generator().manual_seed(number)
    row = torch.arange(rows)[:, None]
    return Batch(
        indices=tuple(range(rows)), mean=torch.randn(rows, 4, *shape, generator=generator),
        std=torch.rand(rows, 4, *shape, generator=generator), captions=tuple(f"{caption} {i}" for i in range(rows)),
        loss_weight=1 / (1 + row[:, 0].float()), original_size=torch.tensor([[70, 64]]) + row,
        crop=row * torch.tensor([[1, 2]]), target_size=8 * torch.tensor([shape]).expand(rows, 2))


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


def run(family: str, batches: Sequence[Batch], *, accumulation: int = 1, text: bool = False, dtype: torch.dtype = torch.float32,
        min_snr: float = 0.0, device: str = "cpu", pause=lambda release: True, ranks=SINGLE_PROCESS, graphs: bool = True,
        compiled: bool = False, learning_rate: float = 1e-3, checkpointing: bool = False) -> Result:
    """Train on `batches` in order. Text encoders are trained with `text`, else their answers are looked up."""
    frozen_model = model(family, device)
    targets = find_targets(frozen_model.components, family=frozen_model.architecture.family, text_encoder=text)
    network = AdapterNetwork.build(targets, rank=2, alpha=2, seed=0).to(device)
    adapters = {name: layers for name, layers in network.adapters().items() if name != "unet"}
    condition = TrainedText(frozen_model.text, clip_skip=1, adapters=adapters, checkpointing=checkpointing, dtype=dtype) \
        if text else CachedText(TextCache(frozen_model.text))
    steps = -(-len(batches) // accumulation)
    options = LoopOptions(
        steps=steps, epochs=1, steps_per_epoch=steps, accumulation=accumulation, schedule="cosine", warmup=2, cycles=1,
        weight_decay=0.01, max_grad_norm=1.0, noise_offset=0.05, unet_lr=learning_rate,
        text_encoder_lr=learning_rate / 2 if text else 0.0, seed=3, save_every_n_epochs=0, save_every_n_steps=0,
        cuda_graphs=graphs, compiled=compiled,
        step=StepOptions(dtype=dtype, min_snr_gamma=min_snr,
                         recompute=frozenset(frozen_model.unet.checkpointable if checkpointing else ())))
    seen: list[events.Event] = []
    kept: list = [lambda: None]
    made = train(frozen_model, network=network, epoch_batches=lambda epoch, start: batches[start:], condition=condition,
                 options=options, save=lambda *_: None, keep=lambda step, epoch, snapshot: kept.__setitem__(0, snapshot),
                 report=seen.append, stop=lambda: "", pause=pause, ranks=ranks)
    return Result(network, seen, made, kept[0]())
