"""How the model takes styles that are new to it: the loss on words in a style that it knows, and in styles that it does not.

All pictures are held out: of the words of GATE, in Noto's style (which it learns, but not from these pictures), Twemoji's and
OpenMoji's (which it is never shown). The words themselves it knows from other styles. Captions are what a LoRA is trained
with: a trigger word that means nothing, and the name.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from images import ASKED, GATE, HELD_OUT, enlarged, on_paper
from PIL import Image
from torch import Tensor

from tools import styles

TIMESTEPS = tuple(range(50, 1000, 100))
TRIGGER = "zorp"
MOST_LOSS, MOST_RATIO = 0.06, 1.5
"""The gate: an unseen style's loss, and how many times that of the seen style."""
Losses = Callable[[Tensor, int, list[str], Tensor], Tensor]
"""Latents, timestep, captions and noise to the mean squared error of ε, [N]."""


def words_of(count: int) -> list[str]:
    """So many of GATE, evenly spread."""
    return [GATE[index * len(GATE) // count] for index in range(count)]


class Gate:
    """The held-out latents. `measure` with the losses of a model."""

    def __init__(self, packages: Path, encode: Callable[[Tensor], Tensor], *, words: int = len(GATE)) -> None:
        """`words`: how many of GATE, evenly spread."""
        chosen, drawn = styles.shared(packages, always=ASKED)
        by_label = {one.label: one for one in chosen}
        self._captions: dict[str, list[str]] = {}
        self._latents: dict[str, Tensor] = {}
        gate = words_of(words)
        known = [HELD_OUT[index * len(HELD_OUT) // words] for index in range(words)]
        for name, style, labels in (("noto", styles.NOTO, gate), *((style.name, style, gate) for style in styles.UNSEEN),
                                   ("noto, shown", styles.NOTO, known)):
            of = drawn[style.name] if style.name in drawn else styles.drawings(packages, style, list(by_label.values()))
            labels = [label for label in labels if label in of]
            papers = np.stack([on_paper(Image.fromarray(of[label])) for label in labels])
            self._latents[name] = encode(enlarged(torch.from_numpy(papers)))
            self._captions[name] = [f"{TRIGGER}, {label}" if name != "noto, shown" else label for label in labels]

    @torch.no_grad()
    def measure(self, losses: Losses) -> dict[str, float]:
        """{"noto": …, "twemoji": …, "openmoji": …, "noto, shown": …, "ratio": the worst unseen style's to Noto's}.

        "noto, shown" are pictures that the model learns from. The noise is the same at every call.
        """
        found = {}
        for name, latents in self._latents.items():
            draw = torch.Generator().manual_seed(random.Random(name).getrandbits(60))
            each = [losses(latents, t, self._captions[name], torch.randn(latents.shape, generator=draw)) for t in TIMESTEPS]
            found[name] = float(torch.stack(each).mean())
        return {**found, "ratio": max(found[style.name] for style in styles.UNSEEN) / found["noto"]}


def passed(figures: Mapping[str, float]) -> bool:
    """Whether unseen styles are as good as seen ones."""
    return max(figures[style.name] for style in styles.UNSEEN) < MOST_LOSS and figures["ratio"] <= MOST_RATIO
