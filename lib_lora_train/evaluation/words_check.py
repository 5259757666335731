"""What the model already understands of a run's words, asked once before the first step.

A model that knows what a word means predicts another noise with it. Let e, o, a be its predictions with the empty text, with
an image's own caption and with another image's, and y the target. Of a model that is right about its words y - o is orthogonal
to all that it could have predicted, so that |y - a|² - |y - o|² is |o - a|² on average: their quotient, `fit`, is 1. Where
captions have nothing to do with their images they fit no better than others, and it is 0. That depends on no noise, size or
model. In the same manner `gain`, (|y - e|² - |y - o|²) / |o - e|², is 1 for words that are right about their image, and -1
for words that say something else. (The classifier of Li et al. 2023, arXiv 2303.16203, compares the same losses.) High
timesteps are asked, where little of the image is seen and the words decide.

How much words mean to a model is how far they move its prediction: between what made-up words (0) and everybody's words (1) do.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_lora_train.dataset.likeness import near_duplicates
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.training.condition import Condition
from lib_lora_train.training.loss import prediction_and_target
from lib_lora_train.training.noise import draw, seed_of

MADE_UP, WELL_KNOWN = ("zumiwok", "vexqua"), ("house", "tree")
_TIMESTEPS = (0.8, 0.875, 0.95)  # shares of the schedule
_CAPTIONS, _WORDS = 6, 5  # times that captions and single words are asked about: 18 and 20 passes, 5 more with a trigger word
MOST_PASSES = 43
"""Of the UNet, with one image each."""


@dataclasses.dataclass(frozen=True)
class WordsCheck:
    """What the model makes of the words; None where it was not asked.

    fit       of captions: 1 those of their images, 0 those of any
    gain      of captions beside no text: 1 right about their images, -1 about something else
    meaning   of what tells captions apart: 0 as little as made-up words, 1 as much as everybody's words
    trigger_gain, trigger_meaning   likewise, of the trigger word alone
    """

    fit: float | None = None
    gain: float | None = None
    meaning: float | None = None
    trigger_gain: float | None = None
    trigger_meaning: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """An image (a batch of one on the CPU) with its caption; another's caption, "" where all are alike; and a timestep."""

    image: Batch
    other: str
    timestep: int
    number: int

    @property
    def caption(self) -> str:
        """Its own."""
        return self.image.captions[0]


def questions(images: Sequence[Batch], *, steps: int) -> tuple[Question, ...]:
    """What is asked about these images under a schedule of so many steps."""
    captions, found = [image.captions[0] for image in images], []
    for number in range(_CAPTIONS if images else 0):
        own = number % len(images)
        later = [*captions[own + len(images) // 2:], *captions]  # begins with that of an image far from it
        other = next((caption for caption in later if caption != captions[own]), "")
        found.append(Question(images[own], other, int(steps * _TIMESTEPS[number % len(_TIMESTEPS)]), number))
    return tuple(found)


def texts_of(queries: Sequence[Question], *, trigger_word: str) -> tuple[str, ...]:
    """All texts that the model is asked about."""
    captions = [text for question in queries for text in (question.caption, question.other)]
    return tuple(dict.fromkeys(["", *MADE_UP, *WELL_KNOWN, trigger_word, *captions])) if queries else ()


@torch.no_grad()
def check_words(model: FrozenModel, queries: Sequence[Question], condition: Condition, *, trigger_word: str,
                dtype: torch.dtype) -> WordsCheck:
    """Ask the model without a LoRA. Waits for the device once."""
    found: list[dict[str, Tensor]] = []
    for question in queries:
        texts = {"own": question.caption, "other": question.other} if question.caption and question.other else {}
        if question.number < _WORDS:
            texts |= {text: text for text in (*MADE_UP, *WELL_KNOWN)} | ({"trigger": trigger_word} if trigger_word else {})
        found.append(_squares(model, question, {"": "", **texts}, condition, dtype=dtype))
    values = iter(torch.cat([torch.stack(list(squares.values())) for squares in found]).tolist() if found else ())
    return _check([{name: next(values) for name in squares} for squares in found])


def _squares(model: FrozenModel, question: Question, texts: Mapping[str, str], condition: Condition, *, dtype: torch.dtype
             ) -> dict[str, Tensor]:
    """The mean squares, 0-d, of y - x as "x" and of x - e as "x moved" for the prediction x of each text ("": e), and of o - a
    as "apart"."""
    draws = draw(question.image["mean"].shape, seed=seed_of("words", question.number), step=0, micro=0, timesteps=1)
    row = question.image.extended({**draws, "timesteps": torch.tensor([question.timestep])})
    predictions: dict[str, Tensor] = {}
    for name, text in texts.items():
        batch = row.extended(condition.prepare((text,))).to(model.device)
        predictions[name], target = prediction_and_target(model, batch, conditioning=condition.encode(batch), adapters={},
                                                          dtype=dtype)
    differences = {name: target - prediction for name, prediction in predictions.items()}
    differences |= {f"{name} moved": predictions[name] - predictions[""] for name in texts}
    if "own" in texts:
        differences["apart"] = predictions["own"] - predictions["other"]
    return {name: difference.square().mean() for name, difference in differences.items()}


def _check(found: Sequence[Mapping[str, float]]) -> WordsCheck:
    """The numbers of all questions; sums are divided, so that questions count as much as the model says to them."""
    def total(name: str, of: str) -> float:
        return sum(squares[name] for squares in found if of in squares)

    def gain(name: str) -> float | None:
        moved = total(f"{name} moved", name)
        return (total("", name) - total(name, name)) / moved if moved else None

    def size(name: str, of: str) -> float:
        return (total(name, of) / total("", of)) ** 0.5

    def meaning(moved: float) -> float | None:
        made_up, known = (statistics.fmean(size(f"{word} moved", word) for word in words) for words in (MADE_UP, WELL_KNOWN))
        return (moved - made_up) / (known - made_up) if known > made_up else None
    apart, trigger = total("apart", "own"), gain("trigger")
    return WordsCheck(
        fit=(total("other", "own") - total("own", "own")) / apart if apart else None, gain=gain("own"),
        # Two independent moves of a size are √2 of it apart.
        meaning=meaning(size("apart", "own") / 2 ** 0.5) if apart else None,
        trigger_gain=trigger, trigger_meaning=None if trigger is None else meaning(size("trigger moved", "trigger")))


def different(latents: Sequence[Tensor]) -> int:
    """How many different images these are, near-duplicates counted once, by their latents [C, h, w]: a latent image is alike
    where its image is."""
    small = [F.adaptive_avg_pool2d(one[None].float().cpu(), 16)[0, :3] for one in latents]
    if not small:
        return 0
    low, high = min(float(one.min()) for one in small), max(float(one.max()) for one in small)
    thumbnails = [((one - low) * (255 / max(high - low, 1e-12))).byte().permute(1, 2, 0).numpy() for one in small]
    return len(small) - sum(len(group) - 1 for group in near_duplicates(thumbnails))
