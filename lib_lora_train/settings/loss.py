"""The settings of the loss: what is measured, on which noise, in which part of a picture, and what must not change."""

from __future__ import annotations

import dataclasses

from lib_lora_train.settings.field import setting


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """How far a prediction is off, and how much each noise level counts."""

    loss_type: str = setting(
        "l2", "Loss", "How an error is counted. l2 is usual; huber and smooth_l1 count large errors less, for pictures with "
        "flaws such as text or compression; l1 does so most.", choices=("l2", "l1", "huber", "smooth_l1"))
    huber_schedule: str = setting(
        "snr", "Huber schedule", "How the size from which on huber and smooth_l1 count an error less changes with the noise: "
        "snr and exponential make it smaller where there is more noise, constant is the same everywhere.",
        choices=("snr", "exponential", "constant"))
    huber_c: float = setting(
        0.1, "Huber threshold", "Errors above it count less with huber and smooth_l1: smaller forgives more of them. With a "
        "schedule it is what is reached at full noise.", minimum=0.0001, maximum=10, step=0.01)
    huber_scale: float = setting(
        1.0, "Huber scale", "Multiplies the threshold of the schedules exponential and constant: smaller forgives more "
        "errors.", minimum=0.0001, maximum=1000, step=0.1)
    min_snr_gamma: float = setting(
        5.0, "Min-SNR gamma", "Evens out easy and hard noise levels (arXiv 2303.09556): the smaller, the less pictures with "
        "little noise count. 5 is usual, 0 switches it off.", minimum=0, maximum=100, step=0.5)
    debiased_estimation_loss: bool = setting(
        False, "Debiased estimation", "Lets high noise levels, which decide the layout, count more (arXiv 2310.08442). Instead "
        "of Min-SNR gamma; with both, the weights are multiplied.")
    scale_v_pred_loss_like_noise_pred: bool = setting(
        False, "Scale v like noise", "For models that predict v: weigh noise levels as for a model that predicts noise, which "
        "teaches more detail.")
    v_pred_like_loss: float = setting(
        0.0, "v-like loss", "For models that predict noise: add the loss of a v-prediction, times this number; more makes "
        "high noise levels count more. 0 switches it off.", minimum=0, maximum=100, step=0.1)
    v_parameterization: str = setting(
        "auto", "v-prediction", "What the model predicts: on is v, off is the noise (epsilon). auto takes what the checkpoint "
        "or the WebUI says; set it where neither does, as for SD2 768 models without their .yaml (on).",
        choices=("auto", "on", "off"))
    zero_terminal_snr: str = setting(
        "auto", "Zero terminal SNR", "The noise schedule ends in pure noise (arXiv 2305.08891). auto asks the model.",
        choices=("auto", "on", "off"))


@dataclasses.dataclass(frozen=True)
class NoiseSettings:
    """The noise that is added to pictures, and how much of it."""

    noise_offset: float = setting(
        0.0, "Noise offset", "Lets the LoRA learn very dark or bright pictures. 0.05 to 0.1 where wanted; more makes dark "
        "and bright stronger, and too much spoils colours.", minimum=0, maximum=1, step=0.01)
    noise_offset_random_strength: bool = setting(
        False, "Random noise offset", "Draw the noise offset anew for each picture, from 0 up to the number above.")
    adaptive_noise_scale: float = setting(
        0.0, "Adaptive noise scale", "Raises the noise offset for pictures of strong colour or brightness; below 0 lowers it. "
        "Of the noise offset's own size where wanted.", minimum=-1, maximum=1, step=0.01)
    multires_noise_iterations: int = setting(
        0, "Multires noise", "Adds coarse noise in so many sizes, another help for dark and bright pictures: more reaches "
        "larger shapes. 6 to 10 where wanted, 0 switches it off.", minimum=0, maximum=64)
    multires_noise_discount: float = setting(
        0.3, "Multires discount", "What each coarser noise counts beside the one before: larger makes coarse noise stronger. "
        "0.1 to 0.3 suits LoRAs; above, pictures lose contrast.", minimum=0, maximum=1, step=0.05)
    ip_noise_gamma: float = setting(
        0.0, "Input perturbation", "More noise in the picture than the model is told of, against overfitting (arXiv "
        "2301.11706). 0.1 where wanted; more makes pictures softer.", minimum=0, maximum=1, step=0.01)
    ip_noise_gamma_random_strength: bool = setting(
        False, "Random input perturbation", "Draw its strength anew for each picture, from 0 up to the number above.")
    min_timestep: int = setting(
        0, "Lowest timestep", "Train no less noise than this: raise it to leave fine detail as it is.", minimum=0, maximum=999)
    max_timestep: int = setting(
        1000, "Highest timestep", "Train less noise than this: lower it to leave the layout of pictures as it is.", minimum=1,
        maximum=1000)
    timestep_distribution: str = setting(
        "uniform", "Noise levels", "How often each noise level is trained: all alike, middle ones most (sigmoid), low ones "
        "most for texture and detail (low_noise), or high ones for layout and shapes (high_noise).",
        choices=("uniform", "sigmoid", "low_noise", "high_noise"))


@dataclasses.dataclass(frozen=True)
class MaskSettings:
    """Which part of a picture is learnt."""

    masked_loss: bool = setting(
        False, "Masked loss", "Learn only what is white in a picture's mask, so that its background is not learnt. Masks are "
        "painted on the dataset page, or lie beside the pictures: masks/a.png, a-masklabel.png.")
    alpha_mask: bool = setting(
        False, "Transparency as mask", "Learn only what is not transparent, where a picture has no mask of its own.")
    conditioning_data_dir: str = setting(
        "", "Mask folder", "A folder of masks with the names of their pictures, where they do not lie beside these.",
        is_path=True)
    unmasked_weight: float = setting(
        0.0, "Weight outside the mask", "How much the rest of a picture counts: 0 not at all, 1 as much as what is learnt. A "
        "little, 0.05 to 0.1, keeps it from drifting freely.", minimum=0, maximum=1, step=0.01)
    masked_prior_preservation_weight: float = setting(
        0.0, "Preservation outside the mask", "Hold what lies outside the mask to what the base model itself would do there, "
        "with this weight: more holds it more firmly. 1 where wanted; a step takes about a third longer. 0 switches it off.",
        minimum=0, maximum=10, step=0.1)


@dataclasses.dataclass(frozen=True)
class PreservationSettings:
    """What must stay as it is in the model, without pictures of it."""

    preservation: str = setting(
        "none", "Preservation", "Keep the rest of the model as it is, without regularisation pictures: dop holds the class "
        "word to what it was, blank the empty prompt, dco ties the whole to the base model (arXiv 2402.12004). dco takes about "
        "a third more time, the others twice the time.", choices=("none", "dop", "blank", "dco"))
    preservation_class: str = setting(
        "", "Class word", "What the trigger word is one of (cat, woman, drawing). dop and dco put it in the trigger word's "
        "place when they ask the base model.")
    preservation_weight: float = setting(
        1.0, "Preservation weight", "How much dop and blank count beside what is learnt: more keeps the model as it was, "
        "less learns more freely.", minimum=0.01, maximum=100, step=0.1)
    dco_beta: float = setting(
        1000.0, "DCO beta", "How closely dco holds to the base model: larger is less change, smaller learns more freely.",
        minimum=1, maximum=100000, step=100)
