"""Optimizers at the seam of `RunOptimizer`: the numbers of their papers and packages, overflow, averages, resuming.

Those of a package that is not installed are skipped, but for how they are chosen and refused.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from lib_lora_train.adapters.flat import FlatWeights
from lib_lora_train.errors import LoraFileError, SettingError
from lib_lora_train.run.optimizing import (
    check_network,
    check_optimizer,
    check_optimizer_device,
    ignored_by_optimizer,
    kept_bytes,
    optimizer_config,
)
from lib_lora_train.settings import DECLARATIONS, parse
from lib_lora_train.training.optimizer_kinds import AdamW, Imported
from lib_lora_train.training.optimizers import OPTIMIZERS, OptimizerConfig, RunOptimizer, spec_of
from lib_lora_train.training.schedules import ScheduleConfig, learning_rate_factor

CONSTANT, RANK = ScheduleConfig("constant"), 4
SHAPES = ((RANK, 40), (36, RANK), (RANK, 6, 3, 3), (36, RANK))  # A, B; A and B of a convolution
PACKAGES = {name: spec.class_name.partition(".")[0] for name, spec in OPTIMIZERS.items() if getattr(spec, "package", "")}
CASES = [(name, {}) for name in OPTIMIZERS if "8bit" not in name] + [
    ("Adafactor", {"relative_step": False, "scale_parameter": False, "beta1": 0.9}), ("Prodigy", {"slice_p": 11}),
    ("AdamW", {"amsgrad": True}), ("ProdigyPlusScheduleFree", {"use_schedulefree": False, "factored": False}),
    ("torch.optim.NAdam", {}), ("torch.optim.Rprop", {}), ("Adamax", {})]
NAMES = [f"{name}{'-' + '-'.join(arguments) if arguments else ''}" for name, arguments in CASES]


def weights(*, device: str = "cpu") -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in SHAPES]


def run_of(name: str, parameters: list[torch.nn.Parameter], *, rate: float | None = None, **arguments) -> RunOptimizer:
    if package := PACKAGES.get(name):
        pytest.importorskip(package)
    spec = spec_of(name)
    rate = rate or (1.0 if spec.traits(arguments).adapts_rate else 0.01)
    flat = FlatWeights([{"name": "unet", "params": parameters[:2], "lr": rate},
                        {"name": "text_encoder × 0.5", "params": parameters[2:], "lr": rate}])
    return RunOptimizer(flat, spec, OptimizerConfig(name, arguments), pairs=[tuple(parameters[:2]), tuple(parameters[2:])])


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [0.01 * torch.randn(shape, generator=generator) for shape in SHAPES]


def train(run: RunOptimizer, parameters: list[torch.nn.Parameter], steps: range, *, bad: int = -1,
          schedule: ScheduleConfig = CONSTANT) -> None:
    for step in steps:
        run.set_learning_rate(learning_rate_factor(schedule, step))
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad.copy_(gradient)
        if step == bad:
            parameters[1].grad[0, 0] = math.nan
        run.step(~run.clip().isfinite())
        run.weights.gradient.zero_()


def bits(tensors) -> list[bytes]:
    return [tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=NAMES)
def test_a_run_goes_on_from_its_state_to_the_same_bytes_and_skips_steps_that_overflow(name, arguments):
    whole, parts, rest = weights(), weights(), weights()
    uninterrupted, first = run_of(name, whole, **arguments), run_of(name, parts, **arguments)
    train(uninterrupted, whole, range(7), bad=2)
    train(first, parts, range(4), bad=2)
    before = bits(parts)
    train(first, parts, range(2, 3), bad=2)  # once more: nothing of it may stay
    assert bits(parts) == before
    kept = {key: value.clone() for key, value in first.state().items()}
    for new, old in zip(rest, parts, strict=True):
        new.data.copy_(old.data)
    second = run_of(name, rest, **arguments)
    second.load_state(kept)
    assert {key: bits([value]) for key, value in second.state().items()} == {key: bits([kept[key]]) for key in kept}
    train(second, rest, range(4, 7))
    assert bits(rest) == bits(whole) != bits(weights())
    assert second.learning_rates() == uninterrupted.learning_rates()


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "8bit" not in name])
def test_every_schedule_drives_every_optimizer(name):
    for schedule in DECLARATIONS["lr_scheduler"].choices:
        parameters = weights()
        run = run_of(name, parameters)
        train(run, parameters, range(5), schedule=ScheduleConfig(schedule, steps=5, warmup=1, decay=2))
        assert all(parameter.isfinite().all() for parameter in parameters), schedule
        assert any(bits([old]) != bits([new]) for old, new in zip(weights(), parameters, strict=True)), schedule


@pytest.mark.parametrize(("name", "arguments"), [
    *((name, arguments) for name, arguments in CASES if spec_of(name).traits(arguments).accepts_flat and (
        name not in ("AdamW", "RiemannianAdamW", "Lion")) and "slice_p" not in arguments)])
def test_one_flat_parameter_a_group_is_trained_as_the_weights_one_by_one(name, arguments):
    """Where the packages themselves are given the weights, but for the order of sums."""
    ours, theirs = weights(), weights()
    run, spec = run_of(name, ours, **arguments), spec_of(name)
    rate = run.weights.groups[0].rate
    reference = spec.imported()([{"params": theirs[:2]}, {"params": theirs[2:]}], lr=rate,
                                **spec.complete(dict(arguments)))
    if hasattr(reference, "train"):
        reference.train()
    for step in range(6):
        for mine, other, gradient in zip(ours, theirs, gradients(step), strict=True):
            mine.grad.copy_(gradient)
            other.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        run.step(~run.clip().isfinite())
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_lion_is_the_papers():
    """Algorithm 2 of arXiv 2302.06675: c = β1 m + (1 - β1) g; θ ← θ - η (sign(c) + λ θ); m ← β2 m + (1 - β2) g."""
    parameters, expected = weights(), [weight.detach().double() for weight in weights()]
    moments = [torch.zeros_like(weight) for weight in expected]
    run = run_of("Lion", parameters, weight_decay=0.1)
    train(run, parameters, range(5))
    for step, number in itertools.product(range(5), range(4)):
        gradient = gradients(step)[number].double()
        update = (0.9 * moments[number] + 0.1 * gradient).sign()
        expected[number] = expected[number] - 0.01 * (update + 0.1 * expected[number])
        moments[number] = 0.99 * moments[number] + 0.01 * gradient
    for mine, other in zip(parameters, expected, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-7)
    assert run.traits.state_bytes == 4


def test_lion_is_lion_pytorchs():
    lion = pytest.importorskip("lion_pytorch")
    parameters, theirs = weights(), weights()
    train(run_of("Lion", parameters, weight_decay=0.1, betas=(0.95, 0.98)), parameters, range(5))
    reference = lion.Lion(theirs, lr=0.01, betas=(0.95, 0.98), weight_decay=0.1)
    for step in range(5):
        for weight, gradient in zip(theirs, gradients(step), strict=True):
            weight.grad = gradient
        reference.step()
    for mine, other in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_riemannian_adamw_is_adamw_of_the_papers_gradients():
    """arXiv 2402.02347: (Bᵀ B + δ I)⁻¹ ∇A and ∇B (A Aᵀ + δ I)⁻¹; a convolution's A is [r, in k k]."""
    parameters, theirs = weights(), weights()
    train(run_of("RiemannianAdamW", parameters, delta=0.01, weight_decay=0.1), parameters, range(4))
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    eye = 0.01 * torch.eye(RANK, dtype=torch.float64)
    for step in range(4):
        found = [gradient.double() for gradient in gradients(step)]
        for down, up in ((0, 1), (2, 3)):
            a, b = theirs[down].detach().double().flatten(1), theirs[up].detach().double()
            theirs[down].grad = torch.linalg.solve(b.T @ b + eye, found[down].flatten(1)).view(SHAPES[down]).float()
            theirs[up].grad = torch.linalg.solve(a @ a.T + eye, found[up].T).T.float()
        reference.step()
    for mine, other in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_riemannian_adamw_needs_the_two_matrices():
    a, b, *_ = weights()
    network = SimpleNamespace(pairs=lambda: [(a, b)], parameter_groups=lambda *rates: [{"params": [a, b]}])
    settings = parse({"optimizer_type": "RiemannianAdamW"})
    check_network(settings, network)
    a.requires_grad_(False)
    with pytest.raises(SettingError):
        check_network(settings, network)
    check_network(parse({}), network)


def test_riemannian_adamw_and_two_rates_for_a_pair_exclude_each_other():
    a, b, *_ = weights()
    flat = FlatWeights([{"name": "a", "params": [a], "lr": 0.1}, {"name": "b", "params": [b], "lr": 1.6}])
    with pytest.raises(SettingError):
        RunOptimizer(flat, spec_of("RiemannianAdamW"), OptimizerConfig("RiemannianAdamW"), pairs=[(a, b)])


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "ProdigyPlusScheduleFree"])
def test_schedule_free_weights_to_save_are_the_average_and_those_trained_come_back_to_the_bit(name):
    """z and y of arXiv 2405.15682: y = (1 - β1) z + β1 x, x being what is saved."""
    parameters, undisturbed = weights(), weights()
    run, other = run_of(name, parameters), run_of(name, undisturbed)
    train(run, parameters, range(9))
    trained = bits(parameters)
    run.set_training(False)
    state = run.state()
    x = [parameter.detach().clone() for parameter in parameters]
    run.set_training(True)
    assert bits(parameters) == trained != bits(x)
    for number, (y, average) in enumerate(zip(parameters, x, strict=True)):
        torch.testing.assert_close(0.1 * state[f"{number}.z"] + 0.9 * average, y.detach(), rtol=1e-4, atol=1e-6)
    train(run, parameters, range(9, 12))
    train(other, undisturbed, range(12))
    assert bits(parameters) == bits(undisturbed)


def test_the_moving_average_is_diffusers_and_comes_back_from_the_state():
    ema = pytest.importorskip("diffusers.training_utils")
    parameters, theirs, rest = weights(), weights(), weights()

    def averaged(parameters):
        flat = FlatWeights([{"name": "unet", "params": parameters, "lr": 0.01}])
        return RunOptimizer(flat, AdamW(), OptimizerConfig("AdamW", ema_decay=0.9))

    def saved(run, parameters):
        run.set_training(False)
        found = [parameter.detach().clone() for parameter in parameters]
        run.set_training(True)
        return found
    run, reference = averaged(parameters), ema.EMAModel(theirs, decay=0.9)
    for step in range(60):
        if step == 40:
            for new, old in zip(rest, parameters, strict=True):
                new.data.copy_(old.data)
            resumed = averaged(rest)
            resumed.load_state({key: value.clone() for key, value in run.state().items()})
        train(run, parameters, range(step, step + 1))
        reference.step(parameters)
    for mine, other in zip(saved(run, parameters), reference.shadow_params, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)
    assert bits(saved(run, parameters)) != bits(parameters) and len(run.stored()) == 3
    train(resumed, rest, range(40, 60))
    assert bits(saved(resumed, rest)) == bits(saved(run, parameters)) and bits(rest) == bits(parameters)
    with pytest.raises(LoraFileError):
        run.load_state({"ema.0": torch.zeros(2)})


@pytest.mark.parametrize("name", ["DAdaptAdam", "DAdaptLion", "Prodigy", "ProdigyPlusScheduleFree"])
def test_the_rate_that_was_found_is_told(name):
    parameters = weights()
    run = run_of(name, parameters)
    train(run, parameters, range(12))
    told = run.learning_rates()["unet"]
    assert told == run.optimizer.param_groups[0]["d"] and 0 < told != 1


def test_adafactors_own_rate_is_told_and_the_settings_are_not_used():
    parameters, others = weights(), weights()
    run = run_of("Adafactor", parameters, rate=0.01)
    train(run, parameters, range(3))
    train(run_of("Adafactor", others, rate=0.5), others, range(3))
    assert bits(parameters) == bits(others) and run.learning_rates()["unet"] == 1e-2
    warming = run_of("Adafactor", weights(), warmup_init=True)
    train(warming, warming.weights.trained(), range(3))
    assert warming.learning_rates()["unet"] == pytest.approx(3e-6)


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=NAMES)
def test_the_memory_plan_counts_no_less_than_is_kept(name, arguments):
    large = [torch.nn.Parameter(0.1 * torch.randn(16, 320)), torch.nn.Parameter(0.1 * torch.randn(320, 16))]
    if PACKAGES.get(name):
        pytest.importorskip(PACKAGES[name])
    flat = FlatWeights([{"name": "unet", "params": large, "lr": 1.0}])
    run = RunOptimizer(flat, spec_of(name), OptimizerConfig(name, arguments), pairs=[tuple(large)])
    flat.gradient.fill_(0.01)
    run.step(torch.tensor(False))
    kept = sum(value.numel() * value.element_size() for value in run.stored()) / sum(weight.numel() for weight in large)
    assert kept <= run.traits.state_bytes * 1.01
    assert name not in OPTIMIZERS or arguments or kept >= 0.5 * run.traits.state_bytes


@pytest.mark.parametrize("kept", [
    {"9.exp_avg": torch.zeros(1)}, {"0.exp_avg": torch.zeros(2, 2)}, {"another.k": torch.tensor(1)}])
def test_a_state_of_other_weights_is_refused(kept):
    run = run_of("Lion", weights())
    with pytest.raises(LoraFileError):
        run.load_state(kept)


class TestChoosing:
    """Names, arguments, packages, and what does not fit."""

    def test_a_name_is_kohyas_in_any_case_or_a_module_and_class(self):
        assert isinstance(spec_of("adamw"), AdamW) and spec_of("prodigy") is OPTIMIZERS["Prodigy"]
        assert spec_of("prodigyplus.ProdigyPlusScheduleFree") is OPTIMIZERS["ProdigyPlusScheduleFree"]
        assert spec_of("SGD").imported() is torch.optim.SGD and spec_of("torch.optim.SGD").imported() is torch.optim.SGD

    @pytest.mark.parametrize("name", ["AdamX", "os.path", "torch.nn.Linear", "no_such_package.Class", "torch.optim.Adamy",
                                      "torch.optim.LBFGS", "a b.C"])
    def test_what_is_no_optimizer_or_cannot_be_used_as_one_is_refused_before_the_start(self, name):
        with pytest.raises(SettingError):
            check_optimizer(parse({"optimizer_type": name}), built=True)

    @pytest.mark.parametrize("name", ["AdamW", "RiemannianAdamW"])
    def test_what_torch_only_refuses_in_a_step_is_refused_before_the_start_too(self, name):
        chosen = {"optimizer_type": name, "optimizer_args": "fused=False capturable=True"}
        with pytest.raises(SettingError):
            check_optimizer(parse(chosen), built=True)
        check_optimizer(parse({"optimizer_type": name}), built=True)

    def test_only_what_was_installed_is_imported_for_a_name_that_somebody_typed(self, tmp_path, monkeypatch):
        (tmp_path / "lying_here.py").write_text("import torch\nraise SystemExit\nclass Class(torch.optim.SGD): pass\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(SettingError):
            check_optimizer(parse({"optimizer_type": "lying_here.Class"}))
        installed = tmp_path / "site-packages"
        installed.mkdir()
        (installed / "brought.py").write_text("import torch\nclass Class(torch.optim.SGD): pass\n")
        monkeypatch.syspath_prepend(str(installed))
        check_optimizer(parse({"optimizer_type": "brought.Class"}), built=True)

    @pytest.mark.parametrize("text", [
        "betas=0.9,0.98", "eps=1e-6 betas=(0.9, 0.98)", '"betas=0.9,0.98" eps=1e-6', ["betas=0.9,0.98", "amsgrad=true"]])
    def test_arguments_are_read_as_kohya_writes_them(self, text):
        assert optimizer_config(parse({"optimizer_args": text})).arguments["betas"] == (0.9, 0.98)

    @pytest.mark.parametrize("text", ["betas", "betas=a", "betas=0.9,0.9 betas=0.9,0.9", "momentum=0.9", "lr=1", "eps=-1",
                                      "betas=__import__('os')", "betas=0.9"])
    def test_arguments_that_cannot_be_are_refused_with_their_setting(self, text):
        with pytest.raises(SettingError, match="optimizer_args"):
            check_optimizer(parse({"optimizer_args": text}), built=True)

    def test_arguments_reach_the_optimizer_and_the_weight_decay_among_them_goes_before_the_setting(self):
        settings = parse({"optimizer_args": "betas=0.8,0.9 weight_decay=0.5", "weight_decay": 0.1})
        config = optimizer_config(settings)
        flat = FlatWeights([{"name": "unet", "params": weights(), "lr": 0.1}])
        group = RunOptimizer(flat, spec_of("AdamW"), config).optimizer.param_groups[0]
        assert (group["betas"], group["weight_decay"]) == ((0.8, 0.9), 0.5)
        assert any("weight_decay" in note for note in ignored_by_optimizer(settings))
        plain = optimizer_config(parse({"weight_decay": 0.1, "max_grad_norm": 2, "ema_decay": 0.9}))
        assert (plain.arguments, plain.max_grad_norm, plain.ema_decay) == ({"weight_decay": 0.1}, 2.0, 0.9)
        assert kept_bytes(parse({"ema_decay": 0.9})) == kept_bytes(parse({})) + 4

    @pytest.mark.parametrize(("name", "package"), [
        ("AdamW8bit", "bitsandbytes"), ("CAME", "came-pytorch"), ("DAdaptLion", "dadaptation"), ("Prodigy", "prodigyopt"),
        ("RAdamScheduleFree", "schedulefree"), ("ProdigyPlusScheduleFree", "prodigy-plus-schedule-free")])
    def test_a_package_that_is_missing_is_named_with_the_command_for_this_python(self, name, package, monkeypatch):
        spec = spec_of(name)
        for module in [module for module in sys.modules if module.split(".")[0] == spec.class_name.split(".")[0]]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, spec.class_name.split(".")[0], None)
        with pytest.raises(SettingError) as refusal:
            check_optimizer(parse({"optimizer_type": name, "learning_rate": 1}))
        assert f"{sys.executable} -m pip install --no-deps {package}" in str(refusal.value)

    def test_eight_bits_are_chosen_by_their_class_and_need_a_gpu(self, monkeypatch):
        """A package with bitsandbytes' interface: its kernels need a GPU, its states are bytes with a table in common."""
        class EightBit(torch.optim.Optimizer):
            table = torch.linspace(-1, 1, 256)

            def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-2):
                super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

            @torch.no_grad()
            def step(self, closure=None):
                for weight in itertools.chain.from_iterable(group["params"] for group in self.param_groups):
                    state = self.state[weight]
                    if not state:
                        state.update(step=0, state1=torch.full_like(weight, 127, dtype=torch.uint8),
                                     absmax1=torch.ones(1), qmap1=self.table)
                    state["step"] += 1
                    moment = 0.9 * state["qmap1"][state["state1"].long()] * state["absmax1"] + 0.1 * weight.grad
                    state["absmax1"].copy_(moment.abs().max())
                    state["state1"].copy_(torch.bucketize(moment / state["absmax1"], state["qmap1"]).clamp(max=255))
                    weight.sub_(moment, alpha=0.1)
        names = ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.adamw")
        for name in names:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[names[-1]].AdamW8bit = EightBit
        settings = parse({"optimizer_type": "adamw8bit"})
        check_optimizer(settings, built=True)
        check_optimizer_device(settings, torch.device("cuda"))
        with pytest.raises(SettingError):
            check_optimizer_device(settings, torch.device("cpu"))
        test_a_run_goes_on_from_its_state_to_the_same_bytes_and_skips_steps_that_overflow("AdamW8bit", {})

    @pytest.mark.parametrize(("values", "named"), [
        ({"optimizer_type": "Prodigy"}, "learning_rate"), ({"optimizer_type": "DAdaptAdam", "unet_lr": 0.1}, "unet_lr"),
        ({"optimizer_type": "Prodigy", "learning_rate": 1, "network_train_unet_only": False, "text_encoder_lr": 0.5},
         "text_encoder_lr"),
        ({"optimizer_type": "ProdigyPlusScheduleFree", "learning_rate": 1, "network_train_unet_only": False},
         "text_encoder_lr"),
        ({"lr_scheduler": "adafactor"}, "lr_scheduler"),
        ({"lr_scheduler": "adafactor", "optimizer_type": "Adafactor", "optimizer_args": "relative_step=False"}, "lr_scheduler"),
        ({"optimizer_type": "AdamWScheduleFree", "ema_decay": 0.9}, "ema_decay"),
        ({"optimizer_type": "AdamWScheduleFree", "scale_weight_norms": 1}, "scale_weight_norms"),
        ({"optimizer_type": "RiemannianAdamW", "loraplus_lr_ratio": 16}, "loraplus_lr_ratio"),
        ({"optimizer_type": "DAdaptAdam", "learning_rate": 1, "loraplus_unet_lr_ratio": 4}, "loraplus_unet_lr_ratio"),
        ({"optimizer_type": "Prodigy", "learning_rate": 1, "mid_lr_weight": "0.5"}, "mid_lr_weight"),
        ({"optimizer_type": "RiemannianAdamW", "optimizer_args": "delta=0"}, "optimizer_args")])
    def test_what_does_not_fit_the_optimizer_is_refused_by_name(self, values, named, monkeypatch):
        monkeypatch.setattr(Imported, "check", lambda self, arguments: None)  # whether its package is there
        with pytest.raises(SettingError, match=named):
            check_optimizer(parse(values))

    def test_two_rates_are_refused_where_one_is_possible(self):
        spec = dataclasses.replace(spec_of("torch.optim.SGD"), known=OPTIMIZERS["Prodigy"].traits({}))
        flat = FlatWeights([{"name": name, "params": [weight], "lr": rate}
                            for name, weight, rate in zip("ab", weights(), (1.0, 2.0), strict=False)])
        with pytest.raises(SettingError):
            RunOptimizer(flat, spec, OptimizerConfig("SGD"))

    @pytest.mark.parametrize(("values", "names"), [
        ({"optimizer_type": "Adafactor", "learning_rate": 1e-3, "lr_warmup_steps": 5, "lr_scheduler": "linear"},
         {"learning_rate", "lr_warmup_steps", "lr_scheduler"}),
        ({"optimizer_type": "Adafactor", "lr_scheduler": "adafactor"}, set()),
        ({"optimizer_type": "Adafactor", "loraplus_lr_ratio": 16, "mid_lr_weight": "0.5"},
         {"loraplus_lr_ratio", "mid_lr_weight"}),
        ({"optimizer_type": "Adafactor", "optimizer_args": "relative_step=False", "lr_scheduler": "linear"}, set()),
        ({"optimizer_type": "torch.optim.Rprop", "weight_decay": 0.1}, {"weight_decay"}),
        ({"optimizer_type": "Lion", "weight_decay": 0.1}, set())])
    def test_what_has_no_effect_on_an_optimizer_is_told(self, values, names):
        told = ignored_by_optimizer(parse(values))
        assert len(told) == len(names) and all(any(f"({name})" in note for note in told) for name in names)

    def test_a_schedule_has_no_effect_on_schedule_free_ones(self, monkeypatch):
        monkeypatch.setattr(Imported, "imported", lambda self: torch.optim.AdamW)
        told = ignored_by_optimizer(parse({"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "linear",
                                           "lr_warmup_steps": 5}))
        assert len(told) == 1 and "lr_scheduler" in told[0]
