"""How a training goes, in words: a finding and the one setting to change, as a pure function of what a run tells.

All losses are taken beside those of the model without the LoRA, on the same images and noise, so that the bounds hold for other
models too: a gain of 0.1 is a loss that is a tenth lower. docs/verdict.md says where each bound comes from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple

from lib_lora_train.errors import counted
from lib_lora_train.evaluation.words_check import WordsCheck
from lib_lora_train.events import Diagnosed, Finding, Measured, Saved, Verdict
from lib_lora_train.settings import named

EARLIEST, EARLY = 0.1, 0.25  # shares of the run: before the first the curve says nothing, before the second not how fast
FEW = 5  # different pictures: fewer are mostly copied
NO_GAIN, GAIN = 0.005, 0.01  # below the first a LoRA has no effect, from the second on it has learnt something
HARDLY, USUAL, MOST_TEXT = 0.004, 0.02, 0.3  # ‖ΔW‖/‖W‖ that has hardly moved, that is usual, and too much for a text encoder
TEXT_TO_UNET = 4.0  # times the UNet's, from which on the text encoder's is named
LINEAR = 0.65  # too slow: the share of the gain that half of the way brings, 0.5 where it grows in proportion
WORSE, OF_GAIN = 0.005, 0.1  # overfitting: held-out losses above their best by more than this, and this share of the gain
LOST, STILL = 0.5, 0.02  # shares of the gain: lost again is diverging, brought by the second half of the way is a plateau
TINY_ALPHA = 0.02  # of the rank
USUAL_RATE, SHORT = 5e-5, 100  # from this rate on a run of fewer steps has no effect because it is short
MOST_RATE = 5e-3  # that is advised: half of what `settings/risks.py` calls ruinous
KNOWN_WORD, WRONG_WORD = 0.35, -0.5  # `WordsCheck`: a trigger word of more meaning is known, of less gain says something else
TELLING, WRONG_CAPTIONS = 0.25, 0.15  # captions of more meaning are understood; below this mean of fit and gain they are wrong


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What the verdict must know of a run's settings and images.

    length      the setting that ends the run: max_train_epochs or max_train_steps
    unet_rate   the setting of the UNet's learning rate, and `unet_lr` what it is; `text_encoder_lr` is 0 where none is trained
    images      trained ones, `different` of which are no near-duplicates, `captioned` have more than the trigger word
    held_out    whether the held-out images are not trained on, and no mirrored crops of trained ones
    finds_rate  whether the optimizer finds the learning rate itself, so that another one is no remedy
    """

    length: str
    unet_rate: str
    unet_lr: float
    text_encoder_lr: float
    rank: int
    alpha: float
    trigger_word: str
    images: int
    different: int
    captioned: int
    held_out: bool
    finds_rate: bool = False


@dataclasses.dataclass(frozen=True)
class Gains:
    """A measurement: the LoRA's gain over the model without it, 1 - L/L₀ (of logarithms, the mean over the bands), on training
    images and on held-out ones (those of training where there are none). `spent` is the share of the run's learning rates that
    were spent until then; `strength` the largest ‖ΔW‖/‖W‖."""

    measured: Measured
    spent: float
    training: float
    held_out: float
    strength: float

    @classmethod
    def of(cls, measured: Measured, *, spent: float) -> Gains:
        """That of an event."""
        training = gain(measured.training, measured.unadapted_training)
        return cls(measured, spent, training, gain(measured.held_out, measured.unadapted_held_out)
                   if measured.held_out else training, max(measured.strength.values(), default=math.inf))

    @property
    def finite(self) -> bool:
        """Whether all losses are numbers."""
        return math.isfinite(self.training + self.held_out)


class Told(NamedTuple):
    """A sentence, the setting to change and its value, both "" for none."""

    message: str
    setting: str = ""
    value: str = ""


def diagnose(curve: Sequence[Gains], *, run: RunSummary, words: WordsCheck = WordsCheck(),  # noqa: B008
             saves: Sequence[Saved] = (), skipped: float = 0.0, verdict: tuple[Verdict, str] = ("", ""),
             ended: bool = False) -> Diagnosed | None:
    """What is to be said after the last of these measurements; None while nothing can be.

    `skipped` is the share of the steps that were not applied; `verdict` that of the result (`run/soundness.py`), once there is
    one. `ended`: there will be no more of it.
    """
    late = [gains for gains in curve if gains.spent >= EARLIEST]
    findings: list[tuple[Finding, Told | None]] = [("ruined", _ruined(curve, run, skipped, verdict))]
    if not findings[0][1] and late:
        findings.append(("diverging", _diverging(late, run)))
    findings.append(("words", _words(run, words)))
    if not findings[0][1] and late:
        findings += [("no effect", _no_effect(late[-1], run)), ("too slow", _too_slow(curve, run, ended=ended)),
                     ("overfitting", _overfitting(late, run, saves)), ("plateau", _plateau(curve, run)),
                     ("learning", _learning(late[-1], run, ended=ended))]
    step = curve[-1].measured.step if curve else 0
    return next((Diagnosed(step, finding, *told) for finding, told in findings if told), None)


def _ruined(curve: Sequence[Gains], run: RunSummary, skipped: float, verdict: tuple[Verdict, str]) -> Told | None:
    why = verdict[1] if verdict[0] == "ruined" else ""
    if curve and not curve[-1].finite:
        why = why or "with it the model computes values that are not numbers"
    if skipped > 0.5:
        why = why or f"{_percent(skipped)} of the steps were skipped, because their numbers were not finite"
    return _lower(f"Ruined: {why}", curve[-1] if curve else None, run) if why else None


def _diverging(curve: Sequence[Gains], run: RunSummary) -> Told | None:
    """Worse than the model without the LoRA on the LoRA's own images, or having lost half of what was gained there; or a text
    encoder that no longer says what it said, which losses may not show."""
    last, best = curve[-1], max(curve, key=lambda gains: gains.training)
    if run.text_encoder_lr and _text_is_hot(last.measured.strength):
        return _lower(f"Diverging: the text encoder's change is {_text_strength(last.measured.strength):.1f} times as large as "
                      "its own weights, so that prompts no longer say what they said", last, run)
    if last.training >= -GAIN and (best.training < 2 * GAIN or last.training > (1 - LOST) * best.training):
        return None
    lost = "worse than the model without it" if last.training < 0 else f"no longer as good as at step {best.measured.step}"
    return _lower(f"Diverging: on its own pictures the LoRA is {lost}", last, run)


def _lower(what: str, last: Gains | None, run: RunSummary) -> Told:
    """The learning rate to lower, and to what."""
    if run.finds_rate:
        return Told(f"{what}. The learning rate that {named('optimizer_type')} finds is too high for these pictures: train "
                    "anew with AdamW at 1e-4, or for fewer steps.")
    strength = last.measured.strength if last else {}
    setting, rate, now = run.unet_rate, run.unet_lr, strength.get("unet", math.nan)
    if run.text_encoder_lr and _text_is_hot(strength):
        setting, rate, now = "text_encoder_lr", run.text_encoder_lr, _text_strength(strength)
    value = _rounded(rate / max(3.0, min(now / USUAL, 100.0) if math.isfinite(now) else 10.0))
    return Told(f"{what}. Lower {named(setting)} from {rate:g} to {value} and train anew.", setting, value)


def _text_strength(strength: Mapping[str, float]) -> float:
    return max((value for component, value in strength.items() if component != "unet"), default=0.0)


def _text_is_hot(strength: Mapping[str, float]) -> bool:
    return _text_strength(strength) > max(MOST_TEXT, TEXT_TO_UNET * strength.get("unet", 0.0))


def _words(run: RunSummary, words: WordsCheck) -> Told | None:
    """What is wrong with pictures, captions and trigger word, whatever the curves say."""
    if run.different < FEW:
        only = f"There {'is' if run.images == 1 else 'are'} only {counted(run.images, 'picture')}"
        if run.different < run.images:
            only = f"The {run.images} pictures are {counted(run.different, 'picture')} in several copies"
        return Told(f"{only}, which a LoRA learns to copy. Add pictures until 10 or more differ in pose, light and background.")
    if not run.captioned and not run.trigger_word:
        return Told("No picture has a caption and there is no trigger word, so that no word calls what is learnt, and all that "
                    f"the model paints moves towards it. Caption the pictures, or set {named('trigger_word')}.", "trigger_word")
    if words.fit is not None and words.gain is not None and (words.meaning or 0.0) > TELLING and (
            words.fit + (words.gain + 1) / 2) / 2 < WRONG_CAPTIONS:
        return Told("The captions do not describe their pictures: to the model they fit other pictures as well. Look whether "
                    "each caption file has its own picture's name.")
    if (words.trigger_meaning or 0.0) > KNOWN_WORD and (words.trigger_gain or 0.0) < WRONG_WORD:
        return Told(f"The trigger word '{run.trigger_word}' already means something else to the model, which the LoRA has to "
                    "fight. Take a word that nobody uses, such as a made-up name.", "trigger_word")
    return None


def _no_effect(last: Gains, run: RunSummary) -> Told | None:
    if last.spent < EARLY or abs(last.training) >= NO_GAIN * last.spent or last.strength >= HARDLY * last.spent:
        return None
    return _raise("No effect: the LoRA has hardly changed the model", last, run)


def _too_slow(curve: Sequence[Gains], run: RunSummary, *, ended: bool) -> Told | None:
    """Hardly moved where a usual LoRA would have, or gaining as fast at the end as at the beginning."""
    last = curve[-1]
    better = f"{_percent(last.held_out)} better than the model without it"
    if last.spent >= EARLY and last.strength < HARDLY * last.spent:
        return _raise(f"Too slow: the LoRA is only {better}", last, run)
    if not ended or last.held_out < GAIN or _half_of_the_gain(curve) >= LINEAR * last.held_out:
        return None
    value = str(2 * _length(last.measured, run))
    return Told(f"Too slow: it was still learning as fast as at the beginning, and is {better}. Train for "
                f"{_told_length(value, run)}.", run.length, value)


def _raise(what: str, last: Gains, run: RunSummary) -> Told:
    """What to raise, and to what: alpha where it is tiny, the length of a run that is too short for any rate, else the learning
    rate."""
    if run.alpha / run.rank < TINY_ALPHA:
        value = f"{run.rank / 2:g}"
        return Told(f"{what}. {named('network_alpha')} is {run.alpha:g} at rank {run.rank}, which divides what is learnt by "
                    f"{run.rank / run.alpha:.0f}: take {value}.", "network_alpha", value)
    factor = min(max(USUAL * last.spent / max(last.strength, 1e-9), 3.0), 100.0)
    rate = min(run.unet_lr * factor, MOST_RATE)
    if run.finds_rate or rate < 1.5 * run.unet_lr or run.unet_lr >= USUAL_RATE and last.measured.step < SHORT * last.spent:
        value = str(math.ceil(factor * _length(last.measured, run) / last.spent))
        return Told(f"{what}. Train for {_told_length(value, run)}.", run.length, value)
    value = _rounded(rate)
    return Told(f"{what}. Raise {named(run.unet_rate)} from {run.unet_lr:g} to {value}.", run.unet_rate, value)


def _overfitting(curve: Sequence[Gains], run: RunSummary, saves: Sequence[Saved]) -> Told | None:
    """Held-out losses that rise again, in the last two measurements."""
    best, last = max(curve, key=lambda gains: gains.held_out), curve[-1]
    bound = max(WORSE, OF_GAIN * -math.log(1 - max(best.held_out, 0.0)))
    worse, before = ((1 - gains.held_out) / (1 - best.held_out) - 1 for gains in (last, curve[max(-2, -len(curve))]))
    if not last.measured.held_out or worse <= bound or before <= bound / 2:
        return None
    epoch, value = best.measured.epoch, str(_length(best.measured, run))
    near = min((save for save in saves if not save.final), key=lambda save: abs(save.step - best.measured.step), default=None)
    taken = f"Save more often and take epoch {epoch}"
    if near and abs(near.step - best.measured.step) <= best.measured.step / 4:
        taken = f"Take {PurePath(near.path).stem} (epoch {near.epoch})"
    where = "pictures it was not trained on" if run.held_out else "mirrored crops of its pictures"
    return Told(f"Overfitting since epoch {epoch}: on {where} it is now {_percent(worse)} worse than at its best. {taken}, or "
                f"train for {_told_length(value, run)}.", run.length, value)


def _plateau(curve: Sequence[Gains], run: RunSummary) -> Told | None:
    last = curve[-1]
    half = min(curve, key=lambda gains: abs(gains.spent - last.spent / 2))
    if last.spent < 0.5 or last.held_out < GAIN or any(
            now > (1 + STILL) * then for now, then in ((last.held_out, half.held_out), (last.training, half.training))):
        return None
    value = str(_length(half.measured, run))
    return Told(f"Plateau: since epoch {half.measured.epoch} nothing more was learnt; it is {_percent(last.held_out)} better "
                f"than the model without it. Train for {_told_length(value, run)}, or on more and other pictures.",
                run.length, value)


def _learning(last: Gains, run: RunSummary, *, ended: bool) -> Told | None:
    """The gain, on held-out images where it is worth telling there; None where there is none yet."""
    begin, elsewhere = "It has learnt" if ended else "Learning", run.held_out and bool(last.measured.held_out)
    if elsewhere and last.held_out >= GAIN:
        return Told(f"{begin}: on pictures it was not trained on it is {_percent(last.held_out)} better than the model without "
                    "it.")
    added = f", on others {_percent(last.held_out)}: pictures that differ more would help" if elsewhere else ""
    return Told(f"{begin}: on its own pictures it is {_percent(last.training)} better than the model without it{added}."
                ) if last.training >= GAIN or ended else None


def _half_of_the_gain(curve: Sequence[Gains]) -> float:
    """The gain at half of the way, between the two measurements around it."""
    middle = curve[-1].spent / 2
    before = max(((gains.spent, gains.held_out) for gains in curve if gains.spent <= middle), default=(0.0, 0.0))
    after = min((gains.spent, gains.held_out) for gains in curve if gains.spent >= middle)
    share = (middle - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
    return before[1] + share * (after[1] - before[1])


def _length(measured: Measured, run: RunSummary) -> int:
    return max(1, measured.step if run.length == "max_train_steps" else measured.epoch)


def _told_length(value: str, run: RunSummary) -> str:
    return counted(int(value), "step" if run.length == "max_train_steps" else "epoch")


def gain(losses: Sequence[float], unadapted: Sequence[float]) -> float:
    """By which share the losses are below those of the model without the LoRA, in the mean of the logarithms over the bands; no
    number where one is missing."""
    if not losses or not all(math.isfinite(loss) and loss > 0 for loss in (*losses, *unadapted)):
        return math.nan
    return 1 - math.exp(sum(math.log(loss / other) for loss, other in zip(losses, unadapted, strict=True)) / len(losses))


def _rounded(value: float) -> str:
    """A learning rate with one digit."""
    return f"{float(f'{value:.0e}'):g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if abs(share) >= 0.01 else f"{100 * share:.1f} %"
