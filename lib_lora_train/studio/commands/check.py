"""`python -m lib_lora_train check DIR`: what is in a folder of pictures, and what to fix before training on it."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lib_lora_train.dataset.report import Report, Tokenizer

# Only what costs nothing is imported here: these modules load numpy and torch when the command starts.

NOTHING_TO_FIX, UNUSABLE, TO_LOOK_AT, INTERRUPTED = 0, 2, 3, 130
_SHEET_KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `check`. Exit codes: 0 nothing to fix, 2 cannot be trained on as it is, 3 something to look at, 130 interrupted."""
    check = commands.add_parser(
        "check", help="say what is in a folder of pictures and what to fix first",
        description="Nothing is changed. Exit code: 0 nothing to fix, 3 something to look at, 2 cannot be trained on.")
    check.add_argument("folder", type=Path, metavar="DIR", help="the pictures, or a folder of folders named like 10_name")
    check.add_argument("--json", action="store_true", help="everything that was found, as JSON")
    check.add_argument("--sheet", type=Path, metavar="FILE", help="a picture of what the crops lose, as PNG, JPEG or WebP")
    check.add_argument("--family", type=_family, default="", help="the kind of model that will be trained, sd1, sd2 or "
                       "sdxl: 512, 768 or 1024 pixels; sd1 unless told otherwise")
    check.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the training, such as "
                       "resolution=768; may be repeated")
    check.set_defaults(command=run)


def _family(name: str) -> str:
    from lib_lora_train.model.family import FAMILIES

    if name not in FAMILIES:
        raise argparse.ArgumentTypeError(f"choose from {', '.join(FAMILIES)}")
    return name


def run(chosen: argparse.Namespace) -> int:
    """`check`; returns the exit code. Raises UserError for a folder without pictures and for settings that do not exist."""
    from lib_lora_train.dataset.report import examine
    from lib_lora_train.errors import SettingError
    from lib_lora_train.model.family import training_sizes
    from lib_lora_train.settings import assignment, parse

    settings = parse(dict(assignment(text) for text in chosen.set))
    if chosen.sheet is not None and chosen.sheet.suffix.lower() not in _SHEET_KINDS:
        raise SettingError(f"The crop sheet {chosen.sheet} cannot be written", why="its name must end in .png, .jpg or .webp")
    bar = _Bar()
    try:
        report = examine(chosen.folder, settings=settings, tokenizer=_tokenizer(), sizes=training_sizes(chosen.family),
                         on_progress=bar.advance)
    except KeyboardInterrupt:
        return INTERRUPTED  # nothing was changed, so there is nothing to say
    finally:
        bar.close()
    print(json.dumps(report.to_dict(), ensure_ascii=False, indent=1) if chosen.json else report.text())
    if chosen.sheet is not None and any(image.usable for image in report.images):
        _write_sheet(report, chosen.sheet)
        if not chosen.json:
            print(f"{'crop sheet':12}{chosen.sheet}")
    return UNUSABLE if not report.trainable else TO_LOOK_AT if report.advice else NOTHING_TO_FIX


def _tokenizer() -> Tokenizer | None:
    """CLIP's, or none where open_clip is missing: the report then counts no tokens."""
    from lib_lora_train.model.sd.tokens import clip_tokenizer

    try:
        return clip_tokenizer()
    except ImportError:
        print("note: captions' tokens are not counted, because the package open_clip_torch is missing", file=sys.stderr)
        return None


def _write_sheet(report: Report, path: Path) -> None:
    from lib_lora_train.dataset.report import crop_sheet
    from lib_lora_train.errors import translated
    from lib_lora_train.storage.atomic import write_atomic

    encoded = io.BytesIO()
    crop_sheet(report).save(encoded, _SHEET_KINDS[path.suffix.lower()])
    with translated("the crop sheet was written"):
        write_atomic(path, encoded.getvalue())


class _Bar:
    """Progress on stderr where a person watches; what is printed stays clean for programs."""

    def __init__(self) -> None:
        from tqdm import tqdm
        self._bar = tqdm(desc="Looking at pictures", unit="", dynamic_ncols=True, leave=False,
                         disable=not sys.stderr.isatty())

    def advance(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()
