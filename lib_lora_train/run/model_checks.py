"""What the leased model rules out of a run's settings: what is refused, and what has no effect."""

from __future__ import annotations

from lib_lora_train.errors import SettingError
from lib_lora_train.model.architecture import Architecture
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.run.embedding import ordinary_trigger
from lib_lora_train.run.planning import RunPlan
from lib_lora_train.settings import Settings, named, no_effect


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
    if settings.memory.blocks_to_swap and model.device.type != "cuda":
        notes.append(no_effect("blocks_to_swap", "there is no GPU, and all weights are in ordinary memory"))
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
