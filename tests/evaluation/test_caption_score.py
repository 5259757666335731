"""The numbers of the caption check on models whose answers are known, and on each family of models."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lib_lora_train.evaluation.caption_check import check_captions
from lib_lora_train.host import lease
from lib_lora_train.host.port import Checkpoint, LeasedModel
from lib_lora_train.model.family import SD1
from lib_lora_train.model.sd.schedule import NoiseSchedule
from lib_lora_train.model.sd.text import Conditioning
from lib_lora_train.settings import parse
from tests.model.small_checkpoints import FAMILIES, HINTS, checkpoint, tokenizers

SMALL = parse({"resolution": "64", "min_bucket_reso": 64})


class LeasingHost:
    """Leases what it is given; nobody else is there."""

    def __init__(self, leased: LeasedModel) -> None:
        self._leased = leased

    @contextlib.contextmanager
    def lease(self, *, stop):
        yield self._leased

    def interrupted(self) -> bool:
        return False

    def report(self, event) -> None:
        pass


def model_that_adds(share: float, prediction_type: str):
    """Told nothing it says 0; told something, `share` times the truth. Images are latents of 0, so x_t holds the noise."""
    schedule = NoiseSchedule.build(prediction_type=prediction_type)

    def unet(x, t, context, y=None):
        kept = schedule.alphas_cumprod[t][:, None, None, None]
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
        truth = x / sigma if prediction_type == "epsilon" else alpha * x / sigma
        return share * context[:, 0, 0][:, None, None, None] * truth
    return SimpleNamespace(
        unet=unet, schedule=schedule, device=torch.device("cpu"), dtype=torch.float32,
        vae=SimpleNamespace(encode=lambda pixels: (torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8))),
        text=SimpleNamespace(tokenize=lambda text: text, encode=lambda texts, **_: Conditioning(
            torch.tensor([float(bool(text)) for text in texts])[:, None, None], None)),
        architecture=SimpleNamespace(latent_scale=0.18215, family=SD1))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("share", "score", "gain"), [
    (1.0, 100, 1.0), (0.5, 100, 0.75), (3.0, 100, -3.0), (0.0, 0, 0.0), (-1.0, 0, -3.0)],
    ids=["all that is missing", "half of it", "far too much", "nothing", "the opposite"])
def test_score_is_the_direction_and_gain_the_loss_taken_away(monkeypatch, tmp_path, share, score, gain, prediction_type):
    # (1 - share)² is left of the loss.
    monkeypatch.setattr(lease.frozen, "build", lambda *_, **__: model_that_adds(share, prediction_type))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    leased = LeasedModel({}, SimpleNamespace(), Checkpoint("a", "a", "sd1"), torch.device("cpu"))
    row, = check_captions(LeasingHost(leased), [(tmp_path / "a.png", "a cat")], settings=SMALL, seeds=0)
    assert row.score == pytest.approx(score, abs=1e-3)
    assert row.gain == pytest.approx(gain, abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_asked_and_paints(family, tmp_path):
    Image.new("RGB", (130, 60), "red").save(tmp_path / "a.png")
    leased = LeasedModel(checkpoint(family), HINTS[family], Checkpoint("a", "a", family), torch.device("cpu"),
                         tokenizers(family))
    captions = ["a red thing", ", ".join(["a long caption of more than one chunk"] * 12)]
    rows = list(check_captions(LeasingHost(leased), [(tmp_path / "a.png", text) for text in captions], settings=SMALL, seeds=1,
                               steps=1))
    assert {row.caption for row in rows} == set(captions)
    assert all(0 <= row.score <= 100 and row.gain < 1 and 0 <= row.similarity <= 1 for row in rows)
    assert all(image.size == (64, 64) for row in rows for image in row.images)
