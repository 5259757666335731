"""Weights, noise and scaling against formulas from the papers, and torch."""

import math

import pytest
import torch

from lib_lora_train import events
from lib_lora_train.adapters.flat import FlatWeights
from lib_lora_train.errors import HostError, SettingError, TrainingError
from lib_lora_train.events import Step
from lib_lora_train.inputs.text import TextCache
from lib_lora_train.training.loss import LossConfig, denoising_loss, min_snr_weight, mse, zero_prediction_loss
from lib_lora_train.training.noise import NoiseConfig, draw, seed_of
from lib_lora_train.training.optimizers import OPTIMIZERS, AdamW, OptimizerConfig, RunOptimizer
from lib_lora_train.training.precision import LossScaler, compute_dtype
from lib_lora_train.training.progress import LossReporter
from tests.training import small_run

CPU = torch.device("cpu")


def test_min_snr_weights_are_the_papers():
    snr = torch.tensor([0.01, 1.0, 5.0, 20.0])
    assert min_snr_weight(snr, gamma=5, v_prediction=False).tolist() == pytest.approx([1, 1, 1, 0.25])
    assert min_snr_weight(snr, gamma=5, v_prediction=True).tolist() == pytest.approx(
        [0.01 / 1.01, 1 / 2, 5 / 6, 5 / 21])


def test_pure_noise_does_not_make_the_weight_a_nan():
    assert min_snr_weight(torch.tensor([0.0]), gamma=5, v_prediction=False).item() == 1.0


def test_the_loss_is_reduced_in_kohyas_order():
    """Elementwise, mean over (C, h, w), times the image's weight, times the SNR weight, mean over the batch."""
    model, batch = small_run.model("sd1"), small_run.batch(1, rows=3)
    draws = draw(batch["mean"].shape, seed=0, step=1, micro=0, timesteps=1000)
    batch = batch.extended({**draws, "weight": batch["loss_weight"] / 3})
    elements = torch.rand(batch["mean"].shape, generator=torch.Generator().manual_seed(0))

    def loss(config: LossConfig, **more: torch.Tensor) -> torch.Tensor:
        text = model.text.encode([model.text.tokenize(caption) for caption in batch.captions])
        return denoising_loss(model, batch.extended(more), conditioning=text, adapters={}, config=config)
    config = LossConfig(torch.float32, min_snr_gamma=5.0, function=lambda prediction, target, timesteps: elements)
    snr = min_snr_weight(model.schedule.snr(batch["timesteps"]), gamma=5.0, v_prediction=False)
    by_hand = sum(elements[i].mean().item() * batch["loss_weight"][i].item() * snr[i].item() for i in range(3)) / 3
    assert loss(config).item() == pytest.approx(by_hand, rel=1e-6)
    mask = (elements[:, :1] > 0.5).float()
    masked = sum((elements[i] * mask[i]).mean().item() * batch["loss_weight"][i].item() * snr[i].item() for i in range(3)) / 3
    assert loss(config, mask=mask).item() == pytest.approx(masked, rel=1e-6)


def test_predictions_in_half_precision_are_compared_in_fp32():
    model, batch = small_run.model("sd1"), small_run.batch(1)
    draws = draw(batch["mean"].shape, seed=0, step=1, micro=0, timesteps=1000)
    text = model.text.encode([model.text.tokenize("a cat")], dtype=torch.bfloat16)
    seen = []

    def loss(prediction, target, timesteps):
        seen.extend((prediction.dtype, target.dtype, timesteps.shape))
        return mse(prediction, target, timesteps)
    denoising_loss(model, batch.extended({**draws, "weight": torch.ones(1)}), conditioning=text, adapters={},
                   config=LossConfig(torch.bfloat16, function=loss))
    assert seen == [torch.float32, torch.float32, (1,)]


def test_draws_depend_on_seed_step_and_micro_batch_alone_and_touch_no_global_state():
    before = torch.get_rng_state()
    one = draw((2, 4, 8, 8), seed=1, step=5, micro=0, timesteps=1000)
    again = draw((2, 4, 8, 8), seed=1, step=5, micro=0, timesteps=1000)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one["noise"], again["noise"]) and torch.equal(one["timesteps"], again["timesteps"])
    for other in ({"seed": 2, "step": 5, "micro": 0}, {"seed": 1, "step": 6, "micro": 0}, {"seed": 1, "step": 5, "micro": 1}):
        assert not torch.equal(one["noise"], draw((2, 4, 8, 8), timesteps=1000, **other)["noise"])


def test_timesteps_are_uniform_and_noise_is_normal():
    draws = [draw((64, 1, 4, 4), seed=3, step=step, micro=0, timesteps=1000) for step in range(200)]
    t = torch.cat([d["timesteps"] for d in draws])
    assert t.min() >= 0 and t.max() <= 999
    counts = torch.bincount(t // 100, minlength=10).float()
    # Chi-square with 9 degrees of freedom: beyond 27.9 in one of a thousand cases; the seed is fixed.
    assert ((counts - 1280) ** 2 / 1280).sum() < 27.9
    noise = torch.cat([d["noise"] for d in draws])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_noise_offset_moves_whole_channels_by_its_size():
    config = NoiseConfig(noise_offset=0.5)
    shifted = torch.cat([draw((8, 4, 16, 16), seed=1, step=s, micro=0, timesteps=10, config=config)["noise"]
                         for s in range(50)])
    plain = torch.cat([draw((8, 4, 16, 16), seed=1, step=s, micro=0, timesteps=10)["noise"] for s in range(50)])
    offset = shifted - plain
    assert torch.allclose(offset, offset.mean(dim=(2, 3), keepdim=True).expand_as(offset), atol=1e-6)
    assert offset.mean(dim=(2, 3)).std().item() == pytest.approx(0.5, abs=0.02)


def test_seeds_differ_for_different_parts():
    assert len({seed_of(a, b) for a in range(30) for b in range(30)}) == 900
    assert seed_of(1, 11) != seed_of(11, 1)


ADAMW = AdamW()
ONE = torch.tensor(1.0)


def optimizer_of(*parameters, spec=ADAMW, weight_decay=0.0):
    weights = FlatWeights([{"name": "unet", "params": list(parameters), "lr": 0.1}])
    return RunOptimizer(weights, spec, OptimizerConfig(arguments={"weight_decay": weight_decay}))


def step(optimizer: RunOptimizer, inverse_scale: torch.Tensor | None = None) -> bool:
    """Clip, step and clear, as the loop does; whether the gradients overflowed."""
    overflowed = ~optimizer.clip(inverse_scale).isfinite()
    optimizer.step(overflowed)
    optimizer.weights.gradient.zero_()
    return bool(overflowed)


def test_a_step_equals_torchs_clipping_and_adamw_of_the_weights_one_by_one():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 3), (70,), (2, 1))]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    optimizer, reference = optimizer_of(*ours, weight_decay=0.01), torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.01)
    optimizer.set_learning_rate(0.5)
    for size in (10, 0.01, 10, 0.01, 10):  # clipped and not
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = torch.randn(other.shape) * size
            mine.grad.add_(other.grad)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.step()
        assert not step(optimizer)
    assert all(torch.allclose(mine, other, rtol=1e-5, atol=1e-7) for mine, other in zip(ours, theirs, strict=True))


def test_two_groups_have_their_own_rates_and_one_norm():
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(n)) for n in (3, 4)] for _ in range(2))
    weights = FlatWeights([{"name": "unet", "params": ours[:1], "lr": 0.1},
                           {"name": "text_encoder", "params": ours[1:], "lr": 0.01}])
    optimizer = RunOptimizer(weights, AdamW(), OptimizerConfig(arguments={"weight_decay": 0.0}))
    reference = torch.optim.AdamW([{"params": theirs[:1], "lr": 0.1}, {"params": theirs[1:], "lr": 0.01}], weight_decay=0.0)
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            other.grad = torch.randn(other.shape)
            mine.grad.copy_(other.grad)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.step()
        step(optimizer)
    assert optimizer.learning_rates() == {"unet": 0.1, "text_encoder": 0.01}
    assert all(torch.allclose(mine, other, rtol=1e-5) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_overflowed_never_reach_the_weights(bad):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = optimizer_of(parameter, weight_decay=0.1)
    parameter.grad.copy_(torch.tensor([1.0, bad, 1.0]))
    assert step(optimizer)
    assert torch.equal(parameter.detach(), torch.ones(3)) and not parameter.grad.any()
    assert all(not value.any() for value in optimizer.state().values())


def test_scaled_gradients_are_unscaled_before_clipping():
    ours, theirs = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    scaler = LossScaler(CPU, enabled=True)
    gradient = torch.tensor([0.1, -0.2, 0.3, 0.1])  # norm below 1: clipping must leave it alone
    optimizer, reference = optimizer_of(ours), torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0)
    ours.grad.copy_(scaler.scaled(gradient))
    theirs.grad = gradient.clone()
    step(optimizer, scaler.inverse())
    reference.step()
    assert torch.allclose(ours, theirs)
    first = optimizer.state()["0.exp_avg"]
    assert torch.allclose(first, 0.1 * gradient)  # (1 - β₁) g: AdamW's weights alone would not tell a scale


def test_the_scale_halves_after_an_overflow_and_doubles_after_good_steps():
    scaler = LossScaler(CPU, enabled=True, initial=1024.0, growth_interval=3)
    scales, places = [], (scaler.scale, scaler.good_steps)
    for overflowed in (True, False, False, True, False, False, False, False):
        scaler.update(torch.tensor(overflowed))
        scales.append(scaler.scale.item())
    assert scaler.scale is places[0] and scaler.good_steps is places[1]
    assert scales == [512, 512, 512, 256, 256, 256, 512, 512]


def test_half_precision_is_not_asked_of_a_cpu():
    assert compute_dtype("auto", CPU, weights=torch.float16) == torch.float32
    with pytest.raises(SettingError):
        compute_dtype("fp16", CPU, weights=torch.float16)


@pytest.mark.parametrize("capability, weights, expected", [
    ((7, 5), torch.float16, torch.float16), ((8, 6), torch.float16, torch.float16), ((8, 6), torch.float32, torch.bfloat16),
    ((7, 5), torch.float32, torch.float32), ((7, 5), torch.bfloat16, torch.float16), ((9, 0), torch.bfloat16, torch.bfloat16)])
def test_a_gpu_computes_in_what_the_weights_are_stored_in_so_that_no_half_holds_and_never_in_bf16_before_ampere(
        monkeypatch, capability, weights, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert compute_dtype("auto", torch.device("cuda"), weights=weights) == expected


def test_a_device_that_cannot_train_is_refused_in_a_sentence():
    with pytest.raises(HostError, match="DirectML"):
        compute_dtype("auto", torch.device("privateuseone"), weights=torch.float16)


class OnMps(torch.nn.Parameter):
    """A parameter that says it lies on a GPU of Apple's."""

    device = torch.device("mps")


def test_on_mps_an_overflow_is_heeded_because_the_fused_adamw_which_ignores_it_is_not_asked_for(monkeypatch):
    asked = []
    original = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW",
                        lambda groups, *, fused=False, **rest: asked.append(fused) or original(groups, **rest))
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.empty(*size).zero_())
    AdamW().build([{"name": "unet", "lr": 1e-3, "params": [OnMps(torch.ones(2))]}], arguments={})
    assert asked == [False]


class UnfusedAdamW(AdamW):
    """As torch has it where there is no fused kernel."""

    def build(self, groups, *, arguments, pairs=()):
        optimizer = super().build(groups, arguments=arguments)
        plain = torch.optim.AdamW([{"params": group["params"], "lr": group["lr"]} for group in groups],
                                  fused=False, **arguments)
        plain.state.update(optimizer.state)
        return plain


def test_an_optimizer_told_of_overflows_by_a_tensor_skips_as_one_that_is_asked():
    """The fused kernel, which CUDA always has and CPUs have in newer torch."""
    def trained(spec: AdamW) -> tuple[torch.nn.Parameter, RunOptimizer]:
        parameter = torch.nn.Parameter(torch.ones(4))
        optimizer = optimizer_of(parameter, spec=spec, weight_decay=0.01)
        for bad in (math.inf, 0.5, math.nan, -0.25):
            parameter.grad.copy_(torch.tensor([0.1, bad, -0.2, 0.3]))
            step(optimizer)
        return parameter, optimizer
    (one, optimizer), (other, reference) = trained(AdamW()), trained(UnfusedAdamW())
    assert torch.allclose(one, other, rtol=1e-6)
    assert [value.item() for run in (optimizer, reference) for name, value in run.state().items() if name == "0.step"] == [2, 2]


def test_losses_are_awaited_on_the_gpu_of_the_run_and_not_on_the_current_one(monkeypatch):
    """CUDA's part of the reporter with CUDA's calls replaced: an event counts on the stream of the GPU that was entered."""
    entered, recorded, passed = [], [], []

    class Entered:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.pop()

    class Event:
        def record(self):
            recorded.append(entered[-1] if entered else "the current GPU")

        def query(self):
            return bool(passed)

        def synchronize(self):
            passed.append(True)
    empty, seen = torch.empty, []
    monkeypatch.setattr(torch.cuda, "device", Entered)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    losses = LossReporter(torch.device("cuda", 1), steps=3, epochs=1, steps_per_epoch=3, report=seen.append)
    losses.push(1, 1, torch.tensor([0.25, 1.0]), torch.tensor(True), norm=ONE, rates={"unet": 0.1})
    assert recorded == [torch.device("cuda", 1)] and seen == []
    losses.flush()
    assert [(event.step, event.loss, event.skipped, event.learning_rate) for event in seen] == [(1, 0.25, True, 0.1)]


def test_a_run_of_steps_that_all_overflow_ends_with_advice():
    seen: list[Step] = []
    losses = LossReporter(CPU, steps=100, epochs=1, steps_per_epoch=100, report=seen.append)

    def push(first: int, count: int, overflowed: bool) -> None:
        for number in range(first, first + count):
            losses.push(number, 1, torch.tensor([0.5, 1.0]), torch.tensor(overflowed), norm=ONE, rates={})
    push(1, 20, True)  # the scale finding its place
    push(21, 1, False)
    with pytest.raises(TrainingError):
        push(22, 40, True)
    assert len(seen) < 61


@pytest.mark.parametrize("before, said", [([0.5], "learning rate"), ([], "mixed_precision")], ids=["later", "from the start"])
def test_losses_that_stay_no_numbers_end_the_run_and_name_the_cause(before, said):
    seen: list[Step] = []
    losses = LossReporter(CPU, steps=100, epochs=1, steps_per_epoch=100, report=seen.append)
    with pytest.raises(TrainingError) as caught:
        for number, loss in enumerate([*before, *[math.nan] * 60], 1):
            losses.push(number, 1, torch.tensor([loss, 1.0]), torch.tensor(math.isnan(loss)), norm=ONE, rates={})
    assert said in caught.value.remedy and len(seen) < 40


def test_a_loss_above_that_of_predicting_nothing_is_told_once_and_one_below_is_not():
    def warnings(all_losses: list[float], nothing: float) -> list[int]:
        seen: list[events.Event] = []
        losses = LossReporter(CPU, steps=100, epochs=1, steps_per_epoch=100, report=seen.append)
        for number, loss in enumerate(all_losses, 1):
            losses.push(number, 1, torch.tensor([loss, nothing]), torch.tensor(False), norm=ONE, rates={"unet": 5.0})
        return [len([e for e in seen[:place] if isinstance(e, Step)]) for place, event in enumerate(seen)
                if isinstance(event, events.Warned)]
    assert warnings([0.1, *[0.9] * 40], nothing=1.0) == []
    told, = warnings([*[0.1] * 20, *[2.07] * 40], nothing=1.0)
    assert 20 <= told < 30
    assert len(warnings([0.01, *[0.3] * 20], nothing=0.25)) == 1  # as with the weights of min-SNR


@pytest.mark.parametrize("family", ["sd1", "sd2"], ids=["epsilon", "v"])
@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_the_loss_of_predicting_nothing_is_that_of_a_unet_whose_last_layer_is_zero(family, gamma):
    tensors = {name: tensor.clone() for name, tensor in small_run.tensors(family).items()}
    for name in ("weight", "bias"):
        tensors[f"model.diffusion_model.out.2.{name}"].zero_()
    model, batch = small_run.built(family, tensors), small_run.batch(1, rows=3)
    draws = draw(batch["mean"].shape, seed=0, step=1, micro=0, timesteps=1000)
    batch = batch.extended({**draws, "weight": batch["loss_weight"] / 3})
    config = LossConfig(torch.float32, min_snr_gamma=gamma)
    conditioning = TextCache(model.text).get(batch.captions)
    written = denoising_loss(model, batch, conditioning=conditioning, adapters={}, config=config)
    assert zero_prediction_loss(model, batch, config).item() == pytest.approx(written.item(), rel=1e-6)


def test_a_second_tiny_loss_function_takes_the_place_of_the_first():
    """The seam of losses: any (prediction, target, timesteps) -> [B, C, h, w]."""
    batches = [small_run.batch(i, rows=2) for i in range(3)]
    smooth = small_run.run("sd1", batches, loss=lambda prediction, target, timesteps: torch.nn.functional.smooth_l1_loss(
        prediction, target, reduction="none", beta=1e6))
    squared = small_run.run("sd1", batches)  # smooth L1 below beta is the squared error / (2 beta)
    assert smooth.losses == pytest.approx([loss / 2e6 for loss in squared.losses], rel=1e-3)


def test_a_second_tiny_optimizer_takes_the_place_of_the_first(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "SGD", small_run.Sgd(accepts_flat=False))
    result = small_run.run("sd1", [small_run.batch(i) for i in range(3)], optimizer="sgd", learning_rate=0.1)
    assert result.steps == 3 and result.learnt().any() and result.state.optimizer == {}
    ours, theirs = ([torch.nn.Parameter(torch.ones(n)) for n in (3, 4)] for _ in range(2))
    optimizer, reference = optimizer_of(*ours, spec=small_run.Sgd(accepts_flat=False)), torch.optim.SGD(theirs, lr=0.1)
    for mine, other in zip(ours, theirs, strict=True):
        other.grad = torch.linspace(-1, 1, len(other))
        mine.grad.copy_(other.grad)
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    reference.step()
    step(optimizer)
    assert all(torch.allclose(mine, other, rtol=1e-5) for mine, other in zip(ours, theirs, strict=True))
