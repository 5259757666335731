"""Optimizers by kohya's names, and how a run uses one: learning rates, clipping, and steps that overflowed.

An optimizer is added by one entry in `OPTIMIZERS`: an object with the attributes of `OptimizerSpec`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lib_lora_train.adapters.flat import FlatGroup, FlatWeights
from lib_lora_train.errors import SettingError
from lib_lora_train.settings import named
from lib_lora_train.training import optimizer_kinds, optimizer_state
from lib_lora_train.training.moving_average import MovingAverage
from lib_lora_train.training.optimizer_kinds import AdamW, Arguments, Imported, OptimizerSpec, Pairs, RiemannianAdamW, Traits

_EMA = "ema."  # before the names of the average's parts in a state
_FREE = "a schedule-free optimizer needs none"
_D_ADAPTED = Traits(accepts_flat=True, state_bytes=12.0, adapts_rate=True, one_rate=True)
_EIGHT_BIT = Traits(state_bytes=2.1, cuda_only=True)  # weights of less than 4096 numbers stay in 32 bits
_SCHEDULE_FREE = Traits(accepts_flat=True, averages=True, own_schedule=_FREE)


def _adafactor(arguments: Arguments) -> dict[str, object]:
    """As sd-scripts completes them: `relative_step` unless it is switched off, and always with `warmup_init`."""
    relative = bool(arguments.get("relative_step", True) or arguments.get("warmup_init", False))
    return {**arguments, "relative_step": relative, **({"lr": None} if relative else {})}


def _relative(arguments: Arguments) -> Mapping[str, object]:
    relative = _adafactor(arguments)["relative_step"]
    own = {"own_rate": True, "own_schedule": "Adafactor with relative_step has a learning rate of its own"} if relative else {}
    return {**own, "state_bytes": 4.5 if arguments.get("beta1") is not None else 0.5}


def _prodigy_plus(arguments: Arguments) -> Mapping[str, object]:
    free = bool(arguments.get("use_schedulefree", True))
    return {"averages": free, "own_schedule": _FREE if free else "",
            "state_bytes": 5.0 if arguments.get("factored", True) else 9.0}


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "AdamW": AdamW(),
    "AdamW8bit": Imported("bitsandbytes.optim.adamw.AdamW8bit", "bitsandbytes", _EIGHT_BIT),
    "PagedAdamW8bit": Imported("bitsandbytes.optim.adamw.PagedAdamW8bit", "bitsandbytes", _EIGHT_BIT),
    "Lion": Imported(f"{optimizer_kinds.__name__}.LionOptimizer", known=Traits(accepts_flat=True, state_bytes=4.0)),
    "Lion8bit": Imported("bitsandbytes.optim.lion.Lion8bit", "bitsandbytes",
                         dataclasses.replace(_EIGHT_BIT, state_bytes=1.1)),
    "PagedLion8bit": Imported("bitsandbytes.optim.lion.PagedLion8bit", "bitsandbytes",
                              dataclasses.replace(_EIGHT_BIT, state_bytes=1.1)),
    "SGDNesterov": Imported("torch.optim.sgd.SGD", known=Traits(accepts_flat=True, state_bytes=4.0),
                            complete=lambda arguments: {"momentum": 0.9, "nesterov": True, **arguments}),
    "Adafactor": Imported("transformers.optimization.Adafactor", "transformers", varying=_relative, complete=_adafactor),
    "CAME": Imported("came_pytorch.CAME.CAME", "came-pytorch", Traits(state_bytes=5.0)),
    # Weight decay as AdamW's: added to a LoRA's small gradients it would outweigh them.
    "DAdaptAdam": Imported("dadaptation.dadapt_adam.DAdaptAdam", "dadaptation", _D_ADAPTED,
                           complete=lambda arguments: {"decouple": True, **arguments}),
    "DAdaptLion": Imported("dadaptation.dadapt_lion.DAdaptLion", "dadaptation",
                           dataclasses.replace(_D_ADAPTED, state_bytes=8.0)),
    "DAdaptAdaGrad": Imported("dadaptation.dadapt_adagrad.DAdaptAdaGrad", "dadaptation",
                              dataclasses.replace(_D_ADAPTED, state_bytes=16.0)),
    "DAdaptAdan": Imported("dadaptation.dadapt_adan.DAdaptAdan", "dadaptation",
                           dataclasses.replace(_D_ADAPTED, state_bytes=20.0)),
    "Prodigy": Imported("prodigyopt.prodigy.Prodigy", "prodigyopt", dataclasses.replace(_D_ADAPTED, state_bytes=16.0)),
    "AdamWScheduleFree": Imported("schedulefree.adamw_schedulefree.AdamWScheduleFree", "schedulefree", _SCHEDULE_FREE),
    "RAdamScheduleFree": Imported("schedulefree.radam_schedulefree.RAdamScheduleFree", "schedulefree", _SCHEDULE_FREE),
    "SGDScheduleFree": Imported("schedulefree.sgd_schedulefree.SGDScheduleFree", "schedulefree",
                                dataclasses.replace(_SCHEDULE_FREE, state_bytes=4.0)),
    "ProdigyPlusScheduleFree": Imported(
        "prodigyplus.prodigy_plus_schedulefree.ProdigyPlusScheduleFree", "prodigy-plus-schedule-free",
        Traits(adapts_rate=True), varying=_prodigy_plus),
    "RiemannianAdamW": RiemannianAdamW(),
}
"""By kohya's name (optimizer_type). Flat parameters suit Prodigy and D-Adaptation too: their `d` is made of sums over all
weights, and each of these sums is read back from the device."""


def spec_of(name: str) -> OptimizerSpec:
    """The optimizer of this name in upper or lower case, or as "module.Class"; as in sd-scripts a class of torch.optim needs no
    module. Raises SettingError where there is none of the name."""
    root, _, last = name.rpartition(".")
    for known, spec in OPTIMIZERS.items():
        if known.lower() == (last if root else name).lower() and root.partition(".")[0] in (
                "", spec.class_name.partition(".")[0]):
            return spec
    if not root and isinstance(getattr(torch.optim, name, None), type):
        root = "torch.optim"
    if not root or root.partition(".")[0] in sys.stdlib_module_names or not all(map(str.isidentifier, name.split("."))):
        raise SettingError(f"{named('optimizer_type')} = {name!r} is not known",
                           remedy=f"choose one of {', '.join(OPTIMIZERS)}, or write module.Class")
    free = last.lower().endswith("schedulefree")  # as sd-scripts tells them
    return Imported(f"{root}.{last}", known=Traits(averages=free, own_schedule=_FREE if free else ""))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer by name, its arguments (the weight decay among them), the longest gradient allowed (0 for any), and the
    decay of the weights' moving average (0 for none)."""

    name: str = "AdamW"
    arguments: Arguments = dataclasses.field(default_factory=dict)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0


class RunOptimizer:
    """The optimizer of a run on its flat weights.

    Overflow is read off the gradients' norm, which clipping needs anyway: it is not finite if one of them is not.
    """

    def __init__(self, weights: FlatWeights, spec: OptimizerSpec, config: OptimizerConfig, *, pairs: Pairs = ()) -> None:
        """`pairs` are A and B of the layers that have them. Raises SettingError where the optimizer does not suit these."""
        self.weights, self.traits, self._max_grad_norm = weights, spec.traits(config.arguments), config.max_grad_norm
        self._rates = {group.name: group.rate for group in weights.groups}
        rate_of = {weight: group.rate for group in weights.groups for _, weight, _ in group.members}
        pairs = [pair for pair in pairs if rate_of.keys() >= set(pair)]
        if self.traits.needs_pairs and any(rate_of[down] != rate_of[up] for down, up in pairs):
            raise SettingError(f"{named('optimizer_type')} = {config.name} and LoRA+ exclude each other", why="both make up "
                               "for the different sizes of a LoRA's two matrices", remedy="switch LoRA+ off, or choose AdamW")
        check_rates(self.traits, [group.rate for group in weights.groups], config.name)
        self.optimizer = spec.build(
            [{"name": group.name, "lr": group.rate, "params": self._parameters(group)} for group in weights.groups],
            arguments=config.arguments, pairs=pairs)
        self._built = tuple(dict(group) for group in self.optimizer.param_groups)
        self._trained_values: Tensor | None = None
        self._average = MovingAverage(weights.values, decay=config.ema_decay) if config.ema_decay else None
        # A fused kernel takes the overflow flag and the learning rate as tensors, so that the device decides alone and nothing
        # waits for it. Without one the flag is read, which costs nothing on the CPU; on a GPU it waits for the step.
        fused = bool(self.optimizer.defaults.get("fused"))
        self._takes_flag = fused or bool(getattr(self.optimizer, "takes_found_inf", False))
        if fused and weights.values.device.type == "cuda":
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=weights.values.device)

    def _parameters(self, group: FlatGroup) -> list[torch.nn.Parameter]:
        return [group.parameter] if self.traits.accepts_flat else [weight for _, weight, _ in group.members]

    def set_learning_rate(self, factor: float, *, stopped: Collection[str] = ()) -> None:
        """Multiply each group's learning rate by the schedule's factor; that of `stopped` groups (their names) by 0."""
        for group, flat in zip(self.optimizer.param_groups, self.weights.groups, strict=True):
            rate = self._rates[flat.name] = 0.0 if flat.name in stopped else flat.rate * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            elif not self.traits.own_rate:
                group["lr"] = rate

    def learning_rates(self) -> dict[str, float]:
        """The learning rates in force, by the group's name. Where the optimizer finds them, what it has found so far."""
        found = dict(self._rates)
        for group, (name, rate) in zip(self.optimizer.param_groups, self._rates.items(), strict=True):
            if self.traits.adapts_rate and isinstance(group.get("d"), float):
                found[name] = rate * group["d"]
            elif self.traits.own_rate:
                found[name] = self._relative_step(group)
        return found

    def _relative_step(self, group: optimizer_kinds.ParamGroup) -> float:
        """Adafactor's (Shazeer & Stern 2018, arXiv 1804.04235, section 8), before it is multiplied by the weights' size."""
        step = max(1, int(self.optimizer.state.get(group["params"][0], {}).get("step", 1)))
        return min(1e-6 * step if group["warmup_init"] else 1e-2, step**-0.5)

    def clip(self, inverse_scale: Tensor | None = None) -> Tensor:
        """Unscale the gradients and clip their norm (torch.nn.utils.clip_grad_norm_). Returns the norm before, 0-d on the
        device: not finite where they overflowed. `inverse_scale` (0-d) is what gradients of a scaled loss are multiplied
        by."""
        gradient = self.weights.gradient
        norm = torch.linalg.vector_norm(gradient)
        if inverse_scale is not None:
            norm = norm * inverse_scale
        factor = inverse_scale
        if self._max_grad_norm:
            clip = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            factor = clip if factor is None else factor * clip
        if factor is not None:
            gradient.mul_(factor)
        return norm

    def step(self, overflowed: Tensor) -> None:
        """Apply the gradients unless they overflowed."""
        if self._takes_flag:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, overflowed.float()
            self.optimizer.step()
        elif not bool(overflowed):
            self.optimizer.step()
        if self._average:
            self._average.update(self.weights.values)
        self.weights.refresh()

    def set_training(self, training: bool) -> None:
        """Let the weights be those to train, or those to save. The former come back to the bit."""
        if not (self.traits.averages or self._average) or training == (self._trained_values is None):
            return
        if training:
            if self.traits.averages:
                self.optimizer.train()
            self.weights.values.copy_(self._trained_values)
            self._trained_values = None
        else:
            self._trained_values = self.weights.values.clone()
            if self.traits.averages:
                self.optimizer.eval()
            if self._average:
                self.weights.values.copy_(self._average.values)
        self.weights.refresh()

    def stored(self) -> list[Tensor]:
        """All that it keeps on the device, but for single numbers and what can leave by itself; it may be moved in place."""
        kept = [value for state in self.optimizer.state.values() for value in state.values()
                if isinstance(value, Tensor) and value.ndim and not getattr(value, "is_paged", False)]
        return [*kept, *([self._average.values] if self._average else [])]

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs, {"3.exp_avg": of the weight of that number, "unet.d": of that group, "ema.3": average
        of that weight}, sharing memory with what is in use. Raises TrainingError where it holds what cannot be kept."""
        return optimizer_state.state_of(self.optimizer, self.weights, built=self._built,
                                        flat=self.traits.accepts_flat) | self._average_state()

    def _average_state(self) -> dict[str, Tensor]:
        return {} if self._average is None else {f"{_EMA}updates": self._average.updates} | {
            f"{_EMA}{number}": part for number, part in self.weights.cut(self._average.values)}

    def load_state(self, kept: Mapping[str, Tensor]) -> None:
        """Go on from a `state`. Raises LoraFileError where it does not fit the weights, and changes nothing then. Without an
        average in it one begins with the present weights."""
        average = {key: value for key, value in self._average_state().items() if key in kept}
        if any(kept[key].shape != value.shape for key, value in average.items()):
            raise optimizer_state.strange()
        optimizer_state.load({key: value for key, value in kept.items() if not key.startswith(_EMA)}, self.optimizer,
                             self.weights, flat=self.traits.accepts_flat)
        for key, value in average.items():
            value.copy_(kept[key])


def check_rates(traits: Traits, rates: Sequence[float], name: str) -> None:
    """Raise SettingError where the parts have several learning rates and the optimizer has one."""
    if traits.one_rate and len(set(rates)) > 1:
        raise SettingError(f"{named('optimizer_type')} = {name} needs one learning rate", why=f"here there are "
                           f"{', '.join(f'{rate:g}' for rate in rates)}", remedy=f"give {named('text_encoder_lr')} and all "
                           f"other parts the UNet's, {rates[0]:g}")
