"""What must stay as it is in the model: the LoRA is held to what the base model itself predicts.

dop     differential output preservation (ostris' ai-toolkit; sd-scripts, PR 1710): each batch is trained a second time with the
        class word in the place of the trigger word, towards the base model's prediction of that
blank   the same with the empty caption
dco     direct consistency optimisation (Lee et al. 2024, arXiv 2402.12004): the base model's own error, which it makes with
        the class word, is what the loss is compared with: -log σ(-β·(e - e_base))
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lib_lora_train.dataset.captions import split_tags
from lib_lora_train.inputs.batch import Batch
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.training.condition import Condition
from lib_lora_train.training.loss import prediction_and_target

_REFERENCE = "reference."


@dataclass(frozen=True)
class Preservation:
    """How it is preserved: `kind` is "none", "dop", "blank" or "dco"; `weight` is that of dop and blank, `trigger_words` are
    those of all folders."""

    kind: str = "none"
    weight: float = 1.0
    trigger_words: tuple[str, ...] = ()
    class_word: str = ""

    def captions(self, captions: Sequence[str]) -> tuple[str, ...]:
        """What is asked in the place of these captions; () where nothing else is."""
        if self.kind == "blank":
            return ("",) * len(captions)
        if self.kind == "none" or not (self.trigger_words and self.class_word):
            return ()
        for word in self.trigger_words:
            captions = [class_caption(caption, trigger_word=word, class_word=self.class_word) for caption in captions]
        return tuple(captions)

    def inputs(self, batch: Batch, condition: Condition) -> list[Batch]:
        """The batches to train: the batch, and what is trained beside it."""
        if not (captions := self.captions(batch.captions)):
            return [batch]
        text = condition.prepare(captions)
        if self.kind == "dco":
            return [batch.extended({_REFERENCE + name: tensor for name, tensor in text.items()})]
        every = torch.ones(len(batch), 1, 1, 1)
        return [batch, batch.extended({**text, "mask": 0 * every, "prior": every, "weight": self.weight * batch["weight"]})]


def class_caption(caption: str, *, trigger_word: str, class_word: str) -> str:
    """The caption with the class word in the place of the trigger word, whatever its case; of a trigger of several tags, in the
    place of the first, without the others."""
    tags = split_tags(trigger_word)
    for number, tag in enumerate(tags):
        word = class_word if number == 0 else ""
        caption = re.sub(rf"(?<!\w){re.escape(tag)}(?!\w)", lambda _, word=word: word, caption, flags=re.IGNORECASE)
    return ", ".join(split_tags(caption)) if len(tags) > 1 else caption


@torch.no_grad()
def with_reference(model: FrozenModel, batch: Batch, *, condition: Condition, dtype: torch.dtype) -> Batch:
    """The batch with what the model predicts of it without anything that is trained: "reference", [B, C, h, w] fp32."""
    own = {name.removeprefix(_REFERENCE): tensor for name, tensor in batch.tensors.items() if name.startswith(_REFERENCE)}
    text = condition.encode(batch.extended(own), adapted=False)
    prediction, _ = prediction_and_target(model, batch, conditioning=text, adapters={}, dtype=dtype)
    return batch.extended({"reference": prediction})
