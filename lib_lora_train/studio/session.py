"""The studio: one open dataset, its captions as edited, and one background task at a time.

Everything a page or a program does to a dataset goes through here, so that two pages see the same and nothing is written
twice. It outlives the page, as the runner does. Quick operations hold one lock; background tasks (`operations.py`) hold it only
to store their results. Paths that come from outside are checked against the host's allowed folders here and nowhere deeper.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from lib_lora_train.dataset.findings import DatasetReport
from lib_lora_train.dataset.plan import plain_folder_repeats
from lib_lora_train.errors import DatasetError, HostError, SettingError, counted, printable
from lib_lora_train.host.port import Host
from lib_lora_train.model.sd.text import split_into_chunks
from lib_lora_train.model.sd.tokens import Tokenizer, clip_tokenizer, tokenizer_from_folder
from lib_lora_train.run.background import TaskRunner
from lib_lora_train.run.runner import Runner
from lib_lora_train.settings import Settings, with_home
from lib_lora_train.settings.allowed_paths import inside
from lib_lora_train.studio import thumbs
from lib_lora_train.studio.captions.edits import Edit, SetCaption, edit_from_dict
from lib_lora_train.studio.dataset_session import DatasetSession
from lib_lora_train.studio.importing.owned import OwnedDataset, list_datasets
from lib_lora_train.studio.requests import Selection
from lib_lora_train.studio.tasks import Tasks

# The dataset that the request under way is about, where it says so. Each request has a context of its own.
_meant: ContextVar[str | None] = ContextVar("dataset_meant", default=None)
_COMMA_BACKTRACK = 20  # the WebUI's default of the option "comma padding backtrack"


class Studio:
    """One for the process: see `studio_for`."""

    def __init__(self, host: Host, runner: Runner) -> None:
        self.host, self.runner, self.tasks = host, runner, Tasks()
        self.second_look: TaskRunner[DatasetReport] = TaskRunner("lora-train-second-look")
        self.reading = threading.Lock()  # held while pictures are looked at; never taken by who waits for `_lock` with it
        self._lock = threading.RLock()
        self._session: DatasetSession | None = None
        self.version = 0  # grows whenever something that a page shows has changed, but for the progress of a task
        self._listed: tuple[object, list[tuple[str, int]]] | None = None
        self._tokenizer: Tokenizer | None = None
        runner.guard(self.refuse_training)
        runner.guard_model(self.refuse_other_model)

    # ---- which dataset

    @contextlib.contextmanager
    def using(self) -> Iterator[DatasetSession]:
        """The open dataset, locked for this thread. Not for anything slow. Raises DatasetError where none is open."""
        with self._lock:
            self._refuse_other()
            if self._session is None:
                raise DatasetError("No dataset is open", remedy="open one or make a new one")
            yield self._session

    def mean(self, name: str | None) -> None:
        """The request under way is about the dataset `name`: where another one is open it is refused with a HostError.
        None: whichever is open."""
        _meant.set(name)

    def _refuse_other(self) -> None:
        name, now = _meant.get(), printable(self._session.dataset.name) if self._session else ""
        if name and name != now:
            raise HostError(f"The dataset {name} is no longer open", why=f"{now} was opened in another page or by a program"
                            if now else "it was closed in another page or by a program", remedy="open it again")

    @contextlib.contextmanager
    def changing(self, doing: str, *, names: Sequence[str] = ()) -> Iterator[DatasetSession]:
        """The same for what writes, moves or removes images, of which `names` must be there. `doing` completes "cannot be …
        now". Raises HostError while a training reads the dataset, or a task works on it, DatasetError for a wrong name.
        """
        with self.using() as session:
            self.refuse_while_training(doing)
            self._refuse_while_busy(doing)
            for name in names:
                session.path(name)
            yield session
            self.changed()

    def _refuse_while_busy(self, doing: str) -> None:
        if self.tasks.running():
            raise HostError(f"Pictures cannot be {doing} now", why=f"the studio is busy ({self.tasks.name()})",
                            remedy="wait for it or stop it first")
        # No file that is to be moved or replaced may be open, on Windows.
        self.second_look.stop()
        with self.reading:
            pass

    @contextlib.contextmanager
    def held(self) -> Iterator[DatasetSession | None]:
        """As `using`, None where nothing is open."""
        with self._lock:
            yield self._session

    def changed(self) -> None:
        """Something that a page shows is different now."""
        with self._lock:
            self.version += 1

    def datasets(self) -> list[tuple[str, int]]:
        """(name, images) of each dataset there is. A page asks every second: they are counted anew only when a folder has
        changed, and not while a task changes them all the time."""
        with self._lock:
            now = _marks(self.host.datasets_folder)
            if self._listed is None or (self._listed[0] != now and not self.tasks.running()):
                self._listed = (now, list_datasets(self.host.datasets_folder))
            here = self._session
            return [(name, len(here.store.images) if here is not None and name == here.dataset.name else count)
                    for name, count in self._listed[1]]

    def create(self, name: str, *, concept: str) -> None:
        """A new, empty dataset, which is opened. Raises DatasetError; HostError while a task runs."""
        with self._lock:
            self._refuse_leaving(discard=False)
            self._enter(OwnedDataset.create(self.host.datasets_folder, name, concept=concept))

    def open(self, name: str, *, discard: bool = False) -> tuple[str, ...]:
        """Open the dataset called `name`; returns what was mended meanwhile, such as a save that was interrupted, a sentence
        each. Captions of the open one that are not saved keep it open, unless `discard`."""
        with self._lock:
            if self._session is not None and self._session.dataset.name == name and not discard:
                return ()
            # A name of the list, never a path.
            if name not in (known for known, _ in self.datasets()):
                raise DatasetError(f"There is no dataset called {name!r}", remedy="see the list of datasets")
            folder = self.host.datasets_folder / name
            if self.host.allowed is not None and not self.host.allowed.may_read(folder):
                raise DatasetError(f"The dataset {name} cannot be used", why="it is a link to a folder that is not allowed")
            self._refuse_leaving(discard=discard)
            return self._enter(OwnedDataset.open(folder)).store.notes

    def close(self, *, discard: bool = False) -> None:
        """Leave the dataset. Refused as `open` refuses."""
        with self._lock:
            self._refuse_other()
            self._refuse_leaving(discard=discard)
            self._session = None
            self.changed()

    def _refuse_leaving(self, *, discard: bool) -> None:
        """Raises HostError where the open dataset has to stay. It is left when the next one could be opened, not before."""
        if self._session is None:
            return
        if discard:  # what was seen to be unsaved is that of the dataset that was meant
            self._refuse_other()
        if self.tasks.running():
            raise HostError(f"The dataset {self._session.dataset.name} stays open",
                            why=f"the studio is busy ({self.tasks.name()})", remedy="wait for it or stop it first")
        unsaved = self._session.store.unsaved
        if unsaved and not discard:
            raise HostError(f"{counted(unsaved, 'caption is', 'captions are')} not saved in {self._session.dataset.name}",
                            remedy="save or undo first")

    def _enter(self, dataset: OwnedDataset) -> DatasetSession:
        self._session = session = DatasetSession(dataset, allowed=self.host.allowed)
        self.changed()
        return session

    # ---- captions

    def edit(self, values: dict[str, Any], selection: Selection) -> int:
        """Do an edit to the selected captions, one step to undo; how many changed. Nothing is written."""
        tokenizer = self.tokenizer() if values.get("kind") == "truncate_tokens" else None
        return self._apply(edit_from_dict(values, tokenizer=tokenizer), selection)

    def caption(self, name: str, text: str) -> int:
        """Replace one caption; whether it changed, as 0 or 1."""
        return self._apply(SetCaption(text), Selection((name,)))

    def _apply(self, edit: Edit, selection: Selection) -> int:
        with self.using() as session:
            changed = session.store.apply(edit, session.chosen(selection))
            if changed:
                session.renew()
                self.changed()
            return changed

    def step(self, *, back: bool) -> str:
        """Undo the last step, or redo the one that was undone last; its label, "" where there is none. Removed images come
        back with it, or go, which is refused while a task or a training uses them, as every change of images is."""
        with self.using() as session:
            before = set(session.names)
            label = session.store.undo() if back else session.store.redo()
            if label:
                session.renew(before ^ set(session.names))
                self.changed()
            return label

    def save(self, *, overwrite: bool = False) -> dict[str, Any]:
        """Write the changed captions: {"written": n, "conflicts": names}. Files that another program changed meanwhile are
        not written but named, unless `overwrite`. Raises HostError while a training reads the dataset."""
        with self.using() as session:
            self.refuse_while_training("saved")
            saved = session.store.save(overwrite=overwrite)
            self.changed()
            return {"written": saved.written, "conflicts": [path.name for path in saved.conflicts]}

    def tokens(self, text: str) -> tuple[int, int]:
        """(tokens, chunks of 75 as the WebUI cuts them) of a caption."""
        tokenizer = self.tokenizer()
        tokens = tokenizer.encode(text)
        return len(tokens), len(split_into_chunks(tokens, comma=tokenizer.comma, backtrack=_COMMA_BACKTRACK))

    def tokenizer(self) -> Tokenizer:
        """CLIP's, read once. Raises HostError where open_clip is not there, ModelError where the host's files are damaged."""
        if self._tokenizer is None:
            try:
                folder = self.host.tokenizer_folder()
                self._tokenizer = tokenizer_from_folder(folder) if folder else clip_tokenizer()
            except ImportError as error:
                raise HostError("Tokens cannot be counted", why=f"open_clip cannot be loaded ({error})") from error
        return self._tokenizer

    # ---- images

    def thumbnail(self, name: str) -> bytes:
        """A small image as JPEG."""
        with self.using() as session:
            kept = session.dataset.studio_folder / "thumbs"
        return self._read(name, lambda path: thumbs.thumbnail(path, kept))

    def image(self, name: str) -> bytes:
        """An image in full size as JPEG."""
        return self._read(name, thumbs.full_size)

    def _read(self, name: str, made: Callable[[Path], bytes]) -> bytes:
        """What `made` makes of an image. Nothing is locked meanwhile, so the folder may get its new name in between."""
        with self.using() as session:
            path = session.path(name)
        try:
            return made(path)
        except DatasetError:
            with self.using() as session:
                now = session.path(name)
            if now == path:
                raise
            return made(now)

    def remove(self, names: Sequence[str]) -> int:
        """Take images out; undo brings them back. How many there were."""
        with self.changing("removed") as session:
            for name in names:
                session.index(name)  # also of a link that may not be read
            session.dataset.remove(names)
            return self.removed(session, names)

    def hold_out(self, selection: Selection, held_out: bool | None) -> int:
        """Hold images out of training, train on them, or leave them to the draw (None); how many are held out now. It is
        written at once and is no step to undo. Raises DatasetError where they cannot be held out."""
        with self.using() as session:
            session.hold_out(session.chosen_names(selection), held_out)
            self.changed()
            return len(session.held_out)

    def removed(self, session: DatasetSession, names: Sequence[str]) -> int:
        """These images were moved out of the folder: tell the store, and how to bring them back. Returns how many."""
        def move(back: bool) -> None:
            self.refuse_while_training("moved")
            self._refuse_while_busy("moved")
            (session.dataset.restore if back else session.dataset.remove)(names)

        count = session.store.remove([session.index(name) for name in names], move=move)
        session.renew()
        return count

    def family(self) -> str:
        """The family of the model that is loaded, "" for none."""
        checkpoint = self.host.checkpoint()
        return checkpoint.family if checkpoint else ""

    # ---- training

    def use(self) -> dict[str, Any]:
        """Save the captions, set the repeats as proposed, and return the settings to train with.

        Raises DatasetError for an empty dataset, HostError where captions were changed by another program, or as `changing`.
        """
        with self.changing("used for a training") as session:
            if not session.store.images:
                raise DatasetError("There is no picture in the dataset", remedy="add pictures first")
            saved = self.save()
            if saved["conflicts"]:
                raise HostError(f"Captions were changed by another program: {', '.join(saved['conflicts'][:5])}",
                                remedy="save them once more, over what is there, or open the dataset anew")
            proposal = session.report.proposal if session.report is not None and session.fresh else None
            repeats = proposal.repeats if proposal else proposed_repeats(session.trained)
            epochs = proposal.epochs if proposal else Settings().optimizer.max_train_epochs
            session.set_repeats(repeats)
            # The folder's name says the repeats; the setting beside it would only be warned of.
            return {"train_data_dir": str(session.dataset.folder), "trigger_word": session.dataset.concept,
                    "num_repeats": 0, "max_train_epochs": epochs, "repeats": repeats}

    def refuse_while_training(self, doing: str) -> None:
        """Raise HostError while a training reads the open dataset, or something in it."""
        settings = self.runner.settings() if self.runner.running() else {}
        with self.using() as session:
            read = [str(settings.get(name, "")) for name in ("train_data_dir", "reg_data_dir")]
            if any(path and _overlap(path, session.dataset.folder) for path in read):
                raise HostError(f"The dataset {session.dataset.name} cannot be {doing} now",
                                why="a training is running on it", remedy="wait for it or stop it first")

    def refuse_training(self, settings: Settings) -> None:
        """Raise HostError for a training that would read the open dataset while a task works on it, or needs the model while
        a task uses it."""
        if not self.tasks.running():
            return
        with self.held() as session:
            read = (settings.dataset.train_data_dir, settings.dataset.reg_data_dir)
            ours = session is not None and any(path and _overlap(path, session.dataset.folder) for path in read)
        if ours or self.tasks.with_model():
            self._refuse_busy()

    def refuse_other_model(self) -> None:
        """Raise HostError while a task uses the model."""
        if self.tasks.with_model():
            self._refuse_busy()

    def _refuse_busy(self) -> NoReturn:
        raise HostError("The training cannot start now", why=f"the studio is busy ({self.tasks.name()})",
                        remedy="wait for it or stop it first")

    # ---- paths from outside

    def allowed(self, text: str) -> Path:
        """The file or folder at `text`, within the allowed folders; the refusal is the same whether or not it exists."""
        path = with_home(text.strip().strip('"'))
        if not path or "\0" in path:
            raise SettingError("No folder was named", remedy="write the path of a folder, a picture or a zip file")
        allowed = self.host.allowed
        if allowed is not None and not inside(path, allowed.reading):
            raise SettingError(f"{path} cannot be used", why="others can reach this page, so it keeps to the folders it is "
                               "allowed", remedy=f"choose a folder in {' or '.join(map(str, allowed.reading))}; "
                               f"{allowed.advice}")
        if not os.path.exists(path):
            raise DatasetError(f"{path} does not exist", remedy="check the path")
        return Path(path)


def proposed_repeats(images: int) -> int:
    """By the rule of plain folders: at least 100 times an image and 1500 times in all, over the usual epochs."""
    return plain_folder_repeats(images, max_train_epochs=Settings().optimizer.max_train_epochs)


def _marks(folder: Path) -> tuple[tuple[str, int], ...]:
    """What changes when a dataset is added or removed, or gets or loses a file: times of its folder and of those in it."""
    found = []
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        with contextlib.suppress(OSError):  # gone meanwhile, or not for us
            found.append((str(path), path.stat().st_mtime_ns))
    return tuple(sorted(found))


def _overlap(path: str, folder: Path) -> bool:
    return inside(path, (folder,)) or inside(str(folder), (Path(path),))


@functools.lru_cache(maxsize=1)
def studio_for(host: Host, runner: Runner) -> Studio:
    """The process's one studio: the same for the same host and runner, however often the page is rebuilt."""
    return Studio(host, runner)
