"""What to fix first: findings in plain sentences, worst first. Each says how many, why it matters and what to do.

Worst is how bad a thing is times the share of the images it touches; what keeps a training from starting comes first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from lib_lora_train.dataset.captions import split_tags
from lib_lora_train.dataset.findings import DEEP_CROP, LONG_CAPTION, NARROW, DatasetReport, Examined
from lib_lora_train.dataset.plan import MIN_VISITS, MIN_VISITS_PER_IMAGE
from lib_lora_train.errors import counted, printable, some_of
from lib_lora_train.settings import named

MIN_IMAGES = 10
SIDES = (512, 768, 1024)  # training sizes that a page offers

_SHORTEST = 6  # letters of a tag with a typing error; shorter words have too many neighbours that are words
_USUAL = 5  # captions: so often a tag must occur for a rare one to be measured by it

Weighted = tuple[float, str]


@dataclasses.dataclass(frozen=True)
class Circumstances:
    """What the advice needs to know beyond the findings."""

    layout: Literal["kohya", "plain"]
    trigger_word: str
    enable_bucket: bool
    concepts: tuple[str, ...]  # the names of kohya's folders
    captions: tuple[str, ...]  # of each image, as it is trained
    planned_visits: int | None  # of all images over the run; None where the proposal's rule decides
    risks: tuple[str, ...]  # sentences about settings that are known to fail
    spellings: Mapping[str, int]  # tags by frequency, where escaped brackets are another spelling
    notes: tuple[str, ...]  # what is odd about caption files, a sentence each
    problems: tuple[str, ...]  # sentences of the folder's layout


def advise(report: DatasetReport, around: Circumstances) -> tuple[str, ...]:
    """The sentences, worst first; none if there is nothing to fix."""
    weighted = [*_files(report), *_number(report), *_captions(report, around), *_images(report, around),
                *_length(report, around), *_tags(report, around)]
    weighted += [(4.0, text) for text in around.problems] + [(60.0, text) for text in around.risks]
    return tuple(printable(text) for _, text in sorted(weighted, key=lambda item: -item[0]))


def _files(report: DatasetReport) -> Iterator[Weighted]:
    unreadable = _with(report, "unreadable_caption")
    for why in dict.fromkeys(image.unread for image in unreadable):
        alike = [image for image in unreadable if image.unread == why]
        yield 2000, (f"{_count(alike, 'caption file')} cannot be read ({_names(alike)}), so a training would refuse to start: "
                     f"{why}.")
    broken = _with(report, "broken")
    for why in dict.fromkeys(image.why for image in broken):
        alike = [image for image in broken if image.why == why]
        yield 50 + _share(broken, report), (
            f"{_count(alike, 'picture')} cannot be used and would be left out ({_names(alike)}): {why}.")
    if several := [image for image in report.images if image.several]:
        yield 1, (f"{_count(several, 'picture')} {'holds' if len(several) == 1 else 'hold'} several frames or pages "
                  f"({_names(several)}), of which only the first is trained: save the others as pictures of their own.")


def _number(report: DatasetReport) -> Iterator[Weighted]:
    usable = report.usable
    if usable == 0:
        yield 3000, ("No picture of this folder can be trained on, for the reasons below: replace them, or choose another "
                     "folder.")
        return
    different = usable - len(_with(report, "duplicate"))
    if different < MIN_IMAGES:
        yield 100, (f"Only {counted(different, 'different picture is', 'different pictures are')} here, and from fewer "
                    f"than {MIN_IMAGES} a LoRA mostly learns to copy: add at least {MIN_IMAGES - different} "
                    "more that differ in pose, light and background.")


def _captions(report: DatasetReport, around: Circumstances) -> Iterator[Weighted]:
    missing, empty = _with(report, "no_caption"), _with(report, "empty_caption")
    for images, have in ((missing, "no caption file"), (empty, "an empty caption file")):
        if not images:
            continue
        start = f"{_count(images, 'picture')} {'has' if len(images) == 1 else 'have'} {have} ({_names(images)})"
        instead = around.trigger_word or " / ".join(around.concepts)
        if instead:
            why = (f" and would be trained on '{instead}' alone, so that clothes, pose and background become part of that "
                   "word too: write tags or a caption")
        else:
            why = (" and no trigger word is set, so no word would call what is learnt: write tags or a caption, or set a "
                   "trigger word")
        yield 4 + (20 if instead else 30) * _share(images, report), f"{start}{why}."
    long = _with(report, "long_caption")
    if long:
        yield 5 * _share(long, report), (
            f"{_count(long, 'caption')} {'is' if len(long) == 1 else 'are'} longer than {LONG_CAPTION} tokens "
            f"(longest: {max(p.tokens or 0 for p in long)} tokens, {_names(long)}); what stands late has little effect, and "
            "other trainers cut it off: keep the tags that matter.")
    yield from ((6, text) for text in around.notes)


def _images(report: DatasetReport, around: Circumstances) -> Iterator[Weighted]:
    twins = _with(report, "duplicate")
    if twins:
        pairs = [f"{group[1].name} ≈ {group[0].name}" for group in report.duplicates]
        yield 4 + 20 * _share(twins, report), (
            f"{_count(twins, 'picture')} {_are(twins)} nearly the same as another ({some_of(pairs, 3)}), and what is shown "
            "twice is learnt twice as hard, up to copying it: keep the best of each and remove the others.")
    yield from _small(report)
    blurry = _with(report, "blurry")
    if blurry:
        yield 3 + 15 * _share(blurry, report), (
            f"{_count(blurry, 'picture')} {'looks' if len(blurry) == 1 else 'look'} blurred ({_names(blurry)}), and a LoRA "
            "learns blur as readily as anything else: find sharper ones, unless softness is what you want.")
    narrow = _with(report, "narrow")
    if narrow:
        out = sum(not image.usable for image in narrow)
        yield (3 if out else 2) + 12 * _share(narrow, report), (
            f"{_count(narrow, 'picture')} {_are(narrow)} more than {NARROW:g} times as long as wide ({_names(narrow)}), a "
            f"shape that models paint badly{f' ({out} would even be left out)' if out else ''}: crop, or split into "
            "squarer pieces.")
    deep = sorted(_with(report, "deep_crop"), key=lambda image: -image.crop_loss)
    if deep:
        buckets = "" if around.enable_bucket else f", or switch {named('enable_bucket')} on, which crops far less"
        yield 2 + 12 * _share(deep, report), (
            f"{_count(deep, 'picture')} would lose more than {100 * DEEP_CROP:.0f} % to the crop (most: "
            f"{deep[0].path.name}, {100 * deep[0].crop_loss:.0f} %), which may cut off heads and hands: look at the crops and "
            f"crop by hand where it matters{buckets}.")


def _small(report: DatasetReport) -> Iterator[Weighted]:
    small = sorted(_with(report, "small"), key=lambda image: image.width * image.height)
    if not small:
        return
    least = small[0]
    wanted = report.resolution[0] * report.resolution[1]
    usual = sorted(p.width * p.height for p in report.images if p.width)
    reached = usual[len(usual) // 4] ** 0.5  # by three quarters of the images
    side = max((side for side in SIDES if side <= reached), default=0)
    lower = f"; or set {named('resolution')} to {side}" if 2 * len(small) > len(report.images) and side else ""
    yield 3 + 18 * _share(small, report), (
        f"{_count(small, 'picture')} {_are(small)} smaller than the training size {report.resolution[0]}×"
        f"{report.resolution[1]} (smallest: {least.path.name}, {least.width}×{least.height}, "
        f"{(wanted / (least.width * least.height)) ** 0.5:.1f} times too small), and a LoRA learns the softness of enlarged "
        f"pictures: find larger originals, use an upscaler, or remove what is too small{lower}.")


def _length(report: DatasetReport, around: Circumstances) -> Iterator[Weighted]:
    planned, usable = around.planned_visits, report.usable
    # A large folder is often seen less than a hundred times an image, and learns; a fifth less is a choice, not a mistake.
    wanted = min(max(MIN_VISITS, MIN_VISITS_PER_IMAGE * usable), 2 * MIN_VISITS)
    if planned is None or not usable or planned >= 0.8 * wanted:
        return
    proposal = report.proposal
    name = f" (a folder called {proposal.repeats}_{around.concepts[0]})" if len(around.concepts) == 1 else ""
    yield 8, (f"The {counted(usable, 'picture')} would be shown only {planned:,} times in all, and less than {wanted:,} mostly "
              f"is too little to learn from: set {counted(proposal.repeats, 'repeat')}{name} and "
              f"{counted(proposal.epochs, 'epoch')}, or train more epochs.")


def _tags(report: DatasetReport, around: Circumstances) -> Iterator[Weighted]:
    captioned = [caption for caption, image in zip(around.captions, report.images, strict=True)
                 if not {"no_caption", "empty_caption", "unreadable_caption", "broken"} & set(image.problems)]
    if around.layout == "kohya" and not around.trigger_word and len(around.concepts) == 1 and captioned:
        words = {tag.casefold() for tag in split_tags(around.concepts[0])}
        without = [caption for caption in captioned if not all(word in caption.casefold() for word in words)]
        if len(without) == len(captioned):
            yield 7, (f"None of the {counted(len(captioned), 'caption')} holds the folder's name '{around.concepts[0]}', which "
                      "counts only where there is no caption file, so it would call nothing: set it as the trigger word, "
                      "unless this is a style that needs none.")
    two_ways = respelt(around.spellings)
    if two_ways:
        pairs = [f"'{rare}' {around.spellings[rare]} beside '{usual}' {around.spellings[usual]}" for rare, usual in two_ways]
        yield 1, (f"{counted(len(pairs), 'tag')} {'is' if len(pairs) == 1 else 'are'} spelt in two ways ({some_of(pairs, 3)}), "
                  "which the model reads as different words: replace one spelling by the other.")
    slips = typing_errors(report.tags)
    if slips:
        pairs = [f"'{slip}' beside '{meant}' {report.tags[meant]}" for slip, meant in slips]
        errors = "a typing error" if len(pairs) == 1 else "typing errors"
        yield 0, (f"{counted(len(pairs), 'tag')} of a single caption may be {errors} ({some_of(pairs, 3)}), and a word seen "
                  "once is not learnt: correct it where it is one.")


def respelt(tags: Mapping[str, int]) -> list[tuple[str, str]]:
    """(rarer, usual) spellings that differ in underscores, hyphens, spaces and escaping only; `tags` are frequencies."""
    usual: dict[str, str] = {}
    found = []
    for tag in sorted(tags, key=lambda tag: (-tags[tag], tag)):
        plain = " ".join(tag.casefold().replace("\\", "").replace("_", " ").replace("-", " ").split())
        if plain not in usual:
            usual[plain] = tag
        elif plain:
            found.append((tag, usual[plain]))
    return found


def typing_errors(tags: Mapping[str, int]) -> list[tuple[str, str]]:
    """(tag of one caption, frequent tag) where a letter more, a letter less or two swapped letters make one the other.

    Not an exchanged letter: `pink shirt` and `pink skirt` are two things.
    """
    frequent = {tag.casefold(): tag for tag, count in tags.items() if count >= _USUAL and len(tag) >= _SHORTEST}
    with_one_less = {shorter: tag for key, tag in frequent.items() for shorter in _one_less(key)}
    found = []
    for tag, count in tags.items():
        key = tag.casefold()
        if count != 1 or len(key) < _SHORTEST:
            continue
        meant = with_one_less.get(key) or next(
            (frequent[other] for other in (*_one_less(key), *_swapped(key)) if other in frequent), None)
        if meant is not None and not _is_plural(key, meant.casefold()):
            found.append((tag, meant))
    return found


def _one_less(word: str) -> Iterator[str]:
    """`word` without one of its letters; digits stay, for 1girl and 11girls are no slip of each other."""
    return (word[:i] + word[i + 1:] for i, letter in enumerate(word) if letter.isalpha())


def _swapped(word: str) -> Iterator[str]:
    return (word[:i] + word[i + 1] + word[i] + word[i + 2:] for i in range(len(word) - 1)
            if word[i].isalpha() and word[i + 1].isalpha() and word[i] != word[i + 1])


def _is_plural(one: str, other: str) -> bool:
    return one + "s" == other or other + "s" == one


def _with(report: DatasetReport, code: str) -> list[Examined]:
    return [image for image in report.images if code in image.problems]


def _share(images: Sequence[Examined], report: DatasetReport) -> float:
    return len(images) / len(report.images)


def _names(images: Sequence[Examined]) -> str:
    return some_of([image.path.name for image in images], 3)


def _count(things: Sequence[object], word: str) -> str:
    return counted(len(things), word)


def _are(things: Sequence[object]) -> str:
    return "is" if len(things) == 1 else "are"

