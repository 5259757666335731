"""Images from anywhere into a dataset: folders, files, uploads, zip files; what is broken or there already is named.

Originals are only read. An image is turned upright once; what every program sees alike is copied byte for byte, with what
generators wrote into it; anything else becomes a PNG. Transparency is laid on white, and kept as a mask.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image

from lib_lora_train.dataset import caption_files
from lib_lora_train.dataset.caption_files import TEXT_SUFFIXES, CaptionFile, that_counts
from lib_lora_train.dataset.images import MAX_BYTES, DecodedImage, decode_image, encode_image
from lib_lora_train.dataset.listing import MayRead, repeats_and_name
from lib_lora_train.dataset.masks import USED
from lib_lora_train.dataset.progress import Progress, ShouldStop, Watch
from lib_lora_train.dataset.text_files import CAPTION_SUFFIXES
from lib_lora_train.errors import DatasetError, counted, printable, some_of, translated
from lib_lora_train.storage.atomic import copy_atomic, write_atomic
from lib_lora_train.storage.checksum import sha256_of
from lib_lora_train.studio.importing.archive import Archive, open_archive
from lib_lora_train.studio.importing.names import FreeNames, safe_stem
from lib_lora_train.studio.importing.owned import FILE_NAME, Note, OwnedDataset, plain_line
from lib_lora_train.studio.importing.sources import Found, Location, Source, Upload, list_sources, reason

__all__ = ("Collected", "Upload", "collect")

# Formats that kohya's tools open too, and the endings that go with them, the usual one first.
_KEPT = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg"), "MPO": (".jpg", ".jpeg"), "WEBP": (".webp",), "BMP": (".bmp",)}
_NOTES_EVERY = 200  # images between two writes of dataset.json


@dataclass(frozen=True)
class Collected:
    """What came of it."""

    added: tuple[Path, ...]
    skipped: tuple[tuple[str, str], ...]  # (what it is called, why it was left out: one sentence)
    notes: tuple[str, ...] = ()  # what else the user should know, one sentence each
    sizes: tuple[tuple[int, int], ...] = ()  # (width, height) of `added`
    subsets: tuple[str, ...] = ()  # the N_name folder that each of `added` was in, "" for none
    captioned: tuple[Path, ...] = ()  # images with a caption from this import: of `added`, and others that had none
    unmatched: tuple[str, ...] = ()  # text files that fit no image
    unread: tuple[str, ...] = ()  # files of other kinds

    @property
    def captions(self) -> str:
        """The closing sentence, about the images that are new or got a caption."""
        return caption_files.count_of_captions(len({*self.added, *self.captioned}), len(self.captioned), self.unmatched,
                                               unread=self.unread)

    def one_repeats(self) -> int | None:
        """How often an epoch shows each image by the number in front of its folder; None where that is not one number."""
        numbers = {repeats_and_name(name)[0] if name else None for name in self.subsets}
        return numbers.pop() if len(numbers) == 1 else None

    def repeats_note(self, repeats: int) -> str:
        """What becomes of the folders' repeats in a dataset that shows each image `repeats` times; "" where they are kept."""
        lost = [name for name in dict.fromkeys(self.subsets) if name and repeats_and_name(name)[0] != repeats]
        return "" if not lost else (
            f"The repeats of {some_of(lost)} are not kept: a dataset shows all its pictures equally often, {repeats} times an "
            "epoch here (the number in front of its folder's name). To keep them, train with the folders as they were.")


def collect(
    dataset: OwnedDataset, sources: Sequence[Path | Upload], *, transparent: Literal["mask", "white"] = "mask",
    dry_run: bool = False, may_read: MayRead | None = None, on_progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> Collected:
    """Copy the images of `sources` into `dataset`, with the captions beside them.

    A folder is read with all below it. `transparent="mask"` keeps transparency as a mask, "white" forgets it.
    With `dry_run` nothing is written: `added` are the paths that would be. `may_read` is asked for every file and folder.
    Raises Interrupted when `should_stop()` says so and OutputError if the disk refuses; what was added until then stays,
    whole.
    """
    found, skipped = list_sources(sources, may_read=may_read)
    watch = Watch(sum(len(source.images) for source in found), doing="pictures were imported",
                  on_progress=on_progress, should_stop=should_stop)
    collector = _Collector(dataset, masks=transparent == "mask", dry_run=dry_run, skipped=skipped)
    with translated("pictures were imported"):
        collector.read_dataset()
        try:
            for source in found:
                _collect_source(source, collector, watch=watch)
        finally:
            collector.write_notes()
    return Collected(tuple(collector.added), tuple((printable(name), printable(why)) for name, why in collector.skipped),
                     collector.notes(), tuple(collector.sizes), tuple(collector.subsets), tuple(collector.captioned),
                     tuple(map(printable, [*collector.unmatched, *(label for source in found for label in source.unmatched)])),
                     tuple(printable(label) for source in found for label in source.unread))


def _collect_source(source: Source, collector: _Collector, *, watch: Watch) -> None:
    with contextlib.ExitStack() as stack:
        try:
            archive = stack.enter_context(open_archive(source.archive) if source.archive else contextlib.nullcontext())
        except DatasetError as error:  # it could be listed a moment ago
            collector.skipped.append((source.name, reason(error)))
            return
        collector.read_metadata(source, archive)
        for found in source.images:
            watch.check()
            if archive is not None and archive.exhausted:
                collector.skipped.append((source.name, "It unpacks to far more than its own size, so the rest of it was left "
                                          "out."))
                return
            try:
                collector.add(found, archive)
            except DatasetError as error:
                collector.skipped.append((found.label, reason(error)))
            watch.advance()


class _Collector:
    """Images into the dataset one by one, and the list of what happened."""

    def __init__(self, dataset: OwnedDataset, *, masks: bool, dry_run: bool, skipped: list[tuple[str, str]]) -> None:
        self.dataset, self.masks, self.dry_run, self.skipped = dataset, masks, dry_run, skipped
        self.added: list[Path] = []
        self.sizes: list[tuple[int, int]] = []
        self.captioned: list[Path] = []
        self.unmatched: list[str] = []  # metadata that names no image of its source
        self._captions = caption_files.CaptionNotes()
        self._listed: dict[tuple[tuple[str, ...], str], CaptionFile] = {}
        self.subsets: list[str] = []
        self._known: dict[str, str] = {}  # sha256 of a file as it was imported -> the image's name
        self._names = FreeNames(())
        self._notes: dict[str, Note | None] = {}
        self._counts: dict[str, int] = {}

    def read_dataset(self) -> None:
        """Read what the dataset holds, so that nothing comes twice and no name is given twice."""
        notes = self.dataset.notes()
        for path in self.dataset.images:
            digest = notes.get(path.name, {}).get("sha256")
            self._known[digest if isinstance(digest, str) else _sha256(path)] = path.name
        self._names = FreeNames(self.dataset.taken_stems())
        if not self.dry_run:
            self.dataset.remove_parts()

    def add(self, found: Found, archive: Archive | None) -> None:
        """One image. Raises DatasetError if it cannot be used; then nothing of it was written."""
        with _on_disk(found.location, archive) as path:
            if path.stat().st_size > MAX_BYTES:
                decode_image(path)  # refuses it, and says why
            digest = _sha256(path)
            if digest in self._known:
                there = self.dataset.images_folder / self._known[digest]
                self.skipped.append((found.label, f"It is the same file as {there.name}{self._taken(there, found, archive)}."))
                return
            decoded = decode_image(path)
            if decoded.several:
                self._count("{} had several frames or pages, of which the first was taken.")
            caption = (own := self._caption(found, archive)) or self._words_of_subset(found)
            mask = self._mask(found, decoded, archive)
            stem = self._names.claim(safe_stem(Path(found.name).stem))
            endings = _KEPT.get(decoded.format, ()) if decoded.as_stored else ()
            suffix = Path(found.name).suffix.lower()
            target = self.dataset.images_folder / f"{stem}{suffix if suffix in endings else (*endings, '.png')[0]}"
            if not self.dry_run:
                # The image comes last: one that is there is complete.
                if mask is not None:
                    write_atomic(self.dataset.mask_path(target.name), encode_image(mask, suffix=".png"), one_of_many=True)
                if caption:
                    write_atomic(target.with_suffix(".txt"), caption.encode("utf-8"), one_of_many=True)
                if endings:
                    copy_atomic(path, target, one_of_many=True)
                else:
                    write_atomic(target, encode_image(decoded.image, suffix=".png", source=decoded), one_of_many=True)
                self._note(target.name, {"source": printable(found.source), "sha256": digest})
        self._known[digest] = target.name
        self.captioned += [target] if own else []
        self.added.append(target)
        self.sizes.append(decoded.image.size)
        self.subsets.append(found.subset)

    def _words_of_subset(self, found: Found) -> str:
        """As training does: the words of an N_name folder are the caption where there is no other."""
        words = plain_line(repeats_and_name(found.subset)[1]) if found.subset else ""
        if words:
            self._count(f"{{}} without a caption got the words of the folder {found.subset} as one.")
        return words

    def _taken(self, there: Path, found: Found, archive: Archive | None) -> str:
        """Give an image that is there the caption of one that is the same, where it has none; what becomes of the caption."""
        if not (caption := self._caption(found, archive)):
            return ""
        beside = [there.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
        own = that_counts([caption_files.read_caption_file(file) for file in beside if file.is_file()])
        if there in self.captioned or own and (own.line or own.error):
            return "" if own and own.lines == caption else ", which keeps its own caption"
        if not self.dry_run:
            write_atomic(beside[0], caption.encode("utf-8"), one_of_many=True)
        self.captioned.append(there)
        return ", which had no caption and got this one's"

    def read_metadata(self, source: Source, archive: Archive | None) -> None:
        """Read the captions that JSON files list, before the images of a source are added."""
        self._listed, fitting = {}, set()
        for folder, location, name in source.metadata:
            images = [image.name for image in source.images if image.folder == folder]
            with contextlib.suppress(DatasetError, FileNotFoundError), _on_disk(location, archive) as path:
                listed = caption_files.metadata_of(path, images, folder=name)
                self._listed |= {(folder, image): replace(caption, file=Path(location.name))
                                 for image, caption in listed.items()}
                fitting |= {location.name} if listed else set()
        names = dict.fromkeys(location.name for _, location, _ in source.metadata)
        self.unmatched += [name for name in names if name not in fitting | {FILE_NAME, caption_files.CHOICES}]

    def _caption(self, found: Found, archive: Archive | None) -> str:
        files = []
        for location in found.captions:
            try:
                with _on_disk(location, archive) as path:
                    files.append(replace(caption_files.read_caption_file(path), file=Path(location.name)))
            except (DatasetError, FileNotFoundError) as error:
                gone = DatasetError("It is gone") if isinstance(error, FileNotFoundError) else error
                files.append(CaptionFile(Path(location.name), "", error=gone))
        listed = self._listed.get((found.folder, found.name))
        counting = that_counts([*files, *([listed] if listed else [])])
        if counting and counting.error:
            self.skipped.append((f"caption of {found.label}",
                                 f"{reason(counting.error)} The picture was imported without it."))
        self._captions.add(counting)
        return counting.lines if counting else ""

    def _mask(self, found: Found, decoded: DecodedImage, archive: Archive | None) -> Image.Image | None:
        if found.mask is not None:
            try:
                with _on_disk(found.mask, archive) as path:
                    mask = decode_image(path).image.convert("L")
                if mask.size != decoded.image.size:
                    raise DatasetError("", why="it is not of the picture's size")
                self._count("{} came with a mask, which is kept. " + USED)
                return mask
            except DatasetError as error:
                self.skipped.append((f"mask of {found.label}", f"{reason(error)} The picture was imported without it."))
        if decoded.alpha is None:
            return None
        self._count("{} had transparent parts: they are white now" + (
            f", and a mask that marks them is kept. {USED}" if self.masks else "."))
        return decoded.alpha if self.masks else None

    def _count(self, text: str) -> None:
        self._counts[text] = self._counts.get(text, 0) + 1

    def notes(self) -> tuple[str, ...]:
        """One sentence for each thing that happened to several images."""
        return (*(text.format(counted(count, "picture")) for text, count in self._counts.items()), *self._captions.sentences())

    def _note(self, name: str, note: Note) -> None:
        self._notes[name] = note
        if len(self._notes) >= _NOTES_EVERY:
            self.write_notes()

    def write_notes(self) -> None:
        """Keep in dataset.json where the images came from."""
        if self._notes:
            self.dataset.write_notes(self._notes)
            self._notes = {}


@contextlib.contextmanager
def _on_disk(location: Location, archive: Archive | None) -> Iterator[Path]:
    """The file itself, or what an archive holds in a file of its own for as long as the block lasts."""
    if isinstance(location, Path):
        yield location
        return
    assert archive is not None
    with tempfile.TemporaryDirectory(prefix="lora_train_") as folder:
        # A name of our own; the kind of an image is told by its content.
        suffix = Path(location.name).suffix.lower()
        path = Path(folder) / f"unpacked{suffix if suffix in TEXT_SUFFIXES else ''}"
        with path.open("wb") as file:
            archive.copy(location, file)
        yield path


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        why = "the file is gone" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise DatasetError(f"The picture {path} cannot be used", why=why) from error
