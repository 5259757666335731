"""What there is to import: the images in folders, files, uploads and zip files, each with its caption and mask.

Only names are read here, the lists of contents of archives, and metadata beside images that were named one by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lib_lora_train.dataset.caption_files import JSON_SUFFIXES, TEXT_SUFFIXES, match_names, metadata_of, of_no_kind
from lib_lora_train.dataset.images import is_image_name
from lib_lora_train.dataset.listing import Listing, MayRead, is_subset_name, list_folder, list_tree
from lib_lora_train.dataset.masks import CONDITIONING, companion, is_masks_folder
from lib_lora_train.dataset.text_files import CAPTION_SUFFIXES
from lib_lora_train.errors import DatasetError, counted, printable
from lib_lora_train.studio.importing.archive import Entry, open_archive
from lib_lora_train.studio.importing.names import file_key

_OF_CLASS = ("regularisation", "regularization", "reg_images", "regularisation_images", "regularization_images", "class_images")

Location = Path | Entry  # a file of its own, or in an archive


@dataclasses.dataclass(frozen=True)
class Upload:
    """A file that was sent: what its sender calls it, and where it was stored. The name is never used as a path."""

    name: str
    path: Path


@dataclasses.dataclass(frozen=True)
class Found:
    """One file that was found, wherever it is; an image to import, once its caption and mask are known."""

    folder: tuple[str, ...]
    name: str  # the file's name
    location: Location
    label: str  # what it is called when something is said about it
    source: str  # where it came from, for dataset.json
    captions: tuple[Location, ...] = ()  # files of its own; the first that holds a caption counts
    mask: Location | None = None

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return Path(self.name).stem

    @property
    def subset(self) -> str:
        """The name of the N_name folder (kohya's layout) that it is in; "" for none."""
        folders = self.folder or ((self.location.parent.name,) if isinstance(self.location, Path) else ())
        return next((name for part in reversed(folders) if is_subset_name(name := Path(part).name)), "")

    @property
    def is_image(self) -> bool:
        """Whether the name ends like an image's."""
        return is_image_name(Path(self.name))

    @property
    def is_caption(self) -> bool:
        """Whether the name ends like that of a file with captions."""
        return Path(self.name).suffix.lower() in TEXT_SUFFIXES


@dataclasses.dataclass(frozen=True)
class Source:
    """Images that are opened together."""

    name: str
    images: tuple[Found, ...]
    archive: Path | None = None
    unmatched: tuple[str, ...] = ()  # caption files without an image
    unread: tuple[str, ...] = ()  # files of other kinds
    # JSON files that may list the images of a folder: (the folder, the file, the folder's name where the file lies above it)
    metadata: tuple[tuple[tuple[str, ...], Location, str], ...] = ()


def list_sources(sources: Sequence[Path | Upload], *,
                 may_read: MayRead | None) -> tuple[list[Source], list[tuple[str, str]]]:
    """(what is in `sources`, what cannot be used: its name and one sentence).

    Files and uploads are read together, so that a caption among them finds its image.
    """
    listing = _Listing(may_read)
    for source in sources:
        listing.add(source)
    return listing.finished()


def reason(error: DatasetError) -> str:
    """Why, as a sentence that stands beside the name of what it is about."""
    return f"{error.reason[:1].upper()}{error.reason[1:]}."


class _Listing:
    """Goes through the sources in their order."""

    def __init__(self, may_read: MayRead | None) -> None:
        self._may_read = may_read
        self._found: list[Source] = []
        self._skipped: list[tuple[str, str]] = []
        self._files: list[Found] = []  # those that were named one by one
        self._named: dict[Path, list[str]] = {}  # the images among them that lie in folders

    def add(self, source: Path | Upload) -> None:
        name, path = (source.name, source.path) if isinstance(source, Upload) else (source.name or str(source), source)
        try:
            if not self._allowed(path):
                self._skipped.append((name, "It is not in a folder that may be read."))
            elif path.is_dir():
                self._folder(path)
            elif not path.is_file():
                self._skipped.append((name, "It does not exist." if not path.exists() else "It is not a file."))
            elif name.lower().endswith(".zip"):
                self._archive(path, name)
            else:
                self._file(path, name, uploaded=isinstance(source, Upload))
        except DatasetError as error:
            self._skipped.append((name, reason(error)))
        except OSError as error:
            self._skipped.append((name, f"It cannot be read: {error.strerror or error}."))

    def finished(self) -> tuple[list[Source], list[tuple[str, str]]]:
        for parent, images in self._named.items():
            with contextlib.suppress(DatasetError):  # a folder that cannot be listed
                self._files += self._beside(parent, images)
        source = self._source("files", [file for file in self._files if file.is_image or file.is_caption])
        for file in self._files:
            if not file.is_image and not file.is_caption:
                self._skipped.append((file.label, "Its name does not end like a picture's."))
        self._skipped += [(label, "There is no picture of this name with it.") for label in source.unmatched]
        sources = [*self._found, *([source] if source.images else ())]
        return sources, [(printable(name), printable(why)) for name, why in self._skipped]

    def _allowed(self, path: Path) -> bool:
        return self._may_read is None or self._may_read(path)

    def _folder(self, folder: Path) -> None:
        name, tree = folder.name or str(folder), list_tree(folder, may_read=self._may_read)
        source = self._source(name, [file for named, listing in tree for file in self._files_of(listing, named)])
        if source.images:
            self._found.append(source)
        else:
            self._skipped.append((name, "There is no picture in it, nor in the folders below it."))

    def _files_of(self, listing: Listing, named: tuple[str, ...]) -> list[Found]:
        """Images and captions of a folder; what leads elsewhere or nowhere is kept for the answer."""
        def found(path: Path) -> Found:
            return Found(named, path.name, path, "/".join([*named, path.name]), str(path))

        for path in (*listing.refused, *listing.dead):
            file = found(path)
            if path in listing.dead:
                self._skipped.append((file.label, "It is a link that leads nowhere."))
            elif file.is_image or file.is_caption:
                self._skipped.append((file.label, "It leads to a file that may not be read."))
            elif path.is_dir():
                self._skipped.append((file.label, "It is or leads to a folder that cannot or may not be read."))
        self._skipped += [(found(path).label, "An archive in a folder is not opened; import it by itself.")
                          for path in listing.files if path.suffix.lower() == ".zip"]
        return [found(path) for path in listing.files if path.suffix.lower() != ".zip"]

    def _archive(self, path: Path, name: str) -> None:
        try:
            with open_archive(path) as archive:
                entries = archive.entries()
                refused = {entry: why for entry in entries if is_image_name(Path(entry.name))
                           and (why := archive.refusal(entry))}
        except DatasetError as error:
            self._skipped.append((name, reason(error)))
            return
        images = [entry for entry in entries if is_image_name(Path(entry.name))]
        if not images:
            self._skipped.append((name, "There is no picture in it."))
        elif len(refused) == len(images) and len(set(refused.values())) == 1:
            self._skipped.append((name, f"Of every picture in it: {refused[images[0]]}."))
        else:
            self._skipped += [(f"{name}/{entry.label}", f"{why[:1].upper()}{why[1:]}.") for entry, why in refused.items()]
            self._skipped += [(f"{name}/{entry.label}", "An archive inside an archive is not opened.")
                              for entry in entries if entry.name.lower().endswith(".zip")]
            files = [Found(entry.folder, entry.name, entry, f"{name}/{entry.label}", f"{name}/{entry.label}")
                     for entry in entries if entry not in refused]
            self._found.append(self._source(name, files, archive=path))

    def _file(self, path: Path, name: str, *, uploaded: bool) -> None:
        if uploaded:  # a browser may send the folder with the name
            *folder, name = [part for part in name.replace("\\", "/").split("/") if part] or [path.name]
            self._files.append(Found(("upload", *folder), name, path, name, name))
            return
        folder = (str(path.parent),)
        self._files.append(Found(folder, name, path, name, str(path)))
        if is_image_name(path):
            self._named.setdefault(path.parent, []).append(name)

    def _beside(self, parent: Path, images: Sequence[str]) -> list[Found]:
        """The files that hold captions of images that were named one by one."""
        files = {file.name: file for file in list_folder(parent, may_read=self._may_read).files}
        own, alone = match_names(images, files)
        alone = [text for text in alone if text.lower().endswith(JSON_SUFFIXES) and metadata_of(files[text], images)]
        return [Found((str(parent),), text, files[text], text, str(files[text])) for text in {*sum(own.values(), alone)}]

    def _source(self, name: str, files: Sequence[Found], *, archive: Path | None = None) -> Source:
        """The images to learn from among `files`, each with its captions and its mask, and the caption files of none; what
        else looks like an image is told."""
        folders: dict[tuple[str, ...], dict[str, Found]] = {}
        for file in files:
            folders.setdefault(file.folder, {})[file.name] = file
        own: dict[tuple[tuple[str, ...], str], tuple[Location, ...]] = {}
        lists: dict[tuple[str, ...], list[Location]] = {}
        unmatched = []
        for folder, by_name in folders.items():
            found, alone = match_names([name for name, file in by_name.items() if file.is_image], by_name)
            own |= {(folder, image): tuple(by_name[text].location for text in of) for image, of in found.items()}
            lists[folder] = [by_name[text].location for text in alone if text.lower().endswith(JSON_SUFFIXES)]
            unmatched += [by_name[text].label for text in alone if text.lower().endswith(CAPTION_SUFFIXES)]
        metadata = [(folder, file, above[0]) for folder in folders for above in [folder[-1:]] if above
                    for file in lists.get(folder[:-1], [])] + [(folder, file, "") for folder in lists for file in lists[folder]]
        images, masks = self._without_masks(self._of_the_subject([file for file in files if file.is_image]))
        return Source(name, tuple(
            dataclasses.replace(file, captions=own.get((file.folder, file.name), ()), mask=masks.get(index))
            for index, file in enumerate(images)), archive, tuple(unmatched),
            tuple(of_no_kind(file.label for file in files if not file.name.lower().endswith(".zip"))), tuple(metadata))

    def _without_masks(self, files: Sequence[Found]) -> tuple[list[Found], dict[int, Location]]:
        """(the images, the mask of the image of each index). A mask is that of the image where it lies, its folder of masks
        not counted, or in one folder below that; where several could be meant, it is nobody's. Where nothing lies elsewhere,
        a folder called `masks` holds images."""
        all_in_masks = all(any(map(is_masks_folder, file.folder)) for file in files)
        stems: dict[tuple[str, ...], set[str]] = {}
        for file in files:
            stems.setdefault(file.folder, set()).add(file.stem.casefold())
        images, others, by_place = [], [], {}
        for file in files:
            kind, of = companion(file.stem, stems[file.folder]) or ("", file.stem)
            folder = file.folder if all_in_masks else tuple(part for part in file.folder if not is_masks_folder(part))
            if kind or folder != file.folder:
                others.append((file, kind, folder, file_key(of)))
                continue
            for place in {folder, folder[:-1]}:
                by_place.setdefault((place, file_key(of)), []).append(len(images))
            images.append(file)
        masks: dict[int, Location] = {}
        for file, kind, folder, key in others:
            found = by_place.get((folder, key), [])
            found = [index for index in found if images[index].folder == folder] or found
            if kind != "conditioning" and len(found) == 1 and found[0] not in masks:
                masks[found[0]] = file.location
            else:
                self._skipped.append((file.label, CONDITIONING if kind == "conditioning" else "It is a mask, and " + (
                    "its picture is not here." if not found else "several pictures are of this name." if len(found) > 1 else
                    "its picture has one already.")))
        return images, masks

    def _of_the_subject(self, files: Sequence[Found]) -> list[Found]:
        """Without what a kohya project holds beside its `img` folder: images of the class (`reg`), samples, logs."""
        projects = {file.folder[:at] for file in files for at in range(len(file.folder)) if _holds_subsets(file, at, "img")}
        images, left_out = [], {}
        for file in files:
            at = next((at for at, part in enumerate(file.folder) if _is_of_class(file, at) or (
                file.folder[:at] in projects and part.casefold() != "img" and not is_masks_folder(part))), None)
            if at is None:
                images.append(file)
            else:
                folder = file.label.rsplit("/", len(file.folder) - at)[0]
                left_out.setdefault(folder, []).append(_is_of_class(file, at))
        self._skipped += [(folder, "Its " + (
            f"{counted(len(of_class), 'picture shows', 'pictures show')} the class and not the subject (regularisation): give "
            "the folder to the training as Regularisation folder (reg_data_dir)." if any(of_class) else
            f"{counted(len(of_class), 'picture lies', 'pictures lie')} beside the img folder of a kohya project."))
            for folder, of_class in left_out.items()]
        return images


def _is_of_class(file: Found, at: int) -> bool:
    """Whether part `at` of the file's folder is one of regularisation images. `reg` alone may be a friend's name."""
    return file.folder[at].casefold() in _OF_CLASS or _holds_subsets(file, at, "reg")


def _holds_subsets(file: Found, at: int, name: str) -> bool:
    """Whether part `at` of the file's folder is called `name` and the next is an N_name folder."""
    return file.folder[at].casefold() == name and is_subset_name("".join(file.folder[at + 1:at + 2]))
