"""The network that a run trains: a new one, or the one of a file or of a resumed state; and what the model rules out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lib_lora_train.adapters import file
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.errors import LoraFileError, SettingError, counted, some_of, translated
from lib_lora_train.events import Report, Warned
from lib_lora_train.model.architecture import Architecture
from lib_lora_train.model.family import Family
from lib_lora_train.model.fingerprint import not_finite
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.run.embedding import add_trigger_embedding, ordinary_trigger
from lib_lora_train.run.optimizing import check_network
from lib_lora_train.run.planning import RunPlan
from lib_lora_train.run.selection import chosen_kind, dropout_rates, name_of, rate_factors, select, targets_of_file
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
    module, dora = name_of(network.kind)
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


def check_sizes(plan: RunPlan, model: FrozenModel) -> None:
    """Raises SettingError where a bucket's size is not one that the model takes."""
    multiple = model.architecture.vae.factor * 2 ** model.architecture.unet.halvings
    for (width, height), _ in plan.schedule.buckets:
        if width % multiple or height % multiple:
            raise SettingError(f"Pictures of {width}×{height} pixels do not fit this model",
                               why=f"its sizes are multiples of {multiple}",
                               remedy=f"use a {named('resolution')} and {named('bucket_reso_steps')} that are multiples of "
                                      f"{multiple}")


def check_loss(settings: Settings, model: FrozenModel) -> None:
    """Raises SettingError for a loss that is not one for what the model predicts (as sd-scripts' `verify_training_args`)."""
    loss, v = settings.loss, model.schedule.prediction_type == "v_prediction"
    for name, chosen, wrong, what in (
            ("scale_v_pred_loss_like_noise_pred", loss.scale_v_pred_loss_like_noise_pred, not v, "noise"),
            ("v_pred_like_loss", loss.v_pred_like_loss, v, "v")):
        if chosen and wrong:
            raise SettingError(f"{named(name)} is not possible with this model", why=f"it predicts {what}", remedy="switch it "
                               f"off, or set {named('v_parameterization')} if the model predicts something else")


def ignored_by(model: FrozenModel, settings: Settings) -> list[str]:
    """A sentence for each setting that has no effect on this kind of model or device."""
    notes = []
    if settings.captions.clip_skip and not model.text.uses_clip_skip:
        notes.append(no_effect("clip_skip", "only SD1 models read captions from a layer of choice"))
    if settings.memory.cpu_offload_checkpointing and model.device.type != "cuda":
        notes.append(no_effect("cpu_offload_checkpointing", "there is no GPU, and activations are in ordinary memory"))
    if settings.memory.cuda_graphs == "on" and model.device.type != "cuda":
        notes.append(no_effect("cuda_graphs", "there is no GPU"))
    if settings.memory.base_weights != "as they are" and model.device.type != "cuda":
        notes.append(f"{named('base_weights')} saves no memory without a GPU: its copies lie beside the leased model.")
    if model.architecture.zero_terminal_snr and model.schedule.prediction_type == "epsilon":
        notes.append("Zero terminal SNR suits models that predict v; one that predicts noise learns nothing from pure noise. "
                     f"If this one predicts v, set {named('v_parameterization')}.")
    return notes + ordinary_trigger(model, settings) + _doubts(model.architecture)


def _doubts(architecture: Architecture) -> list[str]:
    """A sentence for each thing that the checkpoint's file does not say of it, or says otherwise than it is trained."""
    names, notes = {"epsilon": "noise", "v_prediction": "v"}, []
    trained, said = names[architecture.prediction_type], architecture.file_prediction_type
    if architecture.prediction_guessed:
        notes.append(f"The checkpoint does not say what it predicts, and {trained} was guessed: if its pictures with the LoRA "
                     f"are only noise or grey, set {named('v_parameterization')}, or put its .yaml beside it.")
    if said and said not in names:
        notes.append(f"The checkpoint's file says that it predicts {said}, which is not known here: it is trained as one that "
                     f"predicts {trained}.")
    elif said and names[said] != trained:
        notes.append(f"The checkpoint's file says that it predicts {names[said]}, but it is trained as one that predicts "
                     f"{trained}, as {named('v_parameterization')}, the WebUI or the .yaml beside it has it; one is wrong.")
    if architecture.file_zero_terminal_snr and not architecture.zero_terminal_snr:
        notes.append("The checkpoint's file says zero terminal SNR, but it is trained without, as "
                     f"{named('zero_terminal_snr')} or the WebUI's noise schedule has it; one of them is wrong.")
    return notes
