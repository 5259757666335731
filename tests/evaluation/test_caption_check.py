"""The caption check tells right captions from wrong ones, and leaves everything as it was."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from lib_lora_train import demo
from lib_lora_train.dataset.caption_files import read_caption_file
from lib_lora_train.errors import HostError, Interrupted
from lib_lora_train.evaluation import caption_check
from lib_lora_train.evaluation.caption_check import Checked, check_captions
from lib_lora_train.evaluation.check_sheet import draw_checks
from lib_lora_train.evaluation.resemblance import resemblance, subject_features
from lib_lora_train.model import frozen
from lib_lora_train.settings import parse
from tools.bench import real_images

NAMES = ("avocado", "top-hat", "whale", "cherries")
SMALL = parse({"resolution": "128", "min_bucket_reso": 64})
TINY = parse({"resolution": "64", "min_bucket_reso": 64})


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    return demo.demo_host(tmp_path_factory.mktemp("emoji"))


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """One noise a timestep; where the numbers themselves do not matter, one timestep."""
    monkeypatch.setattr(caption_check, "NOISES", 1)
    if "emoji" not in request.fixturenames:
        monkeypatch.setattr(caption_check, "TIMESTEPS", (550,))


def items(*, wrong: bool = False) -> list[tuple[Path, str]]:
    """Images of the demo with their captions, or each with its neighbour's."""
    paths = [Path(demo.STYLE) / f"{name}.png" for name in NAMES]
    captions = [read_caption_file(path.with_suffix(".txt")).line for path in paths]
    return list(zip(paths, captions[1:] + captions[:1] if wrong else captions, strict=True))


def mean_score(rows: list[Checked]) -> float:
    return sum(row.score for row in rows) / len(rows)


def by_name(rows: list[Checked]) -> dict[str, Checked]:
    return {row.path.stem: row for row in rows}


def test_right_captions_score_higher_than_wrong_ones(emoji):
    right, wrong = (list(check_captions(emoji, items(wrong=wrong), settings=SMALL, seeds=0)) for wrong in (False, True))
    assert [row.score for row in right] == sorted(row.score for row in right)
    assert all(0 <= row.score <= 100 and math.isfinite(row.gain) for row in right + wrong)
    # In a style that the model never saw, so that a single image proves nothing.
    assert mean_score(right) > 1.5 * mean_score(wrong)


def test_of_pictures_like_those_it_learnt_the_model_knows_every_wrong_caption(emoji, tmp_path):
    real = real_images.load()
    words, listed = ("avocado", "whale", "top hat"), []
    for word in words:
        path = tmp_path / f"{word}.png"
        real_images.to_image(real.pixels["noto"][real.words.index(word)]).save(path)
        listed += [(path, word), (path, words[words.index(word) - 1])]
    rows = list(check_captions(emoji, listed, settings=SMALL, seeds=0))
    assert [row.path.stem == row.caption for row in rows] == [False] * 3 + [True] * 3
    assert all((row.gain > 0) == (row.path.stem == row.caption) for row in rows)


def test_what_is_painted_has_the_pictures_size_and_only_the_worst_are_painted(host, tmp_path):
    Image.new("RGB", (256, 64), "red").save(tmp_path / "wide.png")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "square.png")
    listed = [(tmp_path / "wide.png", "red"), (tmp_path / "square.png", "blue")]
    settings, progress = parse({"resolution": "128", "min_bucket_reso": 64}), []
    rows = by_name(list(check_captions(host, listed, settings=settings, seeds=2, steps=1,
                                          on_progress=lambda *of: progress.append(of))))
    assert [image.size for image in rows["wide"].images] == [(256, 64)] * 2
    assert [image.size for image in rows["square"].images] == [(128, 128)] * 2
    assert progress == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    first, second = check_captions(host, listed, settings=settings, seeds=1, steps=1, worst=1)
    assert (len(first.images), len(second.images)) == (1, 0)
    assert 0 <= first.similarity <= 1 and second.similarity is None


def test_what_cannot_be_checked_is_named_first_and_ends_nothing(host, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "good.png")
    progress = []
    rows = list(check_captions(host, [(tmp_path / "good.png", "blue"), (tmp_path / "broken.png", "red"),
                                      (tmp_path / "good.png", " ")], settings=TINY, seeds=1, steps=1, worst=1,
                               on_progress=lambda *of: progress.append(of)))
    assert [(row.path.name, row.score is None, row.images == ()) for row in rows[:2]] == [
        ("broken.png", True, True), ("good.png", True, True)]
    assert "damaged" in rows[0].problem and "no caption" in rows[1].problem
    assert rows[2].problem == "" and len(rows[2].images) == 1
    assert progress[-1] == (4, 4)


@pytest.mark.parametrize("prediction", ["on", "off"])
def test_the_same_picture_is_given_the_same_score(host, images, prediction):
    settings = parse({"resolution": "64", "min_bucket_reso": 64, "v_parameterization": prediction})
    one, two = (list(check_captions(host, [(images / "0.png", "red cat")], settings=settings, seeds=0)) for _ in "ab")
    assert (one[0].score, one[0].gain) == (two[0].score, two[0].gain)


class Watching:
    """A host that others want the model of, and that counts what becomes of it."""

    def __init__(self, host) -> None:
        self._host, self.handed, self.gone, self.pressed = host, 0, False, False

    def __getattr__(self, name: str):
        return getattr(self._host, name)

    @contextlib.contextmanager
    def lease(self, *, stop):
        with self._host.lease(stop=stop) as leased:
            leased.others_waiting = lambda: True
            leased.yield_model = lambda report: self._yielded(leased)
            yield leased

    def interrupted(self) -> bool:
        return self.pressed

    def _yielded(self, leased):
        self.handed += 1
        return None if self.gone else leased.tensors


def test_others_get_the_model_between_two_pictures_and_the_result_is_the_same(host, images):
    listed = [(images / f"{n}.png", "red cat") for n in range(2)]
    alone = list(check_captions(host, listed, settings=TINY, seeds=1, steps=1))
    shared = Watching(host)
    rows = list(check_captions(shared, listed, settings=TINY, seeds=1, steps=1))
    assert shared.handed == 4
    assert [(row.path, row.score, row.similarity) for row in rows] == [(row.path, row.score, row.similarity) for row in alone]


def test_a_model_that_does_not_come_back_in_time_ends_the_check(host, images):
    shared = Watching(host)
    shared.gone = True
    with pytest.raises(Interrupted):
        list(check_captions(shared, [(images / "0.png", "red")] * 2, settings=TINY, seeds=0))
    with host.lease():
        pass


@pytest.mark.parametrize("way", ["asked", "the host's button"])
def test_a_stop_while_painting_keeps_the_other_scores_and_gives_the_model_back(host, images, way):
    watching, seen = Watching(host), []
    rows = check_captions(watching, [(images / "0.png", "red"), (images / "1.png", "blue")], settings=TINY, seeds=1,
                          steps=2, should_stop=lambda: way == "asked" and bool(seen))
    seen.append(next(rows))
    watching.pressed = way != "asked"
    seen.append(next(rows))
    assert [len(row.images) for row in seen] == [1, 0] and seen[1].score is not None
    with pytest.raises(Interrupted, match="Checking captions was stopped"):
        next(rows)
    with host.lease():
        pass


def test_a_stop_keeps_what_was_measured(host, images):
    rows, done = [], []
    with pytest.raises(Interrupted):
        for row in check_captions(host, [(images / f"{n}.png", "red") for n in range(3)], settings=TINY, seeds=1, steps=1,
                                  on_progress=lambda *of: done.append(of), should_stop=lambda: done[-1:] == [(2, 6)]):
            rows.append(row)
    assert sorted((row.path.name, row.images) for row in rows) == [("0.png", ()), ("1.png", ())]
    assert all(row.score is not None for row in rows)


def test_who_reads_only_the_first_rows_gives_the_model_back(host, images):
    rows = check_captions(host, [(images / "0.png", "red"), (images / "1.png", "blue")], settings=TINY, seeds=1, steps=1)
    next(rows)
    with pytest.raises(HostError), host.lease():
        pass
    rows.close()
    with host.lease():
        pass


def test_nothing_leases_where_there_is_nothing_to_check(tmp_path):
    nothing = demo.StandaloneHost(None, lora_folder=tmp_path / "loras", runs_folder=tmp_path / "runs")
    assert list(check_captions(nothing, [])) == []


def test_checking_changes_neither_the_random_state_nor_the_weights(host, images):
    with host.lease() as leased:
        before = {name: tensor.clone() for name, tensor in leased.tensors.items()}
    state = torch.get_rng_state()
    list(check_captions(host, [(images / "0.png", "red")], settings=TINY, seeds=1, steps=1))
    assert torch.equal(state, torch.get_rng_state()) and torch.is_grad_enabled()
    with host.lease() as leased:
        assert all(torch.equal(tensor, before[name]) for name, tensor in leased.tensors.items())


def test_a_picture_resembles_itself_and_a_shifted_copy_more_than_another_one(emoji):
    with emoji.lease() as leased:
        model = frozen.build(leased.tensors, hints=leased.hints, tokenizers=leased.tokenizers)

    real = real_images.load()

    def features(word: str, *, shift: int = 0) -> torch.Tensor:
        pixels = real.pixels[real_images.TWEMOJI][real.words.index(word)]  # on white
        mean, _ = model.vae.encode(2 * pixels.roll(shift, 2)[None] - 1)
        return subject_features(model, mean, clip_skip=1, dtype=torch.float32)

    tiger = features("tiger face")
    assert resemblance(tiger, tiger) == pytest.approx(1.0, abs=1e-5)
    assert 0.8 < resemblance(tiger, features("tiger face", shift=8)) < 1
    assert resemblance(tiger, features("tiger face", shift=8)) > resemblance(tiger, features("avocado")) + 0.02


def test_the_sheet_has_a_row_for_each_picture_and_draws_any_caption(tmp_path):
    Image.new("RGB", (300, 100), "red").save(tmp_path / "a.png")
    generated = tuple(Image.new("RGB", (64, 64), colour) for colour in ("lime", "blue"))
    row = Checked(tmp_path / "a.png", "赤い帽子と青い空" * 20 + ", ярко", 81.0, 0.02, 0.7, generated)
    two = draw_checks([row, Checked(tmp_path / "gone.png", "x", problem="The file is gone.")])
    one = draw_checks([row])
    assert two.width == one.width and two.height > one.height
    colours = {colour for _, colour in two.getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= colours
    assert draw_checks([row, row], most=1).size == one.size




@pytest.mark.parametrize("size", [(1920, 4), (300, 1), (1, 5000)])
def test_the_sheet_of_checks_shows_images_of_every_shape_and_names_and_captions_with_control_characters(tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "thin.png")
    plain = Checked(tmp_path / "thin.png", "a", 50.0, 0.1, 0.2, (Image.new("RGB", size, "red"),))
    odd = Checked(tmp_path / "two\nlines\x1b.png", "a\0b\u2028c\x1b[31m\n", 50.0, 0.1, 0.2, plain.images)
    assert draw_checks([plain, odd]).width == draw_checks([plain]).width
    assert any(red > green + 50 for _, (red, green, _) in draw_checks([plain]).getcolors(1 << 16))
