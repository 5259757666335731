"""`python -m lib_lora_train tag DIR --with …`: captions for a folder of pictures, all written at the end or none."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lib_lora_train.studio.captions.store import CaptionStore
    from lib_lora_train.tagging.captioner import CaptionerSource
    from lib_lora_train.tagging.loop import Row

# Only what costs nothing is imported here: these modules load torch when the command starts.

SOME_FAILED = 3
_KINDS = ("wd", "infotext", "filename", "template")


def add_tag(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `tag`. Exit codes: 0 done, 2 bad input, 3 done but for pictures that were named, 130 interrupted (what was found
    until then is written)."""
    from lib_lora_train.tagging.options import MODES, OPTIONS

    names = "\n".join(f"  {option.name} = {option.default!r}\n      {option.help}" for option in OPTIONS.values())
    tag = commands.add_parser("tag", help="caption a folder of pictures",
                              epilog=f"options for --set and their defaults:\n{names}",
                              formatter_class=argparse.RawDescriptionHelpFormatter)
    tag.add_argument("folder", type=Path, metavar="DIR", help="the pictures, or a folder of folders named like 10_name")
    tag.add_argument("--with", dest="source", required=True, choices=_KINDS, help="wd: a WD v3 tagger; infotext: the prompt "
                     "inside the pictures; filename: their names; template: the same text for all")
    tag.add_argument("--model", type=Path, metavar="DIR", help="the folder of the WD tagger: model.safetensors, config.json, "
                     "selected_tags.csv; or the name of a published one (wd-vit-tagger-v3)")
    tag.add_argument("--download", action="store_true", help="fetch the published tagger where it is not there")
    tag.add_argument("--threshold", metavar="N", help="general_threshold")
    tag.add_argument("--character-threshold", metavar="N", help="character_threshold")
    tag.add_argument("--mode", choices=MODES, help="what becomes of captions that are there")
    tag.add_argument("--trigger", metavar="WORD", help="trigger_word")
    tag.add_argument("--template", metavar="TEXT", help="template")
    tag.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any option; may be repeated")
    tag.add_argument("--device", default="", help="where to compute (cuda, cpu); by default a graphics card if there is one")
    tag.add_argument("--dry-run", action="store_true", help="show the captions and write nothing")
    tag.add_argument("--json", action="store_true", help="one JSON object a picture instead of text")
    tag.set_defaults(command=run)


def run(chosen: argparse.Namespace) -> int:
    """`tag`; returns the exit code. Raises UserError for bad input."""
    from lib_lora_train.errors import DatasetError
    from lib_lora_train.studio.captions.store import CaptionStore
    from lib_lora_train.tagging.loop import tag_images
    from lib_lora_train.tagging.options import parse_options

    options = parse_options(_values(chosen))
    source, device = _source(chosen), _device(chosen.device)
    store = CaptionStore.open(chosen.folder)
    for note in store.notes:
        print(note, file=sys.stderr)
    if not store.images:
        raise DatasetError(f"There is no picture in {chosen.folder}")
    counter = _Counter(shown=not chosen.json and sys.stderr.isatty())
    rows = tag_images(store.images, source, options=options, existing=lambda path: _existing(store, path), device=device,
                        on_progress=counter)
    captions, problems, interrupted = _gathered(rows, as_json=chosen.json, quietly=not chosen.dry_run, counter=counter)
    if chosen.dry_run:
        if not chosen.json:
            print(f"{len(captions)} captions would be written, {problems} pictures have problems. Nothing was written.")
    else:
        _write(store, captions, label=source.label, as_json=chosen.json)
    return 130 if interrupted else SOME_FAILED if problems else 0


def _values(chosen: argparse.Namespace) -> dict[str, object]:
    from lib_lora_train.errors import SettingError

    values: dict[str, object] = {}
    for text in chosen.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingError(f"--set {text} is not an assignment", remedy="write --set name=value")
        values[name.strip()] = value.strip()
    named = {"general_threshold": chosen.threshold, "character_threshold": chosen.character_threshold, "mode": chosen.mode,
             "trigger_word": chosen.trigger, "template": chosen.template, "download": chosen.download or None}
    return values | {name: value for name, value in named.items() if value is not None}


def _source(chosen: argparse.Namespace) -> CaptionerSource:
    from lib_lora_train.errors import SettingError
    from lib_lora_train.tagging.plain import PLAIN_SOURCES
    from lib_lora_train.tagging.wd import PUBLISHED, WDSource

    if chosen.source == "wd":
        # Below the current folder, as the page without a WebUI has it below its own.
        return WDSource(chosen.model or Path("taggers") / PUBLISHED[0])
    if chosen.model is not None:
        raise SettingError(f"--model has no effect with --with {chosen.source}", remedy="leave it out, or take --with wd")
    return next(source for source in PLAIN_SOURCES if source.name == chosen.source)


def _device(name: str) -> torch.device:
    import torch

    from lib_lora_train.errors import SettingError

    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise SettingError(f"--device {name} is not possible", why=str(error).splitlines()[0]) from error


def _existing(store: CaptionStore, path: Path) -> str:
    """The caption that is there. Raises DatasetError for one that is no text, which nothing may be added to."""
    from lib_lora_train.dataset.captions import read_caption

    index = store.index(path)
    assert index is not None
    if store.problem(index) and store.caption_file(index).is_file():
        read_caption(store.caption_file(index))
    return store.caption(index)


def _gathered(rows: Iterable[Row], *, as_json: bool, quietly: bool, counter: _Counter) -> tuple[dict[Path, str], int, bool]:
    """The new captions, how many pictures had problems, and whether Ctrl+C ended it."""
    captions: dict[Path, str] = {}
    problems = 0
    try:
        for path, caption, problem in rows:
            if caption is not None:
                captions[path] = caption
            problems += bool(problem)
            counter.clear()
            if as_json:
                row = {"picture": str(path), "caption": caption, "problem": problem}
                print(json.dumps(row, ensure_ascii=False), flush=True)
            elif problem:
                print(f"{path.name}: {problem}", file=sys.stderr)
            elif not quietly and caption is not None:
                print(f"{path.name}: {caption}")
    except KeyboardInterrupt:
        counter.clear()
        print("Stopped; what was found until here is kept.", file=sys.stderr)
        return captions, problems, True
    return captions, problems, False


def _write(store: CaptionStore, captions: dict[Path, str], *, label: str, as_json: bool) -> None:
    places = {index: text for path, text in captions.items() if (index := store.index(path)) is not None}
    store.set_captions(places, label)
    saved = store.save()
    for path in saved.conflicts:
        print(f"{path} was changed by another program meanwhile and is left as it is.", file=sys.stderr)
    if not as_json:
        kept = f" What was there before is in {saved.backup}." if saved.backup else ""
        print(f"{saved.written} captions written.{kept}")


class _Counter:
    """How far it is, on one line that is written over."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown

    def __call__(self, done: int, total: int) -> None:
        if self._shown:
            print(f"\r{done}/{total} pictures", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Make room for a line."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr)
