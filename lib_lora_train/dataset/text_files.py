"""Text files in any encoding that captions are found in. UTF-8, UTF-16 with a mark and ISO-2022-JP are certain.

The others are guessed from what the bytes spell: captions are too short for statistics of bytes (charset-normalizer reads 7 of
28 short Chinese ones right), but they speak of pictures, and few words of that kind come out by chance.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from lib_lora_train.errors import DatasetError

MOST_BYTES = 1 << 20  # of one caption file: a larger one is a mistake and stays as it is
CAPTION_SUFFIXES = (".txt", ".caption")
_SIBLINGS = 200  # files of a folder that are asked for their encoding
_LEAST, _AHEAD = 0.3, 0.2  # of the score that the best reading must have, and be before the next
_CERTAIN = {"utf-8-sig": "", "utf-16": "UTF-16", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16", "iso2022_jp": "ISO-2022-JP"}

# Of each encoding: its name, and the first bytes of its frequent letters.
_SCRIPTS = {"gb18030": ("GBK", 0xB0, 0xD7), "cp950": ("Big5", 0xA4, 0xC6), "cp932": ("Shift-JIS", 0x82, 0x97),
            "cp949": ("EUC-KR", 0xB0, 0xC8), "utf-16-le": ("UTF-16", 1, 0), "utf-16-be": ("UTF-16", 1, 0)}
# What a word with letters beyond ASCII looks like: not three accents in a row, and not accents only.
_FOREIGN = "À-ÏÑ-ÖØ-Üß-ïñ-öø-üÿŒœŠšŽž"
_ALPHABETS = {
    "cp1252": ("Windows-1252", re.compile(
        f"[ÀÁÂÄÅÉÊÓÔÖØàáâäåèéêóôöø]|(?=.*[A-Za-z])(?!.*[{_FOREIGN}]{{3}})[A-Za-z{_FOREIGN}]+")),
    "cp1251": ("Windows-1251", re.compile("[А-яЁё]+")), "koi8_r": ("KOI8-R", re.compile("[А-яЁё]+"))}
_PUNCTUATION = re.compile(  # of alphabets, where it stands as in a sentence
    r"(?<!\w)[“‘«„¡¿©](?=[\w\s])|(?<=[\w\s.,!?…])[”’»…°²½®™](?!\w)|(?<=\w)[’–—·](?=\w)|(?<= )[–—•·](?= )|\xa0")
_SIGNS = re.compile("[\x00-\x7f\u3000-\u303f\u30fb\u30fc\uff00-\uff20\uff5e“”‘’…—·]+")


class Text(NamedTuple):
    """What a file says, and the encoding's name where it is another than UTF-8."""

    text: str
    encoding: str = ""


def read_text(path: Path, *, most_bytes: int = MOST_BYTES) -> Text:
    """The text of a file, a mark at its beginning left out. Where its bytes are ambiguous, the other caption files of its
    folder decide. Raises DatasetError naming the file if nothing fits, if it is too large, or cannot be read."""
    try:
        if path.stat().st_size > most_bytes:
            raise DatasetError(f"The file {path} is too large for a caption", why=f"it holds over {most_bytes >> 10} KiB")
        data = path.read_bytes()
        found = decode(data)
        if found is None or found.encoding not in _CERTAIN.values():
            usual = _usual_encoding(path.parent, path.parent.stat().st_mtime_ns)
            found = next((Text(text, name) for score, text, name in _readings(data) if name == usual and score > 0), found)
    except OSError as error:
        raise DatasetError(f"The caption file {path} cannot be read", why=str(error)) from error
    if found is None:
        raise DatasetError(f"The caption file {path} is not UTF-8 text", why="it is not clear which encoding it has",
                           remedy="save it again with the encoding UTF-8 (Notepad: Save as, Encoding)")
    return found


def decode(data: bytes) -> Text | None:
    """Bytes as text; None where no encoding fits, or several."""
    for encoding in (_told_encoding(data), "utf-8-sig"):
        text = data.decode(encoding, "replace" if encoding != "utf-8-sig" else "surrogateescape")
        if not re.search("[\0\udc80-\udcff]", text) and (encoding == "utf-8-sig" or "\ufffd" not in text):
            return Text(text, _CERTAIN[encoding])
    best = _readings(data)[:2]
    if not best or best[0][0] < _LEAST or len(best) > 1 and best[0][0] - best[1][0] < _AHEAD:
        return None
    return Text(*best[0][1:])


def _told_encoding(data: bytes) -> str:
    """The encoding that marks or zero bytes tell. Chinese and Japanese in UTF-16 can be UTF-8 as well: then there are no words
    in it, but frequent letters one and all."""
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    no_words = len(data) > 3 and not re.search(rb"[ ,]|[A-Za-z]{3}", data)
    for encoding, high_bytes in (("utf-16-le", data[1::2]), ("utf-16-be", data[::2])):
        letters = _SIGNS.sub("", data.decode(encoding, "replace")) if no_words else ""
        if 2 * high_bytes.count(0) > len(high_bytes) or letters and _letters()["UTF-16"].issuperset(letters):
            return encoding
    return "iso2022_jp" if b"\x1b$" in data else "utf-8-sig"


def _readings(data: bytes) -> list[tuple[float, str, str]]:
    """(score up to 1, text, encoding's name) of every encoding that the bytes could be, the best first, each text once."""
    found: dict[str, tuple[float, str]] = {}
    for encoding, (name, first, last) in _SCRIPTS.items():
        text = data.decode(encoding, "replace")
        scores = [1.0 if letter in _letters()[name] else 0.1 if first <= letter.encode(encoding, "replace")[0] <= last else -1.0
                  for letter in _SIGNS.sub("", text)]
        if scores and "\ufffd" not in text:
            found[text] = max(found.get(text, (-1.0, "")), (sum(scores) / len(scores), name))
    for encoding, (name, word) in _ALPHABETS.items():
        text = data.decode(encoding, "replace")
        foreign = [letters for letters in re.findall(r"[^\W\d_]+", text) if not letters.isascii()]
        if (all(sign.isascii() or sign.isalpha() for sign in _PUNCTUATION.sub("", text)) and "\0" not in text
                and all(word.fullmatch(letters) and (letters.islower() or letters.istitle() or letters.isupper())
                        for letters in foreign) and (encoding == "cp1252" or any(len(letters) > 1 for letters in foreign))
                and not (encoding == "koi8_r" and "".join(foreign).isupper())):  # small letters of Windows-1251
            found.setdefault(text, (1.0, name))
    return sorted(((score, text, name) for text, (score, name) in found.items()), reverse=True)


@lru_cache(maxsize=1)
def _letters() -> dict[str, frozenset[str]]:
    """By the encoding's name, letters that captions of images are full of."""
    letters = json.loads(Path(__file__).with_name("caption_letters.json").read_text(encoding="utf-8"))
    return {name: frozenset(of) for name, of in letters.items()} | {"UTF-16": frozenset("".join(letters.values()))}


@lru_cache(maxsize=8)
def _usual_encoding(folder: Path, changed: int) -> str:
    """The name of the encoding that most caption files of a folder have which are not UTF-8; "" where none has more than half.

    `changed` is the folder's time of change: a folder that is as it was is not asked again.
    """
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in CAPTION_SUFFIXES and not path.is_symlink()]
    found = (decode(path.read_bytes()) for path in files[:_SIBLINGS] if path.stat().st_size <= MOST_BYTES)
    votes = Counter(text.encoding if text else "" for text in found if text is None or text.encoding)
    return next((name for name, count in votes.most_common(1) if 2 * count > votes.total()), "")
