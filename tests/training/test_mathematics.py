"""Schedules, weights, noise and scaling against transformers, formulas from the papers, and torch."""

import math

import pytest
import torch
from transformers import get_scheduler

from lib_lora_train.adapters.flat import FlatWeights
from lib_lora_train.training import optimizer
from lib_lora_train.training.loss import min_snr_weight, weighted_losses
from lib_lora_train.training.noise import draw, seed_of
from lib_lora_train.training.optimizer import Stepper, learning_rate_factor
from lib_lora_train.training.precision import LossScaler, compute_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize("ours, theirs", [
    ("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine"),
    ("cosine_with_restarts", "cosine_with_restarts")])
@pytest.mark.parametrize("warmup", [0, 7])
def test_learning_rates_are_those_of_transformers(ours, theirs, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    expected = []
    for _ in range(40):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    got = [learning_rate_factor(ours, step, total=40, warmup=warmup) for step in range(40)]
    assert got == pytest.approx(expected, abs=1e-12)


def test_restarts_begin_again_at_the_full_rate():
    factors = [learning_rate_factor("cosine_with_restarts", step, total=40, warmup=0, cycles=4) for step in range(40)]
    assert [factors[i] for i in (0, 10, 20, 30)] == [1.0] * 4
    assert factors[9] < 0.05


def test_min_snr_weights_are_the_papers():
    snr = torch.tensor([0.01, 1.0, 5.0, 20.0])
    assert min_snr_weight(snr, gamma=5, v_prediction=False).tolist() == pytest.approx([1, 1, 1, 0.25])
    assert min_snr_weight(snr, gamma=5, v_prediction=True).tolist() == pytest.approx(
        [0.01 / 1.01, 1 / 2, 5 / 6, 5 / 21])


def test_pure_noise_does_not_make_the_weight_a_nan():
    assert min_snr_weight(torch.tensor([0.0]), gamma=5, v_prediction=False).item() == 1.0


def test_the_loss_is_reduced_in_kohyas_order():
    prediction, target = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 4, 2, 5)
    example, snr = torch.tensor([1.0, 0.5, 2.0]), torch.tensor([0.1, 1.0, 0.3])
    by_hand = sum((prediction[i] ** 2).sum().item() / 40 * example[i].item() * snr[i].item() for i in range(3)) / 3
    got = weighted_losses(prediction, target, example_weight=example, snr_weight=snr).mean()
    assert got.item() == pytest.approx(by_hand, rel=1e-6) and got.dtype == torch.float32


def test_half_precision_predictions_are_compared_in_full_precision():
    prediction = torch.full((1, 4, 8, 8), 300.0, dtype=torch.float16)  # 300² overflows fp16
    loss = weighted_losses(prediction, torch.zeros_like(prediction), example_weight=torch.ones(1), snr_weight=None)
    assert loss.item() == 90000.0


def test_draws_depend_on_seed_step_and_micro_batch_alone_and_touch_no_global_state():
    before = torch.get_rng_state()
    one = draw((2, 4, 8, 8), seed=1, step=5, micro=0, timesteps=1000)
    again = draw((2, 4, 8, 8), seed=1, step=5, micro=0, timesteps=1000)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.noise, again.noise) and torch.equal(one.timesteps, again.timesteps)
    for other in ({"seed": 2, "step": 5, "micro": 0}, {"seed": 1, "step": 6, "micro": 0}, {"seed": 1, "step": 5, "micro": 1}):
        assert not torch.equal(one.noise, draw((2, 4, 8, 8), timesteps=1000, **other).noise)


def test_timesteps_are_uniform_and_noise_is_normal():
    draws = [draw((64, 1, 4, 4), seed=3, step=step, micro=0, timesteps=1000) for step in range(200)]
    t = torch.cat([d.timesteps for d in draws])
    assert t.min() >= 0 and t.max() <= 999
    counts = torch.bincount(t // 100, minlength=10).float()
    # Chi-square with 9 degrees of freedom: beyond 27.9 in one of a thousand cases; the seed is fixed.
    assert ((counts - 1280) ** 2 / 1280).sum() < 27.9
    noise = torch.cat([d.noise for d in draws])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_noise_offset_moves_whole_channels_by_its_size():
    shifted = torch.cat([draw((8, 4, 16, 16), seed=1, step=s, micro=0, timesteps=10, noise_offset=0.5).noise
                         for s in range(50)])
    plain = torch.cat([draw((8, 4, 16, 16), seed=1, step=s, micro=0, timesteps=10).noise for s in range(50)])
    offset = shifted - plain
    assert torch.allclose(offset, offset.mean(dim=(2, 3), keepdim=True).expand_as(offset), atol=1e-6)
    assert offset.mean(dim=(2, 3)).std().item() == pytest.approx(0.5, abs=0.02)


def test_seeds_differ_for_different_parts():
    assert len({seed_of(a, b) for a in range(30) for b in range(30)}) == 900
    assert seed_of(1, 11) != seed_of(11, 1)


def _stepper(*parameters, **changes):
    options = {"weight_decay": 0.0, "max_grad_norm": 1.0, **changes}
    return Stepper(FlatWeights([{"name": "unet", "params": list(parameters), "lr": 0.1}]), **options)


def test_a_step_equals_torchs_clipping_and_adamw_of_the_weights_one_by_one():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 3), (70,), (2, 1))]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    stepper, reference = _stepper(*ours, weight_decay=0.01), torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.01)
    stepper.set_factor(0.5)
    for size in (10, 0.01, 10, 0.01, 10):  # clipped and not
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = torch.randn(other.shape) * size
            mine.grad.add_(other.grad)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.step()
        assert not stepper.step()
    assert all(torch.allclose(mine, other, rtol=1e-5, atol=1e-7) for mine, other in zip(ours, theirs, strict=True))


def test_two_groups_have_their_own_rates_and_one_norm():
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(n)) for n in (3, 4)] for _ in range(2))
    weights = FlatWeights([{"name": "unet", "params": ours[:1], "lr": 0.1},
                           {"name": "text_encoder", "params": ours[1:], "lr": 0.01}])
    stepper = Stepper(weights, weight_decay=0.0, max_grad_norm=1.0)
    reference = torch.optim.AdamW([{"params": theirs[:1], "lr": 0.1}, {"params": theirs[1:], "lr": 0.01}], weight_decay=0.0)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = torch.randn(other.shape)
            mine.grad.copy_(other.grad)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.step()
        stepper.step()
    assert stepper.rates() == {"unet": 0.1, "text_encoder": 0.01}
    assert all(torch.allclose(mine, other, rtol=1e-5) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_overflowed_never_reach_the_weights(bad):
    parameter = torch.nn.Parameter(torch.ones(3))
    stepper = _stepper(parameter, weight_decay=0.1)
    parameter.grad.copy_(torch.tensor([1.0, bad, 1.0]))
    assert stepper.step()
    assert torch.equal(parameter.detach(), torch.ones(3)) and not parameter.grad.any()
    assert all(not value.any() for _, _, value in stepper.moments())


def test_scaled_gradients_are_unscaled_before_clipping():
    ours, theirs = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    scaler = LossScaler(CPU, enabled=True)
    gradient = torch.tensor([0.1, -0.2, 0.3, 0.1])  # norm below 1: clipping must leave it alone
    stepper, reference = _stepper(ours), torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0)
    ours.grad.copy_(scaler.scaled(gradient))
    theirs.grad = gradient.clone()
    stepper.step(scaler.inverse())
    reference.step()
    assert torch.allclose(ours, theirs)
    first = dict((name, value) for _, name, value in stepper.moments())["exp_avg"]
    assert torch.allclose(first, 0.1 * gradient)  # (1 - β₁) g: AdamW's weights alone would not tell a scale


def test_the_scale_halves_after_an_overflow_and_doubles_after_good_steps():
    scaler = LossScaler(CPU, enabled=True, initial=1024.0, growth_interval=3)
    scales, places = [], (scaler.scale, scaler.good_steps)
    for overflowed in (True, False, False, True, False, False, False, False):
        scaler.update(torch.tensor(overflowed))
        scales.append(scaler.scale.item())
    assert scaler.scale is places[0] and scaler.good_steps is places[1]
    assert scales == [512, 512, 512, 256, 256, 256, 512, 512]


def test_half_precision_is_not_asked_of_a_processor():
    from lib_lora_train.errors import SettingError
    assert compute_dtype("auto", CPU, weights=torch.float16) == torch.float32
    with pytest.raises(SettingError, match="CUDA"):
        compute_dtype("fp16", CPU, weights=torch.float16)


@pytest.mark.parametrize("capability, weights, expected", [
    ((7, 5), torch.float16, torch.float16), ((8, 6), torch.float16, torch.float16), ((8, 6), torch.float32, torch.bfloat16),
    ((7, 5), torch.float32, torch.float16), ((7, 5), torch.bfloat16, torch.float16), ((9, 0), torch.bfloat16, torch.bfloat16)])
def test_a_card_computes_in_what_the_weights_are_stored_in_and_never_in_bf16_before_ampere(
        monkeypatch, capability, weights, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert compute_dtype("auto", torch.device("cuda"), weights=weights) == expected


def test_an_optimiser_told_of_overflows_by_a_tensor_skips_as_one_that_is_asked(monkeypatch):
    """The fused kernel, which CUDA always has and processors have in newer torch."""
    def trained() -> tuple[torch.nn.Parameter, Stepper]:
        parameter = torch.nn.Parameter(torch.ones(4))
        stepper = _stepper(parameter, weight_decay=0.01)
        for bad in (math.inf, 0.5, math.nan, -0.25):
            parameter.grad.copy_(torch.tensor([0.1, bad, -0.2, 0.3]))
            stepper.step()
        return parameter, stepper
    fused, stepper = trained()
    if not stepper.fused:
        pytest.skip("this torch has no fused AdamW for processors")
    monkeypatch.setattr(optimizer, "_adamw", lambda weights, weight_decay: (torch.optim.AdamW(
        [{"params": [group.parameter], "lr": group.rate} for group in weights.groups], weight_decay=weight_decay), False))
    plain, reference = trained()
    assert torch.allclose(fused, plain, rtol=1e-6)
    assert [value.item() for one in (stepper, reference) for _, name, value in one.moments() if name == "step"] == [2, 2]


def test_losses_are_awaited_on_the_card_of_the_run_and_not_on_the_current_one(monkeypatch):
    """CUDA's part of the log with CUDA's calls replaced: an event counts on the stream of the card that was entered."""
    from lib_lora_train.training.progress import Arrived, LossLog
    entered, recorded = [], []

    class Entered:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.pop()

    class Event:
        def record(self):
            recorded.append(entered[-1] if entered else "the current card")

        def query(self):
            return False

        def synchronize(self):
            pass
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "device", Entered)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    log = LossLog(torch.device("cuda", 1))
    log.push(1, torch.tensor([0.25, 1.0]))
    assert recorded == [torch.device("cuda", 1)]
    assert log.arrived() == [] and log.arrived(wait=True) == [Arrived(1, 0.25, True)]


def test_a_run_of_steps_that_all_overflow_ends_with_advice():
    from lib_lora_train.errors import TrainingError
    from lib_lora_train.training.loop import LoopOptions, _Reporter
    from lib_lora_train.training.progress import Arrived
    from lib_lora_train.training.step import StepOptions
    options = LoopOptions(
        steps=100, epochs=1, steps_per_epoch=100, accumulation=1, schedule="constant", warmup=0, cycles=1, weight_decay=0,
        max_grad_norm=1, noise_offset=0, unet_lr=0.1, text_encoder_lr=0, seed=0, save_every_n_epochs=0, save_every_n_steps=0,
        step=StepOptions(dtype=torch.float16, min_snr_gamma=0, recompute=frozenset()))
    seen = []
    reporter = _Reporter(options, seen.append, _stepper(torch.nn.Parameter(torch.ones(1))))

    def tell(first: int, count: int, overflowed: bool) -> None:
        for number in range(first, first + count):
            reporter.expect(number, 1)
            reporter.tell([Arrived(number, 0.5, overflowed)])
    tell(1, 20, True)  # the scale finding its place
    tell(21, 1, False)
    with pytest.raises(TrainingError, match="bf16"):
        tell(22, 40, True)
    assert len(seen) < 61
