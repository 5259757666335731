"""How a training goes, in words: a finding and the one setting to change, as a pure function of what a run tells.

All losses are taken beside those of the model without the LoRA, on the same images and noise, so that the bounds hold for other
models too: a gain of 0.1 is a loss that is a tenth lower. docs/verdict.md says where each bound comes from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

from lib_lora_train.errors import counted
from lib_lora_train.evaluation.words_check import WordsCheck
from lib_lora_train.events import Diagnosed, Finding, Measured, Saved, Verdict
from lib_lora_train.settings import named

EARLIEST = 0.1  # of the run: before that the curve says nothing
FEW = 5  # different pictures: fewer are mostly copied
NO_GAIN, GAIN = 0.005, 0.01  # below the first a LoRA has no effect, from the second on it has learnt something
HARDLY, USUAL = 0.004, 0.02  # ‖ΔW‖/‖W‖ of a LoRA that has hardly moved, and of a usual one
MOST_TEXT, TEXT_TO_UNET = 0.3, 4.0  # ‖ΔW‖/‖W‖ of text encoders that is too much, if it is also so many times the UNet's
LINEAR = 0.65  # the share of the gain that half of the spent brings: 0.5 where it grows in proportion, near 1 where it is over
WORSE, OF_GAIN = 0.005, 0.1  # overfitting: held-out losses above their best by more than this, and than this share of the gain
LOST = 0.5  # diverging: the share of the gain on training pictures that is lost again
STILL = 0.02  # plateau: the share of the gain that the second half of the spent has brought
TINY_ALPHA = 0.02  # of the rank
KNOWN_WORD, WRONG_WORD = 0.5, -0.5  # `WordsCheck`: a trigger word of more meaning is known, of less gain says something else
TELLING = 0.3  # `WordsCheck`: captions of less meaning are not understood, so that nothing can be said of them
WRONG_CAPTIONS = 0.15  # the mean of fit and (gain + 1) / 2, each 1 for right captions and 0 for wrong ones


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """What the verdict must know of a run's settings and pictures.

    length           the setting that ends the run: max_train_epochs or max_train_steps
    unet_rate        the setting of the UNet's learning rate, and `unet_lr` what it is; `text_encoder_lr` 0: not trained
    images           trained pictures, `different` of which are no near-duplicates, `captioned` have more than the trigger word
    held_out         whether the held-out pictures are not trained on (and not mirrored crops of trained ones)
    """

    steps: int
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


@dataclasses.dataclass(frozen=True)
class Gains:
    """A measurement: the LoRA's gain over the model without it, 1 - L/L₀ with the logarithms' mean over the bands, on training
    images and on held-out ones (None for none); `spent` is the share of the run's learning rates that were spent until then."""

    measured: Measured
    spent: float
    training: float
    held_out: float | None

    @classmethod
    def of(cls, measured: Measured, *, spent: float) -> Gains:
        """That of an event."""
        return cls(measured, spent, _gain(measured.training, measured.unadapted_training) or 0.0,
                   _gain(measured.held_out, measured.unadapted_held_out))

    @property
    def gain(self) -> float:
        """On held-out pictures where there are any."""
        return self.training if self.held_out is None else self.held_out


class Remedy(NamedTuple):
    """A setting and the value it should have, "" for none."""

    setting: str = ""
    value: str = ""


Told = tuple[str, Remedy] | None
"""A sentence and its remedy, where there is something to say."""


def diagnose(curve: Sequence[Gains], *, run: RunSummary, words: WordsCheck | None = None, saves: Sequence[Saved] = (),
             skipped: float = 0.0, verdict: tuple[Verdict, str] = ("", ""), ended: bool = False) -> Diagnosed | None:
    """What is to be said after the last of these measurements; None while nothing can be.

    `skipped` is the share of the steps that were not applied; `verdict` that of the result (`run/soundness.py`), once there is
    one. `ended`: there will be no more of it.
    """
    step = curve[-1].measured.step if curve else 0

    def told(finding: Finding, message: str, remedy: Remedy = Remedy()) -> Diagnosed:  # noqa: B008
        return Diagnosed(step, finding, message, *remedy)
    if found := _ruined(curve, run, skipped, verdict):
        return told("ruined", *found)
    late = [gains for gains in curve if gains.spent >= EARLIEST]
    if late and (found := _diverging(late, run)):
        return told("diverging", *found)
    if found := _words(run, words):
        return told("words", *found)
    if not late:
        return None
    if found := _no_effect(late[-1], run):
        return told("no effect", *found)
    if found := _too_slow(curve, run, ended=ended):
        return told("too slow", *found)
    if found := _overfitting(late, run, saves):
        return told("overfitting", *found)
    if found := _plateau(curve, run):
        return told("plateau", *found)
    return told("learning", found) if (found := _learning(late[-1], run, ended=ended)) else None


def _learning(last: Gains, run: RunSummary, *, ended: bool) -> str:
    """The gain, on held-out images where it is worth telling there; "" where there is none yet."""
    begin, elsewhere = "It has learnt" if ended else "Learning", run.held_out and last.held_out is not None
    if elsewhere and last.gain >= GAIN:
        return f"{begin}: on pictures it was not trained on it is {_percent(last.gain)} better than the model without it."
    if last.training < GAIN and not ended:
        return ""
    added = f", on others {_percent(last.gain)}: pictures that differ more would help" if elsewhere else ""
    return f"{begin}: on its own pictures it is {_percent(last.training)} better than the model without it{added}."


def _ruined(curve: Sequence[Gains], run: RunSummary, skipped: float, verdict: tuple[Verdict, str]) -> Told:
    why = verdict[1] if verdict[0] == "ruined" else ""
    if curve and not why:
        why = "with it the model computes values that are not numbers" if not _finite(curve[-1]) else (
            f"{_percent(skipped)} of the steps were skipped, because their numbers were not finite" if skipped > 0.5 else "")
    if not why:
        return None
    remedy, sentence = _lower(curve[-1] if curve else None, run)
    return f"Ruined: {why}. {sentence}", remedy


def _diverging(curve: Sequence[Gains], run: RunSummary) -> Told:
    """Worse than the model without the LoRA on the LoRA's own images, or having lost half of what was gained there; or a text
    encoder that no longer says what it said, which the losses may not show."""
    last, best = curve[-1], max(curve, key=lambda gains: gains.training)
    if run.text_encoder_lr and _text_is_hot(last.measured.strength):
        remedy, sentence = _lower(last, run)
        return (f"Diverging: the change of the text encoder is {_text_strength(last.measured.strength):.1g} times as large as its "
                f"own weights, so that prompts no longer say what they said. {sentence}"), remedy
    if last.training >= -GAIN and (best.training < 2 * GAIN or last.training > (1 - LOST) * best.training):
        return None
    remedy, sentence = _lower(last, run)
    lost = "worse than the model without it" if last.training < 0 else f"no longer as good as at step {best.measured.step}"
    return f"Diverging: on its own pictures the LoRA is {lost}. {sentence}", remedy


def _lower(gains: Gains | None, run: RunSummary) -> tuple[Remedy, str]:
    """The learning rate to lower, and to what."""
    strength = gains.measured.strength if gains else {}
    setting, rate, now = run.unet_rate, run.unet_lr, strength.get("unet", math.nan)
    if run.text_encoder_lr and _text_is_hot(strength):
        setting, rate, now = "text_encoder_lr", run.text_encoder_lr, _text_strength(strength)
    value = _rounded(rate / max(3.0, min(now / USUAL, 100.0) if math.isfinite(now) else 10.0))
    return Remedy(setting, value), f"Lower {named(setting)} from {rate:g} to {value} and train anew."


def _text_strength(strength: dict[str, float]) -> float:
    return max((value for component, value in strength.items() if component != "unet"), default=0.0)


def _text_is_hot(strength: dict[str, float]) -> bool:
    return _text_strength(strength) > max(MOST_TEXT, TEXT_TO_UNET * strength.get("unet", 0.0))


def _words(run: RunSummary, words: WordsCheck | None) -> Told:
    """What is wrong with pictures, captions and trigger word, whatever the curves say."""
    if run.different < FEW:
        if run.different < run.images:
            only = f"The {run.images} pictures are {counted(run.different, 'picture')} in several copies"
        else:
            only = f"There {'is' if run.images == 1 else 'are'} only {counted(run.images, 'picture')}"
        return (f"{only}, which a LoRA learns to copy. Add pictures until 10 or more differ in pose, light and "
                "background."), Remedy()
    if not run.captioned and not run.trigger_word:
        return ("No picture has a caption and there is no trigger word, so that no word calls what is learnt, and all that the "
                f"model paints moves towards it. Caption the pictures, or set {named('trigger_word')}."), Remedy("trigger_word")
    if words is None:
        return None
    if words.fit is not None and words.gain is not None and (words.meaning or 0.0) > TELLING and (
            words.fit + (words.gain + 1) / 2) / 2 < WRONG_CAPTIONS:
        return ("The captions do not describe their pictures: to the model they fit other pictures as well. Look whether each "
                "caption file has its own picture's name."), Remedy()
    if (words.trigger_meaning or 0.0) > KNOWN_WORD and (words.trigger_gain or 0.0) < WRONG_WORD:
        return (f"The trigger word '{run.trigger_word}' already means something else to the model, which the LoRA has to "
                "fight. Take a word that nobody uses, such as a made-up name."), Remedy("trigger_word")
    return None


def _no_effect(last: Gains, run: RunSummary) -> Told:
    if last.spent < 0.25 or abs(last.training) >= NO_GAIN * last.spent or _strength(last) >= HARDLY * last.spent:
        return None
    remedy, sentence = _raise(last, run)
    return f"No effect: the LoRA has hardly changed the model. {sentence}", remedy


def _too_slow(curve: Sequence[Gains], run: RunSummary, *, ended: bool) -> Told:
    """Hardly moved where a usual LoRA would have, or gaining as fast at the end as at the beginning."""
    last = curve[-1]
    hardly = last.spent >= 0.25 and _strength(last) < HARDLY * last.spent
    if not hardly and not (ended and last.gain > 0 and _half(curve) < LINEAR * last.gain):
        return None
    if hardly:
        remedy, sentence = _raise(last, run)
        return f"Too slow: the LoRA has changed the model by only {_percent(last.gain)} of the loss so far. {sentence}", remedy
    value = str(_length(last.measured, run) * 2)
    return (f"Too slow: it was still learning as fast as at the beginning, and is {_percent(last.gain)} better than the model "
            f"without it. Train on, or anew with {value} as {named(run.length)}."), Remedy(run.length, value)


def _raise(last: Gains, run: RunSummary) -> tuple[Remedy, str]:
    """What to raise, and to what: alpha where it is tiny, else the learning rate."""
    if run.alpha / run.rank < TINY_ALPHA:
        value = f"{run.rank / 2:g}"
        return Remedy("network_alpha", value), (
            f"{named('network_alpha')} is {run.alpha:g} at rank {run.rank}, which divides all that is learnt by "
            f"{run.rank / run.alpha:.0f}: take {value}.")
    factor = min(max(USUAL / max(_strength(last) / last.spent, 1e-9), 3.0), 100.0)
    value = _rounded(run.unet_lr * factor)
    return Remedy(run.unet_rate, value), f"Raise {named(run.unet_rate)} from {run.unet_lr:g} to {value}."


def _overfitting(curve: Sequence[Gains], run: RunSummary, saves: Sequence[Saved]) -> Told:
    """Held-out losses that rise again while those of training pictures do not."""
    last = curve[-1]
    if last.held_out is None:
        return None
    best = max(curve, key=lambda gains: gains.gain)
    worse = (1 - last.gain) / (1 - best.gain) - 1
    bound = max(WORSE, OF_GAIN * -math.log(1 - max(best.gain, 0.0)))
    if worse <= bound or len(curve) > 2 and (1 - curve[-2].gain) / (1 - best.gain) - 1 <= bound / 2:
        return None
    value = str(_length(best.measured, run))
    where = "on pictures it was not trained on" if run.held_out else "on mirrored crops of its pictures"
    return (f"Overfitting since epoch {best.measured.epoch}: {where} it is now {_percent(worse)} worse than at its best. "
            f"{_take(best.measured, saves)}train for {_of(run.length, value)}."), Remedy(run.length, value)


def _take(best: Measured, saves: Sequence[Saved]) -> str:
    """The save to take, if one was made near the best."""
    near = min((save for save in saves if not save.final), key=lambda save: abs(save.step - best.step), default=None)
    if near is None or abs(near.step - best.step) > 0.25 * best.step:
        return f"Save more often and take epoch {best.epoch}, or "
    return f"Take {PurePath(near.path).stem} (epoch {near.epoch}), or "


def _plateau(curve: Sequence[Gains], run: RunSummary) -> Told:
    last, half = curve[-1], _at(curve, curve[-1].spent / 2)
    if last.spent < 0.5 or last.gain < GAIN or half.gain <= 0:
        return None
    if max(last.gain / half.gain, last.training / max(half.training, 1e-9)) > 1 + STILL:
        return None
    value = str(_length(half.measured, run))
    return (f"Plateau: since epoch {half.measured.epoch} nothing more was learnt; it is {_percent(last.gain)} better than the "
            f"model without it. Train for {_of(run.length, value)}, or on more and other pictures."), Remedy(
                run.length, value)


def _half(curve: Sequence[Gains]) -> float:
    """The gain at half of the spent, between the two measurements around it."""
    middle, last = curve[-1].spent / 2, curve[-1]
    before = max((gains for gains in curve if gains.spent <= middle), key=lambda gains: gains.spent, default=None)
    after = min((gains for gains in curve if gains.spent >= middle), key=lambda gains: gains.spent, default=last)
    spent, gain = (before.spent, before.gain) if before else (0.0, 0.0)
    return after.gain if after.spent == spent else gain + (after.gain - gain) * (middle - spent) / (after.spent - spent)


def _at(curve: Sequence[Gains], spent: float) -> Gains:
    """The measurement nearest to that share of the spent."""
    return min(curve, key=lambda gains: abs(gains.spent - spent))


def _length(measured: Measured, run: RunSummary) -> int:
    return max(1, measured.step if run.length == "max_train_steps" else measured.epoch)


def _of(length: str, value: str) -> str:
    return counted(int(value), "step" if length == "max_train_steps" else "epoch")


def _strength(gains: Gains) -> float:
    return max(gains.measured.strength.values(), default=math.inf)


def _finite(gains: Gains) -> bool:
    return all(map(math.isfinite, (*gains.measured.training, *gains.measured.held_out)))


def _gain(losses: Sequence[float], unadapted: Sequence[float]) -> float | None:
    if not losses or len(losses) != len(unadapted):
        return None
    if not all(math.isfinite(loss) and loss > 0 for loss in (*losses, *unadapted)):
        return math.nan
    return 1 - math.exp(sum(math.log(loss / other) for loss, other in zip(losses, unadapted, strict=True)) / len(losses))


def _rounded(value: float) -> str:
    """A learning rate with one digit."""
    return f"{float(f'{value:.0e}'):g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if abs(share) >= 0.01 else f"{100 * share:.1f} %"
