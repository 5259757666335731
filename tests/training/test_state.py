"""The optimiser's part of a training state: kept weight by weight, whatever holds the weights together."""

from __future__ import annotations

import pytest
import torch

from lib_lora_train.adapters.flat import FlatWeights
from lib_lora_train.errors import LoraFileError
from lib_lora_train.training.checkpoint import TrainingState, restore
from lib_lora_train.training.optimizers import AdamW, OptimizerConfig, RunOptimizer
from lib_lora_train.training.precision import LossScaler

SHAPES = ((5, 3), (70,), (2, 1))
CPU = torch.device("cpu")


def weights() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def optimizer_of(parameters: list[torch.nn.Parameter], *, weight_decay: float = 0.0) -> RunOptimizer:
    flat = FlatWeights([{"name": "unet", "params": parameters, "lr": 0.1}])
    return RunOptimizer(flat, AdamW(), OptimizerConfig(arguments={"weight_decay": weight_decay}, max_grad_norm=0))


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) * 0.01 for shape in SHAPES]


def state_of(entries: dict[int, dict[str, torch.Tensor]]) -> TrainingState:
    moments = {f"{number}.{name}": value for number, entry in entries.items() for name, value in entry.items()}
    return TrainingState(3, {}, moments, {"scale": torch.tensor(4.0), "good_steps": torch.tensor(2.0)}, (), 0)


def test_torchs_own_state_weight_by_weight_goes_on_in_one_buffer():
    """As runs before this one have kept it; the last weight never had a gradient."""
    theirs = weights()
    reference = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.01)

    def train(steps: range) -> None:
        for step in steps:
            for weight, gradient in list(zip(theirs, gradients(step), strict=True))[:2]:
                weight.grad = gradient
            reference.step()
    train(range(3))
    ours = [torch.nn.Parameter(weight.detach().clone()) for weight in theirs]
    ours[2].requires_grad_(False)
    optimizer = optimizer_of(ours, weight_decay=0.01)
    scaler = LossScaler(CPU, enabled=True)
    restore(state_of(reference.state_dict()["state"]), optimizer=optimizer, scaler=scaler)
    assert (scaler.scale.item(), scaler.good_steps.item()) == (4.0, 2.0)
    train(range(3, 6))
    for step in range(3, 6):
        for weight, gradient in list(zip(ours, gradients(step), strict=True))[:2]:
            weight.grad.copy_(gradient)
        optimizer.step(~optimizer.clip().isfinite())
        optimizer.weights.gradient.zero_()
    assert all(torch.allclose(mine, other, rtol=1e-5) for mine, other in zip(ours, theirs, strict=True))
    kept = optimizer.state()
    for number, entry in reference.state_dict()["state"].items():
        for name, value in entry.items():
            mine = kept[f"{number}.{name}"]
            assert torch.allclose(mine, value, rtol=1e-5) and mine.shape == value.shape


@pytest.mark.parametrize("kept, expected", [
    ((1.0, 0.0), (65536.0, 0.0)), ((1.0, 7.0), (1.0, 7.0)), ((512.0, 0.0), (512.0, 0.0))],
    ids=["unscaled", "fallen to one", "scaled"])
def test_a_scale_is_gone_on_with_unless_the_kept_run_had_none(kept, expected):
    """As after a change of the precision from bf16 to fp16, which a run may go on with."""
    optimizer = optimizer_of(weights(), weight_decay=0.0)
    scale, good_steps = map(torch.tensor, kept)
    scaler = LossScaler(CPU, enabled=True)
    restore(TrainingState(3, {}, {}, {"scale": scale, "good_steps": good_steps}, (), 0), optimizer=optimizer, scaler=scaler)
    assert (scaler.scale.item(), scaler.good_steps.item()) == expected


@pytest.mark.parametrize("number, name, tensor", [
    (3, "exp_avg", torch.zeros(2, 1)), (0, "exp_avg", torch.zeros(3, 5)), (0, "step", torch.ones(5, 3)),
    (1, "step", torch.tensor(9.0))], ids=["too many", "another shape", "no number", "another step"])
def test_moments_of_other_weights_are_refused_and_nothing_is_changed(number, name, tensor):
    optimizer = optimizer_of(weights(), weight_decay=0.0)
    entries = {n: {"step": torch.tensor(3.0), "exp_avg": torch.ones(shape)} for n, shape in enumerate(SHAPES)}
    entries.setdefault(number, {})[name] = tensor
    with pytest.raises(LoraFileError):
        restore(state_of(entries), optimizer=optimizer, scaler=LossScaler(CPU, enabled=False))
    assert not any(value.any() for value in optimizer.state().values())
