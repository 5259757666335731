"""Some images are held out of training: which, by whose wish, and what the plan says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lib_lora_train.dataset import held_out
from lib_lora_train.dataset.held_out import Choices, Split, select, split, write_choices
from lib_lora_train.run.planning import RunPlan, plan_dataset
from lib_lora_train.settings import parse
from tests.scanned_folder import scan


def fill(folder: Path, number: int, *, size: tuple[int, int] = (64, 48)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        Image.new("RGB", size, (index, 0, 0)).save(folder / f"{index:02}.png")
    return folder


@pytest.fixture(scope="module")
def twenty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twenty images without choices; a test that makes some takes them back."""
    return fill(tmp_path_factory.mktemp("held") / "set", 20)


def names(found: Split) -> set[str]:
    return {image.example.path.name for image in found.held_out}


def divided(folder: Path, share: float = 0.1, seed: int = 42) -> Split:
    return split(scan(folder, max_train_epochs=1), share=share, seed=seed)


def planned(folder: Path, **values: object) -> RunPlan:
    return plan_dataset(parse({"train_data_dir": str(folder), **values}), family="")


@pytest.mark.parametrize("number, share, expected", [
    (11, 0.5, 0), (12, 0.1, 2), (12, 0.5, 2), (14, 0.5, 4), (20, 0.1, 2), (25, 0.1, 3), (40, 0.1, 4), (40, 0.5, 20),
    (40, 0, 0)])
def test_a_share_but_at_least_two_and_ten_stay_to_be_trained(number: int, share: float, expected: int) -> None:
    assert len(select([f"{index}.png" for index in range(number)], share=share, seed=1)) == expected


def test_the_draw_is_the_seeds_and_an_image_more_moves_one_at_most() -> None:
    images = [f"{index}.png" for index in range(40)]
    first = select(images, share=0.1, seed=1)
    assert first == select(images[::-1], share=0.1, seed=1) != select(images, share=0.1, seed=2)
    for index in range(40, 60):
        more = select([*images, f"{index}.png"], share=0.1, seed=1)
        assert len(more) == 4 and len(first - more) <= 1
    # Each image is as likely as any other: 2 of 20 by 400 seeds, 40 times each, five standard deviations of 6.
    drawn = [name for seed in range(400) for name in select(images[:20], share=0.1, seed=seed)]
    assert all(10 <= drawn.count(name) <= 70 for name in images[:20])


def test_training_and_held_out_images_are_the_whole_set_and_share_none(twenty: Path) -> None:
    found = divided(twenty)
    trained = {example.path.name for example in found.training.examples}
    assert len(names(found)) == 2 and not trained & names(found) and len(trained | names(found)) == 20
    assert all(image.crop is None and image.box == (0, 0, 64, 48) and not image.mirrored for image in found.held_out)
    assert not found.derived and "2 of 20" in found.notes[0]


def test_a_choice_goes_before_the_draw(twenty: Path) -> None:
    drawn = names(divided(twenty))
    other = next(f"{index:02}.png" for index in range(20) if f"{index:02}.png" not in drawn)
    one = min(drawn)
    try:
        write_choices(twenty, Choices(frozenset({other, "gone.png"}), frozenset({one})))
        found = divided(twenty)
        assert names(found) == drawn - {one} | {other}
        assert found.training.problems == divided(twenty, share=0).training.problems[:-1], "nothing is said of what is gone"
        assert other in divided(twenty, share=0).training.problems[-1].text and not divided(twenty, share=0).held_out
        write_choices(twenty, Choices(frozenset(), frozenset(drawn)))
        found = divided(twenty)
        assert not found.held_out and "training pictures only" in found.training.problems[-1].text
        write_choices(twenty, Choices(frozenset(f"{index:02}.png" for index in range(20))))
        found = divided(twenty)
        assert found.training.images == 10 and "10 pictures" in found.training.problems[-1].text
    finally:
        write_choices(twenty, Choices())
    assert not (twenty / held_out.CHOICES).exists() and names(divided(twenty)) == drawn


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"held_out": "a.png"}', b'{"trained": [1]}', b"[" * 100_000, b"\xff\xfe"])
def test_a_damaged_file_of_choices_is_a_sentence(twenty: Path, content: bytes) -> None:
    drawn = names(divided(twenty))
    try:
        (twenty / held_out.CHOICES).write_bytes(content)
        found = divided(twenty)
    finally:
        (twenty / held_out.CHOICES).unlink()
    assert names(found) == drawn and held_out.CHOICES in found.training.problems[-1].text


def test_choices_that_lead_elsewhere_are_not_followed(twenty: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"")
    try:
        (twenty / held_out.CHOICES).write_text(json.dumps({"held_out": [str(secret), "../../secret.png", "\0", "a" * 5000]}))
        assert not [p for p in divided(twenty).training.problems if "secret" in p.text]
        (twenty / "note.txt").write_text("")
        (twenty / held_out.CHOICES).write_text(json.dumps({"held_out": ["note.txt"]}))
        assert "note.txt" in divided(twenty).training.problems[-1].text
        may_not = split(scan(twenty, max_train_epochs=1), share=0.1, seed=42, may_read=lambda path: False)
        assert not [p for p in may_not.training.problems if "held out" in p.text or held_out.CHOICES in p.text]
    finally:
        (twenty / held_out.CHOICES).unlink()
        (twenty / "note.txt").unlink()


def test_of_few_images_mirrored_crops_are_measured_and_all_are_trained(tmp_path: Path) -> None:
    plan = planned(fill(tmp_path / "few", 11))
    assert plan.dataset.images == 11 and plan.held_out_derived and len(plan.held_out) == 4
    for image in plan.held_out:
        left, top, right, bottom = image.box
        assert image.mirrored and 0 <= left < right <= 64 and 0 <= top < bottom <= 48
        assert (right - left) * (bottom - top) == pytest.approx(0.85 ** 2 * 64 * 48, rel=0.05)
    assert len({image.crop for image in plan.held_out}) == 4
    assert "crops of 4" in plan.notes[0] and not [text for text in plan.warnings if "held" in text or "crops" in text]
    assert len(planned(fill(tmp_path / "one", 1)).held_out) == 1
    assert not planned(tmp_path / "few", validation_split=0).held_out


def test_repeats_are_counted_for_the_images_that_are_trained(twenty: Path) -> None:
    plan = planned(twenty, max_train_epochs=1)
    whole = planned(twenty, validation_split=0, max_train_epochs=1)
    # At least 100 visits an image: 18 and 20 of them.
    assert (plan.schedule.steps, whole.schedule.steps) == (1800, 2000)
    assert len(plan.placements) == len(plan.dataset.examples) == 18
    assert "2 of 20" in plan.summary and "kept" not in whole.summary


def test_folders_of_kohya_keep_half_and_regularisation_images_stay(tmp_path: Path) -> None:
    fill(tmp_path / "set" / "2_cat", 14)
    fill(tmp_path / "set" / "20_hat", 1)
    fill(tmp_path / "reg", 15)
    for seed in range(20):
        plan = planned(tmp_path / "set", reg_data_dir=str(tmp_path / "reg"), seed=seed, validation_split=0.5)
        assert len(plan.held_out) == 5 and {image.example.folder for image in plan.held_out} == {"2_cat"}
        visits = [sum(e.repeats for e in plan.dataset.examples if e.is_regularisation == which) for which in (True, False)]
        assert visits[0] == visits[1] == 2 * 9 + 20
    write_choices(tmp_path / "set", Choices(frozenset({"20_hat/00.png"})))
    assert "20_hat" in {image.example.folder for image in planned(tmp_path / "set").held_out}


def test_an_image_that_fits_no_bucket_is_neither_trained_nor_held_out(tmp_path: Path) -> None:
    folder = fill(tmp_path / "set", 12)
    Image.new("RGB", (400, 4)).save(folder / "00.png")
    plan = planned(folder, bucket_no_upscale=True, bucket_reso_steps=8)
    assert plan.held_out_derived and plan.dataset.images == 11
