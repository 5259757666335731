"""A folder of images → examples. Everything that can be found wrong before a run is found here.

Two layouts: kohya's `parent/N_name/` (N repeats, `name` is the caption where there is no file), and a
plain folder of images; or the folders that sd-scripts' `dataset_config` names. An image that cannot be
used is skipped and named in a Problem; only a folder without a usable image, and captions whose encoding
is not clear, are refused: the rest could be trained, but on a text without meaning.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Literal

from lib_lora_train.dataset import caption_files
from lib_lora_train.dataset.caption_variation import plain, written
from lib_lora_train.dataset.captions import normal_form
from lib_lora_train.dataset.examples import Dataset, Example, Problem, nothing_left
from lib_lora_train.dataset.images import Checked, check_image, is_image_name
from lib_lora_train.dataset.listing import MOST_REPEATS, MayRead, is_subset_name, list_folder, list_tree, repeats_and_name
from lib_lora_train.dataset.masks import Companions, is_masks_folder
from lib_lora_train.dataset.prefetch import Prefetch, reading_threads
from lib_lora_train.dataset.progress import Progress, ShouldStop, Watch
from lib_lora_train.errors import DatasetError, counted, printable, some_of
from lib_lora_train.settings import named
from lib_lora_train.settings.dataset_config import DEFAULT_SUBSET, SubsetSettings
from lib_lora_train.settings.field import Value

_MANY = 100  # images from which on threads are worth their beginning
_PREFETCH_PER_THREAD = 16  # files that may have been looked at, for each thread that does


def read_folder(
    folder: Path | str, *, subsets: Sequence[SubsetSettings] = (DEFAULT_SUBSET,),
    reg_data_dir: Path | str | None = None, on_progress: Progress | None = None,
    should_stop: ShouldStop | None = None, may_read: MayRead | None = None,
) -> Dataset:
    """Read names, captions and headers; check each file as far as its format allows without decoding it.

    `subsets` are either one for all of the folder, or folders of their own, seen from it (see `dataset_config`), with their
    repeats. Otherwise repeats are those of the folders' names, 1 in a plain folder. Regularisation images never get the trigger
    word. Order: by name, the same on every system. `may_read` is asked for folders and links; what it refuses is passed over
    and counted in a Problem.
    Raises DatasetError (folder missing, empty, unreadable; no usable image; captions in no clear encoding) and
    Interrupted when `should_stop()` says so.
    """
    listed: list[Subset] = []
    if subsets[0].image_dir:
        listed, problems = _of_config(Path(folder), subsets, may_read=may_read)
        layout: Literal["kohya", "plain", "config"] = "config"
        listed, reg_subsets = ([s for s in listed if s.chosen.is_reg == is_reg] for is_reg in (False, True))
    else:
        listed, layout, problems = find_images(Path(folder), what="dataset", chosen=subsets[0], may_read=may_read)
        reg_subsets = []
    if reg_data_dir and layout != "config":
        if _same(Path(reg_data_dir), Path(folder)):
            raise DatasetError(f"{named('reg_data_dir')} is the dataset folder itself", remedy="choose another folder or none")
        reg_subsets, _, reg_problems = find_images(Path(reg_data_dir), what="regularisation", chosen=subsets[0],
                                                   may_read=may_read)
        problems = [p for p in problems if p.path is None or not _same(p.path, Path(reg_data_dir))] + reg_problems
    watch = Watch(sum(len(subset.images) for subset in listed + reg_subsets), doing="the pictures were read",
                  on_progress=on_progress, should_stop=should_stop)
    reader = _Reader(problems, watch=watch)
    examples = reader.read(listed)
    captioned, unmatched = reader.notes.captioned, [name for subset in listed for name in subset.captions.unmatched]
    unread = [name for subset in listed for name in subset.captions.unread]
    regularisation = reader.read(reg_subsets, is_regularisation=True)
    reader.finish()
    if captioned < len(examples) or unmatched or unread:
        problems.append(Problem(caption_files.count_of_captions(len(examples), captioned, unmatched, unread=unread)))
    if not examples:
        raise nothing_left(Path(folder), problems)
    if reg_subsets and not regularisation:
        raise nothing_left(Path(reg_data_dir or ""), problems)
    return Dataset(Path(folder), layout, (*examples, *regularisation), tuple(problems))


@dataclass(frozen=True)
class Subset:
    """One folder whose images are used."""

    path: Path
    repeats: int
    caption: str  # for images without a caption file
    images: tuple[Path, ...]
    captions: caption_files.FolderCaptions
    chosen: SubsetSettings = DEFAULT_SUBSET


class _Reader:
    """Subsets → examples, collecting what is wrong so that the user hears it once and not per image."""

    def __init__(self, problems: list[Problem], *, watch: Watch) -> None:
        self.problems, self.watch = problems, watch
        self.not_text: list[tuple[str, DatasetError]] = []
        self.empty: list[str] = []
        self.notes = caption_files.CaptionNotes()
        self.several_frames: list[str] = []

    def read(self, subsets: Sequence[Subset], *, is_regularisation: bool = False) -> list[Example]:
        examples = []
        images = [(subset, image) for subset in subsets for image in subset.images]
        threads = reading_threads() if len(images) >= _MANY else 0
        # A file may be in memory at once while it is checked.
        with Prefetch([image for _, image in images], self._checked, threads=threads, cost=_file_bytes,
                      kept=lambda size: 0, most=_PREFETCH_PER_THREAD * max(1, threads)) as checked:
            for subset, image in images:
                self.watch.check()
                example = self._example(image, subset, checked=next(checked), is_regularisation=is_regularisation)
                if example is not None:
                    examples.append(example)
                self.watch.advance()
        return examples

    def _checked(self, image: Path) -> Checked | DatasetError:
        """What is seen of the image, or why it cannot be used; in any thread."""
        try:
            return check_image(image)
        except DatasetError as error:
            return error

    def _example(self, image: Path, subset: Subset, *, checked: Checked | DatasetError, is_regularisation: bool
                 ) -> Example | None:
        if isinstance(checked, DatasetError):
            self.problems.append(Problem(f"Skipped: {checked}", image, skipped=True))
            return None
        if checked.several:
            self.several_frames.append(image.name)
        chosen = subset.chosen.captions
        trigger_word = "" if is_regularisation else subset.chosen.dataset.trigger_word
        lines = tuple(dict.fromkeys(written(line, chosen, trigger_word=trigger_word) for line in self._lines(image, subset)))
        caption = plain(lines[0], chosen)
        if not caption:
            self.empty.append(image.name)
        return Example(image, caption, subset.repeats, subset.path.name, checked.width, checked.height, is_regularisation,
                       () if lines == (caption,) else lines, subset.chosen)

    def _lines(self, image: Path, subset: Subset) -> list[str]:
        """The captions of which one is drawn at each step."""
        found, chosen = subset.captions.all_of(image), subset.chosen.captions
        counting = caption_files.that_counts(found)
        self.notes.add(counting, chosen)
        drawn = len(caption_files.endings_of(chosen)) > 1
        files = [file for file in found if file.line or file.error] if drawn else [counting] if counting else []
        self.not_text += [(file.file.name, file.error) for file in files if file.error]
        lines = [line for file in files if not file.error for line in file.used(chosen) if line]
        return lines or ["" if any(file.error for file in files) else subset.caption]

    def finish(self) -> None:
        """Turn what was collected into one sentence a kind."""
        if len(self.not_text) == 1:
            raise self.not_text[0][1]
        if self.not_text:
            raise DatasetError(
                f"{counted(len(self.not_text), 'caption file')} cannot be read",
                why=some_of([name for name, _ in self.not_text]),
                remedy=" | ".join(dict.fromkeys(error.reason for _, error in self.not_text)))
        if self.empty:
            self.problems.append(Problem(
                f"{counted(len(self.empty), 'picture has', 'pictures have')} no caption and no trigger word, "
                f"so an empty caption is trained: {some_of(self.empty)}."))
        if self.several_frames:
            self.problems.append(Problem(f"Of {counted(len(self.several_frames), 'picture')} with several frames or pages only "
                                         f"the first is used: {some_of(self.several_frames)}."))
        self.problems += map(Problem, self.notes.sentences())


def find_images(folder: Path, *, what: str, may_read: MayRead | None, chosen: SubsetSettings = DEFAULT_SUBSET
                ) -> tuple[list[Subset], Literal["kohya", "plain"], list[Problem]]:
    """Which folders hold the images, and in which layout; only names are read. `what` completes "The … folder", `chosen` is how
    all of it is trained.

    Raises DatasetError if the folder is missing, unreadable or without images.
    """
    problems: list[Problem] = []
    companions = Companions()
    files, folders = _list(folder, what, may_read=may_read, problems=problems)
    loose = companions.images(files, folders)
    numbered = [f for f in folders if repeats_and_name(f.name)]
    subsets = [s for f in numbered if (s := _subset(
        f, problems, chosen=chosen, may_read=may_read, companions=companions, above=files)) is not None]
    others = [f for f in folders if f not in numbered and not is_masks_folder(f.name)]
    problems += map(Problem, companions.sentences())
    if subsets:
        if loose:
            problems.append(Problem(
                f"{counted(len(loose), 'picture')} in {folder} ignored, because its N_name folders are used: "
                f"{some_of([file.name for file in loose])}."))
        problems += _unused_folders(folder, others, "its name has no number of repeats in front (N_name)", may_read)
        return subsets, "kohya", problems
    if loose:
        if said := repeats_and_name(folder.name):
            problems.append(Problem(
                f"{folder.name} was chosen itself, so its name is not read as {counted(said[0], 'repeat')} of "
                f"'{said[1]}'; choose the folder above it for that."))
        problems += _unused_folders(folder, others, "only the pictures beside it are used; an import into a dataset takes them "
                                    "too", may_read)
        return [_with_captions(folder, loose, files, chosen=chosen, problems=problems, may_read=may_read)], "plain", problems
    why = " ".join(p.text for p in problems) or "no file in it has a picture's name" + (
        f" ({some_of([file.name for file in files], 3)})" if files else "")
    with_images = list(dict.fromkeys(
        # Of a numbered folder the one above it is to be chosen.
        (path.parent if is_subset_name(path.name) else path).as_posix()
        for path in _images_below(folder, {other.name for other in others}, may_read)))
    remedy = "choose the folder that holds the pictures"
    if with_images:
        remedy = (f"choose one of its folders ({some_of(with_images)}), put the number of repeats in front of "
                  "their names, as in 10_name, or import it into a dataset, which takes all folders in it")
    raise DatasetError(f"The {what} folder {folder} holds no pictures", why=why, remedy=remedy)


def _of_config(folder: Path, chosen: Sequence[SubsetSettings], *,
               may_read: MayRead | None) -> tuple[list[Subset], list[Problem]]:
    """The folders that `dataset_config` names, seen from `folder`. Raises DatasetError for one that is missing or empty."""
    problems: list[Problem] = []
    companions = Companions()
    subsets = []
    for subset in chosen:
        path = folder / subset.image_dir
        if may_read is not None and not may_read(path):
            raise DatasetError(f"The dataset folder {path} cannot be used", why="others can reach this page, so it keeps to "
                               "the folders it is allowed", remedy=f"change {named('dataset_config')}")
        files, folders = _list(path, "dataset", may_read=may_read, problems=problems)
        images = companions.images(files, folders)
        if not images:
            raise DatasetError(f"The dataset folder {path} holds no pictures",
                               remedy=f"change or remove it in {named('dataset_config')}, or give it no repeats")
        found = _with_captions(path, images, files, chosen=subset, problems=problems, may_read=may_read)
        subsets.append(replace(found, repeats=subset.dataset.num_repeats, caption=normal_form(printable(subset.class_tokens))))
    return subsets, [*problems, *map(Problem, companions.sentences())]


def subset_tables(folder: Path, *, trigger_word: str, may_read: MayRead | None) -> list[dict[str, Value]]:
    """What a `dataset_config` would say of `folder` and those below it that hold images, to be changed: each with the repeats
    and the words of its name. Raises DatasetError where there is none."""
    tables: list[dict[str, Value]] = []
    for parts, listing in list_tree(folder, may_read=may_read):
        if not any(map(is_masks_folder, parts)) and Companions().images(listing.files):
            repeats, words = (repeats_and_name(parts[-1]) if parts and is_subset_name(parts[-1]) else None) or (1, "")
            own: dict[str, Value] = {"class_tokens": words.strip()} if words.strip() else {}
            tables.append({"image_dir": "/".join(parts) or ".", "num_repeats": repeats, **own,
                           "custom_attributes.trigger_word": trigger_word, "custom_attributes.loss_weight": 1.0})
    if not tables:
        raise DatasetError(f"The dataset folder {folder} holds no pictures", remedy="choose the folder that holds them")
    return tables


def _subset(folder: Path, problems: list[Problem], *, chosen: SubsetSettings, may_read: MayRead | None, companions: Companions,
            above: Sequence[Path]) -> Subset | None:
    """An N_name folder with images; otherwise None, with the reason among the problems. `above` are the files beside it."""
    repeats, name = repeats_and_name(folder.name) or (0, "")
    files, folders = _list(folder, "dataset", may_read=may_read, problems=problems)
    images = tuple(companions.images(files, folders))
    problems += _unused_folders(folder, [f for f in folders if not is_masks_folder(f.name)],
                                f"of {folder.name} only the pictures directly in it are used", may_read)
    if not images or not is_subset_name(folder.name):
        why = "it holds no pictures" if not images else f"it asks for {counted(repeats, 'repeat')}, not 1 to {MOST_REPEATS}"
        problems.append(Problem(f"The folder {folder.name} is ignored: {why}."))
        return None
    found = _with_captions(folder, images, files, chosen=chosen, problems=problems, may_read=may_read, above=above)
    return replace(found, repeats=repeats, caption=normal_form(printable(name.strip())))


def _with_captions(folder: Path, images: Sequence[Path], files: Sequence[Path], *, chosen: SubsetSettings,
                   problems: list[Problem], may_read: MayRead | None, above: Sequence[Path] = ()) -> Subset:
    """A folder's images with their captions among its `files` and `above`; captions that are not read become `problems`."""
    captions = caption_files.find_captions(images, files, above=above, endings=caption_files.endings_of(chosen.captions))
    if not captions.files and not captions.listed:
        problems += map(Problem, caption_files.captions_elsewhere(folder, images, may_read=may_read))
    return Subset(folder, 1, "", tuple(images), captions, chosen)


def _file_bytes(image: Path) -> int:
    """Size of a file; 0 where it cannot be read."""
    try:
        return image.stat().st_size
    except OSError:
        return 0


def _same(one: Path, other: Path) -> bool:
    try:
        return one.resolve() == other.resolve()
    except (OSError, ValueError):  # no name that this system can hold: it is refused where it is listed
        return False


def _list(folder: Path, what: str, *, may_read: MayRead | None, problems: list[Problem]) -> tuple[list[Path], list[Path]]:
    """(files, folders) of a folder; what may not be read becomes one of `problems`."""
    listing = list_folder(folder, what=what, may_read=may_read)
    if listing.refused:
        problems.append(Problem(f"{counted(len(listing.refused), 'entry', 'entries')} of {folder} ignored, because links to "
                                f"folders that are not allowed are not followed: "
                                f"{some_of([path.name for path in listing.refused])}."))
    if listing.dead:
        problems.append(Problem(f"{counted(len(listing.dead), 'entry', 'entries')} of {folder} ignored, because links that "
                                f"lead nowhere are not followed: {some_of([path.name for path in listing.dead])}."))
    return listing.files, listing.folders


def _images_below(folder: Path, names: Collection[str], may_read: MayRead | None) -> dict[PurePath, int]:
    """How many images lie in which folder, seen from `folder`: in those of it called `names` and below them."""
    try:
        tree = list_tree(folder, may_read=may_read) if names else []
    except DatasetError:
        tree = []  # only asked to word a message about folders that are not used
    counts = {PurePath(*parts): sum(map(is_image_name, listing.files)) for parts, listing in tree
              if parts and parts[0] in names and not is_masks_folder(parts[-1])}
    return {path: count for path, count in counts.items() if count}


def _unused_folders(folder: Path, folders: Sequence[Path], why: str, may_read: MayRead | None) -> list[Problem]:
    """A sentence for each of `folders` in `folder` that holds images, in whatever depth."""
    below, problems = _images_below(folder, {unused.name for unused in folders}, may_read), []
    for unused in folders:
        counts = {path.as_posix(): count for path, count in below.items() if path.parts[0] == unused.name}
        if total := sum(counts.values()):
            problems.append(Problem(
                f"{counted(total, 'picture')} in the folder {unused.name} ("
                f"{some_of([f'{path} {count}' for path, count in counts.items()])}) {'is' if total == 1 else 'are'} ignored: "
                f"{why}.", unused))
    return problems
