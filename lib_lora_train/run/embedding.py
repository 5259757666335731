"""The trigger word's own vectors, which are trained with a LoRA: whether they are possible, and how they begin."""

from __future__ import annotations

import re

from lib_lora_train.adapters.embedding import WordEmbedding
from lib_lora_train.adapters.network import AdapterNetwork
from lib_lora_train.errors import SettingError
from lib_lora_train.events import Report, Warned
from lib_lora_train.model.frozen import FrozenModel
from lib_lora_train.settings import Settings, named, no_effect
from lib_lora_train.settings.dataset_config import subsets_of

_NAME = re.compile(r"[^\W_]([\w\- ]*[^\W_])?")
"""What the WebUI finds in a prompt: brackets, colons and the like have a meaning there, a dot ends the name in the file, and
CLIP joins what follows a word's last letter to no other word."""
_KEYWORDS = re.compile(r"\b(AND|BREAK)\b")  # of prompts in the WebUI


def check_embedding(settings: Settings) -> None:
    """Raise SettingError where the trigger word cannot have vectors of its own."""
    word, switch = settings.dataset.trigger_word, named("train_trigger_embedding")
    if not settings.network.train_trigger_embedding:
        return
    if not word:
        raise SettingError(f"{switch} needs {named('trigger_word')}", why="that word is what it gives a meaning",
                           remedy="write a word of your own")
    if not _NAME.fullmatch(word) or _KEYWORDS.search(word):
        raise SettingError(f"{named('trigger_word')} = {word!r} is not possible with {switch}", why="the WebUI would not find "
                           "it in a prompt", remedy="take one word, or a few, of letters and digits, with - or _ between them")
    if others := sorted({subset.dataset.trigger_word for subset in subsets_of(settings)} - {"", word}):
        raise SettingError(f"{switch} is possible for one trigger word only", why=f"{named('dataset_config')} has another one, "
                           f"{others[0]!r}", remedy=f"give all folders {word!r}, or switch it off")
    if not settings.network.embedding_lr:
        raise SettingError(f"{switch} would train nothing", why=f"{named('embedding_lr')} is 0", remedy="set it to 1e-3")


def ordinary_trigger(model: FrozenModel, settings: Settings) -> list[str]:
    """A sentence where the trigger word consists of words that CLIP knows as such."""
    word = settings.dataset.trigger_word
    if not settings.network.train_trigger_embedding or len(model.text.tokenizers[0].encode(word)) > len(word.split()):
        return []
    return [f"{named('trigger_word')} = {word!r} is a word that the model knows. Wherever it stands in a prompt, its new "
            "vectors take its place while the LoRA is there: a made-up word would leave it alone."]


def add_trigger_embedding(network: AdapterNetwork, settings: Settings, model: FrozenModel, *, weights: str, resumed: bool,
                          report: Report) -> None:
    """Have the network train the trigger word's vectors: those that came with the file `weights` ("" for none), or new ones.
    Raises SettingError where a `resumed` run has trained another word."""
    chosen, word = settings.network, settings.dataset.trigger_word
    own = next((one for one in network.embeddings if one.word.lower() == word.lower()), None)
    if own is None and resumed:
        raise SettingError(f"The run cannot go on with {named('trigger_word')} = {word!r}", why="it has trained the vectors of "
                           f"{', '.join(one.word for one in network.embeddings)}", remedy="set it back, or start anew")
    if own is None:
        text = chosen.embedding_init_text or settings.preservation.preservation_class or word
        own = WordEmbedding.initial(word, count=chosen.embedding_vectors, text=text, conditioner=model.text)
        network.embeddings = (*network.embeddings, own)
    elif not resumed:
        default = type(chosen)()
        for name in ("embedding_vectors", "embedding_init_text"):
            if getattr(chosen, name) != getattr(default, name):
                report(Warned(no_effect(name, f"{weights} holds vectors of {own.word}, which go on")))
    own.requires_grad_(True)
