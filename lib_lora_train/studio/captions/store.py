"""The captions of a dataset in memory: filtered, edited, taken back, and written when asked, all or none.

A picture is named by its place in `images`, which follows the folder's order and changes when pictures are taken out or
brought in. Nothing is written before `save`. Not for several threads at once: the studio holds one lock around it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib_lora_train.dataset.captions import split_tags
from lib_lora_train.dataset.listing import MayRead
from lib_lora_train.errors import SettingError, printable, translated
from lib_lora_train.studio.captions.edits import Edit
from lib_lora_train.studio.captions.files import (
    Found,
    OnDisk,
    find_among,
    find_images,
    is_forbidden,
    one_line,
    read_on_disk,
)
from lib_lora_train.studio.captions.filter import Filter
from lib_lora_train.studio.captions.history import History, Step
from lib_lora_train.studio.captions.save import STUDIO, Rewrite, content_of, recover, write_captions
from lib_lora_train.studio.requests import MOST_CHARACTERS


@dataclass(frozen=True)
class Saved:
    """What a save did."""

    written: int  # caption files
    backup: Path | None  # a zip of what they held before; None where nothing was written
    conflicts: tuple[Path, ...] = ()  # files that another program changed meanwhile: left alone, still unsaved


class CaptionStore:
    """See the module. Made by `open`.

    Inside, pictures and caption files have numbers that never change; a picture's number leads to that of its caption
    file, which two pictures of one name (a.png, a.jpg) share.
    """

    def __init__(self, folder: Path, *, may_read: MayRead | None = None) -> None:
        self.folder = folder
        self.notes: tuple[str, ...] = ()  # what happened while opening, a sentence each
        self._may_read = may_read
        self._all: list[Path] = []  # by picture number
        self._slot: list[int] = []  # picture number -> caption number
        self._numbers: dict[Path, int] = {}
        self._files: list[Path] = []  # by caption number, and so are the next three
        self._passed_over: dict[int, tuple[Path, ...]] = {}
        self._disk: list[OnDisk] = []
        self._texts: list[str | None] = []  # None: the file cannot be read
        self._slots: dict[str, int] = {}
        self._changed: set[int] = set()
        self._shown: list[int] = []  # picture numbers, in order
        self._images: tuple[Path, ...] = ()
        self._places: dict[Path, int] = {}
        self._shown_slots: set[int] = set()
        self._history = History()

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
        """The pictures, by folder and name."""
        return self._images

    def __len__(self) -> int:
        return len(self._shown)

    def index(self, image: Path) -> int | None:
        """The place of a picture; None if it is not among `images`."""
        return self._places.get(image)

    def caption(self, index: int) -> str:
        """One line; "" where there is none, or none that can be read."""
        return self._texts[self._slot[self._shown[index]]] or ""

    def caption_file(self, index: int) -> Path:
        """The file the caption is kept in, whether or not it exists yet."""
        return self._files[self._slot[self._shown[index]]]

    def is_changed(self, index: int) -> bool:
        """Whether the caption differs from what is saved."""
        return self._slot[self._shown[index]] in self._changed

    def problem(self, index: int) -> str:
        """Why the caption's file cannot be read, one sentence, or "". Such a file stays as it is until its caption is set."""
        slot = self._slot[self._shown[index]]
        return self._disk[slot].problem if self._texts[slot] is None else ""

    def hint(self, index: int) -> str:
        """What is odd about a caption's file that can be read, one sentence, or ""."""
        slot = self._slot[self._shown[index]]
        name = printable(self._files[slot].name)
        if self._passed_over.get(slot):
            return f"{printable(self._passed_over[slot][0].name)} does not count, because there is {name} too."
        return f"Only the first line of {name} is used." if self._disk[slot].rest.strip() else ""

    def select(self, wanted: Filter) -> list[int]:
        """The indices of the images that `wanted` accepts.

        Raises SettingError for a regular expression that is wrong or takes too long.
        """
        accepts = wanted.accepts()
        return [index for index in range(len(self))
                if (self.is_changed(index) or not wanted.changed_only) and accepts(self.caption(index))]

    def tags(self, indices: Iterable[int] | None = None) -> list[tuple[str, int]]:
        """(tag, pictures that carry it), the most frequent first, then by name.

        Spellings that differ in case only are one tag, shown as it is written most often.
        """
        spellings: Counter[str] = Counter()
        for index in range(len(self)) if indices is None else indices:
            spellings.update({tag.casefold(): tag for tag in split_tags(self.caption(index))}.values())
        counts: Counter[str] = Counter()
        shown: dict[str, str] = {}
        for tag, count in sorted(spellings.items(), key=lambda item: (-item[1], item[0])):
            counts[tag.casefold()] += count
            shown.setdefault(tag.casefold(), tag)
        return [(shown[key], count) for key, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]

    # ---- editing

    def apply(self, edit: Edit, indices: Iterable[int]) -> int:
        """One edit of these captions as one step; returns how many it changed. Captions that cannot be read are passed over
        unless the edit replaces them. Raises SettingError; then nothing is changed.
        """
        change = edit.change(lambda: (self._texts[slot] or "" for slot in self._shown_slots))
        texts = {slot: _checked(change(text or ""), before=text or "") for slot in self._slots_of(indices)
                 if (text := self._texts[slot]) is not None or edit.replaces_unreadable}
        return self._do(edit.label, texts)

    def set_captions(self, captions: Mapping[int, str], label: str) -> int:
        """New captions for these places as one step; returns how many changed. Raises SettingError for an endless one."""
        texts = {slot: _checked(text, before="") for index, text in captions.items() for slot in self._slots_of([index])}
        return self._do(label, texts)

    def undo(self) -> str:
        """Take the last step back; returns its label, "" where there is none."""
        if not self._history.done:
            return ""
        step = self._history.done[-1]
        if step.before_undo is not None:
            step.before_undo()
        self._set({slot: before for slot, (before, _) in step.texts.items()})
        self._show(set(self._shown) | step.removed)
        self._history.undone_last()
        return step.label

    def redo(self) -> str:
        """Do again what was taken back; returns its label, "" where there is none."""
        if not self._history.undone:
            return ""
        step = self._history.undone[-1]
        if step.before_redo is not None:
            step.before_redo()
        self._set({slot: after for slot, (_, after) in step.texts.items()})
        self._show(set(self._shown) - step.removed)
        self._history.redone_last()
        return step.label

    @property
    def can_undo(self) -> str:
        """The label of the step that `undo` takes back, or ""."""
        return self._history.done[-1].label if self._history.done else ""

    @property
    def can_redo(self) -> str:
        """The label of the step that `redo` does again, or ""."""
        return self._history.undone[-1].label if self._history.undone else ""

    @property
    def unsaved(self) -> int:
        """How many captions differ from what is saved."""
        return len(self._changed & self._shown_slots)

    # ---- pictures that come and go

    def add(self, images: Iterable[Path]) -> int:
        """Pictures that lie in the folder now: known to the book from here on, with their captions. Not a step."""
        wanted = [image for image in images if self.index(image) is None]
        known = {self._numbers[image] for image in wanted if image in self._numbers}
        before = len(self)
        self._show(set(self._shown) | known)
        self._add(find_among([image for image in wanted if image not in self._numbers], may_read=self._may_read))
        return len(self) - before

    def remove(self, indices: Iterable[int], *, before_undo: Callable[[], None] | None = None,
               before_redo: Callable[[], None] | None = None) -> int:
        """Pictures that the caller has moved out of the folder, as one step. `undo` calls `before_undo` first and `redo`
        `before_redo`: what they raise leaves the book as it is. Captions not yet saved come back with them."""
        gone = frozenset(self._shown[index] for index in indices)
        if gone:
            self._show(set(self._shown) - gone)
            label = f"Remove {len(gone)} picture{'s' if len(gone) > 1 else ''}"
            self._history.push(Step(label, removed=gone, before_undo=before_undo, before_redo=before_redo))
        return len(gone)

    def moved(self, old: Path, new: Path) -> None:
        """A folder that holds pictures (or the dataset itself) was renamed; everything else stays."""
        def there(path: Path) -> Path:
            return new / path.relative_to(old) if old in path.parents else path
        self.folder = new if self.folder == old else there(self.folder)
        self._all, self._files = list(map(there, self._all)), list(map(there, self._files))
        self._passed_over = {slot: tuple(map(there, paths)) for slot, paths in self._passed_over.items()}
        self._numbers = {path: number for number, path in enumerate(self._all)}
        self._slots = {_file_key(path): slot for slot, path in enumerate(self._files)}
        self._show(set(self._shown))

    # ---- the disk

    def save(self, backup_folder: Path | None = None, *, overwrite: bool = False) -> Saved:
        """Write what changed, all or none (see `book_save`). What stood there goes into a zip in `backup_folder`, by default
        .studio/backup of the dataset; the last ten are kept.

        A caption file that another program changed since it was read is not overwritten, unless told to, and named.
        Raises OutputError if the disk refuses; saving again, or opening the folder again, then goes on.
        """
        self._recover()
        rewrites, slots, conflicts = [], [], []
        with translated("the captions were compared with the disk"):
            for slot in sorted(self._changed & self._shown_slots):
                path, disk = self._files[slot], self._read(self._files[slot])
                text = (self._texts[slot] or "") + (self._disk[slot].rest if self._texts[slot] else "")
                if disk.text == text:  # somebody wrote the same
                    self._now_on_disk(slot, disk)
                elif (is_forbidden(path, self._may_read) or not path.parent.is_dir()
                      or (not overwrite and disk != self._disk[slot])):
                    conflicts.append(path)
                else:
                    rewrites.append(Rewrite(path, text, content_of(path)))
                    slots.append(slot)
        if not rewrites:
            return Saved(0, None, tuple(conflicts))
        backup = write_captions(self.folder, rewrites, backup_folder=backup_folder, may_read=self._may_read)
        for slot, rewrite in zip(slots, rewrites, strict=True):
            self._now_on_disk(slot, OnDisk(rewrite.new.strip()))
        return Saved(len(rewrites), backup, tuple(conflicts))

    # ---- inside

    def _read(self, path: Path) -> OnDisk:
        return read_on_disk(path, may_read=self._may_read)

    def _recover(self) -> None:
        done = recover(self.folder, may_read=self._may_read)
        for path in done.written:
            slot = self._slots.get(_file_key(path))
            if slot is not None:
                self._now_on_disk(slot, self._read(path))
        if done.written and not self._files:
            self.notes += (f"A save that was interrupted was finished: {_captions(len(done.written))}.",)
        if done.conflicts:
            kept = printable(str(self.folder / STUDIO / "backup"))
            self.notes += (f"An interrupted save could not be finished for {_captions(len(done.conflicts))} that another "
                           f"program changed since; what was to be written is kept in {kept}.",)

    def _add(self, found: Sequence[Found]) -> None:
        shown = set(self._shown)
        for entry in found:
            key = _file_key(entry.caption)
            slot = self._slots.get(key)
            if slot is None:
                slot = self._slots[key] = len(self._files)
                disk = self._read(entry.caption)
                self._files.append(entry.caption)
                self._disk.append(disk)
                self._texts.append(disk.caption)
                if entry.passed_over:
                    self._passed_over[slot] = entry.passed_over
            number = self._numbers[entry.image] = len(self._all)
            self._all.append(entry.image)
            self._slot.append(slot)
            shown.add(number)
        self._show(shown)

    def _show(self, numbers: set[int]) -> None:
        self._shown = sorted(numbers, key=self._order)
        self._images = tuple(self._all[number] for number in self._shown)
        self._places = {path: place for place, path in enumerate(self._images)}
        self._shown_slots = {self._slot[number] for number in self._shown}

    def _order(self, number: int) -> tuple[str, str, str, str]:
        path = self._all[number]
        parent = path.parent.name
        return parent.casefold(), parent, path.name.casefold(), path.name

    def _slots_of(self, indices: Iterable[int]) -> list[int]:
        return list(dict.fromkeys(self._slot[self._shown[index]] for index in indices))

    def _do(self, label: str, texts: Mapping[int, str | None]) -> int:
        """One step from what really changes; nothing changed, no step."""
        changed = {slot: (self._texts[slot], text) for slot, text in texts.items() if text != self._texts[slot]}
        if changed:
            self._set({slot: after for slot, (_, after) in changed.items()})
            self._history.push(Step(label, changed))
        return len(changed)

    def _set(self, texts: Mapping[int, str | None]) -> None:
        for slot, text in texts.items():
            self._texts[slot] = text
            (self._changed.discard if text == self._disk[slot].caption else self._changed.add)(slot)

    def _now_on_disk(self, slot: int, disk: OnDisk) -> None:
        self._disk[slot] = disk
        self._set({slot: self._texts[slot]})


def _checked(text: str, *, before: str) -> str:
    if len(text) > max(MOST_CHARACTERS, len(before)):
        raise SettingError(f"A caption would be longer than {MOST_CHARACTERS} characters", remedy="replace with less")
    return one_line(text)


def _captions(number: int) -> str:
    return "1 caption" if number == 1 else f"{number} captions"


def _file_key(path: Path) -> str:
    """The same for two spellings of one file on Windows."""
    return os.path.normcase(path)

