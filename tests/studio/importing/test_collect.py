"""Images brought into a dataset: upright, named, once; originals untouched; what is left out is told."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lib_lora_train.dataset.buckets import Buckets
from lib_lora_train.dataset.examples import assign_buckets
from lib_lora_train.dataset.images import read_image
from lib_lora_train.dataset.progress import Watch
from lib_lora_train.dataset.report import examine
from lib_lora_train.distributed import SINGLE_PROCESS
from lib_lora_train.errors import Interrupted, LoraTrainError
from lib_lora_train.inputs.latent_encoder import check_images
from lib_lora_train.settings import parse
from lib_lora_train.storage import atomic
from lib_lora_train.studio.importing.collect import Upload, collect
from lib_lora_train.studio.importing.owned import OwnedDataset
from tests.damaged_pictures import damaged_pngs
from tests.mixed_pictures import ADDED, COUNT, mixed_pictures
from tests.scanned_folder import scan

ORIENTATION = 0x0112


def noise(seed: int, size: tuple[int, int] = (40, 30), channels: int = 3) -> Image.Image:
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


@pytest.fixture
def dataset(tmp_path: Path) -> OwnedDataset:
    return OwnedDataset.create(tmp_path / "datasets", "d", concept="zzk")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    return {path.relative_to(folder).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file()}


def test_thirty_mixed_pictures_come_in_and_the_originals_stay_as_they_were(tmp_path: Path, dataset: OwnedDataset):
    heap = mixed_pictures(tmp_path / "heap", scale=0.25)
    before = contents(heap)
    seen = []
    collected = collect(dataset, [heap], on_progress=lambda done, total: seen.append((done, total)))
    assert contents(heap) == before
    assert len(collected.added) == ADDED == len(dataset.images)
    told = dict(collected.skipped)
    assert set(told) == {"broken.png", "copy-of-the-first.png"}
    assert "damaged" in told["broken.png"] and "same file as" in told["copy-of-the-first.png"]
    assert seen == [(i + 1, COUNT) for i in range(COUNT)]
    assert len(list(dataset.masks_folder.iterdir())) == 3
    by_source = {note["source"]: dataset.images_folder / name for name, note in dataset.notes().items()}
    assert len(by_source) == ADDED
    for original, (_, _) in before.items():
        if str(heap / original) in by_source:
            taken = by_source[str(heap / original)]
            assert np.array_equal(read_image(heap / original), read_image(taken)), original
            with Image.open(taken) as plain:  # as a program sees it that knows nothing of EXIF
                assert plain.size == read_image(heap / original).size and "A" not in plain.mode
    assert len(scan(dataset.folder, max_train_epochs=1).examples) == ADDED
    again = collect(dataset, [heap])
    assert again.added == () and len(dataset.images) == ADDED  # nothing comes twice


def test_check_import_and_training_use_the_same_images_and_give_the_same_reason(tmp_path: Path, dataset: OwnedDataset,
                                                                                 source: Path):
    damaged_pngs(source)
    noise(1).save(source / "photo.jpg")
    (source / "cut.jpg").write_bytes((source / "photo.jpg").read_bytes()[:-100])
    (source / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    noise(2, channels=4).convert("RGBA").point(lambda level: 0).save(source / "clear.png")
    checked = {image.path.name: image.why for image in examine(source, settings=parse({"resolution": 64})).images}
    imported = collect(dataset, [source])
    buckets = Buckets((64, 64), enable_bucket=True, min_bucket_reso=64, max_bucket_reso=128, bucket_reso_steps=64,
                      bucket_no_upscale=False)
    scanned, placements = assign_buckets(scan(source, max_train_epochs=1), lambda _: buckets)
    watch = Watch(1, doing="", on_progress=None, should_stop=None)
    lost = check_images(scanned.examples, placements, watch=watch, group=SINGLE_PROCESS, threads=0)
    skipped = {problem.path.name: problem.text for problem in (*scanned.problems, *lost.values()) if problem.skipped}
    reasons = {name: why for name, why in checked.items() if why}
    assert set(reasons) == {"5.png", "cut.jpg", "phone.jpg", "clear.png"} == set(skipped)
    assert {name: f"{why[0].lower()}{why[1:]}" for name, why in imported.skipped} == {n: f"{w}." for n, w in reasons.items()}
    assert all(reasons[name].split(";")[0] in text for name, text in skipped.items())
    assert len(imported.added) == len(checked) - 4 == 7


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif", "a.jpg"])
def test_of_several_frames_or_pages_the_first_is_used_and_every_command_says_so(dataset: OwnedDataset, source: Path, name: str):
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
    frames[0].save(source / name, "MPO" if name == "a.jpg" else None, save_all=True, append_images=frames[1:])
    noise(1).save(source / "still.png")
    (advice,) = [text for text in examine(source, settings=parse({"resolution": 64})).advice if "frames" in text]
    (problem,) = [problem.text for problem in scan(source, max_train_epochs=1).problems if "frames" in problem.text]
    imported = collect(dataset, [source])
    assert name in advice and name in problem and "still.png" not in advice + problem
    assert imported.notes == ("1 picture had several frames or pages, of which the first was taken.",)
    assert np.abs(np.array(read_image(imported.added[0])).mean((0, 1)) - (255, 0, 0)).max() < 3


def test_what_every_program_sees_alike_is_copied_byte_for_byte(dataset: OwnedDataset, source: Path):
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a cat\nSteps: 20")
    noise(1).save(source / "a.png", pnginfo=text)
    noise(2).save(source / "b.JPG", quality=90)
    noise(3).save(source / "c.webp")
    noise(4, channels=1).save(source / "d.bmp")
    noise(5).convert("P").save(source / "e.png")
    collected = collect(dataset, [source])
    assert [path.name for path in collected.added] == ["a.png", "b.jpg", "c.webp", "d.bmp", "e.png"]
    for path, original in zip(collected.added, sorted(source.iterdir(), key=lambda p: p.name.casefold()), strict=True):
        assert path.read_bytes() == original.read_bytes()


@pytest.mark.parametrize(("name", "image"), [
    ("a.tif", noise(1)), ("a.gif", noise(1).convert("P")), ("a.jpg", noise(1).convert("CMYK")),
    ("a.png", Image.fromarray((np.arange(1200).reshape(30, 40) * 50).astype(np.uint16)))])
def test_what_other_tools_would_see_otherwise_becomes_a_png(dataset: OwnedDataset, source: Path, name: str, image: Image.Image):
    image.save(source / name)
    (path,) = collect(dataset, [source]).added
    assert path.name == "a.png"
    with Image.open(path) as plain:
        assert plain.mode == "RGB" and np.array_equal(plain, read_image(source / name))


def test_an_image_called_otherwise_than_it_is_gets_its_own_ending(dataset: OwnedDataset, source: Path):
    noise(1).save(source / "a.jpg", format="PNG")
    noise(2).save(source / "b.jfif", format="JPEG")
    assert [path.name for path in collect(dataset, [source]).added] == ["a.png", "b.jpg"]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_lying_photograph_stands_upright_for_everybody(dataset: OwnedDataset, source: Path, orientation: int):
    from PIL import ImageOps

    noise(orientation).save(source / "a.jpg", exif=with_orientation(orientation), quality=90)
    (path,) = collect(dataset, [source]).added
    with Image.open(path) as plain, Image.open(source / "a.jpg") as lying:
        assert plain.getexif().get(ORIENTATION, 1) == 1
        assert np.array_equal(plain, ImageOps.exif_transpose(lying))


def test_the_prompt_inside_an_image_survives_its_turning(dataset: OwnedDataset, source: Path):
    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", "eine Katze, 猫\nSteps: 20")
    noise(1).save(source / "a.png", pnginfo=text, exif=with_orientation(6))
    (path,) = collect(dataset, [source]).added
    with Image.open(path) as plain:
        assert plain.size == (30, 40) and plain.info["parameters"] == "eine Katze, 猫\nSteps: 20"


def test_transparency_becomes_white_and_a_mask(dataset: OwnedDataset, source: Path):
    image = noise(1).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((40, 30)))
    image.save(source / "a.png", exif=with_orientation(6))
    collected = collect(dataset, [source])
    (path,) = collected.added
    assert np.array_equal(read_image(path), read_image(source / "a.png"))
    with Image.open(path) as plain, Image.open(dataset.mask_path(path.name)) as mask:
        assert plain.mode == "RGB" and mask.mode == "L" and mask.size == plain.size == (30, 40)
        assert np.array_equal(mask, image.getchannel("A").transpose(Image.Transpose.ROTATE_270))
    assert "1 picture had transparent parts" in collected.notes[0]


def test_transparency_can_be_forgotten_and_opaque_images_get_no_mask(dataset: OwnedDataset, source: Path):
    image = noise(1).convert("RGBA")
    image.save(source / "opaque.png")
    image.putalpha(100)
    image.save(source / "half.png")
    image.putalpha(0)
    image.save(source / "nothing.png")
    collected = collect(dataset, [source], transparent="white")
    assert [path.name for path in collected.added] == ["half.png", "opaque.png"]
    assert collected.skipped == (("nothing.png", "It is transparent everywhere."),)
    assert not dataset.masks_folder.exists()


def test_captions_come_along_with_all_their_lines_as_utf8(dataset: OwnedDataset, source: Path):
    for seed, name in enumerate(("a", "b", "c", "d", "e")):
        noise(seed).save(source / f"{name}.png")
    (source / "a.txt").write_bytes("\ufeff\n  猫, tag \nsecond line\n".encode())
    (source / "b.caption").write_text("from caption", encoding="utf-8")
    (source / "c.txt").write_bytes(b"caf\x81 \xff")
    (source / "d.TXT").write_text("", encoding="utf-8")
    (source / "e.txt").write_bytes(b"x" * (2 << 20))
    collected = collect(dataset, [source])
    assert len(collected.added) == 5
    assert {path.name: path.read_bytes() for path in dataset.images_folder.glob("*.txt")} == {
        "a.txt": "猫, tag\nsecond line".encode(), "b.txt": b"from caption"}
    assert sorted(name for name, _ in collected.skipped) == ["caption of c.png", "caption of e.png"]
    assert any("several lines" in note for note in collected.notes)


def test_images_named_one_by_one_bring_what_folders_would(dataset: OwnedDataset, source: Path):
    for seed, name in enumerate("abc"):
        noise(seed).save(source / f"{name}.png")
    (source / "A.TXT").write_text("hat", encoding="utf-8")
    (source / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "coat"}', encoding="utf-8")
    (source / "c.txt").write_text("of another", encoding="utf-8")
    collected = collect(dataset, [source / "a.png", source / "b.png"])
    assert {path.name: path.read_text() for path in dataset.images_folder.glob("*.txt")} == {"a.txt": "hat", "b.txt": "coat"}
    assert not collected.skipped and collected.captions == "2 pictures, 2 with captions."


def test_captions_in_json_and_other_encodings_come_along_and_what_fits_no_image_is_said(dataset: OwnedDataset, source: Path):
    for seed, name in enumerate(("a", "b", "c")):
        noise(seed).save(source / f"{name}.png")
    (source / "a.txt").write_bytes("zzk, 红色帽子".encode("gbk"))
    (source / "b.png.json").write_text('{"tags": ["zzk", "hat"]}', encoding="utf-8")
    (source / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "zzk, coat"}', encoding="utf-8")
    (source / "img_1.txt").write_text("a lost caption", encoding="utf-8")
    (source / "old.json").write_text('{"gone": {"caption": "zzk"}}', encoding="utf-8")
    (source / "drawing.psd").write_bytes(b"8BPS")
    packed = shutil.make_archive(str(source.parent / "packed"), "zip", source)
    for where in (source, Path(packed)):
        collected = collect(dataset, [where])
        assert {path.name: path.read_text(encoding="utf-8") for path in dataset.images_folder.glob("*.txt")} == {
            "a.txt": "zzk, 红色帽子", "b.txt": "zzk, hat", "c.txt": "zzk, coat"}
        assert collected.captions == "3 pictures, 3 with captions; 2 text files fit no picture (old.json, " + (
            "img_1.txt); 1 file is of a kind that is not read (drawing.psd)." if where == source else
            "packed.zip/img_1.txt); 1 file is of a kind that is not read (packed.zip/drawing.psd).")
        assert any("GBK" in note and "(a.txt)" in note for note in collected.notes)
        for path in (*dataset.images, *dataset.images_folder.glob("*.txt")):
            path.unlink()


def test_captions_that_come_after_their_images_are_taken_where_there_is_none(dataset: OwnedDataset, source: Path):
    for seed, name in enumerate(("a", "b")):
        noise(seed).save(source / f"{name}.png")
    (source / "b.txt").write_text("first", encoding="utf-8")
    collect(dataset, [source])
    (source / "a.txt").write_text("later", encoding="utf-8")
    (source / "b.txt").write_text("changed", encoding="utf-8")
    assert "got this one's" in dict(collect(dataset, [source], dry_run=True).skipped)["a.png"]
    assert not (dataset.images_folder / "a.txt").exists()
    said = dict(collect(dataset, [source]).skipped)
    assert {path.name: path.read_text() for path in dataset.images_folder.glob("*.txt")} == {"a.txt": "later", "b.txt": "first"}
    assert "got this one's" in said["a.png"] and "keeps its own caption" in said["b.png"]


def test_of_two_copies_of_one_image_the_caption_is_kept_whichever_has_it(dataset: OwnedDataset, source: Path):
    for name in ("a (1)", "a"):
        noise(1).save(source / f"{name}.png")
    (source / "a.txt").write_text("kept", encoding="utf-8")
    collected = collect(dataset, [source])
    assert [path.read_text() for path in dataset.images_folder.glob("*.txt")] == ["kept"] and len(dataset.images) == 1
    assert collected.captions == "1 picture, 1 with a caption."


def test_folders_are_read_with_those_below_them_and_their_masks(dataset: OwnedDataset, tmp_path: Path):
    kohya = tmp_path / "kohya"
    for seed, place in enumerate(("10_a/1.png", "5_b/2.png", "masks/1.png", ".hidden/x.png", "10_a/deep/y.png", "top.png")):
        (kohya / place).parent.mkdir(parents=True, exist_ok=True)
        noise(seed).save(kohya / place)
    (kohya / "5_b" / "2.txt").write_text("b two", encoding="utf-8")
    collected = collect(dataset, [kohya])
    assert [path.name for path in collected.added] == ["top.png", "1.png", "y.png", "2.png"]
    assert (dataset.images_folder / "2.txt").read_text("utf-8") == "b two"
    with Image.open(dataset.mask_path("1.png")) as mask:
        assert np.array_equal(mask, read_image(kohya / "masks" / "1.png").convert("L"))


def test_a_folder_and_an_archive_of_it_give_the_same_dataset(tmp_path: Path, dataset: OwnedDataset):
    """Names of folders as Synology, QNAP, macOS, Windows and kohya's page make them."""
    taken = ("top.png", "outfit/one.png", "outfit/night/more/three.png", "outfit/two.png")
    left = ("reg/1_dog/dog.png", "outfit/regularization_images/small.png")
    system = ("@eaDir/top.png/SYNOPHOTO_THUMB_M.jpg", "outfit/@__thumb/s100one.png", ".thumbnails/t.png", "__MACOSX/._top.png",
              "#recycle/r.png", "$RECYCLE.BIN/$R1.png", "outfit/._one.png")
    top, other = tmp_path / "things", OwnedDataset.create(tmp_path / "datasets", "other")
    for seed, place in enumerate((*taken, *left, *system)):
        (top / place).parent.mkdir(parents=True, exist_ok=True)
        noise(seed).save(top / place)
        (top / place).with_suffix(".txt").write_text(place, encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "things.zip", "w") as packed:
        for path in top.rglob("*"):
            packed.write(path, path.relative_to(top))
    for into, source in ((dataset, top), (other, tmp_path / "things.zip")):
        collected = collect(into, [source])
        assert {path.name: path.with_suffix(".txt").read_text("utf-8") for path in collected.added} == {
            Path(place).name: place for place in taken}
        told = {name.removeprefix("things.zip/"): why for name, why in collected.skipped}
        assert set(told) == {"reg", "outfit/regularization_images"}
        assert all("1 picture" in why and "regularisation" in why for why in told.values())
    assert [path.name for path in collect(other, [top / "reg"]).added] == ["dog.png"]  # chosen itself


def test_links_are_followed_once_and_those_that_lead_nowhere_are_named(dataset: OwnedDataset, source: Path, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    noise(1).save(source / "a.png")
    noise(2).save(tmp_path / "elsewhere" / "b.png")
    try:
        os.symlink(tmp_path / "elsewhere", source / "linked")
        os.symlink(source, source / "circle")
        os.symlink(source / "itself.png", source / "itself.png")
        os.symlink(source / "gone.png", source / "dead.png")
    except OSError:
        pytest.skip("no links here")
    collected = collect(dataset, [source])
    assert [path.name for path in collected.added] == ["a.png", "b.png"]
    assert dict(collected.skipped) == dict.fromkeys(("dead.png", "itself.png"), "It is a link that leads nowhere.")
    for texts in ([problem.text for problem in scan(source, max_train_epochs=1).problems],
                  examine(source, settings=parse({})).advice):
        (dead,) = [text for text in texts if "nowhere" in text]
        (unused,) = [text for text in texts if "linked" in text]
        assert "dead.png" in dead and "itself.png" in dead and "1 picture" in unused

    def may_read(path: Path) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(source))

    again = OwnedDataset.create(tmp_path / "datasets", "again")
    collected = collect(again, [source], may_read=may_read)
    assert [path.name for path in collected.added] == ["a.png"] and "linked" in dict(collected.skipped)
    assert not [p for p in scan(source, max_train_epochs=1, may_read=may_read).problems if "in the folder" in p.text]
def test_a_mask_belongs_to_the_picture_of_its_own_folder_and_to_no_other(dataset: OwnedDataset, tmp_path: Path):
    for seed, place in enumerate(("one/1.png", "one/masks/1.png", "two/1.png", "two/3.png", "one/3.png", "two/masks/4.png",
                                  "one/4.png", "masks/3.png", "mask/two/3.png")):
        (tmp_path / "m" / place).parent.mkdir(parents=True, exist_ok=True)
        noise(seed).save(tmp_path / "m" / place)
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as packed:
        for path in sorted((tmp_path / "m").rglob("*.png")):
            packed.write(path, path.relative_to(tmp_path / "m").as_posix())
    collected = collect(dataset, [tmp_path / "m.zip"])
    sources = {path.name: dataset.notes()[path.name]["source"].removeprefix("m.zip/") for path in collected.added}
    masks = {sources[path.name]: read_image(dataset.mask_path(path.name)).convert("L") for path in collected.added
             if dataset.mask_path(path.name).is_file()}
    assert len(sources) == 5 and set(masks) == {"one/1.png", "two/3.png"}
    assert np.array_equal(masks["one/1.png"], read_image(tmp_path / "m/one/masks/1.png").convert("L"))
    assert np.array_equal(masks["two/3.png"], read_image(tmp_path / "m/mask/two/3.png").convert("L"))
    assert {name for name, _ in collected.skipped} == {"m.zip/two/masks/4.png", "m.zip/masks/3.png"}
    assert any("2 pictures came with a mask" in note and "masked_loss" in note for note in collected.notes)


def test_masks_and_conditioning_pictures_of_other_trainers_are_not_imported_as_pictures(dataset: OwnedDataset, source: Path):
    learnt = Image.linear_gradient("L").resize((40, 30))
    for seed, name in enumerate(("a.png", "b.jpg", "c.png", "who-mask.png")):
        noise(seed).save(source / name)
    for name in ("a-masklabel.png", "b-mask.png", "C_Mask.png"):
        learnt.save(source / name)
    noise(9).save(source / "a-condlabel.png")
    collected = collect(dataset, [source])
    # An image may be called so by itself.
    assert [path.name for path in collected.added] == ["a.png", "b.jpg", "c.png", "who-mask.png"]
    for name in ("a.png", "b.jpg", "c.png"):
        assert np.array_equal(read_image(dataset.mask_path(name)).convert("L"), learnt)
    assert [name for name, _ in collected.skipped] == ["a-condlabel.png"]


def test_what_a_kohya_folder_is_called_is_the_caption_of_its_pictures_without_one(dataset: OwnedDataset, tmp_path: Path):
    for seed, place in enumerate((
            "20_sks dog/a.png", "20_sks dog/b.png", "5_sks hat/c.png", "20240101_holiday/d.png", "3_/e.png")):
        (tmp_path / "kohya" / place).parent.mkdir(parents=True, exist_ok=True)
        noise(seed).save(tmp_path / "kohya" / place)
    (tmp_path / "kohya/20_sks dog/b.txt").write_text("of its own", encoding="utf-8")
    before = {e.path.name: e.caption for e in scan(tmp_path / "kohya", max_train_epochs=1).examples}
    collected = collect(dataset, [tmp_path / "kohya"])
    captions = {path.stem: path.read_text("utf-8") for path in dataset.images_folder.glob("*.txt")}
    assert captions == {"a": "sks dog", "b": "of its own", "c": "sks hat"}
    assert all(captions.get(Path(name).stem, "") == caption for name, caption in before.items())  # as training had it
    assert sum("the words of the folder" in note for note in collected.notes) == 2
    hat = tmp_path / "kohya" / "5_sks hat"
    for name, given in (("alone", hat), ("sent", Upload("kohya/5_sks hat/c.png", hat / "c.png"))):
        alone = OwnedDataset.create(tmp_path / "datasets", name)
        collect(alone, [given])
        assert [path.read_text("utf-8") for path in alone.images_folder.glob("*.txt")] == ["sks hat"]


def test_regularisation_pictures_and_samples_of_a_kohya_project_are_not_learnt_as_the_subject(
        dataset: OwnedDataset, tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as packed:
        for seed, place in enumerate(("p/img/10_zorbi/a.png", "p/reg/1_toy/r.png", "p/reg/1_toy/s.png",
                                      "p/model/sample/1.png", "friends/reg/b.png")):
            noise(seed).save(tmp_path / "x.png")
            packed.write(tmp_path / "x.png", place)
    collected = collect(dataset, [tmp_path / "p.zip"])
    assert [path.name for path in collected.added] == ["a.png", "b.png"]  # Reg may be a friend's name
    told = dict(collected.skipped)
    assert set(told) == {"p.zip/p/reg", "p.zip/p/model"}
    assert "2 pictures" in told["p.zip/p/reg"] and "reg_data_dir" in told["p.zip/p/reg"]


def test_a_dataset_of_ours_can_be_brought_into_another(dataset: OwnedDataset, source: Path, tmp_path: Path):
    image = noise(1).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((40, 30)))
    image.save(source / "a.png")
    (source / "a.txt").write_text("tag", encoding="utf-8")
    collect(dataset, [source])
    other = OwnedDataset.create(tmp_path / "datasets", "other")
    assert len(collect(other, [dataset.folder]).added) == 1
    assert other.mask_path("a.png").read_bytes() == dataset.mask_path("a.png").read_bytes()
    assert (other.images_folder / "a.txt").read_text("utf-8") == "tag"


def test_files_come_with_what_lies_beside_them_and_uploads_with_each_other(dataset: OwnedDataset, source: Path, tmp_path: Path):
    for seed, name in enumerate(("a.png", "b.png")):
        noise(seed).save(source / name)
    (source / "a.txt").write_text("beside", encoding="utf-8")
    sent = tmp_path / "sent"
    sent.mkdir()
    noise(7).save(sent / "0001", format="PNG")
    (sent / "0002").write_text("sent", encoding="utf-8")
    (sent / "0003").write_text("x", encoding="utf-8")
    uploads = [Upload("../../鳥.PNG", sent / "0001"), Upload("../../鳥.txt", sent / "0002"), Upload("run.exe", sent / "0003"),
               Upload("lone.txt", sent / "0003")]
    collected = collect(dataset, [source / "a.png", *uploads, source / "gone.png"])
    assert [path.name for path in collected.added] == ["a.png", "鳥.png"]
    assert [(dataset.images_folder / name).read_text("utf-8") for name in ("a.txt", "鳥.txt")] == ["beside", "sent"]
    assert dict(collected.skipped) == {
        "run.exe": "Its name does not end like a picture's.", "lone.txt": "There is no picture of this name with it.",
        "gone.png": "It does not exist."}


def test_allowed_paths_are_checked_for_every_file(dataset: OwnedDataset, source: Path, tmp_path: Path):
    noise(1).save(source / "a.png")
    (tmp_path / "secret").mkdir()
    noise(2).save(tmp_path / "secret" / "b.png")
    try:
        os.symlink(tmp_path / "secret" / "b.png", source / "b.png")
        os.symlink(tmp_path / "secret", source / "below")
    except OSError:
        pytest.skip("no links here")

    def may_read(path: Path) -> bool:
        return source.resolve() in (path.resolve(), *path.resolve().parents)

    collected = collect(dataset, [source, tmp_path / "secret"], may_read=may_read)
    assert [path.name for path in collected.added] == ["a.png"]
    assert sorted(name for name, _ in collected.skipped) == ["b.png", "below", "secret"]


def test_a_new_image_inherits_nothing_from_one_that_was_removed(dataset: OwnedDataset, source: Path):
    noise(1).save(source / "a.png")
    (source / "a.txt").write_text("old", encoding="utf-8")
    collect(dataset, [source])
    dataset.remove(["a.png"])
    (source / "a.txt").unlink()
    (path,) = collect(dataset, [source]).added  # what was removed may be brought in again
    assert path.name == "a_2.png" and not path.with_suffix(".txt").exists()
    assert dataset.restore(["a.png"]) == ("a.png",)


def test_stopping_keeps_what_was_brought_in(dataset: OwnedDataset, source: Path):
    for seed in range(5):
        noise(seed).save(source / f"{seed}.png")
    done = []
    with pytest.raises(Interrupted, match="imported"):
        collect(dataset, [source], on_progress=lambda n, _: done.append(n), should_stop=lambda: len(done) == 2)
    assert len(dataset.images) == 2 == len(dataset.notes())
    assert len(collect(dataset, [source]).added) == 3


def test_a_full_disk_is_a_sentence_and_leaves_whole_images(dataset: OwnedDataset, source: Path,
                                                             monkeypatch: pytest.MonkeyPatch):
    for seed in range(3):
        noise(seed).save(source / f"{seed}.png")
    whole, fsync = [], os.fsync

    def full(descriptor: int) -> None:
        whole.append(descriptor)
        if len(whole) == 2:  # in the second image
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(LoraTrainError, match="No space left"):
        collect(dataset, [source])
    monkeypatch.undo()
    assert all(read_image(path).size == (40, 30) for path in dataset.images)
    assert not list(dataset.folder.rglob("*.part"))
    collect(dataset, [source])
    assert len(dataset.images) == 3


def test_what_a_killed_import_left_behind_is_cleared_away(dataset: OwnedDataset, source: Path):
    noise(1).save(source / "a.png")
    for name in (".b.1.part", f".c.{os.getpid()}.part", "mine.part"):  # another process's, this one's, nobody's of ours
        (dataset.images_folder / name).write_bytes(b"x")
    collect(dataset, [source])
    assert sorted(os.listdir(dataset.images_folder)) == sorted([f".c.{os.getpid()}.part", "a.png", "mine.part"])


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path: Path, dataset: OwnedDataset):
    heap = mixed_pictures(tmp_path / "heap", scale=0.1)
    before = contents(dataset.folder)
    dry = collect(dataset, [heap], dry_run=True)
    assert contents(dataset.folder) == before
    assert dry == collect(dataset, [heap])


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="their names are always text")
def test_names_that_are_no_text_are_taken_and_told(dataset: OwnedDataset, source: Path):
    noise(1).save(source / "good.png")
    (source / os.fsdecode(b"\xff\xfebad.png")).write_bytes((source / "good.png").read_bytes()[:50])
    (source / os.fsdecode(b"\xffother.png")).write_bytes(b"")
    noise(2).save(source / os.fsdecode(b"\xffthird.png"))
    collected = collect(dataset, [source])
    assert sorted(path.name for path in collected.added) == ["_third.png", "good.png"]
    assert all(name.encode() and why.encode() for name, why in collected.skipped) and len(collected.skipped) == 2
    assert (dataset.folder / "dataset.json").read_text("utf-8")


@pytest.mark.skipif(not hasattr(os, "mkfifo") or sys.platform == "win32", reason="no such files there")
def test_what_is_no_plain_file_is_not_waited_for(dataset: OwnedDataset, source: Path):
    os.mkfifo(source / "endless.png")
    noise(1).save(source / "a.png")
    os.mkfifo(source / "a.txt")
    assert [path.name for path in collect(dataset, [source]).added] == ["a.png"]
    assert collect(dataset, [source / "endless.png"]).skipped == (("endless.png", "It is not a file."),)
