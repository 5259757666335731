"""What `fuzz_readers` feeds to the studio: zip files with anything in them, and the files of a dataset folder."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import tempfile
import zipfile
from pathlib import Path
from unittest import mock

from fuzz_inputs import mutated, text

from lib_lora_train.errors import DatasetError
from lib_lora_train.studio.captions.store import CaptionStore
from lib_lora_train.studio.importing import archive as archives
from lib_lora_train.studio.importing.collect import collect
from lib_lora_train.studio.importing.owned import OwnedDataset

NAMES = ["a.png", "b.jpg", "sub/c.webp", "10_dog/d.png", "a.txt", "masks/a.png", "../e.png", "/f.png", "C:\\g.png", "A.PNG"]
_LIMITS = {"MOST_ENTRIES": 60, "MOST_ENTRY_BYTES": 4 << 20, "MOST_BYTES": 8 << 20, "ALWAYS_BYTES": 8 << 20}
_CAPTION = b"zzk, blue"


def zip_file(rng: random.Random, images: list[bytes]) -> bytes:
    """A zip of up to six entries, sound or damaged inside, with names from anywhere; every second one is damaged as a whole."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as made:
        for _ in range(rng.randrange(7)):
            name = rng.choice(NAMES) if rng.random() < 0.6 else text(rng, NAMES)
            data = rng.choice(images) if rng.random() < 0.5 else mutated(rng, images)
            # A name that zipfile would refuse to write never reaches a reader; damage to the whole brings such names.
            name = name.encode("utf-8", "replace").decode("utf-8").replace("\0", "")[:300] or "x.png"
            # Of a fixed date, or the clock would be in the input.
            made.writestr(zipfile.ZipInfo(name), data, compress_type=made.compression)
    whole = held.getvalue()
    return whole if rng.random() < 0.5 else mutated(rng, [whole])


def read_zip(data: bytes, root: Path) -> object:
    """Import the zip. Raises DatasetError where nothing was taken; asserts that all lies where images belong."""
    archive = root / "x.zip"
    archive.write_bytes(data)
    dataset = OwnedDataset.create(root / "datasets", "fuzz", concept="zzk")
    before, tempfile.tempdir = tempfile.tempdir, str(root)  # entries are unpacked there; it must be as empty as before
    try:
        with mock.patch.multiple(archives, **_LIMITS):
            collected = collect(dataset, [archive])
    finally:
        tempfile.tempdir = before
    assert all(path.parent == dataset.images_folder and path.is_file() for path in collected.added)
    assert {path.name for path in root.iterdir()} == {"x.zip", "datasets"}
    if not collected.added:
        raise DatasetError("; ".join(why for _, why in collected.skipped) or "nothing in it")
    return collected


def dataset_files(rng: random.Random) -> bytes:
    """dataset.json and the journal of an interrupted save, one of them damaged, as one text."""
    notes = json.dumps({"version": 1, "concept": "zzk", "pictures": {"a.png": {"source": "x", "shaped": {"mode": "square"}}}})
    journal = json.dumps({"version": 1, "captions": [{
        "file": base64.b64encode(b"10_zzk/a.txt").decode(), "old": hashlib.sha256(_CAPTION).hexdigest(), "new": "zzk, red"}]})
    parts = [notes.encode(), journal.encode()]
    parts[rng.randrange(2)] = mutated(rng, parts)
    return len(parts[0]).to_bytes(4, "big") + parts[0] + parts[1]


def read_dataset(data: bytes, root: Path, *, image: bytes) -> object:
    """Open such a folder as the studio does; the image and the caption in it stay whatever the files beside them say."""
    length = int.from_bytes(data[:4], "big")
    dataset = OwnedDataset.create(root, "fuzz", concept="zzk")
    (dataset.images_folder / "a.png").write_bytes(image)
    (dataset.images_folder / "a.txt").write_bytes(_CAPTION)
    dataset.studio_folder.mkdir(exist_ok=True)
    (dataset.folder / "dataset.json").write_bytes(data[4:4 + length])
    (dataset.studio_folder / "captions.journal").write_bytes(data[4 + length:])
    reopened = OwnedDataset.open(dataset.folder)
    store = CaptionStore.open(reopened.folder)
    assert [path.name for path in store.images] == ["a.png"] and reopened.images[0].read_bytes() == image
    return reopened.notes(), store.caption(0)
