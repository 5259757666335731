"""The figures as text: Markdown whose columns also line up in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tools.bench.evaluator import Band, Row, ScorerFigures
from tools.bench.headline import HeadlineRow
from tools.bench.joint_scorer import LEAST_KNOWN, WordGate
from tools.bench.report import grid, share
from tools.bench.scorers import REQUIRED
from tools.bench.style import StyleResult
from tools.bench.style_scorer import LEAST_RIGHT, MOST_PAINTED, StyleGate
from tools.bench.subject import SubjectResult

WORTHLESS = "**The style scorer is right too seldom: all Twemoji shares below count for nothing.**"
FORMER = ("**The style shares below read the strength of colours, and the word shares know drawings rather than things** "
          "(docs/quality.md): they compare runs at one guidance scale with each other, and prove nothing by themselves.")
_ROW = ("Twemoji", "by palette", "by texture", "shows the word", "PSNR dB", "SSIM", "feature distance")


def intro_text(*, settings: Mapping[str, object], checkpoint: str, thorough: bool, seconds: float) -> str:
    """What was measured with what."""
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items())
    said = f"Model {checkpoint}; {chosen}. Made in {seconds / 60:.1f} minutes."
    return said if thorough else ("**A quick run: few words, and scorers fitted with few steps. Not to be quoted.**"
                                  f"\n\n{said}")


def gates_text(gates: Mapping[str, tuple[StyleGate, WordGate]]) -> str:
    """What the scorers of the graded styles are worth, before anything is scored by them."""
    lines = []
    for name, (style, word) in gates.items():
        lowest, highest = min(style.right, key=style.right.__getitem__), max(style.wrong, key=style.wrong.__getitem__)
        lines.append((name, share(style.right["as it is"]), f"{share(style.right[lowest])} ({lowest})",
                      f"{share(style.wrong[highest])} (CFG {highest})", _verdict(style.passed), share(word.known),
                      _verdict(word.passed)))
    head = ("style", "real ones known", "worst, varied", "model's own taken for it", "style gate", "words known unseen",
            "word gate")
    return "\n\n".join([
        "### Gates of the scorers",
        grid(head, lines),
        f"Style: at least {share(LEAST_RIGHT)} of real held-out images, also blurred, with noise, through the VAE and at "
        f"contrasts of 0.7 to 1.3; at most {share(MOST_PAINTED)} of what the model paints without a LoRA. Words: at least "
        f"{share(LEAST_KNOWN)} of the held-out words in styles of which the scorer saw nothing. **What a failed gate "
        "stands before counts for nothing.**"])


def headlines_text(rows: Sequence[HeadlineRow], gates: Mapping[str, tuple[StyleGate, WordGate]], *, steps: int) -> str:
    """Style and word right together, between floor and ceiling; struck through where a gate failed."""
    lines = []
    for row in rows:
        style, word = gates[row.style_name]
        both = f"{share(row.both)} ± {100 * row.error:.1f}"
        gain = "" if row.gain is None or row.gain_error is None else f"{100 * row.gain:+.1f} ± {100 * row.gain_error:.1f}"
        lines.append((f"{row.style_name}: {row.what}", _struck(share(row.style), style.passed),
                      _struck(share(row.word), word.passed), _struck(both, style.passed and word.passed),
                      _struck(gain, style.passed and word.passed) if gain else "",
                      "" if row.copies is None else share(row.copies)))
    return "\n\n".join([
        f"### Headline: 24 pictures of each style, {steps} steps, asked for words it has not seen",
        grid(("pictures", "style", "word", "both right", "gain over the model alone", "copies"), lines),
        "± is a standard error over words. Copies are nearer to a training picture than any real picture of another word. "
        "Struck through: by a scorer whose gate failed."])


def detail_text(*, scorers: ScorerFigures, style: StyleResult, subject: SubjectResult | None) -> str:
    """One style and one subject from several sides."""
    parts = [FORMER, scorers_text(scorers),
             f"### Style: 24 Twemoji pictures, {style.steps} steps, asked for words it has not seen",
             _rows("pictures", style.rows), _weight_0(style),
             f"Asked for its own training captions again, {share(style.own)} of its images are taken for Twemoji.",
             "PSNR, SSIM and feature distance are to the real Twemoji of the same word (feature distance: 0 is equal).",
             "### Steps to quality (one run, its saves at weight 1)", _rows("after", style.intermediate),
             "### Memorisation: RMS distance of pixels to the nearest training picture",
             grid(("pictures", "mean", "least", "nearer than any real held-out one"),
                  [(m.name, f"{m.mean:.3f}", f"{m.least:.3f}", share(m.suspicious)) for m in style.memorised]),
             "### Loss on real held-out Twemoji, by timestep", _bands(style.loss)]
    if subject is not None:
        parts += [f"### Subject: nine pictures, {subject.steps} steps, {subject.images} images of new scenes",
                  grid(("pictures", "nearest real picture is the subject"),
                       [("base", share(subject.base_model)), ("LoRA at 1", share(subject.lora)),
                        ("real ones of the subject", share(subject.real)),
                        ("real emoji (mistaken)", share(subject.mistaken))]),
                  "Loss on the three poses that were kept back:", _bands(subject.loss)]
    return "\n\n".join(parts)


def _verdict(passed: bool) -> str:
    return "passed" if passed else "**failed**"


def _struck(text: str, counts: bool) -> str:
    return text if counts else f"~~{text}~~"


def scorers_text(scorers: ScorerFigures) -> str:
    """How far the scorers can be trusted; says plainly where they cannot."""
    lines = [f"Style scorer: right on {share(scorers.style)} of the real held-out pictures, which it was not fitted on "
             f"(palette alone {share(scorers.style_palette)}, texture alone {share(scorers.style_texture)}; "
             f"required {share(REQUIRED)}).",
             f"Word scorer: right on {share(scorers.word_noto)} of Noto's and {share(scorers.word_twemoji)} of Twemoji's "
             "held-out words, on augmented images of its own training set"
             + ("." if scorers.word_across is None else
                f"; on {share(scorers.word_across)} of Twemoji's where it was shown Noto's only.")]
    return "\n".join([*([] if scorers.style_counts else [WORTHLESS]), *lines])


def _weight_0(style: StyleResult) -> str:
    if style.weight_0_is_base_model:
        return "At weight 0 the pictures are the base model's, bit for bit (compared: the first sixteen)."
    return "**At weight 0 the pictures are not the base model's: something is wrong.**"


def _rows(first: str, rows: Sequence[Row]) -> str:
    return grid((first, *_ROW), [
        (row.name, share(row.style), share(row.palette), share(row.texture), share(row.word), f"{row.psnr:.2f}",
         f"{row.ssim:.3f}", f"{row.feature:.3f}") for row in rows])


def _bands(bands: Sequence[Band]) -> str:
    return grid(("timesteps", "base", "LoRA", "change"), [
        (band.timesteps, f"{band.base_model:.4f}", f"{band.lora:.4f}", f"{100 * (band.lora / band.base_model - 1):+.1f} %")
        for band in bands])
