"""The network that a run trains: a new one, or the one of a file or of a resumed state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lib_lora_train.adapters import file
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.errors import LoraFileError, counted, some_of, translated
from lib_lora_train.events import Report, Warned
from lib_lora_train.model.family import Family
from lib_lora_train.model.fingerprint import not_finite
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.run.embedding import add_trigger_embedding
from lib_lora_train.run.optimizing import check_network
from lib_lora_train.run.planning import RunPlan
from lib_lora_train.run.selection import chosen_kind, dropout_rates, module_of, rate_factors, select, targets_of_file
from lib_lora_train.settings import NetworkSettings, Settings, named, no_effect
from lib_lora_train.settings.network_checks import check_kind, unused_of_kind
from lib_lora_train.training.checkpoint import TrainingState


@dataclass(frozen=True)
class InitialWeights:
    """The LoRA's weights before the first step: those of a state, of the file `name` to continue from, or (None) new ones."""

    tensors: Mapping[str, Tensor] | None = None
    name: str = ""
    state: TrainingState | None = None

    @classmethod
    def of(cls, plan: RunPlan) -> InitialWeights:
        """Those that the plan's run begins with. Raises LoraFileError."""
        if plan.resume_point is not None:
            state = plan.resume_point.load()
            return cls(state.lora, plan.resume_point.path.name, state)
        if plan.settings.network.network_weights:
            continued = file.load(Path(plan.settings.network.network_weights))
            if bad := not_finite(continued.tensors):
                raise LoraFileError(
                    f"{continued.path.name} cannot be continued", why=f"{len(bad)} of its {len(continued.tensors)} tensors "
                    f"hold values that are not numbers ({some_of(bad, 2)})",
                    remedy=f"choose an earlier save of it, or another one, {named('network_weights')}")
            return cls(continued.tensors, continued.path.name)
        return cls()


def build_network(settings: Settings, model: FrozenModel, weights: InitialWeights, *, report: Report) -> AdapterNetwork:
    """The network on the model's device; parts that are not to be trained are frozen. Raises LoraFileError, and SettingError
    where the optimizer cannot train it or a resumed run does not know the trigger word."""
    chosen, seed, family = settings.network, settings.optimizer.seed, model.architecture.family
    train_text = not chosen.network_train_unet_only
    with translated("making the LoRA's layers"):
        if weights.tensors is None:
            selected = select(chosen, model.components, family=family)
            network = AdapterNetwork.build(selected.targets, rank=chosen.network_dim, alpha=chosen.network_alpha, seed=seed,
                                           sizes=selected.sizes, kind=selected.kind)
        else:
            targets = targets_of_file(chosen, model.components, family=family, keys=weights.tensors)
            # A state has the kind of the run's settings, and its file all of that kind's arguments.
            kind = chosen_kind(chosen) if weights.state is not None and not chosen.network_weights else None
            network = AdapterNetwork.continued(targets, weights.tensors, seed=seed, kind=kind)
            if network.fresh:
                report(Warned(f"{counted(len(network.fresh), 'layer')} not in {weights.name} will start anew."))
            _check_continued(chosen, network, report=report)
        if not train_text:
            network.freeze({component for component in model.components if component != "unet"})
        if not settings.rates[0]:
            network.freeze({"unet"})
        if chosen.train_trigger_embedding:
            add_trigger_embedding(network, settings, model, weights=weights.name, resumed=weights.state is not None,
                                  report=report)
        _set_up_training(chosen, network, family)
        check_network(settings, network)
        network = network.to(model.device)
        network.begin_at(model.components, network.layers if weights.tensors is None else network.fresh)
        return network


def _check_continued(chosen: NetworkSettings, network: AdapterNetwork, *, report: Report) -> None:
    """What `settings` checks of a new network, where a file says which kind it is. Raises SettingError."""
    module, dora = module_of(network.kind)
    check_kind(chosen, module=module, dora=dora)
    for name, why in unused_of_kind(module) if chosen.network_weights else ():
        if getattr(chosen, name):
            report(Warned(no_effect(name, why)))


def _set_up_training(chosen: NetworkSettings, network: AdapterNetwork, family: Family) -> None:
    """What is multiplied with learning rates, and what is left out at random."""
    both = chosen.loraplus_lr_ratio or 1.0
    network.set_rate_factors(rate_factors(chosen, network.targets, family=family), up=(
        chosen.loraplus_unet_lr_ratio or both, chosen.loraplus_text_encoder_lr_ratio or both))
    network.dropout = dropout_rates(chosen)
