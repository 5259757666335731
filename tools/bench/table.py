"""The figures as text: Markdown whose columns also line up in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tools.bench.evaluator import Band, Row, ScorerFigures
from tools.bench.report import grid, share
from tools.bench.scorers import REQUIRED
from tools.bench.style import StyleResult
from tools.bench.subject import SubjectResult

WORTHLESS = "**The style scorer is right too seldom: all Twemoji shares below count for nothing.**"
_ROW = ("Twemoji", "by palette", "by texture", "shows the word", "PSNR dB", "SSIM", "feature distance")


def quality_text(*, settings: Mapping[str, object], checkpoint: str, scorers: ScorerFigures, style: StyleResult,
                 subject: SubjectResult | None, thorough: bool, seconds: float) -> str:
    """The whole report."""
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items())
    parts = [f"Model {checkpoint}; {chosen}. Made in {seconds / 60:.1f} minutes.", scorers_text(scorers)]
    if not thorough:
        parts.insert(0, "**A quick run: few words, and scorers fitted with few steps. Not to be quoted.**")
    parts += [f"### Style: 24 Twemoji pictures, {style.steps} steps, asked for words it has not seen",
              _rows("pictures", style.rows), _weight_0(style),
              f"Asked for its own training captions again, {share(style.own)} of its images are taken for Twemoji: how "
              "much of the style this model can show at all.",
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
    return "\n\n".join(parts) + "\n"


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
