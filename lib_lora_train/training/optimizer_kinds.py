"""The optimizers that a run can choose: torch's AdamW, our own, and those that are imported from a package when chosen."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lib_lora_train.errors import SettingError
from lib_lora_train.settings import named

ParamGroup = dict[str, Any]
Arguments = Mapping[str, object]
Pairs = Sequence[tuple[nn.Parameter, nn.Parameter]]
"""(A [r, ...], B [out, r]) of each layer whose change is the product B A."""


@dataclasses.dataclass(frozen=True)
class Traits:
    """What a run must know of an optimizer before it is made.

    accepts_flat  it is given one parameter a group instead of hundreds. Only where that changes nothing but the order of
                  sums: every element alike, or norms and products over all elements of all weights
    state_bytes   that it keeps for each trained number
    adapts_rate   it finds the learning rate itself, `d` in its groups: the rates of the settings are factors, mostly 1
    one_rate      all groups must have the same rate
    averages      the weights to save are not those that are trained (schedule-free)
    own_schedule  why no schedule is applied, "" where one is
    own_rate      whether the rates of the settings are not used
    cuda_only     whether it has no kernels elsewhere
    needs_pairs   whether it can only train A and B of a LoRA
    """

    accepts_flat: bool = False
    state_bytes: float = 8.0
    adapts_rate: bool = False
    one_rate: bool = False
    averages: bool = False
    own_schedule: str = ""
    own_rate: bool = False
    cuda_only: bool = False
    needs_pairs: bool = False


class OptimizerSpec(Protocol):
    """How an optimizer is built, and what it can be given. `class_name` is what the LoRA file's metadata call it."""

    class_name: str

    def traits(self, arguments: Arguments) -> Traits:
        """What holds of it with these arguments."""

    def check(self, arguments: Arguments) -> None:
        """Raise SettingError where it, or one of the arguments, is not there."""

    def build(self, groups: list[ParamGroup], *, arguments: Arguments, pairs: Pairs = ()) -> torch.optim.Optimizer:
        """The optimizer of torch's parameter groups, each with "name", "params" and "lr". What it keeps of a weight is in its
        `state`, and what it keeps besides in its groups. Raises SettingError."""


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), torch's own; one kernel a group where torch has one that heeds the
    overflow flag (CUDA; from torch 2.4 on the CPU). The one for MPS, from torch 2.4 on, ignores it."""

    class_name = "torch.optim.adamw.AdamW"

    def traits(self, arguments: Arguments) -> Traits:
        """See `OptimizerSpec`."""
        return Traits(accepts_flat=True, state_bytes=12.0 if arguments.get("amsgrad") else 8.0)

    def check(self, arguments: Arguments) -> None:
        """See `OptimizerSpec`."""
        check_names(torch.optim.AdamW, arguments)

    def build(self, groups: list[ParamGroup], *, arguments: Arguments, pairs: Pairs = ()) -> torch.optim.Optimizer:
        """See `OptimizerSpec`. Its state is there before the first step."""
        self.check(arguments)
        device = groups[0]["params"][0].device
        try:
            # Copies: torch writes its options into the groups, also where it then refuses.
            optimizer = constructed(torch.optim.AdamW, [dict(group) for group in groups], {
                "fused": device.type in ("cuda", "cpu"), "capturable": device.type == "cuda", **arguments})
        except RuntimeError:
            optimizer = constructed(torch.optim.AdamW, groups, arguments)
        names = ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if arguments.get("amsgrad") else []))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = {"step": torch.zeros((), device=device)} | {
                    name: torch.zeros_like(parameter, requires_grad=False) for name in names}
        return optimizer


class RiemannianAdamW:
    """AdamW of preconditioned gradients (Zhang & Pilanci 2024, arXiv 2402.02347): A's are multiplied by (Bᵀ B + δ I)⁻¹ and
    B's by (A Aᵀ + δ I)⁻¹. The argument `delta` is δ, by default 1e-6 as in the authors' code. Other weights than A and B are
    trained as with AdamW."""

    class_name = f"{__name__}.RiemannianAdamW"

    def traits(self, arguments: Arguments) -> Traits:
        """See `OptimizerSpec`."""
        return dataclasses.replace(AdamW().traits(arguments), needs_pairs=True)

    def check(self, arguments: Arguments) -> None:
        """See `OptimizerSpec`."""
        check_names(torch.optim.AdamW, arguments, also=("delta",))
        delta = arguments.get("delta", 1e-6)
        if not isinstance(delta, (int, float)) or not delta > 0:
            raise SettingError(f"{named('optimizer_args')}: delta = {delta!r} is not possible", why="it must be above 0")

    def build(self, groups: list[ParamGroup], *, arguments: Arguments, pairs: Pairs = ()) -> torch.optim.Optimizer:
        """See `OptimizerSpec`."""
        self.check(arguments)
        rest = dict(arguments)
        delta = float(rest.pop("delta", 1e-6))
        optimizer = AdamW().build(groups, arguments=rest)
        optimizer.register_step_pre_hook(lambda *_: precondition(pairs, delta=delta))
        return optimizer


@torch.no_grad()
def precondition(pairs: Pairs, *, delta: float) -> None:
    """Multiply the gradients of all A [r, ...] and B [out, r] as `RiemannianAdamW` says. Nothing waits for the device: the
    r x r matrices of one rank are inverted together."""
    by_rank: dict[int, list[tuple[nn.Parameter, nn.Parameter]]] = {}
    for down, up in pairs:
        by_rank.setdefault(down.shape[0], []).append((down, up))
    for rank, group in by_rank.items():
        grams = torch.stack([side for down, up in group for side in (
            up.flatten(1).T @ up.flatten(1), down.flatten(1) @ down.flatten(1).T)])
        grams += delta * torch.eye(rank, device=grams.device)
        inverses = torch.linalg.inv_ex(grams).inverse
        for number, (down, up) in enumerate(group):
            down.grad.copy_((inverses[2 * number] @ down.grad.flatten(1)).view_as(down))
            up.grad.copy_((up.grad.flatten(1) @ inverses[2 * number + 1]).view_as(up))


class LionOptimizer(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675): the sign of an interpolated momentum, and decoupled weight decay. It takes the
    overflow flag as torch's fused optimizers do, so that nothing waits for the device."""

    takes_found_inf = True
    found_inf: Tensor | None = None

    def __init__(self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
                 weight_decay: float = 0.0) -> None:
        if not all(0.0 <= beta <= 1.0 for beta in betas):
            raise ValueError(f"betas = {betas} must lie between 0 and 1")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"exp_avg": torch.zeros_like(parameter, requires_grad=False)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step, but for weights and momentum where `found_inf` is not 0."""
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for parameter in group["params"]:
                momentum, gradient = self.state[parameter]["exp_avg"], parameter.grad
                update = momentum.lerp(gradient, 1 - beta1).sign_()
                changed = (parameter * (1 - lr * group["weight_decay"]) - lr * update, momentum.lerp(gradient, 1 - beta2))
                for old, new in zip((parameter, momentum), changed, strict=True):
                    old.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, old, new))


@dataclasses.dataclass(frozen=True)
class Imported:
    """An optimizer whose class is imported when it is chosen.

    class_name   "package.module.Class"
    package      what pip installs it from, "" where it comes with torch or the WebUI
    known        its traits; `varying` are those that depend on the arguments
    complete     adds to the arguments what is given to the class besides
    """

    class_name: str
    package: str = ""
    known: Traits = Traits()
    varying: Callable[[Arguments], Mapping[str, object]] = lambda arguments: {}
    complete: Callable[[dict[str, object]], dict[str, object]] = lambda arguments: arguments

    def traits(self, arguments: Arguments) -> Traits:
        """See `OptimizerSpec`."""
        return dataclasses.replace(self.known, **self.varying(arguments))

    def check(self, arguments: Arguments) -> None:
        """See `OptimizerSpec`."""
        check_names(self.imported(), arguments)

    def imported(self) -> type[torch.optim.Optimizer]:
        """The class. Raises SettingError where its package is not installed, with the command that installs it and nothing
        else, or where it is no optimizer."""
        module, _, name = self.class_name.rpartition(".")
        chosen = f"{named('optimizer_type')} = {name}"
        importlib.invalidate_caches()  # it may have been installed meanwhile
        if not self.package and not _is_installed(module.partition(".")[0]):
            raise SettingError(f"{chosen} cannot be used", why=f"there is no installed package {module.partition('.')[0]}",
                               remedy="install it, or choose AdamW")
        try:
            found = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            package = self.package or module.partition(".")[0]
            if error.name and error.name.partition(".")[0] != module.partition(".")[0]:
                raise SettingError(f"{chosen} cannot be used", why=f"its package {package} needs {error.name}") from error
            raise SettingError(f"{chosen} needs the package {package}", why="it is not installed",
                               remedy=f"run {install_command(package)}, or choose AdamW") from error
        except Exception as error:
            raise SettingError(f"{chosen} cannot be used", why=f"{module}: {str(error) or type(error).__name__}") from error
        if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer):
            raise SettingError(f"{chosen} cannot be used", why=f"{self.class_name} is no optimizer of torch's kind")
        return found

    def build(self, groups: list[ParamGroup], *, arguments: Arguments, pairs: Pairs = ()) -> torch.optim.Optimizer:
        """See `OptimizerSpec`."""
        self.check(arguments)
        optimizer = constructed(self.imported(), groups, self.complete(dict(arguments)))
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()
        return optimizer


def _is_installed(package: str) -> bool:
    """Whether it was installed, and is not just any file on the path: whoever may type a name must not run that."""
    if package in ("torch", __name__.partition(".")[0]):
        return True
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    places = [*(spec.submodule_search_locations or ()), spec.origin or ""] if spec else []
    return any({"site-packages", "dist-packages"} & set(Path(place).parts) for place in places)


def install_command(package: str) -> str:
    """What installs a package into the Python that is running, and changes no other."""
    if package == "bitsandbytes" and tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 4):
        package = "bitsandbytes==0.45.5"  # the last one for these versions of torch
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    return f"{python} -m pip install --no-deps {package}"


def constructed(cls: type[torch.optim.Optimizer], groups: list[ParamGroup], arguments: Arguments) -> torch.optim.Optimizer:
    """`cls(groups, lr, **arguments)`. Raises SettingError where it objects to a value."""
    names = _names(cls)
    given = {"lr": groups[0]["lr"], **arguments}
    try:
        return cls(groups, **{name: value for name, value in given.items() if names is None or name in names})
    except (ValueError, TypeError, AssertionError) as error:
        raise SettingError(f"{named('optimizer_args')} does not suit {cls.__name__}", why=str(error).split("\n")[0] or
                           "one of the values is not possible", remedy="correct the value, or leave it out") from error


def check_names(cls: type[torch.optim.Optimizer], arguments: Arguments, *, also: tuple[str, ...] = ()) -> None:
    """Raise SettingError for an argument that the optimizer does not know. A weight decay of the settings may be one."""
    names = {*(_names(cls) or arguments), *also, "weight_decay"}
    for name in [name for name in arguments if name not in names]:
        near = difflib.get_close_matches(name, names, n=1)
        raise SettingError(f"{named('optimizer_args')} holds {name!r}, which {cls.__name__} does not know",
                           remedy=f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(sorted(names - {'lr'}))}")


def knows_weight_decay(cls: type[torch.optim.Optimizer]) -> bool:
    """Whether it has an argument of that name."""
    names = _names(cls)
    return names is None or "weight_decay" in names


def _names(cls: type[torch.optim.Optimizer]) -> tuple[str, ...] | None:
    """The names of its arguments, None where it takes any."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[2:]  # without self and the weights
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return tuple(parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL)
