"""The figures as text: Markdown whose columns also line up in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tools.bench.headline import HeadlineRow
from tools.bench.joint_scorer import LEAST_KNOWN, LEAST_OWN, OWN_AT, THOROUGH, Extent, WordGate
from tools.bench.report import grid, share
from tools.bench.style_scorer import LEAST_RIGHT, MOST_PAINTED, StyleGate
from tools.bench.subject import SubjectRow


def intro_text(*, settings: Mapping[str, object], checkpoint: str, extent: Extent, words: int, seconds: float) -> str:
    """What was measured with what."""
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items())
    said = (f"Model {checkpoint}; {chosen}. {'Test' if extent.test else 'Held-out'} words: {words}; images a word: "
            f"{extent.seeds}; runs: {extent.runs}; sampler steps: {extent.sampler_steps}. Made in {seconds / 60:.1f} minutes.")
    if (extent.style, extent.word) == (THOROUGH.style, THOROUGH.word):
        return said
    return f"**A quick run: few words, and scorers fitted with few steps. Not to be quoted.**\n\n{said}"


def gates_text(gates: Mapping[str, tuple[StyleGate, WordGate]], own: float) -> str:
    """What the scorers of the graded styles are worth, and how many words the model paints right by itself, before anything is
    scored by them."""
    lines = []
    for name, (style, word) in gates.items():
        lowest, highest = min(style.right, key=style.right.__getitem__), max(style.wrong, key=style.wrong.__getitem__)
        lines.append((name, share(style.right["as it is"]), f"{share(style.right[lowest])} ({lowest})",
                      f"{share(style.wrong[highest])} (CFG {highest})", _verdict(style.passed), share(word.known),
                      _verdict(word.passed)))
    head = ("style", "real ones known", "worst, varied", "model's own taken for it", "style gate", "words known unseen",
            "word gate")
    return "\n\n".join([
        "### Gates",
        grid(head, lines),
        f"Style: at least {share(LEAST_RIGHT)} of real held-out images, also blurred, with noise, through the VAE and at "
        f"contrasts of 0.7 to 1.3; at most {share(MOST_PAINTED)} of what the model paints without a LoRA. Words: at least "
        f"{share(LEAST_KNOWN)} of the held-out words in styles of which the scorer saw nothing. **What a failed gate "
        "stands before counts for nothing.**",
        f"The model by itself paints {share(own)} of the words right at a CFG scale of {OWN_AT:g}; {share(LEAST_OWN)} are "
        f"asked for: {_verdict(own >= LEAST_OWN)}."])


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


def subject_text(rows: Sequence[SubjectRow], *, steps: int) -> str:
    """How often the subjects are found in images of new scenes."""
    return "\n\n".join([
        f"### Subjects: nine pictures each, {steps} steps, asked for on other grounds and smaller",
        grid(("pictures", "nearest real picture is the subject"),
             [(f"{row.subject}: {row.what}", share(row.found) + ("" if row.error is None else f" ± {100 * row.error:.1f}"))
              for row in rows]),
        "± is a standard error over scenes."])


def _verdict(passed: bool) -> str:
    return "passed" if passed else "**failed**"


def _struck(text: str, counts: bool) -> str:
    return text if counts else f"~~{text}~~"
