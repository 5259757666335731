"""Which text belongs to which image, for `check`, `train`, `prepare` and the studio alike.

    a.txt, a.caption                of a.png, and of a.jpg beside it
    a.png.txt, a.png.caption        of a.png only
    a.json, a.png.json              {"caption": …, "tags": […]}
    another .json                   kohya's metadata: {"a": {"caption": …, "tags": …}}, or a list of such
    .jsonl                          Hugging Face's: {"file_name": "a.png", "text": …} a line

Names that differ in case or in how accents are written are one, unless each has a partner of its own. The first that holds a
caption counts. Metadata may also lie in the folder above.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lib_lora_train.dataset.captions import first_line_and_rest, normal_form, split_tags
from lib_lora_train.dataset.images import is_image_name
from lib_lora_train.dataset.listing import MayRead, file_key, list_folder
from lib_lora_train.dataset.text_files import CAPTION_SUFFIXES, read_text
from lib_lora_train.errors import DatasetError, counted, printable, some_of
from lib_lora_train.settings import CaptionSettings, named

JSON_SUFFIXES = (".json", ".jsonl")
CHOICES = "held_out.json"  # which images are held out (see held_out.py): no captions
TEXT_SUFFIXES = (*CAPTION_SUFFIXES, *JSON_SUFFIXES)
CAPTION_WORDS = ("caption", "text", "txt", "tag", "label", "prompt")  # in the names of folders for captions
_OF_PROGRAMS = (".npz", ".npy", ".pt", ".safetensors", ".cache", ".db", ".ini", ".toml", ".log", ".bak")  # nobody's captions
_FOR_PEOPLE = ("license", "licence", "readme", "copying", "notice")  # nobody's caption, where no image is called so
_MOST_JSON_BYTES = 256 << 20
_CAPTION_KEYS, _TAG_KEYS, _NAME_KEYS = ("caption", "text", "prompt"), ("tags", "tag_string"), ("file_name", "image", "file")
_NOT_TEXT = (  # of other programs' prompts: what it means there, what it looks like, and the setting that reads it
    ("wildcards such as {a|b}", re.compile(r"\{[^{}]*\|[^{}]*\}"), "enable_wildcard"),
    ("the separator |||", re.compile(r"\|\|\|"), "keep_tokens_separator"),
    ("the separator ;;;", re.compile(r";;;"), "secondary_separator"),
    ("emphasis such as (a:1.2)", re.compile(r"(?<!\\)\([^()]+:\d*\.?\d+\)"), ""),
    ("networks such as <lora:name:1>", re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>"), ""))

_CHOSEN = CaptionSettings()


@dataclass(frozen=True)
class CaptionFile:
    """What training uses of a caption file, and what is odd about it."""

    file: Path
    line: str  # in its normal form; "" where there is none, or the file cannot be read
    further_lines: tuple[str, ...] = ()
    encoding: str = ""  # where it is not UTF-8
    passed_over: tuple[Path, ...] = ()  # files that hold another caption of the image
    error: DatasetError | None = None

    @property
    def lines(self) -> str:
        """All its lines, of which a training with wildcards draws one."""
        return "\n".join(filter(None, (self.line, *self.further_lines)))

    def used(self, chosen: CaptionSettings) -> tuple[str, ...]:
        """The lines that these settings read."""
        return (self.line, *self.further_lines) if chosen.enable_wildcard else (self.line,)


@dataclass(frozen=True)
class FolderCaptions:
    """The captions of one folder's images. Made by `find_captions`."""

    files: Mapping[str, Sequence[Path]]  # by the image's name
    listed: Mapping[str, CaptionFile]  # by the image's name: what metadata says
    unmatched: tuple[str, ...]  # text files and metadata that fit no image
    unread: tuple[str, ...]  # files of other kinds

    def of(self, image: Path) -> CaptionFile | None:
        """The caption of one image; None where it has none. Nothing is raised for a file that is no text."""
        return that_counts(self.all_of(image))

    def all_of(self, image: Path) -> list[CaptionFile]:
        """What each of its files says, the first that counts first."""
        listed = [self.listed[image.name]] if image.name in self.listed else []
        return [*map(read_caption_file, self.files.get(image.name, ())), *listed]


class CaptionNotes:
    """Gathers what is odd about captions, so that it is said once a kind; for a check, a training and an import."""

    def __init__(self) -> None:
        self.captioned = 0
        self._names: dict[str, list[str]] = {}

    def add(self, found: CaptionFile | None, chosen: CaptionSettings = _CHOSEN) -> None:
        """The caption of one more image, and how it is to be read."""
        if found is None or not found.line:
            if found and not found.error and found.file.suffix.lower() in JSON_SUFFIXES:
                self._names.setdefault("a JSON file that names no caption or tags ({})", []).append(found.file.name)
            return
        self.captioned += 1
        not_text = [(what, named(reads) if reads else "") for what, looks, reads in _NOT_TEXT
                    if not (reads and getattr(chosen, reads)) and any(map(looks.search, found.used(chosen)))]
        for text, applies in (
            (f"several lines in the caption file ({{}}), of which only the first is used: join the lines, or switch "
             f"{named('enable_wildcard')} on", found.further_lines and not chosen.enable_wildcard),
            (f"several caption files, of which one is used ({{}}): remove the others, or name their endings in "
             f"{named('caption_extension')}", found.passed_over and len(endings_of(chosen)) < 2),
            (f"a caption in {found.encoding} and not UTF-8 ({{}}): see that it is read correctly; the studio saves it as UTF-8",
             found.encoding),
            *((f"{what.replace('{', '{{').replace('}', '}}')} in the caption ({{}}), which is plain text to a training"
               f"{f' without {reads}' if reads else ''}", True) for what, reads in not_text),
        ):
            if applies:
                self._names.setdefault(text, []).append(found.file.name)

    def sentences(self) -> list[str]:
        """What was found, one sentence a kind."""
        return [f"{counted(len(names), 'picture')} {'has' if len(names) == 1 else 'have'} "
                f"{text.format(printable(some_of(list(dict.fromkeys(names)))))}." for text, names in self._names.items()]


def of_no_kind(files: Iterable[str]) -> list[str]:
    """Those of files, by name, that are read as neither images nor captions, but for what programs keep beside them, and what
    people are to read."""
    return [name for name in files for path in [Path(name)] if not (
        path.name.startswith(".") or is_image_name(path) or file_key(path.stem) in _FOR_PEOPLE
        or path.suffix.lower() in (*TEXT_SUFFIXES, *_OF_PROGRAMS))]


def count_of_captions(images: int, captioned: int, unmatched: Sequence[str], *, unread: Sequence[str] = ()) -> str:
    """The closing sentence: "3 pictures, 1 with a caption; 2 text files fit no picture (b.txt, c.txt)."."""
    said = [f"{counted(images, 'picture')}, {captioned:,} with {'a caption' if captioned == 1 else 'captions'}"]
    if unmatched:
        said.append(f"{counted(len(unmatched), 'text file')} {'fits' if len(unmatched) == 1 else 'fit'} no picture "
                    f"({printable(some_of(unmatched, 3))})")
    if unread:
        said.append(f"{counted(len(unread), 'file is', 'files are')} of a kind that is not read "
                    f"({printable(some_of(unread, 3))})")
    return "; ".join(said) + "."


def find_captions(images: Sequence[Path], files: Iterable[Path], *, above: Iterable[Path] = (),
                  endings: Sequence[str] = ()) -> FolderCaptions:
    """The captions of `images`, which lie in one folder, among its `files` and the metadata in `above`, files of the folder
    above it. With `endings` (in lower case) only files that end so are read."""
    texts = {file.name: file for file in files if file.name != CHOICES}
    names = [image.name for image in images]
    if endings:
        own, unmatched = match_names(names, texts, endings=endings)
        return FolderCaptions({name: [texts[text] for text in found] for name, found in own.items()}, {}, tuple(unmatched), ())
    own, unmatched = match_names(names, texts)
    listed: dict[str, CaptionFile] = {}
    for file in above:
        if images and file.suffix.lower() in JSON_SUFFIXES:
            listed |= metadata_of(file, names, folder=images[0].parent.name)
    fitting = set()
    for name in unmatched:
        if texts[name].suffix.lower() in JSON_SUFFIXES and (said := metadata_of(texts[name], names)):
            listed |= said
            fitting.add(name)
    return FolderCaptions({name: [texts[text] for text in found] for name, found in own.items()}, listed, tuple(
        name for name in unmatched if name not in fitting), tuple(of_no_kind(texts)))


def captions_elsewhere(folder: Path, images: Sequence[Path], *, may_read: MayRead | None) -> Iterator[str]:
    """A sentence for each place near `folder` with text files of its images' names: the folder above, a folder for captions."""
    near = [folder.parent]
    for place in (folder, folder.parent):
        with contextlib.suppress(DatasetError):
            near += [below for below in list_folder(place, may_read=may_read).folders
                     if any(word in below.name.casefold() for word in CAPTION_WORDS)]
    for place in near:
        with contextlib.suppress(DatasetError):  # it is not for us
            if place != folder and (may_read is None or may_read(place)):
                files, names = list_folder(place, may_read=may_read).files, [image.name for image in images]
                found, _ = match_names(names, [file.name for file in files if file.suffix.lower() in CAPTION_SUFFIXES])
                fitting = set(found).union(*(metadata_of(file, names, folder=folder.name) for file in files
                                             if file.suffix.lower() in JSON_SUFFIXES))
                if fitting:
                    yield (f"{counted(len(fitting), 'picture')} of {folder.name} {'has' if len(fitting) == 1 else 'have'} a "
                           f"caption in {place}, which is not read there: move the text files beside the pictures.")


def endings_of(chosen: CaptionSettings) -> tuple[str, ...]:
    """Those of the caption files that are read, in lower case; () for the usual ones."""
    return tuple(f".{part.lstrip('.')}" for part in chosen.caption_extension.lower().replace(",", " ").split())


def match_names(images: Iterable[str], files: Iterable[str], *, endings: Sequence[str] = TEXT_SUFFIXES
                ) -> tuple[dict[str, list[str]], list[str]]:
    """({image's name: names of its text files, the first counts}, text files of no image by name), of one folder."""
    exact: dict[str, list[str]] = {}
    alike: dict[str, list[str]] = {}
    for image in images:
        for key in {image, Path(image).stem}:
            exact.setdefault(key, []).append(image)
            alike.setdefault(file_key(key), []).append(image)
    found: dict[str, list[tuple[tuple[bool, int, bool, str], str]]] = {}
    unmatched = []
    for text in files:
        stem, suffix = Path(text).stem, Path(text).suffix.lower()
        if suffix in endings:
            fitting = exact.get(stem) or alike.get(file_key(stem), ())
            for image in fitting:
                order = (stem not in exact, endings.index(suffix), stem == image, text)
                found.setdefault(image, []).append((order, text))
            unmatched += [] if fitting or file_key(stem) in _FOR_PEOPLE else [text]
    return {image: [text for _, text in sorted(of)] for image, of in found.items()}, sorted(unmatched)


def that_counts(found: Sequence[CaptionFile]) -> CaptionFile | None:
    """Of the files of one image the first that holds a caption, or cannot be read; else the first, which holds none."""
    held = [file for file in found if file.line or file.error]
    if not held:
        return next(iter(found), None)
    return replace(held[0], passed_over=tuple(file.file for file in held[1:] if file.line != held[0].line))


def read_caption_file(file: Path) -> CaptionFile:
    """What a text or JSON file of one image says."""
    try:
        if file.suffix.lower() in JSON_SUFFIXES:
            return _caption_file(file, next((caption for key, caption in _rows(file) if not key), ""))
        return _caption_file(file, *read_text(file))
    except DatasetError as error:
        return CaptionFile(file, "", error=error)


def metadata_of(file: Path, images: Sequence[str], *, folder: str = "") -> dict[str, CaptionFile]:
    """What a file of metadata says of the images of one folder, by name. Of entries that name their folder, those of `folder`
    count, which lies beside the file; with "" all do. A file that cannot be read says nothing."""
    captions = {}
    with contextlib.suppress(DatasetError):
        for key, caption in _rows(file):
            *folders, name = re.split(r"[/\\]", key)
            if caption and name and not (folder and folders and file_key(folders[-1]) != file_key(folder)):
                captions[f"{name}.json"] = caption
    return {image: _caption_file(file, captions[names[0]]) for image, names in match_names(images, captions)[0].items()}


def _caption_file(file: Path, text: str, encoding: str = "") -> CaptionFile:
    line, rest = first_line_and_rest(normal_form(printable(text).replace("\0", " ")))  # JSON may hold what no text file does
    return CaptionFile(file, line, tuple(_lines(rest)), encoding)


def _lines(text: str) -> Iterator[str]:
    """Each line with a tag in it."""
    while text:
        line, text = first_line_and_rest(text)
        if line:
            yield line


def _rows(file: Path) -> list[tuple[str, str]]:
    """(what an entry calls its image, its caption); the entry of a file about one image is called "". Raises DatasetError."""
    text = read_text(file, most_bytes=_MOST_JSON_BYTES).text
    is_lines = file.suffix.lower() == ".jsonl"
    try:
        data = [json.loads(line) for line in text.split("\n") if line.strip()] if is_lines else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"The caption file {file} cannot be read", why=f"it is not JSON ({error})",
                           remedy="mend or remove it") from error
    if isinstance(data, str) or isinstance(data, list) and data and all(isinstance(entry, str) for entry in data):
        return [("", data if isinstance(data, str) else ", ".join(data))]
    if isinstance(data, dict):
        caption = _caption_of(data)
        return [("", caption)] if caption else [(key, _caption_of(entry)) for key, entry in data.items()]
    rows = [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
    return [(str(next((row[key] for key in _NAME_KEYS if row.get(key)), "")), _caption_of(row)) for row in rows]


def _caption_of(entry: object) -> str:
    """The caption and, behind it, the tags of one entry, as kohya's fine-tuning joins them; "" where there is neither."""
    if not isinstance(entry, dict):
        return entry if isinstance(entry, str) else ""
    caption, tags = (next((entry[key] for key in keys if entry.get(key)), "") for keys in (_CAPTION_KEYS, _TAG_KEYS))
    caption = next(iter(caption), "") if isinstance(caption, list) else caption  # several of one image
    if isinstance(tags, str):  # booru's tags have spaces between them, and none in them; gallery-dl names the site as category
        tags = tags.split() if ("_" in tags or "category" in entry or "tag_string" in entry) and "," not in tags else [tags]
    tags = ", ".join(map(str, tags)) if isinstance(tags, (list, dict)) else ""  # as keys, with their scores
    return ", ".join(text for text in (caption, tags) if isinstance(text, str) and split_tags(text))
