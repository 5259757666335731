"""The optimizer and the schedule of a run, from its settings: what they are, whether they are possible, what has no effect."""

from __future__ import annotations

import math

import torch

from lib_lora_train.adapters.flat import FlatWeights
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.errors import SettingError
from lib_lora_train.settings import DECLARATIONS, Settings, flat, named, no_effect
from lib_lora_train.settings.arguments import arguments_of
from lib_lora_train.settings.kohya import default_weight_decay
from lib_lora_train.settings.network import BLOCK_RATES, LORA_PLUS
from lib_lora_train.training.optimizer_kinds import Arguments, Imported, Traits, knows_weight_decay
from lib_lora_train.training.optimizers import OptimizerConfig, RunOptimizer, check_rates, spec_of
from lib_lora_train.training.schedules import ScheduleConfig

_LEAST_FACTOR = 0.1  # sd-scripts warns at this learning rate and below of optimizers that find the rate themselves
_POLYNOMIAL_END = 1e-7  # of the learning rate, in transformers


def optimizer_config(settings: Settings) -> OptimizerConfig:
    """The run's optimizer. Raises SettingError for arguments that cannot be read."""
    chosen = settings.optimizer
    arguments = {"weight_decay": chosen.weight_decay, **_arguments(settings)}
    return OptimizerConfig(chosen.optimizer_type, arguments, chosen.max_grad_norm, chosen.ema_decay)


def schedule_config(settings: Settings, *, steps: int) -> ScheduleConfig:
    """The schedule that the run's optimizer is given."""
    chosen, traits = settings.optimizer, traits_of(settings)
    rate = settings.rates[0]
    floor = chosen.lr_scheduler_min_lr_ratio
    if chosen.lr_scheduler == "polynomial":
        floor = max(floor, min(1.0, _POLYNOMIAL_END / rate)) if rate else floor
    return ScheduleConfig(
        name="constant" if traits.own_schedule else chosen.lr_scheduler, steps=steps,
        warmup=0 if traits.own_rate else in_steps(chosen.lr_warmup_steps, steps), cycles=chosen.lr_scheduler_num_cycles,
        power=chosen.lr_scheduler_power, min_lr_ratio=floor, decay=in_steps(chosen.lr_decay_steps, steps),
        timescale=chosen.lr_scheduler_timescale)


def embedding_steps(settings: Settings, steps: int) -> int:
    """The steps of a run of so many after which the trigger word's vectors stay as they are."""
    return steps if traits_of(settings).own_schedule else math.ceil(settings.network.stop_embedding_training * steps)


def in_steps(number: float, steps: int) -> int:
    """A number of steps, or a share of so many."""
    return int(number * steps if number < 1 else number)


def kept_bytes(settings: Settings) -> float:
    """What is kept of each trained number besides weight and gradient. Raises SettingError."""
    return traits_of(settings).state_bytes + (4.0 if settings.optimizer.ema_decay else 0.0)


def traits_of(settings: Settings) -> Traits:
    """What holds of the run's optimizer. Raises SettingError."""
    return spec_of(settings.optimizer.optimizer_type).traits(_arguments(settings))


def check_optimizer(settings: Settings, *, built: bool = False) -> None:
    """Raise SettingError where optimizer, arguments, rates and schedule do not fit each other, or a package is missing. With
    `built` the optimizer is built on trial, as it will be when the training begins."""
    config = optimizer_config(settings)
    spec = spec_of(config.name)
    traits, chosen, rates = spec.traits(config.arguments), settings.optimizer, [
        rate for rate in (*settings.rates, settings.embedding_rate) if rate]
    if "lr" in _arguments(settings):
        raise SettingError(f"{named('optimizer_args')} holds 'lr'", remedy=f"write {named('learning_rate')}")
    spec.check(config.arguments)
    if traits.adapts_rate and min(rates) <= _LEAST_FACTOR:
        low = "unet_lr" if chosen.unet_lr else "learning_rate"
        for name, rate in (("text_encoder_lr", settings.rates[1]), ("embedding_lr", settings.embedding_rate)):
            low = name if rate == min(rates) else low
        raise SettingError(f"{named(low)} = {min(rates):g} is too low for {config.name}", why="it finds the learning rate "
                           "itself, and the one that is set multiplies it", remedy=f"set {low} to 1")
    check_rates(traits, rates, config.name)
    _check_beside_network(settings, traits)
    if chosen.lr_scheduler == "adafactor" and not traits.own_rate:
        raise SettingError(f"{named('lr_scheduler')} = adafactor is not possible with {config.name}", why="it is the learning "
                           "rate that Adafactor chooses with relative_step",
                           remedy=f"choose constant, or {named('optimizer_type')} = Adafactor")
    if traits.averages and chosen.ema_decay:
        raise SettingError(f"{named('ema_decay')} is not possible with {config.name}", why="it saves an average of the weights "
                           "already", remedy="set it to 0")
    if built:
        _build_on_trial(config, rate=rates[0], step=not getattr(spec, "package", ""))


def _check_beside_network(settings: Settings, traits: Traits) -> None:
    """Raise SettingError for settings of the network that the optimizer cannot be used with."""
    name, network = settings.optimizer.optimizer_type, settings.network
    for given in (*LORA_PLUS, *BLOCK_RATES):
        value = getattr(network, given)
        if value not in (0, 1, "") and (traits.one_rate or traits.needs_pairs and given in LORA_PLUS):
            raise SettingError(f"{named(given)} = {value} is not possible with {name}", why="it has one learning rate for all "
                               "weights" if traits.one_rate else "both make up for the different sizes of the two matrices",
                               remedy=f"leave {given} empty, or choose AdamW")
    if traits.averages and network.scale_weight_norms:
        raise SettingError(f"{named('scale_weight_norms')} is not possible with {name}", why="the weights that are scaled are "
                           "not those that are saved", remedy="set it to 0, or choose another optimizer")


def _build_on_trial(config: OptimizerConfig, *, rate: float, step: bool) -> None:
    """Build the optimizer of a tiny layer; with `step` it makes a step and keeps its state, too."""
    pair = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = RunOptimizer(FlatWeights([{"name": "unet", "params": list(pair), "lr": rate}]), spec_of(config.name), config,
                             pairs=[pair])
    if step:
        try:
            optimizer.weights.gradient.fill_(1.0)
            optimizer.step(torch.tensor(False))
            optimizer.state()
        except Exception as error:
            raise SettingError(f"{named('optimizer_type')} = {config.name} cannot be used here",
                               why=str(error).split("\n")[0], remedy=f"leave {named('optimizer_args')} empty, or choose "
                               "another one, such as AdamW") from error


def check_optimizer_device(settings: Settings, device: torch.device) -> None:
    """Raise SettingError where the optimizer has no kernels for the device."""
    if traits_of(settings).cuda_only and device.type != "cuda":
        raise SettingError(f"{named('optimizer_type')} = {settings.optimizer.optimizer_type} is not possible on the device "
                           f"{device.type!r}", why="it needs a CUDA GPU", remedy="choose AdamW")


def check_network(settings: Settings, network: AdapterNetwork) -> None:
    """Raise SettingError where no layer is trained, or where the optimizer trains pairs of matrices and there are none."""
    if not any(weight.requires_grad for group in network.parameter_groups(
        *settings.rates, settings.embedding_rate) for weight in group["params"]):
        raise SettingError("Nothing would be trained", why="the learning rates of all layers of the network are 0",
                           remedy=f"raise {named('text_encoder_lr')} or {named('learning_rate')}, or choose other layers")
    trained = [pair for pair in network.pairs() if all(weight.requires_grad for weight in pair)]
    if traits_of(settings).needs_pairs and not trained:
        raise SettingError(f"{named('optimizer_type')} = {settings.optimizer.optimizer_type} is not possible", why="it trains "
                           "the two matrices of a LoRA, which this kind of network does not have", remedy="choose AdamW")


def ignored_by_optimizer(settings: Settings) -> list[str]:
    """A sentence for each setting that was changed and has no effect on this optimizer. Raises SettingError."""
    default, now, chosen = flat(Settings()), flat(settings), settings.optimizer
    spec, given, found = spec_of(chosen.optimizer_type), _arguments(settings), list[tuple[str, str]]()
    traits, kind = spec.traits(given), chosen.optimizer_type
    if "weight_decay" in given:
        found.append(("weight_decay", f"{named('optimizer_args')} names one"))
    elif isinstance(spec, Imported) and not knows_weight_decay(spec.imported()):
        found.append(("weight_decay", f"{kind} has none"))
    if traits.own_schedule:
        found += [(name, traits.own_schedule) for name in (
            "lr_scheduler", "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_min_lr_ratio", "lr_decay_steps",
            "lr_scheduler_timescale")]
    if traits.own_rate:
        found += [(name, traits.own_schedule) for name in (
            "learning_rate", "unet_lr", "text_encoder_lr", "lr_warmup_steps", *LORA_PLUS)]
        found += [(name, f"{traits.own_schedule}, so that only a 0 counts") for name in BLOCK_RATES]
    if traits.own_rate and settings.embedding_rate:
        found.append(("embedding_lr", traits.own_schedule))
    if traits.own_schedule and settings.embedding_rate:
        found.append(("stop_embedding_training", traits.own_schedule))
    return [no_effect(name, why) for name, why in found if now[name] not in (default[name], "adafactor")]


def optimizer_name(settings: Settings) -> str:
    """As a LoRA file's metadata name it (ss_optimizer): the class, and in brackets the arguments that were given, also a weight
    decay that is not what kohya's scripts would have without one."""
    arguments, decay = _arguments(settings), settings.optimizer.weight_decay
    if decay != default_weight_decay(settings.optimizer.optimizer_type):
        arguments = {"weight_decay": decay, **arguments}
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    return spec_of(settings.optimizer.optimizer_type).class_name + (f"({given})" if given else "")


def _arguments(settings: Settings) -> Arguments:
    return arguments_of(DECLARATIONS["optimizer_args"], settings.optimizer.optimizer_args)
