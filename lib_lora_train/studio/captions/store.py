"""The captions of a dataset in memory: filtered, edited, undone and redone, and written when told to, all or none.

An image is named by its index in `images`, which follows the folder's order and changes when images are removed or added.
Nothing is written before `save`. Not for several threads at once: the studio holds one lock around it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lib_lora_train.dataset.captions import count_tags
from lib_lora_train.dataset.listing import MayRead, by_name
from lib_lora_train.errors import DatasetError, SettingError, counted, printable, translated
from lib_lora_train.settings import named
from lib_lora_train.studio.captions.edits import Edit
from lib_lora_train.studio.captions.files import (
    Found,
    OnDisk,
    find_images,
    is_forbidden,
    one_line,
    read_on_disk,
)
from lib_lora_train.studio.captions.filter import Filter
from lib_lora_train.studio.captions.save import STUDIO_FOLDER, Rewrite, content_of, recover, write_captions
from lib_lora_train.studio.requests import MOST_CHARACTERS

_MOST_STEPS = 200  # that can be undone
_MOST_KEPT = 64 << 20  # characters of all their texts; the oldest steps go first, the newest always stays


@dataclass(frozen=True)
class Saved:
    """What a save did."""

    written: int  # caption files
    backup: Path | None  # a zip of what they held before; None where nothing was written
    conflicts: tuple[Path, ...] = ()  # files that another program changed meanwhile: not written, still unsaved


@dataclass(eq=False)
class _Caption:
    """One caption file; two images of one name (a.png, a.jpg) share it."""

    file: Path
    disk: OnDisk
    passed_over: tuple[Path, ...]
    inherited: str = ""  # from a JSON file, which stays as it is: a change is saved in `file`
    text: str | None = field(init=False)  # None: the file cannot be read
    saved: str | None = field(init=False)

    def __post_init__(self) -> None:
        self.text = self.saved = self.disk.caption if self.disk.problem else self.disk.caption or self.inherited

    def on_disk(self, disk: OnDisk) -> None:
        """The file holds something else now."""
        self.disk, self.saved = disk, disk.caption


@dataclass(eq=False)
class _Image:
    """An image that is or was in the folder."""

    path: Path
    caption: _Caption

    @property
    def order(self) -> tuple[str, str, str, str]:
        return self.path.parent.name.casefold(), self.path.parent.name, *by_name(self.path)


@dataclass(frozen=True)
class _Step:
    """One change that can be undone: captions before and after, or images that were removed."""

    label: str
    texts: Mapping[_Caption, tuple[str | None, str | None]] = field(default_factory=dict)
    removed: frozenset[_Image] = frozenset()
    move: Callable[[bool], None] = lambda back: None  # called before the images come back (True) or go once more (False)

    @cached_property
    def size(self) -> int:
        """Characters it keeps in memory."""
        return sum(len(before or "") + len(after or "") for before, after in self.texts.values())


class CaptionStore:
    """See the module. Made by `open`."""

    def __init__(self, folder: Path, *, may_read: MayRead | None = None) -> None:
        self.folder = folder
        self.notes: tuple[str, ...] = ()  # what happened while opening, a sentence each
        self._may_read = may_read
        self._known: dict[Path, _Image] = {}  # also those that were removed
        self._captions: dict[str, _Caption] = {}  # by `_file_key`
        self._shown: list[_Image] = []
        self._images: tuple[Path, ...] = ()
        self._index: dict[Path, int] = {}
        self._done: list[_Step] = []
        self._undone: list[_Step] = []

    @classmethod
    def open(cls, folder: Path | str, *, may_read: MayRead | None = None) -> CaptionStore:
        """The captions of a dataset folder (ours, kohya's, or plain); a save that was interrupted is finished first.

        Raises DatasetError if the folder is missing or cannot be read, OutputError if that save cannot be finished.
        """
        store = cls(Path(folder), may_read=may_read)
        store._recover()
        store._add(find_images(store.folder, may_read=may_read))
        return store

    # ---- reading

    @property
    def images(self) -> tuple[Path, ...]:
        """The images, by folder and name."""
        return self._images

    def __len__(self) -> int:
        return len(self._shown)

    def index(self, image: Path) -> int | None:
        """The index of an image; None if it is not among `images`."""
        return self._index.get(image)

    def caption(self, index: int) -> str:
        """One line; "" where there is none, or none that can be read."""
        return self._shown[index].caption.text or ""

    def readable_caption(self, index: int) -> str:
        """The same; raises DatasetError for one that cannot be read."""
        if problem := self.problem(index):
            raise DatasetError(problem)
        return self.caption(index)

    def is_changed(self, index: int) -> bool:
        """Whether the caption differs from what is saved."""
        caption = self._shown[index].caption
        return caption.text != caption.saved

    def problem(self, index: int) -> str:
        """Why the caption's file cannot be read, one sentence, or "". Such a file stays as it is until its caption is set."""
        caption = self._shown[index].caption
        return caption.disk.problem if caption.text is None else ""

    def hint(self, index: int) -> str:
        """What is odd about a caption's file that can be read, one sentence, or ""."""
        caption = self._shown[index].caption
        name = printable(caption.file.name)
        if caption.passed_over:
            return f"{printable(caption.passed_over[0].name)} does not count, because there is {name} too."
        if caption.disk.encoding:
            return f"{name} is read as {caption.disk.encoding}: see that it is right. A change is saved as UTF-8."
        return f"Of {name} the first line is edited; without {named('enable_wildcard')} only that is used." if (
            caption.disk.rest.strip()) else ""

    def select(self, wanted: Filter) -> list[int]:
        """The indices of the images that `wanted` accepts.

        Raises SettingError for a regular expression that is wrong or takes too long.
        """
        accepts = wanted.accepts()
        return [index for index in range(len(self))
                if (self.is_changed(index) or not wanted.changed_only) and accepts(self.caption(index))]

    def tags(self, indices: Iterable[int] | None = None) -> list[tuple[str, int]]:
        """(tag, images that carry it), the most frequent first, then by name."""
        chosen = range(len(self)) if indices is None else indices
        return list(count_tags(map(self.caption, chosen)).items())

    # ---- editing

    def apply(self, edit: Edit, indices: Iterable[int]) -> int:
        """One edit of these captions as one step; returns how many it changed. Captions that cannot be read are passed over
        unless the edit replaces them. Raises SettingError; then nothing is changed.
        """
        change = edit.change(lambda: (caption.text or "" for caption in self._captions_of(range(len(self)))))
        texts = {caption: _checked(change(caption.text or ""), before=caption.text or "")
                 for caption in self._captions_of(indices) if caption.text is not None or edit.replaces_unreadable}
        return self._do(edit.label(), texts)

    def set_captions(self, captions: Mapping[int, str], label: str) -> int:
        """New captions by index as one step; returns how many changed. Raises SettingError for one that is too long."""
        return self._do(label, {self._shown[index].caption: _checked(text, before="") for index, text in captions.items()})

    def undo(self) -> str:
        """Revert the last step; returns its label, "" where there is none."""
        return self._move(self._done, self._undone, back=True)

    def redo(self) -> str:
        """Redo the step that was undone last; returns its label, "" where there is none."""
        return self._move(self._undone, self._done, back=False)

    def _move(self, steps: list[_Step], onto: list[_Step], *, back: bool) -> str:
        if not steps:
            return ""
        step = steps[-1]
        if step.removed:
            step.move(back)
        for caption, texts in step.texts.items():
            caption.text = texts[0 if back else 1]
        self._show([*self._shown, *step.removed] if back else set(self._shown) - step.removed)
        onto.append(steps.pop())
        return step.label

    @property
    def can_undo(self) -> str:
        """The label of the step that `undo` reverts, or ""."""
        return self._done[-1].label if self._done else ""

    @property
    def can_redo(self) -> str:
        """The label of the step that `redo` applies, or ""."""
        return self._undone[-1].label if self._undone else ""

    @property
    def unsaved(self) -> int:
        """How many captions differ from what is saved."""
        return len(self._unsaved())

    # ---- images that come and go

    def add(self, images: Iterable[Path]) -> int:
        """Images that are in the folder now: known from here on, with their captions. Not a step. Returns how many are new."""
        before, wanted = len(self), set(images)
        self._show([*self._shown, *(self._known[image] for image in wanted if image in self._known)])
        self._add([found for found in find_images(self.folder, may_read=self._may_read)
                   if found.image in wanted and found.image not in self._known])
        return len(self) - before

    def reread(self, images: Iterable[Path]) -> None:
        """The captions of these images were written by an import: known from here on, unless they were edited meanwhile."""
        for image in images:
            if known := self._known.get(image):
                unsaved, caption = known.caption.text != known.caption.saved, known.caption
                caption.on_disk(self._read(caption.file))
                caption.text = caption.text if unsaved else caption.saved

    def remove(self, indices: Iterable[int], *, move: Callable[[bool], None]) -> int:
        """Images that the caller has moved out of the folder, as one step. `undo` calls `move(True)`, which moves them back,
        and `redo` `move(False)`: what it raises leaves the captions as they are. Captions not yet saved come back too."""
        gone = frozenset(self._shown[index] for index in indices)
        if gone:
            self._show(set(self._shown) - gone)
            self._push(_Step(f"Remove {counted(len(gone), 'picture')}", removed=gone, move=move))
        return len(gone)

    def moved(self, old: Path, new: Path) -> None:
        """A folder that holds images (or the dataset itself) was renamed; everything else stays."""
        def there(path: Path) -> Path:
            return new / path.relative_to(old) if old in path.parents else path
        self.folder = new if self.folder == old else there(self.folder)
        for image in self._known.values():
            image.path = there(image.path)
        for caption in self._captions.values():
            caption.file, caption.passed_over = there(caption.file), tuple(map(there, caption.passed_over))
        self._known = {image.path: image for image in self._known.values()}
        self._captions = {_file_key(caption.file): caption for caption in self._captions.values()}
        self._show(self._shown)

    # ---- the disk

    def save(self, *, overwrite: bool = False) -> Saved:
        """Write what changed, all or none (see `save.py`). What the files held goes into a zip in .studio/backup of the
        dataset; the last ten are kept.

        A caption file that another program changed since it was read is not overwritten, unless told to, and named.
        Raises OutputError if the disk refuses; saving once more, or opening the folder once more, then goes on.
        """
        self._recover()
        rewrites: dict[_Caption, Rewrite] = {}
        conflicts = []
        with translated("the captions were compared with the disk"):
            for caption in self._unsaved():
                path, disk = caption.file, self._read(caption.file)
                text = (caption.text or "") + (caption.disk.rest if caption.text else "")
                if disk.text == text:  # another program wrote the same
                    caption.on_disk(disk)
                elif (is_forbidden(path, self._may_read) or not path.parent.is_dir()
                      or (not overwrite and disk != caption.disk)):
                    conflicts.append(path)
                else:
                    rewrites[caption] = Rewrite(path, text, content_of(path))
        if not rewrites:
            return Saved(0, None, tuple(conflicts))
        backup = write_captions(self.folder, list(rewrites.values()), may_read=self._may_read)
        for caption, rewrite in rewrites.items():
            caption.on_disk(OnDisk(rewrite.new.strip()))
        return Saved(len(rewrites), backup, tuple(conflicts))

    # ---- inside

    def _read(self, path: Path) -> OnDisk:
        return read_on_disk(path, may_read=self._may_read)

    def _recover(self) -> None:
        done = recover(self.folder, may_read=self._may_read)
        for path in done.written:
            if caption := self._captions.get(_file_key(path)):
                caption.on_disk(self._read(path))
        if done.written and not self._captions:
            self.notes += (f"A save that was interrupted was finished: {counted(len(done.written), 'caption')}.",)
        if done.conflicts:
            kept = printable(str(self.folder / STUDIO_FOLDER / "backup"))
            self.notes += (f"An interrupted save could not be finished for {counted(len(done.conflicts), 'caption')} that "
                           f"another program changed since; what was to be written is kept in {kept}.",)

    def _add(self, found: Sequence[Found]) -> None:
        for entry in found:
            key = _file_key(entry.caption)
            if key not in self._captions:
                self._captions[key] = _Caption(entry.caption, self._read(entry.caption), entry.passed_over, entry.inherited)
            self._known[entry.image] = _Image(entry.image, self._captions[key])
        self._show([*self._shown, *(self._known[entry.image] for entry in found)])

    def _show(self, images: Iterable[_Image]) -> None:
        self._shown = sorted(set(images), key=lambda image: image.order)
        self._images = tuple(image.path for image in self._shown)
        self._index = {path: index for index, path in enumerate(self._images)}

    def _captions_of(self, indices: Iterable[int]) -> list[_Caption]:
        return list(dict.fromkeys(self._shown[index].caption for index in indices))

    def _unsaved(self) -> list[_Caption]:
        return [caption for caption in self._captions_of(range(len(self))) if caption.text != caption.saved]

    def _push(self, step: _Step) -> None:
        """A new step; what had been undone can no longer be redone."""
        self._undone.clear()
        self._done.append(step)
        while len(self._done) > 1 and (len(self._done) > _MOST_STEPS or sum(step.size for step in self._done) > _MOST_KEPT):
            del self._done[0]

    def _do(self, label: str, texts: Mapping[_Caption, str]) -> int:
        """One step from what really changes; nothing changed, no step."""
        changed = {caption: (caption.text, text) for caption, text in texts.items() if text != caption.text}
        for caption, (_, after) in changed.items():
            caption.text = after
        if changed:
            self._push(_Step(label, changed))
        return len(changed)


def _checked(text: str, *, before: str) -> str:
    if len(text) > max(MOST_CHARACTERS, len(before)):
        raise SettingError(f"A caption would be longer than {MOST_CHARACTERS} characters", remedy="replace with less")
    return one_line(text)


def _file_key(path: Path) -> str:
    """The same for two spellings of one file on Windows."""
    return os.path.normcase(path)
