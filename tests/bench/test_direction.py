"""The direction of everything else: a short training in Twemoji's hand moves the model towards Twemoji and not towards Noto.

What `bench quality` asks painted pictures, this asks the model itself, in seconds: for words that nobody trained on, is the
real Twemoji picture now easier to denoise than it was, more so than the real Noto picture of the same word?
"""

from __future__ import annotations

from lib_lora_train.bench.painter import Painter
from lib_lora_train.bench.quality import STYLE
from lib_lora_train.bench.real_pictures import HANDS, HELD_OUT, TWEMOJI, load
from lib_lora_train.bench.style import TRIGGER
from lib_lora_train.bench.training import settings_of, train_lora
from lib_lora_train.demo.embedded import CHECKPOINT
from lib_lora_train.host.standalone import StandaloneHost

# A rate at which much is learnt soon, if not for good.
CHANGES = {"learning_rate": 1e-3, "train_batch_size": 2}
STEPS, EVERY = 80, 8


def test_for_most_words_nobody_trained_on_the_lora_prefers_twemojis_picture_to_notos(tmp_path):
    host = StandaloneHost(CHECKPOINT, lora_folder=tmp_path / "loras", runs_folder=tmp_path / "runs")
    painter, real = Painter(host), load()
    file = train_lora(host, settings=settings_of(CHANGES), data=STYLE, trigger_word=TRIGGER, name="direction", steps=STEPS,
                      wanted=(STEPS,), say=lambda text: None)[STEPS]
    lora, places = painter.lora(file, weight=1.0), real.places(HELD_OUT)[::EVERY].tolist()

    def gained(hand: str, place: int) -> float:
        prompt, pixels = [f"{TRIGGER}, {real.words[place]}"], real.pixels[hand][place:place + 1]
        without, learnt = (painter.held_out_loss(pixels, prompt, *chosen) for chosen in ((), (lora,)))
        return sum(without.values()) - sum(learnt.values())

    noto, = (hand for hand in HANDS if hand != TWEMOJI)
    prefers = [gained(TWEMOJI, place) > gained(noto, place) for place in places]
    assert sum(prefers) >= 0.75 * len(prefers)
