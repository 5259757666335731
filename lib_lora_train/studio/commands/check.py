"""`python -m lib_lora_train check DIR`: what is in a folder of images, and what to fix before training on it."""

from __future__ import annotations

import argparse
import json
import sys

from lib_lora_train.dataset.captions import Tokenizer
from lib_lora_train.dataset.crop_sheet import crop_sheet
from lib_lora_train.dataset.images import encode_image
from lib_lora_train.dataset.report import examine
from lib_lora_train.errors import SettingError, translated
from lib_lora_train.model.family import training_sizes
from lib_lora_train.model.sd.tokens import clip_tokenizer
from lib_lora_train.settings import assignment, parse
from lib_lora_train.storage.atomic import write_atomic
from lib_lora_train.studio.commands.progress import progress_bar

NOTHING_TO_FIX, UNUSABLE, TO_LOOK_AT = 0, 2, 3
_SHEET_KINDS = (".png", ".jpg", ".jpeg", ".webp")


def run(chosen: argparse.Namespace) -> int:
    """`check`; returns the exit code. Raises UserError for a folder without images and for settings that do not exist."""
    settings = parse(dict(assignment(text) for text in chosen.set))
    if chosen.sheet is not None and chosen.sheet.suffix.lower() not in _SHEET_KINDS:
        raise SettingError(f"The crop sheet {chosen.sheet} cannot be written", why="its name must end in .png, .jpg or .webp")
    with progress_bar("Looking at pictures") as progress:
        report = examine(chosen.folder, settings=settings, tokenizer=_tokenizer(), sizes=training_sizes(chosen.family),
                         on_progress=progress)
    print(json.dumps(report.to_dict(), indent=1) if chosen.json else report.text())
    if chosen.sheet is not None and any(image.usable for image in report.images):
        with translated("the crop sheet was written"):
            write_atomic(chosen.sheet, encode_image(crop_sheet(report), suffix=chosen.sheet.suffix.lower()))
        if not chosen.json:
            print(f"{'crop sheet':12}{chosen.sheet}")
    return UNUSABLE if not report.trainable else TO_LOOK_AT if report.advice else NOTHING_TO_FIX


def _tokenizer() -> Tokenizer | None:
    """CLIP's, or none where open_clip is missing: the report then counts no tokens."""
    try:
        return clip_tokenizer()
    except ImportError:
        print("note: captions' tokens are not counted, because the package open_clip_torch is missing", file=sys.stderr)
        return None
